"""The neural networks that a program can reach, whether it is one or merely uses some."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn

__all__ = ["modules_of"]

_MOST = 1000  # longer lists and dicts are data


def modules_of(*programs: Any) -> list[nn.Module]:
    """List the modules that programs are, are methods of, or find in their scopes.

    Scopes are closures, defaults, bound arguments, the attributes of a method's object and the
    globals that the code names, those of functions found on the way included.
    """
    found: dict[nn.Module, None] = {}
    seen: set[int] = set()
    waiting = list(programs)
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found.update(dict.fromkeys(value.modules()))
        waiting.extend(_within(value))
    return list(found)


def _within(value: Any) -> Iterator[Any]:
    if isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif inspect.ismethod(value):
        yield from (value.__self__, value.__func__)
        if not isinstance(value.__self__, nn.Module):
            yield from getattr(value.__self__, "__dict__", {}).values()
    elif inspect.isfunction(value):
        yield from value.__defaults__ or ()
        yield getattr(value, "__wrapped__", None)
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not assigned yet
                continue
        names = value.__globals__
        yield from (names[name] for name in _names(value.__code__) if name in names)
    elif isinstance(value, (dict, list, tuple)) and len(value) <= _MOST:
        yield from value.values() if isinstance(value, dict) else value


def _names(code: CodeType) -> Iterator[str]:
    """The globals that code names, that of functions defined within it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
