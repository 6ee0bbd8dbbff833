"""Runs of guide and model at chosen values, their discrete sites, and minibatches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_gumbel.diagnostics._state import seed_torch
from pyro_gumbel.distributions.families import (
    event_dims,
    has_law_of,
    log_mass,
    support_values,
    unwrap,
    wrap_score,
)
from pyro_gumbel.estimators import Call
from pyro_gumbel.infer._costs import Frames, score_of, site_frames
from pyro_gumbel.infer._run import plate_nesting
from pyro_gumbel.infer._sampling import Layout, NestingNeeded
from pyro_gumbel.infer._state import preserved_rng
from pyro_gumbel.infer._summed import SummedTerms, SumMessenger

__all__ = [
    "LONG_RUN",
    "DiscreteSite",
    "Run",
    "States",
    "Term",
    "discrete_sites",
    "find_minibatches",
    "plates_of",
    "run",
]

LONG_RUN = (
    "a long run of an unbiased estimator as the reference: gradient_draws(..., "
    "estimators={'reference': 'auto'}, num_draws=100_000, project=8, seed=1)['reference']."
)
_ROWS = "diagnostic_rows"
_FEW = 64  # minibatches that are all taken without a comparison
_COMPARED = 5  # pairs of minibatches
_LARGEST_TOLERANCE = 0.05  # in half precision


@dataclass(frozen=True)
class Term:
    """A term of the ELBO, scaled and masked, of its site's batch shape, and its plates."""

    name: str
    value: Tensor
    plates: Frames

    @property
    def dims(self) -> dict[str, int]:
        """The dimensions of the plates by their names."""
        return {frame.name: frame.dim for frame in self.plates}


@dataclass(frozen=True)
class Run:
    """The result of one run."""

    terms: list[Term]  # log p and -log q of every site
    log_probs: dict[str, Tensor]  # of the values of the guide's latents, neither scaled nor masked
    sites: dict[str, Any]  # the guide's latents
    subsamples: dict[str, Any]  # the sites of plates that draw a minibatch


