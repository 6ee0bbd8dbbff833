"""A tensor with the value of one tensor and the gradient of another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_gumbel.distributions._autograd import with_signature


@with_signature
class _StraightThrough(torch.autograd.Function):
    """Return the first argument, and pass the gradient to the second."""

    generate_vmap_rule = True

    @staticmethod
    def forward(hard: Tensor, soft: Tensor) -> Tensor:
        return hard.view_as(hard)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def jvp(ctx: Any, hard: Tensor | None, soft: Tensor) -> Tensor:
        return soft.view_as(soft)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    r"""Return the value of ``hard`` with the gradient of ``soft``.

    .. math:: y = D, \qquad \frac{\partial y}{\partial \phi} := \frac{\partial s}{\partial \phi}

    The value is exactly that of ``hard`` (D). The incoming gradient passes to ``soft`` (s)
    unchanged, without a copy.

    Args:
        hard: The value to return, without gradient.
        soft: The tensor that gets the gradient, of the same shape.

    Returns:
        A tensor equal to ``hard``.

    References:
        Estimating or Propagating Gradients Through Stochastic Neurons
        (Bengio, Leonard, Courville, 2013), https://arxiv.org/abs/1308.3432

    Example:
        >>> soft = torch.tensor([0.3, 0.7], requires_grad=True)
        >>> hard = straight_through(torch.tensor([0.0, 1.0]), soft)
        >>> hard.tolist(), torch.autograd.grad(hard[0], soft)[0].tolist()
        ([0.0, 1.0], [1.0, 0.0])
    """
    if torch.compiler.is_compiling():
        return hard + (soft - soft.detach())  # plain operations, which the compiler fuses
    return _StraightThrough.apply(hard, soft)
