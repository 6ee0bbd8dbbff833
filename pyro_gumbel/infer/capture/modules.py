"""What a program can reach: the neural networks, whether it is one or merely uses some."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn

from pyro_gumbel.infer._configured_guide import ConfiguredGuide

__all__ = ["code_names", "is_users", "modules_of", "own_attributes", "reachable"]

_COMMON = ("torch", "pyro", "pyro_gumbel", "numpy")
_MOST = 1000  # longer lists and dicts are data


def modules_of(*programs: Any) -> list[nn.Module]:
    """List the modules that programs are, are methods of, or find in their scopes."""
    found: dict[nn.Module, None] = {}
    for value in reachable(*programs):
        if isinstance(value, nn.Module):
            found.update(dict.fromkeys(value.modules()))
    return list(found)


def reachable(*programs: Any) -> Iterator[Any]:
    """Go through programs and what is in their scopes, each object once.

    Scopes are closures, defaults, bound arguments, the attributes of a method's object and of an
    object that is called, and the globals that the code names, those of functions defined or found
    on the way included.
    """
    seen: dict[int, Any] = {}  # held, so that no other object gets an identity
    waiting = list(programs)
    while waiting:
        value = waiting.pop()
        if id(value) not in seen:
            seen[id(value)] = value
            yield value
            waiting.extend(_within(value))


def is_users(module: str | None) -> bool:
    """Tell whether a Python module, by its name, is none of those that everybody uses."""
    package = "torch" if module is None else module.partition(".")[0]
    return package not in _COMMON and package not in sys.stdlib_module_names


def own_attributes(value: Any) -> dict[str, Any]:
    """The attributes in an object's own dict, past whatever the object does when it is asked."""
    try:
        attributes = object.__getattribute__(value, "__dict__")
    except Exception:  # slots, or a property that fails
        return {}
    return attributes if isinstance(attributes, dict) else {}


def code_names(code: CodeType) -> Iterator[str]:
    """The globals that code names, that of functions defined within it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from code_names(constant)


def _within(value: Any) -> Iterator[Any]:
    if isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, ConfiguredGuide):
        yield value.guide
    elif inspect.ismethod(value):
        yield from (value.__self__, value.__func__)
        if not isinstance(value.__self__, nn.Module):
            yield from own_attributes(value.__self__).values()
    elif inspect.isfunction(value):
        yield from value.__defaults__ or ()
        yield getattr(value, "__wrapped__", None)
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not assigned yet
                continue
        names = value.__globals__
        yield from (names[name] for name in code_names(value.__code__) if name in names)
    elif isinstance(value, (dict, list, tuple)) and len(value) <= _MOST:
        yield from value.values() if isinstance(value, dict) else value
    elif _is_called(value):
        yield from (type(value).__call__, *own_attributes(value).values())


def _is_called(value: Any) -> bool:
    """Tell whether something is an object of the user's that is called as a function is."""
    of_users = is_users(type(value).__module__) and not isinstance(value, nn.Module)
    return of_users and callable(value)
