"""Gumbel-softmax gradients averaged over the noise, conditional on the hard draw."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_gumbel._validate import integer
from pyro_gumbel.distributions._base import plain_eager
from pyro_gumbel.distributions._numerics import full_precision, log_exponential_noise
from pyro_gumbel.distributions.families import is_one_hot
from pyro_gumbel.distributions.one_hot import draw_one_hot
from pyro_gumbel.estimators.schedules import Temperature
from pyro_gumbel.estimators.straight_through import (
    OneHotEstimator,
    current_temperature,
    reinmax_midpoint,
)

__all__ = ["GumbelRao", "ReinMaxRao", "conditional_scores"]


def conditional_scores(
    log_probs: Tensor, hard: Tensor, sample_shape: tuple[int, ...] = ()
) -> Tensor:
    r"""Draw :math:`\log p + G`, conditional on ``hard`` as the arg max, differentiable in ``p``.

    With the drawn category :math:`i` and :math:`E_j \sim \mathrm{Exp}(1)`, coordinate :math:`i` is
    :math:`-\log E_i`, and every other is :math:`-\log(E_j / p_j + E_i)`.
    """
    shape = (*sample_shape, *log_probs.shape)
    noise = log_exponential_noise(shape, log_probs.dtype, log_probs.device).exp()
    top = (noise * hard).sum(-1, keepdim=True)
    # A category of probability zero never arrives; the clamp keeps gradients finite.
    waits = noise * (-log_probs).clamp(max=80.0).exp()
    scores = -torch.where(hard > 0, top, waits + top).log()
    return scores.masked_fill(log_probs == -math.inf, -math.inf)


_AT_ONCE = 1 << 17  # size of a chunk of draws, which bounds temporary memory


def matrix_product(vector: Tensor, jacobian: Tensor) -> Tensor:
    r"""Multiply by a mean of :math:`\mathrm{diag}(y) - y y^\top`, of shape ``(..., C, C)``."""
    with full_precision(vector):
        return (jacobian @ vector.unsqueeze(-1)).squeeze(-1)


def sampled_product(vector: Tensor, draws: Tensor, scale: Tensor) -> Tensor:
    """Multiply by this mean, from the draws ``y_k``, ``(K,) + batch_shape + (C,)``."""
    with full_precision(vector):
        inner = torch.einsum("k...c,...c->k...", draws, vector)
        mean = torch.einsum("k...,k...c->...c", inner, draws) / len(draws)
    return (vector * draws.mean(0) - mean) * scale


Product = Callable[..., Tensor]


class _WithJacobian(torch.autograd.Function):
    """The hard draw in the forward pass, and a stored symmetric Jacobian in the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, hard: Tensor, product: Product, *kept: Tensor) -> Tensor:
        ctx.product = product
        ctx.save_for_backward(*kept)
        return hard.view_as(hard)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        return ctx.product(grad, *kept), None, None, *(None for _ in kept)


def with_jacobian(logits: Tensor, hard: Tensor, product: Product, *kept: Tensor) -> Tensor:
    """Return ``hard`` with the gradient ``product(gradient, *kept)`` to ``logits``."""
    if plain_eager():
        return _WithJacobian.apply(logits, hard, product, *kept)
    finite = logits.clamp(min=torch.finfo(logits.dtype).min)
    return hard + product(finite - finite.detach(), *kept)  # plus zero


@torch.no_grad()
def mean_softmax_jacobian(
    log_probs: Tensor, hard: Tensor, temperature: float | Tensor, num_samples: int
) -> Tensor:
    r"""Average :math:`J(\mathrm{softmax}(z / \tau)) / \tau` over scores ``z`` given ``hard``."""
    categories = log_probs.shape[-1]
    mean = torch.zeros_like(log_probs)
    second = log_probs.new_zeros((*log_probs.shape, categories))
    # A chunk of draws takes at most the memory of the matrices.
    for done in range(0, num_samples, categories):
        size = min(categories, num_samples - done)
        soft = (conditional_scores(log_probs, hard, (size,)) / temperature).softmax(-1)
        mean = mean + soft.sum(0)  # not in place, which fails if vmap batches only the noise
        with full_precision(soft):
            second = second + torch.einsum("k...i,k...j->...ij", soft, soft)
    jacobian = (torch.diag_embed(mean) - second) / num_samples
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        temperature = temperature.unsqueeze(-1)
    return jacobian / temperature


