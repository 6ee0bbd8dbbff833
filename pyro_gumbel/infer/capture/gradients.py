"""What lies in ``.grad`` between steps: zeros, as Pyro's ``SVI`` leaves them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["RestingGradients"]


class RestingGradients:
    """Zeros for each parameter that has had a gradient, made once.

    ``SVI`` makes them anew at each step and adds the gradients to them. Here gradients come from a
    recording, and take the place of zeros that nobody has written to. What somebody has, the user
    or another ``SVI``, counts as it does there.
    """

    def __init__(self) -> None:
        # By identity: tensors compare elementwise. The parameter is kept, and so its identity.
        self._zeros: dict[int, tuple[Tensor, Tensor, int]] = {}

    def clear(self) -> None:
        """Let go of the parameters."""
        self._zeros.clear()

    def is_resting(self, parameter: Tensor) -> bool:
        """Tell whether ``.grad`` is as it was left."""
        if parameter.grad is None:
            return True
        known = self._zeros.get(id(parameter))
        return known is not None and parameter.grad is known[1] and known[1]._version == known[2]

    def total(self, parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
        """Add a gradient to what lies there."""
        left = parameter.grad
        if left is None or (gradient is not None and self.is_resting(parameter)):
            return gradient
        # A copy, for optimisers write to gradients by .data, which no version counts.
        return left.clone() if gradient is None else left + gradient

    @torch.no_grad()
    def lay_down(self, parameters: Iterable[Tensor]) -> None:
        """Leave zeros where there is a gradient."""
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            known = self._zeros.get(id(parameter))
            if known is None or not _alike(known[1], gradient):
                zeros = torch.zeros_like(gradient)
            elif known[1]._version != known[2]:
                zeros = known[1].zero_()
            else:
                parameter.grad = known[1]
                continue
            self._zeros[id(parameter)] = (parameter, zeros, zeros._version)
            parameter.grad = zeros


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
