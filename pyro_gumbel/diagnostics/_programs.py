"""Runs of guide and model at chosen values, and the joint states of their discrete sites."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_gumbel.diagnostics._state import seed_torch
from pyro_gumbel.distributions.families import event_dims, has_law_of, support_values, unwrap
from pyro_gumbel.estimators import Call, Estimator, Pathwise, Score
from pyro_gumbel.infer._checks import PARTICLE_PLATE
from pyro_gumbel.infer._costs import Frames, site_frames
from pyro_gumbel.infer._dependence import Dependence
from pyro_gumbel.infer._execution import preflight
from pyro_gumbel.infer._run import Run, collect, run_programs
from pyro_gumbel.infer._sampling import (
    Layout,
    Memory,
    NestingNeeded,
    Sampler,
    SharedSubsample,
    left_filled,
)

__all__ = [
    "LONG_RUN",
    "NotListable",
    "States",
    "discrete_sites",
    "find_minibatches",
    "plain_estimator",
    "plate_dims",
    "run",
]

LONG_RUN = (
    "a long run of an unbiased estimator as the reference: gradient_draws(..., "
    "estimators={'reference': 'auto'}, num_draws=100_000, project=8, seed=1)['reference']."
)
NOTHING: Mapping[str, Tensor] = MappingProxyType({})
_FEW = 64  # minibatches that are all taken without a comparison
_COMPARED = 5  # pairs of minibatches
_LARGEST_TOLERANCE = 0.05  # in half precision


class NotListable(ValueError):
    """States cannot be listed, or are too many: there is no exact gradient."""


class _Minibatches(Messenger):
    """Gives minibatches to plates, and notes the sites of plates that draw one."""

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
    """Choose an estimator that leaves draws and scores as the distribution makes them."""
    return Pathwise() if unwrap(msg["fn"]).has_rsample else Score()


def run(
    call: Call,
    values: Mapping[str, Tensor] = NOTHING,
    layout: Layout | None = None,
    dependence: Dependence | None = None,
) -> Run:
    """Run the guide at ``values`` of latent sites and plates, and the model on the guide's.

    All other values are drawn. With a ``layout`` values are rows of its plate.
    """
    layout = layout or Layout()
    sampler = Sampler(
        layout, plain_estimator, Memory(), exact=True, values=values, dependence=dependence
    )
    try:
        with _Minibatches(values):
            traces = run_programs(call, sampler, SharedSubsample())
    except NestingNeeded:  # a site of the model is summed
        return run(call, values, Layout(preflight(call, plain_estimator)[1]), dependence)
    return collect(*traces, sampler, analytic_kl=False, full_scores=True)


def plate_dims(frames: Frames) -> dict[str, int]:
    """Return the dimensions of the programs' own plates by name."""
    return {f.name: f.dim for f in frames if f.name != PARTICLE_PLATE and f.dim is not None}


@dataclass(frozen=True)
class DiscreteSite:
    """A discrete latent site.

    Attributes:
        name: Its name.
        support: The values of one variable, ``(C,)`` and the event shape of the variable alone.
        batch_shape: The site's.
        inner_shape: The shape of the variables that ``to_event`` bundles.
        plates: The dimensions of its vectorised plates.
    """

    name: str
    support: Tensor
    batch_shape: tuple[int, ...]
    inner_shape: tuple[int, ...]
    plates: dict[str, int]


def discrete_sites(sites: Mapping[str, Any]) -> list[DiscreteSite]:
    """Describe the latent sites of a guide's run, in order."""
    found = []
    for name, site in sites.items():
        fn, batch_shape = unwrap(site["fn"]), tuple(site["fn"].batch_shape)
        if has_law_of(fn, Delta):
            continue  # one state
        if not fn.has_enumerate_support:
            raise NotListable(
                f"Site {name!r} ({type(fn).__name__}) cannot be enumerated, so there is no exact "
                f"gradient to be had. Take {LONG_RUN}"
            )
        support = support_values(fn).reshape(-1, *fn.event_shape)
        inner_shape = tuple(fn.batch_shape[len(fn.batch_shape) - event_dims(site["fn"]) :])
        plates = plate_dims(site_frames(site))
        found.append(DiscreteSite(name, support, batch_shape, inner_shape, plates))
    return found


