"""State around a recorded step: of modules, estimators and optimisers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, reduce
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
from pyro_gumbel.infer._operations import Undo, hide_from_compiler
from pyro_gumbel.infer._recording import GraphedFunction, NotRecordable, record

__all__ = ["PLAIN", "EstimatorStates", "Surroundings", "Updater", "step_jointly"]

PLAIN = (bool, int, float, str)
_CALLS = (PyroOptim.__call__, PyroLRScheduler.__call__)
# ASGD is not among them: its multi-tensor form rounds to float32.
_NAMES = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")
_FUSED = (torch.float32, torch.float64)  # others are rounded less often than step by step
_MULTI_TENSOR = [getattr(torch.optim, name) for name in _NAMES]


class EstimatorStates:
    """The schedules of estimators, and the tensors of their extra states, known by their places.

    Both are inputs of a recorded step. What other steps put beside them is left alone.
    """

    def __init__(self, estimators: Iterable[Estimator]) -> None:
        self.modules = list(dict.fromkeys(part for e in estimators for part in e.modules()))
        self._schedules = [part for part in self.modules if isinstance(part, Schedule)]
        plain = (nn.Module.get_extra_state, Schedule.get_extra_state)
        self._stateful = [m for m in self.modules if type(m).get_extra_state not in plain]
        self._places = [place for place, leaf in self._leaves().items() if leaf is Tensor]

    def inputs(self, device: torch.device) -> list[Tensor]:
        """Return the current values of the schedules, then the tensors."""
        options: Any = {"dtype": torch.float64, "device": device}
        return [torch.full((), s.value, **options) for s in self._schedules] + self.tensors()

    def tensors(self) -> list[Tensor]:
        states: Any = self.read()
        return [reduce(getitem, place, states) for place in self._places]

    def put(self, tensors: Sequence[Tensor]) -> None:
        """Put tensors in the places that :meth:`tensors` reads."""
        states = self.read()
        for place, tensor in zip(self._places, tensors, strict=True):
            reduce(getitem, place[:-1], states)[place[-1]] = tensor
        self.write(states)

    def advance(self) -> None:
        """Advance the schedules."""
        for schedule in self._schedules:
            schedule.advance()

    @contextmanager
    def replaced_by(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        """Let schedules and states be ``inputs`` while a step is recorded."""
        for schedule, value in zip(self._schedules, inputs, strict=False):
            schedule.stand_in = value
        self.put(inputs[len(self._schedules) :])
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

    def read(self) -> dict[nn.Module, Any]:
        """Return the state of each module."""
        return {module: module.get_extra_state() for module in self._stateful}

    def write(self, states: Mapping[nn.Module, Any]) -> None:
        """Restore what :meth:`read` returned."""
        for module, state in states.items():
            module.set_extra_state(state)

    def _leaves(self) -> dict[tuple[Any, ...], Any]:
        """Find each place, a module and keys into its state, with a tensor's type or a value."""
        return {
            tuple(getattr(key, "key", getattr(key, "idx", key)) for key in path): (
                Tensor if isinstance(leaf, Tensor) else leaf
            )
            for path, leaf in pytree.tree_flatten_with_path(self.read())[0]
        }


