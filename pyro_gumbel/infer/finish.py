"""What the estimators are due at the end of an optimisation step."""

from __future__ import annotations

import warnings

import pyro

from pyro_gumbel.estimators import Estimator

__all__ = ["finish_step"]


def finish_step(estimators: dict[str, Estimator]) -> None:
    """Advance each schedule once, and show learnable parameters to whoever collects parameters."""
    schedules = {
        id(schedule): schedule
        for estimator in estimators.values()
        for schedule in estimator.schedules()
    }
    for schedule in schedules.values():
        schedule.advance()
    seen: set[int] = set()
    for name, estimator in estimators.items():
        if id(estimator) not in seen and next(estimator.parameters(), None) is not None:
            _show_parameters(f"gradient${name}", estimator)
        seen.add(id(estimator))


def _show_parameters(name: str, estimator: Estimator) -> None:
    """Put the estimator's parameters into the store, in place of another estimator's."""
    store = pyro.get_param_store()
    for key, parameter in estimator.named_parameters():
        stored = f"{name}$$${key}"
        # Else the optimiser would step a tensor that nothing uses any more. (The store copies
        # what is not contiguous, so that such a parameter is never found in it.)
        foreign = stored in store and store[stored].unconstrained() is not parameter
        if foreign and parameter.is_contiguous():
            del store[stored]
    with warnings.catch_warnings():
        # Parameters are frozen on purpose here, by learn=False or by the user.
        warnings.filterwarnings("ignore", ".* was not registered in the param store")
        pyro.module(name, estimator)
