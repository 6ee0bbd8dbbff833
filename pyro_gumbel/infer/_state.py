"""State that outlives a step: random number generators, schedules, and who may run a step."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch

from pyro_gumbel.estimators import Estimator
from pyro_gumbel.infer.learnable import show_parameters

__all__ = [
    "advance_schedules",
    "finish_step",
    "generator_states",
    "preserved_rng",
    "set_generator_states",
    "sole_step",
]

_step = threading.RLock()


@contextmanager
def sole_step() -> Iterator[None]:
    """Run a step, alone in the process; a step within a step of the same thread is fine.

    Raises:
        RuntimeError: If another thread is running one.
    """
    if not _step.acquire(blocking=False):
        raise RuntimeError(
            "Another thread is running a step. Pyro's stack of handlers belongs to the whole "
            "process, so two steps at once would mix their sites. Run them one after the other "
            "(hold a lock around svi.step) or in separate processes."
        )
    try:
        yield
    finally:
        _step.release()


def generator_states() -> tuple[dict, list[torch.Tensor]]:
    """Return the states of Python's, NumPy's and torch's generators, those of CUDA included."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return pyro.util.get_rng_state(), cuda


def set_generator_states(states: tuple[dict, list[torch.Tensor]]) -> None:
    """Restore what :func:`generator_states` returned."""
    own, cuda = states
    pyro.util.set_rng_state(own)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the generators at exit."""
    states = generator_states()
    try:
        yield
    finally:
        set_generator_states(states)


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
