"""Runs of guide and model at chosen values, and the joint states of their discrete sites."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_gumbel.distributions.families import event_dims, has_law_of, support_values, unwrap
from pyro_gumbel.estimators import Call, Estimator, Pathwise, Score
from pyro_gumbel.infer._checks import PARTICLE_PLATE
from pyro_gumbel.infer._costs import Frames, site_frames
from pyro_gumbel.infer._dependence import Dependence
from pyro_gumbel.infer._execution import preflight
from pyro_gumbel.infer._run import DeeperPlates, Run, collect, run_programs
from pyro_gumbel.infer._sampling import (
    MAIN,
    Layout,
    Memory,
    NestingNeeded,
    Sampler,
    SharedSubsample,
    left_filled,
)

__all__ = ["LONG_RUN", "Minibatches", "NotListable", "expectations", "find_states", "run", "walk"]

LONG_RUN = (
    "a long run of an unbiased estimator as the reference: gradient_draws(..., "
    "estimators={'reference': 'auto'}, num_draws=100_000, project=8, seed=1)['reference']."
)
NOTHING: Mapping[str, Tensor] = MappingProxyType({})
_ELEMENTS = 20_000  # the most rows times plate elements in one run
_COMPARED = 6  # runs with one state per element
_KINDS = 4  # groups of plate elements that share a state


class NotListable(ValueError):
    """The states cannot be enumerated, or are too many, for an exact gradient."""


class Minibatches(Messenger):
    """Gives plates their minibatches, and records the sites that choose minibatches."""

    def __init__(self, indices: Mapping[str, Tensor] = NOTHING) -> None:
        super().__init__()
        self.indices = indices
        self.sites: dict[str, Any] = {}

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            if msg["value"] is None:
                msg["value"] = self.indices.get(str(msg["name"]))
            self.sites[str(msg["name"])] = msg


def plain_estimator(msg: Any) -> Estimator:
    """Choose an estimator that keeps the distribution's own draws and log-probabilities."""
    return Pathwise() if unwrap(msg["fn"]).has_rsample else Score()


def run(
    call: Call,
    values: Mapping[str, Tensor] = NOTHING,
    layout: Layout | None = None,
    dependence: Dependence | None = None,
) -> Run:
    """Run the guide at given ``values``, and the model at the guide's values.

    ``values`` has values of latent sites and indices of plates, by name. All other sites are
    drawn. With a ``layout``, each row of a value is an element of the layout's plate.
    """
    layout = layout or Layout()
    sampler = Sampler(
        layout, plain_estimator, Memory(), exact=True, values=values, dependence=dependence
    )
    try:
        with Minibatches(values):
            traces = run_programs(call, sampler, SharedSubsample())
    except NestingNeeded:  # a site of the model is summed
        return run(call, values, Layout(preflight(call, plain_estimator)[1]), dependence)
    return collect(*traces, sampler, analytic_kl=False, full_scores=True)


def plate_dims(frames: Frames) -> dict[str, int]:
    """Return the dimensions of the programs' own plates by name."""
    return {f.name: f.dim for f in frames if f.name != PARTICLE_PLATE and f.dim is not None}


@dataclass(frozen=True)
class DiscreteSite:
    """A discrete latent site."""

    name: str
    support: Tensor  # the values of one variable, (C,) + event_shape of the variable alone
    batch_shape: tuple[int, ...]
    inner_shape: tuple[int, ...]  # of the independent variables that to_event bundles
    plates: dict[str, int]  # the dimensions of its vectorised plates


def discrete_sites(sites: Mapping[str, Any]) -> list[DiscreteSite]:
    """Describe the latent sites of a guide's run, in order."""
    found = []
    for name, site in sites.items():
        fn, batch_shape = unwrap(site["fn"]), tuple(site["fn"].batch_shape)
        if has_law_of(fn, Delta):
            continue  # one state
        if not fn.has_enumerate_support:
            raise NotListable(
                f"Site {name!r} ({type(fn).__name__}) cannot be enumerated, so the exact gradient "
                f"cannot be computed. Use {LONG_RUN}"
            )
        support = support_values(fn).reshape(-1, *fn.event_shape)
        inner_shape = tuple(fn.batch_shape[len(fn.batch_shape) - event_dims(site["fn"]) :])
        plates = plate_dims(site_frames(site))
        found.append(DiscreteSite(name, support, batch_shape, inner_shape, plates))
    return found


