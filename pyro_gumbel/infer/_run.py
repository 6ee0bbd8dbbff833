"""One run of guide and model: their traces, and the terms of the ELBO read off them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import pyro
import pyro.poutine as poutine
from pyro.distributions import Delta
from pyro.distributions.util import sum_rightmost
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.runtime import _DIM_ALLOCATOR
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_gumbel.distributions.families import (
    event_dims,
    has_law_of,
    log_mass,
    score_function,
    unwrap,
)
from pyro_gumbel.estimators import Call, Estimator, Route
from pyro_gumbel.infer._chains import ChainCosts, ScoredSite
from pyro_gumbel.infer._checks import (
    PARTICLE_PLATE,
    ModelSiteCheck,
    check_programs,
    explain_mismatch,
    latent_sites,
)
from pyro_gumbel.infer._costs import (
    Costs,
    EnumeratedSite,
    Frames,
    Term,
    analytic_kls,
    check_dims,
    check_factor,
    make_term,
    named_errors,
    score_of,
    site_frames,
)
from pyro_gumbel.infer._dependence import Dependence, ReachedTerm
from pyro_gumbel.infer._sampling import Layout, Path, Sampler, SharedSubsample
from pyro_gumbel.infer._summed import SummedTerms, SumMessenger

# Where Pyro finds that two plates collide. Private: if it moves, this import fails.
_ALLOCATE = type(_DIM_ALLOCATOR).allocate.__code__

__all__ = ["DeeperPlates", "Run", "collect", "plate_nesting", "run_programs"]


class DeeperPlates(Exception):
    """The programs nest more plates than the layout left room for."""

    def __init__(self, nesting: int) -> None:
        self.nesting = nesting


class Run:
    """The result of one pass.

    Attributes:
        guide: The guide's latent sites.
        observed: The names of the model's observed sites.
        estimators: The estimator of each site that drew its value here.
        sizes: The number of coupled values of each of these sites.
        logits: The logits that values were drawn from, where the estimator asked for them.
        layout: The paths of the pass.
        terms: The terms of the ELBO.
        recycles: Whether several sites share a dimension.
    """

    def __init__(
        self,
        guide: dict[str, Any],
        sampler: Sampler,
        scores: dict[str, Tensor],
        terms: list[Term],
        own_kl: dict[str, Term],
        observed: set[str],
    ) -> None:
        self.guide = guide
        self.observed = observed
        self.layout = sampler.layout
        self.estimators = sampler.estimators
        self.sizes = sampler.sizes
        self.logits = sampler.logits
        self.terms = terms
        self._enumerated = sampler.enumerated
        self._guide_dims = sampler.guide_dims
        self.recycles = bool(sampler.recycled)
        self._scores = scores
        self._own_kl = own_kl

    @cached_property
    def costs(self) -> Costs:
        """The terms by the sites that they depend on."""
        if self._guide_dims.symbols:
            scored = {name: self._scored(name) for name in self.estimators}
            enumerated = [(scored.pop(name), dim) for name, dim in self._enumerated.items()]
            plates = self._guide_dims.plates
            return ChainCosts(self.terms, enumerated, scored.values(), plates, self.layout)
        sites = [
            EnumeratedSite(name, dim, self.log_prob(name).exp(), site_frames(self.guide[name]))
            for name, dim in self._enumerated.items()
        ]
        return Costs(self.terms, sites, self.layout)

    def _scored(self, name: str) -> ScoredSite:
        symbols = self._guide_dims.symbols[name]
        return ScoredSite(name, self.log_prob(name), site_frames(self.guide[name]), symbols)

    @cached_property
    def totals(self) -> Tensor:
        """The ELBO of each path, ``(paths, repetitions)``, with gradient."""
        shape = (len(self.layout.paths), self.layout.repetitions)
        return self.costs.totals().reshape(shape)

    def has(self, path: Path) -> bool:
        """Return whether the run has this path: its owner drew the value that the path takes."""
        return path.owner is None or path.value < self.sizes.get(path.owner, 0)

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

    def is_computed(self, name: str) -> bool:
        """Return whether a value is computed, not drawn."""
        return has_law_of(unwrap(self.guide[name]["fn"]), Delta)

    def draw_score(self, name: str) -> Tensor:
        """Score what was drawn at a site, neither scaled nor masked: the value, or its noise."""
        if self.estimators[name].route is not Route.PATHWISE:
            return self.log_prob(name)
        fn = self.guide[name]["fn"]
        return sum_rightmost(score_function(unwrap(fn), self.value(name)), event_dims(fn))

    def score_guide(self) -> None:
        """Score each of the guide's values with all of the score's gradient."""
        for name in self.estimators:
            self.log_prob(name)

    def frames(self) -> dict[str, Frames]:
        """The vectorised plates of each latent site, but for the particles'."""
        return {name: _own_frames(site_frames(site)) for name, site in self.guide.items()}

    def reached_terms(self, dependence: Dependence) -> list[ReachedTerm]:
        """Each term with how the latent values that were followed reached it."""
        reached = []
        for term in self.terms:
            own = not term.of_model and term.site in self.estimators
            # An estimator may hold parameters fixed in its score.
            score = self.log_prob(term.site) if own else term.value
            frames = _own_frames(term.frames)
            reached.append(ReachedTerm(term.site, dependence.marks(score), frames))
        return reached

    def shows_lost_gradients(self) -> bool:
        """Return whether each value has a gradient whose estimator needs the cost's."""
        return all(
            self.value(name).requires_grad
            for name, estimator in self.estimators.items()
            if estimator.needs_smooth_cost
        )

    def cost(self, name: str, *, live: bool = False) -> Tensor:
        """The downstream cost of a site, shaped like its ``log_prob``, detached unless live."""
        like = self.log_prob(name)
        frames = site_frames(self.guide[name])
        cost = self.costs.downstream(frames, like, name=name, live=live)
        if name in self._own_kl:  # it does not depend on the value drawn
            own = self._own_kl[name].value
            cost = cost - (own if live else own.detach())
        return cost