class Surroundings(TorchFunctionMode):
    """The parameters in the store, and the tensors, parts and plain numbers in modules.

    Inside, collects the modules that are variables of the functions that call torch. Those are the
    modules whose methods run, and those that a program only reads from.
    """

    def __init__(self) -> None:
        super().__init__()
        hide_from_compiler(self)
        self._outside = sys._getframe(1).f_code
        self._modules: dict[nn.Module, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame: Any = sys._getframe(1)
        while frame is not None and frame.f_code is not self._outside:
            values = frame.f_locals.values()
            self._modules.update((value, None) for value in values if isinstance(value, nn.Module))
            frame = frame.f_back
        return func(*args, **(kwargs or {}))

    def note(self, params: Mapping[str, Tensor], estimators: Iterable[nn.Module]) -> None:
        """Note what is there now."""
        stored = dict(pyro.get_param_store().named_parameters())
        self._stored = {n: p for n, p in params.items() if stored.get(n) is p}
        modules = [part for module in self._modules for part in module.modules()]
        self._entries: list[tuple[Any, str, Any]] = [
            (entries, name, value)
            for module in dict.fromkeys([*modules, *estimators])
            if not isinstance(module, Schedule)  # an input
            # Private: the public iterators return copies, which cannot show a replaced entry.
            for entries in (module._parameters, module._buffers, module._modules, vars(module))
            for name, value in entries.items()
            if isinstance(value, (Tensor, nn.Module, *PLAIN))
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
        """Leave out the attributes that a run of the programs has changed by itself."""
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


def _has_changed(entry: tuple[Any, str, Any]) -> bool:
    entries, name, value = entry
    now = entries.get(name)
    return now is not value and (type(now) not in PLAIN or now != value)


class Updater:
    """Hands gradients to a Pyro optimiser and leaves ``zeros`` in ``.grad``, as ``SVI`` does.

    ``SVI`` adds gradients to the zeros. Here they take the place of zeros that nobody has written
    to. The optimiser's operations are recorded, too, once its settings stay the same.
    """

    def __init__(self, parameters: Sequence[Tensor], zeros: dict[Tensor, Tensor | None]) -> None:
        self._parameters, self._zeros = parameters, zeros
        self._settings: list[Any] | None = None
        self._recorded: Any = None

    def __call__(
        self,
        optim: PyroOptim,
        gradients: Sequence[Tensor | None],
        graph: GraphedFunction | None,
    ) -> None:
        """Take a step; gradients that ``graph`` computes are overwritten, each in its place."""
        pairs = [(p, g) for p, g in zip(self._parameters, gradients, strict=True) if g is not None]
        given = [gradient for _, gradient in pairs]
        update = partial(self._update, optim, [parameter for parameter, _ in pairs])
        settings = self._find_settings(optim, [graph, *(g is None for g in gradients)])
        if settings is None or settings != self._settings:
            if settings is not None:
                self._settings, self._recorded = settings, None
            update(*given)
            return
        if self._recorded is None:
            try:
                self._recorded = self._record(update, given, graph)
            except NotRecordable:  # it reads values, such as the number of steps
                self._recorded = lambda given: update(*given)
                for parameter in self._parameters:
                    parameter.grad = self._zeros[parameter]
        self._recorded(given)

    def _record(
        self,
        update: Callable[..., None],
        given: Sequence[Tensor],
        graph: GraphedFunction | None,
    ) -> Any:
        with Undo():
            _, recording = record(update, given)
        if recording.has_checks:
            raise NotRecordable("the optimiser checks values")
        device = self._parameters[0].device
        if graph is None or any(tensor.device != device for tensor in recording.held):
            return recording
        graphed = GraphedFunction(lambda _: recording(given), [], device)
        return lambda _: graphed([])

    def _update(self, optim: PyroOptim, trained: Sequence[Tensor], *gradients: Tensor) -> None:
        for parameter, gradient in zip(trained, gradients, strict=True):
            left = None if self._has_zeros(parameter) else parameter.grad
            parameter.grad = gradient if left is None else gradient + left
        step_jointly(optim, self._parameters)
        zero_grads(self._parameters)
        self._zeros.update((parameter, parameter.grad) for parameter in self._parameters)

    def _has_zeros(self, parameter: Tensor) -> bool:
        grad = parameter.grad
        return grad is self._zeros.get(parameter) and (grad is None or grad._version == 0)

    def _find_settings(self, optim: PyroOptim, found: list[Any]) -> list[Any] | None:
        """List all that a step goes by, but for numbers in tensors; ``None`` if it may differ."""
        for parameter in self._parameters:
            options = _joint_options(optim, parameter)
            if options is None or not self._has_zeros(parameter):
                return None
            state = _optimizer(optim, parameter).state.get(parameter, {})
            found += [*options, optim.grad_clip[parameter], *state.values()]
        return [id(value) if isinstance(value, Tensor) else value for value in found]


def step_jointly(optim: PyroOptim, parameters: Sequence[Tensor]) -> None:
    """Call ``optim``, with one torch optimiser for all parameters of the same options.

    Pyro makes one torch optimiser for each parameter. Their options and state are used; torch's
    multi-tensor step gives the same numbers up to rounding.
    """
    groups: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault(_joint_options(optim, parameter), []).append(parameter)
    if None in groups:
        optim(groups.pop(None))
    for (kind, options), group in groups.items():
        joint = kind(group, lr=1.0)
        joint.param_groups[0].update(options)
        for parameter in group:
            state = _optimizer(optim, parameter).state
            if parameter in state:
                joint.state[parameter] = state[parameter]
            if optim.grad_clip[parameter] is not None:
                optim.grad_clip[parameter](parameter)
        joint.step()


def _joint_options(optim: PyroOptim, parameter: Tensor) -> Any:
    """Return the class of a parameter's torch optimiser and its options in a multi-tensor step.

    Returns ``None`` where such a step may differ, or is not known to be the same.
    """
    if type(optim).__call__ not in _CALLS or parameter not in optim.optim_objs:
        return None
    optimizer = _optimizer(optim, parameter)
    options = dict(optimizer.param_groups[0])
    del options["params"]
    kind = type(optimizer)
    foreach, fused = options.get("foreach", False), options.get("fused", False)
    is_stateless = kind is torch.optim.SGD and not options["momentum"]
    if (
        kind not in _MULTI_TENSOR
        or foreach is False
        or options.get("differentiable")
        or any(isinstance(value, (Tensor, list)) for value in options.values())
        or optimizer._optimizer_step_pre_hooks  # private: torch has no public list of hooks
        or optimizer._optimizer_step_post_hooks
        or not (is_stateless or parameter in optimizer.state)
    ):
        return None
    if foreach is None and not fused and parameter.is_cpu:  # on a GPU torch chooses foreach
        is_plain = parameter.is_contiguous() and parameter.dtype in _FUSED
        options["fused" if fused is None and is_plain else "foreach"] = True
    return kind, tuple(options.items())


def _optimizer(optim: PyroOptim, parameter: Tensor) -> Any:
    """Return torch's optimiser of a parameter, out of its learning rate scheduler."""
    found = optim.optim_objs[parameter]
    return getattr(found, "optimizer", found)
