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

Place = tuple[Any, ...]  # the number of a module, then keys into its state


class EstimatorState:
    """The schedules of some estimators, and the tensors of their ``get_extra_state``.

    A recorded step takes both as inputs and returns the latter anew: it reads no state from
    anywhere else, and so cannot go on with an old one. It knows tensors by their places; what
    other steps put beside them is left alone.
    """

    def __init__(self, estimators: Iterable[Estimator], device: torch.device) -> None:
        self.device = device
        self._estimators = list(estimators)
        self.modules = self._find_modules()
        parts = list(dict.fromkeys(self.modules))  # estimators may share some
        self.schedules = [m for m in parts if isinstance(m, Schedule)]
        self.stateful = [
            m
            for m in parts
            if not isinstance(m, Schedule)
            and type(m).get_extra_state is not nn.Module.get_extra_state
        ]
        # Set by hand they are other ones; those of a schedule are inputs, by its value.
        self._numbers = [
            (vars(part), name, value)
            for part in parts
            if not isinstance(part, Schedule)
            for name, value in vars(part).items()
            if isinstance(value, (bool, int, float, str))
        ]
        self._places: list[Place] = []
        self._fixed: set[Place] = set()

    def fix_places(self) -> None:
        """Decide which tensors are the step's: those that there are now."""
        self._places = [
            place for place, leaf in self._leaves().items() if isinstance(leaf, Tensor)
        ]
        self._fixed = set(self._places)

    def is_current(self) -> bool:
        """Tell whether the estimators have the parts and numbers, and the tensors, they had."""
        if self._find_modules() != self.modules:
            return False
        if any(_differs(where.get(name), value) for where, name, value in self._numbers):
            return False
        return not self._places or self._leaves().keys() >= self._fixed

    def forget_counts(self) -> None:
        """Leave out the numbers that a run has changed by itself."""
        self._numbers = [
            (where, name, value)
            for where, name, value in self._numbers
            if not _differs(where.get(name), value)
        ]

    def tensors(self) -> list[Tensor]:
        """The tensors of the step's places, in a fixed order."""
        found = self._leaves() if self._places else {}
        return [found[place] for place in self._places]

    def inputs(self) -> list[Tensor]:
        """What a recorded step takes: the schedules' values, then :meth:`tensors`."""
        values = [
            torch.full((), schedule.value, dtype=torch.float64, device=self.device)
            for schedule in self.schedules
        ]
        return values + self.tensors()

    def places(self) -> set[Place]:
        """Where there is anything in the estimators' states."""
        return set(self._leaves())

    def numbers(self) -> dict[Place, Any]:
        """What is no tensor in the estimators' states, and so cannot be an input."""
        return {
            place: leaf for place, leaf in self._leaves().items() if not isinstance(leaf, Tensor)
        }

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
        """Put tensors in the places that :meth:`tensors` reads."""
        if not self._places:
            return
        at = dict(zip(self._places, tensors, strict=True))
        for number, module in enumerate(self.stateful):
            module.set_extra_state(_replace(module.get_extra_state(), at, (number,)))

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

    def _find_modules(self) -> list[nn.Module]:
        return [module for estimator in self._estimators for module in _modules(estimator)]

    def _leaves(self) -> dict[Place, Any]:
        found: dict[Place, Any] = {}
        for number, module in enumerate(self.stateful):
            _collect(module.get_extra_state(), (number,), found)
        return found


def _differs(now: Any, before: Any) -> bool:
    return now is not before and (type(now) is not type(before) or repr(now) != repr(before))


def _modules(module: nn.Module) -> list[nn.Module]:
    """A module and those within it (several times faster than ``modules()``)."""
    found = [module]
    for child in module._modules.values():
        if child is not None:
            found += _modules(child)
    return found


def _items(state: Any) -> Iterable[tuple[Any, Any]]:
    return state.items() if isinstance(state, dict) else enumerate(state)


def _collect(state: Any, place: Place, found: dict[Place, Any]) -> None:
    """Walk through nested dicts, lists and tuples (several times faster than torch's pytree)."""
    if isinstance(state, (dict, list, tuple)):
        for key, part in _items(state):
            _collect(part, (*place, key), found)
    else:
        found[place] = state


def _replace(state: Any, at: dict[Place, Tensor], place: Place) -> Any:
    """Rebuild ``state`` with other tensors at some places."""
    if isinstance(state, (dict, list, tuple)):
        parts = {key: _replace(part, at, (*place, key)) for key, part in _items(state)}
        return parts if isinstance(state, dict) else type(state)(parts.values())
    return at.get(place, state)
