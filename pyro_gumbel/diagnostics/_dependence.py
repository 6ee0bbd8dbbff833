"""Which latent values each term of the ELBO is computed from, whatever they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_gumbel.diagnostics._programs import evaluate
from pyro_gumbel.estimators import Call

__all__ = ["Flow", "gathered_plates"]

Names = frozenset[str]
_NOTHING: Names = frozenset()
# They read the shape of their argument and not its numbers.
_SHAPES = ("_like", "new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided")


class Flow(TorchDispatchMode):
    """Follows values through the operations of a program: a result has the names of its inputs.

    Numbers that leave torch (``item``, ``tolist``, an ``if``) are lost from sight.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names: dict[int, Names] = {}
        self._alive: list[Any] = []  # so that no memory is used again, and mistaken
        for name, value in values.items():
            self._mark(value, frozenset([name]))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operation imports the compiler, for a second

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = pytree.tree_leaves((args, kwargs))
        names = _NOTHING.union(*(self.names(leaf) for leaf in inputs if isinstance(leaf, Tensor)))
        if names and not func._schema.name.endswith(_SHAPES):
            written = [
                argument
                for argument, description in zip(args, func._schema.arguments, strict=False)
                if description.alias_info is not None and description.alias_info.is_write
            ]
            for leaf in pytree.tree_leaves((result, written)):
                if isinstance(leaf, Tensor):
                    self._mark(leaf, names)
        return result

    def names(self, tensor: Tensor) -> Names:
        """The values that a tensor, or another view of its memory, was computed from."""
        return self._names.get(tensor.untyped_storage()._cdata, _NOTHING)

    def _mark(self, tensor: Tensor, names: Names) -> None:
        storage = tensor.untyped_storage()
        self._alive.append(storage)
        self._names[storage._cdata] = self._names.get(storage._cdata, _NOTHING) | names


def gathered_plates(
    call: Call,
    values: Mapping[str, Tensor],
    plates: Mapping[str, Names],
    subsamples: Mapping[str, Tensor],
) -> Names:
    """Find the plates whose elements meet in a term that is outside of them.

    Args:
        call: The programs.
        values: Values of the guide's latent sites.
        plates: The plates of each of these sites.
        subsamples: Indices for plates that draw a minibatch.
    """
    flow = Flow(values)
    with pyro.validation_enabled(False), flow:  # checks look at values, and do nothing with them
        run = evaluate(call, values, subsamples)
    return _NOTHING.union(
        *(
            plates[name] - {frame.name for frame in term.plates}
            for term in run.terms
            for name in flow.names(term.value)
        )
    )
