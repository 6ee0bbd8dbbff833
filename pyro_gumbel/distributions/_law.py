"""Find the library class whose draws and log-probabilities a distribution has, if any."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch.distributions import Distribution

_LIBRARIES = ("torch", "pyro", "pyro_gumbel")
# The methods that define a distribution. ``expand`` is not among them, since it returns another
# distribution, which is examined itself, and subclasses with a constructor must override it.
_METHODS = (
    "__call__", "sample", "rsample", "log_prob", "score_parts", "enumerate_support", "support",
)  # fmt: skip
_NUMBERS = ("_param", "param_shape", "_categorical", "probs", "logits")


def law_of(fn: Any) -> type | None:
    """Return the class of torch, Pyro or this package that defines the distribution of ``fn``.

    It is the nearest ancestor, or ``None`` if ``fn`` or a part of it draws or scores otherwise.
    """
    kind = _kind(fn)
    if kind is not None:
        for part in vars(fn).values():
            if isinstance(part, Distribution) and law_of(part) is None:
                return None
    return kind


def has_law_of(fn: Any, *families: type) -> bool:
    """Return whether ``fn`` has the distribution of one of the families, not only its class."""
    return isinstance(fn, families) and issubclass(law_of(fn) or object, families)


def wraps_like(fn: Any, *wrappers: type) -> bool:
    """Return whether ``fn`` transforms its base distribution as one of the wrappers does."""
    return isinstance(fn, wrappers) and issubclass(_kind(fn) or object, wrappers)


def overridden(fn: Any) -> list[str]:
    """List the methods and parameters of its nearest library ancestor that ``fn`` overrides."""
    differing = _differing(type(fn), nearest_library(type(fn)))
    return sorted({*differing, *(vars(fn).keys() & set(_METHODS))})


def nearest_library(kind: type) -> type:
    """Return the nearest ancestor of a class in torch, Pyro or this package."""
    ancestors = (a for a in kind.__mro__ if a.__module__.partition(".")[0] in _LIBRARIES)
    return next((a for a in ancestors if issubclass(a, Distribution)), Distribution)


def _kind(fn: Any) -> type | None:
    overrides = not vars(fn).keys().isdisjoint(_METHODS)
    return None if overrides else _inherited(type(fn))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=1024)
def _inherited(kind: Any) -> type | None:
    library = nearest_library(kind)
    return None if _differing(kind, library) else library


def _differing(kind: type, library: type) -> list[str]:
    numbers: dict[str, Any] = getattr(library, "arg_constraints", {})
    names = dict.fromkeys((*_METHODS, *_NUMBERS, *(numbers if isinstance(numbers, dict) else ())))
    return [
        name
        for name in names
        if _find(kind, name) is not _find(library, name)
        and _find(kind, name) is not _find(TorchDistributionMixin, name)
    ]


def _find(kind: type, name: str) -> Any:
    return inspect.getattr_static(kind, name, None)
