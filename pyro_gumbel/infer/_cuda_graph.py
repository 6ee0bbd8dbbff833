"""A recorded step as one CUDA graph: every kernel of it is launched at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_gumbel.infer._record import Recording
from pyro_gumbel.infer._rng import preserved_rng

__all__ = ["GraphedStep", "hyper_parameters", "make_capturable"]

Outcome = tuple[Tensor, list[Tensor | None], list[Tensor]]


class GraphedStep:
    """The recorded operations and the optimiser, captured together.

    Args:
        recording: The step up to the gradients.
        inputs: Arguments of the kind that it takes.
        apply: The optimiser's step, given gradients; left out where it cannot be captured.
    """

    def __init__(
        self,
        recording: Recording,
        inputs: Sequence[Tensor],
        apply: Callable[[list[Tensor | None]], None] | None,
    ) -> None:
        self._inputs = [tensor.detach().clone() for tensor in inputs]
        self._warm_up(recording)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outcome: Outcome = recording(self._inputs)
            if apply is not None:
                apply(self._outcome[1])

    def _warm_up(self, recording: Recording) -> None:
        """Let libraries set themselves up outside the capture, on a stream of its own."""
        kept = [tensor.clone() for tensor in recording.mutated]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with preserved_rng(), torch.cuda.stream(stream):
            recording(self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():
            for tensor, value in zip(recording.mutated, kept, strict=True):
                tensor.copy_(value)

    def __call__(self, inputs: Sequence[Tensor]) -> Outcome:
        """Replay; the gradients returned are overwritten by the next replay."""
        for static, tensor in zip(self._inputs, inputs, strict=True):
            static.copy_(tensor)
        self._graph.replay()
        loss, gradients, states = self._outcome
        return loss.clone(), gradients, [state.clone() for state in states]


def make_capturable(optim: PyroOptim) -> bool:
    """Keep the optimisers' step counts on the device; tell whether all of them can be captured."""
    optimizers = [getattr(o, "optimizer", o) for o in optim.optim_objs.values()]
    if not all("capturable" in group for o in optimizers for group in o.param_groups):
        return False
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["capturable"] = True
        for parameter, state in optimizer.state.items():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(parameter.device, torch.float32)
    return True


def hyper_parameters(optim: PyroOptim) -> list[Any]:
    """Learning rates and other numbers of the optimisers, which a captured graph goes on with."""
    return [
        value
        for optimizer in optim.optim_objs.values()
        for group in getattr(optimizer, "optimizer", optimizer).param_groups
        for name, value in group.items()
        if name != "params"
    ]
