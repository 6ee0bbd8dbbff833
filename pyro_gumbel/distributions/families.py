"""What an estimator may know of a distribution: its family, its logits, an exact draw."""

from __future__ import annotations

import math

import torch
import torch.distributions as torch_dist
from pyro.distributions import MaskedDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Independent,
    Normal,
    OneHotCategorical,
)
from torch.nn.functional import softplus

from pyro_gumbel.distributions.gumbel import gumbel_noise
from pyro_gumbel.distributions.one_hot import OneHot, draw_one_hot, multilinear_log_prob
from pyro_gumbel.distributions.relaxed import RelaxedOneHot
from pyro_gumbel.distributions.relaxed_bernoulli import RelaxedBernoulli

__all__ = [
    "event_dims",
    "exact_draw",
    "from_index",
    "has_logits",
    "is_bit",
    "is_categorical",
    "is_one_hot",
    "is_relaxed",
    "log_mass",
    "log_mass_of_value",
    "on_own_logits",
    "one_hot_logits",
    "shared_noise_draw",
    "to_index",
    "uniform",
    "unwrap",
]

_CERTAIN = 32768.0  # beyond it a bit is certain in every dtype


def unwrap(fn: Distribution) -> Distribution:
    """Strip ``to_event`` and ``mask``: neither changes a value's shape or its law."""
    while isinstance(fn, (Independent, MaskedDistribution)):
        fn = fn.base_dist
    return fn


def event_dims(fn: Distribution) -> int:
    """Count the batch dimensions of the unwrapped distribution that ``to_event`` joined."""
    return fn.event_dim - unwrap(fn).event_dim


def is_one_hot(fn: Distribution) -> bool:
    """Tell whether the values of ``fn`` are one-hot vectors scored by their mass."""
    return isinstance(fn, (OneHotCategorical, OneHot)) or (
        isinstance(fn, RelaxedOneHot) and fn.straight_through
    )


def is_bit(fn: Distribution) -> bool:
    """Tell whether the values of ``fn`` are 0 or 1."""
    return isinstance(fn, Bernoulli) or (isinstance(fn, RelaxedBernoulli) and fn.straight_through)


def is_relaxed(fn: Distribution) -> bool:
    """Tell whether ``fn`` is the density of values between one-hot vectors, or between 0 and 1."""
    families = (
        RelaxedOneHot,
        RelaxedBernoulli,
        torch_dist.RelaxedOneHotCategorical,
        torch_dist.RelaxedBernoulli,
    )
    return isinstance(fn, families) and not (is_one_hot(fn) or is_bit(fn))


def is_categorical(fn: Distribution) -> bool:
    """Tell whether the values of ``fn`` are category indices."""
    return isinstance(fn, Categorical)


def has_logits(fn: Distribution) -> bool:
    """Tell whether :func:`one_hot_logits` knows the distribution."""
    return is_one_hot(fn) or is_bit(fn) or is_categorical(fn)


def one_hot_logits(fn: Distribution) -> Tensor:
    """Logits ``batch_shape + (C,)``; a bit is a one-hot of two, the first standing for 1."""
    if is_bit(fn):
        logits = _finite(fn.logits)
        return torch.stack([logits, torch.zeros_like(logits)], -1)
    return fn.logits


def _finite(logits: Tensor) -> Tensor:
    """Logits of bits with certain ones far out: infinities become nan where they meet zeros."""
    return logits.nan_to_num(nan=math.nan, posinf=_CERTAIN, neginf=-_CERTAIN)


def on_own_logits(fn: Distribution) -> tuple[Distribution, Tensor]:
    """Copy the law of one-hot values or bits onto a node of its own in the graph.

    What is drawn from the copy can be differentiated in the tensor returned, whatever else the
    program does with the logits: they may be a parameter that other runs and sites share.
    """
    logits = fn.logits.view_as(fn.logits)
    law = Bernoulli if is_bit(fn) else OneHotCategorical
    return law(logits=logits, validate_args=False), logits


