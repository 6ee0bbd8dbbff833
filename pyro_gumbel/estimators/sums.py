"""Sums over the support in place of draws."""

from __future__ import annotations

from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor

from pyro_gumbel.estimators.base import Estimator

__all__ = ["Enumerate"]


class Enumerate(Estimator):
    r"""The exact gradient, by summing over every value of the site.

    .. math:: \nabla_\phi \sum_z q_\phi(z)\, f(z)

    Values go to a new dimension left of all plates, as in Pyro's parallel enumeration, so that
    several enumerated sites cost the product of their cardinalities and each element of a plate is
    summed on its own. *Unbiased*: exact.
    *Requires*: a finite support; programs that broadcast; nothing outside the site's plates may
    depend on it. *Costs*: one evaluation of everything downstream for each value.

    References:
        Tensor Variable Elimination for Plated Factor Graphs (Obermeyer et al., 2019),
        https://arxiv.org/abs/1902.03210

    Example:
        >>> Enumerate()
        Enumerate()
    """

    unbiased = True
    sites = "any site with enumerate_support"
    enumerates = True

    def supports(self, fn: Distribution) -> bool:
        return bool(fn.has_enumerate_support)

    def draw(self, fn: Distribution) -> Tensor:
        return fn.enumerate_support(expand=False)
