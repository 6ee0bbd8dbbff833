"""Point estimates and quantiles of the distributions of automatic guides."""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import ComposeTransform, TransformedDistribution

from pyro_gumbel.distributions.families import is_bit, is_categorical, unwrap

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
    if base.support.is_discrete:
        return base.mode
    half = quantile(fn, torch.tensor(0.5), draw=False)
    if half is not None:
        return half
    if isinstance(base, TransformedDistribution):  # a normal vector: transform its mean
        return ComposeTransform(base.transforms)(base.base_dist.mean)
    return base.mean


def quantile(fn: Any, levels: Tensor, *, draw: bool = True) -> Tensor | None:
    """Return quantiles of shape ``levels.shape + fn.shape()``, or ``None`` for vectors.

    Quantiles without a known inverse CDF are estimated by draws if ``draw``, else ``None``.
    """
    base = unwrap(fn)
    if base.event_shape:
        return None
    inner = base.base_dist if isinstance(base, TransformedDistribution) else base
    levels = levels.to(inner.mean)
    shape = levels.shape + base.batch_shape
    columns = levels.reshape(levels.shape + (1,) * len(base.batch_shape))
    if is_bit(base):
        return (columns > 1 - base.probs).to(base.probs.dtype)
    if is_categorical(base):
        below = base.probs.cumsum(-1) < columns.unsqueeze(-1)
        return below.sum(-1).clamp(max=base.probs.shape[-1] - 1)
    try:
        return base.icdf(columns.expand(shape))
    except NotImplementedError:
        if not draw:
            return None
    draws = base.sample((_NUM_DRAWS,)).to(levels.dtype)
    return torch.quantile(draws, levels.flatten(), dim=0).reshape(shape)
