"""Attach an estimator to each sample site of a guide."""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, cast

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
from pyro_gumbel.infer._checks import check_guide_site

__all__ = [
    "Config",
    "ConfiguredGuide",
    "GradientMessenger",
    "config_gradient",
    "configure_module",
    "resolve",
]

Guide = Callable[..., Any]


class ConfiguredGuide:
    """A guide that is not a module, and the messenger that configures it.

    Copying, pickling, introspection and binding to instances work as for the guide. A copy has
    copies of the estimators, with their state.

    Attributes:
        guide: The guide.
        gradient_messenger: The handler that attaches the estimators.
    """

    def __init__(self, guide: Guide, messenger: GradientMessenger) -> None:
        functools.update_wrapper(self, guide, updated=())
        self.guide = guide
        self.gradient_messenger = messenger

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.gradient_messenger.run(self.guide, *args, **kwargs)

    def __get__(self, instance: Any, owner: type | None = None) -> ConfiguredGuide:
        """Bind the guide to an instance, so that methods can be decorated."""
        bind = getattr(type(self.guide), "__get__", None)
        if instance is None or bind is None:
            return self
        return ConfiguredGuide(bind(self.guide, instance, owner), self.gradient_messenger)

    def __eq__(self, other: object) -> bool:
        # Each access to a method makes a new bound object.
        return (
            isinstance(other, ConfiguredGuide)
            and self.gradient_messenger is other.gradient_messenger
            and self.guide == other.guide
        )

    def __hash__(self) -> int:
        return hash(self.gradient_messenger)

    def __getattr__(self, name: str) -> Any:
        # While copying, guide is not set yet. Special methods are this class's.
        if name == "guide" or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.guide, name)

    def __getstate__(self) -> tuple[Any, GradientMessenger]:
        return _portable(self.guide), self.gradient_messenger

    def __setstate__(self, state: tuple[Any, GradientMessenger]) -> None:
        guide, messenger = state
        guide = guide.find() if isinstance(guide, _DecoratedName) else guide
        ConfiguredGuide.__init__(self, guide, messenger)

    def __repr__(self) -> str:
        return f"config_gradient({self.guide!r}, {self.gradient_messenger.config!r})"


class _DecoratedName(NamedTuple):
    """The location of a function or method whose name refers to its decorated form.

    ``pickle`` stores functions by name, so it cannot store the undecorated one.
    """

    holder: Any  # a module's name, or the object of a method
    path: str
    depth: int = 0

    def find(self) -> Guide:
        return next(itertools.islice(self.chain(), self.depth, None))

    def chain(self) -> Iterator[Any]:
        """Yield the object of this name, the object that it wraps, and so on."""
        is_module = isinstance(self.holder, str)
        found = importlib.import_module(self.holder) if is_module else self.holder
        for part in self.path.split("."):
            found = getattr(found, part, None)
        while found is not None:
            yield found
            found = getattr(found, "__wrapped__", None)


def _portable(guide: Guide) -> Guide | _DecoratedName:
    """Return a guide, or its location if its name refers to its decorated form."""
    if isinstance(guide, types.FunctionType):
        name = _DecoratedName(guide.__module__, guide.__qualname__)
    elif isinstance(guide, types.MethodType):
        name = _DecoratedName(guide.__self__, guide.__name__)
    else:
        return guide
    depth = next((depth for depth, found in enumerate(name.chain()) if found == guide), 0)
    return name._replace(depth=depth) if depth else guide


def configure_module(guide: nn.Module, messenger: GradientMessenger) -> nn.Module:
    """Return a module of the guide's class that shares its attributes and runs configured."""
    kind, meta = type(guide), type(type(guide))

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        return messenger.run(kind.__call__, self, *args, **kwargs)

    def __deepcopy__(self: nn.Module, memo: dict[int, Any]) -> nn.Module:  # noqa: N807
        return configure_module(*copy.deepcopy((guide, messenger), memo))

    namespace = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__call__": __call__,
        "__copy__": lambda self: configure_module(copy.copy(guide), messenger),
        "__deepcopy__": __deepcopy__,
        "__reduce_ex__": lambda self, protocol: (configure_module, (guide, messenger)),
        "gradient_messenger": messenger,
    }
    # Without the metaclass's __init__, by which AutoGaussian registers its subclasses.
    configured = meta.__new__(meta, kind.__name__, (kind,), namespace)
    twin: nn.Module = object.__new__(configured)
    # Both share one dict, so that parameters and attributes made later (an autoguide's prototype)
    # are always the same.
    object.__setattr__(twin, "__dict__", guide.__dict__)
    return twin


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
        # Private in Pyro: if it moves, this import fails.
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
            return self._named[choice]
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
        return named + list(self._named.values())


def _check_config(config: Config) -> Config:
    if isinstance(config, Mapping):
        for site, choice in config.items():
            check_choice(choice, f"config_gradient: for site {site!r} got")
    elif isinstance(config, (Estimator, type)) or not callable(config):
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
    usage = "write config_gradient(guide, config), or @config_gradient(config=...) as a decorator."
    if guide is not None and (isinstance(guide, Estimator) or not callable(guide)):
        raise TypeError(
            f"config_gradient: expected the guide as the first argument, got {guide!r}; {usage}"
        )
    if config is None:
        raise TypeError(f"config_gradient: config is missing; {usage}")
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
    infer = msg["infer"] or {}
    marked = "enumerate" if infer.get("enumerate") else default
    choice = cast(Choice, infer.get("gradient", marked))
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
