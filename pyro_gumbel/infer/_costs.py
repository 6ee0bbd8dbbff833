r"""The terms of the ELBO, and the cost of each site: the terms that its plates let it influence.

A term is ``log p`` or ``-log q`` of one site, scaled and masked, of the site's batch shape. A site
inside a plate cannot influence the plate's other elements, so its cost keeps the dimensions of the
plates it shares with a term and sums over the term's other plates. Nothing finer is assumed: which
value influenced which term is not traced.

Enumerated sites have dimensions left of all plates. A term that depends on such a site has its
dimension, and counts with the probability :math:`q(z)` of each value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.distributions import Delta, Unit
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.util import check_site_shape
from torch import Tensor

from pyro_gumbel.distributions._base import broadcast_shapes
from pyro_gumbel.distributions._categorical import bit_log_masses, log_probs
from pyro_gumbel.distributions.families import (
    has_law_of,
    is_bit,
    is_categorical,
    is_one_hot,
    log_mass,
    masks,
    unwrap,
    wrap_score,
)
from pyro_gumbel.distributions.kl import closed_form_kl, kl_from_log_probs
from pyro_gumbel.infer._checks import latent_sites
from pyro_gumbel.infer._sampling import Layout

__all__ = [
    "Costs",
    "EnumeratedSite",
    "Frames",
    "Term",
    "analytic_kls",
    "check_dims",
    "check_factor",
    "check_shape",
    "make_term",
    "masked_score",
    "named_errors",
    "refuse_outside",
    "score_of",
    "site_frames",
]

Frames = frozenset[CondIndepStackFrame]

_MOST_STATES = 2**28


def site_frames(site: Any) -> Frames:
    """The vectorised plates that a site is in."""
    return frozenset(frame for frame in site["cond_indep_stack"] if frame.vectorized)


@dataclass(frozen=True)
class Term:
    """One term of the ELBO: the site it is of, its value and the vectorised plates it is in.

    A term of the model is ``log p``, or the KL divergence that stands for it and ``-log q``.
    ``symbols`` has the meaning of its dimensions, if Pyro has noted it.
    """

    site: str
    value: Tensor
    frames: Frames
    of_model: bool = True
    symbols: Mapping[int, str] = field(default_factory=dict)


def score_of(site: Any) -> Tensor:
    """Score a value: one that was observed as its distribution does, others without wrappers."""
    with named_errors(site):
        if site["is_observed"]:
            return site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        return log_mass(unwrap(site["fn"]), site["value"])


def masked_score(site: Any, raw: Tensor) -> Tensor:
    """Return the score of the site's batch shape, masked and not scaled.

    Args:
        site: The site.
        raw: Its score, as :func:`score_of` returns it.
    """
    value = raw if site["is_observed"] else wrap_score(site["fn"], raw)
    return scale_and_mask(value, mask=site["mask"])


@contextmanager
def named_errors(site: Any) -> Iterator[None]:
    """Name the site, its distribution and the shapes where a value cannot be scored."""
    try:
        yield
    except ValueError as error:
        fn = site["fn"]
        value, batch, event = (
            tuple(shape) for shape in (site["value"].shape, fn.batch_shape, fn.event_shape)
        )
        shapes = f"value {value}, batch {batch}, event {event}"
        raise ValueError(
            f"Scoring site {site['name']!r} ({type(fn).__name__}; {shapes}): {error}"
        ) from error


def check_factor(site: Any) -> None:
    fn = unwrap(site["fn"])
    if isinstance(fn, Unit) and not fn.has_rsample:
        raise ValueError(
            f"Site {site['name']!r} of the guide is a factor with has_rsample=False: it scores a "
            "value that was drawn elsewhere, to which no estimator can be attached. Draw the "
            "value by pyro.sample, or give its density to the site itself, "
            "dist.Delta(z, log_density=...).has_rsample_(False)."
        )


def check_dims(terms: list[Term], most: int) -> None:
    """Refuse terms with dimensions left of all plates, as a careless broadcast makes them."""
    for term in terms:
        shape = term.value.shape
        left = shape[: max(0, len(shape) - most)]
        if left.numel() > 1:
            raise ValueError(
                f"Site {term.site!r}: its log_prob has shape {tuple(shape)}, and plates, "
                f"particles and enumerated sites take the last {most} dimensions only. Values "
                "come with dimensions of particles and of enumerated or summed values on the "
                "left. Write operations that broadcast over them, such as "
                "(z.unsqueeze(-2) @ weight).squeeze(-2) for z @ weight and Vindex(loc)[..., z] "
                "(pyro.ops.indexing) for loc[z]; or use vectorize_particles=False, or a larger "
                "max_plate_nesting."
            )


def make_term(
    site: Any,
    raw: Tensor,
    nesting: float,
    *,
    of_model: bool = True,
    symbols: Mapping[int, str] | None = None,
) -> Term:
    value = scale_and_mask(masked_score(site, raw), site["scale"])
    check_shape(site, value, nesting)
    return Term(site["name"], value, site_frames(site), of_model, symbols or {})


def check_shape(site: Any, value: Tensor, nesting: float) -> None:
    if is_validation_enabled():
        site["log_prob"] = value
        check_site_shape(site, nesting)


@dataclass(frozen=True)
class EnumeratedSite:
    """An enumerated site: its dimension, its values' probabilities with gradient, its plates."""

    name: str
    dim: int
    probs: Tensor
    frames: Frames

    def indexes(self, tensor: Tensor) -> bool:
        """Return whether ``tensor`` depends on this site."""
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
        closures = [
            self._closure(site for site in self.enumerated if site.indexes(term.value))
            for term in self.terms
        ]
        for term, sites in zip(self.terms, closures, strict=True):
            _check_closure(term, sites)
        for term, sites in zip(self.terms, closures, strict=True):
            value = _expect(term.value, sites, sites) if sites else term.value
            shape = value.shape
            by_shape[shape] = by_shape[shape] + value if shape in by_shape else value
        rows = [self._sum_rows(value) for value in by_shape.values()]
        return sum(rows[1:], rows[0]) if rows else torch.zeros(self.layout.num_rows)

    def downstream(self, frames: Frames, like: Tensor, *, name: str, live: bool = False) -> Tensor:
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


