"""The class whose law a distribution has: one of a library's, or its own."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch.distributions import Distribution

__all__ = ["has_law_of", "law_of", "overrides"]

_LIBRARIES = ("torch", "pyro", "pyro_gumbel")
# What draws and what scores. ``expand`` is not among them: it returns another distribution, which
# is asked about in its turn, and a subclass with a constructor of its own has to override it.
_METHODS = (
    "__call__", "sample", "rsample", "log_prob", "score_parts", "enumerate_support", "support",
)  # fmt: skip
_NUMBERS = ("_param", "param_shape", "_categorical", "probs", "logits")


def law_of(fn: Any) -> type | None:
    """Find the class of torch, Pyro or this package whose law ``fn`` has.

    That is its own class, or the nearest ancestor in these libraries if the classes in between
    override nothing that makes a law: how values are drawn and scored, which values there are, and
    the numbers that the ancestor reads.

    Returns:
        The class, or ``None`` if ``fn``, or a distribution that it is made of, has a law of its
        own.
    """
    kind: type | None = _inherited(type(fn))  # type: ignore[arg-type]
    if kind is None or not vars(fn).keys().isdisjoint(_METHODS):
        return None
    return kind if all(law_of(part) for part in _parts(fn)) else None


def has_law_of(fn: Any, *families: type) -> bool:
    """Return whether ``fn`` is one of the families, not only a descendant of one."""
    return isinstance(fn, families) and issubclass(law_of(fn) or object, families)


def overrides(fn: Any) -> tuple[type, list[str]]:
    """Name what gives ``fn`` a law of its own: its ancestor in a library, and what differs."""
    library = _library(type(fn))
    own = set(_differing(type(fn), library)) | (vars(fn).keys() & set(_METHODS))
    return library, sorted(own)


def _parts(fn: Any) -> Iterator[Any]:
    return (part for part in vars(fn).values() if isinstance(part, Distribution))


@functools.lru_cache(maxsize=1024)
def _inherited(kind: Any) -> type | None:
    library = _library(kind)
    return None if _differing(kind, library) else library


def _library(kind: type) -> type:
    ancestors = (a for a in kind.__mro__ if a.__module__.partition(".")[0] in _LIBRARIES)
    return next((a for a in ancestors if issubclass(a, Distribution)), Distribution)


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
    ancestors = (vars(ancestor) for ancestor in kind.__mro__)
    return next((own[name] for own in ancestors if name in own), None)
