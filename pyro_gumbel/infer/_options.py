"""Check options of the losses, and reject options of Pyro's losses without effect here."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

from pyro_gumbel.estimators.registry import did_you_mean

__all__ = ["check_options"]

_WITHOUT_EFFECT = {
    "jit_options": "to record a step, write CapturedSVI(model, guide, optim, loss)",
    "max_iarange_nesting": "write max_plate_nesting",
    "tail_adaptive_beta": "it belongs to Pyro's TraceTailAdaptive_ELBO",
}


def check_options(owner: type, options: Iterable[str]) -> None:
    """Check keyword arguments that a class passes to its parent.

    Raises:
        TypeError: If an option has no effect or is unknown.
    """
    known = _parameters(owner)
    for name in options:
        if name in _WITHOUT_EFFECT:
            raise TypeError(f"{owner.__name__}: {name} has no effect; {_WITHOUT_EFFECT[name]}.")
        if name not in known:
            raise TypeError(
                f"{owner.__name__} has no argument {name!r}; its arguments are {known}."
                f"{did_you_mean(name, known)}"
            )


def _parameters(owner: type) -> list[str]:
    """List the effective constructor parameters of a class and its parents."""
    kinds = {
        name: parameter.kind
        for part in owner.__mro__
        for name, parameter in inspect.signature(part.__init__).parameters.items()  # type: ignore[misc]
    }
    loose = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    without = ("self", *_WITHOUT_EFFECT)
    return [name for name, kind in kinds.items() if name not in without and kind not in loose]