@dataclass(frozen=True)
class States:
    """All joint states, numbered, where elements of ``parallel`` plates are summed one by one.

    A state has a number for each site, that of the joint value of the site's variables in one
    element of the parallel plates. Numbers have the shape ``(rows, plates...)``.
    """

    sites: list[DiscreteSite]
    parallel: frozenset[str]
    nesting: int  # number of dimensions that the programs' plates take

    def shape(self, site: DiscreteSite) -> tuple[int, ...]:
        """The shape of a site's variables, where a parallel plate has one element."""
        shape = list(site.batch_shape)
        for name in self.parallel & set(site.plates):
            shape[site.plates[name]] = 1
        return (*shape, *site.inner_shape)

    def size(self, site: DiscreteSite) -> int:
        """Number of joint values of a site's variables."""
        return len(site.support) ** math.prod(self.shape(site))

    @property
    def count(self) -> int:
        """The number of states."""
        return math.prod(map(self.size, self.sites))

    def has_bearing(self, site: DiscreteSite, plates: Mapping[str, int]) -> bool:
        """Return whether a term in these plates may depend on the site."""
        return self.parallel & set(site.plates) <= set(plates)

    def numbers(self, states: Tensor) -> dict[str, Tensor]:
        """Split states, ``(rows,)``, into numbers of the sites, alike in all elements."""
        states, found = states.reshape(-1, *(1,) * self.nesting), {}
        for site in self.sites:
            found[site.name] = states.remainder(self.size(site))
            states = states.div(self.size(site), rounding_mode="floor")
        return found

    def states(self, numbers: Mapping[str, Tensor], plates: Mapping[str, int]) -> Tensor:
        """The state in each element of a term; sites without bearing on it have number 0."""
        found, stride = torch.zeros((1,) * (self.nesting + 1), dtype=torch.long), 1
        for site in self.sites:
            if self.has_bearing(site, plates):
                found = found + stride * numbers[site.name]
            stride *= self.size(site)
        return found

    def values(self, numbers: Mapping[str, Tensor], *, rows: bool = True) -> dict[str, Tensor]:
        """The sites' values: each row a state, left of all plates, or the only row itself."""
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
        """Bring a term to ``(rows, plates...)``, and sum it over plates that are not parallel."""
        value = left_filled(value, self.nesting + 1)
        kept = {dim for name, dim in plates.items() if name in self.parallel}
        summed = [dim for dim in range(-self.nesting, 0) if dim not in kept]
        return value.sum(summed, keepdim=True) if summed else value


