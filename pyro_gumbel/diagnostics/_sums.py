"""Expectations over joint states: rows of one run where the programs allow it, else run by run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from pyro_gumbel.diagnostics._programs import Evaluation, Term, evaluate
from pyro_gumbel.diagnostics._states import DiscreteSite, States, discrete_sites
from pyro_gumbel.estimators import Call
from pyro_gumbel.infer._dependence import Dependence

__all__ = ["expectations", "find_states", "walk"]

_ELEMENTS = 20_000  # rows times elements of plates in one run
_CHECKED = 8  # elements of each term that are compared
_COMPARED = 6  # states


def find_states(
    call: Call, subsamples: Mapping[str, Tensor], max_states: int
) -> tuple[States | None, States]:
    """Choose the plates whose elements may be summed one by one.

    Those whose elements meet in a term outside are none of them. For the others runs are compared.

    Returns:
        The states with the most such plates for which the programs agree with their own single
        runs, ``None`` if they never do; and the states with the fewest, for an error message.
    """
    first = evaluate(call, {}, subsamples)
    sites = discrete_sites(first.sites)
    nesting = max((-frame.dim for term in first.terms for frame in term.plates), default=0)
    gathered = _gathered_plates(call, subsamples, sites)
    plates = sorted({name for site in sites for name in site.plates} - gathered)
    smallest = States(sites, frozenset(plates), nesting)
    for size in range(len(plates), -1, -1):
        for parallel in itertools.combinations(plates, size):
            states = States(sites, frozenset(parallel), nesting)
            if states.count <= max_states and _agrees(call, subsamples, states):
                return states, smallest
    return None, smallest


def _gathered_plates(
    call: Call, subsamples: Mapping[str, Tensor], sites: list[DiscreteSite]
) -> set[str]:
    """Find the plates whose elements meet in a term outside of them."""
    plates = {site.name: set(site.plates) for site in sites}
    values = {site.name: site.values(_some_digits(site, 2)) for site in sites}
    with Dependence() as dependence:
        run = evaluate(call, _followed(dependence, values), subsamples)
        return {
            plate
            for term in run.terms
            for name in dependence.marks(term.value)
            for plate in plates[name] - {frame.name for frame in term.plates}
        }


def _followed(dependence: Dependence, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: dependence.follow(name, value) for name, value in values.items()}


def expectations(call: Call, subsamples: Mapping[str, Tensor], states: States) -> Iterator[Tensor]:
    """Yield the parts of the ELBO, a few states at a time, each with its gradient."""
    elements = max((math.prod(site.batch_shape) for site in states.sites), default=1)
    chunk = max(1, _ELEMENTS // max(elements, 1))
    for start in range(0, states.count, chunk):
        numbers = torch.arange(start, min(start + chunk, states.count))
        values = states.rows(states.digits(numbers))
        run = evaluate(call, values, subsamples, (len(numbers), -states.nesting - 1))
        yield _weigh(run, states, len(numbers))


def _weigh(run: Evaluation, states: States, rows: int) -> Tensor:
    """Sum the terms of a run whose rows are states, each with the probability of its state."""
    total = torch.zeros(())
    log_probs = {
        site.name: _reduce(run.log_probs[site.name], states, site.plates) for site in states.sites
    }
    for term in run.terms:
        plates = {frame.name: frame.dim for frame in term.plates}
        value = _reduce(term.value, states, plates)
        log_weight = torch.zeros(())
        for site in states.sites:
            if _within(site, plates, states.parallel):
                log_weight = log_weight + log_probs[site.name]
            else:  # the term does not depend on it: each of its values counts alike
                log_weight = log_weight - math.log(site.num_states(states.parallel))
        weight = log_weight.exp()
        weight, value = torch.broadcast_tensors(weight, value)
        value = value.expand(rows, *value.shape[1:])
        # A state of probability zero may have an infinite cost: 0 * inf would be nan.
        total = total + (weight * value.masked_fill(weight == 0, 0.0)).sum()
    return total


def _reduce(value: Tensor, states: States, plates: Mapping[str, int]) -> Tensor:
    """Bring a log-probability to ``(rows, plates...)``, summing what is not summed one by one."""
    full = states.nesting + 1
    value = value.reshape((1,) * (full - value.dim()) + value.shape)
    kept = {dim for name, dim in plates.items() if name in states.parallel}
    summed = [dim for dim in range(-states.nesting, 0) if dim not in kept]
    return value.sum(summed, keepdim=True) if summed else value


def _within(site: DiscreteSite, plates: Mapping[str, int], parallel: frozenset[str]) -> bool:
    return all(name in plates for name in site.plates if name in parallel)


@torch.no_grad()
def _agrees(call: Call, subsamples: Mapping[str, Tensor], states: States) -> bool:
    """Compare runs with one value an element with the rows of the same states.

    They differ if a program mixes rows, or if an element of a parallel plate sees another's value.
    """
    singles, places = [], []
    numbered: dict[str, list[Tensor]] = {site.name: [] for site in states.sites}
    for number in range(_COMPARED):
        digits = {site.name: _some_digits(site, number) for site in states.sites}
        values = {site.name: site.values(digits[site.name]) for site in states.sites}
        singles.append(evaluate(call, values, subsamples))
        places.append([_places(term, states) for term in singles[-1].terms])
        for plates, element in itertools.chain(*places[-1]):
            for site in states.sites:
                numbered[site.name].append(_own_digits(site, digits, plates, element, states))
    sizes = {frame.size for single in singles for term in single.terms for frame in term.plates}
    stacked = {name: torch.stack(_pad(rows, sizes)) for name, rows in numbered.items()}
    run = _run_rows(call, states.rows(stacked), subsamples, states.nesting)
    if run is None:
        return False
    start = 0
    for single, found in zip(singles, places, strict=True):
        if [term.name for term in single.terms] != [term.name for term in run.terms]:
            return False
        if not _same(single, run, found, states, start):
            return False
        start += sum(map(len, found))
    return True


def _pad(rows: list[Tensor], sizes: set[int]) -> list[Tensor]:
    """Make the number of rows one that cannot be mistaken for the size of a plate."""
    number = len(rows)
    while number in sizes or number == 1:
        number += 1
    return rows + rows[:1] * (number - len(rows))


def _run_rows(
    call: Call, values: dict[str, Tensor], subsamples: Mapping[str, Tensor], nesting: int
) -> Evaluation | None:
    """Run the programs on rows; ``None`` if a term is not laid out as rows and plates say."""
    rows = len(next(iter(values.values()))) if values else 1
    try:
        with Dependence() as dependence:
            followed = _followed(dependence, values)
            run = evaluate(call, followed, subsamples, (rows, -nesting - 1))
            reached = [bool(dependence.marks(term.value)) for term in run.terms]
    except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
        return None  # the programs do not broadcast
    for term, depends in zip(run.terms, reached, strict=True):
        shape = term.value.shape
        shape = torch.Size((1,) * (nesting + 1 - len(shape))) + shape
        dims = {frame.dim for frame in term.plates}
        stray = any(shape[dim] != 1 for dim in range(-nesting, 0) if dim not in dims)
        # What is computed from values that differ between rows has a number for each of them.
        whole = {rows} if depends else {1, rows}
        if stray or len(shape) > nesting + 1 or shape[0] not in whole:
            return None
    return run


def _some_digits(site: DiscreteSite, number: int) -> Tensor:
    """Every element's first value, or last one: hard functions are seldom extreme elsewhere.

    From the third set of digits on they are random.
    """
    shape = (*site.batch_shape, *site.inner_shape)
    last = len(site.support) - 1
    if number < 2:
        return torch.full(shape, number * last, dtype=torch.long)
    return torch.randint(last + 1, shape, dtype=torch.long)


Place = tuple[dict[str, int], dict[int, int]]


def _places(term: Term, states: States) -> list[Place]:
    """A few elements of a term's parallel plates: the plates, and an index by dimension."""
    plates = {frame.name: frame.dim for frame in term.plates}
    sizes = {frame.dim: frame.size for frame in term.plates if frame.name in states.parallel}
    return [
        (plates, {dim: int(torch.randint(size, ())) for dim, size in sizes.items()})
        for _ in range(_CHECKED if sizes else 1)
    ]


