"""The published formulas of the estimators, written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_gumbel.estimators import Estimator

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def softmax_jacobian(probs: Tensor) -> Tensor:
    """``diag(p) - p p'``, ``(..., C, C)``."""
    return torch.diag_embed(probs) - probs.unsqueeze(-1) * probs.unsqueeze(-2)


def straight_through_jacobian(logits: Tensor, hard: Tensor, temperature: float) -> Tensor:
    return softmax_jacobian((logits / temperature).softmax(-1)) / temperature


def reinmax_jacobian(logits: Tensor, hard: Tensor, temperature: float) -> Tensor:
    midpoint = ((logits / temperature).softmax(-1) + hard) / 2
    return 2 * softmax_jacobian(midpoint) - softmax_jacobian(logits.softmax(-1)) / 2


def gapped_jacobian(logits: Tensor, hard: Tensor, temperature: float, gap: float) -> Tensor:
    top = logits.max(-1, keepdim=True).values
    chosen = (hard * logits).sum(-1, keepdim=True)
    lift = (top - chosen) * hard
    push = (logits + gap - top).clamp(min=0.0) * (1 - hard)
    return softmax_jacobian(((logits + lift - push) / temperature).softmax(-1)) / temperature


def jacobian_of_draw(estimator: Estimator, make: Callable[[Tensor], Any], logits: Tensor) -> Any:
    """Draw once; return the value and its Jacobian in the logits, ``batch + (C, C)``.

    Rows of the batch must not mix.
    """
    logits = logits.clone().requires_grad_()
    value = estimator.draw(make(logits))
    columns = [
        torch.autograd.grad(value[..., c].sum(), logits, retain_graph=True)[0]
        for c in range(value.shape[-1])
    ]
    return value.detach(), torch.stack(columns, -2)


def softmax_of_jacobian(jacobian: Tensor) -> Tensor:
    """Find ``y`` with ``jacobian = diag(y) - y y'`` from three off-diagonal entries each."""
    categories = jacobian.shape[-1]
    coordinates = []
    for i in range(categories):
        j, k = (i + 1) % categories, (i + 2) % categories
        ratio = jacobian[..., i, j] * jacobian[..., i, k] / jacobian[..., j, k]
        coordinates.append((-ratio).sqrt())
    return torch.stack(coordinates, -1)
