"""Sums over discrete sites of the model that the guide lacks, by Pyro's variable elimination."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_gumbel.distributions._base import broadcast_shapes
from pyro_gumbel.distributions._numerics import full_precision
from pyro_gumbel.distributions.families import wrap_score
from pyro_gumbel.infer._costs import Term, check_shape, masked_score, site_frames
from pyro_gumbel.infer._dependence import Dependence
from pyro_gumbel.infer._dimensions import (
    Dimensions,
    GuideDims,
    carried_symbols,
    in_chain,
    value_dims,
)
from pyro_gumbel.infer._log_einsum import ExactLogRing
from pyro_gumbel.infer._sampling import Layout, NestingNeeded, left_filled

_MOST_DIMS = 64  # of a tensor

__all__ = ["SumMessenger", "SummedTerms", "is_summed"]


def is_summed(site: Any) -> bool:
    """Return whether a latent site of a model's trace has all of its values."""
    return site["infer"].get("_enumerate_dim") is not None


class SumMessenger(Dimensions):
    """Gives all values to the marked sites of a model that the guide lacks.

    Their dimensions are left of the plates and of the guide's enumerated sites. Along a
    ``pyro.markov`` chain they are used again.

    Args:
        guide: The guide's trace.
        layout: The paths of the pass.
        enumerated: The dimensions of the guide's enumerated sites.
        recycled: Those of them along a chain.
        draws: Draw values instead, in a run that finds the number of plates.
        dependence: Follows the values through the model, if given.
    """

    def __init__(
        self,
        guide: Trace,
        layout: Layout,
        enumerated: dict[str, int],
        recycled: Collection[str] = (),
        *,
        draws: bool,
        dependence: Dependence | None = None,
    ) -> None:
        super().__init__(layout.total_nesting, enumerated, recycled)
        self._guide = guide.nodes
        self._layout = layout
        self._enumerated = enumerated
        self._shared = recycled
        self._draws = draws
        self._dependence = dependence
        self.dims: dict[str, int] = {}
        for site in self._guide.values():
            if site["type"] == "sample":  # a replay hands it to the model's site, and Pyro writes
                site["infer"] = infer = dict(site["infer"])
                if "_dim_to_id" in infer:
                    infer["_dim_to_id"] = value_dims(site, infer["_dim_to_id"])

    def _pyro_sample(self, msg: Message) -> None:
        infer: dict[str, Any] = msg["infer"] or {}
        marked = infer.get("enumerate") is not None and not msg["is_observed"]
        if marked and msg["name"] not in self._guide:
            _check_mark(cast(str, msg["name"]), infer)
            if not self._draws:
                self._enumerate(msg)
        elif not self._draws and (self.dims or self._enumerated or in_chain(msg)):
            self.note(msg)

    def note(self, msg: Message) -> None:
        super().note(msg)
        if self._shared:
            self._check_reach(msg)

    def _check_reach(self, msg: Message) -> None:
        """Refuse a site that may see two values of one dimension."""
        name, scope = cast(str, msg["name"]), cast(Any, msg["infer"]).get("_markov_scope", {})
        # Private: what EnumMessenger has noted of the sites before.
        reach = {at: self._value_dims[at] for at in scope if self._markov_depths[at] == scope[at]}
        if name in self._guide:
            reach[name] = self._guide[name]["infer"].get("_dim_to_id", {})
        owners: dict[int, tuple[str, int]] = {}
        for at, dims in reach.items():
            for dim, id_ in dims.items():
                other, known = owners.setdefault(dim, (at, id_))
                if known != id_:
                    raise ValueError(
                        f"Site {name!r} of the model may depend on {other!r} and {at!r} at once, "
                        "and in the guide, whose pyro.markov does not reach from one to the "
                        "other, their values have the same dimension. Give pyro.markov the same "
                        "history in both programs, and sample both sites in one loop of the guide."
                    )

    def _enumerate(self, msg: Message) -> None:
        if self._layout.plate_nesting is None:
            raise NestingNeeded
        name, infer = cast(str, msg["name"]), dict(cast(Any, msg["infer"]))
        msg["infer"] = cast(Any, infer)
        self.drop_hidden(msg)
        try:
            super()._pyro_sample(msg)
        except NotImplementedError as error:
            raise ValueError(
                f"Site {name!r} of the model is marked infer={{'enumerate': 'parallel'}}, and its "
                f"{type(msg['fn']).__name__} cannot list its values. Sample it in the guide."
            ) from error
        if "_enumerate_dim" in infer:  # a handler of the model may have given a value
            self.dims[name] = infer["_enumerate_dim"]
            if cast(Tensor, msg["value"]).dim() > _MOST_DIMS:
                raise ValueError(
                    f"The values of site {name!r} need another dimension, after {_MOST_DIMS} of "
                    "summed sites and plates, the most that torch has. In a chain, loop over "
                    "pyro.markov(...). Write independent sites as one in a vectorised pyro.plate."
                )
            if in_chain(msg):
                self.recycled.add(name)
            if self._dependence:
                msg["value"] = self._dependence.follow(name, cast(Tensor, msg["value"]))