class _Given(Messenger):
    """Sets the values of latent sites, and the minibatches of plates."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Message) -> None:
        if msg["value"] is None and msg["name"] in self.values:
            msg["value"] = self.values[str(msg["name"])]


def run(
    call: Call,
    values: Mapping[str, Tensor] = MappingProxyType({}),
    rows: tuple[int, int] | None = None,
) -> Run:
    """Run the guide at ``values``, and the model on the guide's.

    ``values`` are those of latent sites, and the indices of plates that draw a minibatch. All
    others are drawn. ``rows`` is the size and the dimension, left of all plates, of a plate around
    both programs.
    """
    guide, model = call.guide, call.model
    if rows is not None:
        plate = pyro.plate(_ROWS, rows[0], dim=rows[1])
        guide, model = plate(guide), plate(model)
    with _Given(values):
        guide_trace = poutine.trace(guide).get_trace(*call.args, **call.kwargs)

        def run_model(layout: Layout, *, draws: bool = False) -> tuple[Trace, SumMessenger]:
            sums = SumMessenger(guide_trace, layout, {}, draws=draws)
            replayed = poutine.replay(sums(model), trace=guide_trace)
            return poutine.trace(replayed).get_trace(*call.args, **call.kwargs), sums

        layout = Layout(None if rows is None else -rows[1])
        try:
            model_trace, summed = run_model(layout)
        except NestingNeeded:
            with preserved_rng():
                layout = Layout(plate_nesting(run_model(layout, draws=True)[0]))
            model_trace, summed = run_model(layout)
    sums = SummedTerms(model_trace, layout, summed.dims)
    found = Run([], {}, {}, {})
    for trace, sign in ((guide_trace, -1), (model_trace, 1)):
        trace.compute_log_prob()
        for name, site in trace.nodes.items():
            if site["type"] != "sample":
                continue
            if site_is_subsample(site):
                found.subsamples[name] = site
                continue
            value = site["log_prob"]
            if trace is model_trace and sums.takes(
                site, score_of(site), layout.plate_nesting or 0
            ):
                continue
            if not site["is_observed"] and name not in summed.dims:
                if name not in guide_trace:
                    raise ValueError(
                        f"The model's latent site {name!r} is missing from the guide, whose sites "
                        f"are {list(guide_trace.stochastic_nodes)}. Sample it in the guide, "
                        "observe it in the model, or, if it is discrete, sum over it: "
                        "infer={'enumerate': 'parallel'}."
                    )
                # torch has clamped the logits that it derives from probabilities.
                fn = site["fn"]
                mass = log_mass(unwrap(fn), site["value"])
                value = scale_and_mask(wrap_score(fn, mass), site["scale"], site["mask"])
                if trace is guide_trace:
                    found.sites[name] = site
                    found.log_probs[name] = sum_rightmost(mass, event_dims(fn))
            found.terms.append(Term(name, sign * value, plates_of(site)))
    for term in sums.terms():
        found.terms.append(Term(term.site, term.value, _own(term.frames)))
    return found


def plates_of(site: Any) -> Frames:
    """The vectorised plates of a site, without that of the rows."""
    return _own(site_frames(site))


def _own(frames: Frames) -> Frames:
    return frozenset(frame for frame in frames if frame.name != _ROWS)


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
        fn = unwrap(site["fn"])
        if has_law_of(fn, Delta):
            continue  # one state
        if not fn.has_enumerate_support:
            raise ValueError(
                f"Site {name!r} ({type(fn).__name__}) cannot be enumerated, so there is no exact "
                f"gradient to be had. Take {LONG_RUN}"
            )
        support = support_values(fn).reshape(-1, *fn.event_shape)
        inner_shape = fn.batch_shape[len(fn.batch_shape) - event_dims(site["fn"]) :]
        plates = {frame.name: frame.dim for frame in plates_of(site)}
        batch_shape = tuple(site["fn"].batch_shape)
        found.append(DiscreteSite(name, support, batch_shape, tuple(inner_shape), plates))
    return found


@dataclass(frozen=True)
class States:
    """All joint states, numbered, where elements of ``parallel`` plates take the same state."""

    sites: list[DiscreteSite]
    parallel: frozenset[str]  # plates whose elements are independent, and so summed one by one
    nesting: int  # number of dimensions that the programs' plates take

    def shape(self, site: DiscreteSite) -> tuple[int, ...]:
        """The shape of a site's variables, where a parallel plate has one element."""
        shape = list(site.batch_shape)
        for name, dim in site.plates.items():
            shape[dim] = 1 if name in self.parallel else shape[dim]
        return (*shape, *site.inner_shape)

    def size(self, site: DiscreteSite) -> int:
        """Number of joint values of a site's variables."""
        return len(site.support) ** math.prod(self.shape(site))

    @property
    def count(self) -> int:
        """The number of states."""
        return math.prod(map(self.size, self.sites))

    def digits(self, states: Tensor) -> dict[str, Tensor]:
        """Number each variable's value: ``(R,)`` and the shape of the variables."""
        found = {}
        for site in reversed(self.sites):
            base, shape = len(site.support), self.shape(site)
            powers = base ** torch.arange(math.prod(shape))
            own = states.remainder(self.size(site))
            found[site.name] = (own[:, None] // powers).remainder(base).reshape(-1, *shape)
            states = states.div(self.size(site), rounding_mode="floor")
        return found

    def rows(self, digits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn digits into values of which each state is a row, left of all plates."""
        values = {}
        for site in self.sites:
            value, rank = site.support[digits[site.name]], len(site.batch_shape)
            ones = (1,) * (self.nesting - rank)
            own, event = value.shape[1 : 1 + rank], value.shape[1 + rank :]
            value = value.reshape(len(value), *ones, *own, *event)
            values[site.name] = value.expand(len(value), *ones, *site.batch_shape, *event)
        return values

    def reduce(self, value: Tensor, plates: Mapping[str, int]) -> Tensor:
        """Bring a term to ``(rows, plates...)``, and sum it over plates that are not parallel."""
        value = value.reshape((1,) * (self.nesting + 1 - value.dim()) + value.shape)
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
    with torch.no_grad():
        subsamples = run(call).subsamples
    plates = {
        name: (site["fn"].size, site["fn"].subsample_size, site["value"].device)
        for name, site in subsamples.items()
        if site["fn"].subsample_size is not None and site["fn"].subsample_size < site["fn"].size
    }
    choices, dependent = {}, []
    for name, (size, batch, device) in plates.items():  # windows have each element equally often
        starts = torch.arange(0, size, batch if size % batch == 0 else 1)
        choices[name] = ((starts[:, None] + torch.arange(batch)) % size).to(device)
    start = {name: windows[0] for name, windows in choices.items()}
    for name, (size, batch, device) in plates.items():
        comparison = _Comparison(call, leaves, name, size, start)
        ordered = comparison.finds_difference(_reverse, batch)
        number = (math.perm if ordered else math.comb)(size, batch)
        if number > _FEW:
            if not (ordered or comparison.finds_difference(_exchange, batch)):
                continue
            dependent.append(name)
        if number > max_states:
            raise ValueError(
                f"exact_gradient: terms of plate {name!r} depend on the rest of their minibatch, "
                f"as by batch normalisation: there are {number:,} minibatches, more than "
                f"max_states={max_states:,}. Put such modules into .eval(), run the whole plate "
                f"(subsample_size=None), raise max_states, or take {LONG_RUN}"
            )
        choose = itertools.permutations if ordered else itertools.combinations
        choices[name] = torch.tensor(list(choose(range(size), batch)), device=device)
    return choices, dependent


Pair = tuple[list[Tensor], list[Tensor]]


def _reverse(order: Tensor, batch: int) -> Pair:
    """Take a minibatch, and reverse it."""
    return [order[:batch]], [order[:batch].flip(0)]


def _exchange(order: Tensor, batch: int) -> Pair:
    """Take two minibatches that differ as far as possible, and exchange half of what differs."""
    differing = min(batch, len(order) - batch)
    shared, one, other = order[: batch + differing].tensor_split([batch - differing, batch])
    cut = differing // 2
    halves = [one[:cut], other[cut:]], [other[:cut], one[cut:]]
    whole = [torch.cat([shared, one]), torch.cat([shared, other])]
    return whole, [torch.cat([shared, *half]) for half in halves]


class _Comparison:
    """Comparison of minibatches of one plate that have the same elements in another arrangement.

    Each element keeps its own latent values. A sum over elements, each with a random weight, does
    not change in total if two minibatches exchange elements. That holds for the terms of the bound
    and for the probabilities of latent values, and for their gradients.
    """

    def __init__(
        self,
        call: Call,
        leaves: Sequence[Tensor],
        plate: str,
        size: int,
        subsamples: Mapping[str, Tensor],
    ) -> None:
        self.call, self.leaves, self.plate, self.size = call, leaves, plate, size
        self.subsamples = subsamples
        self.generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.sites = discrete_sites(run(call, subsamples).sites)

    def finds_difference(self, arrange: Callable[[Tensor, int], Pair], batch: int) -> bool:
        """Return whether sums change between the two arrangements of a random order."""
        for _ in range(_COMPARED):
            self.weights = torch.rand(self.size, generator=self.generator) + 0.5
            self.digits = {site.name: self._draw_digits(site) for site in self.sites}
            arranged = arrange(torch.randperm(self.size, generator=self.generator), batch)
            some, others = ([self._sums(index) for index in part] for part in arranged)
            if not all(map(_close, zip(*some, strict=True), zip(*others, strict=True))):
                return True
        return False

    def _draw_digits(self, site: DiscreteSite) -> Tensor:
        shape = [*site.batch_shape, *site.inner_shape]
        if self.plate in site.plates:
            shape[len(site.batch_shape) + site.plates[self.plate]] = self.size
        return torch.randint(len(site.support), shape, generator=self.generator)

    def _sums(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Sum every term over elements with their weights; and the gradient of all sums."""
        seed_torch(0)  # the same noise in each run, if the programs draw some
        values = {**self.subsamples}
        values[self.plate] = index.to(values[self.plate].device)
        for site in self.sites:
            digits = self.digits[site.name]
            if self.plate in site.plates:
                axis = len(site.batch_shape) + site.plates[self.plate]
                digits = digits.index_select(axis, index)
            values[site.name] = site.support[digits]
        found = run(self.call, values)
        parts = [(term.value, term.dims) for term in found.terms]
        parts += [(found.log_probs[site.name], site.plates) for site in self.sites]
        sums = torch.stack([self._weighted(value, plates, index) for value, plates in parts])
        gradient = sums.new_zeros(1)
        if sums.requires_grad:
            scales = torch.arange(1, 1 + len(sums), dtype=sums.dtype, device=sums.device).sqrt()
            gradients = torch.autograd.grad(
                scales @ sums, self.leaves, allow_unused=True, materialize_grads=True
            )
            gradient = torch.cat([gradient.flatten() for gradient in gradients])
        return sums.detach(), gradient

    def _weighted(self, value: Tensor, plates: Mapping[str, int], index: Tensor) -> Tensor:
        value = value.nan_to_num(posinf=0.0, neginf=0.0)
        if self.plate in plates:
            weights = self.weights[index].to(value)
            value = value * weights.reshape(-1, *(1,) * (-1 - plates[self.plate]))
        return value.sum()


def _close(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Compare two sums of minibatches."""
    if len({len(part) for part in (*some, *others)}) > 1:
        return False  # the programs ran another course
    largest = max(part.abs().max() for part in (*some, *others))
    eps = max(torch.finfo(part.dtype).eps for part in some)
    difference = torch.stack([*some]).sum(0) - torch.stack([*others]).sum(0)
    return bool(difference.abs().max() <= min(1e4 * eps, _LARGEST_TOLERANCE) * largest)
