"""The exact gradient, by summing over all joint states of the discrete sites."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from pyro_gumbel._validate import check_coords, check_dims, check_programs, integer
from pyro_gumbel.diagnostics._moments import dims_of
from pyro_gumbel.diagnostics._programs import (
    LONG_RUN,
    NotListable,
    States,
    discrete_sites,
    find_minibatches,
    plate_dims,
    run,
)
from pyro_gumbel.diagnostics._state import (
    Params,
    check_complete,
    find_parameters,
    preserved,
    read_gradients,
    seed_everything,
    seeds,
)
from pyro_gumbel.estimators import Call
from pyro_gumbel.infer._dependence import Dependence
from pyro_gumbel.infer._run import DeeperPlates, Run
from pyro_gumbel.infer._sampling import MAIN, Layout, left_filled

__all__ = ["exact_gradient", "sum_states"]

_ELEMENTS = 20_000  # rows times elements of plates in one run
_COMPARED = 6  # runs with one value an element
_KINDS = 4  # of elements of a plate


def exact_gradient(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    params: Params = None,
    max_states: int = 100_000,
    coords: Mapping[str, Any] | None = None,
    dims: dict[str, list[str]] | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> xr.Dataset:
    r"""Compute the exact gradient of the loss by enumerating all discrete states.

    .. math:: -\nabla_\phi \sum_z q_\phi(z)\,(\log p(x, z) - \log q_\phi(z))

    The gradient is that of the loss, the negative ELBO, with respect to each parameter's
    unconstrained value: what the draws of :func:`gradient_draws` estimate. No gradient estimator
    takes part in it.

    The elements of a plate are summed one by one where they are independent of one another, which
    is checked by comparing runs; eight latents of four categories for each of a hundred images
    then are :math:`4^8` states and not :math:`4^{800}`. States are rows of one run where the
    programs broadcast, and runs of their own where not. A plate that draws a minibatch is averaged
    over minibatches that hold each element equally often. If its elements depend on the rest of
    their minibatch, as by batch normalisation, all minibatches are taken, and ``max_states``
    bounds their joint states; this is found by exchanging elements between minibatches.

    Args:
        model: The model.
        guide: The guide; gradient estimators configured in it play no part.
        *args: Arguments of both.
        params: As in :func:`gradient_draws`: names to restrict to, or values to take it at.
        max_states: The number of joint states that are still summed, those of all minibatches if
            their elements depend on one another.
        coords: Coordinates of named dimensions.
        dims: For each parameter the names of its dimensions.
        seed: Seed under which parameters are made that the programs have not made yet.
        **kwargs: Keyword arguments of both.

    Returns:
        A Dataset with one variable a parameter; the attributes hold the exact ``loss`` and the
        number of ``states``.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If there are more states or minibatches than ``max_states``, a site of the
            guide is not discrete, or one of the model's latent sites is missing from the guide.

    Example:
        >>> def model():
        ...     pyro.sample("z", dist.Bernoulli(0.3))
        >>> def guide():
        ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.0))))
        >>> exact = exact_gradient(model, guide)
        >>> round(float(exact["l"]), 4)  # (log 0.7 - log 0.3) / 4
        0.2118
    """
    check_programs(model, guide)
    check_coords(coords)
    max_states = integer("max_states", max_states, 1)
    call = Call(model, guide, args, kwargs)
    return sum_states(call, params, max_states, seed, dims=dims).assign_coords(dict(coords or {}))


def sum_states(
    call: Call,
    params: Params,
    max_states: int,
    seed: int,
    *,
    dims: Any = None,
    deadline: float = math.inf,
) -> xr.Dataset:
    """Compute the gradient, unless ``time.perf_counter()`` passes ``deadline``: NotListable."""
    with preserved() as keep, torch.enable_grad():
        seed_everything(seeds(seed, 1)[0])  # parameters are made as gradient_draws makes them
        leaves = find_parameters(call, keep, params)
        check_dims(dims, leaves)
        own_dims = {name: dims_of(name, leaf.dim(), dims, leaves) for name, leaf in leaves.items()}
        read_gradients(leaves)
        choices, dependent = find_minibatches(call, list(leaves.values()), max_states)
        batches = math.prod(map(len, choices.values()))
        limit = max_states // batches if dependent else max_states
        loss, count = 0.0, 0
        for indices in itertools.product(*choices.values()):
            given = dict(zip(choices, indices, strict=True))
            states, fewest = _find_states(call, given, limit)
            if states is not None:
                parts, count = _expectations(call, given, states), states.count
            elif fewest.count <= limit:
                parts, count = _walk(call, given, limit), 0
            else:
                each = f" in each of {batches:,} minibatches" if dependent else ""
                raise NotListable(
                    f"exact_gradient: {fewest.count:,} joint states of the sites "
                    f"{[site.name for site in fewest.sites]}{each} are more than "
                    f"max_states={max_states:,}. Raise max_states, or take {LONG_RUN}"
                )
            for part in parts:
                if time.perf_counter() > deadline:
                    raise NotListable("exact_gradient: the joint states take too long.")
                loss -= part.item() / batches
                count += states is None
                if part.requires_grad:
                    (-part / batches).backward()
        check_complete(leaves, params)
        gradients = [gradient.detach().cpu().numpy().copy() for gradient in read_gradients(leaves)]
    variables = {n: (own_dims[n], gradient) for n, gradient in zip(leaves, gradients, strict=True)}
    return xr.Dataset(variables, attrs={"loss": loss, "states": count, "estimator": "exact"})


@torch.no_grad()
def _find_states(
    call: Call, given: Mapping[str, Tensor], limit: int
) -> tuple[States | None, States]:
    """Choose the plates whose elements are summed one by one: as many as possible.

    A plate whose elements meet in a term outside of it is not one of them. For the others runs
    are compared.

    Returns:
        The states, or ``None`` if no choice of at most ``limit`` states agrees with single runs;
        and the fewest states that there may be.
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
    nesting = max(
        (-dim for term in first.terms for dim in plate_dims(term.frames).values()), default=0
    )
    plates = sorted({name for site in sites for name in site.plates} - gathered)
    fewest = States(sites, frozenset(plates), nesting)
    for size in range(len(plates), -1, -1):
        for parallel in itertools.combinations(plates, size):
            states = States(sites, frozenset(parallel), nesting)
            if states.count <= limit and _agrees(call, given, states):
                return states, fewest
    return None, fewest