def log_mass(fn: Distribution, value: Tensor) -> Tensor:
    """Score a latent ``value`` by the multilinear extension of its mass where there is one.

    The value is one of our own draws (or a relaxed one), so its membership of the support is not
    checked again.
    """
    if is_one_hot(fn):
        return multilinear_log_prob(value, fn.logits)
    if is_bit(fn):
        logits = fn.logits
        # An infinite logit meets a value that agrees with it: 0 * inf would be nan.
        finite = torch.finfo(logits.dtype)
        logits = logits.clamp(finite.min, finite.max)
        return value * logits - softplus(logits)
    return fn.log_prob(value)


def log_mass_of_value(fn: Distribution, value: Tensor) -> Tensor:
    """Score one-hot values or bits with a gradient in the value and none in the parameters."""
    logits = fn.logits.detach()
    if is_one_hot(fn):
        return multilinear_log_prob(value, logits)
    return log_mass(Bernoulli(logits=_finite(logits), validate_args=False), value)


def to_index(fn: Distribution, value: Tensor) -> Tensor:
    """Number the category of each value; a bit's first category is 1."""
    if is_one_hot(fn):
        return value.max(-1).indices
    return (1 - value).long() if is_bit(fn) else value


def from_index(fn: Distribution, index: Tensor) -> Tensor:
    """Write categories as values of ``fn``: the inverse of :func:`to_index`."""
    if is_one_hot(fn):
        # Not torch's one_hot, which looks at the values and so waits for the device.
        categories = torch.arange(fn.logits.shape[-1], device=index.device)
        return (index.unsqueeze(-1) == categories).to(fn.logits.dtype)
    return (1 - index).to(fn.logits.dtype) if is_bit(fn) else index


def uniform(like: Tensor, sample_shape: tuple[int, ...] = ()) -> Tensor:
    """Draw uniform noise strictly inside (0, 1), float32 or better, of the shape of ``like``."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    noise = torch.rand((*sample_shape, *like.shape), dtype=dtype, device=like.device)
    # Half a cell up: zero is never drawn, and one still is not.
    return noise * (1 - torch.finfo(dtype).eps) + torch.finfo(dtype).eps / 4


@torch.no_grad()
def exact_draw(fn: Distribution) -> Tensor:
    """Draw from ``fn`` without gradient; Gumbel noise is in float32 or better."""
    if is_one_hot(fn):
        return draw_one_hot(fn.logits)
    if is_categorical(fn):
        return draw_one_hot(fn.logits).argmax(-1)
    return fn.sample()


def shared_noise_draw(fn: Distribution, dim: int, copies: int) -> Tensor | None:
    """Draw rows whose noise repeats, so that branches of one path differ by their laws alone.

    Args:
        fn: A distribution whose batch dimension ``dim`` has ``copies`` equal blocks of rows.
        dim: That dimension, counted from the right of the batch shape.
        copies: How often the noise of the first block is used.

    Returns:
        The draw, with gradient where ``fn`` is a Normal, or ``None`` for other families.
    """
    if is_one_hot(fn) or is_categorical(fn):
        phi = fn.logits.detach()
        noise = gumbel_noise(_first_block(phi.shape, dim - 1, copies), phi.dtype, phi.device)
        index = (phi + torch.cat([noise] * copies, dim - 1)).max(-1).indices
        return from_index(fn, index)
    if is_bit(fn):
        probs = fn.logits.detach().sigmoid()
        noise = uniform(probs.new_empty(_first_block(probs.shape, dim, copies)))
        return (torch.cat([noise] * copies, dim) < probs).to(probs.dtype)
    if isinstance(fn, Normal):
        noise = torch.randn(
            _first_block(fn.loc.shape, dim, copies), dtype=fn.loc.dtype, device=fn.loc.device
        )
        return fn.loc + fn.scale * torch.cat([noise] * copies, dim)
    return None


def _first_block(shape: torch.Size, dim: int, copies: int) -> list[int]:
    block = list(shape)
    block[dim] //= copies
    return block
