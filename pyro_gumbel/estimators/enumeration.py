"""Sums over the support instead of draws."""

from __future__ import annotations

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor

from pyro_gumbel._validate import integer
from pyro_gumbel.distributions.families import (
    from_index,
    has_logits,
    one_hot_logits,
    sample_detached,
    support_values,
    to_index,
)
from pyro_gumbel.estimators.base import Branches, Estimator, Route, Site

__all__ = ["Enumerate", "LocalExpectation"]


class Enumerate(Estimator):
    r"""The exact gradient, by a sum over all values of the site.

    .. math:: \nabla_\phi \sum_z q_\phi(z)\, f(z)

    As in Pyro's parallel enumeration, values are in a new dimension left of all plates. Each
    element of a plate is summed separately. *Unbiased*: exact. *Requires*: a finite support;
    programs that broadcast; no dependence on the site outside its plates. *Cost*: one evaluation
    of everything downstream for each value, and for all joint values of the sites that a term
    depends on.

    Along ``for t in pyro.markov(range(T))``, written in both programs, ``T`` sites of ``K`` values
    cost :math:`O(T K^2)`: they share dimensions, and each term's mean is a contraction over the
    sites that it depends on. A value of the chain can be used as far as ``history`` reaches.

    References:
        Tensor Variable Elimination for Plated Factor Graphs (Obermeyer et al., 2019),
        https://arxiv.org/abs/1902.03210

    Example:
        >>> Enumerate()
        Enumerate()
    """

    unbiased = True
    sites = "any site with enumerate_support"
    route = Route.ENUMERATE

    def supports(self, fn: Distribution) -> bool:
        return bool(fn.has_enumerate_support)

    def why_unsupported(self, fn: Distribution, event_dims: int) -> str | None:
        if joins_variables(fn, event_dims):
            return (
                "to_event joins its variables, and their joint support is a product; use a "
                "pyro.plate or separate sites"
            )
        return None

    def draw(self, fn: Distribution) -> Tensor:
        return support_values(fn)


class LocalExpectation(Estimator):
    r"""A sum over the values of each variable, with the others fixed at one joint draw.

    .. math::
        \hat g_d = \pi_d \odot (F_d - \pi_d^\top F_d), \qquad F_{d,c} = f(z \text{ with } z_d := c)

    All variables of the site share the draw. *Unbiased*: yes. *Requires*: one-hot, Bernoulli or
    categorical sites; no dependence on the site outside its plates. *Cost*: ``1 + D (C - 1)``
    evaluations for ``D`` variables (those that ``to_event`` joined) of ``C`` categories, all but
    one without gradient.

    Args:
        chunk_size: Number of these evaluations at once, with vectorised particles, at least 1;
            ``None`` for all.

    Raises:
        ValueError: At a site, if a site outside its plates depends on it.

    References:
        Local Expectation Gradients for Black Box Variational Inference (Titsias, Lazaro-Gredilla,
        2015), https://arxiv.org/abs/1503.01494; IndeCateR: De Smet, Sansone, Zuidberg Dos Martires
        (2023), https://arxiv.org/abs/2311.12569

    Example:
        >>> LocalExpectation(chunk_size=32)
        LocalExpectation(chunk_size=32)
    """

    unbiased = True
    sites = "factorised one-hot, Bernoulli or categorical"
    families = (has_logits,)
    branches = Branches.COUNTERFACTUAL

    def __init__(self, *, chunk_size: int | None = 64) -> None:
        super().__init__()
        if chunk_size is not None:
            chunk_size = integer("LocalExpectation: chunk_size", chunk_size, 1, ValueError)
        self.chunk_size = chunk_size

    def block_size(self, fn: Distribution, event_dims: int) -> int:
        categories = one_hot_logits(fn).shape[-1]
        return 1 + _joined(fn, event_dims).numel() * (categories - 1)

    @torch.no_grad()
    def draw_block(self, fn: Distribution, event_dims: int) -> Tensor:
        logits = one_hot_logits(fn)
        categories, joined = logits.shape[-1], _joined(fn, event_dims)
        index = to_index(fn, sample_detached(fn))
        # shifts[d, j] adds j + 1 to the category of variable d.
        one = torch.eye(joined.numel(), dtype=torch.long, device=logits.device)
        steps = torch.arange(1, categories, device=logits.device)
        shifts = (one[:, None] * steps[None, :, None]).reshape(-1, *joined)
        batch_dims = index.dim() - event_dims
        shifts = shifts.reshape(shifts.shape[:1] + (1,) * batch_dims + joined)
        moved = (index + shifts) % categories
        return from_index(fn, torch.cat([index[None], moved]))

    def surrogate(self, site: Site) -> Tensor:
        probs = site.logits.softmax(-1)
        categories = probs.shape[-1]
        index = to_index(site.fn, site.values[0])
        steps = torch.arange(1, categories, device=index.device)
        moved = (index.unsqueeze(-1) + steps) % categories
        # Differences from the main path's cost, for small rounding errors; weights sum to one.
        joined = index.shape[index.dim() - site.event_dims :]
        gain = (site.cost[1:] - site.cost[0]).unflatten(0, (joined.numel(), categories - 1))
        gain = gain.movedim((0, 1), (-2, -1))
        gain = gain.reshape(gain.shape[:-2] + joined + (categories - 1,))
        weight = probs.gather(-1, moved)
        # Impossible values may have infinite cost, and 0 * inf would be nan.
        return (weight * gain.masked_fill(weight == 0, 0.0)).sum(-1)


def _joined(fn: Distribution, event_dims: int) -> torch.Size:
    # The batch shape of Pyro's ExpandedDistribution is a plain tuple.
    return torch.Size(fn.batch_shape[len(fn.batch_shape) - event_dims :])


def joins_variables(fn: Distribution, event_dims: int) -> bool:
    """Return whether ``to_event`` made one event of several variables."""
    return _joined(fn, event_dims).numel() > 1