def _check_mark(name: str, infer: dict[str, Any]) -> None:
    mark = infer["enumerate"]
    if mark != "parallel":
        raise ValueError(
            f"Site {name!r} of the model is marked infer={{'enumerate': {mark!r}}}, and only "
            "'parallel' is supported. Write infer={'enumerate': 'parallel'}, or sample the site "
            "in the guide."
        )
    if infer.get("num_samples") is not None:
        raise ValueError(
            f"Site {name!r} of the model has infer['num_samples'] = {infer['num_samples']!r}, and "
            "sites of the model are summed exactly. Remove it, or sample the site in the guide."
        )


@dataclass
class Factor:
    """The log-probability of a site, which depends on summed sites."""

    name: str
    value: Tensor  # packed
    frames: dict[str, CondIndepStackFrame]  # by symbol
    scale: Any

    @property
    def dims(self) -> str:
        return self.value._pyro_dims  # type: ignore[attr-defined]


class SummedTerms:
    """Collects the factors that depend on summed sites, and sums over these sites.

    Args:
        trace: The model's trace.
        layout: The paths of the pass.
        summed: The dimension of each summed site.
        dependence: Has followed all values, if given: then the scope of each is checked.
        guide_dims: The guide's symbols, if it has enumerated chains.

    Attributes:
        factors: The factors.
    """

    def __init__(
        self,
        trace: Trace,
        layout: Layout,
        summed: dict[str, int],
        dependence: Dependence | None = None,
        guide_dims: GuideDims | None = None,
    ) -> None:
        guide_dims = guide_dims or GuideDims()
        self._dependence = dependence
        self._summed = summed.keys()
        self._layout = layout
        self._trace = trace
        self._sums: dict[str, str] = {}
        self.factors: list[Factor] = []
        self._carried = dict(guide_dims.carried)
        if summed or guide_dims.symbols:
            trace.symbolize_dims(guide_dims.plates)
            sites = {name: trace.nodes[name] for name in summed}
            self._sums = {site["infer"]["_enumerate_symbol"]: name for name, site in sites.items()}
            nesting = layout.total_nesting
            self._carried |= {name: carried_symbols(site, nesting) for name, site in sites.items()}

    def depends(self, site: Any, shape: torch.Size) -> bool:
        """Return whether a score or distribution of batch shape ``shape`` depends on a sum.

        Raises:
            ValueError: If a dimension is neither a plate's nor a summed or enumerated site's.
        """
        if not self._sums:
            return False
        symbols = site["infer"]["_dim_to_symbol"]
        left = range(-len(shape), -self._layout.total_nesting)
        if any(shape[dim] > 1 and dim not in symbols for dim in left):
            self._refuse_shape(site, shape)
        dims = [dim for dim, symbol in symbols.items() if symbol in self._sums]
        return any(-dim <= len(shape) and shape[dim] > 1 for dim in dims)

    def _refuse_shape(self, site: Any, shape: torch.Size) -> NoReturn:
        raise ValueError(
            f"Site {site['name']!r}: its log_prob has shape {tuple(shape)}, with a dimension that "
            f"is neither a plate's nor that of {sorted(self._sums.values())}, "
            "which are summed. Use their values by operations that broadcast over dimensions "
            "on the left, such as Vindex(loc)[..., z] (pyro.ops.indexing) for loc[z]; and use "
            "the values of a chain within its pyro.markov, as far as its history reaches."
        )

    def takes(self, site: Any, raw: Tensor, nesting: float) -> bool:
        """Collect the score of a site if it depends on a summed site, and return whether it does.

        Args:
            site: The site.
            raw: Its log-probability, neither scaled nor masked, as :func:`score_of` returns it.
            nesting: The number of dimensions of all plates.

        Raises:
            ValueError: If a dimension is neither a plate's nor a summed or enumerated site's, or
                the score has the value of a site whose dimension may stand for another.
        """
        if not self._sums:
            return False
        # As in Pyro, a mask around a summed site leaves its probabilities in the sum.
        score = wrap_score(site["fn"], raw) if is_summed(site) else masked_score(site, raw)
        if self._dependence:
            self.check_scope(site["name"], site["infer"]["_dim_to_symbol"], score)
            self._dependence.forget(score, self._summed)  # the sum does not depend on one value
        depends = self.depends(site, score.shape)
        try:
            check_shape(site, score, nesting)
        except ValueError as error:
            error.add_note(
                f"The values of {sorted(self._sums.values())} are summed. A site outside of their "
                "plate cannot use them, as by z.sum(-1): the elements' combinations are not in "
                "the sum. Sample them in the guide, or put the site into the plate."
            )
            raise
        if not depends:
            return False
        shape = broadcast_shapes(score.shape, site["fn"].batch_shape)
        try:
            value = packed.pack(score.expand(shape), site["infer"]["_dim_to_symbol"])
        except ValueError:
            self._refuse_shape(site, shape)
        frames = {self._trace.plate_to_symbol[frame.name]: frame for frame in site_frames(site)}
        self.factors.append(Factor(site["name"], value, frames, site["scale"]))
        return True

    def check_scope(self, name: str, symbols: Mapping[int, str], score: Tensor) -> None:
        """Check that a score uses no value where its dimension may stand for another.

        Args:
            name: The site that is scored.
            symbols: The symbols of the dimensions that it may have.
            score: Its score.

        Raises:
            ValueError: If it has the value of an ended chain, or of a step before its history.
        """
        if self._dependence is None or not self._carried:
            return
        reached = self._dependence.marks(score).keys() - self._dependence.marks_of_numbers.keys()
        for other in reached & self._carried.keys():
            if not self._carried[other] <= set(symbols.values()):
                raise ValueError(
                    f"Site {name!r} uses the value of site {other!r} outside of its pyro.markov, "
                    "or further on than its history reaches. The value's dimension may stand for "
                    "another site there. Write pyro.markov in both programs, raise its history, "
                    "or use a state that carries the value."
                )

    def terms(self) -> Iterator[Term]:
        """Yield the logarithm of each sum, in the plates that are left, scaled."""
        plates = {symbol: frame for f in self.factors for symbol, frame in f.frames.items()}
        for name, scale, ordinal, value in self.sums():
            dims = self._trace.symbol_to_dim
            symbols = {dims[symbol]: symbol for symbol in value._pyro_dims}  # type: ignore[attr-defined]
            value = left_filled(packed.unpack(value, dims), self._layout.total_nesting)
            frames = frozenset(plates[symbol] for symbol in ordinal)
            yield Term(name, scale_and_mask(value, scale), frames, symbols=symbols)

    def sums(self, ring: Any = None) -> Iterator[tuple[str, Any, frozenset[str], Tensor]]:
        """Sum over the sites.

        Args:
            ring: Pyro's semiring of the sums, by default that of log-probabilities.

        Yields:
            The name of a summed site, the scale of its factors, the symbols of the plates that
            are left, and the packed logarithm.
        """
        for factors, sums in self._components():
            scale = _common_scale(factors)
            name = self._sums[min(sums)]
            self._check_kept(factors, sums)
            tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
            for factor in factors:
                tree.setdefault(frozenset(factor.frames), []).append(factor.value)
            with _explained(name, factors), full_precision(factors[0].value):
                contracted = contract_tensor_tree(tree, sums, ring=ring or ExactLogRing())
            for ordinal, values in contracted.items():
                yield from ((name, scale, ordinal, value) for value in values)

    def _check_kept(self, factors: list[Factor], sums: set[str]) -> None:
        """Refuse a sum that depends on more of the guide's chain than has dimensions."""
        sizes = {s: n for f in factors for s, n in zip(f.dims, f.value.shape, strict=True)}
        dims = {symbol: self._trace.symbol_to_dim[symbol] for symbol in sizes.keys() - sums}
        dims = {symbol: dim for symbol, dim in dims.items() if dim < -self._layout.total_nesting}
        if len(set(dims.values())) < len(dims):
            chain = [name for name, own in self._carried.items() if own & dims.keys()]
            raise ValueError(
                f"The sum over {sorted(self._sums[symbol] for symbol in sums)} depends on the "
                f"enumerated sites {chain} of the guide jointly: "
                f"{math.prod(sizes[symbol] for symbol in dims)} states. Sum all of these sites in "
                "the model, or use another estimator in the guide, such as Score()."
            )

    def _components(self) -> list[tuple[list[Factor], set[str]]]:
        """Group the factors that share summed sites."""
        components: list[tuple[list[Factor], set[str]]] = []
        for factor in self.factors:
            own = set(factor.dims) & self._sums.keys()
            linked = [part for part in components if part[1] & own]
            components = [part for part in components if not part[1] & own]
            factors = [old for part, _ in linked for old in part]
            sums = own.union(*(part for _, part in linked))
            components.append(([*factors, factor], sums))
        return components


