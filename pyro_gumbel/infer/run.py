"""One run of guide and model: their traces, and the terms of the ELBO read off them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.poutine as poutine
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from pyro.util import check_site_shape
from torch import Tensor

from pyro_gumbel.distributions._score_parts import score_function
from pyro_gumbel.distributions.families import event_dims, log_mass, unwrap, wrap_score
from pyro_gumbel.estimators import Call, Estimator
from pyro_gumbel.infer._site_options import ModelSiteCheck
from pyro_gumbel.infer.analytic_kl import analytic_kls
from pyro_gumbel.infer.checks import check_programs, latent_sites, misfits_named
from pyro_gumbel.infer.costs import Costs, EnumeratedSite, Term, site_frames
from pyro_gumbel.infer.particles import PARTICLE_PLATE, DrawMessenger, Layout, SharedSubsample
from pyro_gumbel.infer.site_checks import SiteChecks

__all__ = ["Run", "in_rows", "run_programs"]


class Run:
    """What one pass left behind.

    Attributes:
        guide: The guide's latent sites.
        observed: The names of the model's observed sites.
        estimators: The estimator of each of them that drew its value here.
        logits: The logits that values were drawn from, where the estimator asked for them.
        layout: The paths of the pass.
        costs: The terms of the ELBO.
        totals: The ELBO of each path, ``(paths, repetitions)``, with gradient.
    """

    def __init__(
        self,
        guide: dict[str, Any],
        draw: DrawMessenger,
        scores: dict[str, Tensor],
        terms: list[Term],
        own_kl: dict[str, Term],
        observed: set[str],
    ) -> None:
        self.guide = guide
        self.observed = observed
        self.layout = draw.layout
        self.estimators = dict(draw.estimators)
        self.sizes = dict(draw.sizes)
        self.logits = dict(draw.logits)
        self._scores = scores
        self._own_kl = own_kl
        enumerated = [
            EnumeratedSite(name, dim, self.log_prob(name).exp(), site_frames(guide[name]))
            for name, dim in draw.enumerated.items()
        ]
        self.costs = Costs(terms, enumerated, draw.layout)
        shape = (len(self.layout.paths), self.layout.repetitions)
        self.totals = self.costs.totals().reshape(shape)

    def value(self, name: str) -> Tensor:
        """The value of a site on each path."""
        return self.guide[name]["value"]

    def log_prob(self, name: str) -> Tensor:
        """Score a site's value with gradient, neither scaled nor masked, of its batch shape."""
        fn = self.guide[name]["fn"]
        raw = self._scores.get(name)
        if raw is None:
            raw = self._scores[name] = log_mass(unwrap(fn), self.value(name))
        return sum_rightmost(raw, event_dims(fn))

    def draw_score(self, name: str) -> Tensor:
        """Score what was drawn at a site, neither scaled nor masked: the value, or its noise."""
        if not self.estimators[name].pathwise:
            return self.log_prob(name)
        fn = self.guide[name]["fn"]
        return sum_rightmost(score_function(unwrap(fn), self.value(name)), event_dims(fn))

    def cost(self, name: str, *, live: bool = False) -> Tensor:
        """The downstream cost of a site, shaped like its ``log_prob``, detached unless live."""
        like = self.log_prob(name)
        cost = self.costs.downstream(site_frames(self.guide[name]), like, live=live)
        if name in self._own_kl:  # it does not depend on the value drawn
            own = self._own_kl[name].value
            cost = cost - (own if live else own.detach())
        return cost


def run_programs(
    call: Call,
    draw: DrawMessenger,
    subsample: SharedSubsample,
    checks: SiteChecks,
    *,
    analytic_kl: bool,
    full_scores: bool,
) -> Run:
    """Run the guide, then the model on its values, and collect the terms.

    Args:
        call: The programs and their arguments.
        draw: Draws the guide's values.
        subsample: Gives every run of the step the same minibatch.
        checks: Looks at the sites' distributions and values.
        analytic_kl: Whether to put closed-form KL divergences in place of sampled terms.
        full_scores: Whether ``log q`` keeps its whole gradient, as a bound that is not linear in
            it needs; else each estimator drops what has mean zero.

    Returns:
        The run.
    """
    guide, model = in_rows(call.guide, draw.layout), in_rows(call.model, draw.layout)
    traced_guide = poutine.trace(guide)
    with _left_dimensions_explained(draw), subsample, draw, checks:
        traced_guide(*call.args, **call.kwargs)
    guide_trace = traced_guide.trace
    checked_model = ModelSiteCheck(guide_trace)(model)
    traced_model = poutine.trace(poutine.replay(checked_model, trace=guide_trace))
    nesting = draw.layout.plate_nesting
    with (
        misfits_named(traced_model, guide_trace, nesting),
        _left_dimensions_explained(draw),
        subsample,
        checks,
    ):
        traced_model(*call.args, **call.kwargs)
    model_trace = traced_model.trace
    if is_validation_enabled():
        check_programs(model_trace, guide_trace, nesting)
    return _collect(model_trace, guide_trace, draw, analytic_kl, full_scores)


