"""Unbiased score-function gradients from antithetic draws."""

from __future__ import annotations

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor
from torch.nn.functional import pad

from pyro_gumbel._validate import integer
from pyro_gumbel.distributions._numerics import uniform_noise
from pyro_gumbel.distributions.families import (
    bit_probs,
    from_index,
    is_bit,
    is_categorical,
    is_one_hot,
    one_hot_logits,
    to_index,
    value_dtype,
)
from pyro_gumbel.estimators.base import Estimator, Site

__all__ = ["ARMS", "DisARM", "DisARMTree"]


class DisARM(Estimator):
    r"""Antithetic pairs of Bernoulli draws, with the noise integrated out (also called U2G).

    .. math::
        b = 1[u < \theta],\ \tilde b = 1[1 - u < \theta], \qquad
        \hat g = \tfrac12 (f(b) - f(\tilde b))\,(b - \tilde b)\,\sigma(|\phi|)

    *Unbiased*: yes. *Requires*: Bernoulli sites; any cost. *Cost*: two evaluations.

    References:
        DisARM: An Antithetic Gradient Estimator for Binary Latent Variables (Dong, Mnih, Tucker,
        2020), https://arxiv.org/abs/2006.10680; Yin et al. (2020),
        https://arxiv.org/abs/2006.06448

    Example:
        >>> DisARM()
        DisARM()
    """

    unbiased = True
    sites = "Bernoulli"
    families = (is_bit,)
    num_values = 2

    def draw(self, fn: Distribution) -> Tensor:
        probs = bit_probs(fn)
        noise = uniform_noise(probs.shape, probs.dtype, probs.device)
        return torch.stack([noise < probs, 1 - noise < probs]).to(value_dtype(fn))

    def surrogate(self, site: Site) -> Tensor:
        first, second = site.values
        logits = site.logits[..., 0]
        weight = (first - second) * logits.detach().abs().sigmoid() / 2
        return site.per_variable(site.cost[0] - site.cost[1]) * weight * logits


class ARMS(Estimator):
    r"""Several Bernoulli draws with pairwise negative correlation by a Dirichlet copula.

    .. math::
        \hat g = \frac{\rho}{K - 1} \sum_k (f_k - \bar f)(b_k - \theta), \qquad
        \rho = \frac{\theta (1 - \theta)}{p - P_{11}}, \quad p = \min(\theta, 1 - \theta)

    where :math:`P_{11} = \max(0, 2 p^{1/(K-1)} - 1)^{K-1}` is the probability that two draws both
    take their rarer value. With two samples it equals :class:`DisARM`. *Unbiased*: yes.
    *Requires*: Bernoulli sites; any cost. *Cost*: ``num_samples`` evaluations.

    Args:
        num_samples: Number ``K`` of draws, at least 2.

    References:
        ARMS: Antithetic-REINFORCE-Multi-Sample Gradient for Binary Variables (Dimitriev, Zhou,
        2021), https://arxiv.org/abs/2105.14141

    Example:
        >>> ARMS(4)
        ARMS(4)
    """

    unbiased = True
    sites = "Bernoulli"
    families = (is_bit,)

    def __init__(self, num_samples: int = 4) -> None:
        super().__init__()
        self.num_samples = self.num_values = integer(
            "ARMS: num_samples", num_samples, 2, ValueError
        )

    def draw(self, fn: Distribution) -> Tensor:
        probs = bit_probs(fn)
        noise = -torch.log(
            uniform_noise((self.num_samples, *probs.shape), probs.dtype, probs.device)
        )
        share = noise / noise.sum(0)
        copula = (1 - share) ** (self.num_samples - 1)
        # Dependence is negative for the rarer value, so reflect the copula above one half.
        copula = torch.where(probs > 0.5, 1 - copula, copula)
        return (copula < probs).to(value_dtype(fn))

    def surrogate(self, site: Site) -> Tensor:
        logits = site.logits[..., 0]
        probs = logits.detach().sigmoid()
        rarer = torch.minimum(probs, 1 - probs)
        both = (2 * rarer ** (1 / (self.num_samples - 1)) - 1).clamp(min=0) ** (
            self.num_samples - 1
        )
        # If a variable is certain, rho is 0/0. Its limit is one, and the gradient is zero.
        spread = (rarer - both).clamp(min=torch.finfo(probs.dtype).tiny)
        rho = torch.where(rarer > 0, probs * (1 - probs) / spread, 1.0)
        advantage = site.per_variable(site.cost - site.cost.mean(0)) / (self.num_samples - 1)
        return (advantage * (site.values - probs)).sum(0) * rho * logits


