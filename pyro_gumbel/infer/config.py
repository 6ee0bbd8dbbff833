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

_VARYING = "(If a site is latent only in some runs, use a callable msg -> estimator or None.)"


class GradientMessenger(Messenger):
    """Sets ``infer["gradient"]`` of each latent site to its configured estimator."""

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
        """Run a program under this handler, which a recursive guide enters only once."""
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
            # A new dict, since model and guide may share one that belongs to the user.
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
        """Return the estimator of a name; return other choices unchanged."""
        if isinstance(choice, str) and choice in CLASSES:
            return self._named.named(choice)
        return choice

    def _choices(self) -> list[Choice]:
        """List the choices known before the guide runs; a callable has none."""
        if isinstance(self.config, Mapping):
            return list(self.config.values())
        return [self.config] if isinstance(self.config, (Estimator, str)) else []

    def _refuse_unknown_sites(self) -> None:
        unknown = min(self._unseen, key=str)
        if unknown in self._observed:
            raise ValueError(
                f"config_gradient: site {unknown!r} is observed in the guide, and only latent "
                f"sites have estimators: {self._names}. Remove {unknown!r} from the config, or "
                f"remove obs=... from its pyro.sample. {_VARYING}"
            )
        raise ValueError(
            f"config_gradient: the guide has no latent site {unknown!r}; its sites are "
            f"{self._names}.{did_you_mean(unknown, self._names)} Observed sites of the model "
            f"have no estimator. {_VARYING}"
        )

    def estimators(self) -> list[Estimator]:
        """Return the config's estimators, and those made from its names so far."""
        named = [choice for choice in self._choices() if isinstance(choice, Estimator)]
        return named + list(self._named.made().values())


def _check_config(config: Config) -> Config:
    if isinstance(config, Mapping):
        for site, choice in config.items():
            check_choice(choice, f"config_gradient: for site {site!r} got")
    elif isinstance(config, (Estimator, type)) or not callable(config):
        if config is None:
            raise TypeError(
                "config_gradient: config is missing; expected an estimator, a name, a dict or a "
                "callable."
            )
        check_choice(config, "config_gradient: got")
    return config


def config_gradient(
    guide: Callable[..., Any] | None = None, config: Config | None = None
) -> Callable[..., Any]:
    """Attach a gradient estimator to each latent site of a guide.

    Each name in a config makes one estimator, which belongs to the configured guide and keeps its
    state between steps. A copy of the configured guide (``copy.deepcopy``, ``pickle``) has copies
    of the guide and of its estimators. The configured guide has the guide's parameters and state,
    without the estimators'. The module ``Estimator_ELBO()(model, guide)`` has both.

    Args:
        guide: A function, a method or a module (``PyroModule``, autoguide). A configured module
            has the class of the original and shares its parameters and attributes; the original
            stays unconfigured. Without a guide, a decorator for functions and methods is returned.
            All objects of a class share the estimators of a decorated method.
        config: One of

            * an estimator, or a name such as ``"reinmax"``, for all sites;
            * a dict ``{site: estimator or name}``; other sites use the default of the ELBO;
            * a callable ``msg -> estimator, name or None``.

            ``"auto"`` is pathwise at reparameterised sites. At other sites it is the score
            function, with leave-one-out (two particles or more) or a moving average. ``"score"``
            is this score function at all sites. For both names the ELBO holds the estimator and
            its state. The outermost configuration wins, also over
            ``pyro.sample(..., infer={"gradient": ...})``. Pyro's own losses, such as
            ``Trace_ELBO``, ignore the configuration.

    Returns:
        The configured guide. It is a module if the guide is one; otherwise it is a callable object
        with the guide's name, docstring, signature and attributes.

    Raises:
        TypeError: If the config has another type, or the guide is a class or not callable.
        ValueError: If a name is unknown; when the guide runs, if a site of the dict is missing or
            observed.

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
            f"config_gradient: expected a guide, got the class {guide.__name__}; configure an "
            f"object, config_gradient({guide.__name__}(...), config), or decorate the method that "
            "samples."
        )
    if guide is not None and (isinstance(guide, Estimator) or not callable(guide)):
        raise TypeError(
            f"config_gradient: expected the guide as the first argument, got {guide!r}. "
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
    """Return the estimator of a latent site, and check that it supports the site.

    Raises:
        TypeError: If ``infer["gradient"]`` is neither an estimator nor a name.
        ValueError: If ``infer`` has an unknown option, or the estimator does not support the site
            or the number of particles.
    """
    check_guide_site(msg)
    choice = cast(Choice, (msg["infer"] or {}).get("gradient", default))
    check_choice(choice, f"at site {msg['name']!r}, infer['gradient'] is")
    fn = unwrap(msg["fn"])
    estimator = auto.resolve(choice, fn, num_particles)
    if has_law_of(fn, Delta) and isinstance(estimator, Score):
        # The score of a point mass has no gradient in its parameters.
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
        f"At site {msg['name']!r}, {estimator!r} does not support a {type(fn).__name__} "
        f"site{wrapped}: {reason}.{_suggest(msg, estimator)}"
    )


def _suggest(msg: Message, estimator: Estimator) -> str:
    name, fn, joined = msg["name"], unwrap(msg["fn"]), event_dims(msg["fn"])
    supporting = [
        known
        for known, make in CLASSES.items()
        if make().supports(fn) and make().why_unsupported(fn, joined) is None
    ]
    where = text = ""
    if is_relaxed(fn):
        family = "OneHotCategorical" if fn.event_dim else "Bernoulli"
        text = (
            f" If the model's site is discrete, write {family}(logits=...) in the guide, too; "
            "estimators such as GumbelSoftmax relax it themselves."
        )
        where = " of a relaxed site"
    text += f" Supported estimators{where}: {', '.join([*supporting, 'score'])}."
    if not estimator.supports(fn):
        instead = "pathwise" if "pathwise" in supporting else "score"
        text += f" Choose site by site: config_gradient(guide, {{{name!r}: {instead!r}, ...}})."
    return text
