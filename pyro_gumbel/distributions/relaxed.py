"""The Concrete distribution, on the simplex or in log space."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_gumbel.distributions._categorical import CategoricalDistribution
from pyro_gumbel.distributions._constraints import log_simplex, relaxed_simplex
from pyro_gumbel.distributions._numerics import log_coordinate, log_softmax, softmax
from pyro_gumbel.distributions._relaxation import Relaxation, TemperedDistribution
from pyro_gumbel.distributions.one_hot import OneHot, one_hot_argmax

__all__ = ["ExpRelaxedOneHot", "RelaxedOneHot"]


class TemperedCategorical(CategoricalDistribution, TemperedDistribution):
    """A categorical distribution with a temperature, as for the Gumbel-softmax."""

    arg_constraints = {
        "temperature": constraints.positive,
        "probs": constraints.simplex,
        "logits": constraints.real_vector,
    }

    def _log_density(self, log_value: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-density of log-coordinates, as in :class:`ExpRelaxedOneHot`.

        It omits impossible categories; it is ``-inf`` if one of them is ``present``. Also return
        ``log_value`` with zeros at impossible categories.
        """
        scores = self._scores
        impossible = scores == -math.inf
        num_possible = (~impossible).sum(-1).to(scores.dtype)
        log_value = log_value.masked_fill(impossible, 0.0)
        temperature = self._temperature_of_scores
        log_shares = log_softmax(scores - log_value * temperature).masked_fill(impossible, 0.0)
        constant = num_possible.lgamma() + (num_possible - 1) * self._log_temperature
        outside = (present & impossible).any(-1)
        return (constant + log_shares.sum(-1)).masked_fill(outside, -math.inf), log_value


class RelaxedOneHot(TemperedCategorical, Relaxation):
    r"""The Concrete (Gumbel-softmax) distribution, or its straight-through version.

    .. math::
        y = \operatorname{softmax}\left(\frac{\phi + G}{\tau}\right), \qquad
        p(y) = \Gamma(C)\, \tau^{C-1}
               \left(\sum_c \frac{\pi_c}{y_c^\tau}\right)^{-C} \prod_c \frac{\pi_c}{y_c^{\tau+1}}

    With ``straight_through=False`` samples are on the simplex, and ``log_prob`` is this density.
    It is exact if the coordinates of the value are representable. Coordinates that underflow count
    as the smallest normal number of their dtype, with zero gradient. The density of
    :class:`ExpRelaxedOneHot` is exact at every temperature. With ``straight_through=True`` samples
    are exactly one-hot, and ``log_prob`` is the log-mass of :class:`OneHot`. The backward pass of
    ``rsample`` is that of the relaxed sample. Mean, variance, mode and entropy have a closed form
    only in this case.

    A category of probability zero has coordinate zero, and the density is that of the other
    categories. A value with weight on an impossible category has density zero. Samples are plain
    tensors without attributes, computed in float32 or better.

    Shapes: ``probs`` or ``logits`` are ``(..., C)``. ``temperature`` broadcasts against ``...``,
    with or without a trailing 1, to ``batch_shape``. ``event_shape`` is ``(C,)``.

    Args:
        temperature: Positive number or tensor; may require a gradient.
        probs: Probabilities, non-negative, normalised here.
        logits: Log-probabilities up to a constant; exactly one of the two is given.
        straight_through: Whether samples are one-hot.
        validate_args: Whether to check arguments; by default Pyro's setting.

    Raises:
        ValueError: If ``temperature`` is not positive or does not broadcast, if not exactly one of
            ``probs`` and ``logits`` is given, or it is out of range.
        TypeError: If ``temperature`` is neither a number nor a tensor.

    References:
        The Concrete Distribution (Maddison, Mnih, Teh, 2017), https://arxiv.org/abs/1611.00712
        Categorical Reparameterization with Gumbel-Softmax (Jang, Gu, Poole, 2017),
        https://arxiv.org/abs/1611.01144

    Example:
        >>> d = RelaxedOneHot(0.5, logits=torch.zeros(5, 3), straight_through=True)
        >>> d.rsample().sum(-1)
        tensor([1., 1., 1., 1., 1.])
        >>> d.log_prob(d.sample()).exp()
        tensor([0.3333, 0.3333, 0.3333, 0.3333, 0.3333])
    """

    @constraints.dependent_property(event_dim=1)
    def support(self) -> constraints.Constraint:
        """One-hot vectors if ``straight_through``, else the simplex."""
        return constraints.one_hot if self.straight_through else relaxed_simplex

    def _relax(self, scores: Tensor) -> Tensor:
        return softmax(scores / self._temperature_of_scores).to(self.dtype)

    def _harden(self, scores: Tensor) -> Tensor:
        return one_hot_argmax(scores, self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density on the simplex, or the log-mass if ``straight_through``."""
        if self.straight_through:
            return self.one_hot.log_prob(value)
        if self._validate_args:
            self._validate_sample(value)
        density, log_value = self._log_density(log_coordinate(value), value > 0)
        return self._score(density - log_value.sum(-1), value)

    @property
    def one_hot(self) -> OneHot:
        """The discrete distribution with the same parameters."""
        return OneHot.of(self)

    def _discrete(self, name: str) -> Tensor:
        statistic = getattr(self.one_hot, name)
        return statistic() if callable(statistic) else statistic

    def _hard_support(self, expand: bool) -> Tensor:
        return self.one_hot.enumerate_support(expand)


class ExpRelaxedOneHot(TemperedCategorical):
    r"""The Concrete distribution in log space, whose values are log-probabilities.

    .. math::
        u = \log\operatorname{softmax}\left(\frac{\phi + G}{\tau}\right), \qquad
        \log p(u) = \log\Gamma(C) + (C - 1)\log\tau + \sum_c s_c - C\log\sum_c e^{s_c}

    with :math:`s_c = \phi_c - \tau u_c`. The density is exact at every temperature, since values
    do not underflow. It is with respect to Lebesgue measure in the coordinates :math:`u_c - u_C`,
    :math:`c < C`, which are those of ``biject_to(support)``, so Hamiltonian Monte Carlo is exact,
    too. ``u.exp()`` is distributed as :class:`RelaxedOneHot`. A category of probability zero has
    the value ``-inf`` and does not enter the density. In float16 values are clamped at -65504.

    Shapes, arguments and errors are those of :class:`RelaxedOneHot`.

    References:
        The Concrete Distribution (Maddison, Mnih, Teh, 2017), https://arxiv.org/abs/1611.00712

    Example:
        >>> d = ExpRelaxedOneHot(0.01, logits=torch.tensor([50.0, 0.0, -50.0]))
        >>> u = d.rsample()
        >>> bool(u.logsumexp(-1).abs() < 1e-6), bool(d.log_prob(u).isfinite())
        (True, True)
    """

    support = log_simplex

    def __init__(
        self,
        temperature: Any,
        probs: Any = None,
        logits: Any = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self._init_tempered(temperature, probs, logits, validate_args)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw ``sample_shape + batch_shape + (C,)``, differentiable in the parameters."""
        scores = self._perturbed(sample_shape)
        log_value = log_softmax(scores / self._temperature_of_scores)
        if self.dtype == torch.float16:
            bounded = log_value.clamp(min=torch.finfo(self.dtype).min)
            log_value = torch.where(log_value == -math.inf, log_value, bounded)
        return log_value.to(self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        wide = value.to(torch.promote_types(value.dtype, self._scores.dtype))
        density, _ = self._log_density(wide, value > -math.inf)
        return self._score(density, value)
