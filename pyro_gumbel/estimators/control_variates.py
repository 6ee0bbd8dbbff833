"""Unbiased score-function gradients with control variates from the cost's gradient."""

from __future__ import annotations

from typing import ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor, nn

from pyro_gumbel._validate import integer
from pyro_gumbel.distributions._numerics import noise_dtype
from pyro_gumbel.distributions.families import (
    from_one_hot,
    is_bit,
    is_one_hot,
    log_mass_of_value,
    one_hot_logits,
    sample_detached,
)
from pyro_gumbel.estimators.base import Branches, Estimator, Families, Route, Site

__all__ = ["DoubleControlVariate", "MuProp", "Rodeo", "lower"]


class DifferentiatingEstimator(Estimator):
    """Base of estimators that differentiate the cost in one-hot or Bernoulli values."""

    unbiased = True
    sites = "one-hot or Bernoulli"
    families: ClassVar[Families] = (is_one_hot, is_bit)
    route = Route.COST_GRADIENT

    def log_prob(self, fn: Distribution, value: Tensor) -> Tensor:
        return log_mass_of_value(fn, value)


class MuProp(DifferentiatingEstimator):
    r"""The first-order expansion of the cost around the mean as a control variate.

    .. math::
        \hat g = \bigl(f(b) - f(\mu) - \nabla f(\mu)^\top (b - \mu)\bigr) \nabla \log q(b)
        + \nabla_\phi\, \mu^\top \nabla f(\mu)

    *Unbiased*: yes. *Requires*: one-hot or Bernoulli sites and a cost differentiable at the mean,
    which is outside the site's support. *Cost*: two evaluations and another backward pass.

    References:
        MuProp: Unbiased Backpropagation for Stochastic Neural Networks (Gu, Levine, Sutskever,
        Mnih, 2016), https://arxiv.org/abs/1511.05176

    Example:
        >>> MuProp()
        MuProp()
    """

    num_values = 2
    branches = Branches.RELAXED

    def draw(self, fn: Distribution) -> Tensor:
        mean = from_one_hot(fn, one_hot_logits(fn).detach().softmax(-1))
        return torch.stack([sample_detached(fn), mean]).requires_grad_()

    def surrogate(self, site: Site) -> Tensor:
        grad = site.value_gradients()[1]
        value, mean = site.values.detach()
        linear = _sum_event(grad * (value - mean), site)
        advantage = site.cost[0] - site.cost[1] - linear
        score = (advantage * site.log_prob).sum()
        return score + (grad * mean_of(site)).sum()


class _LeaveOneOut(DifferentiatingEstimator):
    """Base of estimators with independent draws, which train their coefficients if ``learn``."""

    def __init__(self, num_samples: int, learn: bool) -> None:
        super().__init__()
        name = f"{type(self).__name__}: num_samples"
        self.num_samples = self.num_values = integer(name, num_samples, 2, ValueError)
        self.learn = learn

    def draw(self, fn: Distribution) -> Tensor:
        return independent_draws(fn, self.num_samples).requires_grad_()


