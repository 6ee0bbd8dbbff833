"""Check options in ``infer={...}`` of sample sites, and reject those without effect."""

from __future__ import annotations

import difflib
from typing import Any

from pyro.distributions import Unit
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample

from pyro_gumbel.distributions.families import unwrap

__all__ = ["ModelSiteCheck", "check_guide_site", "check_model_site"]

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
    "enumerate": "write infer={'gradient': Enumerate()}",
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
    for key in infer:
        if key == "enumerate" and (infer[key] is None or "gradient" in infer):
            continue  # off, or set by Pyro's config_enumerate and overridden by 'gradient'
        if key != "gradient" and key not in _PYROS_OWN and not key.startswith("_"):
            raise ValueError(
                f"At site {msg['name']!r}, infer[{key!r}] has no effect in Estimator_ELBO; "
                f"{_REMEDIES.get(key, _NAME)}."
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
