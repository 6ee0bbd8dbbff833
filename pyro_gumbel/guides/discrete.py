"""An automatic mean-field guide over the discrete latents of a model."""

from __future__ import annotations

from typing import Any

from pyro.poutine import Trace

from pyro_gumbel.guides._base import StructuredGuide
from pyro_gumbel.infer._checks import guided_sites

__all__ = ["AutoDiscrete"]


class AutoDiscrete(StructuredGuide):
    r"""A mean-field guide over all discrete latent sites, with parameters for each element.

    .. math:: q(z) = \prod_s \prod_i q(z_{si}; \phi_{si})

    Each site's guide has the family of its prior (one-hot, Bernoulli, Categorical, Poisson or
    Geometric) and starts at the prior. Combine it with another guide of the continuous latents by
    ``AutoGuideList``. For data too many for parameters of each datum, use :class:`AutoAmortized`.
    The model may subsample plates; ``median``, ``quantiles`` and ``posterior`` return all
    elements.

    Parameters are ``heads.<site>.raw`` in ``state_dict``, which also contains the estimators that
    ``gradient`` names; ``posterior(*args)`` returns their distributions. A new guide has no heads:
    call ``setup(*args)`` before ``load_state_dict``. As with Pyro's autoguides, parameters in the
    parameter store under the guide's names replace the initial ones.

    Args:
        model: The model.
        gradient: An estimator, a name, a dict ``{site: estimator}`` or a callable, as for
            ``config_gradient``. ``"auto"`` is the default of ``Estimator_ELBO``.
        create_plates: As for Pyro's autoguides. By default the guide reads the model's plates.
        init_loc_fn: Initialisation strategy of continuous latents; discrete sites ignore it.
        init_scale: Initial standard deviation of continuous latents, relative to the prior's if
            the guide has the prior's family, else in unconstrained space; discrete sites ignore
            it.

    Raises:
        ValueError: If the model has no discrete latent, or one that is masked, in a sequential
            plate, or of another family.

    References:
        Automated Variational Inference in Probabilistic Programming (Wingate, Weber, 2013),
        https://arxiv.org/abs/1301.1299

    Example:
        >>> locs = torch.tensor([-1.0, 1.0])
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.4, 0.6])))
        ...         pyro.sample("x", dist.Normal(z @ locs, 1.0), obs=x)
        >>> guide = AutoDiscrete(model, gradient="reinmax")
        >>> guide(torch.zeros(5))["z"].shape
        torch.Size([5, 2])
    """

    _has_all_elements = True

    def _choose_sites(self, trace: Trace) -> dict[str, Any]:
        latent = guided_sites(trace)
        discrete = {name: site for name, site in latent.items() if site["fn"].support.is_discrete}
        if not discrete:
            raise ValueError(
                f"AutoDiscrete: the model has no discrete latent site; its latent sites are "
                f"{list(latent)}. Use AutoNormal or AutoAmortized for continuous sites. Discrete "
                "sites that the guide should have must have neither obs=... nor "
                "infer={'enumerate': ...}; remove these."
            )
        return discrete