def in_rows(program: Callable[..., Any], layout: Layout) -> Callable[..., Any]:
    """Put a program into the particle plate, where the layout has one.

    The plate goes inside handlers that replay values: a replayed site is done, and a plate outside
    does not broadcast it any more.
    """
    if layout.particle_dim is None:
        return program
    return pyro.plate(PARTICLE_PLATE, layout.num_rows, dim=layout.particle_dim)(program)


@contextmanager
def _left_dimensions_explained(draw: DrawMessenger) -> Iterator[None]:
    """Add to errors over shapes which dimensions the values have that the program did not make."""
    try:
        yield
    except (IndexError, RuntimeError, ValueError) as error:
        left = []
        if (dim := draw.layout.particle_dim) is not None:
            left += [f"{draw.layout.num_rows} particles or coupled draws at {dim}"]
        left += [f"every value of {name!r} at {at}" for name, at in draw.enumerated.items()]
        over_shapes = not isinstance(error, ValueError) or "Shape mismatch" in str(error)
        if left and over_shapes:
            error.add_note(
                f"Values came with dimensions on the left of the plates: {' and '.join(left)} of "
                "the batch shape. Write operations that broadcast over them, such as "
                "Vindex(loc)[..., z] (pyro.ops.indexing) for loc[z], or "
                "(z.unsqueeze(-2) @ weight).squeeze(-2) for z @ weight; or use "
                "vectorize_particles=False and no enumeration. Programs that nest more than "
                f"{draw.layout.plate_nesting} plates need a larger max_plate_nesting."
            )
        raise


def _collect(
    model_trace: Trace,
    guide_trace: Trace,
    draw: DrawMessenger,
    analytic_kl: bool,
    full_scores: bool,
) -> Run:
    nesting = draw.layout.total_nesting
    guide = latent_sites(guide_trace)
    kls = analytic_kls(model_trace, guide) if analytic_kl else {}
    terms = list(kls.values())
    scores: dict[str, Tensor] = {}
    for name, site in _samples(guide_trace).items():
        if name in kls:
            continue
        estimator = draw.estimators.get(name)
        if estimator is None:  # a value that the guide itself fixed, or a factor
            _check_factor(site)
            raw = _observed_log_prob(site)
        elif full_scores:
            raw = scores[name] = log_mass(unwrap(site["fn"]), site["value"])
        else:
            with _named_errors(site):
                raw = estimator.log_prob(unwrap(site["fn"]), site["value"])
            if type(estimator).log_prob is Estimator.log_prob:
                scores[name] = raw
            if not estimator.keeps_score_gradient:
                raw = raw.detach()
        terms.append(_term(site, -raw, nesting, of_model=False))
    for name, site in _samples(model_trace).items():
        if name not in kls:
            terms.append(_term(site, _model_log_prob(site), nesting))
    if draw.layout.particle_dim is not None:
        _check_dims(terms, int(nesting) + len(draw.enumerated))
    observed = {name for name, site in _samples(model_trace).items() if site["is_observed"]}
    return Run(guide, draw, scores, terms, kls, observed)


def _samples(trace: Trace) -> dict[str, Any]:
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }


def _model_log_prob(site: Any) -> Tensor:
    if site["is_observed"]:
        return _observed_log_prob(site)
    with _named_errors(site):
        return log_mass(unwrap(site["fn"]), site["value"])


def _observed_log_prob(site: Any) -> Tensor:
    with _named_errors(site):
        return site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])


@contextmanager
def _named_errors(site: Any) -> Iterator[None]:
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


def _check_factor(site: Any) -> None:
    fn = unwrap(site["fn"])
    if isinstance(fn, Unit) and not fn.has_rsample:
        raise ValueError(
            f"Site {site['name']!r} of the guide is a factor with has_rsample=False: it scores a "
            "value that was drawn elsewhere, to which no estimator can be attached. Draw the "
            "value by pyro.sample, or give its density to the site itself, "
            "dist.Delta(z, log_density=...).has_rsample_(False)."
        )


def _check_dims(terms: list[Term], most: int) -> None:
    """Refuse terms with dimensions left of all plates, as a careless broadcast makes them."""
    for term in terms:
        shape = term.value.shape
        left = shape[: max(0, len(shape) - most)]
        if left.numel() > 1:
            raise ValueError(
                f"Site {term.site!r}: its log_prob has shape {tuple(shape)}, and the plates (that "
                f"of the particles included) take the last {most} dimensions only. Values come "
                "with a dimension of particles on the left: write operations that broadcast over "
                "it, such as (z.unsqueeze(-2) @ weight).squeeze(-2), or use "
                "vectorize_particles=False, or a larger max_plate_nesting."
            )


def _term(site: Any, raw: Tensor, nesting: float, *, of_model: bool = True) -> Term:
    latent = not site["is_observed"]
    value = wrap_score(site["fn"], raw) if latent else raw
    value = scale_and_mask(value, site["scale"], site["mask"])
    if is_validation_enabled():
        site["log_prob"] = value
        check_site_shape(site, nesting)
    return Term(site["name"], value, site_frames(site), of_model)
