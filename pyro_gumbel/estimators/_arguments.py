"""Checks of the arguments of estimators' constructors."""

from __future__ import annotations

from typing import Any

from pyro_gumbel._integers import is_integer, is_number, without_dimensions

__all__ = ["check_num_samples", "check_number"]


def check_num_samples(
    owner: str, num_samples: Any, least: int, *, argument: str = "num_samples"
) -> int:
    """Return a number of samples, or of steps, as Python's own integer.

    Raises:
        ValueError: If it is not an integer, or less than ``least``.
    """
    if not is_integer(num_samples) or num_samples < least:
        raise ValueError(
            f"{owner}: {argument} must be an integer of at least {least}; got {num_samples!r}."
        )
    return int(num_samples)


def check_number(owner: str, argument: str, value: Any, *, example: float) -> float:
    """Return a number of any library as Python's own float.

    Raises:
        TypeError: If it is not a number, or if it is a boolean.
    """
    value = without_dimensions(value)
    if not is_number(value):
        raise TypeError(
            f"{owner}: {argument} must be a number, such as {argument}={example!r}; got {value!r}."
        )
    return float(value)