class DisARMTree(Estimator):
    r"""Antithetic pairs of categories, drawn by walks down a balanced binary tree.

    Each node is a Bernoulli variable with logit :math:`\alpha`, the log-odds of its right half.
    The two walks use antithetic noise. With :math:`b, \tilde b` their values at a node,

    .. math::
        \hat g_\alpha = \tfrac12 (f(z) - f(\tilde z)) \cdot
        \begin{cases} (b - \tilde b)\,\sigma(|\alpha|) & \text{on both walks} \\
        b - \sigma(\alpha) & \text{on the first alone} \\
        -(\tilde b - \sigma(\alpha)) & \text{on the second alone} \end{cases}

    *Unbiased*: yes. *Requires*: one-hot or categorical sites; any cost. *Cost*: two evaluations.

    References:
        Coupled Gradient Estimators for Discrete Latent Variables (Dong, Mnih, Tucker, 2021),
        https://arxiv.org/abs/2106.08056

    Example:
        >>> DisARMTree()
        DisARMTree()
    """

    unbiased = True
    sites = "one-hot or categorical"
    families = (is_one_hot, is_categorical)
    num_values = 2

    def draw(self, fn: Distribution) -> Tensor:
        logits = one_hot_logits(fn).detach()
        pair = torch.zeros((2, *logits.shape[:-1]), dtype=torch.long, device=logits.device)
        for alpha in _tree(logits):
            probs = alpha.sigmoid()
            noise = uniform_noise(alpha.shape, alpha.dtype, alpha.device)
            turns = torch.stack([noise < probs, 1 - noise < probs]).long()
            pair = 2 * pair + turns.gather(-1, pair.unsqueeze(-1)).squeeze(-1)
        return from_index(fn, pair)

    def surrogate(self, site: Site) -> Tensor:
        first, second = to_index(site.fn, site.values)
        levels = _tree(site.logits)
        total = torch.zeros((), device=first.device)
        for depth, alpha in enumerate(levels):
            total = total + _level(alpha, first, second, len(levels) - depth)
        return site.per_variable(site.cost[0] - site.cost[1]) / 2 * total


def _tree(logits: Tensor) -> list[Tensor]:
    """Return log-odds of all nodes by level, root first; each level is ``(..., 2^depth)``."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Keep logits finite, so that subtrees of impossible leaves have finite gradients.
    low = torch.finfo(logits.dtype).min / 1e8
    leaves = 1 << max(logits.shape[-1] - 1, 1).bit_length()
    mass = pad(logits.clamp(min=low), (0, leaves - logits.shape[-1]), value=low)
    levels: list[Tensor] = []
    while mass.shape[-1] > 1:
        halves = mass.unflatten(-1, (-1, 2))
        levels.append(halves[..., 1] - halves[..., 0])
        mass = halves.logsumexp(-1)
    return levels[::-1]


def _level(alpha: Tensor, first: Tensor, second: Tensor, height: int) -> Tensor:
    """Return one level's term of the surrogate. Its nodes are ``height`` levels above leaves."""
    nodes = torch.stack([first, second]) >> height
    turns = (torch.stack([first, second]) >> (height - 1)) & 1
    met = alpha.expand(nodes.shape[0], *alpha.shape).gather(-1, nodes.unsqueeze(-1)).squeeze(-1)
    fixed = met.detach()
    both = (turns[0] - turns[1]) * fixed[0].abs().sigmoid() * met[0]
    alone = (turns - fixed.sigmoid()) * met
    return torch.where(nodes[0] == nodes[1], both, alone[0] - alone[1])
