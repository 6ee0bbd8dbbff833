"""Biased low-variance estimators that differentiate soft values at one-hot draws."""

from __future__ import annotations

from typing import ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor

from pyro_gumbel._validate import check_number
from pyro_gumbel.distributions._base import broadcasts_to
from pyro_gumbel.distributions._numerics import perturb, softmax, straight_through
from pyro_gumbel.distributions.families import (
    from_one_hot,
    is_bit,
    is_one_hot,
    log_mass,
    log_mass_of_value,
    one_hot_logits,
)
from pyro_gumbel.distributions.one_hot import draw_one_hot, one_at
from pyro_gumbel.estimators.base import Estimator, Families, Route
from pyro_gumbel.estimators.schedules import Schedule, Temperature, check_temperature

__all__ = [
    "GappedStraightThrough",
    "GumbelSoftmax",
    "GumbelStraightThrough",
    "OneHotEstimator",
    "ReinMax",
    "StraightThrough",
]


class OneHotEstimator(Estimator):
    """A biased estimator whose one-hot value carries a gradient to the site's logits.

    A subclass defines :meth:`soften`, or all of :meth:`draw_one_hot`. A Bernoulli variable is a
    one-hot vector of two categories. ``log q`` enters the cost with detached parameters, since its
    gradient in them has mean zero and would only add variance.
    """

    unbiased = False
    sites = "one-hot or Bernoulli"
    families: ClassVar[Families] = (is_one_hot, is_bit)
    route = Route.PATHWISE
    needs_smooth_cost = True

    def __init__(self, temperature: Temperature = 1.0) -> None:
        super().__init__()
        self.temperature = check_temperature(type(self).__name__, "temperature", temperature)

    def draw(self, fn: Distribution) -> Tensor:
        # Logits are in float32 or better, for an accurate softmax and Jacobian.
        return from_one_hot(fn, self.draw_one_hot(one_hot_logits(fn)))

    def draw_one_hot(self, logits: Tensor) -> Tensor:
        """Draw one-hot values ``batch_shape + (C,)`` that carry a gradient to ``logits``."""
        hard = draw_one_hot(logits)
        return straight_through(hard, self.soften(logits, hard))

    def soften(self, logits: Tensor, hard: Tensor) -> Tensor:
        """Return what is differentiated in place of an exact draw ``hard``, of its shape."""
        raise NotImplementedError

    def log_prob(self, fn: Distribution, value: Tensor) -> Tensor:
        return log_mass_of_value(fn, value)

    def why_unsupported(self, fn: Distribution, event_dims: int) -> str | None:
        # Checked in the first run, which has no particle dimension that the temperature could
        # match by chance.
        named = (getattr(self, name, None) for name in ("temperature", "backward_temperature"))
        return next(filter(None, (_misfit(value, fn.batch_shape) for value in named)), None)

    def _tempered(self, logits: Tensor, temperature: Temperature) -> Tensor:
        divisor = current_temperature(temperature, logits, type(self).__name__)
        if not isinstance(divisor, Tensor) and divisor == 1:
            return logits  # skip a division in the forward and the backward pass
        return logits / divisor


def current_temperature(temperature: Temperature, logits: Tensor, owner: str) -> float | Tensor:
    """Return a temperature that divides logits; a tensor broadcasts against the batch shape."""
    if isinstance(temperature, Schedule):
        return temperature.current
    if not isinstance(temperature, Tensor):
        return temperature
    misfit = _misfit(temperature, logits.shape[:-1])
    if misfit is not None:
        raise ValueError(f"{owner}: {misfit}.")
    return temperature.to(logits.device).unsqueeze(-1)


def _misfit(temperature: Temperature | None, batch: torch.Size) -> str | None:
    """Return why a temperature does not broadcast to a batch shape, or ``None``."""
    if not isinstance(temperature, Tensor) or broadcasts_to(temperature.shape, batch):
        return None
    return (
        f"temperature of shape {tuple(temperature.shape)} does not broadcast to the site's batch "
        f"shape {tuple(batch)}; give a number or one temperature for each element of the batch"
    )


