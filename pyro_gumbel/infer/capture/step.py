"""One step of one structure: how it is recorded, replayed and held against an eager one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import pyro
import torch
from pyro import poutine
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyro_gumbel.estimators import Call, Estimator
from pyro_gumbel.infer._state import preserved_rng
from pyro_gumbel.infer.capture.cuda_graph import (
    GraphedStep,
    NotGraphable,
    hyper_parameters,
    make_capturable,
    optimised,
)
from pyro_gumbel.infer.capture.estimator_state import EstimatorState
from pyro_gumbel.infer.capture.gradients import RestingGradients
from pyro_gumbel.infer.capture.own_numbers import own_numbers_kept
from pyro_gumbel.infer.capture.recording import Recording, record
from pyro_gumbel.infer.capture.refusals import (
    check_hooks,
    laid_out,
    undone_on_failure,
    warn_of_other_leaves,
)
from pyro_gumbel.infer.capture.restored import restored
from pyro_gumbel.infer.not_recordable import NotRecordable
from pyro_gumbel.infer.particle_elbo import ParticleELBO

__all__ = ["CapturedStep", "OtherParameters", "RecordingFailed"]

Outcome = tuple[Tensor, list[Tensor | None], list[Tensor]]
Look = Callable[[Tensor], None]


class OtherParameters(Exception):
    """The step meets other parameters than the first one did."""


class RecordingFailed(Exception):
    """The recorded run ended in an error, its cause, of the user's or of the recording's."""


class CapturedStep:
    """A step of the programs with arguments of given shapes.

    Args:
        elbo: The objective.
        optim: The optimiser, which has seen every parameter.
        params: The parameters by name, unconstrained.
        estimators: The estimators of the step's sites.
        modules: The modules that the programs use.
        resting: What lies in ``.grad`` between steps.
        compile: Whether to compile the recording.

    Attributes:
        recording: What was recorded, once it was.
        replays: How often it was replayed.
    """

    def __init__(
        self,
        elbo: ParticleELBO,
        optim: PyroOptim,
        params: Mapping[str, Tensor],
        estimators: Mapping[str, Estimator],
        modules: Sequence[nn.Module],
        resting: RestingGradients,
        *,
        compile: bool,
    ) -> None:
        self.elbo = elbo
        self.optim = optim
        self.params = dict(params)
        self.leaves = list({id(p): p for p in params.values() if p.requires_grad}.values())
        device = self.leaves[0].device if self.leaves else torch.device("cpu")
        self.state = EstimatorState(estimators.values(), device)
        self.modules = modules
        self.resting = resting
        self.compile = compile
        self.recording: Recording | None = None
        self.replays = 0
        # Those of estimators are shown at the end of an eager step, not met in the programs.
        self._met = {name for name in self.params if not name.startswith("gradient$")}
        own = {id(p): p for module in modules for p in module.parameters(recurse=False)}
        self._freezable = [*self.params.values(), *own.values()]
        self._trained = [param.requires_grad for param in self._freezable]
        # Not those of estimators, which are put in place anew: they are inputs.
        self._tensors = [
            (tensors, name, tensor)
            for module in set(modules).difference(self.state.modules)
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
        ]
        self._enumerates = any(estimator.enumerates for estimator in estimators.values())
        self._graphable = device.type == "cuda"
        self._graphed: GraphedStep | None = None
        self._hyper_parameters: list[Any] = []
        self._optim_in_graph = False

    def is_current(self) -> bool:
        """Tell whether parameters, buffers and estimators are the very ones that were recorded."""
        store = pyro.get_param_store()._params
        return (
            all(store.get(name) is param for name, param in self.params.items())
            and [param.requires_grad for param in self._freezable] == self._trained
            and all(tensors.get(name) is tensor for tensors, name, tensor in self._tensors)
            and self.state.is_current()
        )

    def record(self, call: Call, look: Look) -> Tensor:
        """Take a step, recording it, and return the loss.

        Raises:
            NotRecordable: If a replay could not do what the step does; nothing has changed then.
            OtherParameters: If there are others than the first step had; likewise.
            RecordingFailed: If the run ends in another error; likewise.
        """
        self.state.fix_places()
        leaves = pytree.tree_leaves((call.args, call.kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)] + self.state.inputs()
        check_hooks(self.leaves)
        if self._enumerates or self.elbo.vectorize_particles:
            self.elbo.plan(call)  # by a trial that is not the step's
        loss, gradients, states = self._recorded(call, inputs, look)
        self.state.forget_counts()
        self._finish(states)
        self._apply(gradients)
        return loss

    def replay(self, tensors: list[Tensor], look: Look) -> Tensor:
        """Take a step by the recording, given the tensors among the arguments.

        The loss is looked at before anything is changed by it, but for a CUDA graph, which takes
        the step as a whole.
        """
        assert self.recording is not None
        inputs = tensors + self.state.inputs()
        graph = self._graph(inputs) if self._graphable else None
        if graph is None:
            loss, gradients, states = self.recording(inputs)
        else:
            loss, gradients, states = graph(inputs)
        look(loss)
        self._finish(states)  # before the optimiser, as in an eager step: it may be interrupted
        if graph is None or not self._optim_in_graph:
            self._apply(gradients)
        return loss

    def eager(self, call: Call) -> tuple[Tensor, list[Tensor | None]]:
        """Compute what an eager step would from here on, changing nothing."""
        leaves = pytree.tree_leaves((call.args, call.kwargs))
        with self._preserved([leaf for leaf in leaves if isinstance(leaf, Tensor)]):
            loss, gradients, _ = self._outcome(call)
        return loss, gradients

    def recorded(self, tensors: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """Compute what a replay would from here on, changing nothing."""
        assert self.recording is not None
        with self._preserved(tensors):
            loss, gradients, _ = self.recording(tensors + self.state.inputs())
        return loss, gradients

    @contextmanager
    def _preserved(self, tensors: list[Tensor]) -> Iterator[None]:
        if self.recording is None:
            buffers = [buffer for module in self.modules for buffer in module._buffers.values()]
            written = [buffer for buffer in buffers if buffer is not None]
        else:
            inputs = [i for i in self.recording.mutated_inputs if i < len(tensors)]
            written = self.recording.mutated + [tensors[i] for i in inputs]
        with restored(written), preserved_rng(), self.state.preserved():
            yield

    def _recorded(self, call: Call, inputs: list[Tensor], look: Look) -> Outcome:
        """Run and record what comes before the optimiser; a failure leaves nothing behind."""
        own = own_numbers_kept((call.model, call.guide), again=lambda: self.eager(call))
        try:
            with undone_on_failure(self.state, self.modules), own:
                outcome, self.recording = self._run(call, inputs)
                look(outcome[0])
        except BaseException:
            self.recording = None
            raise
        return outcome

    def _run(self, call: Call, inputs: list[Tensor]) -> tuple[Outcome, Recording]:
        try:
            # What checks arguments looks at their values, which no recording can repeat.
            with pyro.validation_enabled(False), _Unchecked():
                return record(self._function(call), inputs, compile=self.compile)
        except (NotRecordable, OtherParameters):
            raise
        except Exception as error:
            raise RecordingFailed from error

    def _function(self, call: Call) -> Any:
        leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
        count = sum(isinstance(leaf, Tensor) for leaf in leaves)

        def function(*inputs: Tensor) -> Outcome:
            rest = iter(inputs[:count])
            new = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(new, spec)
            with self.state.given(list(inputs[count:])):
                return self._outcome(Call(call.model, call.guide, args, kwargs))

        return function

    def _outcome(self, call: Call) -> Outcome:
        with poutine.trace(param_only=True) as traced:
            loss, surrogate, _ = self.elbo.estimate(call)
        self._check_parameters(traced.trace.nodes)
        if self.recording is None:
            warn_of_other_leaves(surrogate, self._others(call))
        gradients: tuple[Tensor | None, ...] = (None,) * len(self.leaves)
        if surrogate.requires_grad:
            gradients = torch.autograd.grad(surrogate, self.leaves, allow_unused=True)
        states = [state.detach() for state in self.state.tensors()]
        return loss, laid_out(self.leaves, gradients), states

    def _check_parameters(self, met: Collection[str]) -> None:
        new = [name for name in met if name not in self.params]
        if new:
            raise OtherParameters(
                f"the parameters {new} were not there in the first step, and a recorded step does "
                "not train them"
            )
        gone = sorted(self._met.difference(met))
        if gone:
            raise OtherParameters(
                f"the parameters {gone} were there in the first step only, and a recorded step "
                "goes on training them"
            )

    def _others(self, call: Call) -> Iterator[Tensor]:
        """Tensors that an eager step would give gradients to beside the parameters."""
        known = {id(leaf) for leaf in self.leaves}
        own = (parameter for module in self.modules for parameter in module.parameters(False))
        given = pytree.tree_leaves((call.args, call.kwargs))
        for tensor in (*own, *given):
            if isinstance(tensor, Tensor) and id(tensor) not in known:
                yield tensor

    def _finish(self, states: list[Tensor]) -> None:
        self.state.put(states)
        self.state.advance()

    def _apply(self, gradients: list[Tensor | None]) -> None:
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            leaf.grad = self.resting.total(leaf, gradient)
        self.optim(self.leaves)
        self.resting.lay_down(self.leaves)

    def _graph(self, inputs: list[Tensor]) -> GraphedStep | None:
        """The CUDA graph, captured anew where a number that it goes on with has changed."""
        assert self.recording is not None
        if self._graphed is None:
            self._optim_in_graph = make_capturable(self.optim)
        if self._optim_in_graph and not all(map(self.resting.is_resting, self.leaves)):
            return None  # somebody's gradients come on top
        now = hyper_parameters(self.optim) if self._optim_in_graph else []
        if (
            self._graphed is None
            or now != self._hyper_parameters
            or not self._graphed.is_current()
        ):
            self._hyper_parameters = now
            self._graphed = self._capture(inputs)
        return self._graphed

    def _capture(self, inputs: list[Tensor]) -> GraphedStep | None:
        assert self.recording is not None
        apply = self._apply if self._optim_in_graph else None
        changed = optimised(self.optim) if self._optim_in_graph else []
        try:
            return GraphedStep(self.recording, inputs, self.leaves[0].device, apply, changed)
        except NotGraphable as error:
            self._graphable = False
            warnings.warn(
                f"CapturedSVI: the recorded step cannot become one CUDA graph, for {error}. Its "
                "operations are launched one by one, which takes longer; make such tensors on "
                f"{self.leaves[0].device}.",
                stacklevel=6,
            )
            return None


class _Unchecked(Messenger):
    """Turns the checks of distributions off that were made before, such as a module's prior."""

    def __enter__(self) -> Self:
        self._checked: list[Any] = []
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        for fn in self._checked:
            fn._validate_args = True

    def _pyro_sample(self, msg: Message) -> None:
        fn: Any = msg["fn"]
        while fn is not None:
            if getattr(fn, "_validate_args", False):
                self._checked.append(fn)
                fn._validate_args = False
            fn = getattr(fn, "base_dist", None)
