"""Check that model and guide agree, site by site, and the options in ``infer={...}``."""

from __future__ import annotations

import difflib
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro.distributions as dist
import torch.distributions as torch_dist
from pyro.distributions import Unit
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample

from pyro_gumbel.distributions.families import (
    has_law_of,
    is_bit,
    is_categorical,
    is_one_hot,
    unwrap,
)

__all__ = [
    "ModelSiteCheck",
    "check_guide_site",
    "check_model_site",
    "check_programs",
    "explain_mismatch",
    "guided_sites",
    "latent_sites",
]

PARTICLE_PLATE = "num_particles_vectorized"  # the name that Pyro's own losses give it

_COUNTS = (dist.Geometric, dist.NegativeBinomial, dist.Poisson)
_PYRO_STRAIGHT_THROUGH = (
    dist.RelaxedOneHotCategoricalStraightThrough,
    dist.RelaxedBernoulliStraightThrough,
)


def latent_sites(trace: Trace) -> dict[str, Any]:
    """Return the trace's sites that are sampled, not observed."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    }


def guided_sites(trace: Trace) -> dict[str, Any]:
    """Return the latent sites of a model that are not marked to be summed over."""
    return {
        name: site
        for name, site in latent_sites(trace).items()
        if (site["infer"] or {}).get("enumerate") is None
    }


def check_programs(model_trace: Trace, guide_trace: Trace, nesting: int | None) -> None:
    """Check that each latent site of the model has a guide's site that fits it.

    Args:
        model_trace: A run of the model on the guide's values.
        guide_trace: The run of the guide.
        nesting: Number of dimensions of the programs' plates; those further left are of particles
            and of enumerated values. ``None`` if no values have such dimensions.

    Raises:
        ValueError: If a latent site is missing from the guide, an observed one is in it, shapes
            or plates differ, a density faces a mass, or the guide draws what the model cannot.
    """
    model, guide = latent_sites(model_trace), latent_sites(guide_trace)
    for name in model:
        if name not in guide and model[name]["infer"].get("enumerate") is None:
            # Pyro makes this site of pyro.sample(..., obs_mask=...), without its infer.
            masked = name.endswith("_unobserved")
            mark = "config_enumerate(model)" if masked else "infer={'enumerate': 'parallel'}"
            lost = ", since obs_mask drops infer" if masked else ""
            raise ValueError(
                f"The model's latent site {name!r} is missing from the guide, whose sites are "
                f"{list(guide)}. Sample it in the guide, observe it in the model, or, if it is "
                f"discrete, sum over it: {mark}{lost}."
            )
    _check_common_sites(model, guide, nesting)
    for name, site in guide.items():
        if name not in model:
            _check_guide_only(name, site, model_trace)


@contextmanager
def explain_mismatch(
    traced_model: Any, guide_trace: Trace, nesting: Callable[[], int | None]
) -> Iterator[None]:
    """Where a model fails, name a guide's value that does not fit its site: the likelier cause.

    Raises:
        ValueError: As :func:`check_programs` does, for the sites that the model has come to.
    """
    try:
        yield
    except (IndexError, RuntimeError, ValueError):
        model, guide = latent_sites(traced_model.trace), latent_sites(guide_trace)
        _check_common_sites(model, guide, nesting())
        for name in model.keys() & guide.keys():
            _check_index(name, model[name], guide[name]["fn"])
        raise


def _check_common_sites(model: dict[str, Any], guide: dict[str, Any], nesting: int | None) -> None:
    for name, site in model.items():
        if name not in guide:
            continue
        _check_event(name, site["fn"], guide[name]["fn"])
        _check_measure(name, site["fn"], guide[name]["fn"])
        _check_values(name, site, guide[name]["fn"])
        _check_batch(name, site, guide[name], nesting)


def _check_guide_only(name: str, site: Any, model_trace: Trace) -> None:
    twin = model_trace.nodes.get(name)
    if twin is not None and twin["type"] == "sample":
        raise ValueError(
            f"Site {name!r} is observed in the model and sampled in the guide; remove it from the "
            "guide, or leave it latent in "
            "the model."
        )
    _refuse_pyro_straight_through(name, site["fn"], "guide")
    if not site["infer"].get("is_auxiliary"):
        warnings.warn(
            f"Site {name!r} is in the guide and not in the model; if that is meant, write "
            "infer={'is_auxiliary': True}.",
            stacklevel=2,
        )


def _check_event(name: str, model_fn: Any, guide_fn: Any) -> None:
    if model_fn.event_shape == guide_fn.event_shape:
        return
    if model_fn.event_dim != guide_fn.event_dim:
        raise ValueError(
            f"At site {name!r}, model and guide disagree on event_dim: the model's "
            f"{_name(model_fn)} has event shape "
            f"{tuple(model_fn.event_shape)}, the guide's {_name(guide_fn)} has "
            f"{tuple(guide_fn.event_shape)}. Use the same family "
            "(a Categorical draws an index, a OneHotCategorical a vector) and the same "
            ".to_event(...) in both."
        )
    raise ValueError(
        f"At site {name!r}, model and guide disagree on the event shape: {_name(model_fn)} has "
        f"{tuple(model_fn.event_shape)} "
        f"in the model, {_name(guide_fn)} has {tuple(guide_fn.event_shape)} in the guide."
    )


def _check_measure(name: str, model_fn: Any, guide_fn: Any) -> None:
    _refuse_pyro_straight_through(name, guide_fn, "guide")
    _refuse_pyro_straight_through(name, model_fn, "model")
    guide_mass, model_mass = _is_discrete(guide_fn), _is_discrete(model_fn)
    if None in (guide_mass, model_mass) or guide_mass == model_mass:
        return
    kinds = {True: "a mass", False: "a density"}
    discrete = model_fn if model_mass else guide_fn
    raise ValueError(
        f"At site {name!r}, the guide's {_name(guide_fn)} has {kinds[bool(guide_mass)]} and the "
        f"model's {_name(model_fn)} has "
        f"{kinds[bool(model_mass)]}: their ratio is not an ELBO. Leave both discrete, "
        f"{_name(discrete)}(...), and choose how the "
        f"gradient passes: config_gradient(guide, {{{name!r}: ReinMax()}}) or another estimator."
    )


def _check_values(name: str, site: Any, guide_fn: Any) -> None:
    """Refuse a guide whose draws have no mass under the model's one-hots or bits.

    Their formulas would score them all the same; other families look at the values they score.
    """
    model, guide = unwrap(site["fn"]), unwrap(guide_fn)
    if has_law_of(guide, dist.Delta) or _is_within(guide, model, site["value"]):
        return
    raise ValueError(
        f"At site {name!r}, the guide's {_name(guide)} draws values that have no mass under the "
        f"model's {_name(model)}: their ratio is not an ELBO. Write {_name(model)} in the guide, "
        "too."
    )


def _check_index(name: str, site: Any, guide_fn: Any) -> None:
    fn, value = unwrap(site["fn"]), site["value"]
    if is_categorical(fn) and value.is_floating_point():
        raise ValueError(
            f"At site {name!r}, the guide's {_name(guide_fn)} draws values of {value.dtype}, and "
            f"the model's {_name(fn)} has integers, which may be an index. Write {_name(fn)} in "
            "the guide, too."
        )
    if is_categorical(fn) and not bool(fn.support.check(value).all()):
        raise ValueError(
            f"At site {name!r}, the guide's {_name(guide_fn)} drew {int(value.max())}, "
            f"and the model's {_name(fn)} has the values 0 to {fn.param_shape[-1] - 1}. Give both "
            "the same number of categories."
        )


def _is_within(guide: Any, model: Any, value: Any) -> bool:
    if is_one_hot(model):
        fits, misfits = is_one_hot(guide), is_bit(guide)
    elif is_bit(model):
        fits, misfits = is_bit(guide) or is_one_hot(guide), has_law_of(guide, *_COUNTS)
    else:
        return True
    # Another family, a mixture or one of the user's, is known by what it draws.
    return fits or not (misfits or not bool(model.support.check(value).all()))


def _check_batch(name: str, model_site: Any, guide_site: Any, nesting: int | None) -> None:
    """Refuse plates that one program has and the other lacks."""
    model, guide = (
        _plate_shape(site["fn"].batch_shape, nesting) for site in (model_site, guide_site)
    )
    pairs = itertools.zip_longest(reversed(model), reversed(guide), fillvalue=1)
    if any(one != other for one, other in pairs):
        raise ValueError(
            f"At site {name!r}, model and guide disagree on the batch shape: the model's "
            f"{_name(model_site['fn'])} has {tuple(model)} in {_plates(model_site)}, the guide's "
            f"{_name(guide_site['fn'])} has {tuple(guide)} in {_plates(guide_site)}. Write the "
            "same `with pyro.plate(name, size):` around it in both."
        )


def _plate_shape(shape: Any, nesting: int | None) -> Any:
    return shape if nesting is None else shape[max(0, len(shape) - nesting) :]


def _plates(site: Any) -> str:
    frames = [frame for frame in site["cond_indep_stack"] if frame.name != PARTICLE_PLATE]
    plates = [f"plate {frame.name!r} of {frame.size}" for frame in frames if frame.vectorized]
    return " and ".join(plates) or "no plate"


def _refuse_pyro_straight_through(name: str, fn: Any, program: str) -> None:
    fn = unwrap(fn)
    if has_law_of(fn, *_PYRO_STRAIGHT_THROUGH):
        plain = "OneHotCategorical" if fn.event_dim else "Bernoulli"
        raise ValueError(
            f"At site {name!r}, the {program}'s {_name(fn)} draws hard values and scores them by "
            "the density of soft ones: that is "
            f"not an ELBO. Write {plain}(logits=...) in the model and in the guide, and "
            f"config_gradient(guide, {{{name!r}: GumbelStraightThrough(temperature)}})."
        )


def _is_discrete(fn: Any) -> bool | None:
    if has_law_of(unwrap(fn), dist.Delta):
        return None  # a point mass faces anything
    try:
        support = fn.support
    except NotImplementedError:
        return None
    return None if support is None else bool(support.is_discrete)


def _name(fn: torch_dist.Distribution) -> str:
    return type(unwrap(fn)).__name__


# Options that Pyro reads, or that its handlers set at a latent site.
_PYROS_OWN = {
    "expand",
    "is_auxiliary",
    "num_samples",
    "obs",
    "prior",
    "tmc",
    "was_observed",
}
_SPELT_RIGHT = _PYROS_OWN | {"enumerate", "gradient"}
_REMEDIES = {
    "baseline": "write infer={'gradient': Score(MovingAverage())} or another baseline",
}
_NAME = "the option for an estimator is 'gradient'"


def check_guide_site(msg: Message) -> None:
    """Check the options of a guide's sample site.

    Raises:
        ValueError: If a latent site has an unknown option, or an observed one has an estimator.
    """
    if msg["is_observed"]:
        _check_observed(msg, "guide")
        return
    infer: dict[str, Any] = msg["infer"] or {}
    if "gradient" not in infer:
        _check_mark(msg, infer)
    for key in infer:
        if key not in _SPELT_RIGHT and not key.startswith("_"):
            raise ValueError(
                f"At site {msg['name']!r}, infer[{key!r}] has no effect in Estimator_ELBO; "
                f"{_REMEDIES.get(key, _NAME)}."
            )


def _check_mark(msg: Message, infer: dict[str, Any]) -> None:
    """Check a mark of Pyro's for enumeration, which stands for ``Enumerate()`` in the guide."""
    mark = infer.get("enumerate")
    if mark not in (None, "parallel", "sequential"):
        raise ValueError(
            f"At site {msg['name']!r} of the guide, infer['enumerate'] is {mark!r}; expected "
            "'parallel' or 'sequential'. Both stand for infer={'gradient': Enumerate()}."
        )
    if mark and infer.get("num_samples") is not None:
        raise ValueError(
            f"At site {msg['name']!r} of the guide, infer['num_samples'] is "
            f"{infer['num_samples']!r}, and enumerated sites have all their values. Remove it, or "
            "write Estimator_ELBO(num_particles=...) and another estimator."
        )


