"""The score-function estimator."""

from __future__ import annotations

from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor

from pyro_gumbel.estimators.base import Estimator, Site
from pyro_gumbel.estimators.baselines import Baseline

__all__ = ["Score"]


class Score(Estimator):
    r"""The score-function gradient (REINFORCE, likelihood ratio).

    .. math:: \nabla_\phi\, E_{q_\phi}[f(z)] = E_{q_\phi}[(f(z) - b)\, \nabla_\phi \log q_\phi(z)]

    *Unbiased*: yes, for every baseline ``b`` that does not depend on the particle's own draw.
    *Requires*: a ``log_prob`` differentiable in its parameters; any cost. *Cost*: one evaluation
    per particle.

    Args:
        baseline: :class:`LeaveOneOut`, :class:`MovingAverage`, :class:`NeuralBaseline`, or
            ``None``.

    References:
        Simple statistical gradient-following algorithms for connectionist reinforcement learning
        (Williams, 1992); Black Box Variational Inference (Ranganath, Gerrish, Blei, 2014),
        https://arxiv.org/abs/1401.0118

    Example:
        >>> from pyro_gumbel.estimators import LeaveOneOut
        >>> Score(LeaveOneOut())
        Score(LeaveOneOut())
    """

    unbiased = True
    sites = "any site with log_prob"

    def __init__(self, baseline: Baseline | None = None) -> None:
        super().__init__()
        if baseline is not None and not isinstance(baseline, Baseline):
            raise TypeError(
                "Score: baseline must be an object such as LeaveOneOut() or "
                f"MovingAverage(decay=0.9); got {baseline!r}."
            )
        self.baseline = baseline
        self.min_particles = baseline.min_particles if baseline is not None else 1

    def supports(self, fn: Distribution) -> bool:
        return hasattr(fn, "log_prob")

    def surrogate(self, site: Site) -> Tensor:
        cost = site.cost[0]
        if self.baseline is None:
            return cost * site.log_prob
        baseline, loss = self.baseline(site)
        surrogate = (cost - baseline) * site.log_prob
        if loss is None:
            return surrogate
        # The caller averages particles. It maximises the surrogate, so the loss has a minus sign.
        return surrogate.sum() - cost.shape[0] * loss
