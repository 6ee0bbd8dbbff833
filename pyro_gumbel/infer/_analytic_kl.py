"""Closed-form KL divergences in place of a site's sampled ``log p - log q``."""

from __future__ import annotations

from typing import Any

from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor

from pyro_gumbel.distributions._base import broadcast_shapes
from pyro_gumbel.distributions._categorical import bit_log_masses, log_probs
from pyro_gumbel.distributions.families import (
    has_law_of,
    is_bit,
    is_categorical,
    is_one_hot,
    masks,
    unwrap,
    wrap_score,
)
from pyro_gumbel.distributions.kl import closed_form_kl, kl_from_log_probs
from pyro_gumbel.infer._checks import latent_sites
from pyro_gumbel.infer._costs import Term, site_frames

__all__ = ["analytic_kls"]

_FAMILIES = (
    (is_one_hot, log_probs),
    (is_bit, bit_log_masses),
    (is_categorical, log_probs),
)


def analytic_kls(model_trace: Trace, guide: dict[str, Any]) -> dict[str, Term]:
    """Minus the KL divergence of each site that has one and may use it for its sampled terms.

    It does where model and guide scale and mask the site alike, and no parent of the site in the
    model can depend on the site's value in the guide: every latent site before it in the model
    comes before it in the guide too.
    """
    order = {name: position for position, name in enumerate(guide)}
    kls: dict[str, Term] = {}
    latest = -1
    for name, site in latent_sites(model_trace).items():
        in_order = order[name] > latest
        latest = max(latest, order[name])
        if not in_order:
            continue
        if not _weighed_alike(guide[name], site):
            continue
        q, p = guide[name]["fn"], site["fn"]
        if has_law_of(unwrap(q), Delta):  # its closed form forgets the log_density
            continue
        try:
            kl = _divergence(q, p)
        except NotImplementedError:
            continue
        if isinstance(kl, Tensor):
            kl = kl.expand(broadcast_shapes(kl.shape, q.batch_shape))
            value = -scale_and_mask(kl, site["scale"], site["mask"])
            kls[name] = Term(name, value, site_frames(guide[name]))
    return kls


def _divergence(q: Any, p: Any) -> Tensor:
    """The KL divergence, with a gradient where a category is certain or impossible, too."""
    bare_q, bare_p = unwrap(q), unwrap(p)
    if q.event_shape == p.event_shape and bare_q.event_dim == bare_p.event_dim:
        return wrap_score(q, _bare_divergence(bare_q, bare_p))
    return closed_form_kl(q, p)


def _bare_divergence(q: Any, p: Any) -> Tensor:
    for is_family, read in _FAMILIES:
        if is_family(q) and is_family(p):
            log_q, log_p = read(q), read(p)
            if log_q.shape[-1] == log_p.shape[-1]:
                return kl_from_log_probs(log_q, log_p)
    return closed_form_kl(q, p)


def _weighed_alike(one: Any, other: Any) -> bool:
    """Return whether two sites' scores are scaled and masked by what is known to be the same."""
    weights = [[site["scale"], site["mask"], *masks(site["fn"])] for site in (one, other)]
    # Tensors are compared by identity: looking into them would wait for the device.
    return len(weights[0]) == len(weights[1]) and all(
        a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b
        for a, b in zip(*weights, strict=True)
    )
