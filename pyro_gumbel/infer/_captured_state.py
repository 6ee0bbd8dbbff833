"""State that a recorded step reads besides its arguments."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import getitem
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pyro_gumbel.estimators import Estimator
from pyro_gumbel.estimators.schedules import Schedule
from pyro_gumbel.infer._operations import hide_from_compiler
from pyro_gumbel.infer._recording import NotRecordable, set_torch_generators, torch_generators

__all__ = ["EstimatorStates", "ModulesAtWork", "Surroundings", "restorer"]

_PLAIN = (bool, int, float, str)


class EstimatorStates:
    """The schedules of estimators, and the tensors of their extra states.

    A recorded step takes both as inputs and returns the latter anew. It knows the tensors by their
    places; what other steps put beside them is left alone.

    Attributes:
        modules: The estimators and their parts.
    """

    def __init__(self, estimators: Iterable[Estimator], device: torch.device) -> None:
        self.modules = list(dict.fromkeys(part for e in estimators for part in e.modules()))
        self._device = device
        self._schedules = [part for part in self.modules if isinstance(part, Schedule)]
        plain = (nn.Module.get_extra_state, Schedule.get_extra_state)
        self._stateful = [m for m in self.modules if type(m).get_extra_state not in plain]
        self._places = [place for place, leaf in self._leaves().items() if leaf is Tensor]

    def inputs(self) -> list[Tensor]:
        """Return the current values of the schedules, then the tensors."""
        options: Any = {"dtype": torch.float64, "device": self._device}
        return [torch.full((), s.value, **options) for s in self._schedules] + self.tensors()

    def tensors(self) -> list[Tensor]:
        states: Any = self._read()
        return [reduce(getitem, place, states) for place in self._places]

    def are_current(self) -> bool:
        """Return whether all places still exist."""
        try:
            self.tensors()
        except (KeyError, IndexError):
            return False
        return True

    def put(self, tensors: Sequence[Tensor]) -> None:
        """Put tensors in the places that :meth:`tensors` reads."""
        states = self._read()
        for place, tensor in zip(self._places, tensors, strict=True):
            reduce(getitem, place[:-1], states)[place[-1]] = tensor
        self._write(states)

    def advance(self) -> None:
        """Count a step."""
        for schedule in self._schedules:
            schedule.advance()

    def restorer(self) -> Callable[[], None]:
        """Return a function that restores every state of now."""
        kept = {module: copy.deepcopy(state) for module, state in self._read().items()}
        return lambda: self._write(kept)

    @contextmanager
    def replaced_by(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        """Let schedules and states be ``inputs`` while a step is recorded.

        Raises:
            NotRecordable: If the states have changed otherwise than by other tensors.
        """
        count = len(self._schedules)
        for schedule, value in zip(self._schedules, inputs[:count], strict=True):
            schedule.stand_in = value
        self.put(inputs[count:])
        before = self._leaves()
        try:
            yield
        finally:
            for schedule in self._schedules:
                schedule.stand_in = None
        if self._leaves() != before:
            raise NotRecordable(
                "an estimator counts or keeps numbers in get_extra_state; keep tensors."
            )

    def _read(self) -> dict[nn.Module, Any]:
        return {module: module.get_extra_state() for module in self._stateful}

    def _write(self, states: Mapping[nn.Module, Any]) -> None:
        for module, state in states.items():
            module.set_extra_state(state)

    def _leaves(self) -> dict[tuple[Any, ...], Any]:
        """Find each place, a module and keys into its state, with a tensor's type or a value."""
        found, _ = pytree.tree_flatten_with_path(self._read())
        leaves = [(path, Tensor if isinstance(leaf, Tensor) else leaf) for path, leaf in found]
        return {
            tuple(getattr(k, "key", getattr(k, "idx", k)) for k in p): leaf for p, leaf in leaves
        }


class Surroundings:
    """The parameters in the store, and the tensors, parts and plain numbers in modules.

    Args:
        params: The step's parameters by their names in the store, unconstrained.
        modules: The modules that the programs and the estimators use.
    """

    def __init__(self, params: Mapping[str, Tensor], modules: Iterable[nn.Module]) -> None:
        stored = dict(pyro.get_param_store().named_parameters())
        self._stored = {n: p for n, p in params.items() if stored.get(n) is p}
        # Schedules are inputs.
        modules = [m for m in dict.fromkeys(modules) if not isinstance(m, Schedule)]
        self._registered: list[tuple[Any, str, Any]] = [
            (entries, name, tensor)
            for module in modules
            for entries in (module._parameters, module._buffers)
            for name, tensor in entries.items()
            if tensor is not None
        ]
        self._attributes: list[tuple[Any, str, Any]] = [
            (entries, name, value)
            for module in modules
            for entries in (vars(module), module._modules)
            for name, value in entries.items()
            if name != "training" and isinstance(value, (Tensor, nn.Module, *_PLAIN))
        ]
        self.buffers = [t for *_, t in self._registered if not isinstance(t, nn.Parameter)]
        tensors = [*params.values(), *(tensor for *_, tensor in self._registered)]
        self._trained = [(tensor, tensor.requires_grad) for tensor in tensors]

    def are_current(self) -> bool:
        """Return whether everything is as it was found."""
        stored = dict(pyro.get_param_store().named_parameters())
        return (
            all(stored.get(name) is param for name, param in self._stored.items())
            and all(tensor.requires_grad is trained for tensor, trained in self._trained)
            and not any(map(_has_changed, self._registered))
            and not any(map(_has_changed, self._attributes))
        )

    def accept(self) -> None:
        """Leave out the attributes that a run of the programs has changed by itself.

        Raises:
            NotRecordable: If it put other tensors in the place of parameters or buffers.
        """
        replaced = [entry[1] for entry in self._registered if _has_changed(entry)]
        if replaced:
            raise NotRecordable(
                f"the program puts other tensors in place of the buffers {replaced}; write to "
                "them, buffer.copy_(...)."
            )
        self._attributes = [entry for entry in self._attributes if not _has_changed(entry)]

    def restore(self) -> None:
        """Give modules back what they had."""
        for entries, name, value in self._registered + self._attributes:
            entries[name] = value


class ModulesAtWork(TorchFunctionMode):
    """Collects the modules that are variables of the functions that call torch.

    Those are the modules whose methods run, and those that a program only reads from.
    """

    def __enter__(self) -> Any:
        hide_from_compiler(self)
        self._outside: Any = sys._getframe(1)
        self._frames: set[Any] = set()
        self._found: dict[nn.Module, None] = {}
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._outside = None
        self._frames.clear()

    def modules(self) -> list[nn.Module]:
        """Return the modules and their parts."""
        return [part for module in self._found for part in module.modules()]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frames: set[Any] = set()
        frame: Any = sys._getframe(1)
        while frame is not None and frame is not self._outside:
            frames.add(frame)
            if frame not in self._frames:
                variables = frame.f_locals.values()
                modules = (value for value in variables if isinstance(value, nn.Module))
                self._found.update(dict.fromkeys(modules))
            frame = frame.f_back
        self._frames = frames
        return func(*args, **(kwargs or {}))


def restorer(tensors: Sequence[Tensor]) -> Callable[[], None]:
    """Return a function that restores tensors and torch's generators."""
    generators = torch_generators()
    values = [tensor.detach().clone() for tensor in tensors]

    @torch.no_grad()
    def restore() -> None:
        set_torch_generators(generators)
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)

    return restore


def _has_changed(entry: tuple[Any, str, Any]) -> bool:
    entries, name, value = entry
    now = entries.get(name)
    return now is not value and (type(now) not in _PLAIN or now != value)
