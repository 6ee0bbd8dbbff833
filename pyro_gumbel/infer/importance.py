"""The importance-weighted bound, for discrete and for reparameterised sites."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyro_gumbel.distributions._score_parts import has_score_parts
from pyro_gumbel.distributions.families import unwrap
from pyro_gumbel.estimators import Call, Pathwise, Score
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

    There is one bound for each element of the plates that every site is in (for each datum of a
    variational auto-encoder), and their sum, scaled for subsampling, is the value. All other
    scales are inside the logarithm, as in Pyro's ``RenyiELBO``: ``poutine.scale`` tempers the
    weights, and a subsampled plate that some site is outside of makes them estimates, so that the
    value need not bound the evidence.

    Reparameterised and straight-through sites differentiate the bound as it stands. Sites of the
    score function, and what rejection sampling (``score_parts``) leaves to it, use VIMCO, whose
    signal is what particle ``k`` adds to the bound:

    .. math::
        \Bigl(\mathcal L_K - \log \frac1K \bigl(\textstyle\sum_{j \ne k} w_j + \hat w_k\bigr)\Bigr)
        \nabla \log q_\phi(z_k), \qquad \log \hat w_k = \frac{1}{K-1} \sum_{j \ne k} \log w_j

    Particles of weight zero are left out of :math:`\hat w_k`.

    *Unbiased*: yes, at score-function and reparameterised sites. *Costs*: one evaluation a
    particle.

    Args:
        num_particles: Number ``K`` of importance samples.
        doubly_reparameterized: At reparameterised sites, drop the score and weight the path by
            :math:`\tilde w_k^2`, so that the gradient's signal does not vanish as ``K`` grows.
            Where scales and masks give :math:`\log q` the coefficient ``c``, the weight is
            :math:`\tilde w_k - c\,(\tilde w_k - \tilde w_k^2)`. A site keeps the plain gradient
            if the distribution of a later site of the guide depends on its value, or if a bound
            of its support is learnt. Costs one more evaluation of :math:`\log q`, which needs the
            inverse of a flow.
        **kwargs: As for :class:`~pyro_gumbel.infer.Estimator_ELBO`, without ``analytic_kl``.

    Raises:
        TypeError: If ``analytic_kl`` is given: a bound of weights has no such part.
        ValueError: When run, with the site's name, if a site's estimator has no
            importance-weighted form, a score-function site meets a single particle, or a flow
            without an inverse meets ``doubly_reparameterized=True``.

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
                "ImportanceWeighted_ELBO takes no analytic_kl: its weights need each draw's own "
                "log p and log q. Leave it out, or use Estimator_ELBO(analytic_kl=True)."
            )
        super().__init__(num_particles, **kwargs)
        self.doubly_reparameterized = doubly_reparameterized
        self.full_scores = True  # under the logarithm the score of q has no mean of zero

    def _value(self, paths: Passes) -> Tensor:
        return LogWeights(_mains(paths)).bound().sum()

    def _estimate(self, paths: Passes, call: Call) -> tuple[Tensor, Tensor]:
        self._check(paths)
        weights = LogWeights(_mains(paths))
        if self.doubly_reparameterized:
            weights = doubly_reparameterize(weights, self.plan(call).feeding)
        bound = weights.bound().sum()
        return bound, bound + _scores(weights)

    def _check_costs(self, call: Call, plan: Plan, main: Run) -> None:
        super()._check_costs(call, plan, main)
        if self.doubly_reparameterized and not plan.followed:
            run, dependence = self._follow(call, main)
            plan.feeding |= feeding_through_jumps(run, dependence)
            plan.followed = not dependence.reads_values

    def _check(self, paths: Passes) -> None:
        for name, estimator in paths.estimators.items():
            if isinstance(estimator, Score):
                own = (self._auto.leave_one_out, self._auto.moving_average)
                if estimator.baseline is not None and estimator not in own:
                    raise ValueError(
                        f"At site {name!r}, ImportanceWeighted_ELBO has a baseline of its own "
                        f"(VIMCO) and cannot use {estimator.baseline!r}; write Score()."
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
            elif not estimator.pathwise or estimator.relaxed:
                raise ValueError(
                    f"At site {name!r}, {estimator!r} has no importance-weighted form. Use "
                    "Score() (VIMCO), a straight-through estimator such as ReinMax(), or, where "
                    "the site is reparameterised, Pathwise()."
                )


def _mains(paths: Passes) -> list[Run]:
    """The runs of the main path: one of all particles, or one each."""
    return [group[0] for group in paths.groups]


def _scores(weights: LogWeights) -> Tensor:
    """Sum VIMCO's signal times the score of what each site drew without a path."""
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
