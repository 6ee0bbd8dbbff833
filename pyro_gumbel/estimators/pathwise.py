"""Gradients through the value itself, where the distribution is reparameterised."""

from __future__ import annotations

import torch
from pyro.distributions import Delta
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import TransformedDistribution, constraints

from pyro_gumbel.distributions._score_parts import has_score_parts
from pyro_gumbel.distributions.families import (
    from_noise,
    has_law_of,
    is_normal,
    log_mass,
)
from pyro_gumbel.estimators.base import Estimator, Site
from pyro_gumbel.estimators.baselines import LeaveOneOut

__all__ = ["Pathwise", "has_score_of_mean_zero", "path_of_score"]


class Pathwise(Estimator):
    r"""The reparameterised gradient.

    .. math:: \nabla_\phi\, E_{q_\phi}[f(z)] = E_\epsilon[\nabla_\phi f(g_\phi(\epsilon))]

    Distributions whose draws are accepted or rejected (Pyro's ``Rejector``, or others with
    ``score_parts``) leave to the score function what the density of the accepted noise adds.

    *Unbiased*: yes. *Requires*: a distribution with ``rsample`` and a cost differentiable in the
    value. *Costs*: one evaluation.

    Args:
        sticking_the_landing: Drop the part of ``log q``'s gradient that passes through its
            parameters alone. Its mean is zero; without it the gradient's variance vanishes where
            a guide of one site equals the posterior. It is kept where a bound of the support is
            learnt (``Uniform(low, high)``), as its mean is not zero there. Costs one more
            evaluation of ``log q``, which needs the inverse of a flow.

    References:
        Auto-Encoding Variational Bayes (Kingma, Welling, 2014), https://arxiv.org/abs/1312.6114;
        Sticking the Landing (Roeder, Wu, Duvenaud, 2017), https://arxiv.org/abs/1703.09194;
        Reparameterization Gradients through Acceptance-Rejection Sampling Algorithms (Naesseth,
        Ruiz, Linderman, Blei, 2017), https://arxiv.org/abs/1610.05683

    Example:
        >>> Pathwise(sticking_the_landing=True)
        Pathwise(sticking_the_landing=True)
    """

    unbiased = True
    sites = "a reparameterised site (has rsample)"
    pathwise = True

    def __init__(self, *, sticking_the_landing: bool = False) -> None:
        super().__init__()
        self.sticking_the_landing = sticking_the_landing

    def supports(self, fn: Distribution) -> bool:
        return fn.has_rsample

    def draw(self, fn: Distribution) -> Tensor:
        return fn.rsample()

    def shares_noise(self, fn: Distribution) -> bool:
        return is_normal(fn)

    def draw_from_noise(self, fn: Distribution, noise: Tensor) -> Tensor:
        return from_noise(fn, noise)

    def log_prob(self, fn: Distribution, value: Tensor) -> Tensor:
        if self.sticking_the_landing and has_score_of_mean_zero(fn):
            return log_mass(fn, value).detach() + path_of_score(fn, value, instead="Pathwise()")
        return score_given(fn, value, instead="vectorize_particles=False")

    def surrogate(self, site: Site) -> Tensor | None:
        """Charge the noise with the cost, where its density depends on the parameters too."""
        if not has_score_parts(site.fn):
            return None
        # Of mean zero without the cost, as any log-density, so that a baseline may be had.
        baseline, _ = LeaveOneOut()(site)
        return (site.cost[0] - baseline) * site.score_function


def has_score_of_mean_zero(fn: Distribution) -> bool:
    """Return whether dropping the score of ``fn`` leaves a gradient unbiased.

    A Delta's log_density is the Jacobian of a value drawn upstream, and so part of the path. Where
    a bound of the support is learnt, the density at the bound adds to the score's mean.
    """
    if has_law_of(fn, Delta):
        return False
    if type(fn).support is not TransformedDistribution.support:
        return not any(bound.requires_grad for bound in _bounds(fn))
    edges = [_transformed(fn, bound) for bound in _bounds(fn.base_dist)]
    return not any(edge.requires_grad and bool(edge.isfinite().any()) for edge in edges)


def _bounds(fn: Distribution) -> list[Tensor]:
    """The bounds of a support's coordinates, where it has any."""
    try:
        support = fn.support
    except NotImplementedError:
        return []
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    bounds = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    return [torch.as_tensor(bound) for bound in bounds if bound is not None]


def _transformed(fn: TransformedDistribution, bound: Tensor) -> Tensor:
    edge = bound.expand(fn.base_dist.batch_shape + fn.base_dist.event_shape)
    for transform in fn.transforms:
        edge = transform(edge)
    return edge


def path_of_score(fn: Distribution, value: Tensor, *, instead: str) -> Tensor:
    """A tensor of value zero with the gradient of ``log_prob`` in the value alone.

    The gradient passes through the value to what it was drawn by, and not through what it is
    scored by. A transform that caches would score the noise in the value's place, so the value is
    scored as if it had been given.

    Raises:
        ValueError: If the distribution scores nothing but its own draws; write ``instead``.
    """
    if not value.requires_grad:
        return torch.zeros((), dtype=value.dtype, device=value.device)
    given = value.detach().requires_grad_()
    with torch.enable_grad():
        score = score_given(fn, given, instead=instead).sum()
    if not score.requires_grad:
        return torch.zeros_like(score)
    (slope,) = torch.autograd.grad(score, given, allow_unused=True, materialize_grads=True)
    return sum_rightmost(slope * (value - value.detach()), fn.event_dim)


def score_given(fn: Distribution, value: Tensor, *, instead: str) -> Tensor:
    """Score a value that need not be the tensor that ``fn`` drew last.

    Raises:
        ValueError: If a transform without an inverse would be needed; write ``instead``.
    """
    try:
        return log_mass(fn, value)
    except (KeyError, NotImplementedError) as error:
        if not isinstance(fn, TransformedDistribution):
            raise
        transforms = ", ".join(type(transform).__name__ for transform in fn.transforms)
        raise ValueError(
            f"{transforms} has no inverse and scores only the tensor that it drew last. Write "
            f"{instead}, or a flow that has an inverse."
        ) from error
