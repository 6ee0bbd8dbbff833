"""Whose noise is it: the part of a gradient's variance that each site's sampling answers for."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from pyro_gumbel.diagnostics._parameters import read_gradients
from pyro_gumbel.diagnostics._replicas import Replica, site_seed
from pyro_gumbel.diagnostics._state import seed_everything, seed_torch, seeds

__all__ = ["site_effects"]


def site_effects(
    replica: Replica, leaves: dict[str, Tensor], sites: list[str], number: int, seed: int
) -> dict[str, Any]:
    r"""Repeat draws of the gradient with the noise of one site renewed.

    The noise of a site is every random number from the moment at which the guide arrives there to
    its arrival at the next one. With ``g`` and ``g'`` two gradients that share all noise but that
    of site ``s``,

    .. math:: T_s = \tfrac12 E \|g - g'\|^2 = E[\mathrm{tr\,Var}(g \mid \epsilon_{-s})]

    with :math:`\epsilon_{-s}` the noise of all others, is the variance that would be left if all
    other sites were held fixed, on average: the *total effect* of the site. What is random without
    being a site's, a minibatch say, is held fixed too. Effects add up to the whole variance if
    each site adds noise of its own, and to more where sites act together. Estimators and their
    state are the same in both gradients.

    References:
        Analysis of variance designs for model output (Jansen, 1999),
        https://doi.org/10.1016/S0010-4655(98)00154-4

    Returns:
        Coordinates: ``site``, ``parameter``, and the squared distances ``site_effect`` of dims
        ``site, repeat, parameter``.
    """
    seed_everything(seed)
    replica.step()
    restore = replica.save()
    base_seeds = seeds(seed, 2 * number)
    effects = np.zeros((len(sites), number, len(leaves)))
    for repeat in range(number):
        base, renewed = base_seeds[2 * repeat : 2 * repeat + 2]
        read_gradients(leaves)
        gradients = _gradients(replica, leaves, base, {})
        for index, site in enumerate(sites):
            restore()
            other = _gradients(replica, leaves, base, {site: renewed})
            effects[index, repeat] = [
                float((one - two).double().square().sum()) / 2
                for one, two in zip(gradients, other, strict=True)
            ]
        restore()
    replica.on_site = None
    return {
        "site": sites,
        "parameter": list(leaves),
        "site_effect": (["site", "repeat", "parameter"], effects),
    }


def _gradients(
    replica: Replica, leaves: dict[str, Tensor], base: int, renewed: dict[str, int]
) -> list[Tensor]:
    """Take a gradient whose noise is seeded at the start and again at each arrival at a site."""
    visits: dict[str, int] = {}

    def arrive(name: str) -> None:
        visits[name] = visits.get(name, 0) + 1
        seed_torch(site_seed(renewed.get(name, base), name, visits[name]))

    replica.on_site = arrive
    seed_everything(base)
    replica.step()
    return [gradient.clone() for gradient in read_gradients(leaves)]
