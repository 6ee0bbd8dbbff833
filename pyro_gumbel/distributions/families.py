"""Families of distributions: recognise, unwrap, read parameters, draw and score."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributions as torch_dist
from pyro.distributions import ExpandedDistribution, MaskedDistribution
from pyro.distributions.distribution import Distribution as PyroDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Independent,
    Normal,
    OneHotCategorical,
    TransformedDistribution,
)
from torch.nn.functional import softplus

from pyro_gumbel.distributions._base import plain_eager
from pyro_gumbel.distributions._categorical import (
    bit_probs,
    log_odds,
    log_probs,
    value_dtype,
    weights,
)
from pyro_gumbel.distributions._law import (
    has_law_of,
    law_of,
    nearest_library,
    overridden,
    wraps_like,
)
from pyro_gumbel.distributions._numerics import gumbel_noise, noise_dtype
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
    "expand",
    "explain_stranger",
    "from_index",
    "from_noise",
    "from_one_hot",
    "has_law_of",
    "has_logits",
    "has_score_parts",
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
    "sample_detached",
    "score_function",
    "support_values",
    "to_index",
    "unwrap",
    "value_dtype",
    "wrap_like",
    "wrap_score",
    "wrappers",
]

_KNOWN = (OneHotCategorical, Categorical, Bernoulli, Normal, RelaxedOneHot, RelaxedBernoulli)
_WRAPPERS = (Independent, MaskedDistribution)
_CERTAIN = 32768.0  # a logit that is certain in every dtype


def wrappers(fn: Distribution) -> Iterator[Any]:
    """Yield the wrappers of ``to_event`` and ``mask`` around a distribution, outermost first."""
    while wraps_like(fn, *_WRAPPERS):
        yield fn
        fn = fn.base_dist


def unwrap(fn: Distribution) -> Distribution:
    """Remove ``to_event`` and ``mask``, and expand what Pyro expands lazily in a known family."""
    while wraps_like(fn, *_WRAPPERS):
        fn = fn.base_dist
    return _expand_base(fn) if wraps_like(fn, ExpandedDistribution) else fn


def _expand_base(fn: Any) -> Any:
    base = unwrap(fn.base_dist)
    family: Any = law_of(base)
    if not (has_logits(base) or is_normal(base)) or masks(fn.base_dist):
        return fn
    joined = base.batch_shape[len(fn.base_dist.batch_shape) :]
    return family.expand(base, (*fn.batch_shape, *joined), family.__new__(family))


def event_dims(fn: Distribution) -> int:
    """Return the number of batch dimensions that ``to_event`` joined."""
    return fn.event_dim - unwrap(fn).event_dim


def masks(fn: Distribution) -> list[Tensor | bool]:
    """List the masks of ``fn``, the outermost first."""
    # Private in Pyro, here and below: if it is renamed, masked sites raise AttributeError.
    return [w._mask for w in wrappers(fn) if wraps_like(w, MaskedDistribution)]


def wrap_score(fn: Distribution, score: Tensor) -> Tensor:
    """Apply the ``to_event`` and ``mask`` of ``fn`` to a score of its unwrapped distribution."""
    for wrapper in reversed(list(wrappers(fn))):
        if wraps_like(wrapper, MaskedDistribution):
            score = scale_and_mask(score, mask=wrapper._mask)
        else:
            score = sum_rightmost(score, wrapper.reinterpreted_batch_ndims)
    return score


def wrap_like(fn: Distribution, base: Distribution) -> Distribution:
    """Apply the ``to_event`` and ``mask`` of ``fn`` to another distribution."""
    for wrapper in reversed(list(wrappers(fn))):
        if wraps_like(wrapper, MaskedDistribution):
            base = base.mask(wrapper._mask)
        else:
            base = base.to_event(wrapper.reinterpreted_batch_ndims)
    return base


def expand(fn: Distribution, batch_shape: tuple[int, ...]) -> Distribution:
    """Expand a distribution as Pyro does, even a subclass without its own ``expand``."""
    try:
        return fn.expand(torch.Size(batch_shape))
    except NotImplementedError:
        return unwrap(ExpandedDistribution(fn, torch.Size(batch_shape)))


def support_values(fn: Distribution) -> Tensor:
    """List the values of ``fn``, ``(K,) + ones + event_shape``."""
    while wraps_like(fn, ExpandedDistribution):  # its own list has a wrong event shape
        fn = fn.base_dist
    return fn.enumerate_support(expand=False)


def explain_stranger(fn: Distribution) -> str:
    """Explain why a subclass of a known family is not treated as the family, or return ``""``."""
    family = nearest_library(type(fn))
    if not issubclass(family, _KNOWN) or law_of(fn) is not None:
        return ""
    names = overridden(fn)
    changed = "contains a distribution with overridden methods"
    reason = f"overrides {', '.join(names)}" if names else changed
    parameters = "loc=..., scale=..." if issubclass(family, Normal) else "logits=..."
    return (
        f"{type(fn).__name__} is a subclass of {family.__name__} and {reason}, so only its own "
        f"methods draw and score it. To use it as a {family.__name__}, do not override these "
        "methods, and compute the parameters in its constructor: "
        f"super().__init__({parameters})"
    )


def is_one_hot(fn: Distribution) -> bool:
    """Return whether the values of ``fn`` are one-hot vectors, scored by their log-mass."""
    return has_law_of(fn, OneHotCategorical) or (
        has_law_of(fn, RelaxedOneHot) and fn.straight_through
    )


def is_bit(fn: Distribution) -> bool:
    """Return whether the values of ``fn`` are 0 or 1."""
    return has_law_of(fn, Bernoulli) or (has_law_of(fn, RelaxedBernoulli) and fn.straight_through)


def is_relaxed(fn: Distribution) -> bool:
    """Return whether ``fn`` is the density of a relaxed one-hot or Bernoulli variable."""
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
    """Return whether :func:`one_hot_logits` supports the distribution."""
    return is_one_hot(fn) or is_bit(fn) or is_categorical(fn)


def one_hot_logits(fn: Distribution) -> Tensor:
    """Return logits ``batch_shape + (C,)``; a Bernoulli has two, the first for the value 1."""
    if is_bit(fn):
        logits = _finite(log_odds(fn))
        return torch.stack([logits, torch.zeros_like(logits)], -1)
    return log_probs(fn)


def _finite(logits: Tensor) -> Tensor:
    """Replace infinite logits of Bernoulli variables by large ones, since 0 * inf is nan."""
    return logits.nan_to_num(nan=math.nan, posinf=_CERTAIN, neginf=-_CERTAIN)


def on_own_logits(fn: Distribution) -> tuple[Distribution, Tensor]:
    """Return a copy of a one-hot or Bernoulli distribution, and logits that only its draws use."""
    logits = log_odds(fn) if is_bit(fn) else log_probs(fn)
    logits = logits.view_as(logits)
    family = Bernoulli if is_bit(fn) else OneHotCategorical
    copy: Any = family(logits=logits, validate_args=False)
    copy.dtype = value_dtype(fn)
    return copy, logits


def log_mass(fn: Distribution, value: Tensor) -> Tensor:
    """Return the log-probability of a drawn or relaxed ``value``, by its multilinear extension."""
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
    """Return the log-mass of one-hot or Bernoulli values, with gradient only in the value."""
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
    """Return the index of each value's category; of a Bernoulli, category 0 is the value 1."""
    if is_one_hot(fn):
        return value.max(-1).indices
    return (1 - value).long() if is_bit(fn) else value