def _common_scale(factors: list[Factor]) -> Any:
    scale = factors[0].scale
    for factor in factors:
        if isinstance(factor.scale, Tensor) and factor.scale.numel() > 1:
            raise ValueError(
                f"Site {factor.name!r} depends on summed sites and has a scale of shape "
                f"{tuple(factor.scale.shape)}; expected one number."
            )
        if factor.scale is not scale and not _equal(factor.scale, scale):
            raise ValueError(
                f"Sites {factors[0].name!r} and {factor.name!r} depend on the same summed sites "
                f"and have different scales, {scale!r} and {factor.scale!r}: the logarithm of a "
                "sum cannot be scaled in parts. Give them one scale (both in the subsampled "
                "plate, or both in poutine.scale), or sample the summed sites in the guide."
            )
    return scale


def _equal(*scales: Any) -> bool:
    """Compare numbers: Pyro multiplies scales anew at each site. Gradients could differ."""
    if any(isinstance(scale, Tensor) and scale.requires_grad for scale in scales):
        return False
    return bool(scales[0] == scales[1])  # a comparison can be recorded, a number cannot


@contextmanager
def _explained(name: str, factors: list[Factor]) -> Iterator[None]:
    """Name the sites and plates of a sum that is not possible."""
    try:
        yield
    except NotImplementedError as error:
        names = [factor.name for factor in factors]
        plates = sorted({frame.name for factor in factors for frame in factor.frames.values()})
        raise ValueError(
            f"The sum over {name!r}, with the sites {names}, is not possible in the plates "
            f"{plates}, since they cross: a site in both depends on summed sites in each. Write "
            "one plate as a loop (for i in pyro.plate(...)), or sample a summed site in the guide."
        ) from error
