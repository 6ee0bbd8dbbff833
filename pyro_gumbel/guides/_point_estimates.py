"""Point estimates and quantiles of the distributions of automatic guides."""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution

from pyro_gumbel.distributions.families import is_bit, is_categorical, is_one_hot, unwrap

__all__ = ["PointEstimateMessenger", "point_estimate", "quantile"]

_NUM_DRAWS = 1000


class PointEstimateMessenger(Messenger):
    """Puts a central value in place of each draw."""

    def _pyro_sample(self, msg: Message) -> None:
        if not (msg["is_observed"] or site_is_subsample(msg)):
            msg["value"] = point_estimate(msg["fn"])


def point_estimate(fn: Any) -> Tensor:
    """Return the mode of a discrete distribution, the median (or else the mean) of another."""
    base = unwrap(fn)
    if is_bit(base):
        return (base.probs >= 0.5).to(base.probs.dtype)  # torch's mode is nan at one half
    if is_one_hot(base) or is_categorical(base) or base.support.is_discrete:
        return base.mode
    half = quantile(fn, torch.tensor(0.5), draw=False)
    if half is not None:
        return half
    if hasattr(base, "transforms"):  # a transformed normal vector: transform its mean
        value = base.base_dist.mean
        for transform in base.transforms:
            value = transform(value)
        return value
    return base.mean


def quantile(fn: Any, levels: Tensor, *, draw: bool = True) -> Tensor | None:
    """Return quantiles of shape ``levels.shape + fn.shape()``, or ``None`` for vectors.

    Args:
        fn: The distribution.
        levels: Between 0 and 1.
        draw: Whether to estimate quantiles by draws if the inverse CDF is unknown.
    """
    base = unwrap(fn)
    if base.event_shape:
        return None
    batch = base.batch_shape
    levels = levels.to(_any_parameter(base))
    levels = levels.reshape(levels.shape + (1,) * len(batch))
    if is_bit(base):
        return (levels > 1 - base.probs).to(base.probs.dtype)
    if is_categorical(base):
        return (
            (base.probs.cumsum(-1) < levels.unsqueeze(-1))
            .sum(-1)
            .clamp(max=base.probs.shape[-1] - 1)
        )
    try:
        return base.icdf(levels.expand(levels.shape[: levels.dim() - len(batch)] + batch))
    except NotImplementedError:
        if not draw:
            return None
    draws = base.sample((_NUM_DRAWS,))
    flat = torch.quantile(draws.to(levels.dtype), levels.flatten(), dim=0)
    return flat.reshape(levels.shape[: levels.dim() - len(batch)] + batch)


def _any_parameter(fn: Any) -> Tensor:
    """Return a tensor of the distribution's dtype and device."""
    for value in vars(fn).values():
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    # A Beta holds a Dirichlet, a transformed distribution its base.
    return _any_parameter(next(v for v in vars(fn).values() if isinstance(v, Distribution)))
