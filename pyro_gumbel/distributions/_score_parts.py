"""The score-function part of reparameterised gradients with rejection sampling."""

from __future__ import annotations

from typing import Any

from pyro.distributions import ExpandedDistribution, MaskedDistribution
from pyro.distributions.distribution import Distribution as PyroDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import Independent, TransformedDistribution

from pyro_gumbel.distributions._law import wraps_like

__all__ = ["has_score_parts", "score_function"]


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
    r"""Return the log-density of the accepted noise of a draw.

    The gradient of an expected cost is the pathwise gradient, plus the cost times the gradient of
    this term, in which the value depends on the parameters. Pyro's wrappers omit the term if they
    join dimensions or transform values.

    Args:
        fn: A distribution for which :func:`has_score_parts` is true.
        value: Its draw, with its gradient.

    Returns:
        A tensor of the batch shape, neither scaled nor masked.

    References:
        Reparameterization Gradients through Acceptance-Rejection Sampling Algorithms (Naesseth,
        Ruiz, Linderman, Blei, 2017), https://arxiv.org/abs/1610.05683
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
