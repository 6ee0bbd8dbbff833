"""Exact one-hot draws and the multilinear log-mass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_gumbel.distributions.gumbel import log_exponential_noise, noise_dtype

__all__ = ["draw_one_hot", "multilinear_log_prob"]

# Stands for log 0 in the gradient: far below any log-mass met in practice, and finite in float16.
_LOG_ZERO_SLOPE = -32768.0


def draw_one_hot(logits: Tensor, sample_shape: Sequence[int] = ()) -> Tensor:
    r"""Draw exactly from ``Categorical(logits)``, one-hot, by the Gumbel-max trick.

    .. math:: D = \mathrm{onehot}(\arg\max_c\, \phi_c + G_c), \qquad G_c \sim \mathrm{Gumbel}(0, 1)

    Noise and comparison are in float32 or better. A category with logit :math:`-\infty` is
    never drawn. No gradient flows.

    Args:
        logits: Log-probabilities up to a constant, ``batch_shape + (C,)``.
        sample_shape: Leading shape of the draw.

    Returns:
        One-hot values of shape ``sample_shape + batch_shape + (C,)`` in the dtype of ``logits``.

    References:
        The Concrete Distribution (Maddison, Mnih, Teh, 2017), https://arxiv.org/abs/1611.00712

    Example:
        >>> draw_one_hot(torch.tensor([0.0, -math.inf]))
        tensor([1., 0.])
    """
    phi = logits.detach().to(noise_dtype(logits.dtype))
    # An offset common to all categories would cost the scores their last digits.
    phi = phi - phi.amax(-1, keepdim=True)
    log_noise = log_exponential_noise((*sample_shape, *phi.shape), phi.dtype, phi.device)
    scores = phi - log_noise
    index = scores.max(-1, keepdim=True).indices  # on CPU `max` is faster than `argmax`
    zero = torch.zeros((), dtype=logits.dtype, device=logits.device)
    return zero.expand(scores.shape).scatter(-1, index, 1)


def multilinear_log_prob(value: Tensor, log_probs: Tensor) -> Tensor:
    r"""Score ``value`` by the multilinear extension of a one-hot log-mass.

    .. math:: \log p(z) = \sum_c z_c \log p_c, \qquad 0 \cdot (-\infty) = 0

    Exact at one-hot values, defined at relaxed ones, and differentiable in both arguments. The
    score is :math:`-\infty` where ``value`` puts weight on a category of probability zero; the
    gradient with respect to that coordinate is large, negative and finite.

    Args:
        value: One-hot or relaxed values, ``(..., C)``.
        log_probs: Normalised log-probabilities, ``(..., C)``.

    Returns:
        The log-mass, of the broadcast shape without the last dimension.

    Example:
        >>> multilinear_log_prob(torch.tensor([1.0, 0.0]), torch.tensor([0.0, -math.inf]))
        tensor(0.)
    """
    impossible = log_probs == -math.inf
    slopes = log_probs.masked_fill(impossible, _LOG_ZERO_SLOPE)
    score = (value * slopes).sum(-1)
    hit = (value.detach() * impossible).sum(-1) != 0  # several times faster than any(-1) on CPU
    # Added, not filled in, so that the gradient of a hit row is that of the slopes.
    return score + torch.zeros_like(score).masked_fill(hit, -math.inf)
