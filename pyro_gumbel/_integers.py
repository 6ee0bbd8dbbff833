"""Integers of any library, NumPy's among them."""

from __future__ import annotations

from numbers import Integral
from typing import Any

__all__ = ["is_integer"]


def is_integer(value: Any) -> bool:
    """Tell an integer of any library; ``True`` is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)
