"""A guide with its configuration, as one object that can be copied, pickled and bound."""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

if TYPE_CHECKING:
    from pyro_gumbel.infer.config import GradientMessenger

__all__ = ["ConfiguredGuide", "configure_module"]

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

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        return messenger.run(type(guide).__call__, self, *args, **kwargs)

    def __copy__(self: nn.Module) -> nn.Module:  # noqa: N807
        return configure_module(copy.copy(guide), messenger)

    def __deepcopy__(self: nn.Module, memo: dict[int, Any]) -> nn.Module:  # noqa: N807
        return configure_module(copy.deepcopy(guide, memo), copy.deepcopy(messenger, memo))

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:  # noqa: N807
        return configure_module, (guide, messenger)

    namespace = {
        "__call__": __call__,
        "__copy__": __copy__,
        "__deepcopy__": __deepcopy__,
        "__reduce_ex__": __reduce_ex__,
        "__module__": type(guide).__module__,
        "__qualname__": type(guide).__qualname__,
        "gradient_messenger": messenger,
    }
    configured = types.new_class(
        type(guide).__name__, (type(guide),), exec_body=lambda ns: ns.update(namespace)
    )
    twin: nn.Module = object.__new__(configured)
    # Both share one dict, so that parameters and attributes made later (an autoguide's prototype)
    # are always the same.
    object.__setattr__(twin, "__dict__", guide.__dict__)
    return twin
