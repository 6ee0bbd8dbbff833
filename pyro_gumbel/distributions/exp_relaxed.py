"""The Concrete distribution in log space."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_gumbel.distributions._constraints import log_simplex
from pyro_gumbel.distributions._density import concrete_log_density
from pyro_gumbel.distributions._softmax import log_softmax
from pyro_gumbel.distributions._tempered import TemperedCategorical

__all__ = ["ExpRelaxedOneHot"]


class ExpRelaxedOneHot(TemperedCategorical):
    r"""The Concrete distribution in log space, whose values are log-probabilities.

    .. math::
        u = \log\operatorname{softmax}\left(\frac{\phi + G}{\tau}\right), \qquad
        \log p(u) = \log\Gamma(C) + (C - 1)\log\tau + \sum_c s_c - C\log\sum_c e^{s_c}

    with :math:`s_c = \phi_c - \tau u_c`. The density is exact at every temperature, since values
    do not underflow. Use this class to evaluate densities. The density is with respect to Lebesgue
    measure in the coordinates :math:`u_c - u_C`, :math:`c < C`. ``biject_to(support)`` has the
    same coordinates, so Hamiltonian Monte Carlo is exact, too. ``u.exp()`` is distributed as
    :class:`RelaxedOneHot`.

    A category of probability zero has the value ``-inf`` and does not enter the density. In
    float16 log-probabilities are clamped at -65504.

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
        log_value = log_softmax(self._temper(self._perturbed_scores(sample_shape)))
        if self.dtype == torch.float16:
            bounded = log_value.clamp(min=torch.finfo(self.dtype).min)
            log_value = torch.where(log_value == -math.inf, log_value, bounded)
        return log_value.to(self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density on the log-simplex."""
        if self._validate_args:
            self._validate_sample(value)
        scores = self._parameters.scores
        wide = value.to(torch.promote_types(value.dtype, scores.dtype))
        score, _ = concrete_log_density(
            wide,
            scores,
            self._working_temperature(scores.dtype),
            self._log_temperature(scores.dtype),
        )
        off_support = ((value > -math.inf) & (scores == -math.inf)).any(-1)
        return self._score(score.masked_fill(off_support, -math.inf), value)

    @property
    def mean(self) -> Tensor:
        """No closed form."""
        raise self._not_closed_form("mean")

    @property
    def variance(self) -> Tensor:
        """No closed form."""
        raise self._not_closed_form("variance")

    @property
    def mode(self) -> Tensor:
        """No closed form."""
        raise self._not_closed_form("mode")

    def entropy(self) -> Tensor:
        """No closed form."""
        raise self._not_closed_form("entropy")
