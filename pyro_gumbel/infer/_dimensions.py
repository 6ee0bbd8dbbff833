"""The dimensions of sites that have all of their values, left of all plates."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar, cast

from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.markov_messenger import MarkovMessenger
from pyro.poutine.runtime import _ENUM_ALLOCATOR, _PYRO_STACK, Message
from pyro.poutine.util import site_is_subsample

__all__ = ["Dimensions", "GuideDims", "carried_symbols", "in_chain", "value_dims"]

Value = TypeVar("Value")

_OWN_DIMS = 20  # separate chains get dimensions of their own until they take so many
_MOST_DIMS = 60  # torch allows 64, those of events included
_MOST_STATES = 2**24  # of values that one step carries to the next


class Dimensions(EnumMessenger):
    """Allocates dimensions, and notes which of them each site may depend on, as Pyro does.

    Args:
        nesting: The number of dimensions of all plates.
        earlier: The dimensions of sites that were enumerated before, which stay theirs.
        recycled: Those of these sites that are along a chain.

    Attributes:
        recycled: The sites along a ``pyro.markov`` chain, whose dimensions are used again.
    """

    def __init__(
        self,
        nesting: int,
        earlier: Mapping[str, int] | None = None,
        recycled: Collection[str] = (),
    ) -> None:
        super().__init__()
        earlier = earlier or {}
        self.recycled: set[str] = set()
        self._start = self._leftmost = min(earlier.values(), default=-nesting)
        self._earlier = [(dim, name not in recycled) for name, dim in earlier.items()]
        self._chain: MarkovMessenger | None = None
        self._sizes: dict[int, int] = {}  # by Pyro's number of the site

    def __enter__(self) -> Self:
        # Private: Pyro's allocator of dimensions. If Pyro renames it, its import fails. It belongs
        # to the process, and a loss inside of the programs may have used it.
        self._allocator = dict(vars(_ENUM_ALLOCATOR))
        _ENUM_ALLOCATOR.set_first_available_dim(self._start - 1)
        _ENUM_ALLOCATOR.next_available_id = len(self._earlier)
        whole = {dim: id_ for id_, (dim, is_whole) in enumerate(self._earlier) if is_whole}
        _ENUM_ALLOCATOR.dim_to_id = whole
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        vars(_ENUM_ALLOCATOR).clear()
        vars(_ENUM_ALLOCATOR).update(self._allocator)

    def note(self, msg: Message) -> None:
        """Note the dimensions that a site may depend on, as far as ``pyro.markov`` reaches."""
        self.drop_hidden(msg)
        infer, done = msg["infer"], msg["done"]
        msg["infer"], msg["done"] = cast(Any, {**cast(Any, infer), "enumerate": None}), False
        super()._pyro_sample(msg)
        msg["infer"], msg["done"] = infer, done

    def drop_hidden(self, msg: Message) -> None:
        """Remove the sites that a handler has hidden from what a site may depend on."""
        scope = (msg["infer"] or {}).get("_markov_scope", {})
        for name in scope.keys() - self._markov_depths.keys():
            del scope[name]

    def allocate(self, msg: Message, size: int, *, recycles: bool) -> int:
        """Return the dimension of a noted site's ``size`` values.

        A site along a chain gets one that no value in its reach has. A later chain does not use
        the dimensions of an earlier one, since the model may have both at once.

        Raises:
            ValueError: If there are too many dimensions, or too many values in its reach.
        """
        name, infer = cast(str, msg["name"]), cast(dict[str, Any], msg["infer"])
        outer = (m for m in _PYRO_STACK if isinstance(m, MarkovMessenger))
        chain = next(outer, None) if recycles else None
        if chain is None or (
            chain is not self._chain and self._leftmost > self._start - _OWN_DIMS
        ):
            _ENUM_ALLOCATOR.next_available_dim = self._leftmost - 1
        self._chain = chain
        reach = self._param_dims[name]  # private: what EnumMessenger has noted
        dim, id_ = _ENUM_ALLOCATOR.allocate(None if chain is None else set(reach))
        self._leftmost = min(self._leftmost, dim)
        infer["_dim_to_id"] = {dim: id_}
        self._sizes[id_] = size
        if chain is not None:
            self.recycled.add(name)
            self._check_states(name, [*reach.values(), id_])
        elif dim < -_MOST_DIMS:
            raise ValueError(
                f"Site {name!r} is one of {len(self._sizes)} enumerated sites, each with a "
                "dimension of its own, and tensors have at most 64. Write a chain as `for t in "
                "pyro.markov(range(T))` in both programs, so that its sites share dimensions; put "
                "independent sites into one pyro.plate; or use another estimator, such as Score()."
            )
        return dim

    def _check_states(self, name: str, ids: list[int]) -> None:
        sizes = [self._sizes[id_] for id_ in ids]
        if len(sizes) > 4 and math.prod(sizes) > _MOST_STATES:
            raise ValueError(
                f"Site {name!r} may depend on {len(sizes)} enumerated sites at once, with "
                f"{math.prod(sizes)} joint values: a value that is not enumerated carries those "
                "of earlier steps, or pyro.markov has a long history. Let each step depend on "
                "enumerated values of the steps before it alone, or use another estimator, such "
                "as Score()."
            )

    def _pyro_post_sample(self, msg: Message) -> None:
        if msg["name"] in self._param_dims:
            super()._pyro_post_sample(msg)


def in_chain(msg: Message) -> bool:
    """Return whether a site is within ``pyro.markov``."""
    return "_markov_scope" in (msg["infer"] or {})


def value_dims(site: Any, known: Mapping[int, Value]) -> dict[int, Value]:
    """Return what is known of the dimensions that a site's value has."""
    if not known:
        return {}
    shape = site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
    return {dim: it for dim, it in known.items() if -dim <= len(shape) and shape[dim] > 1}


@dataclass
class GuideDims:
    """The symbols of the dimensions in a run of the guide that has enumerated chains.

    Attributes:
        plates: The symbol of each plate.
        symbols: The symbol of each dimension that a site may have.
        carried: The symbols of the enumerated sites whose dimension a site's value has.
    """

    plates: dict[str, str] = field(default_factory=dict)
    symbols: dict[str, dict[int, str]] = field(default_factory=dict)
    carried: dict[str, set[str]] = field(default_factory=dict)

    def read(self, trace: Trace, nesting: int) -> None:
        """Read them off the guide's trace.

        Args:
            trace: The trace.
            nesting: The number of dimensions of all plates.
        """
        trace.symbolize_dims(self.plates)
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and not site_is_subsample(site):
                self.symbols[name] = site["infer"]["_dim_to_symbol"]
                self.carried[name] = carried_symbols(site, nesting)


def carried_symbols(site: Any, nesting: int) -> set[str]:
    """Return the symbols of the enumerated dimensions that a site's value has."""
    own = value_dims(site, site["infer"]["_dim_to_symbol"])
    return {symbol for dim, symbol in own.items() if dim < -nesting}
