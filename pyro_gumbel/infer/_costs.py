r"""The cost of each site: the terms of the ELBO that its plates let it influence.

A term is ``log p`` or ``-log q`` of one site, scaled and masked, of the site's batch shape. A site
inside a plate cannot influence the plate's other elements, so its cost keeps the dimensions of the
plates it shares with a term and sums over the term's other plates. Nothing finer is assumed: which
value influenced which term is not traced.

Enumerated sites have dimensions left of all plates. A term that depends on such a site has its
dimension, and counts with the probability :math:`q(z)` of each value.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
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
from pyro_gumbel.infer._sampling import Layout

__all__ = ["Costs", "EnumeratedSite", "Frames", "Term", "analytic_kls", "site_frames"]

Frames = frozenset[CondIndepStackFrame]


def site_frames(site: Any) -> Frames:
    """The vectorised plates that a site is in."""
    return frozenset(frame for frame in site["cond_indep_stack"] if frame.vectorized)


@dataclass(frozen=True)
class Term:
    """One term of the ELBO: the site it is of, its value and the vectorised plates it is in.

    A term of the model is ``log p``, or the KL divergence that stands for it and ``-log q``.
    """

    site: str
    value: Tensor
    frames: Frames
    of_model: bool = True


@dataclass(frozen=True)
class EnumeratedSite:
    """An enumerated site: its dimension, its values' probabilities with gradient, its plates."""

    name: str
    dim: int
    probs: Tensor
    frames: Frames

    def indexes(self, tensor: Tensor) -> bool:
        """Tell whether ``tensor`` depends on this site."""
        return tensor.dim() >= -self.dim and tensor.shape[self.dim] > 1


class Costs:
    """The terms of one run.

    Args:
        terms: Every term, with the gradient that it contributes as it stands.
        enumerated: The enumerated sites in program order.
        layout: Where the rows of the particle plate are.
    """

    def __init__(
        self, terms: list[Term], enumerated: list[EnumeratedSite], layout: Layout
    ) -> None:
        self.terms = terms
        self.enumerated = enumerated
        self.layout = layout
        self._grouped: dict[bool, dict[tuple[Frames, tuple[int, ...]], Tensor]] = {}

    def totals(self) -> Tensor:
        """The ELBO of each row, ``(rows,)``, with the gradient that passes through its terms.

        Of a run without rows it is a scalar.
        """
        by_shape: dict[torch.Size, Tensor] = {}  # to sum the rows of a few tensors, not of each
        for term in self.terms:
            value = term.value
            sites = self._closure(site for site in self.enumerated if site.indexes(value))
            if sites:
                _check_plates(term, sites)
                value = _expect(value, sites, sites)
            shape = value.shape
            by_shape[shape] = by_shape[shape] + value if shape in by_shape else value
        rows = [self._sum_rows(value) for value in by_shape.values()]
        return sum(rows[1:], rows[0]) if rows else torch.zeros(self.layout.num_rows)

    def downstream(self, frames: Frames, like: Tensor, *, live: bool = False) -> Tensor:
        """The cost of a site in plates ``frames``, of the shape of its score ``like``."""
        own = self._closure(site for site in self.enumerated if site.indexes(like))
        upstream = [site for site in own if not site.indexes(like)]
        total: Tensor | None = None
        for (term_frames, _), value in self._group(live).items():
            closure = self._closure(site for site in self.enumerated if site.indexes(value))
            others = [site for site in closure if site not in own]
            if others:
                value = _expect(value, others, others)
            # Plates are summed before the own weights come in: these are in other plates, maybe
            # of the same dimension.
            value = _sum_plates(value, term_frames - frames)
            value = _expect(value, own, upstream) if own else value
            total = value if total is None else total + value
        if total is None:
            return torch.zeros_like(like)
        # What was summed out left of the site's own dimensions.
        total = total.reshape(total.shape[max(0, total.dim() - like.dim()) :])
        return (total if live else total.detach()).expand(like.shape)

    def _group(self, live: bool) -> dict[tuple[Frames, tuple[int, ...]], Tensor]:
        """Add up terms of the same plates and enumerated sites, once for all."""
        if live not in self._grouped:
            groups: dict[tuple[Frames, tuple[int, ...]], Tensor] = {}
            for term in self.terms:
                value = term.value if live else term.value.detach()
                dims = tuple(site.dim for site in self.enumerated if site.indexes(value))
                key = (term.frames, dims)
                groups[key] = groups[key] + value if key in groups else value
            self._grouped[live] = groups
        return self._grouped[live]

    def _closure(self, sites: Iterable[EnumeratedSite]) -> list[EnumeratedSite]:
        """Add the enumerated sites that the probabilities of ``sites`` depend on."""
        found = list(sites)
        for site in found:  # grows while it is walked
            for other in self.enumerated:
                if other not in found and other.indexes(site.probs):
                    found.append(other)
        return found

    def _sum_rows(self, value: Tensor) -> Tensor:
        particle_dim = self.layout.particle_dim
        if particle_dim is None:
            return value.sum()
        dims = [dim for dim in range(-value.dim(), 0) if dim != particle_dim]
        rows = value.sum(dims) if dims else value
        return rows.expand(self.layout.num_rows)


def _expect(value: Tensor, sites: list[EnumeratedSite], sum_over: list[EnumeratedSite]) -> Tensor:
    """Weigh ``value`` by the probabilities of ``sites`` and sum out those of ``sum_over``."""
    weight = sites[0].probs
    for site in sites[1:]:
        weight = weight * site.probs
    # A value of probability zero may have an infinite cost: 0 * inf would be nan, in the gradient
    # too.
    value, weight = torch.broadcast_tensors(value, weight)
    value = weight * value.masked_fill(weight == 0, 0.0)
    dims = [site.dim for site in sum_over]
    return value.sum(dims, keepdim=True) if dims else value


def _sum_plates(value: Tensor, frames: Frames) -> Tensor:
    dims = [frame.dim for frame in frames if value.shape[frame.dim] != 1]
    return value.sum(dims, keepdim=True) if dims else value


def _check_plates(term: Term, sites: list[EnumeratedSite]) -> None:
    for site in sites:
        outside = site.frames - term.frames
        if outside and site.indexes(term.value):
            plates = sorted(frame.name for frame in outside)
            raise ValueError(
                f"Site {term.site!r}, outside the plate {plates[0]!r}, depends on the enumerated "
                f"site {site.name!r} inside it: "
                "the elements of the plate cannot be summed one by one. "
                f"Use another estimator at {site.name!r}, such as Score() or ReinMax()."
            )


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