class StraightThrough(OneHotEstimator):
    r"""The straight-through estimator, which differentiates the softmax instead of the draw.

    .. math::
        \hat g = \tfrac{1}{\tau} J(\mathrm{softmax}(\phi / \tau))\, \nabla_D f(D), \qquad
        J(p) = \mathrm{diag}(p) - p p^\top

    *Unbiased*: no (exact at ``temperature=1`` for costs linear in the one-hot). *Requires*: a cost
    differentiable at one-hot values. *Cost*: one evaluation. It has the lowest variance and the
    largest bias of its family.

    Args:
        temperature: Positive number, tensor (broadcast against the batch) or schedule.

    References:
        Estimating or Propagating Gradients Through Stochastic Neurons (Bengio, Leonard, Courville,
        2013), https://arxiv.org/abs/1308.3432

    Example:
        >>> StraightThrough(1.3)
        StraightThrough(1.3)
    """

    def soften(self, logits: Tensor, hard: Tensor) -> Tensor:
        return softmax(self._tempered(logits, self.temperature))


class GumbelSoftmax(OneHotEstimator):
    r"""The pathwise gradient of a relaxed draw; the program runs on the soft value.

    .. math:: y = \mathrm{softmax}((\phi + G) / \tau)

    *Unbiased*: no. It is the gradient of a relaxed objective, in which log-masses have their
    multilinear extension and all parameters are trained on soft values. The reported loss is that
    of the discrete model. *Requires*: a cost defined at relaxed values. *Cost*: one evaluation
    with gradient, and one without for the loss.

    Args:
        temperature: Positive number, tensor or schedule.

    References:
        Categorical Reparameterization with Gumbel-Softmax (Jang, Gu, Poole, 2017),
        https://arxiv.org/abs/1611.01144; The Concrete Distribution (Maddison, Mnih, Teh, 2017),
        https://arxiv.org/abs/1611.00712

    Example:
        >>> GumbelSoftmax(0.5)
        GumbelSoftmax(0.5)
    """

    relaxed = True

    def __init__(self, temperature: Temperature = 0.5) -> None:
        super().__init__(temperature)

    def draw_one_hot(self, logits: Tensor) -> Tensor:
        return softmax(self._tempered(perturb(logits), self.temperature))

    def log_prob(self, fn: Distribution, value: Tensor) -> Tensor:
        # In the relaxed objective the score of log q does not have mean zero, so it is kept.
        return log_mass(fn, value)


class GumbelStraightThrough(OneHotEstimator):
    r"""Gumbel-softmax with a hard forward pass and a relaxed backward pass, by the same noise.

    .. math::
        D = \mathrm{onehot}(\arg\max(\phi + G)), \qquad
        \hat g = \tfrac{1}{\tau} J(\mathrm{softmax}((\phi + G) / \tau))\, \nabla_D f(D)

    *Unbiased*: no. *Requires*: a cost differentiable at one-hot values. *Cost*: one evaluation.

    Args:
        temperature: Positive number, tensor or schedule.
        backward_temperature: Temperature of the backward pass, ``temperature`` by default. The
            hard draw does not depend on the temperature, so only this one affects the gradient.

    References:
        Categorical Reparameterization with Gumbel-Softmax (Jang, Gu, Poole, 2017),
        https://arxiv.org/abs/1611.01144; decoupled temperatures: Shah, Yan, Mozer, Liu (2024),
        https://arxiv.org/abs/2410.13331

    Example:
        >>> GumbelStraightThrough(1.0, backward_temperature=0.5)
        GumbelStraightThrough(1.0, backward_temperature=0.5)
    """

    def __init__(
        self, temperature: Temperature = 0.5, *, backward_temperature: Temperature | None = None
    ) -> None:
        super().__init__(temperature)
        if backward_temperature is not None:
            backward_temperature = check_temperature(
                type(self).__name__, "backward_temperature", backward_temperature
            )
        self.backward_temperature = backward_temperature

    def draw_one_hot(self, logits: Tensor) -> Tensor:
        scores = perturb(logits)
        chosen = self.backward_temperature
        temperature = self.temperature if chosen is None else chosen
        largest, index = scores.detach().max(-1, keepdim=True)
        tempered, peaks = (self._tempered(s, temperature) for s in (scores, largest))
        hard = one_at(index, scores.shape[-1], scores.dtype)
        return straight_through(hard, softmax(tempered, peaks))


