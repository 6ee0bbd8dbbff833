"""The binary Concrete distribution, with optional straight-through draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from pyro_gumbel.distributions._base import check_values
from pyro_gumbel.distributions._categorical import bit_log_masses
from pyro_gumbel.distributions._numerics import (
    entropy,
    exact_logit,
    log_coordinate_pair,
    logistic_noise,
    widen,
)
from pyro_gumbel.distributions._relaxation import Relaxation
from pyro_gumbel.distributions.one_hot import multilinear_log_prob

__all__ = ["RelaxedBernoulli"]


class RelaxedBernoulli(Relaxation):
    r"""The binary Concrete distribution, or its straight-through version.

    .. math::
        y = \sigma\left(\frac{\phi + L}{\tau}\right), \quad L \sim \mathrm{Logistic}, \qquad
        p(y) = \frac{\tau\, \sigma'(\phi - \tau \ell)}{y (1 - y)}, \quad
        \ell = \log\frac{y}{1 - y}

    With ``straight_through=False`` samples are in [0, 1], and ``log_prob`` is this density. It is
    exact if the value is representable. A value that underflows counts as the smallest normal
    number of its dtype, and a value of 1 as the largest number below 1, both with zero gradient.
    With ``straight_through=True`` samples are exactly 0 or 1, and ``log_prob`` is the log-mass
    ``y log p + (1 - y) log(1 - p)``. The backward pass of ``rsample`` is that of the relaxed
    sample. Mean, variance, mode and entropy have a closed form only in this case. With a
    probability of exactly 0 or 1 the value is constant; the log-probability of others is ``-inf``.

    Shapes: ``batch_shape`` is the broadcast shape of ``temperature`` and the parameter;
    ``event_shape`` is (). Errors are those of :class:`RelaxedOneHot`.

    Args:
        temperature: Positive number or tensor; may require a gradient.
        probs: Probability of a one, a number or a tensor.
        logits: Log-odds of a one; exactly one of the two is given.
        straight_through: Whether samples are 0 or 1.
        validate_args: Whether to check arguments; by default Pyro's setting.

    References:
        The Concrete Distribution (Maddison, Mnih, Teh, 2017), https://arxiv.org/abs/1611.00712

    Example:
        >>> d = RelaxedBernoulli(0.5, probs=0.25, straight_through=True)
        >>> d.log_prob(torch.tensor([0.0, 1.0])).exp()
        tensor([0.7500, 0.2500])
    """

    arg_constraints = {
        "temperature": constraints.positive,
        "probs": constraints.unit_interval,
        "logits": constraints.real,
    }

    def _check_parameter(self, given: Tensor) -> None:
        if self._name == "logits":
            check_values("logits", given, ~given.isnan(), "be numbers")
        else:
            hint = " Write logits=... for log-odds."
            check_values("probs", given, (given >= 0) & (given <= 1), "lie in [0, 1]", hint)

    @constraints.dependent_property(event_dim=0)
    def support(self) -> constraints.Constraint:
        """Bits if ``straight_through``, else the closed unit interval."""
        return constraints.boolean if self.straight_through else constraints.unit_interval

    @property
    def _accepted(self) -> constraints.Constraint:
        return constraints.unit_interval  # the log-mass is defined between the bits too

    def _log_odds(self) -> Tensor:
        """Return log-odds in float32 or better; infinite for probabilities of 0 and 1."""
        return self._derive("log_odds", self._compute_log_odds)

    def _compute_log_odds(self) -> Tensor:
        given = widen(self._given)
        return exact_logit(given) if self._name == "probs" else given

    @property
    def probs(self) -> Tensor:
        """Probability of the value 1."""
        return self._statistic(
            self._log_odds().sigmoid() if self._name == "logits" else self._given
        )

    @property
    def logits(self) -> Tensor:
        """Log-odds of the value 1."""
        return self._statistic(self._log_odds())

    def _perturbed(self, sample_shape: Any) -> Tensor:
        log_odds = self._log_odds()
        shape = self._extended_shape(sample_shape)
        return log_odds + logistic_noise(shape, log_odds.dtype, log_odds.device)

    def _relax(self, perturbed: Tensor) -> Tensor:
        return (perturbed / self._wide_temperature).sigmoid().to(self.dtype)

    def _harden(self, perturbed: Tensor) -> Tensor:
        return (perturbed.detach() > 0).to(self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density on the unit interval, or the log-mass if ``straight_through``."""
        if self._validate_args:
            self._validate_sample(value)
        score = self._log_mass(value) if self.straight_through else self._log_density(value)
        return self._score(score, value)

    def _log_mass(self, value: Tensor) -> Tensor:
        log_masses = bit_log_masses(self)
        value = value.to(torch.promote_types(value.dtype, log_masses.dtype))
        return multilinear_log_prob(torch.stack([1 - value, value], -1), log_masses)

    def _log_density(self, value: Tensor) -> Tensor:
        log_y, log_not_y = log_coordinate_pair(value)
        log_odds = self._log_odds()
        constant = log_odds.isinf()
        scaled = self._wide_temperature * (log_y - log_not_y)
        noise = log_odds.masked_fill(constant, 0.0) - scaled
        # The logistic log-density in a symmetric form without cancellation.
        logistic = logsigmoid(noise) + logsigmoid(-noise)
        score = self._log_temperature + logistic - log_y - log_not_y
        misses = value != (log_odds > 0)
        return torch.where(constant, torch.where(misses, -math.inf, 0.0).to(score), score)

    def _discrete(self, name: str) -> Tensor:
        log_masses = bit_log_masses(self)
        compute: dict[str, Callable[[], Tensor]] = {
            "mean": lambda: self.probs,
            "mode": lambda: self._log_odds() >= 0,
            "variance": lambda: log_masses.sum(-1).exp(),
            "entropy": lambda: entropy(log_masses),
        }
        return self._statistic(compute[name]())

    def _hard_support(self, expand: bool) -> Tensor:
        values = torch.arange(2, dtype=self.dtype, device=self._given.device)
        values = values.view(2, *(1 for _ in self.batch_shape))
        return values.expand(2, *self.batch_shape) if expand else values