def _expectations(call: Call, given: Mapping[str, Tensor], states: States) -> Iterator[Tensor]:
    """Yield the parts of the ELBO, a few states at a time, each with its gradient."""
    elements = max((math.prod(site.batch_shape) for site in states.sites), default=1)
    for some in torch.arange(states.count).split(max(1, _ELEMENTS // max(elements, 1))):
        values = states.values(states.numbers(some))
        found = run(call, {**given, **values}, Layout(states.nesting, (MAIN,), len(some), True))
        yield _weigh(found, states, len(some))


def _weigh(found: Run, states: States, rows: int) -> Tensor:
    """Sum the terms of a run whose rows are states, each with the probability of its state."""
    total = torch.zeros(())
    for term in found.terms:
        plates = plate_dims(term.frames)
        log_weight = torch.zeros(())
        for site in states.sites:
            if states.has_bearing(site, plates):
                log_prob = found.log_prob(site.name)
                log_weight = log_weight + states.reduce(log_prob, site.plates)
            else:  # each of its values counts alike
                log_weight = log_weight - math.log(states.size(site))
        weight, value = torch.broadcast_tensors(
            log_weight.exp(), states.reduce(term.value, plates)
        )
        value = value.expand(rows, *value.shape[1:])
        # A state of probability zero may have an infinite cost: 0 * inf would be nan.
        total = total + (weight * value.masked_fill(weight == 0, 0.0)).sum()
    return total


def _agrees(call: Call, given: Mapping[str, Tensor], states: States) -> bool:
    """Compare runs of one state, whose elements differ, with a run whose rows are states.

    In a single run each element of a parallel plate takes one of a few states. In a row all
    elements are in the same state. So an element has the terms of its state's row, unless a
    program mixes rows or an element sees the values of another.
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
    """Draw a number for each element of each site; elements of one kind have the same numbers.

    In the first two repeats all have the first value, or all the last, and later one kind of
    elements has either: hard functions are seldom extreme elsewhere.
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
    """Run the programs on rows; ``None`` if a term is not laid out as rows and plates say.

    Rows are repeated until their number differs from the sizes of plates, ``taken``.
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
        # What is computed from values that differ between rows has a number for each of them.
        fine = {rows} if names & found.guide.keys() else {1, rows}
        if stray or len(shape) > nesting + 1 or shape[0] not in fine:
            return None
    return found


def _same(single: Run, own: list[Tensor], together: Run, states: States, met: Tensor) -> bool:
    """Compare a single run with the rows of its elements' states, ``own`` for each term."""
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


def _walk(call: Call, given: Mapping[str, Tensor], limit: int) -> Iterator[Tensor]:
    """Yield the parts of the ELBO state by state, for programs whose course depends on values."""
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
                f"max_states, or take {LONG_RUN}"
            )
        (rows,) = states.values(states.numbers(torch.arange(states.count))).values()
        waiting += [{**values, missing[0].name: row} for row in rows]
