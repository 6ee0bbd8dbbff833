"""A mean-field guide over the discrete latents of a model."""

from __future__ import annotations

from typing import Any

from pyro.poutine import Trace

from pyro_gumbel.guides._base import StructuredGuide
from pyro_gumbel.infer._checks import latent_sites

__all__ = ["AutoDiscrete"]


class AutoDiscrete(StructuredGuide):
    r"""A mean-field guide over every discrete latent site, with parameters for each element.

    .. math:: q(z) = \prod_s \prod_i q(z_{si}; \phi_{si})

    Each site's guide is of its prior's family (one-hot, Bernoulli, Categorical, Poisson or
    Geometric) and starts at the prior. Continuous latents are left to another guide, say by
    ``AutoGuideList``; a model with more data than parameters should be held is for
    :class:`AutoAmortized`. Plates may be subsampled in the model; ``median``, ``quantiles`` and
    ``posterior`` are of all elements.

    Parameters are ``heads.<site>.raw`` in ``state_dict``; ``posterior(*args)`` returns the
    distributions that they make.

    Args:
        model: The model.
        gradient: An estimator, a name, a dict ``{site: estimator}`` or a callable, as for
            ``config_gradient``; ``"auto"`` leaves the choice to ``Estimator_ELBO``.
        create_plates: As for Pyro's autoguides; left out, the model itself is asked.
        init_loc_fn: Unused by discrete sites; where continuous latents stand in the first run.
        init_scale: Likewise unused.

    Raises:
        ValueError: If the model has no discrete latent, or one in a sequential plate, masked, or
            of another family.

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
        latent = latent_sites(trace)
        discrete = {name: site for name, site in latent.items() if site["fn"].support.is_discrete}
        if not discrete:
            raise ValueError(
                f"AutoDiscrete: the model has no discrete latent site; its latent sites are "
                f"{list(latent)}. Use AutoNormal or AutoAmortized for continuous ones, and drop "
                "obs=... where a discrete site was meant to be latent."
            )
        return discrete
