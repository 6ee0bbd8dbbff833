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

__all__ = ["expectations", "find_states", "walk"]

_ELEMENTS = 20_000  # rows times elements of plates in one run
_CHECKED = 8  # elements of each term that are compared


def find_states(
    call: Call, subsamples: Mapping[str, Tensor], max_states: int
) -> tuple[States | None, States]:
    """Choose the plates whose elements may be summed one by one.

    Returns:
        The states with the most such plates for which the programs agree with their own single
        runs, ``None`` if they never do; and the states with the fewest, for an error message.
    """
    first = evaluate(call, {}, subsamples)
    sites = discrete_sites(first.sites)
    nesting = max((-frame.dim for term in first.terms for frame in term.plates), default=0)
    plates = sorted({name for site in sites for name in site.plates})
    smallest = States(sites, frozenset(plates), nesting)
    for size in range(len(plates), -1, -1):
        for parallel in itertools.combinations(plates, size):
            states = States(sites, frozenset(parallel), nesting)
            if states.count <= max_states and _agrees(call, subsamples, states):
                return states, smallest
    return None, smallest


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
    """Compare a run with one value an element, drawn at random, with the rows of the same states.

    They differ if a program mixes rows, or if an element of a parallel plate sees another's value.
    """
    for _ in range(2):
        digits = {
            site.name: torch.randint(
                len(site.support), (*site.batch_shape, *site.inner_shape), dtype=torch.long
            )
            for site in states.sites
        }
        values = {site.name: site.values(digits[site.name]) for site in states.sites}
        single = evaluate(call, values, subsamples)
        per_term = [_places(term, states) for term in single.terms]
        places = [place for found in per_term for place in found]
        numbered: dict[str, list[Tensor]] = {site.name: [] for site in states.sites}
        for plates, element in places:
            for site in states.sites:
                numbered[site.name].append(_own_digits(site, digits, plates, element, states))
        stacked = {name: torch.stack(rows) for name, rows in numbered.items()}
        try:
            run = evaluate(
                call, states.rows(stacked), subsamples, (len(places), -states.nesting - 1)
            )
        except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
            return False  # the programs do not broadcast
        if [term.name for term in run.terms] != [term.name for term in single.terms]:
            return False
        if not _same(single, run, per_term, states):
            return False
    return True


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
    single: Evaluation, run: Evaluation, per_term: list[list[Place]], states: States
) -> bool:
    row, rows = 0, sum(len(found) for found in per_term)
    for one, many, found in zip(single.terms, run.terms, per_term, strict=True):
        plates = {frame.name: frame.dim for frame in one.plates}
        alone = _reduce(one.value, states, plates)
        together = _reduce(many.value, states, plates)
        together = together.expand(rows, *together.shape[1:])
        for _, element in found:
            a, b = _at(alone[0], element), _at(together[row], element)
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
