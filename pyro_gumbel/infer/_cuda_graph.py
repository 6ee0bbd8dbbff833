"""A function as one CUDA graph: all its kernels are launched at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_gumbel.infer._operations import Undo
from pyro_gumbel.infer._state import preserved_rng

__all__ = ["GraphedFunction", "NotGraphable"]


class NotGraphable(RuntimeError):  # noqa: N818
    """The function does something that a graph would repeat with the numbers of its capture."""


class GraphedFunction:
    """A captured function. What a call returns is overwritten by the next one.

    Args:
        function: Takes a list of tensors.
        inputs: Arguments of the kind that it takes, on any device.
        device: The device that it runs on.
        held: The tensors that it reads besides.

    Raises:
        NotGraphable: If the function makes a tensor on another device.
    """

    def __init__(
        self,
        function: Callable[[Sequence[Tensor]], Any],
        inputs: Sequence[Tensor],
        device: torch.device,
        held: Sequence[Tensor] = (),
    ) -> None:
        # A kernel reads a number on the CPU when it is captured, and goes on with it.
        self._inputs = [tensor.detach().to(device, copy=True) for tensor in inputs]
        self._frozen = [tensor for tensor in held if tensor.device != device]
        self._versions = [tensor._version for tensor in self._frozen]
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            # Libraries set themselves up outside of the capture; nothing is to change by that.
            with torch.cuda.stream(stream), preserved_rng(), Undo(), _AllOn(device):
                function(self._inputs)
            stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            # Threads that load data may use the device meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._returned = function(self._inputs)

    def is_current(self) -> bool:
        """Return whether the tensors on other devices that the function reads are as they were."""
        return self._versions == [tensor._version for tensor in self._frozen]

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        for static, tensor in zip(self._inputs, inputs, strict=True):
            static.copy_(tensor)
        self._graph.replay()
        return self._returned


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
