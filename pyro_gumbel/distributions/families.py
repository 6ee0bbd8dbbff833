"""The family of a distribution, its wrappers, its numbers, and exact draws from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributions as torch_dist
from pyro.distributions import ExpandedDistribution, MaskedDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Independent,
    Normal,
    OneHotCategorical,
)
from torch.nn.functional import softplus

from pyro_gumbel.distributions._base import plain_eager
from pyro_gumbel.distributions._law import (
    has_law_of,
    law_of,
    nearest_library,
    overridden,
    wraps_like,
)
from pyro_gumbel.distributions._noise import gumbel_noise, noise_dtype
from pyro_gumbel.distributions._numbers import (
    bit_probs,
    log_odds,
    log_probs,
    value_dtype,
    weights,
)
from pyro_gumbel.distributions.one_hot import (
    draw_index,
    draw_one_hot,
    multilinear_log_prob,
    one_at,
)
from pyro_gumbel.distributions.relaxed import RelaxedOneHot
from pyro_gumbel.distributions.relaxed_bernoulli import RelaxedBernoulli

__all__ = [
    "base_noise",
    "bit_probs",
    "event_dims",
    "sample_detached",
    "expand",
    "explain_stranger",
    "from_index",
    "from_noise",
    "has_law_of",
    "has_logits",
    "is_bit",
    "is_categorical",
    "is_normal",
    "is_one_hot",
    "is_relaxed",
    "log_mass",
    "log_mass_of_value",
    "masks",
    "on_own_logits",
    "one_hot_logits",
    "support_values",
    "to_index",
    "uniform",
    "unwrap",
    "value_dtype",
    "wrap_like",
    "wrap_score",
    "wrappers",
]

_KNOWN = (OneHotCategorical, Categorical, Bernoulli, Normal, RelaxedOneHot, RelaxedBernoulli)
_CERTAIN = 32768.0  # beyond it a bit is certain in every dtype


def wrappers(fn: Distribution) -> Iterator[Any]:
    """List what ``to_event`` and ``mask`` put around a distribution, the outermost first."""
    while wraps_like(fn, Independent, MaskedDistribution):
        yield fn
        fn = fn.base_dist


def unwrap(fn: Distribution) -> Distribution:
    """Strip ``to_event`` and ``mask``: neither changes a value's shape or its law.

    Of a known family, it also does what Pyro's ``ExpandedDistribution`` puts off.
    """
    for wrapper in wrappers(fn):
        fn = wrapper.base_dist
    return _expand_base(fn) if wraps_like(fn, ExpandedDistribution) else fn


def _expand_base(fn: Any) -> Any:
    base = unwrap(fn.base_dist)
    family: Any = law_of(base)
    if not (has_logits(base) or is_normal(base)) or masks(fn.base_dist):
        return fn
    joined = base.batch_shape[len(fn.base_dist.batch_shape) :]
    return family.expand(base, (*fn.batch_shape, *joined), family.__new__(family))


def event_dims(fn: Distribution) -> int:
    """Count the batch dimensions of the unwrapped distribution that ``to_event`` joined."""
    return fn.event_dim - unwrap(fn).event_dim


def masks(fn: Distribution) -> list[Tensor | bool]:
    """List the masks that ``mask`` put on ``fn``, the outermost first."""
    return [w._mask for w in wrappers(fn) if wraps_like(w, MaskedDistribution)]


def wrap_score(fn: Distribution, score: Tensor) -> Tensor:
    """Do to a score of the unwrapped distribution what ``to_event`` and ``mask`` do in ``fn``."""
    for wrapper in reversed(list(wrappers(fn))):
        if wraps_like(wrapper, MaskedDistribution):
            score = scale_and_mask(score, mask=wrapper._mask)
        else:
            score = sum_rightmost(score, wrapper.reinterpreted_batch_ndims)
    return score


def wrap_like(fn: Distribution, base: Distribution) -> Distribution:
    """Do to another distribution what ``to_event`` and ``mask`` do in ``fn``."""
    for wrapper in reversed(list(wrappers(fn))):
        if wraps_like(wrapper, MaskedDistribution):
            base = base.mask(wrapper._mask)
        else:
            base = base.to_event(wrapper.reinterpreted_batch_ndims)
    return base


def expand(fn: Distribution, batch_shape: tuple[int, ...]) -> Distribution:
    """Expand as Pyro does, also a subclass that lacks an ``expand`` of its own."""
    try:
        return fn.expand(torch.Size(batch_shape))
    except NotImplementedError:
        return unwrap(ExpandedDistribution(fn, torch.Size(batch_shape)))


def support_values(fn: Distribution) -> Tensor:
    """List the values of ``fn``, ``(K,) + ones + event_shape``."""
    while wraps_like(fn, ExpandedDistribution):  # its own list forgets the event
        fn = fn.base_dist
    return fn.enumerate_support(expand=False)


def explain_stranger(fn: Distribution) -> str:
    """Explain why a descendant of a known family is not one, and how it would become one.

    The explanation is empty for other distributions, and ends without a full stop.
    """
    family = nearest_library(type(fn))
    if not issubclass(family, _KNOWN) or law_of(fn) is not None:
        return ""
    names = overridden(fn)
    reason = f"overrides {', '.join(names)}" if names else "holds a distribution with its own law"
    parameters = "loc=..., scale=..." if issubclass(family, Normal) else "logits=..."
    return (
        f"{type(fn).__name__} descends from {family.__name__} and {reason}, so it is drawn and "
        "scored by its own methods alone. To be served as its ancestor, it has to leave these "
        "alone and compute the parameters of its law in its constructor: "
        f"super().__init__({parameters})"
    )


def is_one_hot(fn: Distribution) -> bool:
    """Return whether the values of ``fn`` are one-hot vectors scored by their mass."""
    return has_law_of(fn, OneHotCategorical) or (
        has_law_of(fn, RelaxedOneHot) and fn.straight_through
    )


def is_bit(fn: Distribution) -> bool:
    """Return whether the values of ``fn`` are 0 or 1."""
    return has_law_of(fn, Bernoulli) or (has_law_of(fn, RelaxedBernoulli) and fn.straight_through)


def is_relaxed(fn: Distribution) -> bool:
    """Return whether ``fn`` is the density of a relaxed one-hot vector or bit."""
    families = (
        RelaxedOneHot,
        RelaxedBernoulli,
        torch_dist.RelaxedOneHotCategorical,
        torch_dist.RelaxedBernoulli,
    )
    return has_law_of(fn, *families) and not (is_one_hot(fn) or is_bit(fn))


def is_categorical(fn: Distribution) -> bool:
    """Return whether the values of ``fn`` are category indices."""
    return has_law_of(fn, Categorical)


def is_normal(fn: Distribution) -> bool:
    """Return whether ``fn`` is a normal distribution of single numbers."""
    return has_law_of(fn, Normal)


def has_logits(fn: Distribution) -> bool:
    """Return whether :func:`one_hot_logits` knows the distribution."""
    return is_one_hot(fn) or is_bit(fn) or is_categorical(fn)


def one_hot_logits(fn: Distribution) -> Tensor:
    """Logits ``batch_shape + (C,)``; a bit is a one-hot of two, the first standing for 1.

    They are float32 or better, and exactly ``-inf`` for categories of probability zero.
    """
    if is_bit(fn):
        logits = _finite(log_odds(fn))
        return torch.stack([logits, torch.zeros_like(logits)], -1)
    return log_probs(fn)


def _finite(logits: Tensor) -> Tensor:
    """Logits of bits with certain ones far out: infinities become nan where they meet zeros."""
    return logits.nan_to_num(nan=math.nan, posinf=_CERTAIN, neginf=-_CERTAIN)


def on_own_logits(fn: Distribution) -> tuple[Distribution, Tensor]:
    """Copy the law of one-hot values or bits onto a node of its own in the graph.

    What is drawn from the copy can be differentiated in the tensor returned, whatever else the
    program does with the logits: they may be a parameter that other runs and sites share.
    """
    logits = log_odds(fn) if is_bit(fn) else log_probs(fn)
    logits = logits.view_as(logits)
    law = Bernoulli if is_bit(fn) else OneHotCategorical
    copy: Any = law(logits=logits, validate_args=False)
    copy.dtype = value_dtype(fn)
    return copy, logits


def log_mass(fn: Distribution, value: Tensor) -> Tensor:
    """Score a latent ``value`` by the multilinear extension of its mass where there is one.

    The value is one of our own draws (or a relaxed one), so its membership of the support is not
    checked again.
    """
    if is_one_hot(fn):
        return multilinear_log_prob(value, log_probs(fn))
    if is_bit(fn):
        return _log_mass_of_bit(value, log_odds(fn))
    if is_categorical(fn):
        if fn._validate_args:  # an index may come from a guide with more categories
            fn._validate_sample(value)
        return _log_mass_of_index(value, log_probs(fn))
    return fn.log_prob(value)


def log_mass_of_value(fn: Distribution, value: Tensor) -> Tensor:
    """Score one-hot values or bits with a gradient in the value and none in the parameters."""
    if is_one_hot(fn):
        return multilinear_log_prob(value, log_probs(fn).detach())
    return _log_mass_of_bit(value, _finite(log_odds(fn).detach()))


def _log_mass_of_bit(value: Tensor, logits: Tensor) -> Tensor:
    finite = torch.finfo(logits.dtype)
    bounded = logits.clamp(finite.min, finite.max)  # 0 * inf would be nan
    score = value * bounded - softplus(bounded)
    return score.masked_fill(score < finite.min / 2, -math.inf)


def _log_mass_of_index(value: Tensor, log_probs: Tensor) -> Tensor:
    index, log_probs = torch.broadcast_tensors(value.long().unsqueeze(-1), log_probs)
    return log_probs.gather(-1, index[..., :1]).squeeze(-1)


def to_index(fn: Distribution, value: Tensor) -> Tensor:
    """Number the category of each value; a bit's first category is 1."""
    if is_one_hot(fn):
        return value.max(-1).indices
    return (1 - value).long() if is_bit(fn) else value