def _own_frames(frames: Frames) -> Frames:
    return frozenset(frame for frame in frames if frame.name != PARTICLE_PLATE)


def run_programs(call: Call, sampler: Sampler, subsample: SharedSubsample) -> tuple[Trace, Trace]:
    """Run the guide, then the model on its values; return the traces of model and guide.

    A guide that is a handler of this model (``AutoNormalMessenger`` and its like) runs both at
    once.

    Raises:
        DeeperPlates: If plates take a dimension that the layout uses otherwise.
    """
    layout = sampler.layout
    guide = poutine.unwrap(getattr(call.guide, "guide", call.guide))
    if isinstance(guide, GuideMessenger):
        sampler.recycles = False  # Pyro does not note the model's dimensions here
        with _left_dimensions_explained(sampler), subsample, sampler:
            _in_rows(call.guide, layout)(*call.args, **call.kwargs)
        model_trace, guide_trace = guide.get_traces()
        if guide.model != call.model:  # which may have sites that are hidden from the guide
            model_trace = _run_model(call, sampler, subsample, guide_trace)
    else:
        guide_trace = _run_guide(call, sampler, subsample)
        model_trace = _run_model(call, sampler, subsample, guide_trace)
    if is_validation_enabled():
        check_programs(model_trace, guide_trace, sampler.own_nesting)
    return model_trace, guide_trace


def _run_guide(call: Call, sampler: Sampler, subsample: SharedSubsample) -> Trace:
    traced = poutine.trace(_in_rows(call.guide, sampler.layout))
    with _left_dimensions_explained(sampler), subsample, sampler:
        traced(*call.args, **call.kwargs)
    _check_nesting(traced.trace, sampler)
    if sampler.recycled:
        sampler.guide_dims.read(traced.trace, sampler.layout.total_nesting)
    return traced.trace


def _run_model(
    call: Call, sampler: Sampler, subsample: SharedSubsample, guide_trace: Trace
) -> Trace:
    sums = SumMessenger(
        guide_trace,
        sampler.layout,
        sampler.enumerated,
        sampler.recycled,
        draws=not sampler.enumerate,
        dependence=sampler.dependence,
    )
    sampler.summed = sums.dims
    checked = ModelSiteCheck(guide_trace)(sums(_in_rows(call.model, sampler.layout)))
    traced = poutine.trace(poutine.replay(checked, trace=guide_trace))
    with (
        explain_mismatch(traced, guide_trace, lambda: sampler.own_nesting),
        _left_dimensions_explained(sampler),
        subsample,
    ):
        traced(*call.args, **call.kwargs)
    sampler.recycled |= sums.recycled
    _check_nesting(traced.trace, sampler)
    return traced.trace


def _in_rows(program: Callable[..., Any], layout: Layout) -> Callable[..., Any]:
    """Put a program into the particle plate, where the layout has one.

    The plate goes inside handlers that replay values: a replayed site is done, and a plate outside
    does not broadcast it any more.
    """
    if layout.particle_dim is None:
        return program
    return pyro.plate(PARTICLE_PLATE, layout.num_rows, dim=layout.particle_dim)(program)


def plate_nesting(trace: Trace) -> int:
    """Number of dimensions of a program's own plates."""
    dims = [
        frame.dim
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
        if frame.vectorized and frame.name != PARTICLE_PLATE
    ]
    return -min(dims, default=0)


