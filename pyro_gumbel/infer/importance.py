"""The importance-weighted bound for discrete and reparameterised sites."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyro_gumbel.distributions.families import has_score_parts, unwrap
from pyro_gumbel.estimators import Call, Estimator, Pathwise, Route, Score
from pyro_gumbel.infer._dependence import Dependence
from pyro_gumbel.infer._doubly_reparameterized import (
    doubly_reparameterize,
    feeding_through_jumps,
)
from pyro_gumbel.infer._log_weights import LogWeights, filled, vimco_signal
from pyro_gumbel.infer._preflight import Plan
from pyro_gumbel.infer._run import Run
from pyro_gumbel.infer._site_view import Passes
from pyro_gumbel.infer.particle_elbo import ParticleELBO

__all__ = ["ImportanceWeighted_ELBO"]


class ImportanceWeighted_ELBO(ParticleELBO):  # noqa: N801
    r"""The importance-weighted (IWAE) bound on the evidence.

    .. math::
        \mathcal L_K = E\Bigl[\log \frac1K \sum_k w_k\Bigr], \qquad
        w_k = \frac{p_\theta(x, z_k)}{q_\phi(z_k)}

    Each element of the plates that contain all sites has its own bound, such as each datum of a
    variational auto-encoder. The value is their sum, scaled for subsampling. All other scales are
    inside the logarithm, as in Pyro's ``RenyiELBO``. ``poutine.scale`` tempers the weights. In a
    subsampled plate that does not contain all sites, the weights are estimates, and the value may
    exceed the evidence.

    Reparameterised and straight-through sites differentiate the bound. Score-function sites, and
    the score terms of rejection sampling (``score_parts``), use VIMCO. Its signal is the
    contribution of particle ``k`` to the bound:

    .. math::
        \Bigl(\mathcal L_K - \log \frac1K \bigl(\textstyle\sum_{j \ne k} w_j + \hat w_k\bigr)\Bigr)
        \nabla \log q_\phi(z_k), \qquad \log \hat w_k = \frac{1}{K-1} \sum_{j \ne k} \log w_j

    :math:`\hat w_k` omits particles of weight zero.

    *Unbiased*: yes, at score-function and reparameterised sites. *Cost*: one evaluation per
    particle.

    Args:
        num_particles: Number ``K`` of importance samples.
        doubly_reparameterized: At reparameterised sites, omit the score and weight the path by
            :math:`\tilde w_k^2`, so that the gradient's signal-to-noise ratio does not vanish as
            ``K`` grows. If scales and masks give :math:`\log q` the coefficient ``c``, the weight
            is :math:`\tilde w_k - c\,(\tilde w_k - \tilde w_k^2)`. A site keeps the plain gradient
            if the distribution of a later site of the guide depends on its value, or if a bound
            of its support is learnt. This costs another evaluation of :math:`\log q`, which needs
            the inverse of a flow.
        **kwargs: As for :class:`~pyro_gumbel.infer.Estimator_ELBO`, without ``analytic_kl``.

    Raises:
        TypeError: If ``analytic_kl`` is given.
        ValueError: When run, with the site's name, if the site's estimator has no
            importance-weighted form, if a score-function site has a single particle, or if
            ``doubly_reparameterized=True`` and a flow has no inverse.

    References:
        Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2016),
        https://arxiv.org/abs/1509.00519; VIMCO: Mnih, Rezende (2016),
        https://arxiv.org/abs/1602.06725; Doubly Reparameterized Gradient Estimators (Tucker,
        Lawson, Gu, Maddison, 2019), https://arxiv.org/abs/1810.04152

    Example:
        >>> ImportanceWeighted_ELBO(5, doubly_reparameterized=True).num_particles
        5
    """

    def __init__(
        self, num_particles: int, *, doubly_reparameterized: bool = False, **kwargs: Any
    ) -> None:
        if "analytic_kl" in kwargs:
            raise TypeError(
                "ImportanceWeighted_ELBO does not support analytic_kl, since its weights need "
                "log p and log q of each draw. Remove it, or use Estimator_ELBO(analytic_kl=True)."
            )
        super().__init__(num_particles, **kwargs)
        self.doubly_reparameterized = doubly_reparameterized
        self.full_scores = True  # inside the logarithm the mean score of q is not zero

    def _value(self, paths: Passes) -> Tensor:
        return LogWeights(_mains(paths)).bound().sum()

    def _estimate(self, paths: Passes, call: Call) -> tuple[Tensor, Tensor]:
        self._check(paths)
        weights = LogWeights(_mains(paths))
        if self.doubly_reparameterized:
            weights = doubly_reparameterize(weights, self.plan(call).feeding)
        bound = weights.bound().sum()
        return bound, bound + _scores(weights)

    def _restricts_cost(self, estimator: Estimator) -> bool:
        return self.doubly_reparameterized or super()._restricts_cost(estimator)

    def _examine(self, plan: Plan, run: Run, dependence: Dependence) -> None:
        super()._examine(plan, run, dependence)
        plan.feeding |= feeding_through_jumps(run, dependence)

    def _check(self, paths: Passes) -> None:
        for name, estimator in paths.estimators.items():
            if isinstance(estimator, Score):
                own = (self._auto.leave_one_out, self._auto.moving_average)
                if estimator.baseline is not None and estimator not in own:
                    raise ValueError(
                        f"At site {name!r}, ImportanceWeighted_ELBO uses its own baseline (VIMCO) "
                        f"and does not support {estimator.baseline!r}; write Score()."
                    )
                if self.num_particles < 2:
                    raise ValueError(
                        f"At site {name!r}, VIMCO needs num_particles >= 2; got 1. Write "
                        "ImportanceWeighted_ELBO(2), or Estimator_ELBO() for a single sample."
                    )
            elif getattr(estimator, "sticking_the_landing", False):
                raise ValueError(
                    f"At site {name!r}, sticking the landing is biased under importance weights; "
                    "write Pathwise() and ImportanceWeighted_ELBO(..., "
                    "doubly_reparameterized=True)."
                )
            elif estimator.route is not Route.PATHWISE or estimator.relaxed:
                raise ValueError(
                    f"At site {name!r}, {estimator!r} has no importance-weighted form. Use "
                    "Score() (VIMCO), a straight-through estimator such as ReinMax(), or, at a "
                    "reparameterised site, Pathwise()."
                )


def _mains(paths: Passes) -> list[Run]:
    """Return the runs of the main path: one of all particles, or one per particle."""
    return [group[0] for group in paths.groups]


def _scores(weights: LogWeights) -> Tensor:
    """Sum VIMCO's signal times the score over sites without a pathwise gradient."""
    total = weights.value.new_zeros(())
    scored = [[name for name in run.estimators if _is_scored(run, name)] for run in weights.runs]
    if not any(scored):
        return total
    signals = weights.by_run(vimco_signal(weights))
    for run, names, signal in zip(weights.runs, scored, signals, strict=True):
        for name in names:
            score = run.layout.split(weights.common(run.draw_score(name), run))[0]
            total = total + (signal * filled(score, signal.dim())).sum()
    return total


def _is_scored(run: Run, name: str) -> bool:
    estimator = run.estimators[name]
    if isinstance(estimator, Pathwise):
        return has_score_parts(unwrap(run.guide[name]["fn"]))
    return isinstance(estimator, Score)
