"""What a step changes besides parameters: the state of estimators."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_gumbel.estimators import Estimator
from pyro_gumbel.estimators.schedules import Schedule

__all__ = ["EstimatorState"]


class EstimatorState:
    """The schedules of some estimators, and the tensors of their ``get_extra_state``.

    A recorded step takes both as inputs and returns the latter anew: it reads no state from
    anywhere else, and so cannot go on with an old one.
    """

    def __init__(self, estimators: Iterable[Estimator], device: torch.device) -> None:
        modules: dict[int, nn.Module] = {}
        for estimator in estimators:
            modules.update((id(module), module) for module in estimator.modules())
        self.device = device
        self.schedules = [m for m in modules.values() if isinstance(m, Schedule)]
        self.stateful = [
            m
            for m in modules.values()
            if not isinstance(m, Schedule)
            and type(m).get_extra_state is not nn.Module.get_extra_state
        ]

    def tensors(self) -> list[Tensor]:
        """The tensors of the estimators' states, in a fixed order."""
        return [leaf for leaf in self._leaves() if isinstance(leaf, Tensor)]

    def inputs(self) -> list[Tensor]:
        """What a recorded step takes: the schedules' values, then :meth:`tensors`."""
        values = [
            torch.full((), schedule.value, dtype=torch.float64, device=self.device)
            for schedule in self.schedules
        ]
        return values + self.tensors()

    def numbers(self) -> list[Any]:
        """What is no tensor in the estimators' states, and so cannot be an input."""
        return [leaf for leaf in self._leaves() if not isinstance(leaf, Tensor)]

    @contextmanager
    def given(self, inputs: list[Tensor]) -> Iterator[None]:
        """Let schedules and states be ``inputs`` while a step is recorded."""
        count = len(self.schedules)
        for schedule, value in zip(self.schedules, inputs[:count], strict=True):
            schedule.stand_in = value
        self.put(inputs[count:])
        try:
            yield
        finally:
            for schedule in self.schedules:
                schedule.stand_in = None

    def put(self, tensors: list[Tensor]) -> None:
        """Give each state the tensors that :meth:`tensors` read from it."""
        rest = iter(tensors)
        for module in self.stateful:
            module.set_extra_state(_replace(module.get_extra_state(), rest))

    def advance(self) -> None:
        """Count a step."""
        for schedule in self.schedules:
            schedule.advance()

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Put every state back on leaving."""
        kept = [(m, copy.deepcopy(m.get_extra_state())) for m in self.stateful]
        try:
            yield
        finally:
            for module, state in kept:
                module.set_extra_state(state)

    def _leaves(self) -> list[Any]:
        return [leaf for module in self.stateful for leaf in _leaves(module.get_extra_state())]


def _leaves(state: Any) -> Iterator[Any]:
    """Walk through nested dicts, lists and tuples (several times faster than torch's pytree)."""
    if isinstance(state, (dict, list, tuple)):
        for part in state.values() if isinstance(state, dict) else state:
            yield from _leaves(part)
    else:
        yield state


def _replace(state: Any, tensors: Iterator[Tensor]) -> Any:
    """Rebuild ``state`` with other tensors."""
    if isinstance(state, dict):
        return {name: _replace(part, tensors) for name, part in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_replace(part, tensors) for part in state)
    return next(tensors) if isinstance(state, Tensor) else state