class DoubleControlVariate(_LeaveOneOut):
    r"""Leave-one-out with costs corrected by the cost's gradients at the *other* samples.

    .. math::
        c_k = \alpha\, \bar\nabla_{-k}^\top (b_k - \theta), \qquad
        \hat g = \tfrac1K \sum_k \Bigl(f_k + c_k - \tfrac{1}{K-1} \sum_{j \ne k} (f_j + c_j)\Bigr)
        \nabla \log q(b_k) - \alpha\, \nabla_\phi\, \theta^\top \bar\nabla

    with :math:`\bar\nabla_{-k}` the mean of the cost's gradients at the other samples. *Unbiased*:
    yes, for every :math:`\alpha`. *Requires*: one-hot or Bernoulli sites and a cost differentiable
    at their values. *Cost*: ``num_samples`` evaluations and another backward pass.

    Args:
        num_samples: Number ``K`` of independent draws, at least 2.
        learn: Train :math:`\alpha` to reduce the variance, by the user's optimiser. It starts at
            zero, which is plain leave-one-out.

    References:
        Double Control Variates for Gradient Estimation in Discrete Latent Variable Models
        (Titsias, Shi, 2022), https://arxiv.org/abs/2111.05300

    Example:
        >>> DoubleControlVariate(2)
        DoubleControlVariate(2, learn=True)
    """

    def __init__(self, num_samples: int = 2, *, learn: bool = True) -> None:
        super().__init__(num_samples, learn)
        self.alpha = nn.Parameter(torch.zeros(()), requires_grad=learn)

    def surrogate(self, site: Site) -> Tensor:
        grads = site.value_gradients()
        # Sums of the large gradients of impossible values overflow in half precision.
        grads = grads.to(noise_dtype(grads.dtype))
        values = site.values.detach()
        mean = mean_of(site)
        deviation = values - mean.detach()
        others = (grads.sum(0) - grads) / (self.num_samples - 1)
        correction = _sum_event(others * deviation, site)
        plain, change = (_leave_one_out(cost) for cost in (site.cost, correction))
        alpha = self.alpha.detach()
        scores = _log_probs(site, values)
        surrogate = ((plain + alpha * change) * scores).mean(0).sum()
        surrogate = surrogate - alpha * (grads.mean(0) * mean).sum()
        if not self.learn:
            return surrogate
        fixed = (site.per_event(plain) * deviation).mean(0)
        moving = (site.per_event(change) * deviation).mean(0) - _jacobian_product(
            site, grads.mean(0)
        )
        loss = ((fixed + self.alpha * moving) ** 2).sum()
        return surrogate + lower(loss, [self.alpha])