@torch.no_grad()
def conditional_softmaxes(
    log_probs: Tensor, hard: Tensor, temperature: float | Tensor, num_samples: int
) -> Tensor:
    r"""Draw ``num_samples`` values :math:`\mathrm{softmax}(z / \tau)` of scores given ``hard``."""
    draws = log_probs.new_empty((num_samples, *log_probs.shape))
    for chunk in draws.split(max(1, _AT_ONCE // max(1, log_probs.numel()))):
        scores = conditional_scores(log_probs, hard, (len(chunk),))
        chunk.copy_((scores / temperature).softmax(-1))
    return draws


class _Rao(OneHotEstimator):
    """Base class of both estimators, with a temperature and a number of conditional draws."""

    def __init__(self, temperature: Temperature = 0.5, *, num_samples: int = 10) -> None:
        super().__init__(temperature)
        name = type(self).__name__
        if isinstance(temperature, Tensor) and temperature.requires_grad:
            raise ValueError(
                f"{name}: temperature requires a gradient, but the estimator does not provide "
                f"one. Write {name}(temperature.detach()), or use GumbelStraightThrough or "
                "ReinMax, which can learn their temperature."
            )
        self.num_samples = integer(f"{name}: num_samples", num_samples, 1, ValueError)

    def _average(self, logits: Tensor, log_probs: Tensor, hard: Tensor) -> Tensor:
        """Return ``hard`` with the mean Jacobian, stored as draws or matrices (the smaller)."""
        temperature = current_temperature(self.temperature, log_probs, type(self).__name__)
        if self.num_samples < log_probs.shape[-1]:
            draws = conditional_softmaxes(log_probs, hard, temperature, self.num_samples)
            scale = (logits.new_ones(()) / temperature).to(logits.dtype)
            return with_jacobian(logits, hard, sampled_product, draws, scale)
        jacobian = mean_softmax_jacobian(log_probs, hard, temperature, self.num_samples)
        return with_jacobian(logits, hard, matrix_product, jacobian)


class GumbelRao(_Rao):
    r"""Gumbel straight-through, Rao-Blackwellised over the noise conditional on the draw.

    .. math::
        \hat g = \frac1K \sum_k \tfrac1\tau J(\mathrm{softmax}(z_k / \tau))\, \nabla_D f(D), \qquad
        z_k \sim (\phi + G \mid \arg\max = D)

    *Unbiased*: no. Its mean is that of :class:`GumbelStraightThrough`, and its variance is never
    larger. *Requires*: a cost differentiable at one-hot values. *Cost*: one evaluation, and
    ``num_samples`` softmaxes at the site, with memory for ``min(num_samples, C)`` vectors per
    variable.

    Args:
        temperature: Positive number, tensor without gradient, or schedule.
        num_samples: Number ``K`` of conditional draws, at least 1.

    References:
        Rao-Blackwellizing the Straight-Through Gumbel-Softmax Gradient Estimator (Paulus,
        Maddison, Krause, 2021), https://arxiv.org/abs/2010.04838

    Example:
        >>> GumbelRao(0.5, num_samples=100)
        GumbelRao(0.5, num_samples=100)
    """

    def draw_one_hot(self, logits: Tensor) -> Tensor:
        hard = draw_one_hot(logits)
        return self._average(logits, logits.detach().log_softmax(-1), hard)


class ReinMaxRao(_Rao):
    r"""ReinMax with its midpoint Jacobian averaged over Gumbel noise conditional on the draw.

    .. math::
        \hat g = \frac2K \sum_k \tfrac1\tau J(\mathrm{softmax}(z_k / \tau))\, \nabla_D f(D)
        - \tfrac12 J(\pi)\, \nabla_D f(D), \qquad
        z_k \sim (\log \pi_D + G \mid \arg\max = D)

    with :math:`\pi_D = (\pi + D) / 2`. *Unbiased*: no. It has a lower variance than
    :class:`ReinMax` and a larger bias. The bias is smallest at a temperature of about 0.6; at
    other temperatures gradients shrink, for linear costs by half as the temperature tends to 0.
    *Requires*: a cost differentiable at one-hot values. *Cost*: one evaluation, and
    ``num_samples`` softmaxes at the site. Arguments are those of :class:`GumbelRao`.

    References:
        Wang, Bui (2026), https://arxiv.org/abs/2603.08257

    Example:
        >>> ReinMaxRao(1.0)
        ReinMaxRao(1.0, num_samples=10)
    """

    sites = "one-hot"
    families = (is_one_hot,)

    def __init__(self, temperature: Temperature = 1.0, *, num_samples: int = 10) -> None:
        super().__init__(temperature, num_samples=num_samples)

    def soften(self, logits: Tensor, hard: Tensor) -> Tensor:
        midpoint = reinmax_midpoint(logits.detach(), hard)
        return 2 * self._average(logits, midpoint.log(), hard) - 0.5 * logits.softmax(-1)
