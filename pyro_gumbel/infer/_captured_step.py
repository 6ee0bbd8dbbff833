"""One step of one structure: how it is recorded, replayed and held against an eager one."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import pyro
import torch
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_gumbel.estimators import Call, Estimator
from pyro_gumbel.infer._cuda_graph import (
    GraphedStep,
    NotGraphable,
    hyper_parameters,
    make_capturable,
    optimised,
)
from pyro_gumbel.infer._record import NotRecordable, Recording, record
from pyro_gumbel.infer._rng import preserved_rng
from pyro_gumbel.infer._step_state import EstimatorState
from pyro_gumbel.infer.particle_elbo import ParticleELBO

__all__ = ["CapturedStep"]

Outcome = tuple[Tensor, list[Tensor | None], list[Tensor]]


class CapturedStep:
    """A step of the programs with arguments of given shapes.

    Args:
        elbo: The objective.
        optim: The optimiser, which has seen every parameter.
        params: The parameters by name, unconstrained.
        estimators: The estimators of the step's sites.
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
        *,
        compile: bool,
    ) -> None:
        self.elbo = elbo
        self.optim = optim
        self.params = dict(params)
        self.leaves = list(dict.fromkeys(params.values()))
        device = self.leaves[0].device if self.leaves else torch.device("cpu")
        self.state = EstimatorState(estimators.values(), device)
        self.compile = compile
        self.recording: Recording | None = None
        self.replays = 0
        self._graphable = self.leaves[0].is_cuda
        self._graphed: GraphedStep | None = None
        self._hyper_parameters: list[Any] = []
        self._optim_in_graph = False

    def holds_current_params(self) -> bool:
        """Tell whether the parameter store still has the very parameters that were recorded."""
        store = pyro.get_param_store()._params
        return all(store.get(name) is param for name, param in self.params.items())

    def record(self, call: Call) -> Tensor:
        """Take a step, recording it, and return the loss."""
        leaves = pytree.tree_leaves((call.args, call.kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)] + self.state.inputs()
        numbers, generators = self.state.numbers(), _python_generators()
        # What checks arguments looks at their values, which no recording can repeat.
        with pyro.validation_enabled(False), _Unchecked(), _undone_on_failure(self.state):
            function = self._function(call)
            outcome, self.recording = record(function, inputs, compile=self.compile)
            if _python_generators() != generators:
                raise NotRecordable(
                    "the program draws from Python's or NumPy's generator; draw with torch."
                )
            if self.state.numbers() != numbers:
                raise NotRecordable(
                    "an estimator counts or keeps numbers in get_extra_state; keep tensors."
                )
        loss, gradients, states = outcome
        self._finish(states)
        self._apply(gradients)
        return loss

    def replay(self, tensors: list[Tensor], look: Callable[[Tensor], None]) -> Tensor:
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
        if graph is None or not self._optim_in_graph:
            self._apply(gradients)
        self._finish(states)
        return loss

    def eager(self, call: Call) -> tuple[Tensor, list[Tensor | None]]:
        """Compute what an eager step would from here on, changing nothing."""
        with self._preserved():
            loss, gradients, _ = self._outcome(call)
        return loss, gradients

    def recorded(self, tensors: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """Compute what a replay would from here on, changing nothing."""
        assert self.recording is not None
        with self._preserved():
            loss, gradients, _ = self.recording(tensors + self.state.inputs())
        return loss, gradients

    @contextmanager
    def _preserved(self) -> Iterator[None]:
        mutated = self.recording.mutated if self.recording is not None else []
        kept = [tensor.clone() for tensor in mutated]
        try:
            with preserved_rng(), self.state.preserved():
                yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(mutated, kept, strict=True):
                    tensor.copy_(value)

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
        loss, surrogate, _ = self.elbo.estimate_step(call)
        gradients: tuple[Tensor | None, ...] = (None,) * len(self.leaves)
        if surrogate.requires_grad:
            gradients = torch.autograd.grad(surrogate, self.leaves, allow_unused=True)
        laid_out = [_like(p, g) for p, g in zip(self.leaves, gradients, strict=True)]
        return loss, laid_out, [state.detach() for state in self.state.tensors()]

    def _finish(self, states: list[Tensor]) -> None:
        self.state.put(states)
        self.state.advance()

    def _apply(self, gradients: list[Tensor | None]) -> None:
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            leaf.grad = gradient
        self.optim(self.leaves)

    def _graph(self, inputs: list[Tensor]) -> GraphedStep | None:
        """The CUDA graph, captured anew where a number that it goes on with has changed."""
        assert self.recording is not None
        if self._graphed is None:
            self._optim_in_graph = make_capturable(self.optim)
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


def _like(parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
    """Lay a gradient out as its parameter, as optimisers expect it."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _python_generators() -> tuple[Any, ...]:
    name, words, *rest = np.random.get_state()
    return random.getstate(), (name, bytes(words), *rest)  # type: ignore[arg-type]


@contextmanager
def _undone_on_failure(state: EstimatorState) -> Iterator[None]:
    kept = state.tensors()
    generators = pyro.util.get_rng_state()
    try:
        yield
    except BaseException:
        state.put(kept)
        pyro.util.set_rng_state(generators)
        raise
