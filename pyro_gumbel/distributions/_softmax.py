"""Softmax over few categories, several times faster on a CPU than torch's kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_gumbel.distributions._autograd import with_signature
from pyro_gumbel.distributions._base import plain_eager

# Torch's CPU kernel processes one row at a time. For rows up to this length, operations on the
# whole tensor are faster.
_SHORT_ROW = 64


@with_signature
class _ShortSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(scores: Tensor, largest: Tensor) -> Tensor:
        shares = scores.sub(largest).exp_()
        return shares.div_(shares.sum(-1, keepdim=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (shares,) = ctx.saved_tensors
        weighted = grad * shares
        return weighted - shares * weighted.sum(-1, keepdim=True), None


def _is_short(scores: Tensor) -> bool:
    return scores.shape[-1] <= _SHORT_ROW and scores.is_cpu and plain_eager()


def softmax(scores: Tensor, largest: Tensor | None = None) -> Tensor:
    """Softmax over the last dimension; ``largest`` are its maxima, ``(..., 1)``, if known."""
    if not _is_short(scores):
        return scores.softmax(-1)
    if largest is None:
        largest = scores.detach().amax(-1, keepdim=True)
    return _ShortSoftmax.apply(scores, largest.detach())


def log_softmax(scores: Tensor) -> Tensor:
    """Log-softmax over the last dimension."""
    if not _is_short(scores):
        return scores.log_softmax(-1)
    shifted = scores - scores.detach().amax(-1, keepdim=True)
    return shifted - shifted.exp().sum(-1, keepdim=True).log()