class Rodeo(_LeaveOneOut):
    r"""Leave-one-out with discrete Stein operators as control variates.

    For sample ``k`` a small network :math:`h = (h^1, h^2)` reads the other samples' linearised
    costs. The operator :math:`(A h)(x) = \frac1D \sum_i q(\bar x_i) (h(\bar x^{(i)}) - h(x))`, in
    which :math:`\bar x^{(i)}` has variable ``i`` flipped, makes functions of mean zero:

    .. math::
        \hat g = \tfrac1K \sum_k \Bigl(f_k - \tfrac{1}{K-1} \sum_{j \ne k} (f_j + \alpha (A
        h^1_{-j})(b_j)) \Bigr) (b_k - \theta) + \beta\, (A\, h^2_{-k} (\cdot - \theta))(b_k)

    *Unbiased*: yes, for every network. *Requires*: Bernoulli sites and a cost differentiable at
    their values. *Cost*: ``num_samples`` evaluations, another backward pass, and one evaluation of
    the network for each variable.

    Args:
        num_samples: Number ``K`` of independent draws, at least 2.
        learn: Train :math:`\alpha, \beta` and the network to reduce the variance, by the user's
            optimiser. :math:`\alpha, \beta` start at zero, which is plain leave-one-out.
        hidden: Width of the network, at least 1.

    References:
        Gradient Estimation with Discrete Stein Operators (Shi, Zhou, Hwang, Titsias, Mackey,
        2022), https://arxiv.org/abs/2202.09497

    Example:
        >>> Rodeo(2)
        Rodeo(2, learn=True, hidden=100)
    """

    sites = "Bernoulli"
    families = (is_bit,)

    def __init__(self, num_samples: int = 2, *, learn: bool = True, hidden: int = 100) -> None:
        super().__init__(num_samples, learn)
        self.hidden = integer("Rodeo: hidden", hidden, 1, ValueError)
        self.scales = nn.Parameter(torch.zeros(2))
        self.network = nn.Sequential(
            nn.Linear(2, self.hidden), nn.LeakyReLU(0.3), nn.Linear(self.hidden, 2)
        )
        self.requires_grad_(learn)

    def surrogate(self, site: Site) -> Tensor:
        logits = _flatten_event(site.logits[..., 0], site)
        probs = logits.detach().sigmoid()
        values = _flatten_event(site.values.detach(), site)
        grads = _flatten_event(site.value_gradients(), site)
        deviation = values - probs
        first, second = self._stein(values, probs, grads, site.cost)
        plain = _leave_one_out(site.cost)
        shift = -(first.sum(0) - first) / (self.num_samples - 1)
        alpha, beta = self.scales.to(logits.dtype)
        advantage = plain + alpha * shift
        estimate = (advantage.unsqueeze(-1) * deviation + beta * second).mean(0)
        surrogate = (estimate.detach() * logits).sum()
        if not self.learn:
            return surrogate
        return surrogate + lower((estimate**2).sum(), list(self.parameters()))

    def _stein(
        self, values: Tensor, probs: Tensor, grads: Tensor, cost: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return ``A h1``, ``(K, R) + batch_shape``, and ``A h2 (x - theta)``, ``(..., D)``."""
        flip = torch.where(values > 0, 1 - probs, probs)  # probability of the other value
        turn = 1 - 2 * values
        scale = 1 / (values.shape[-1] * (self.num_samples - 1))
        firsts, seconds = [], []
        for k in range(self.num_samples):
            first, second = torch.zeros_like(cost[k]), torch.zeros_like(values[k])
            for j in range(self.num_samples):
                if j == k:
                    continue
                linear = (grads[j] * (values[k] - values[j])).sum(-1, keepdim=True)
                here = self._network(linear, cost[j])
                there = self._network(linear + grads[j] * turn[k], cost[j])
                change = flip[k] * (there - here).movedim(-1, 0)  # (2, R, ..., D)
                first = first + change[0].sum(-1)
                second = second + flip[k] * turn[k] * there[..., 1]
                second = second + (values[k] - probs) * change[1].sum(-1, keepdim=True)
            firsts.append(first * scale)
            seconds.append(second * scale)
        return torch.stack(firsts), torch.stack(seconds)

    def _network(self, linear: Tensor, cost: Tensor) -> Tensor:
        inputs = torch.stack(torch.broadcast_tensors(linear, cost.unsqueeze(-1)), -1)
        return self.network(inputs.to(self.scales.dtype)).to(linear.dtype)


def independent_draws(fn: Distribution, count: int) -> Tensor:
    """Draw ``count`` values without gradient, stacked along a new first dimension."""
    return torch.stack([sample_detached(fn) for _ in range(count)])


def lower(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    """Return a zero term of a surrogate that only trains ``parameters``, to lower ``loss``."""
    gradients = torch.autograd.grad(
        loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    pairs = zip(parameters, gradients, strict=True)
    total = -torch.stack([(parameter * gradient).sum() for parameter, gradient in pairs]).sum()
    return total - total.detach()


def _leave_one_out(cost: Tensor) -> Tensor:
    """Return each cost minus the mean of the others."""
    count = cost.shape[0]
    return (cost - cost.mean(0)) * (count / (count - 1))


def mean_of(site: Site) -> Tensor:
    """Return the mean of the site, with gradient, shaped like one value."""
    probs = site.logits.softmax(-1)
    return probs[..., 0] if is_bit(site.fn) else probs


def _log_probs(site: Site, values: Tensor) -> Tensor:
    """Return ``log q`` of the coupled values, ``(K, R) + batch_shape``, with gradient."""
    log_probs = site.logits.log_softmax(-1)
    if is_bit(site.fn):
        values = torch.stack([values, 1 - values], -1)
    score = torch.where(values > 0, log_probs, 0.0).sum(-1)
    return _sum_joined(score, site)


def _sum_event(tensor: Tensor, site: Site) -> Tensor:
    """Sum a tensor shaped like the values over the event."""
    return _sum_joined(tensor if is_bit(site.fn) else tensor.sum(-1), site)


def _sum_joined(tensor: Tensor, site: Site) -> Tensor:
    return _flatten_event(tensor, site).sum(-1)


def _flatten_event(tensor: Tensor, site: Site) -> Tensor:
    """Join the event's dimensions of a tensor of a Bernoulli site into one, the last."""
    if not site.event_dims:
        return tensor.unsqueeze(-1)
    return tensor.flatten(tensor.dim() - site.event_dims)


def _jacobian_product(site: Site, vector: Tensor) -> Tensor:
    """Multiply the Jacobian of the site's mean in its logits with ``vector``."""
    probs = mean_of(site).detach()
    if is_bit(site.fn):
        return probs * (1 - probs) * vector
    return probs * (vector - (probs * vector).sum(-1, keepdim=True))
