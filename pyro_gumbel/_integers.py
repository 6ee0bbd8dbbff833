"""Integers and other numbers of any library, NumPy's among them."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

__all__ = ["is_integer", "is_number", "without_dimensions"]


def is_integer(value: Any) -> bool:
    """Tell an integer of any library; ``True`` is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Tell a real number of any library; ``True`` is none, nor is a tensor."""
    return isinstance(value, Real) and not isinstance(value, bool)


def without_dimensions(value: Any) -> Any:
    """Read the number off a tensor or array that has no dimensions, and that nothing learns."""
    single = getattr(value, "ndim", None) == 0 and not getattr(value, "requires_grad", False)
    return value.item() if single else value
