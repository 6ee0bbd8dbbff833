"""One step of the programs on arguments of one kind: recorded, replayed, compared."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.util import warn_if_nan
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyro_gumbel.estimators import Call, Estimator
from pyro_gumbel.infer._captured_state import EstimatorStates, Surroundings
from pyro_gumbel.infer._operations import Undo
from pyro_gumbel.infer._recording import NotRecordable, Recording, record
from pyro_gumbel.infer._state import generator_states, preserved_rng, set_generator_states
from pyro_gumbel.infer.elbo import ParticleELBO

__all__ = ["CapturedStep", "GraphedFunction", "OtherParameters", "Outcome", "leaves_of"]

_ROUNDING = 1e-4  # relative, of the loss and of each gradient
_CANCELLED = 1e-6  # what rounding leaves of a gradient that should be zero, relative to them all
_OTHER_DRAW = 0.1  # another compiler's rounding makes another draw of a few


class OtherParameters(Exception):
    """The step meets other parameters than the first one did."""


class Outcome(NamedTuple):
    """The results of a step, before it changes parameters or estimators.

    Attributes:
        loss: The detached loss.
        gradients: Those of the parameters, of the step's ``others``, then of the arguments that
            require one.
        states: The estimators' new states.
    """

    loss: Tensor
    gradients: Sequence[Tensor | None]
    states: Sequence[Tensor]


class CapturedStep:
    """A step on arguments of one kind, that is of given shapes and settings.

    Args:
        elbo: The objective.
        params: The parameters that the first step met, by name, unconstrained.
        estimators: The estimators of its sites.
        leaves: The tensors that got gradients in it.
        modules: The modules that the programs use.
        compile: Whether to compile the recording.

    Attributes:
        leaves: The parameters that are trained.
        others: Other tensors that get gradients.
        recording: The recorded operations, after the second step.
        replays: The number of replays.
        graph: The recording as a CUDA graph, on a GPU.
        update: The settings of the optimiser's graph, where it has one, and the graph.
        parts: Objects that are in the step's key by their ids, held so that they keep these.
    """

    def __init__(
        self,
        elbo: ParticleELBO,
        params: Mapping[str, Tensor],
        estimators: Iterable[Estimator],
        leaves: Iterable[Tensor],
        modules: Iterable[nn.Module],
        compile: bool,
    ) -> None:
        self._elbo, self._compile, self._params = elbo, compile, params
        self._names = {p: name for name, p in params.items() if p.requires_grad}
        self.leaves = list(self._names)
        self.others = [leaf for leaf in leaves if leaf not in self._names]
        self.device = self.leaves[0].device if self.leaves else torch.device("cpu")
        self.states = EstimatorStates(estimators, self.device)
        self._surroundings = Surroundings(params, [*modules, *self.states.modules])
        self.recording: Recording | None = None
        self.replays = 0
        self.graph: GraphedFunction | None = None
        self.update: tuple[list[Any], GraphedFunction] | None = None
        self.parts: list[Any] = []
        self._graphable = self.device.type == "cuda"
        self._versions: list[int] = []
        self._branches = True

    def is_current(self) -> bool:
        """Return whether parameters, modules and estimators are those that were recorded."""
        return self._surroundings.are_current() and self.states.are_current()

    def record(self, call: Call, tensors: Sequence[Tensor]) -> Outcome:
        """Compute a step and record it; on an error nothing has changed.

        Raises:
            NotRecordable: If a replay could not do what the step does.
            OtherParameters: If it meets other parameters than the first step did.
        """

        def function(*inputs: Tensor) -> tuple[Any, ...]:
            before = _python_generators()
            with self.states.replaced_by(inputs[len(tensors) :]):
                outcome = self._compute(call, inputs[: len(tensors)])
            if _python_generators() != before:
                raise NotRecordable(
                    "the program draws from Python's or NumPy's generator; draw with torch."
                )
            self._surroundings.accept()
            return tuple(outcome)

        if any(getattr(leaf, "_post_accumulate_grad_hooks", None) for leaf in self.leaves):
            raise NotRecordable(
                "a parameter has a hook that runs after its gradient was added, and gradients of "
                "a recording are not added; use register_hook."
            )
        self._elbo.plan(call)  # may run the programs, which is not the step's
        inputs = [_apart(tensor) for tensor in (*tensors, *self.states.inputs())]
        with self._restored(on_error=True):
            found, recording = record(
                function, inputs, compile=self._compile, branches=self._branches
            )
        outcome = Outcome(*found)
        if not (recording.has_checks and outcome.loss.isnan()):  # else each step warns
            self.recording = recording
        return outcome

    def forget_branches(self) -> None:
        """Have the next step recorded anew, with fewer branches, since one has changed."""
        if self._branches:
            self.recording, self.graph, self._branches = None, None, False

    def replay(self, inputs: Sequence[Tensor]) -> tuple[Outcome, Tensor | None]:
        """Compute a step by the recording; the second result is that of :class:`Recording`."""
        assert self.recording is not None
        if self._graphable:
            self._make_graph(self.recording, inputs)
        (loss, gradients, states), broken = (self.graph or self.recording)(inputs)
        if self.graph is not None:  # it overwrites its results, and states are kept
            states = [state.clone() for state in states]
        return Outcome(loss, gradients, states), broken

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
            self.graph, self._versions = GraphedFunction(recording, inputs, self.device), versions
            self.update = None  # which reads the gradients of another

    def eager(self, call: Call, tensors: Sequence[Tensor]) -> Outcome:
        """Compute what an eager step would from here on, changing nothing.

        To the states are added the values that it leaves in the tensors that it writes to.
        """
        written = self.written([*tensors, *self.states.inputs()])
        with self._restored(), Undo():
            outcome = self._compute(call, [_apart(tensor) for tensor in tensors])
            left = [tensor.detach().clone() for tensor in written]
        return outcome._replace(states=[*outcome.states, *left])

    def written(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """List the tensors that a replay writes to, some of the inputs included."""
        if self.recording is None:
            return []
        return self.recording.written + [inputs[i] for i in self.recording.written_inputs]

    def explain_difference(self, found: Outcome, expected: Outcome) -> str | None:
        """Describe a part that differs from what is expected, if beyond rounding."""
        names = [f"the gradient of {self._names[leaf]!r}" for leaf in self.leaves]
        beside = len(found.gradients) - len(self.leaves)
        names += ["the gradient of a tensor that is not a parameter"] * beside
        names += ["what is left in an estimator or a buffer"] * len(found.states)
        a, b = ([*one.gradients, *one.states, one.loss] for one in (found, expected))
        norms = list(map(_norms, a, b))
        rounding = _OTHER_DRAW if self._compile else _ROUNDING
        cancelled = _OTHER_DRAW if self._compile else _CANCELLED
        rest = cancelled * math.hypot(*(size for _, size in norms[:-1])) + rounding**2
        for name, (error, size) in zip([*names, "the loss"], norms, strict=True):
            if error > rounding * size + (rounding if name == "the loss" else rest):
                return (
                    f"{name} differs by {error:.3g} between the recorded step and an eager one "
                    f"with the same random numbers, where it has the size {size:.3g}; the losses "
                    f"are {found.loss.item():g} and {expected.loss.item():g}"
                )
        return None

    def _compute(self, call: Call, tensors: Sequence[Tensor]) -> Outcome:
        """Run the programs and differentiate, with ``tensors`` in place of the arguments'."""
        new = iter(tensors)
        args, kwargs = pytree.tree_map_only(Tensor, lambda _: next(new), (call.args, call.kwargs))
        with poutine.trace(param_only=True) as traced:
            loss, surrogate, _ = self._elbo.estimate(Call(call.model, call.guide, args, kwargs))
        self._check_parameters(traced.trace.nodes)
        if is_validation_enabled():
            warn_if_nan(loss, "loss")
        if self.recording is None:  # some were of the first step alone
            met = set(leaves_of(surrogate))
            self.others = [leaf for leaf in self.others if leaf in met]
        wanted = [*self.leaves, *self.others, *(x for x in tensors if x.requires_grad)]
        gradients: Sequence[Tensor | None] = [None] * len(wanted)
        if surrogate.requires_grad:
            one = torch.ones((), dtype=surrogate.dtype, device=surrogate.device)
            gradients = torch.autograd.grad(surrogate, wanted, one, allow_unused=True)
        states = [state.detach() for state in self.states.tensors()]
        return Outcome(loss, _laid_out(wanted, gradients), states)

    def _check_parameters(self, met: Collection[str]) -> None:
        if new := [name for name in met if name not in self._params]:
            raise OtherParameters(
                f"the parameters {new} were not there in the first step, and a recorded step does "
                "not train them"
            )
        # Those of estimators are shown at the end of an eager step, not met in the programs.
        if gone := [n for n in self._params if n not in met and not n.startswith("gradient$")]:
            raise OtherParameters(
                f"the parameters {gone} were there in the first step only, and a recorded step "
                "goes on training them"
            )

    @contextmanager
    def _restored(self, *, on_error: bool = False) -> Iterator[None]:
        """Restore generators, estimators and modules on leaving, or on an error."""
        with ExitStack() as stack:
            stack.callback(set_generator_states, generator_states())
            stack.callback(self.states.restorer())
            stack.callback(self._surroundings.restore)
            yield
            if on_error:
                stack.pop_all()


