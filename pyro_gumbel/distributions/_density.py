"""The Concrete density in log space, with finite gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_gumbel.distributions._base import plain_eager
from pyro_gumbel.distributions._noise import noise_dtype
from pyro_gumbel.distributions._softmax import log_softmax
from pyro_gumbel.distributions._widen import FiniteGradient


def log_coordinate(value: Tensor) -> Tensor:
    """Return the logarithm of coordinates of the simplex, clamped at the smallest normal number.

    The result is float32 or better. Clamped coordinates have zero gradient. A gradient that would
    overflow is the largest number of its dtype.
    """
    tiny = torch.finfo(value.dtype).tiny
    if plain_eager():
        return FiniteGradient.apply(value).clamp(min=tiny).log()
    # Compiled and transformed code uses plain operations, without the gradient where it might
    # overflow.
    wide = value.to(noise_dtype(value.dtype))
    exact = wide.clamp(min=tiny).log()
    smooth = wide.clamp(min=tiny if value.dtype == torch.float16 else tiny * 2.0**24).log()
    return smooth + (exact - smooth).detach()


def concrete_log_density(
    log_value: Tensor,
    scores: Tensor,
    temperature: float | Tensor,
    log_temperature: float | Tensor,
) -> tuple[Tensor, Tensor]:
    r"""Return the Concrete log-density of log-coordinates :math:`u`.

    .. math::
        \log \Gamma(C) + (C - 1) \log \tau + \sum_c s_c - C \log \sum_c e^{s_c},
        \qquad s_c = \phi_c - \tau u_c

    The sums and :math:`C` omit impossible categories, with score :math:`\phi_c = -\infty`.

    Args:
        log_value: Log-coordinates, ``(..., C)``.
        scores: Log-probabilities up to a constant, ``(..., C)``.
        temperature: A number, or a tensor of the batch shape.
        log_temperature: Its logarithm.

    Returns:
        The log-density, and ``log_value`` with zeros at impossible categories.
    """
    impossible = scores == -math.inf
    num_possible = (~impossible).sum(-1).to(scores.dtype)
    log_value = log_value.masked_fill(impossible, 0.0)
    if isinstance(temperature, Tensor):
        temperature = temperature.unsqueeze(-1)
    scaled = log_value * temperature
    log_shares = log_softmax(scores - scaled).masked_fill(impossible, 0.0)
    constant = num_possible.lgamma() + (num_possible - 1) * log_temperature
    return constant + log_shares.sum(-1), log_value


def log_coordinate_pair(value: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``log y`` and ``log(1 - y)`` of a relaxed Bernoulli value ``y``.

    ``y`` is clamped between the smallest normal number and the largest number below 1.
    """
    info = torch.finfo(value.dtype)
    wide = value.to(noise_dtype(value.dtype))
    if plain_eager():
        wide = FiniteGradient.apply(value)
        bounded = wide.clamp(info.tiny, 1 - info.eps / 2)
        return bounded.log(), (-bounded).log1p()
    bounded = wide.clamp(info.tiny, 1 - info.eps / 2)
    return log_coordinate(value.clamp(max=1 - info.eps / 2)), (-bounded).log1p()
