"""Unbiased gradients with control variates from relaxed draws that share the noise."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor, nn

from pyro_gumbel.distributions._numerics import perturb
from pyro_gumbel.distributions.families import from_one_hot, is_bit, one_hot_logits
from pyro_gumbel.distributions.one_hot import one_hot_argmax
from pyro_gumbel.estimators.base import Branches, Site
from pyro_gumbel.estimators.control_variates import DifferentiatingEstimator, lower, mean_of
from pyro_gumbel.estimators.rao_blackwell import conditional_scores
from pyro_gumbel.estimators.schedules import check_temperature

__all__ = ["Rebar", "Relax"]


class Rebar(DifferentiatingEstimator):
    r"""The cost at a relaxed draw as a control variate for the cost at the hard draw.

    With :math:`z = \phi + G`, :math:`b = \mathrm{onehot}(\arg\max z)`, :math:`\tilde z \sim p(z
    \mid b)` and :math:`c(z) = \eta\, f(\mathrm{softmax}(z / \lambda))`,

    .. math::
        \hat g = (f(b) - c(\tilde z))\, \nabla \log q(b) + \nabla_\phi c(z) - \nabla_\phi c(\tilde
        z)

    *Unbiased*: yes, for every :math:`\eta, \lambda`. *Requires*: one-hot or Bernoulli sites and a
    cost that is defined and differentiable at relaxed values. *Cost*: three evaluations and
    another backward pass; with ``learn``, second derivatives.

    Args:
        temperature: Initial value of :math:`\lambda`, a positive number.
        learn: Train :math:`\eta`, initially one, and :math:`\lambda` to reduce the variance, by
            the user's optimiser.

    Raises:
        ValueError: At a site, if the model uses relaxed values without a gradient, such as by an
            index.

    References:
        REBAR: Low-variance, unbiased gradient estimates for discrete latent variable models
        (Tucker, Mnih, Maddison, Lawson, Sohl-Dickstein, 2017), https://arxiv.org/abs/1703.07370

    Example:
        >>> Rebar(0.5)
        Rebar(0.5, learn=True)
    """

    num_values = 3
    branches = Branches.RELAXED
    needs_smooth_cost = True
    draws_from_logits = True

    def __init__(self, temperature: float = 0.5, *, learn: bool = True) -> None:
        super().__init__()
        name = type(self).__name__
        self.temperature = check_temperature(name, "temperature", temperature, kinds=("number",))
        self.learn = learn
        self.log_temperature = nn.Parameter(torch.tensor(math.log(self.temperature)))
        self.scale = nn.Parameter(torch.ones(()))
        self.requires_grad_(learn)

    def draw(self, fn: Distribution) -> Tensor:
        log_probs = one_hot_logits(fn).log_softmax(-1)
        scores = perturb(log_probs)
        hard = one_hot_argmax(scores, scores.dtype)
        given = conditional_scores(log_probs, hard)
        temperature = self.log_temperature.exp().to(log_probs.dtype)
        soft = (torch.stack([scores, given]) / temperature).softmax(-1)
        return from_one_hot(fn, torch.cat([hard[None], soft]))

    def surrogate(self, site: Site) -> Tensor:
        cost = site.live_cost[2] if self.learn else site.cost[2]
        scale = self.scale.to(cost.dtype)
        control = scale * cost
        relaxed_elbo = site.totals.sum(1) + site.later_scores
        difference = scale * (relaxed_elbo[1] - relaxed_elbo[2])
        extra = self._extra(site)
        if extra is not None:
            control = control + extra[1]
            difference = difference + (extra[0] - extra[1]).sum()
        relaxed = site.logits_gradients(difference, create_graph=self.learn)
        advantage = site.cost[0] - control
        logits = site.logits[..., 0] if is_bit(site.fn) else site.logits
        surrogate = (advantage.detach() * site.log_prob).sum() + (relaxed.detach() * logits).sum()
        if not self.learn:
            return surrogate
        score = (site.values[0] - mean_of(site)).detach()
        estimate = site.per_event(advantage) * score + _project(site, relaxed)
        return surrogate + lower((estimate**2).sum(), list(self.parameters()))

    def _extra(self, site: Site) -> Tensor | None:
        """Return the term added to ``c(z)`` and ``c(z~)``, ``(2, R) + batch_shape``, or None."""
        return None


class Relax(Rebar):
    r"""REBAR with a network added to its control variate.

    .. math:: c(z) = \eta\, f(\mathrm{softmax}(z / \lambda)) + r(\mathrm{softmax}(z / \lambda))

    *Unbiased*: yes, for every network. *Requires*: as :class:`Rebar`. *Cost*: as :class:`Rebar`,
    and two evaluations of the network.

    Args:
        critic: The network ``r``, from relaxed values, ``(R,) + batch_shape + event_shape``, to
            ``(R,) + batch_shape``, with or without a trailing one.
        temperature: Initial temperature, a positive number.
        learn: Train network, scale and temperature to reduce the variance, by the user's
            optimiser.

    Raises:
        ValueError: At a site, if the critic's output has a wrong shape, or as for :class:`Rebar`.

    References:
        Backpropagation through the Void (Grathwohl, Choi, Wu, Roeder, Duvenaud, 2018),
        https://arxiv.org/abs/1711.00123

    Example:
        >>> Relax(nn.Linear(3, 1)).unbiased
        True
    """

    def __init__(self, critic: nn.Module, *, temperature: float = 0.5, learn: bool = True) -> None:
        super().__init__(temperature, learn=learn)
        if not isinstance(critic, nn.Module):
            raise TypeError(
                "Relax: critic must be a torch.nn.Module that maps relaxed values to one number "
                f"for each element of the batch; got {critic!r}."
            )
        self.critic = critic
        if not learn:
            critic.requires_grad_(False)

    def _extra(self, site: Site) -> Tensor:
        return torch.stack([self._criticise(site, value) for value in site.values[1:]])

    def _criticise(self, site: Site, value: Tensor) -> Tensor:
        weight = next(self.critic.parameters(), value)  # in float32 for half precision
        output: Any = self.critic(value.to(weight.dtype))
        shape = site.cost.shape[1:]
        if output.shape == (*shape, 1):
            output = output.squeeze(-1)
        if output.shape != shape:
            raise ValueError(
                f"At site {site.name!r}, Relax: the critic returned shape {tuple(output.shape)} "
                f"for values of shape {tuple(value.shape)}; it must return one number for each "
                f"element, {tuple(shape)} or {(*shape, 1)}. If the event has two dimensions, end "
                "the critic with nn.Flatten(-2) and Linear(..., 1)."
            )
        return output


def _project(site: Site, gradient: Tensor) -> Tensor:
    """Convert a gradient in normalised log-probabilities to one in unnormalised logits."""
    if is_bit(site.fn):
        return gradient
    probs = site.logits.detach().softmax(-1)
    return gradient - probs * gradient.sum(-1, keepdim=True)
