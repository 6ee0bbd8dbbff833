"""One step of the programs on arguments of one kind: recorded, replayed, compared."""

from __future__ import annotations

import copy
import math
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import reduce
from operator import getitem
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.util import warn_if_nan
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pyro_gumbel.estimators import Call, Estimator
from pyro_gumbel.estimators.schedules import Schedule
from pyro_gumbel.infer._operations import Undo, hide_from_compiler, reads_shape_alone
from pyro_gumbel.infer._recording import CudaGraph, NotRecordable, Recording, record
from pyro_gumbel.infer._state import generator_states, set_generator_states
from pyro_gumbel.infer.elbo import ParticleELBO

__all__ = ["CapturedStep", "Differs", "Outcome", "Surroundings"]

PLAIN = (bool, int, float, str)
_ROUNDING = 1e-4  # relative, of the loss and of each gradient
_CANCELLED = 1e-6  # what rounding leaves of a gradient that should be zero, relative to them all
_OTHER_DRAW = 0.1  # another compiler's rounding makes another draw of a few


class Differs(RuntimeError):  # noqa: N818
    """A recorded step would differ from an eager one."""


class Outcome(NamedTuple):
    """The results of a step, before it changes parameters or estimators."""

    loss: Tensor
    gradients: Sequence[Tensor | None]  # of the leaves, the others, the arguments that want one
    states: Sequence[Tensor]


