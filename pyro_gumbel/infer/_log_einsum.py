"""Sums of products of probabilities in log space: a backend of ``opt_einsum``.

Pyro's backend shifts each factor by its own maximum. If the factors' maxima are far apart, their
product underflows, and its gradient is wrong without an error: in float32 from 16 nats on.
"""

from __future__ import annotations

import math

import torch
from pyro.ops.einsum import torch_log
from pyro.ops.einsum.util import Tensordot
from pyro.ops.rings import LogRing
from pyro.ops.special import safe_log
from torch import Tensor

__all__ = ["ExactLogRing", "einsum", "tensordot", "transpose"]

_MOST_ELEMENTS = 2**22  # of the product of all factors, before it is summed

transpose = torch_log.transpose


class ExactLogRing(LogRing):
    """Pyro's semiring of log-probabilities, by the sums of this module."""

    _backend = __name__


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """Return the logarithm of a sum of products, shifted by the products' maximum."""
    left, output = equation.split("->")
    inputs = left.split(",")
    sizes = {
        dim: size
        for own, operand in zip(inputs, operands, strict=True)
        for dim, size in zip(own, operand.shape, strict=True)
    }
    summed = [dim for dim in sizes if dim not in output]
    if not summed or math.prod(sizes.values()) > _MOST_ELEMENTS:
        return torch_log.einsum(equation, *operands)
    dims = [*output, *summed]
    total = _aligned(operands[0], inputs[0], dims)
    for operand, own in zip(operands[1:], inputs[1:], strict=True):
        total = total + _aligned(operand, own, dims)
    axes = list(range(len(output), len(dims)))
    # Where all are -inf, their difference would be nan.
    shift = total.detach().amax(axes, keepdim=True).clamp(min=torch.finfo(total.dtype).min)
    return safe_log((total - shift).exp().sum(axes)) + shift.squeeze(axes)


def _aligned(operand: Tensor, own: str, dims: list[str]) -> Tensor:
    """Put an operand's dimensions into order, with ones for those that it lacks."""
    operand = operand.permute([own.index(dim) for dim in dims if dim in own])
    return operand[tuple(slice(None) if dim in own else None for dim in dims)]


tensordot = Tensordot(einsum)
