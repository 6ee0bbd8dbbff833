"""Conversion from half precision to float32, with finite gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_gumbel.distributions._autograd import with_signature
from pyro_gumbel.distributions._base import plain_eager
from pyro_gumbel.distributions._noise import noise_dtype


@with_signature
class FiniteGradient(torch.autograd.Function):
    """Convert to float32 or better; clamp the gradient to the range of the input's dtype."""

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        wide = noise_dtype(value.dtype)
        return value.view_as(value) if value.dtype == wide else value.to(wide)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        info = torch.finfo(ctx.dtype)
        return grad.clamp(info.min, info.max).to(ctx.dtype)


def widen(parameter: Tensor) -> Tensor:
    """Return a parameter in float32 or better, with a gradient in the range of its dtype."""
    wide = noise_dtype(parameter.dtype)
    if parameter.dtype == wide:
        return parameter
    if not (plain_eager() and parameter.requires_grad):
        return parameter.to(wide)
    return FiniteGradient.apply(parameter)