class CapturedStep:
    """A step on arguments of one kind, that is of given shapes and settings."""

    def __init__(
        self,
        elbo: ParticleELBO,
        params: Mapping[str, Tensor],
        surrogate: Tensor,
        estimators: Mapping[str, Estimator],
        surroundings: Surroundings,
        compile: bool,
    ) -> None:
        self._elbo, self._compile, self._params = elbo, compile, params
        self.states, self._surroundings = EstimatorStates(estimators.values()), surroundings
        surroundings.note(params, self.states.modules)
        self._names = {p: name for name, p in params.items() if p.requires_grad}
        self.leaves = list(self._names)  # the parameters that are trained
        self.others = [leaf for leaf in _leaves_of(surrogate) if leaf not in self._names]
        self.updater: Any = None
        self.device = self.leaves[0].device if self.leaves else torch.device("cpu")
        self.recording: Recording | None = None  # after the second step
        self.graph: CudaGraph | None = None
        self.parts: list[Any] = []  # objects in the step's key by ids, held so that they keep them
        self._graphable = self.device.type == "cuda"
        self._versions: list[int] = []
        self.replays, self._branches = 0, True

    def is_current(self) -> bool:
        """Return whether parameters, modules and estimators are those that were recorded."""
        with suppress(LookupError):  # a place of a state is gone
            self.states.tensors()
            return self._surroundings.are_current()
        return False

    def record(self, call: Call, tensors: Sequence[Tensor]) -> Outcome:
        """Compute a step and record it; on an error nothing has changed."""

        def function(*inputs: Tensor) -> tuple[Any, ...]:
            with self.states.replaced_by(inputs[len(tensors) :]):
                outcome = self._compute(call, inputs[: len(tensors)])
            self._surroundings.accept()
            return tuple(outcome)

        if any(getattr(leaf, "_post_accumulate_grad_hooks", None) for leaf in self.leaves):
            raise NotRecordable(
                "a parameter has a hook that runs after its gradient was added, and gradients of "
                "a recording are not added; use register_hook."
            )
        self._elbo.plan(call)  # may run the programs, which is not the step's
        inputs = [_apart(tensor) for tensor in (*tensors, *self.states.inputs(self.device))]
        with self._restored(on_error=True):
            found, recording = record(function, inputs, self._compile, self._branches)
        outcome = Outcome(*found)
        if not (recording.has_checks and outcome.loss.isnan()):  # else each step warns
            self.recording = recording
        return outcome

    def forget_branches(self) -> None:
        """Have the next step recorded anew, with fewer branches, since one has changed."""
        if self._branches:
            self.recording, self.graph, self._branches = None, None, False

    def replay(self, inputs: Sequence[Tensor]) -> tuple[Outcome, list[Tensor]]:
        """Compute a step by the recording, and conditions without which it is void."""
        assert self.recording is not None
        if self._graphable:
            self._make_graph(self.recording, inputs)
        (loss, gradients, states), conditions = (self.graph or self.recording)(inputs)
        if self.graph is not None:  # it overwrites its results, and states are kept
            states = [state.clone() for state in states]
        return Outcome(loss, gradients, states), conditions

    def _make_graph(self, recording: Recording, inputs: Sequence[Tensor]) -> None:
        for device, operation in recording.devices.items():
            if device not in (None, self.device):
                self._graphable = False
                warnings.warn(
                    "CapturedSVI: the recorded step cannot become one CUDA graph, for "
                    f"{operation} gives a tensor on {device}. Its operations are launched one by "
                    f"one, which takes longer; make such tensors on {self.device}.",
                    stacklevel=5,
                )
                return
        # A kernel reads a number on the CPU once, when it is captured.
        versions = [x._version for x in recording.held if x.device != self.device]
        if self.graph is None or versions != self._versions:
            self.graph, self._versions = CudaGraph(recording, inputs, self.device), versions

    def eager(self, call: Call, tensors: Sequence[Tensor]) -> Outcome:
        """Compute what an eager step would, with what it leaves in ``written``; change nothing."""
        written = self.written([*tensors, *self.states.inputs(self.device)])
        with self._restored(), Undo():
            outcome = self._compute(call, [_apart(tensor) for tensor in tensors])
            left = [tensor.clone() for tensor in written]
        return outcome._replace(states=[*outcome.states, *left])

    def written(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """List the tensors that a replay writes to, some of the inputs included."""
        if self.recording is None:
            return []
        found = self.recording.written + [inputs[i] for i in self.recording.written_inputs]
        return [tensor.detach() for tensor in found]

    def compare(self, found: Outcome, expected: Outcome) -> None:
        """Raise :class:`Differs` where a part differs from what is expected beyond rounding."""
        names = [f"the gradient of {name!r}" for name in self._names.values()]
        others = ["the gradient of a tensor that is not a parameter"]
        names += others * (len(found.gradients) - len(names))
        names += ["what is left in an estimator or a buffer"] * len(found.states)
        a, b = ([*one.gradients, *one.states, one.loss] for one in (found, expected))
        norms = list(map(_norms, a, b))
        rounding, cancelled = (_OTHER_DRAW,) * 2 if self._compile else (_ROUNDING, _CANCELLED)
        rest = cancelled * math.hypot(*(size for _, size in norms[:-1])) + rounding**2
        for name, (error, size) in zip([*names, "the loss"], norms, strict=True):
            if error > rounding * size + (rounding if name == "the loss" else rest):
                raise Differs(
                    f"CapturedSVI: {name} differs by {error:.3g} between the recorded step and an "
                    f"eager one with the same random numbers, where it has the size {size:.3g}; "
                    f"the losses are {found.loss.item():g} and {expected.loss.item():g}. "
                    "Something that the program reads has changed since it was recorded. Pass "
                    "what changes as an argument, as a tensor: svi.step(x, torch.tensor(beta)); "
                    "or call svi.reset() when you change it; or use pyro.infer.SVI."
                )

    def _compute(self, call: Call, tensors: Sequence[Tensor]) -> Outcome:
        """Run the programs and differentiate, with ``tensors`` in place of the arguments'."""
        new = iter(tensors)
        args, kwargs = pytree.tree_map_only(Tensor, lambda _: next(new), (call.args, call.kwargs))
        with poutine.trace(param_only=True) as traced:
            loss, surrogate, _ = self._elbo.estimate(Call(call.model, call.guide, args, kwargs))
        self._check_parameters(traced.trace.nodes)
        if is_validation_enabled():
            warn_if_nan(loss, "loss")
        wanted = [*self.leaves, *self.others, *(x for x in tensors if x.requires_grad)]
        gradients: Sequence[Tensor | None] = [None] * len(wanted)
        if surrogate.requires_grad:
            one = torch.ones((), dtype=surrogate.dtype, device=surrogate.device)
            gradients = torch.autograd.grad(surrogate, wanted, one, allow_unused=True)
        states = [state.detach() for state in self.states.tensors()]
        return Outcome(loss, _laid_out(wanted, gradients), states)

    def _check_parameters(self, met: Collection[str]) -> None:
        new = [name for name in met if name not in self._params]
        # Those of estimators are shown at the end of an eager step, not met in the programs.
        gone = [n for n in self._params if n not in met and not n.startswith("gradient$")]
        for names, what in (
            (new, "not there in the first step, and a recorded step does not train"),
            (gone, "there in the first step only, and a recorded step goes on training"),
        ):
            if names:
                raise Differs(
                    f"CapturedSVI: the parameters {names} were {what} them. Call svi.reset() when "
                    "parameters come or go; it is done for this time."
                )

    @contextmanager
    def _restored(self, *, on_error: bool = False) -> Iterator[None]:
        """Restore generators, estimators and modules on leaving, or on an error."""
        with ExitStack() as stack:
            stack.callback(set_generator_states, generator_states())
            states = self.states.read().items()
            stack.callback(self.states.write, {m: copy.deepcopy(state) for m, state in states})
            stack.callback(self._surroundings.restore)
            yield
            if on_error:
                stack.pop_all()


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

    def finish(self, tensors: Sequence[Tensor]) -> None:
        """End a step with new tensors."""
        self.put(tensors)
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
        tree, _ = pytree.tree_flatten_with_path(self.read())
        places = [tuple(getattr(k, "key", getattr(k, "idx", k)) for k in path) for path, _ in tree]
        leaves = [Tensor if isinstance(leaf, Tensor) else leaf for _, leaf in tree]
        return dict(zip(places, leaves, strict=True))


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
        frame: Any = None if reads_shape_alone(func) else sys._getframe(1)
        while frame is not None and frame.f_code is not self._outside:
            for value in frame.f_locals.values():
                if isinstance(value, nn.Module):
                    self._modules[value] = None
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
        tensors = [(held, name) for held, name, value in changed if isinstance(value, Tensor)]
        if replaced := [name for held, name in tensors if "_buffers" not in held]:
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


def _leaves_of(surrogate: Tensor) -> list[Tensor]:
    """List the tensors that a backward pass would give gradients to."""
    waiting: list[Any] = [surrogate.grad_fn]
    seen: dict[Any, None] = {}
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen[node] = None
            waiting.extend(following for following, _ in node.next_functions)
    return [node.variable for node in seen if hasattr(node, "variable")]


def _apart(tensor: Tensor) -> Tensor:
    """Return the same memory as another object, which cannot be taken for a held tensor."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _norms(found: Tensor | None, expected: Tensor | None) -> tuple[float, float]:
    """Return the norms of a difference and of its second term; ``None`` is zero."""
    a, b = (torch.zeros(()) if x is None else x.detach().double() for x in (found, expected))
    same = (a == b) | (a.isnan() & b.isnan())
    error = torch.where(same, 0.0, a - b).nan_to_num(torch.inf)  # a NaN in one alone
    return error.norm().item(), b.nan_to_num(0.0, 0.0, 0.0).norm().item()


def _laid_out(tensors: Sequence[Tensor], gradients: Sequence[Any]) -> list[Tensor | None]:
    """Give each gradient memory of its own, laid out as its tensor, as optimisers expect."""
    taken: set[int] = set()
    found: list[Tensor | None] = []
    for tensor, gradient in zip(tensors, gradients, strict=True):
        if gradient is not None:
            if gradient.layout != torch.strided:
                raise NotRecordable(
                    "a gradient is sparse; write sparse=False, nn.Embedding(..., sparse=False)."
                )
            memory = gradient.untyped_storage().data_ptr()
            if memory in taken or gradient.stride() != tensor.stride():
                gradient = torch.empty_like(tensor).copy_(gradient)
            taken.add(memory)
        found.append(gradient)
    return found
