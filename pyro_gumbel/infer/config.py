"""Attach an estimator to each sample site of a guide."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, cast

from pyro.distributions import Delta
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK, Message
from pyro.poutine.util import site_is_subsample
from torch import nn

from pyro_gumbel.distributions.families import (
    event_dims,
    explain_stranger,
    has_law_of,
    is_relaxed,
    unwrap,
)
from pyro_gumbel.estimators import Estimator, Score
from pyro_gumbel.estimators.registry import (
    CLASSES,
    Choice,
    DefaultEstimators,
    NamedEstimators,
    check_choice,
    did_you_mean,
)
from pyro_gumbel.infer._configured_guide import ConfiguredGuide, configure_module
from pyro_gumbel.infer._site_options import check_guide_site

__all__ = ["Config", "GradientMessenger", "config_gradient", "resolve"]

Config = Estimator | str | Mapping[str, Choice] | Callable[[Message], Choice]

_VARYING = (
    "(For sites that are latent in some runs only, give a callable msg -> estimator or None.)"
)


class GradientMessenger(Messenger):
    """Writes the configured estimator into ``infer["gradient"]`` of each latent site."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = _check_config(config)
        self._unseen = set(config) if isinstance(config, Mapping) else set()
        self._names: list[str] = []
        self._observed: set[str] = set()
        self._named = NamedEstimators()
        for choice in self._choices():
            self._name(choice)

    def __enter__(self) -> GradientMessenger:
        self._names = []
        return super().__enter__()

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        if exc_info[0] is None and self._unseen:
            self._refuse_unknown_sites()

    def run(self, program: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a program under this handler; a guide that calls itself is under it already."""
        if any(handler is self for handler in _PYRO_STACK):
            return program(*args, **kwargs)
        with self:
            return program(*args, **kwargs)

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            return
        name = cast(str, msg["name"])
        if msg["is_observed"]:
            self._observed.add(name)
            return
        self._names.append(name)
        self._unseen.discard(name)
        choice = self._choose(msg)
        if choice is not None:
            # A new dict: the model's site shares the guide's, and a handler must not change
            # either.
            msg["infer"] = cast(Any, {**(msg["infer"] or {}), "gradient": choice})

    def _choose(self, msg: Message) -> Choice:
        config = self.config
        if isinstance(config, Mapping):
            choice = config.get(cast(str, msg["name"]))
        elif isinstance(config, (Estimator, str)):
            choice = config
        else:
            choice = config(msg)
            check_choice(choice, f"at site {msg['name']!r}, the config callable returned")
        return self._name(choice)

    def _name(self, choice: Choice) -> Choice:
        """Return the estimator that a name stands for here, or whatever else was chosen."""
        if isinstance(choice, str) and choice in CLASSES:
            return self._named.named(choice)
        return choice

    def _choices(self) -> list[Choice]:
        """List the choices that are known before the guide runs: none of a callable's."""
        if isinstance(self.config, Mapping):
            return list(self.config.values())
        return [self.config] if isinstance(self.config, (Estimator, str)) else []

    def _refuse_unknown_sites(self) -> None:
        unknown = min(self._unseen, key=str)
        if unknown in self._observed:
            raise ValueError(
                f"config_gradient: site {unknown!r} is observed in the guide, and only latent "
                f"sites have estimators: {self._names}. Leave {unknown!r} out of the config, or "
                f"drop obs=... where it is sampled. {_VARYING}"
            )
        raise ValueError(
            f"config_gradient: the guide has no latent site {unknown!r}; its sites are "
            f"{self._names}.{did_you_mean(unknown, self._names)} Sites that the model observes "
            f"take no estimator. {_VARYING}"
        )

    def estimators(self) -> list[Estimator]:
        """Return the estimators that the config names outright, or has made of names so far."""
        named = [choice for choice in self._choices() if isinstance(choice, Estimator)]
        return named + list(self._named.made().values())


def _check_config(config: Config) -> Config:
    if isinstance(config, Mapping):
        for site, choice in config.items():
            check_choice(choice, f"config_gradient: for site {site!r} got")
    elif isinstance(config, (Estimator, type)) or not callable(config):
        if config is None:
            raise TypeError(
                "config_gradient: config is missing; give an estimator, a name, a dict or a "
                "callable."
            )
        check_choice(config, "config_gradient: got")
    return config


def config_gradient(
    guide: Callable[..., Any] | None = None, config: Config | None = None
) -> Callable[..., Any]:
    """Attach an estimator to each latent site of a guide.

    A name in a config stands for one object, which belongs to the configured guide and keeps its
    state from step to step. A copy of the configured guide (``copy.deepcopy``, ``pickle``) has
    copies of guide and estimators. The parameters and the state of a configured guide are those of
    the guide: ``Estimator_ELBO()(model, guide)`` is the module that holds the estimators' too.

    Args:
        guide: A function, a method or a module (``PyroModule``, autoguide). Left out, a decorator
            is returned, for functions and for methods of a class; a decorated method shares its
            estimators between all objects of the class. A module gives a module of the same class
            with the same parameters and attributes: it shares all of them with the original, which
            itself stays unconfigured.
        config: One of

            * an estimator, or a name such as ``"reinmax"``, for every site;
            * a dict ``{site: estimator or name}``, other sites being left to the default of
              ``Estimator_ELBO``;
            * a callable ``msg -> estimator, name or None``.

            ``"auto"`` is pathwise where a site can and else the score function with leave-one-out
            (two particles or more) or a moving average; ``"score"`` is the latter at every site.
            Both leave the choice, and the state, to the ELBO. The outermost configuration wins,
            also over ``pyro.sample(..., infer={"gradient": ...})``. It is for the losses of this
            package: Pyro's own, such as ``Trace_ELBO``, ignore it and take their own gradient.

    Returns:
        The configured guide: a module where the guide is one, else a callable object with the
        guide's name, docstring, signature and attributes.

    Raises:
        TypeError: If the config is of another kind, or the guide is a class or not callable.
        ValueError: If a name stands for no estimator; when the guide runs, if a site of the dict
            is not in it, or observed there.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_gumbel.estimators import ReinMax
        >>> @config_gradient(config={"z": ReinMax()})
        ... def guide():
        ...     logits = pyro.param("logits", torch.zeros(3))
        ...     pyro.sample("z", dist.OneHotCategorical(logits=logits))
        >>> guide()
    """
    if isinstance(guide, type):
        raise TypeError(
            f"config_gradient: got the class {guide.__name__}; configure an object, "
            f"config_gradient({guide.__name__}(...), config), or decorate the method that samples."
        )
    if guide is not None and (isinstance(guide, Estimator) or not callable(guide)):
        raise TypeError(
            f"config_gradient: the first argument is the guide; got {guide!r}. "
            "Write config_gradient(guide, config), or @config_gradient(config=...) as a "
            "decorator."
        )
    if config is None:
        raise TypeError(
            "config_gradient: config is missing; write config_gradient(guide, config)."
        )
    if guide is None:
        return functools.partial(config_gradient, config=config)
    messenger = GradientMessenger(config)
    if isinstance(guide, nn.Module):
        return configure_module(guide, messenger)
    return ConfiguredGuide(guide, messenger)


def resolve(
    msg: Message, auto: DefaultEstimators, default: Choice, num_particles: int
) -> Estimator:
    """Find the estimator of a latent site and check that it can serve it.

    Raises:
        TypeError: If ``infer["gradient"]`` is neither an estimator nor a name.
        ValueError: If ``infer`` has an unknown option, or the estimator cannot serve the site or
            the number of particles.
    """
    check_guide_site(msg)
    choice = cast(Choice, (msg["infer"] or {}).get("gradient", default))
    check_choice(choice, f"at site {msg['name']!r}, infer['gradient'] is")
    fn = unwrap(msg["fn"])
    estimator = auto.resolve(choice, fn, num_particles)
    if has_law_of(fn, Delta) and isinstance(estimator, Score):
        # A point mass is a function of its parameters: its score does not see them.
        estimator = auto.resolve("pathwise", fn, num_particles)
    if not estimator.supports(fn):
        reasons = (f"it needs {estimator.sites}", explain_stranger(fn))
        _refuse(msg, estimator, ". ".join(filter(None, reasons)))
    reason = estimator.why_unsupported(fn, event_dims(msg["fn"]))
    if reason is not None:
        _refuse(msg, estimator, reason)
    if num_particles < estimator.min_particles:
        raise ValueError(
            f"At site {msg['name']!r}, {estimator!r} needs num_particles >= "
            f"{estimator.min_particles}; got {num_particles}. "
            f"Write Estimator_ELBO(num_particles={estimator.min_particles}), or use "
            "Score(MovingAverage())."
        )
    return estimator


def _refuse(msg: Message, estimator: Estimator, reason: str) -> NoReturn:
    fn = unwrap(msg["fn"])
    wrapped = "" if fn is msg["fn"] else f" (inside {type(msg['fn']).__name__})"
    raise ValueError(
        f"At site {msg['name']!r}, {estimator!r} cannot serve a {type(fn).__name__} "
        f"site{wrapped}: {reason}.{_suggest(msg, estimator)}"
    )


def _suggest(msg: Message, estimator: Estimator) -> str:
    name, fn, joined = msg["name"], unwrap(msg["fn"]), event_dims(msg["fn"])
    serving = [
        known
        for known, make in CLASSES.items()
        if make().supports(fn) and make().why_unsupported(fn, joined) is None
    ]
    where = text = ""
    if is_relaxed(fn):
        family = "OneHotCategorical" if fn.event_dim else "Bernoulli"
        text = (
            f" If the model's site is discrete, write {family}(logits=...) in the guide, too: "
            "estimators that relax do so by themselves."
        )
        where = " if it is relaxed"
    text += f" What would work{where}: {', '.join([*serving, 'score'])}."
    if not estimator.supports(fn):
        instead = "pathwise" if "pathwise" in serving else "score"
        text += f" Choose site by site: config_gradient(guide, {{{name!r}: {instead!r}, ...}})."
    return text
