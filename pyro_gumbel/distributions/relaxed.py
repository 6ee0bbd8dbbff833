"""The Concrete distribution on the simplex, with optional straight-through draws."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_gumbel.distributions._constraints import relaxed_simplex
from pyro_gumbel.distributions._density import concrete_log_density, log_coordinate
from pyro_gumbel.distributions._softmax import softmax
from pyro_gumbel.distributions._straight_through import straight_through
from pyro_gumbel.distributions._tempered import TemperedCategorical
from pyro_gumbel.distributions.one_hot import OneHot, one_hot_argmax

__all__ = ["RelaxedOneHot", "straight_through"]


class RelaxedOneHot(TemperedCategorical):
    r"""The Concrete (Gumbel-softmax) distribution, or its straight-through version.

    .. math::
        y = \operatorname{softmax}\left(\frac{\phi + G}{\tau}\right), \qquad
        p(y) = \Gamma(C)\, \tau^{C-1}
               \left(\sum_c \frac{\pi_c}{y_c^\tau}\right)^{-C} \prod_c \frac{\pi_c}{y_c^{\tau+1}}

    With ``straight_through=False`` samples are on the simplex, and ``log_prob`` is this density.
    It is exact if the coordinates of the value are representable. Coordinates that underflow count
    as the smallest normal number of their dtype, with zero gradient. For a density that is exact
    at every temperature use :class:`ExpRelaxedOneHot`.

    With ``straight_through=True`` ``sample`` and ``rsample`` are exactly one-hot, and ``log_prob``
    is the log-mass of :class:`OneHot`. The backward pass of ``rsample`` is that of the relaxed
    sample.

    A category of probability zero has coordinate zero, and the density is that of the other
    categories. The log-density of a value with weight on it is ``-inf``.

    Samples are plain tensors without attributes. Half-precision parameters are converted to
    float32, and the result is converted back.

    Shapes: ``probs`` or ``logits`` are ``(..., C)``. ``temperature`` broadcasts against ``...``,
    with or without a trailing 1. ``batch_shape`` is the broadcast shape, and ``event_shape`` is
    ``(C,)``.

    Args:
        temperature: Positive number or tensor; may require a gradient.
        probs: Probabilities, non-negative, normalised here.
        logits: Log-probabilities up to a constant; exactly one of the two is given.
        straight_through: Whether samples are one-hot.
        validate_args: Whether to check arguments; by default Pyro's setting.

    Raises:
        ValueError: If ``temperature`` is not positive or does not broadcast, if not exactly one of
            ``probs`` and ``logits`` is given, or it contains NaN.
        TypeError: If ``temperature`` is not a number.

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

    def __init__(
        self,
        temperature: Any,
        probs: Any = None,
        logits: Any = None,
        *,
        straight_through: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        self.straight_through = straight_through
        self._init_tempered(temperature, probs, logits, validate_args)

    @constraints.dependent_property(event_dim=1)
    def support(self) -> constraints.Constraint:
        """One-hot vectors if ``straight_through``, else the simplex."""
        return constraints.one_hot if self.straight_through else relaxed_simplex

    @property
    def has_enumerate_support(self) -> bool:
        """True if ``straight_through``."""
        return self.straight_through

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw ``sample_shape + batch_shape + (C,)`` without a gradient."""
        with torch.no_grad():
            scores = self._perturbed_scores(sample_shape)
            return self._harden(scores) if self.straight_through else self._relax(scores)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw ``sample_shape + batch_shape + (C,)``, differentiable in the parameters."""
        scores = self._perturbed_scores(sample_shape)
        relaxed = self._relax(scores)
        return (
            straight_through(self._harden(scores), relaxed) if self.straight_through else relaxed
        )

    def rsample_pair(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Draw a one-hot value and its relaxation from the same noise.

        Returns:
            The one-hot value, without a gradient, and the relaxed value, differentiable in the
            parameters; both ``sample_shape + batch_shape + (C,)``.
        """
        scores = self._perturbed_scores(sample_shape)
        return self._harden(scores), self._relax(scores)

    def _relax(self, scores: Tensor) -> Tensor:
        return softmax(self._temper(scores)).to(self.dtype)

    def _harden(self, scores: Tensor) -> Tensor:
        return one_hot_argmax(scores, self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density on the simplex, or the log-mass if ``straight_through``."""
        if self.straight_through:
            return self.one_hot.log_prob(value)
        if self._validate_args:
            self._validate_sample(value)
        scores = self._parameters.scores
        log_value = log_coordinate(value)
        density, log_value = concrete_log_density(
            log_value,
            scores,
            self._working_temperature(scores.dtype),
            self._log_temperature(scores.dtype),
        )
        score = density - log_value.sum(-1)
        off_support = ((value > 0) & (scores == -math.inf)).any(-1)
        return self._score(score.masked_fill(off_support, -math.inf), value)

    @property
    def one_hot(self) -> OneHot:
        """The discrete distribution with the same parameters."""
        return OneHot.of(self)

    def _discrete(self, name: str) -> OneHot:
        if not self.straight_through:
            raise self._not_closed_form(name)
        return self.one_hot

    @property
    def mean(self) -> Tensor:
        """The probabilities if ``straight_through``; otherwise unknown in closed form."""
        return self._discrete("mean").mean

    @property
    def variance(self) -> Tensor:
        """``p (1 - p)`` if ``straight_through``; otherwise unknown in closed form."""
        return self._discrete("variance").variance

    @property
    def mode(self) -> Tensor:
        """The most probable one-hot if ``straight_through``; otherwise unknown in closed form."""
        return self._discrete("mode").mode

    def entropy(self) -> Tensor:
        """Return the entropy in nats if ``straight_through``."""
        return self._discrete("entropy").entropy()

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all one-hot values if ``straight_through``."""
        if not self.straight_through:
            raise NotImplementedError(
                "RelaxedOneHot has a finite support only with straight_through=True."
            )
        return self.one_hot.enumerate_support(expand)
