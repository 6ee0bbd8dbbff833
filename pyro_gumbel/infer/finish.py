"""The end of an optimisation step: schedules advance, learnable parameters are shown."""

from __future__ import annotations

from pyro_gumbel.estimators import Estimator
from pyro_gumbel.infer.learnable import show_parameters

__all__ = ["advance_schedules", "finish_step"]


def finish_step(estimators: dict[str, Estimator]) -> None:
    """Advance each schedule once, and show learnable parameters to whoever collects parameters."""
    advance_schedules(estimators)
    seen: set[int] = set()
    for name, estimator in estimators.items():
        if id(estimator) not in seen and next(estimator.parameters(), None) is not None:
            show_parameters(name, estimator)
        seen.add(id(estimator))


def advance_schedules(estimators: dict[str, Estimator]) -> None:
    """Advance each schedule once."""
    schedules = {
        id(schedule): schedule
        for estimator in estimators.values()
        for schedule in estimator.schedules()
    }
    for schedule in schedules.values():
        schedule.advance()
