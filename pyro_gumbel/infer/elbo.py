"""The evidence lower bound with a gradient estimator for each site."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyro_gumbel.estimators import Call, Route
from pyro_gumbel.infer._site_view import Passes
from pyro_gumbel.infer.particle_elbo import ParticleELBO

__all__ = ["Estimator_ELBO"]


class Estimator_ELBO(ParticleELBO):  # noqa: N801
    r"""The ELBO of a model and a guide with a gradient estimator for each latent site.

    .. math:: \mathcal L = E_{q_\phi(z)}[\log p_\theta(x, z) - \log q_\phi(z)]

    The value is an unbiased estimate of the bound of the discrete model, from exact draws and
    probability masses. Estimators only change the gradient. Attach them by
    :func:`~pyro_gumbel.infer.config_gradient`, or by ``infer={"gradient": ...}`` at the site.

    Training changes the state of estimators, evaluation does not. Each call that makes a gradient
    advances every schedule and every moving average by one step:

    ================================================== ===============
    call                                               advances
    ================================================== ===============
    ``SVI.step``, ``loss_and_grads``                   yes
    ``differentiable_loss``                            yes
    ``elbo(model, guide)`` as a module, in train mode  yes
    the same after ``.eval()``                         no
    any of these under ``no_grad``, ``inference_mode`` no
    ``SVI.evaluate_loss``, ``loss``                    no
    ================================================== ===============

    As in Pyro, a site in a plate may only influence its own element of the plate. If a later site
    of the guide, outside the plate, combines the elements, and sites of the plate depend on that
    site, write ``.to_event(1)`` instead of the plate.

    A new pair of model and guide runs once more, for a *preflight*. It counts plates, checks that
    model and guide match, and finds the dependence of each term on each site. It leaves random
    number generators and buffers of modules unchanged.

    Args:
        num_particles: Number of independent samples to average over.
        default: Estimator, or its name, for sites without one. ``"auto"`` is pathwise at
            reparameterised sites. At other sites it is the score function, with leave-one-out (two
            particles or more) or a moving average.
        vectorize_particles: Evaluate all particles at once, in a plate left of the programs' own.
            Otherwise particles run in a loop, for programs that do not broadcast or whose
            structure varies. The estimator is the same, except for the weights in the loss of
            branches of several coupled sites.
        max_plate_nesting: Bound on the number of nested plates. By default the preflight finds it.
        analytic_kl: Replace a site's sampled ``log p - log q`` by the closed-form KL divergence,
            if it is known and the order of sites allows it.
        **kwargs: As for Pyro's ``ELBO``.

    Raises:
        TypeError: If ``default`` is not an estimator or a name, or an argument is unknown.
        ValueError: If ``num_particles`` is below 1 or ``default`` is an unknown name; when run,
            with the site's name, if an estimator does not support its site or model and guide do
            not match.

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
            if estimator.route is Route.ENUMERATE:
                continue
            term = estimator.surrogate(passes.site(name, call))
            if term is not None:
                surrogate = surrogate + term.sum() / self.num_particles
        return elbo, surrogate