def _own_digits(
    site: DiscreteSite,
    digits: dict[str, Tensor],
    plates: dict[str, int],
    element: dict[int, int],
    states: States,
) -> Tensor:
    """The digits that an element saw; the first value of a site that its term cannot depend on."""
    shape = (*site.joint_shape(states.parallel), *site.inner_shape)
    if not _within(site, plates, states.parallel):
        return torch.zeros(shape, dtype=torch.long)
    own = digits[site.name]
    for name, dim in site.plates.items():
        if name in states.parallel:
            axis = len(site.batch_shape) + dim
            own = own.narrow(axis, element[dim], 1)
    return own.reshape(shape)


def _same(
    single: Evaluation, run: Evaluation, per_term: list[list[Place]], states: States, row: int
) -> bool:
    """Compare a single run with its rows, which are those from ``row`` on."""
    for one, many, found in zip(single.terms, run.terms, per_term, strict=True):
        plates = {frame.name: frame.dim for frame in one.plates}
        alone = _reduce(one.value, states, plates)
        together = _reduce(many.value, states, plates)
        for _, element in found:
            a, b = _at(alone[0], element), _at(together[min(row, len(together) - 1)], element)
            tolerance = 1e4 * torch.finfo(a.dtype).eps
            if not torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True):
                return False
            row += 1
    return True


def _at(value: Tensor, element: dict[int, int]) -> Tensor:
    for dim, index in element.items():
        if value.shape[dim] > 1:
            value = value.narrow(dim, index, 1)
    return value.sum()


def walk(call: Call, subsamples: Mapping[str, Tensor], max_states: int) -> Iterator[Tensor]:
    """Yield the parts of the ELBO state by state, for programs whose course depends on values.

    Raises:
        ValueError: If there are more than ``max_states``.
    """
    waiting: list[dict[str, Tensor]] = [{}]
    visited = 0
    while waiting:
        values = waiting.pop()
        run = evaluate(call, values, subsamples)
        missing = [site for site in discrete_sites(run.sites) if site.name not in values]
        if not missing:
            visited += 1
            log_prob = torch.stack([value.sum() for value in run.log_probs.values()]).sum()
            weight = log_prob.exp()
            reward = torch.stack([term.value.sum() for term in run.terms]).sum()
            yield torch.where(weight == 0, 0.0, weight * torch.where(weight == 0, 0.0, reward))
            continue
        site = missing[0]
        states = States([site], frozenset(), len(site.batch_shape))
        if visited + len(waiting) + states.count > max_states:
            raise ValueError(
                f"exact_gradient: more than {max_states:,} joint states, visited one by one. "
                "Raise max_states, or take a long run of an unbiased estimator as the reference."
            )
        for number in range(states.count):
            digits = states.digits(torch.tensor([number]))[site.name][0]
            waiting.append({**values, site.name: site.values(digits)})
