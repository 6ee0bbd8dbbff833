"""The binary Concrete distribution, with optional straight-through draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from pyro_gumbel.distributions._base import as_floating, broadcast_shapes, checkable, may_cache
from pyro_gumbel.distributions._categorical import bit_log_masses, check_one_given
from pyro_gumbel.distributions._numerics import (
    entropy,
    exact_logit,
    log_coordinate_pair,
    logistic_noise,
    widen,
)
from pyro_gumbel.distributions._relaxation import Relaxation, align_temperature
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
    With ``straight_through=True`` ``sample`` and ``rsample`` are exactly 0 or 1, and ``log_prob``
    is the log-mass ``y log p + (1 - y) log(1 - p)``. The backward pass of ``rsample`` is that of
    the relaxed sample. Mean, variance, mode and entropy have a closed form only in this case.

    With a probability of exactly 0 or 1 the value is constant; its log-probability is 0, and that
    of other values is ``-inf``.

    Shapes: ``batch_shape`` is the broadcast shape of ``temperature`` and the parameter;
    ``event_shape`` is ().

    Args:
        temperature: Positive number or tensor; may require a gradient.
        probs: Probability of a one, a number or a tensor.
        logits: Log-odds of a one; exactly one of the two is given.
        straight_through: Whether samples are 0 or 1.
        validate_args: Whether to check arguments; by default Pyro's setting.

    Raises:
        ValueError: If ``temperature`` is not positive or does not broadcast, if not exactly one
            of ``probs`` and ``logits`` is given, ``probs`` is outside [0, 1], or ``logits`` is
            NaN.
        TypeError: If ``temperature`` is not a number.

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
    _cached_log_odds: Tensor | None = None

    def __init__(
        self,
        temperature: Any,
        probs: Any = None,
        logits: Any = None,
        *,
        straight_through: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        check_one_given(probs, logits)
        self.straight_through = straight_through
        self._name = "probs" if logits is None else "logits"
        self._given = as_floating(probs if logits is None else logits)
        self._init_shapes(self._given.shape, (), validate_args)
        if self._validate_args:
            self._check_parameter()
        self._init_temperature(temperature, self._given.device)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cached_log_odds": None}

    def _check_parameter(self) -> None:
        given = self._given.detach()
        if not checkable(given):
            return
        if self._name == "logits" and given.isnan().any():
            raise ValueError(f"logits must be numbers; found NaN in shape {tuple(given.shape)}.")
        if self._name == "probs" and not ((given >= 0) & (given <= 1)).all():
            raise ValueError(
                f"probs must lie in [0, 1]; got values from {given.min().item():g} to "
                f"{given.max().item():g} in a tensor of shape {tuple(given.shape)}. Write "
                "logits=... for log-odds."
            )

    @constraints.dependent_property(event_dim=0)
    def support(self) -> constraints.Constraint:
        """Bits if ``straight_through``, else the closed unit interval."""
        return constraints.boolean if self.straight_through else constraints.unit_interval

    @property
    def _accepted(self) -> constraints.Constraint:
        return constraints.unit_interval  # the log-mass is defined between the bits too

    @property
    def dtype(self) -> torch.dtype:
        return self._given.dtype

    def _log_odds(self) -> Tensor:
        """Return log-odds in float32 or better; infinite for probabilities of 0 and 1."""
        if self._cached_log_odds is not None:
            return self._cached_log_odds
        with torch.enable_grad():
            log_odds = widen(self._given)
            if self._name == "probs":
                log_odds = exact_logit(log_odds)
        if may_cache():
            self._cached_log_odds = log_odds
        return log_odds

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
        return (perturbed / self._working_temperature(perturbed.dtype)).sigmoid().to(self.dtype)

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
        log_temperature = self._log_temperature(log_odds.dtype)
        temperature = self._working_temperature(log_odds.dtype)
        noise = log_odds.masked_fill(constant, 0.0) - temperature * (log_y - log_not_y)
        # The logistic log-density in a symmetric form without cancellation.
        logistic = logsigmoid(noise) + logsigmoid(-noise)
        score = log_temperature + logistic - log_y - log_not_y
        misses = value != (log_odds > 0)
        return torch.where(constant, torch.where(misses, -math.inf, 0.0).to(score), score)

    @property
    def mean(self) -> Tensor:
        self._require_hard("mean")
        return self.probs

    @property
    def variance(self) -> Tensor:
        self._require_hard("variance")
        return self._statistic(bit_log_masses(self).sum(-1).exp())

    @property
    def mode(self) -> Tensor:
        self._require_hard("mode")
        return self._statistic(self._log_odds() >= 0)

    def entropy(self) -> Tensor:
        self._require_hard("entropy")
        return self._statistic(entropy(bit_log_masses(self)))

    def _hard_support(self, expand: bool) -> Tensor:
        values = torch.arange(2, dtype=self.dtype, device=self._given.device)
        values = values.view(2, *(1 for _ in self.batch_shape))
        return values.expand(2, *self.batch_shape) if expand else values

    def __repr__(self) -> str:
        return (
            f"RelaxedBernoulli(temperature: {self._brief_temperature()}, "
            f"{self._name}: {tuple(self.batch_shape)})"
        )

    @staticmethod
    def infer_shapes(
        temperature: Sequence[int] = (),
        probs: Sequence[int] | None = None,
        logits: Sequence[int] | None = None,
        **_: Any,
    ) -> tuple[torch.Size, torch.Size]:
        check_one_given(probs, logits)
        shape = torch.Size(probs if logits is None else logits)  # type: ignore[arg-type]
        aligned = align_temperature(torch.Size(temperature), shape, event_dim=0)
        return broadcast_shapes(shape, aligned), torch.Size()
