"""The evidence lower bound, its gradient passing through each site as the site chose."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyro_gumbel.estimators import Call
from pyro_gumbel.infer._site_view import Passes
from pyro_gumbel.infer.particle_elbo import ParticleELBO

__all__ = ["Estimator_ELBO"]


class Estimator_ELBO(ParticleELBO):  # noqa: N801
    r"""The ELBO of a model and a guide whose sites choose their gradient estimators.

    .. math:: \mathcal L = E_{q_\phi(z)}[\log p_\theta(x, z) - \log q_\phi(z)]

    The value is always an unbiased estimate of the true (discrete) bound, from exact draws and
    exact masses, whichever estimators are attached; only the gradient differs. Estimators are
    attached by :func:`~pyro_gumbel.infer.config_gradient` or by ``infer={"gradient": ...}`` at the
    site.

    Training moves the state of estimators, evaluation does not. A pass that makes a gradient
    advances every schedule and every moving average by one:

    ================================================== ===============
    call                                               moves the state
    ================================================== ===============
    ``SVI.step``, ``loss_and_grads``                   once
    ``differentiable_loss``                            once
    ``elbo(model, guide)`` as a module, in train mode  once
    the same after ``.eval()``                         no
    any of these under ``no_grad``, ``inference_mode`` no
    ``SVI.evaluate_loss``, ``loss``                    no
    ================================================== ===============

    As in Pyro, a site in a plate is taken to influence its own element of the plate alone. Where a
    later site of the guide gathers the elements outside of the plate, and sites of the plate
    depend on that one in turn, write ``.to_event(1)`` in place of the plate.

    Two programs that were not met before run once more, for a *preflight*: it counts their plates,
    checks that they fit one another and finds what each term depends on. It leaves random number
    generators and the buffers of modules as they were.

    Args:
        num_particles: Number of independent repetitions to average over.
        default: Estimator, or name of one, for sites that have none: ``"auto"`` is pathwise where
            a site can and else the score function with leave-one-out (two particles or more) or a
            moving average.
        vectorize_particles: Evaluate all particles at once, as rows of a plate left of the
            programs' own; else one after the other, for programs that do not broadcast or whose
            structure varies. The estimator is the same, but for the weights of several coupled
            sites' paths in the loss.
        max_plate_nesting: Bound on the number of nested plates; found by the preflight where it
            is not given.
        analytic_kl: Put the closed-form KL divergence in place of a site's sampled ``log p - log
            q`` where it is known and the order of sites allows it.
        **kwargs: As for Pyro's ``ELBO``.

    Raises:
        TypeError: If ``default`` is no estimator, or an argument is unknown.
        ValueError: If ``num_particles`` is below 1 or ``default`` names no estimator; when run,
            with the site's name, if an estimator cannot serve its site or the programs do not
            match.

    References:
        Gradient Estimation Using Stochastic Computation Graphs (Schulman et al., 2015),
        https://arxiv.org/abs/1506.05254

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_gumbel.estimators import ReinMax
        >>> def model():
        ...     pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.8])))
        >>> def guide():
        ...     logits = pyro.param("logits", torch.tensor([0.2, 0.8]).log())
        ...     q = dist.OneHotCategorical(logits=logits)
        ...     pyro.sample("z", q, infer={"gradient": ReinMax()})
        >>> abs(Estimator_ELBO().loss(model, guide)) < 1e-6
        True
    """

    def __init__(
        self, num_particles: int = 1, *, analytic_kl: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(num_particles, **kwargs)
        self.analytic_kl = analytic_kl

    def _value(self, passes: Passes) -> Tensor:
        return passes.elbo()

    def _estimate(self, passes: Passes, call: Call) -> tuple[Tensor, Tensor]:
        elbo = surrogate = passes.elbo()
        for name, estimator in passes.estimators.items():
            if estimator.enumerates:
                continue
            term = estimator.surrogate(passes.site(name, call))
            if term is not None:
                surrogate = surrogate + term.sum() / self.num_particles
        return elbo, surrogate