def _check_nesting(trace: Trace, sampler: Sampler) -> None:
    nesting = plate_nesting(trace)
    counts = sampler.layout.vectorized or bool(sampler.enumerated or sampler.summed)
    if counts and nesting > cast(int, sampler.layout.plate_nesting):
        raise DeeperPlates(nesting)


@contextmanager
def _left_dimensions_explained(sampler: Sampler) -> Iterator[None]:
    """Add to errors over shapes which dimensions the values have that the program did not make."""
    try:
        yield
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if _particle_plate_is_in_the_way(error, sampler.layout):
            raise DeeperPlates(sampler.layout.total_nesting) from error
        left = []
        if (dim := sampler.layout.particle_dim) is not None:
            left += [f"{sampler.layout.num_rows} particles or coupled draws at {dim}"]
        every = {**sampler.enumerated, **sampler.summed}
        left += [f"every value of {name!r} at {at}" for name, at in every.items()]
        over_shapes = isinstance(error, (IndexError, RuntimeError)) or any(
            words in str(error) for words in ("Shape mismatch", "a single element")
        )
        if left and over_shapes:
            error.add_note(
                f"Values have dimensions on the left of the plates: {' and '.join(left)} of "
                "the batch shape. Write operations that broadcast over them, such as "
                "Vindex(loc)[..., z] (pyro.ops.indexing) for loc[z], or "
                "(z.unsqueeze(-2) @ weight).squeeze(-2) for z @ weight; or use "
                "vectorize_particles=False and no enumeration. Programs that nest more than "
                f"{sampler.layout.plate_nesting} plates need a larger max_plate_nesting."
            )
        raise


def _particle_plate_is_in_the_way(error: Exception, layout: Layout) -> bool:
    """Return whether a plate of the program requested the particle plate's dimension."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None or traceback.tb_frame.f_code is not _ALLOCATE:
        return False
    asked = traceback.tb_frame.f_locals
    # The particle plate of a loss within the programs has the name of ours: Pyro allows one.
    return asked["dim"] == layout.particle_dim and asked["name"] != PARTICLE_PLATE


def collect(
    model_trace: Trace,
    guide_trace: Trace,
    sampler: Sampler,
    *,
    analytic_kl: bool,
    full_scores: bool,
) -> Run:
    """Score both traces.

    Args:
        model_trace: The model's run.
        guide_trace: The guide's run.
        sampler: The sampler of the guide's values.
        analytic_kl: Whether closed-form KL divergences replace sampled terms.
        full_scores: Whether ``log q`` keeps its whole gradient, as a nonlinear bound needs.
            Otherwise each estimator drops the part of mean zero.
    """
    # Without dimensions of ours any dimension left of the plates is a mistake.
    nesting = sampler.layout.total_nesting if sampler.adds_dimensions else float("inf")
    guide = latent_sites(guide_trace)
    symbols = sampler.guide_dims.symbols
    sums = SummedTerms(
        model_trace, sampler.layout, sampler.summed, sampler.dependence, sampler.guide_dims
    )
    kls = analytic_kls(model_trace, guide, sums.depends, symbols) if analytic_kl else {}
    terms = list(kls.values())
    scores: dict[str, Tensor] = {}
    for name, site in _samples(guide_trace).items():
        if name in kls:
            continue
        estimator = sampler.estimators.get(name)
        if estimator is None:  # the guide itself fixed the value, or it is a factor
            check_factor(site)
            raw = score_of(site)
        else:
            sampler.check_unchanged(name, site["value"])
            bare = unwrap(site["fn"])
            with named_errors(site):
                score = log_mass if full_scores else estimator.log_prob
                raw = score(bare, site["value"])
            if full_scores or type(estimator).log_prob is Estimator.log_prob:
                scores[name] = raw
            if not (full_scores or estimator.keeps_score_gradient):
                raw = raw.detach()
        terms.append(make_term(site, -raw, nesting, of_model=False, symbols=symbols.get(name)))
    for name, site in _samples(model_trace).items():
        if name in kls:
            continue
        raw = score_of(site)
        if not sums.takes(site, raw, nesting):
            own = site["infer"].get("_dim_to_symbol")
            terms.append(make_term(site, raw, nesting, symbols=own))
    for term in terms:
        sums.check_scope(term.site, term.symbols, term.value)
    terms += sums.terms()
    if sampler.adds_dimensions:
        dims = sampler.enumerated.values()
        check_dims(terms, -min(dims, default=-sampler.layout.total_nesting))
    observed = {name for name, site in _samples(model_trace).items() if site["is_observed"]}
    return Run(guide, sampler, scores, terms, kls, observed)


def _samples(trace: Trace) -> dict[str, Any]:
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }
