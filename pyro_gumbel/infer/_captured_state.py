"""State around a recorded step: of estimators, modules, and optimisers."""

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
from pyro.infer.util import zero_grads
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pyro_gumbel.estimators import Estimator
from pyro_gumbel.estimators.schedules import Schedule
from pyro_gumbel.infer._operations import hide_from_compiler
from pyro_gumbel.infer._recording import NotRecordable

__all__ = ["EstimatorStates", "ModulesAtWork", "Surroundings", "Updater"]

_PLAIN = (bool, int, float, str)
_CALLS = (PyroOptim.__call__, PyroLRScheduler.__call__)
# ASGD is not among them: its multi-tensor form rounds to float32.
_NAMES = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")
_FUSED = (torch.float32, torch.float64)  # others are rounded less often than step by step
_MULTI_TENSOR = [getattr(torch.optim, name) for name in _NAMES]


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
        self._entries: list[tuple[Any, str, Any]] = [
            (entries, name, value)
            for module in dict.fromkeys(modules)
            if not isinstance(module, Schedule)  # an input
            # Private: the public iterators return copies, which cannot show a replaced entry.
            for entries in (module._parameters, module._buffers, module._modules, vars(module))
            for name, value in entries.items()
            if isinstance(value, (Tensor, nn.Module, *_PLAIN))
        ]
        tensors = [value for *_, value in self._entries if isinstance(value, Tensor)]
        self._trained = [(tensor, tensor.requires_grad) for tensor in (*params.values(), *tensors)]

    def are_current(self) -> bool:
        """Return whether everything is as it was found."""
        stored = dict(pyro.get_param_store().named_parameters())
        return (
            all(stored.get(name) is param for name, param in self._stored.items())
            and all(tensor.requires_grad is trained for tensor, trained in self._trained)
            and not any(map(_has_changed, self._entries))
        )

    def accept(self) -> None:
        """Leave out the attributes that a run of the programs has changed by itself.

        Raises:
            NotRecordable: If it put other tensors in the place of parameters or buffers.
        """
        changed = [entry for entry in self._entries if _has_changed(entry)]
        replaced = [
            name
            for entries, name, value in changed
            if isinstance(value, Tensor) and "_buffers" not in entries
        ]
        if replaced:
            raise NotRecordable(
                f"the program puts other tensors in place of the buffers {replaced}; write to "
                "them, buffer.copy_(...)."
            )
        self._entries = [entry for entry in self._entries if not _has_changed(entry)]

    def restore(self) -> None:
        """Give modules back what they had."""
        for entries, name, value in self._entries:
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


class Updater:
    """Hands gradients to a Pyro optimiser and leaves zeros in ``.grad``, as ``SVI`` does.

    ``SVI`` adds the gradients to the zeros. Here they take the place of zeros that nobody has
    written to.
    """

    def __init__(self) -> None:
        self._zeros: dict[Tensor, tuple[Tensor, int]] = {}
        self._joint: dict[Any, torch.optim.Optimizer] = {}

    def clear(self) -> None:
        """Let go of the parameters."""
        self._zeros.clear()
        self._joint.clear()

    def __call__(
        self,
        optim: PyroOptim,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
    ) -> None:
        """Take a step of the optimiser; gradients beyond the parameters' are left alone."""
        for parameter, gradient in zip(parameters, gradients, strict=False):
            if gradient is not None:
                left = None if self._has_zeros(parameter) else parameter.grad
                parameter.grad = gradient if left is None else left + gradient
        self._step(optim, parameters)
        zero_grads(parameters)
        for parameter in parameters:
            if parameter.grad is not None:
                self._zeros[parameter] = (parameter.grad, parameter.grad._version)

    def _has_zeros(self, parameter: Tensor) -> bool:
        zeros, version = self._zeros.get(parameter, (None, 0))
        return parameter.grad is zeros and (zeros is None or zeros._version == version)

    def _step(self, optim: PyroOptim, parameters: Sequence[Tensor]) -> None:
        """Call ``optim``, with one torch optimiser for all parameters of the same options.

        Pyro makes one torch optimiser for each parameter. Their options and state are used;
        torch's multi-tensor step gives the same numbers up to rounding.
        """
        groups: dict[Any, list[Tensor]] = {}
        for parameter in parameters:
            groups.setdefault(_joint_options(optim, parameter), []).append(parameter)
        if None in groups:
            optim(groups.pop(None))
        for (kind, options), group in groups.items():
            joint = self._joint.get((kind, *group))
            if joint is None:
                joint = self._joint[kind, *group] = kind(group, lr=1.0)
            joint.param_groups[0].update(options)
            for parameter in group:
                state = _optimizer(optim, parameter).state
                if parameter in state:
                    joint.state[parameter] = state[parameter]
                if optim.grad_clip[parameter] is not None:
                    optim.grad_clip[parameter](parameter)
            joint.step()

    def graph_settings(self, optim: PyroOptim, parameters: Sequence[Tensor]) -> list[Any] | None:
        """List the numbers and the ids of tensors that a CUDA graph of a step would keep.

        Returns ``None`` if the optimiser is not made for graphs, or gradients are to be added.
        """
        values: list[Any] = [id(optim)]
        for parameter in parameters:
            optimizer = _optimizer(optim, parameter)
            group = optimizer.param_groups[0]
            if not group.get("capturable") or not self._has_zeros(parameter):
                return None
            values += optimizer.state[parameter].values()
            values += [value for name, value in group.items() if name != "params"]
        return [id(value) if isinstance(value, Tensor) else value for value in values]


def _joint_options(optim: PyroOptim, parameter: Tensor) -> Any:
    """Return the class of a parameter's torch optimiser and its options in a multi-tensor step.

    Returns ``None`` where such a step may differ, or is not known to be the same.
    """
    if type(optim).__call__ not in _CALLS or parameter not in optim.optim_objs:
        return None
    optimizer = _optimizer(optim, parameter)
    options = dict(optimizer.param_groups[0])
    params, kind = options.pop("params"), type(optimizer)
    foreach, fused = options.get("foreach", False), options.get("fused", False)
    is_stateless = kind is torch.optim.SGD and not options["momentum"]
    if (
        kind not in _MULTI_TENSOR
        or foreach is False
        or options.get("differentiable")
        or any(isinstance(value, (Tensor, list)) for value in options.values())
        or optimizer._optimizer_step_pre_hooks  # private: torch has no public list of hooks
        or optimizer._optimizer_step_post_hooks
        or len(params) + len(optimizer.param_groups) != 2
        or not (is_stateless or parameter in optimizer.state)
    ):
        return None
    if foreach is None and not fused and parameter.is_cpu:  # on a GPU torch chooses foreach
        tensors = [parameter] if parameter.grad is None else [parameter, parameter.grad]
        is_plain = all(x.is_contiguous() and x.dtype in _FUSED for x in tensors)
        options["fused" if fused is None and is_plain else "foreach"] = True
    return kind, tuple(options.items())


def _optimizer(optim: PyroOptim, parameter: Tensor) -> Any:
    """Return torch's optimiser of a parameter, out of its learning rate scheduler."""
    found = optim.optim_objs[parameter]
    return getattr(found, "optimizer", found)


def _has_changed(entry: tuple[Any, str, Any]) -> bool:
    entries, name, value = entry
    now = entries.get(name)
    return now is not value and (type(now) not in _PLAIN or now != value)