class GraphedFunction:
    """A function as one CUDA graph. What a call returns is overwritten by the next one.

    Args:
        function: Takes a list of tensors. All that it computes is on ``device``.
        inputs: Arguments of the kind that it takes, on any device.
        device: The device that it runs on.
    """

    def __init__(
        self,
        function: Callable[[Sequence[Tensor]], Any],
        inputs: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        # A kernel reads a number on the CPU once, when it is captured.
        self._inputs = [tensor.detach().to(device, copy=True) for tensor in inputs]
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            # Libraries set themselves up outside of the capture; nothing is to change by that.
            with torch.cuda.stream(stream), preserved_rng(), Undo():
                function(self._inputs)
            stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            # Threads that load data may use the device meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._returned = function(self._inputs)

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        for static, tensor in zip(self._inputs, inputs, strict=True):
            static.copy_(tensor)
        self._graph.replay()
        return self._returned


def leaves_of(surrogate: Tensor) -> list[Tensor]:
    """List the tensors that a backward pass would give gradients to."""
    found: list[Tensor] = []
    waiting: list[Any] = [surrogate.grad_fn]
    seen: set[Any] = {None}
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):  # where a gradient is added to a leaf
                found.append(node.variable)
            waiting.extend(following for following, _ in node.next_functions)
    return found


def _apart(tensor: Tensor) -> Tensor:
    """Return the same memory as another object, which cannot be taken for a held tensor.

    Gradients end here.
    """
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _norms(found: Tensor | None, expected: Tensor | None) -> tuple[float, float]:
    """Return the norms of a difference and of its second term; ``None`` is zero."""
    a, b = (torch.zeros(()) if x is None else x.detach().double() for x in (found, expected))
    same = (a == b) | (a.isnan() & b.isnan())
    error = torch.where(same, 0.0, a - b).nan_to_num(torch.inf)  # a NaN in one alone
    return error.norm().item(), b.nan_to_num(0.0, 0.0, 0.0).norm().item()


def _laid_out(
    tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
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


def _python_generators() -> tuple[Any, ...]:
    name, words, *rest = np.random.get_state()
    return random.getstate(), (name, bytes(words), *rest)  # type: ignore[arg-type]