def check_model_site(msg: Message, guide_site: Any = None) -> None:
    """Check that a model's sample site has no estimator of its own.

    Args:
        msg: The site with the model's own options, before a replay replaces them by the guide's.
        guide_site: The guide's site of that name, if there is one. A guide that runs the model,
            or is the same program, has the model's option, which takes effect there.

    Raises:
        ValueError: If it has an estimator, or an option with a similar name.
    """
    if msg["is_observed"]:
        _check_observed(msg, "model")
        return
    infer: dict[str, Any] = msg["infer"] or {}
    _check_spelling(msg, "model")
    choice = infer.get("gradient")
    of_guide = ((guide_site or {}).get("infer") or {}).get("gradient")
    if choice is None or choice is of_guide or repr(choice) == repr(of_guide):
        return
    raise ValueError(
        f"The model's site {msg['name']!r} has infer['gradient'] = {choice!r}, and estimators "
        "only take effect in the guide. Remove the option from the model, and write "
        f"config_gradient(guide, {{{msg['name']!r}: {choice!r}}}) or the option at the guide's "
        "site."
    )


class ModelSiteCheck(Messenger):
    """Applies :func:`check_model_site` to a model, inside the replay of a guide."""

    def __init__(self, guide_trace: Trace) -> None:
        super().__init__()
        self._guide = guide_trace.nodes

    def _pyro_sample(self, msg: Message) -> None:
        if not site_is_subsample(msg):
            check_model_site(msg, self._guide.get(msg["name"]))


def _check_observed(msg: Message, program: str) -> None:
    infer: dict[str, Any] = msg["infer"] or {}
    if infer.get("_deterministic") or isinstance(unwrap(msg["fn"]), Unit):
        return  # handlers that configure every site set their options
    _check_spelling(msg, program)
    if infer.get("gradient") is not None:
        raise ValueError(
            f"The {program}'s site {msg['name']!r} has infer['gradient'] = {infer['gradient']!r} "
            "and is observed; only latent sites have estimators. Remove the option."
        )


def _check_spelling(msg: Message, program: str) -> None:
    for key in msg["infer"] or {}:
        if key in _SPELT_RIGHT or key.startswith("_"):
            continue
        if difflib.get_close_matches(key.casefold(), ("gradient", "estimator"), cutoff=0.8):
            raise ValueError(
                f"The {program}'s site {msg['name']!r} has infer[{key!r}]; {_NAME}, at a latent "
                "site of the guide."
            )
