"""Gumbel and one-hot distributions, and their relaxations.

* :class:`Gumbel`, :class:`TruncatedGumbel`: the noise of the Gumbel-max trick.
* :class:`OneHot`: a categorical whose log-mass is differentiable in its one-hot value.
* :class:`RelaxedOneHot`, :class:`ExpRelaxedOneHot`, :class:`RelaxedBernoulli`: Concrete
  distributions.
* :func:`draw_one_hot`, :func:`gumbel_noise`, :func:`multilinear_log_prob`,
  :func:`straight_through`: their building blocks.
"""

from __future__ import annotations

from pyro_gumbel.distributions import kl
from pyro_gumbel.distributions._numerics import gumbel_noise, straight_through
from pyro_gumbel.distributions.gumbel import Gumbel, TruncatedGumbel
from pyro_gumbel.distributions.one_hot import OneHot, draw_one_hot, multilinear_log_prob
from pyro_gumbel.distributions.relaxed import ExpRelaxedOneHot, RelaxedOneHot
from pyro_gumbel.distributions.relaxed_bernoulli import RelaxedBernoulli

__all__ = [
    "ExpRelaxedOneHot",
    "Gumbel",
    "OneHot",
    "RelaxedBernoulli",
    "RelaxedOneHot",
    "TruncatedGumbel",
    "draw_one_hot",
    "gumbel_noise",
    "kl",
    "multilinear_log_prob",
    "straight_through",
]