def find_minibatches(
    call: Call, leaves: Sequence[Tensor], max_states: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Choose at most ``max_states`` minibatches of each plate, with the average bound of all.

    If elements do not depend on the rest of their minibatch, the bound is a sum over elements.
    Minibatches that contain each element equally often then suffice. Otherwise all are taken.

    Returns:
        The minibatches of each subsampled plate, ``(number, batch)``; and the plates whose
        elements depend on the rest of their minibatch.
    """
    with torch.no_grad(), _Minibatches() as met:
        run(call)
    devices = {name: site["value"].device for name, site in met.sites.items()}
    sizes = {
        name: (site["fn"].size, site["fn"].subsample_size) for name, site in met.sites.items()
    }
    sizes = {name: own for name, own in sizes.items() if own[1] is not None and own[1] < own[0]}
    choices, dependent = {}, []
    for name, (size, batch) in sizes.items():  # windows have each element equally often
        starts = torch.arange(0, size, batch if size % batch == 0 else 1)
        windows = (starts[:, None] + torch.arange(batch)) % size
        choices[name] = windows.to(devices[name])
    start = {name: own[0] for name, own in choices.items()}
    for name, (size, batch) in sizes.items():
        ordered = _reads_others(call, leaves, start, name, size, _reverse)
        number = (math.perm if ordered else math.comb)(size, batch)
        if number > _FEW:
            if not (ordered or _reads_others(call, leaves, start, name, size, _exchange)):
                continue
            dependent.append(name)
        if number > max_states:
            raise NotListable(
                f"exact_gradient: terms of plate {name!r} depend on the rest of their minibatch, "
                f"as by batch normalisation: there are {number:,} minibatches, more than "
                f"max_states={max_states:,}. Put such modules into .eval(), run the whole plate "
                f"(subsample_size=None), raise max_states, or take {LONG_RUN}"
            )
        choose = itertools.permutations if ordered else itertools.combinations
        choices[name] = torch.tensor(list(choose(range(size), batch)), device=devices[name])
    return choices, dependent


Arrangements = tuple[list[Tensor], list[Tensor]]
Sums = tuple[Tensor, Tensor]


def _reverse(order: Tensor, batch: int) -> Arrangements:
    """Take a minibatch, and reverse it."""
    return [order[:batch]], [order[:batch].flip(0)]


def _exchange(order: Tensor, batch: int) -> Arrangements:
    """Take two minibatches that differ as far as possible, and exchange half of what differs."""
    differing = min(batch, len(order) - batch)
    shared, one, other = order[: batch + differing].tensor_split([batch - differing, batch])
    cut = differing // 2
    halves = [one[:cut], other[cut:]], [other[:cut], one[cut:]]
    whole = [torch.cat([shared, one]), torch.cat([shared, other])]
    return whole, [torch.cat([shared, *half]) for half in halves]


def _reads_others(
    call: Call,
    leaves: Sequence[Tensor],
    start: Mapping[str, Tensor],
    plate: str,
    size: int,
    arrange: Callable[[Tensor, int], Arrangements],
) -> bool:
    """Compare minibatches of a plate that have the same elements in another arrangement.

    Each element keeps its own latent values. A sum over elements, each with a random weight, does
    not change in total if two minibatches exchange elements. That holds for the terms of the bound
    and for the probabilities of latent values, and for their gradients.
    """
    with torch.no_grad():
        sites = discrete_sites(run(call, start).guide)

    def sums(index: Tensor, weights: Tensor, digits: Mapping[str, Tensor]) -> Sums:
        seed_torch(0)  # the same noise in each run, if the programs draw some
        given = {**start, plate: index.to(start[plate].device)}
        for site in sites:
            own = digits[site.name]
            if plate in site.plates:
                own = own.index_select(len(site.batch_shape) + site.plates[plate], index)
            given[site.name] = site.support[own]
        return _weighted_sums(run(call, given), leaves, plate, weights[index])

    generator = torch.Generator().manual_seed(0)
    for _ in range(_COMPARED):
        weights, digits = torch.rand(size, generator=generator) + 0.5, {}
        for site in sites:
            shape = [*site.batch_shape, *site.inner_shape]
            if plate in site.plates:
                shape[len(site.batch_shape) + site.plates[plate]] = size
            digits[site.name] = torch.randint(len(site.support), shape, generator=generator)
        order = torch.randperm(size, generator=generator)
        arranged = arrange(order, len(start[plate]))
        some, others = ([sums(index, weights, digits) for index in part] for part in arranged)
        if not all(map(_close, zip(*some, strict=True), zip(*others, strict=True))):
            return True
    return False


def _weighted_sums(found: Run, leaves: Sequence[Tensor], plate: str, weights: Tensor) -> Sums:
    """Sum every term and score over elements with their weights; and the gradient of all sums."""
    parts = [(term.value, plate_dims(term.frames)) for term in found.terms]
    parts += [
        (found.log_prob(n), plate_dims(site_frames(site))) for n, site in found.guide.items()
    ]
    totals = []
    for value, plates in parts:
        value = value.nan_to_num(posinf=0.0, neginf=0.0)
        if plate in plates:
            value = value * weights.to(value).reshape(-1, *(1,) * (-1 - plates[plate]))
        totals.append(value.sum())
    sums = torch.stack(totals)
    if not sums.requires_grad:
        return sums, sums.new_zeros(1)
    scales = torch.arange(1, 1 + len(sums), dtype=sums.dtype, device=sums.device).sqrt()
    gradients = torch.autograd.grad(
        scales @ sums, leaves, allow_unused=True, materialize_grads=True
    )
    return sums.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def _close(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Compare two sums of minibatches."""
    if len({len(part) for part in (*some, *others)}) > 1:
        return False  # the programs ran another course
    largest = max(part.abs().max() for part in (*some, *others))
    eps = max(torch.finfo(part.dtype).eps for part in some)
    difference = torch.stack([*some]).sum(0) - torch.stack([*others]).sum(0)
    return bool(difference.abs().max() <= min(1e4 * eps, _LARGEST_TOLERANCE) * largest)
