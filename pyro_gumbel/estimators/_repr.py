"""A ``repr`` that rebuilds its object."""

from __future__ import annotations

import inspect

__all__ = ["rebuilding_repr"]


def rebuilding_repr(self: object) -> str:
    """Write the constructor call that makes ``self``; parameters are kept under their names."""
    parts = []
    for name, parameter in inspect.signature(type(self).__init__).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = getattr(self, name)
        keyword = parameter.kind is inspect.Parameter.KEYWORD_ONLY
        parts.append(f"{name}={value!r}" if keyword else repr(value))
    return f"{type(self).__name__}({', '.join(parts)})"
