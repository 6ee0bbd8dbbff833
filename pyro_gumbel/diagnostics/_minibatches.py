"""Minibatches that an exact expectation is averaged over."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_gumbel.diagnostics._programs import evaluate
from pyro_gumbel.diagnostics._state import seed_torch
from pyro_gumbel.diagnostics._states import DiscreteSite, discrete_sites
from pyro_gumbel.estimators import Call

__all__ = ["Minibatches", "find_minibatches"]

_FEW = 64  # minibatches that are all taken without a comparison
_COMPARED = 5  # pairs of minibatches
_LARGEST_TOLERANCE = 0.05  # in half precision


@dataclass(frozen=True)
class _Plate:
    name: str
    size: int
    batch: int
    device: torch.device


@dataclass(frozen=True)
class Minibatches:
    """The minibatches to average over.

    Attributes:
        plates: The plates that draw a minibatch.
        choices: The indices to take in each of them.
        dependent: The plates whose elements depend on the rest of their minibatch.
    """

    plates: Sequence[_Plate]
    choices: Sequence[Sequence[tuple[int, ...]]]
    dependent: Sequence[str]

    def __len__(self) -> int:
        return math.prod(map(len, self.choices))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for chosen in itertools.product(*self.choices):
            yield {
                plate.name: torch.tensor(index, device=plate.device)
                for plate, index in zip(self.plates, chosen, strict=True)
            }


def find_minibatches(call: Call, leaves: Sequence[Tensor], max_states: int) -> Minibatches:
    """Choose minibatches whose average is that of all.

    If elements do not depend on the rest of their minibatch, the bound is a sum over elements, and
    it suffices to take each element equally often. Else all minibatches are taken.

    Args:
        call: The programs.
        leaves: The parameters to differentiate in.
        max_states: The largest number of minibatches of a plate.

    Raises:
        ValueError: If there are more.
    """
    plates = _subsampled(call)
    choices = [_windows(plate) for plate in plates]
    start = next(iter(Minibatches(plates, choices, [])))
    dependent = []
    for place, plate in enumerate(plates):
        comparison = _Comparison(call, leaves, plate, start)
        ordered = comparison.depends_on_order()
        number = (math.perm if ordered else math.comb)(plate.size, plate.batch)
        if number > _FEW:
            if not (ordered or comparison.depends_on_others()):
                continue
            dependent.append(plate.name)
        if number > max_states:
            raise ValueError(
                f"exact_gradient: terms of plate {plate.name!r} depend on the rest of their "
                f"minibatch, as by batch normalisation: there are {number:,} minibatches, more "
                f"than max_states={max_states:,}. Put such modules into .eval(), run the whole "
                "plate (subsample_size=None), raise max_states, or take a long run of an unbiased "
                "estimator as the reference: gradient_draws(..., estimators={'reference': "
                "'auto'}, num_draws=100_000, project=8, seed=1)['reference']."
            )
        choose = itertools.permutations if ordered else itertools.combinations
        choices[place] = list(choose(range(plate.size), plate.batch))
    return Minibatches(plates, choices, dependent)


@torch.no_grad()
def _subsampled(call: Call) -> list[_Plate]:
    guide = poutine.trace(call.guide).get_trace(*call.args, **call.kwargs)
    model = poutine.trace(poutine.replay(call.model, trace=guide)).get_trace(
        *call.args, **call.kwargs
    )
    found = []
    for name, site in {**guide.nodes, **model.nodes}.items():
        if site["type"] == "sample" and site_is_subsample(site):
            size, batch = site["fn"].size, site["fn"].subsample_size
            if batch is not None and batch < size:
                found.append(_Plate(name, size, batch, site["value"].device))
    return found


def _windows(plate: _Plate) -> list[tuple[int, ...]]:
    """List minibatches in which each element occurs equally often."""
    step = plate.batch if plate.size % plate.batch == 0 else 1
    return [
        tuple((start + place) % plate.size for place in range(plate.batch))
        for start in range(0, plate.size, step)
    ]


class _Comparison:
    """Comparison of minibatches of one plate that share elements.

    Each element keeps its own latent values. A sum over elements, each with a random weight, does
    not change in total if two minibatches exchange elements. That holds for the terms of the bound
    and for the probabilities of latent values, and for their gradients.
    """

    def __init__(
        self, call: Call, leaves: Sequence[Tensor], plate: _Plate, subsamples: Mapping[str, Tensor]
    ) -> None:
        self.call = call
        self.leaves = leaves
        self.plate = plate
        self.subsamples = subsamples
        self.generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.sites = discrete_sites(evaluate(call, {}, subsamples).sites)

    def depends_on_order(self) -> bool:
        """Return whether the same elements give another sum in another order."""
        for _ in range(_COMPARED):
            self._draw_elements()
            index = self._permutation(self.plate.size)[: self.plate.batch]
            shuffled = index[self._permutation(len(index))]
            if not self._same([index], [shuffled]):
                return True
        return False

    def depends_on_others(self) -> bool:
        """Return whether an exchange of elements between minibatches changes their sums."""
        differing = min(self.plate.batch, self.plate.size - self.plate.batch)
        if differing < 2:  # the windows are all minibatches
            return False
        for _ in range(_COMPARED):
            self._draw_elements()
            order = self._permutation(self.plate.size)
            shared, rest = order.tensor_split([self.plate.batch - differing])
            one, other = rest[:differing], rest[differing : 2 * differing]
            cut = differing // 2
            exchanged = [
                torch.cat([shared, one[:cut], other[cut:]]),
                torch.cat([shared, other[:cut], one[cut:]]),
            ]
            if not self._same([torch.cat([shared, one]), torch.cat([shared, other])], exchanged):
                return True
        return False

    def _permutation(self, size: int) -> Tensor:
        return torch.randperm(size, generator=self.generator)

    def _draw_elements(self) -> None:
        """Draw latent values and a weight for each element of the plate."""
        self.digits = {site.name: self._draw_digits(site) for site in self.sites}
        weights = torch.rand(self.plate.size, generator=self.generator) + 0.5
        self.weights = weights.to(self.plate.device)

    def _draw_digits(self, site: DiscreteSite) -> Tensor:
        shape = [*site.batch_shape, *site.inner_shape]
        if self.plate.name in site.plates:
            shape[self._axis(site)] = self.plate.size
        return torch.randint(len(site.support), shape, generator=self.generator)

    def _axis(self, site: DiscreteSite) -> int:
        return len(site.batch_shape) + site.plates[self.plate.name]

    def _values(self, index: Tensor) -> dict[str, Tensor]:
        values = {}
        for site in self.sites:
            digits = self.digits[site.name]
            if self.plate.name in site.plates:
                digits = digits.index_select(self._axis(site), index)
            values[site.name] = site.values(digits)
        return values

    def _same(self, some: list[Tensor], others: list[Tensor]) -> bool:
        """Compare the sums of two lists of minibatches."""
        parts = [[self._sums(index) for index in indices] for indices in (some, others)]
        first, second = (list(zip(*part, strict=True)) for part in parts)
        return all(map(self._close, first, second))

    def _close(self, some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
        if len({len(part) for part in (*some, *others)}) > 1:
            return False  # the programs ran another course
        largest = max(part.abs().max() for part in (*some, *others))
        eps = max(torch.finfo(part.dtype).eps for part in some)
        difference = torch.stack(some).sum(0) - torch.stack(others).sum(0)
        return bool(difference.abs().max() <= min(1e4 * eps, _LARGEST_TOLERANCE) * largest)

    def _sums(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Sum every term over elements with their weights; and the gradient of all sums."""
        seed_torch(0)  # the same noise in each run, if the programs draw some
        subsamples = {**self.subsamples, self.plate.name: index.to(self.plate.device)}
        run = evaluate(self.call, self._values(index), subsamples)
        dims = [{frame.name: frame.dim for frame in term.plates} for term in run.terms]
        parts = list(zip((term.value for term in run.terms), dims, strict=True))
        parts += [(run.log_probs[site.name], site.plates) for site in self.sites]
        sums = torch.stack([self._weighted(value, plates, index) for value, plates in parts])
        scales = torch.arange(1, 1 + len(sums), dtype=sums.dtype, device=sums.device).sqrt()
        return sums.detach(), _flat_gradient(scales @ sums, self.leaves)

    def _weighted(self, value: Tensor, plates: Mapping[str, int], index: Tensor) -> Tensor:
        value = value.nan_to_num(posinf=0.0, neginf=0.0)
        if self.plate.name in plates:
            after = (1,) * (-1 - plates[self.plate.name])
            weights = self.weights[index.to(self.plate.device)].to(value.dtype)
            value = value * weights.reshape(-1, *after)
        return value.sum()


def _flat_gradient(total: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    if not total.requires_grad:
        return torch.zeros(1)
    found = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])