def from_index(fn: Distribution, index: Tensor) -> Tensor:
    """Convert category indices to values of ``fn``, the inverse of :func:`to_index`."""
    if is_one_hot(fn):
        return one_at(index.unsqueeze(-1), fn.event_shape[-1], value_dtype(fn))
    return (1 - index).to(value_dtype(fn)) if is_bit(fn) else index


def from_one_hot(fn: Distribution, vectors: Tensor) -> Tensor:
    """Convert one-hot or relaxed vectors to values of a one-hot or Bernoulli distribution."""
    vectors = vectors.to(value_dtype(fn))
    return vectors[..., 0] if is_bit(fn) else vectors


@torch.no_grad()
def sample_detached(fn: Distribution) -> Tensor:
    """Draw from ``fn`` without gradient, exactly in known families, else as Pyro does."""
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
    """Draw noise that :func:`from_noise` converts to a value of ``fn``; ``None`` if it cannot.

    Similar distributions of the same family and shape give similar values for the same noise.
    """
    # In float64, since float32 Gumbels are too small to draw improbable categories.
    if is_one_hot(fn) or is_categorical(fn):
        logits = log_probs(fn)
        return gumbel_noise(logits.shape, torch.float64, logits.device)
    if is_bit(fn):
        return torch.rand_like(log_odds(fn), dtype=torch.float64)
    if is_normal(fn):
        return torch.randn_like(fn.loc, dtype=noise_dtype(fn.loc.dtype))
    return None


def from_noise(fn: Distribution, noise: Tensor) -> Tensor:
    """Convert noise of :func:`base_noise` to a draw of ``fn``, for a Normal with gradient."""
    if is_normal(fn):
        value = (fn.loc + fn.scale * noise).to(torch.promote_types(fn.loc.dtype, fn.scale.dtype))
        return value if fn.has_rsample else value.detach()
    with torch.no_grad():
        if is_bit(fn):
            return (noise < bit_probs(fn)).to(value_dtype(fn))
        return from_index(fn, (log_probs(fn) + noise).max(-1).indices)


def has_score_parts(fn: Any) -> bool:
    """Return whether the noise of ``fn.rsample`` has a density that depends on parameters."""
    if wraps_like(
        fn, ExpandedDistribution, Independent, MaskedDistribution, TransformedDistribution
    ):
        return has_score_parts(fn.base_dist)
    method = getattr(type(fn), "score_parts", PyroDistribution.score_parts)
    overridden = method is not PyroDistribution.score_parts or "score_parts" in vars(fn)
    return overridden and bool(fn.has_rsample)


def score_function(fn: Any, value: Tensor) -> Tensor:
    """Return the log-density of the accepted noise of a draw, neither scaled nor masked.

    The gradient of an expected cost is the pathwise gradient, plus the cost times the gradient of
    this term, in which the value depends on the parameters. Pyro's wrappers omit the term if they
    join dimensions or transform values.
    """
    if wraps_like(fn, MaskedDistribution):
        return score_function(fn.base_dist, value)
    if wraps_like(fn, ExpandedDistribution):
        score = score_function(fn.base_dist, value)
        return score.expand(value.shape[: value.dim() - fn.event_dim])
    if wraps_like(fn, TransformedDistribution):
        for transform in reversed(fn.transforms):
            value = transform.inv(value)
    if wraps_like(fn, Independent, TransformedDistribution):
        score = score_function(fn.base_dist, value)
        return sum_rightmost(score, fn.event_dim - fn.base_dist.event_dim)
    return fn.score_parts(value).score_function