def from_index(fn: Distribution, index: Tensor) -> Tensor:
    """Write categories as values of ``fn``: the inverse of :func:`to_index`."""
    if is_one_hot(fn):
        return one_at(index.unsqueeze(-1), fn.event_shape[-1], value_dtype(fn))
    return (1 - index).to(value_dtype(fn)) if is_bit(fn) else index


def uniform(like: Tensor, sample_shape: tuple[int, ...] = ()) -> Tensor:
    """Draw uniform noise strictly inside (0, 1), float32 or better, of the shape of ``like``."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    noise = torch.rand((*sample_shape, *like.shape), dtype=dtype, device=like.device)
    # Half a cell up: zero is never drawn, and one still is not.
    return noise * (1 - torch.finfo(dtype).eps) + torch.finfo(dtype).eps / 4


@torch.no_grad()
def sample_detached(fn: Distribution) -> Tensor:
    """Draw from ``fn`` without gradient, in the law of its numbers as they were given.

    A distribution of no family known here is drawn as Pyro draws it.
    """
    if is_bit(fn):
        probs = bit_probs(fn)
        return (torch.rand_like(probs) < probs).to(value_dtype(fn))
    if not has_logits(fn):
        return fn() if callable(fn) else fn.sample()
    masses = weights(fn)
    if masses.is_cpu and plain_eager():
        return from_index(fn, draw_index(masses).squeeze(-1))
    one_hot = draw_one_hot(log_probs(fn))
    return one_hot.argmax(-1) if is_categorical(fn) else one_hot.to(value_dtype(fn))


def base_noise(fn: Distribution) -> Tensor | None:
    """Draw noise that :func:`from_noise` turns into a value of ``fn``.

    Other distributions of the same family and shape make of the same noise values that are alike
    as their laws are.

    Returns:
        Gumbels, ``batch_shape + (C,)``, for one-hot vectors and categories; uniforms for bits and
        normals for a Normal, ``batch_shape``; ``None`` for other families.
    """
    # In float64, lest improbable categories lie beyond the largest Gumbel.
    if is_one_hot(fn) or is_categorical(fn):
        logits = log_probs(fn)
        return gumbel_noise(logits.shape, torch.float64, logits.device)
    if is_bit(fn):
        return torch.rand_like(log_odds(fn), dtype=torch.float64)
    if is_normal(fn):
        return torch.randn_like(fn.loc, dtype=noise_dtype(fn.loc.dtype))
    return None


def from_noise(fn: Distribution, noise: Tensor) -> Tensor:
    """Turn noise of :func:`base_noise` into a draw of ``fn``, a Normal's with its gradient."""
    if is_normal(fn):
        value = (fn.loc + fn.scale * noise).to(torch.promote_types(fn.loc.dtype, fn.scale.dtype))
        return value if fn.has_rsample else value.detach()
    with torch.no_grad():
        if is_bit(fn):
            return (noise < bit_probs(fn)).to(value_dtype(fn))
        return from_index(fn, (log_probs(fn) + noise).max(-1).indices)
