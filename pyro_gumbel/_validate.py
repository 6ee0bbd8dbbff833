"""Checks of arguments: errors name the argument, what it got, and what to write instead."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from numbers import Integral, Real
from typing import Any


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer of any library; ``True`` is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a value is a real number of any library; ``True`` and tensors are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def without_dimensions(value: Any) -> Any:
    """Read the number off a tensor or array without dimensions, unless it requires gradients."""
    single = getattr(value, "ndim", None) == 0 and not getattr(value, "requires_grad", False)
    return value.item() if single else value


def integer(name: str, value: Any, least: int, kind: type[Exception] = TypeError) -> int:
    """Convert an integer of any library to Python's own; raise ``kind`` for another value.

    Raises:
        ValueError: If it is below ``least``.
    """
    if is_integer(value) and value >= least:
        return int(value)
    error = ValueError if is_integer(value) else kind
    raise error(f"{name} must be an integer of at least {least}; got {value!r}.")


def positive(name: str, value: Any) -> float:
    """Convert a number above zero to a float, else raise ``TypeError`` or ``ValueError``."""
    if is_number(value) and value > 0:
        return float(value)
    error = ValueError if is_number(value) else TypeError
    raise error(f"{name} must be positive, a number such as 2.0; got {value!r}.")


def check_number(owner: str, argument: str, value: Any, *, example: float) -> float:
    """Convert a number of any library to Python's own, else raise ``TypeError``."""
    value = without_dimensions(value)
    if not is_number(value):
        raise TypeError(
            f"{owner}: {argument} must be a number, such as {argument}={example!r}; got {value!r}."
        )
    return float(value)


def check_programs(model: Any, guide: Any) -> None:
    """Raise ``TypeError`` for what cannot be called, such as the result of a program."""
    for name, program in (("model", model), ("guide", guide)):
        if not callable(program):
            raise TypeError(
                f"{name} must be a function or a module that makes Pyro's statements, itself and "
                f"not what it returns; got {program!r}."
            )


def check_estimators(estimators: Any) -> None:
    """Raise ``TypeError`` or ``ValueError`` for anything but estimators by label."""
    if not isinstance(estimators, Mapping):
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
    """Raise ``TypeError`` for anything but a dict of coordinates."""
    if coords is not None and not isinstance(coords, Mapping):
        raise TypeError(
            f"coords must be a dict, such as coords={{'category': ['x', 'y']}}; got {coords!r}."
        )


# Dimensions and coordinates of the draws, which no parameter can share its name with.
_TAKEN = (
    "all block chain cosine direction draw estimator evaluations grad_norm loss parameter "
    "parameter_norm repeat seconds site site_effect square_trace trace trace_variance"
)
RESERVED = frozenset(_TAKEN.split())


def check_names(names: Iterable[str]) -> None:
    """Refuse parameters whose names the draws need."""
    taken = sorted(RESERVED & set(names))
    if taken:
        raise ValueError(
            f"Parameter {taken[0]!r} has the name of a dimension or a statistic of the draws; "
            f"rename it, or leave it out by params=[...]. Reserved are {sorted(RESERVED)}."
        )


def check_dims(dims: Any, names: Collection[str]) -> None:
    """Check that ``dims`` has free names of dimensions of known parameters."""
    if dims is None:
        return
    if not isinstance(dims, Mapping) or not all(map(_are_names, dims.values())):
        raise TypeError(
            "dims must be a dict of lists, such as dims={'logits': ['datum', 'category']}; got "
            f"{dims!r}."
        )
    for name, own in dims.items():
        if name not in names:
            raise ValueError(f"dims: no parameter is called {name!r}; there are {list(names)}.")
        taken = sorted(RESERVED.union(names) & set(own))
        if taken:
            raise ValueError(
                f"dims: parameter {name!r} cannot have a dimension {taken[0]!r}: a parameter, a "
                "dimension or a statistic of the draws has that name. Choose another."
            )


def _are_names(own: Any) -> bool:
    return isinstance(own, (list, tuple)) and all(isinstance(name, str) for name in own)
