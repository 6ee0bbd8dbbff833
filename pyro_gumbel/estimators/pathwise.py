"""Gradients through the value itself, where the distribution is reparameterised."""

from __future__ import annotations

from pyro.distributions import Delta
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor
from torch.distributions import Normal

from pyro_gumbel.distributions.families import log_mass, shared_noise_draw
from pyro_gumbel.estimators.base import Estimator

__all__ = ["Pathwise"]


class Pathwise(Estimator):
    r"""The reparameterised gradient.

    .. math:: \nabla_\phi\, E_{q_\phi}[f(z)] = E_\epsilon[\nabla_\phi f(g_\phi(\epsilon))]

    *Unbiased*: yes. *Requires*: a distribution with ``rsample`` and a cost differentiable in the
    value. *Costs*: one evaluation.

    Args:
        sticking_the_landing: Drop the part of ``log q``'s gradient that passes through its
            parameters alone. Its mean is zero; without it the gradient's variance vanishes where
            a guide of one site equals the posterior. One more evaluation of ``log q``.

    References:
        Auto-Encoding Variational Bayes (Kingma, Welling, 2014), https://arxiv.org/abs/1312.6114;
        Sticking the Landing (Roeder, Wu, Duvenaud, 2017), https://arxiv.org/abs/1703.09194

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

    def draw_shared(self, fn: Distribution, dim: int, copies: int) -> Tensor | None:
        return shared_noise_draw(fn, dim, copies) if isinstance(fn, Normal) else None

    def log_prob(self, fn: Distribution, value: Tensor) -> Tensor:
        log_prob = log_mass(fn, value)
        # A Delta's log_density is the Jacobian of a value drawn upstream, not a score.
        if not self.sticking_the_landing or isinstance(fn, Delta):
            return log_prob
        score = log_mass(fn, value.detach())
        return log_prob - (score - score.detach())