def _check_closure(term: Term, sites: list[EnumeratedSite]) -> None:
    """Refuse a term outside of a plate of its sites, or with too many of their joint values."""
    for site in sites:
        if site.indexes(term.value):
            refuse_outside(term, site.name, site.frames)
    shapes = [term.value.shape, *(site.probs.shape for site in sites)]
    if (number := broadcast_shapes(*shapes).numel()) > _MOST_STATES:
        raise ValueError(
            f"Site {term.site!r} depends on the enumerated sites {[site.name for site in sites]} "
            f"jointly, with {number} values. Write a chain as `for t in pyro.markov(range(T))` in "
            "both programs: it then costs as much as its steps. Or use another estimator, such as "
            "Score()."
        )


def _sum_plates(value: Tensor, frames: Frames) -> Tensor:
    dims = [frame.dim for frame in frames if value.shape[frame.dim] != 1]
    return value.sum(dims, keepdim=True) if dims else value


def refuse_outside(term: Term, name: str, frames: Frames) -> None:
    """Refuse a term outside of a plate that the enumerated site ``name`` is in."""
    outside = sorted(frame.name for frame in frames - term.frames)
    if outside:
        raise ValueError(
            f"Site {term.site!r}, outside the plate {outside[0]!r}, depends on the enumerated "
            f"site {name!r} inside it: the elements of the plate cannot be summed one by one. "
            f"Use another estimator at {name!r}, such as Score() or ReinMax()."
        )


_FAMILIES = (
    (is_one_hot, log_probs),
    (is_bit, bit_log_masses),
    (is_categorical, log_probs),
)


def analytic_kls(
    model_trace: Trace,
    guide: dict[str, Any],
    depends: Callable[[Any, torch.Size], bool],
    symbols: Mapping[str, Mapping[int, str]],
) -> dict[str, Term]:
    """Return minus the KL divergence of each site that has one and may use it.

    Model and guide must scale and mask the site alike. No parent of the site in the model may
    depend on the site's value in the guide: every latent site before it in the model comes before
    it in the guide too. The model's distribution may not depend on a summed site (``depends``).
    No dimension may have two meanings (``symbols`` has those in the guide).
    """
    order = {name: position for position, name in enumerate(guide)}
    kls: dict[str, Term] = {}
    latest = -1
    for name, site in latent_sites(model_trace).items():
        if name not in guide:
            continue
        in_order = order[name] > latest
        latest = max(latest, order[name])
        if not in_order:
            continue
        if not _weighed_alike(guide[name], site) or depends(site, site["fn"].batch_shape):
            continue
        own, theirs = symbols.get(name, {}), site["infer"].get("_dim_to_symbol", {})
        if any(own[dim] != theirs[dim] for dim in own.keys() & theirs.keys()):
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
            kls[name] = Term(name, value, site_frames(guide[name]), symbols={**theirs, **own})
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
