"""Means over the enumerated sites of a guide's chains, by Pyro's variable elimination."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.ops import packed
from pyro.ops.einsum.adjoint import require_backward
from pyro.ops.rings import MarginalRing
from torch import Tensor

from pyro_gumbel.infer._costs import Costs, Frames, Term, refuse_outside
from pyro_gumbel.infer._sampling import Layout, left_filled

__all__ = ["ChainCosts", "ScoredSite"]


class ScoredSite(NamedTuple):
    """A latent site of the guide: its score, its plates, and the symbols of its dimensions."""

    name: str
    score: Tensor
    frames: Frames
    symbols: Mapping[int, str]


class ChainCosts(Costs):
    """The terms of a run whose guide enumerates sites along ``pyro.markov``.

    A dimension may stand for several sites, so tensors are packed: each of their dimensions has a
    symbol. As in Pyro's ``Dice``, one contraction for the terms of the same plates has the
    probabilities of all values that these depend on. The mean of a term has the dimensions of its
    plates alone.

    Args:
        terms: Every term.
        enumerated: The enumerated sites with their dimensions, in program order.
        drawn: The guide's other latent sites.
        plates: The symbol of each plate.
        layout: Where the rows of the particle plate are.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        enumerated: Iterable[tuple[ScoredSite, int]],
        drawn: Iterable[ScoredSite],
        plates: Mapping[str, str],
        layout: Layout,
    ) -> None:
        self._plates = plates
        self._owners = {site.symbols[dim]: site for site, dim in enumerated}
        self._drawn = [site for site in drawn if self._enumerated_in(_packed(site))]
        self._groups = self._group_packed(terms)
        self._costs_of_drawn: dict[bool, dict[str, Tensor]] = {}
        super().__init__(self._mean_terms(layout), [], layout)

    def _enumerated_in(self, tensor: Tensor) -> frozenset[str]:
        return frozenset(self._owners.keys() & set(_dims(tensor)))

    def _group_packed(self, terms: Sequence[Term]) -> dict[Frames, dict[str, Tensor]]:
        """Add up terms of the same plates and dimensions."""
        groups: dict[Frames, dict[str, Tensor]] = defaultdict(dict)
        for term in terms:
            value = _pack(term.site, term.value, term.symbols)
            for symbol in self._enumerated_in(value):
                refuse_outside(term, self._owners[symbol].name, self._owners[symbol].frames)
            group, dims = groups[term.frames], _dims(value)
            group[dims] = _named(group[dims] + value, dims) if dims in group else value
        return groups

    def _mean_terms(self, layout: Layout) -> list[Term]:
        terms = []
        for frames, group in self._groups.items():
            dims = {self._plates[frame.name]: frame.dim for frame in frames}
            costs = [cost for cost in group.values() if self._enumerated_in(cost)]
            constant = [cost for cost in group.values() if not self._enumerated_in(cost)]
            for value in (*constant, *(self._means(frames, costs) if costs else ())):
                value = left_filled(packed.unpack(value, dims), layout.total_nesting)
                terms.append(Term("", value, frames))
        return terms

    def _means(
        self,
        frames: Frames,
        costs: Sequence[Tensor],
        tilts: Sequence[Tensor] = (),
        *,
        live: bool = True,
    ) -> list[Tensor]:
        """Return the mean of each cost over the enumerated sites, for each element of plates.

        The probabilities are multiplied by the exponentials of ``tilts``, which are zero.
        """
        sites = [site for site in self._owners.values() if site.frames <= frames]
        factors = [_packed(site, live=live) for site in sites]
        operands = [*factors, *tilts]
        sizes = {s: n for x in operands for s, n in zip(_dims(x), x.shape, strict=True)}
        batch = sizes.keys() - self._owners.keys()
        having: dict[str, list[Tensor]] = defaultdict(list)
        for factor in factors:
            for symbol in _dims(factor):
                having[symbol].append(factor)
        queries: dict[frozenset[str], Tensor] = {}
        for needed in dict.fromkeys(map(self._enumerated_in, costs)):
            dims = needed | batch
            found = having[min(needed)] if needed else []
            query = next((x for x in found if dims <= set(_dims(x))), None)
            if query is None:
                own = "".join(sorted(dims))
                query = _named(costs[0].new_zeros([sizes[symbol] for symbol in own]), own)
                operands.append(query)
            require_backward(query)
            queries[needed] = query
        root = MarginalRing().sumproduct(operands, self._owners.keys())
        root._pyro_backward()  # private, as all of Pyro's names for packed tensors
        probs = {needed: self._probs(query, needed) for needed, query in queries.items()}
        return [self._mean(cost, probs[self._enumerated_in(cost)]) for cost in costs]

    def _probs(self, query: Any, needed: Collection[str]) -> Tensor:
        return self._sum(_named(query._pyro_backward_result.exp(), _dims(query)), needed)

    def _sum(self, tensor: Tensor, kept: Collection[str] = ()) -> Tensor:
        """Sum a packed tensor over the enumerated sites that are not ``kept``."""
        dims = _dims(tensor)
        summed = [i for i, s in enumerate(dims) if s in self._owners and s not in kept]
        left = "".join(s for i, s in enumerate(dims) if i not in summed)
        return _named(tensor.sum(summed), left) if summed else tensor

    def _mean(self, cost: Tensor, probs: Tensor) -> Tensor:
        cost, probs = packed.broadcast_all(cost, probs)
        # A value of probability zero may have an infinite cost: 0 * inf would be nan.
        return self._sum(_named(probs * cost.masked_fill(probs == 0, 0.0), _dims(cost)))

    def downstream(self, frames: Frames, like: Tensor, *, name: str, live: bool = False) -> Tensor:
        """The cost of a site, of the shape of its score ``like``.

        Where the score depends on enumerated sites, each of their values has the mean of the cost
        given this value, times its probability.
        """
        if name not in {site.name for site in self._drawn}:
            return super().downstream(frames, like, name=name, live=live)
        if live not in self._costs_of_drawn:
            self._costs_of_drawn[live] = self._derive_costs(live=live)
        return self._costs_of_drawn[live][name]

    @torch.enable_grad()
    def _derive_costs(self, *, live: bool) -> dict[str, Tensor]:
        """The means' derivatives in the tilts: what follows each value, with its probability."""
        tilts = {s.name: torch.zeros_like(s.score, requires_grad=True) for s in self._drawn}
        parts = []
        for frames in dict.fromkeys(site.frames for site in self._drawn):
            own = [
                _pack(site.name, tilts[site.name], site.symbols)
                for site in self._drawn
                if site.frames == frames
            ]
            for others, group in self._groups.items():
                costs = [x if live else _named(x.detach(), _dims(x)) for x in group.values()]
                means = self._means(frames | others, costs, own, live=live)
                parts += [mean.sum() for mean in means]
        total = torch.stack(parts).sum()
        grads = torch.autograd.grad(total, [*tilts.values()], create_graph=live)
        return dict(zip(tilts, grads, strict=True))


def _pack(name: str, value: Tensor, symbols: Mapping[int, str]) -> Tensor:
    try:
        return packed.pack(value, symbols)
    except ValueError as error:
        raise ValueError(
            f"Site {name!r}: its log_prob has shape {tuple(value.shape)}, with a dimension of an "
            "enumerated site that it cannot see. Use the values of a chain within its "
            "pyro.markov, in the model and in the guide, as far as its history reaches; or remove "
            "pyro.markov from the guide if the chain is short."
        ) from error


def _packed(site: ScoredSite, *, live: bool = True) -> Tensor:
    return _pack(site.name, site.score if live else site.score.detach(), site.symbols)


def _dims(tensor: Tensor) -> str:
    return tensor._pyro_dims  # type: ignore[attr-defined]


def _named(tensor: Tensor, dims: str) -> Tensor:
    tensor._pyro_dims = dims  # type: ignore[attr-defined]
    return tensor
