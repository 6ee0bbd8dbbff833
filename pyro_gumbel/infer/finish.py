"""What the estimators are due at the end of an optimisation step."""

from __future__ import annotations

from pyro_gumbel.estimators import Estimator
from pyro_gumbel.infer.learnable import show_parameters

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
            show_parameters(name, estimator)
        seen.add(id(estimator))
