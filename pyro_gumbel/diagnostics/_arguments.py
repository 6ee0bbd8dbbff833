"""What callers pass: errors that name the argument, what came, and what to write instead."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

from pyro_gumbel._integers import is_integer
from pyro_gumbel.estimators import Estimator

__all__ = [
    "check_coords",
    "check_estimators",
    "check_programs",
    "integer",
    "positive",
]


def integer(name: str, value: Any, least: int) -> int:
    """Make an integer of any library Python's own.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is below ``least``.
    """
    if is_integer(value) and value >= least:
        return int(value)
    error = ValueError if is_integer(value) else TypeError
    raise error(f"{name} must be an integer of at least {least}; got {value!r}.")


def positive(name: str, value: Any) -> float:
    """Make a positive number a float.

    Raises:
        TypeError: If it is no number; ``True`` is none.
        ValueError: If it is not above zero.
    """
    known = isinstance(value, Real) and not isinstance(value, bool)
    if known and value > 0:
        return float(value)
    error = ValueError if known else TypeError
    raise error(f"{name} must be positive, a number such as 2.0; got {value!r}.")


def check_programs(model: Any, guide: Any) -> None:
    """Refuse what cannot be called, such as what a program returned.

    Raises:
        TypeError: If one of them is no callable.
    """
    for name, program in (("model", model), ("guide", guide)):
        if not callable(program):
            raise TypeError(
                f"{name} must be a function or a module that makes Pyro's statements, itself and "
                f"not what it returns; got {program!r}."
            )


def check_estimators(estimators: Any) -> None:
    """Refuse what is no dict of estimators by label.

    Raises:
        TypeError: If it is no dict, or a label is no string.
        ValueError: If it is empty.
    """
    if isinstance(estimators, (Estimator, str)) or not isinstance(estimators, Mapping):
        raise TypeError(
            "estimators must be a dict of labels, such as estimators={'reinmax': ReinMax()}; got "
            f"{estimators!r}."
        )
    if not estimators:
        raise ValueError("estimators is empty; write estimators={'reinmax': ReinMax()}.")
    for label in estimators:
        if not isinstance(label, str):
            raise TypeError(
                "estimators must have strings for labels, such as estimators={'reinmax': "
                f"ReinMax()}}; got {label!r}."
            )


def check_coords(coords: Any) -> None:
    """Refuse what is no dict of coordinates.

    Raises:
        TypeError: If it is none.
    """
    if coords is not None and not isinstance(coords, Mapping):
        raise TypeError(
            f"coords must be a dict, such as coords={{'category': ['x', 'y']}}; got {coords!r}."
        )
