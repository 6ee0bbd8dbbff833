"""Unbiased gradients from draws without replacement."""

from __future__ import annotations

import itertools

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor

from pyro_gumbel._validate import integer
from pyro_gumbel.distributions._numerics import perturb
from pyro_gumbel.distributions.families import (
    from_index,
    is_categorical,
    is_one_hot,
    one_hot_logits,
    to_index,
)
from pyro_gumbel.estimators.base import Branches, Estimator, Site
from pyro_gumbel.estimators.enumeration import joins_variables

__all__ = ["SumAndSample", "UnorderedSet"]

_LARGEST_SET = 10  # the weights need 2^k sums


class _WithoutReplacement(Estimator):
    """Base of estimators that draw ``K`` ordered categories by the Gumbel top-k trick."""

    unbiased = True
    sites = "one-hot or categorical, one variable per element"
    families = (is_one_hot, is_categorical)
    branches = Branches.COUNTERFACTUAL

    def why_unsupported(self, fn: Distribution, event_dims: int) -> str | None:
        if joins_variables(fn, event_dims):
            return (
                "to_event joins its variables, and they cannot be drawn jointly without "
                "replacement; use a pyro.plate or separate sites"
            )
        categories = one_hot_logits(fn).shape[-1]
        if self.num_values > categories:
            return f"it draws {self.num_values} different categories of {categories}"
        return None

    @torch.no_grad()
    def draw(self, fn: Distribution) -> Tensor:
        index = perturb(one_hot_logits(fn)).topk(self.num_values, -1).indices
        return from_index(fn, index.movedim(-1, 0))

    def _drawn(self, site: Site) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and costs of the drawn categories, ``(K, R) + batch_shape``."""
        index = to_index(site.fn, site.values)
        log_probs = site.logits.log_softmax(-1).movedim(-1, 0).gather(0, index)
        if site.event_dims:
            log_probs = log_probs.flatten(log_probs.dim() - site.event_dims)
        # If more categories are drawn than are possible, the last ones are impossible. They get
        # the lowest finite log-probability, without gradient, and zero cost, to avoid 0 * inf.
        impossible = log_probs.exp() == 0
        cost = site.cost.reshape(log_probs.shape).masked_fill(impossible, 0.0)
        return log_probs.masked_fill(impossible, torch.finfo(log_probs.dtype).min), cost


class SumAndSample(_WithoutReplacement):
    r"""A sum over all but the last of several distinct draws; the last represents the rest.

    .. math::
        \hat g = \sum_{i < k} f(s_i) \nabla p(s_i)
        + \Bigl(1 - \sum_{i < k} p(s_i)\Bigr) f(s_k) \nabla \log p(s_k)

    with :math:`s_1, \dots, s_k` drawn without replacement. *Unbiased*: yes. *Requires*: one-hot or
    categorical sites with one variable per element; no dependence on the site outside its plates.
    *Cost*: ``num_sum + 1`` evaluations, all but one without gradient.

    Args:
        num_sum: Number of values to sum, at least 1.

    Raises:
        ValueError: At a site, if it has too few categories or a site outside its plates depends
            on it.

    References:
        Rao-Blackwellized Stochastic Gradients for Discrete Distributions (Liu et al., 2019),
        https://arxiv.org/abs/1810.04777; Kool, van Hoof, Welling (2020),
        https://arxiv.org/abs/2002.06043

    Example:
        >>> SumAndSample(2)
        SumAndSample(2)
    """

    def __init__(self, num_sum: int = 2) -> None:
        super().__init__()
        self.num_sum = integer("SumAndSample: num_sum", num_sum, 1, ValueError)
        self.num_values = self.num_sum + 1

    def surrogate(self, site: Site) -> Tensor:
        log_probs, cost = self._drawn(site)
        summed = log_probs[:-1].exp()
        rest = (1 - summed.detach().sum(0)).clamp(min=0)
        return (summed * cost[:-1]).sum(0) + rest * cost[-1] * log_probs[-1]


class UnorderedSet(_WithoutReplacement):
    r"""Several distinct draws, weighted as an unordered set, with a built-in baseline.

    .. math::
        \hat g = \sum_{s \in S} p(s) R(S, s) \Bigl(f(s) - \sum_{t \in S} p(t) R^{D \setminus s}(S,
        t) f(t) \Bigr) \nabla \log p(s)

    where :math:`R(S, s)` is the probability of drawing the rest of ``S`` after ``s``, divided by
    that of drawing ``S``. *Unbiased*: yes. *Requires*: one-hot or categorical sites with one
    variable per element; no dependence on the site outside its plates. *Cost*: ``num_samples``
    evaluations, all but one without gradient, and :math:`2^{k}` sums for the weights.

    Args:
        num_samples: Size ``k`` of the set, from 2 to 10.

    Raises:
        ValueError: As for :class:`SumAndSample`.

    References:
        Estimating Gradients for Discrete Random Variables by Sampling without Replacement (Kool,
        van Hoof, Welling, 2020), https://arxiv.org/abs/2002.06043

    Example:
        >>> UnorderedSet(3)
        UnorderedSet(3)
    """

    def __init__(self, num_samples: int = 3) -> None:
        super().__init__()
        num_samples = integer("UnorderedSet: num_samples", num_samples, 2, ValueError)
        if num_samples > _LARGEST_SET:
            raise ValueError(
                f"UnorderedSet: num_samples must be at most {_LARGEST_SET}, since the weights "
                f"need 2^num_samples sums; got {num_samples!r}."
            )
        self.num_samples = self.num_values = num_samples

    def surrogate(self, site: Site) -> Tensor:
        log_probs, cost = self._drawn(site)
        with torch.no_grad():
            probs = log_probs.exp().double().clamp(min=1e-300)
            first, second = leave_out_ratios(probs)
            baseline = (second * probs * cost).sum(1)  # over t, for each s
            weight = (probs * first * (cost - baseline)).to(log_probs.dtype)
        return (weight * log_probs).sum(0)


def leave_out_ratios(probs: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return :math:`Q(\{s\}) / Q(\emptyset)` and :math:`Q(\{s, t\}) / Q(\{s\})` for members s, t.

    :math:`Q(U) = \sum_{s \notin U} p(s) / (1 - p(U)) \, Q(U + s)` is the probability that, after
    the members ``U``, the next draws are the rest of the set in any order.
    """
    k = probs.shape[0]
    rest = (1 - probs.sum(0)).clamp(min=0)
    everything = frozenset(range(k))
    chance = {everything: torch.ones_like(rest)}
    for size in range(k - 1, -1, -1):
        for drawn in map(frozenset, itertools.combinations(range(k), size)):
            left = sorted(everything - drawn)
            # 1 - p(U), as a sum of the remaining probabilities, without cancellation.
            remaining = torch.stack([probs[s] for s in left]).sum(0) + rest
            chance[drawn] = sum(
                (probs[s] / remaining * chance[drawn | {s}] for s in left), torch.zeros_like(rest)
            )
    single = [chance[frozenset({s})] for s in range(k)]
    first = torch.stack(single) / chance[frozenset()]
    second = torch.stack(
        [torch.stack([chance[frozenset({s, t})] / single[s] for t in range(k)]) for s in range(k)]
    )
    return first, second
