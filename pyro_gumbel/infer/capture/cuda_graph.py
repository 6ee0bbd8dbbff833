"""A recorded step as one CUDA graph: every kernel of it is launched at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_gumbel.infer._state import preserved_rng
from pyro_gumbel.infer.capture.recording import Recording
from pyro_gumbel.infer.capture.restored import restored

__all__ = ["GraphedStep", "NotGraphable", "hyper_parameters", "make_capturable", "optimised"]

Outcome = tuple[Tensor, list[Tensor | None], list[Tensor]]


class NotGraphable(RuntimeError):  # noqa: N818
    """The step does something that a graph would repeat with the numbers of its capture."""


class GraphedStep:
    """The recorded operations and the optimiser, captured together.

    Args:
        recording: The step up to the gradients.
        inputs: Arguments of the kind that it takes, on any device.
        device: The device of the parameters.
        apply: The optimiser's step, given gradients; left out where it cannot be captured.
        changed: The tensors that ``apply`` changes.

    Raises:
        NotGraphable: If a result of the step is not on the device.
    """

    def __init__(
        self,
        recording: Recording,
        inputs: Sequence[Tensor],
        device: torch.device,
        apply: Callable[[list[Tensor | None]], None] | None,
        changed: Sequence[Tensor],
    ) -> None:
        # A kernel reads a number on the CPU when it is captured, and goes on with it.
        self._inputs = [tensor.detach().to(device, copy=True) for tensor in inputs]
        self._frozen = [tensor for tensor in recording.held if tensor.device != device]
        self._versions = self._frozen_versions()
        with torch.cuda.device(device):
            self._warm_up(recording, device, apply, changed)
            self._graph = torch.cuda.CUDAGraph()
            # Threads that load data may use the device meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._outcome: Outcome = recording(self._inputs)
                if apply is not None:
                    apply(self._outcome[1])

    def is_current(self) -> bool:
        """Tell whether the tensors on the CPU that the step reads are as they were."""
        return self._versions == self._frozen_versions()

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor]) -> Outcome:
        """Replay; the gradients returned are overwritten by the next replay."""
        for static, tensor in zip(self._inputs, inputs, strict=True):
            static.copy_(tensor)
        self._graph.replay()
        loss, gradients, states = self._outcome
        return loss.clone(), gradients, [state.clone() for state in states]

    def _frozen_versions(self) -> list[int]:
        return [tensor._version for tensor in self._frozen]

    def _warm_up(
        self,
        recording: Recording,
        device: torch.device,
        apply: Callable[[list[Tensor | None]], None] | None,
        changed: Sequence[Tensor],
    ) -> None:
        """Let libraries set themselves up outside the capture, on a stream of its own."""
        with preserved_rng(), restored([*recording.mutated, *changed]):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                with _AllOn(device):
                    _, gradients, _ = recording(self._inputs)
                if apply is not None:
                    apply(gradients)
            stream.synchronize()


class _AllOn(TorchDispatchMode):
    """Refuses operations whose results are on another device, such as draws on the CPU."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device != self._device:
                raise NotGraphable(f"{func} gives a tensor on {leaf.device}")
        return result


def make_capturable(optim: PyroOptim) -> bool:
    """Keep the optimisers' step counts on the device; tell whether all of them can be captured."""
    optimizers = _optimizers(optim)
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
        for optimizer in _optimizers(optim)
        for group in optimizer.param_groups
        for name, value in group.items()
        if name != "params"
    ]


def optimised(optim: PyroOptim) -> list[Tensor]:
    """What a step of the optimisers changes: parameters and what is kept of each."""
    found: list[Tensor] = []
    for optimizer in _optimizers(optim):
        for group in optimizer.param_groups:
            found += group["params"]
        for state in optimizer.state.values():
            found += [value for value in state.values() if isinstance(value, Tensor)]
    return found


def _optimizers(optim: PyroOptim) -> list[Any]:
    """Torch's optimisers, out of their learning rate schedulers."""
    return [getattr(o, "optimizer", o) for o in optim.optim_objs.values()]