class GappedStraightThrough(OneHotEstimator):
    r"""Straight-through with the drawn logit shifted to the top by a gap, without Gumbel noise.

    .. math:: \hat g = \tfrac{1}{\tau} J(\mathrm{softmax}((\phi + m) / \tau))\, \nabla_D f(D)

    where ``m`` (detached) raises the drawn logit to the largest one and lowers the others to at
    least ``gap`` below it. *Unbiased*: no. *Requires*: a cost differentiable at one-hot values.
    *Cost*: one evaluation.

    Args:
        temperature: Positive number, tensor or schedule.
        gap: Minimum distance of the drawn logit from the others after the shift, not negative.

    References:
        Training Discrete Deep Generative Models via Gapped Straight-Through Estimator (Fan, Chi,
        Rudnicky, Ramadge, 2022), https://arxiv.org/abs/2206.07235

    Example:
        >>> GappedStraightThrough(0.7)
        GappedStraightThrough(0.7, gap=1.0)
    """

    sites = "one-hot"
    families = (is_one_hot,)

    def __init__(self, temperature: Temperature = 0.5, *, gap: float = 1.0) -> None:
        super().__init__(temperature)
        self.gap = check_number("GappedStraightThrough", "gap", gap, example=1.0)
        if not self.gap >= 0:
            raise ValueError(f"GappedStraightThrough: gap must not be negative; got {gap!r}.")

    def soften(self, logits: Tensor, hard: Tensor) -> Tensor:
        with torch.no_grad():
            top = logits.amax(-1, keepdim=True)
            shift = torch.where(hard > 0, top - logits, -(logits + self.gap - top).clamp(min=0))
        return softmax(self._tempered(logits + shift, self.temperature))


class ReinMax(OneHotEstimator):
    r"""The second-order straight-through estimator, by Heun's instead of Euler's method.

    .. math::
        \hat g = 2 J(\pi_D)\, \nabla_D f(D) - \tfrac12 J(\pi)\, \nabla_D f(D), \qquad
        \pi_D = \tfrac12 (\mathrm{softmax}(\phi / \tau) + D)

    *Unbiased*: no, but exact at ``temperature=1`` for costs quadratic in the one-hot. *Requires*:
    a cost differentiable at one-hot values. *Cost*: one evaluation.

    Args:
        temperature: Positive number, tensor or schedule. Values above one reduce the variance and
            increase the bias.

    References:
        Bridging Discrete and Backpropagation: Straight-Through and Beyond (Liu, Dong, Liu, Yu,
        Gao, 2023), https://arxiv.org/abs/2304.08612

    Example:
        >>> ReinMax(1.3)
        ReinMax(1.3)
    """

    def soften(self, logits: Tensor, hard: Tensor) -> Tensor:
        midpoint = reinmax_midpoint(self._tempered(logits.detach(), self.temperature), hard)
        return 2 * softmax_at(midpoint, logits) - 0.5 * softmax(logits)


def reinmax_midpoint(tempered: Tensor, hard: Tensor) -> Tensor:
    """Return the mean of the (tempered) softmax and the draw."""
    return (softmax(tempered) + hard) / 2


def softmax_at(probs: Tensor, logits: Tensor) -> Tensor:
    """Return ``probs`` with the Jacobian, in ``logits``, of a softmax of value ``probs``."""
    smallest = torch.finfo(probs.dtype).tiny
    anchor = probs.clamp(min=smallest).log()
    finite = logits.clamp(min=torch.finfo(logits.dtype).min)
    return softmax(anchor + (finite - finite.detach()))
