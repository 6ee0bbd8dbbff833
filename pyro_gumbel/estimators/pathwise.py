"""Reparameterised (pathwise) gradients."""

from __future__ import annotations

import torch
from pyro.distributions import Delta
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import TransformedDistribution, constraints

from pyro_gumbel.distributions._base import tensor_of
from pyro_gumbel.distributions.families import (
    from_noise,
    has_law_of,
    has_score_parts,
    is_normal,
    log_mass,
)
from pyro_gumbel.estimators.base import Estimator, Route, Site
from pyro_gumbel.estimators.baselines import LeaveOneOut

__all__ = ["Pathwise", "has_score_of_mean_zero", "path_of_score"]


class Pathwise(Estimator):
    r"""The reparameterised gradient.

    .. math:: \nabla_\phi\, E_{q_\phi}[f(z)] = E_\epsilon[\nabla_\phi f(g_\phi(\epsilon))]

    For distributions with ``score_parts`` (Pyro's ``Rejector``), a score-function term adds the
    gradient of the accepted noise's density. *Unbiased*: yes. *Requires*: a distribution with
    ``rsample`` and a cost differentiable in the value. *Cost*: one evaluation.

    Args:
        sticking_the_landing: Omit the score: the gradient of ``log q`` in its parameters at a
            fixed value. Its mean is zero. Without it the variance vanishes if a guide of one site
            equals the posterior. The score is kept if a bound of the support is learnt, as in
            ``Uniform(low, high)``, because its mean is then not zero. This option costs another
            evaluation of ``log q``. A flow must have an inverse for it.

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
    route = Route.PATHWISE

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
        """Return the score-function term of noise whose density depends on the parameters."""
        if not has_score_parts(site.fn):
            return None
        # The score of a log-density has mean zero, so a baseline is allowed.
        baseline, _ = LeaveOneOut()(site)
        return (site.cost[0] - baseline) * site.score_function


def has_score_of_mean_zero(fn: Distribution) -> bool:
    """Return whether the score of ``fn`` has mean zero, so that it may be omitted."""
    if has_law_of(fn, Delta):  # its log_density may be the Jacobian of a value drawn upstream
        return False
    # If a bound of the support is learnt, the density at the bound enters the score's mean.
    if type(fn).support is not TransformedDistribution.support:
        return not any(bound.requires_grad for bound in _bounds(fn))
    edges = [_transformed(fn, bound) for bound in _bounds(fn.base_dist)]
    return not any(edge.requires_grad and bool(edge.isfinite().any()) for edge in edges)


def _bounds(fn: Distribution) -> list[Tensor]:
    """Return the bounds of a support, if it has any."""
    try:
        support = fn.support
    except NotImplementedError:
        return []
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    bounds = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    like = tensor_of(fn)
    device = None if like is None else like.device
    return [
        bound if isinstance(bound, Tensor) else torch.full((), bound, device=device)
        for bound in bounds
        if bound is not None
    ]


def _transformed(fn: TransformedDistribution, bound: Tensor) -> Tensor:
    edge = bound.expand(fn.base_dist.batch_shape + fn.base_dist.event_shape)
    for transform in fn.transforms:
        edge = transform(edge)
    return edge


def path_of_score(fn: Distribution, value: Tensor, *, instead: str) -> Tensor:
    """Return a zero tensor with the gradient of ``log_prob`` in the value only.

    The gradient passes through the value to the parameters that drew it.
    """
    if not value.requires_grad:
        return torch.zeros((), dtype=value.dtype, device=value.device)
    # Detached, because a transform with a cache would differentiate through its cached input.
    given = value.detach().requires_grad_()
    with torch.enable_grad():
        score = score_given(fn, given, instead=instead).sum()
    if not score.requires_grad:
        return torch.zeros_like(score)
    (grad,) = torch.autograd.grad(score, given, allow_unused=True, materialize_grads=True)
    return sum_rightmost(grad * (value - value.detach()), fn.event_dim)


def score_given(fn: Distribution, value: Tensor, *, instead: str) -> Tensor:
    """Return the log-density of any value; raise ``ValueError`` if a transform has no inverse."""
    try:
        return log_mass(fn, value)
    except (KeyError, NotImplementedError) as error:
        if not isinstance(fn, TransformedDistribution):
            raise
        transforms = ", ".join(type(transform).__name__ for transform in fn.transforms)
        raise ValueError(
            f"{transforms} has no inverse, so it can only score the tensor that it drew last. "
            f"Write {instead}, or use a flow with an inverse."
        ) from error