@dataclass(frozen=True)
class States:
    """All joint states, numbered. Elements of ``parallel`` plates are summed separately.

    A state consists of one number for each site. The number indexes the joint values of the site's
    variables in one element of the parallel plates. Numbers have the shape ``(rows, plates...)``.
    """

    sites: list[DiscreteSite]
    parallel: frozenset[str]
    nesting: int  # number of dimensions that the programs' plates take

    def shape(self, site: DiscreteSite) -> tuple[int, ...]:
        """Return the shape of a site's variables, with one element for a parallel plate."""
        shape = list(site.batch_shape)
        for name in self.parallel & set(site.plates):
            shape[site.plates[name]] = 1
        return (*shape, *site.inner_shape)

    def size(self, site: DiscreteSite) -> int:
        """Return the number of joint values of a site's variables."""
        return len(site.support) ** math.prod(self.shape(site))

    @property
    def count(self) -> int:
        """The number of states."""
        return math.prod(map(self.size, self.sites))

    def has_bearing(self, site: DiscreteSite, plates: Mapping[str, int]) -> bool:
        """Return whether a term in these plates may depend on the site."""
        return self.parallel & set(site.plates) <= set(plates)

    def numbers(self, states: Tensor) -> dict[str, Tensor]:
        """Split states, ``(rows,)``, into the sites' numbers, equal in all elements."""
        states, found = states.reshape(-1, *(1,) * self.nesting), {}
        for site in self.sites:
            found[site.name] = states.remainder(self.size(site))
            states = states.div(self.size(site), rounding_mode="floor")
        return found

    def states(self, numbers: Mapping[str, Tensor], plates: Mapping[str, int]) -> Tensor:
        """Return the state of each element of a term.

        Sites that the term cannot depend on have number 0.
        """
        found, stride = torch.zeros((1,) * (self.nesting + 1), dtype=torch.long), 1
        for site in self.sites:
            if self.has_bearing(site, plates):
                found = found + stride * numbers[site.name]
            stride *= self.size(site)
        return found

    def values(self, numbers: Mapping[str, Tensor], *, rows: bool = True) -> dict[str, Tensor]:
        """Return the sites' values, one row for each state, left of all plates.

        Without ``rows``, return the only row, without its dimension.
        """
        values = {}
        for site in self.sites:
            shape, ones = self.shape(site), (1,) * (self.nesting - len(site.batch_shape))
            powers = len(site.support) ** torch.arange(math.prod(shape)).reshape((*ones, *shape))
            own = numbers[site.name]
            own = own.reshape(*own.shape, *(1,) * len(site.inner_shape))
            digits = (own // powers).remainder(len(site.support))
            full = (*site.batch_shape, *site.inner_shape)
            value = site.support[digits.expand(len(own), *ones, *full)]
            values[site.name] = value if rows else value[(0,) * (1 + len(ones))]
        return values

    def reduce(self, value: Tensor, plates: Mapping[str, int]) -> Tensor:
        """Reshape a term to ``(rows, plates...)``, and sum over plates that are not parallel."""
        value = left_filled(value, self.nesting + 1)
        kept = {dim for name, dim in plates.items() if name in self.parallel}
        summed = [dim for dim in range(-self.nesting, 0) if dim not in kept]
        return value.sum(summed, keepdim=True) if summed else value


@torch.no_grad()
def find_states(
    call: Call, given: Mapping[str, Tensor], limit: int
) -> tuple[States | None, States]:
    """Choose as many plates as possible whose elements can be summed separately.

    A plate is excluded if a term outside of it depends on a site inside. For the other plates runs
    are compared.

    Returns:
        The states, or ``None`` if no choice with at most ``limit`` states agrees with single runs;
        and the states if all these plates could be chosen, which are the fewest.
    """
    with Dependence() as dependence:
        first = run(call, given, dependence=dependence)
        marks = [dependence.marks(term.value) for term in first.terms]
    sites = discrete_sites(first.guide)
    gathered = {
        plate
        for term, reached in zip(first.terms, marks, strict=True)
        for site in sites
        if site.name in reached
        for plate in set(site.plates) - set(plate_dims(term.frames))
    }
    dims = [dim for term in first.terms for dim in plate_dims(term.frames).values()]
    nesting = -min(dims, default=0)
    plates = sorted({name for site in sites for name in site.plates} - gathered)
    fewest = States(sites, frozenset(plates), nesting)
    for size in range(len(plates), -1, -1):
        for parallel in itertools.combinations(plates, size):
            states = States(sites, frozenset(parallel), nesting)
            if states.count <= limit and _agrees(call, given, states):
                return states, fewest
    return None, fewest


def expectations(call: Call, given: Mapping[str, Tensor], states: States) -> Iterator[Tensor]:
    """Yield parts of the ELBO, each a sum over a few states, with gradient."""
    elements = max((math.prod(site.batch_shape) for site in states.sites), default=1)
    for some in torch.arange(states.count).split(max(1, _ELEMENTS // max(elements, 1))):
        values = states.values(states.numbers(some))
        found = run(call, {**given, **values}, Layout(states.nesting, (MAIN,), len(some), True))
        yield _weigh(found, states, len(some))


def _weigh(found: Run, states: States, rows: int) -> Tensor:
    """Sum the terms of a run whose rows are states, weighted by their probabilities."""
    total = torch.zeros(())
    for term in found.terms:
        plates = plate_dims(term.frames)
        log_weight = torch.zeros(())
        for site in states.sites:
            if states.has_bearing(site, plates):
                log_prob = found.log_prob(site.name)
                log_weight = log_weight + states.reduce(log_prob, site.plates)
            else:  # the term is the same for all its values: average
                log_weight = log_weight - math.log(states.size(site))
        value = states.reduce(term.value, plates)
        weight, value = torch.broadcast_tensors(log_weight.exp(), value)
        value = value.expand(rows, *value.shape[1:])
        # A state of probability zero may have an infinite cost: 0 * inf would be nan.
        total = total + (weight * value.masked_fill(weight == 0, 0.0)).sum()
    return total


def _agrees(call: Call, given: Mapping[str, Tensor], states: States) -> bool:
    """Return whether the elements of parallel plates can be summed separately.

    Compare single runs, whose elements are in different states, with one run whose rows are
    states. In a row all elements are in the same state. The terms of an element must equal those
    in the row of its state. They differ if a program mixes rows, or if an element depends on the
    values of another.
    """
    singles = []
    for repeat in range(_COMPARED):
        numbers = _draw_numbers(states, repeat)
        single = run(call, {**given, **states.values(numbers, rows=False)})
        own = [states.states(numbers, plate_dims(term.frames)) for term in single.terms]
        singles.append((single, own))
    met = torch.cat([each.flatten() for _, own in singles for each in own]).unique()
    taken = {1, *(f.size for single, _ in singles for term in single.terms for f in term.frames)}
    together = _run_rows(call, given, states, met, taken)
    return together is not None and all(
        _same(single, own, together, states, met) for single, own in singles
    )


def _draw_numbers(states: States, repeat: int) -> dict[str, Tensor]:
    """Draw a number for each element of each site. Elements of one group share it.

    In the first two repeats all elements have the first value, or all the last. In later repeats
    one group has the first value, and another the last. Functions with jumps usually have their
    extremes there.
    """
    sizes = {n: s.batch_shape[s.plates[n]] for s in states.sites for n in s.plates}
    kinds = {name: torch.randperm(size) % _KINDS for name, size in sizes.items()}
    order, numbers = torch.randperm(_KINDS), {}
    for site in states.sites:
        last = states.size(site) - 1
        drawn = torch.randint(last + 1, (_KINDS,))
        drawn[:2] = torch.tensor([0, last])
        own = torch.zeros((1,) * (states.nesting + 1), dtype=torch.long)
        for name in states.parallel & set(site.plates):
            own = own + kinds[name].reshape(-1, *(1,) * (-1 - site.plates[name]))
        own = drawn[order][own % _KINDS]
        numbers[site.name] = own if repeat > 1 else torch.full_like(own, repeat * last)
    return numbers


def _run_rows(
    call: Call, given: Mapping[str, Tensor], states: States, met: Tensor, taken: set[int]
) -> Run | None:
    """Run the programs with one state per row. Return ``None`` if a term has another shape.

    The last row is repeated until the number of rows differs from the sizes of plates, ``taken``.
    """
    nesting = states.nesting
    rows = next(rows for rows in itertools.count(len(met)) if rows not in taken)
    numbers = states.numbers(met[torch.arange(rows).clamp(max=len(met) - 1)])
    layout = Layout(nesting, (MAIN,), rows, True)
    try:
        with Dependence() as dependence:
            found = run(call, {**given, **states.values(numbers)}, layout, dependence)
            reached = [dependence.marks(term.value).keys() for term in found.terms]
    except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError, DeeperPlates):
        return None  # the programs do not broadcast
    for term, names in zip(found.terms, reached, strict=True):
        shape = left_filled(term.value, nesting + 1).shape
        own = plate_dims(term.frames).values()
        stray = any(shape[dim] != 1 for dim in range(-nesting, 0) if dim not in own)
        # A term that depends on the guide's values must have an element for each row.
        fine = {rows} if names & found.guide.keys() else {1, rows}
        if stray or len(shape) > nesting + 1 or shape[0] not in fine:
            return None
    return found


def _same(single: Run, own: list[Tensor], together: Run, states: States, met: Tensor) -> bool:
    """Return whether the terms of a single run equal the rows of their states, ``own``."""
    if [term.site for term in single.terms] != [term.site for term in together.terms]:
        return False
    for one, many, elements in zip(single.terms, together.terms, own, strict=True):
        plates = plate_dims(one.frames)
        alone, rows = states.reduce(one.value, plates), states.reduce(many.value, plates)
        if len(rows) > 1:
            places = torch.searchsorted(met, elements).to(rows.device)
            rows = torch.take_along_dim(rows, places, 0)
        tolerance = 1e4 * torch.finfo(alone.dtype).eps
        if not torch.allclose(alone, rows, rtol=tolerance, atol=tolerance, equal_nan=True):
            return False
    return True


def walk(call: Call, given: Mapping[str, Tensor], limit: int) -> Iterator[Tensor]:
    """Yield the part of each state in the ELBO, for programs that branch on values."""
    waiting: list[dict[str, Tensor]] = [{}]
    visited = 0
    while waiting:
        values = waiting.pop()
        found = run(call, {**given, **values})
        missing = [site for site in discrete_sites(found.guide) if site.name not in values]
        if not missing:
            visited += 1
            log_prob = torch.stack([found.log_prob(name).sum() for name in found.guide]).sum()
            weight = log_prob.exp()
            reward = torch.stack([term.value.sum() for term in found.terms]).sum()
            yield torch.where(weight == 0, 0.0, weight * torch.where(weight == 0, 0.0, reward))
            continue
        states = States(missing[:1], frozenset(), len(missing[0].batch_shape))
        if visited + len(waiting) + states.count > limit:
            raise NotListable(
                f"exact_gradient: more than {limit:,} joint states, visited one by one. Raise "
                f"max_states, or use {LONG_RUN}"
            )
        (rows,) = states.values(states.numbers(torch.arange(states.count))).values()
        waiting += [{**values, missing[0].name: row} for row in rows]
