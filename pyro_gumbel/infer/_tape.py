"""Recorded operations in a row, on registers."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef

from pyro_gumbel.infer._undo import storage_of

__all__ = ["Call", "Tape", "collect", "memory_of", "tensors_in"]

aten = torch.ops.aten


class Call(NamedTuple):
    """An operation, and the registers of its arguments and of its result.

    Attributes:
        function: The operation.
        arguments: The registers of the arguments, those by name first.
        options: Further arguments by name.
        names: The names of the first of ``arguments``.
        result: The register of the result; where it is an argument that was written to, its.
        memory: Where the tensors of the result lie.
        is_pure: Whether the call only computes its result, and from its arguments alone.
    """

    function: Any
    arguments: Sequence[int]
    options: Mapping[str, Any] = {}
    names: tuple[str, ...] = ()
    result: int = -1
    memory: Set[StorageWeakRef] = frozenset()
    is_pure: bool = True

    def callable(self) -> Callable[..., Any]:
        """The operation as a function of the arguments."""
        function = getattr(self.function, "_op", self.function)
        if self.function is aten.mkldnn_rnn_layer.default:
            function = _with_workspace
        if self.options:
            function = functools.partial(function, **self.options)
        return functools.partial(_call_by_names, function, self.names) if self.names else function


class Tape:
    """Plays calls one after the other.

    Constants are computed once; unused results are left out, such as the value of a surrogate,
    whose gradient starts from a one.

    Args:
        calls: The calls.
        registers: What lies in the registers: of the inputs, which come first, and of results
            ``None``.
        constants: Which of them nothing changes.
        changing: What memory is written to, by the calls or by who gets the result.
        result: The register of the result.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        registers: Sequence[Any],
        constants: Set[int],
        changing: Set[StorageWeakRef],
        result: int,
    ) -> None:
        self._registers, self._result = list(registers), result
        known, variable = set(constants), []
        for call in calls:
            is_fixed = call.is_pure and changing.isdisjoint(call.memory)
            if is_fixed and known.issuperset(call.arguments):
                values = [self._registers[place] for place in call.arguments]
                self._registers[call.result] = call.callable()(*values)
                known.add(call.result)
            else:
                variable.append(call)
        needed = {result}
        for call in reversed(variable):
            if call.result in needed or not call.is_pure:
                needed.update([call.result, *call.arguments])
        self._calls = [call for call in variable if call.result in needed]
        last_use = {p: n for n, c in enumerate(self._calls) for p in (*c.arguments, c.result)}
        self._code: list[tuple[Any, Any, int, list[int]]] = [
            (call.callable(), _getter(call.arguments), call.result, []) for call in self._calls
        ]
        for place in {call.result for call in self._calls} - {result}:
            self._code[last_use[place]][-1].append(place)

    def __call__(self, *inputs: Tensor) -> Any:
        registers = self._registers.copy()
        registers[: len(inputs)] = inputs
        for operation, arguments, result, unused in self._code:
            registers[result] = operation(*arguments(registers))
            for place in unused:
                registers[place] = None
        return registers[self._result]

    def compiled(self, num_inputs: int) -> Callable[..., Any]:
        """Have ``torch.compile`` fuse the operations."""
        from torch._inductor import config

        graph, held = fx.Graph(), {}
        nodes: list[Any] = [graph.placeholder(f"input_{n}") for n in range(num_inputs)]
        for place, value in enumerate(self._registers[num_inputs:]):
            if isinstance(value, Tensor):
                held[f"tensor_{place}"] = value
                value = graph.get_attr(f"tensor_{place}")
            nodes.append(value)
        for call in self._calls:
            values = [nodes[place] for place in call.arguments]
            rest = tuple(values[len(call.names) :])
            if call.function is collect:
                nodes[call.result] = rest
            else:
                named = {**call.options, **dict(zip(call.names, values, strict=False))}
                nodes[call.result] = graph.call_function(call.function, rest, named)
        graph.output(nodes[self._result])
        compiled = torch.compile(fx.GraphModule(held, graph), fullgraph=True, dynamic=False)

        def play(*inputs: Tensor) -> Any:
            # Eager kernels for the draws, so that the numbers are those of an eager step.
            with config.patch(fallback_random=True):
                return compiled(*inputs)

        return play


def memory_of(tensors: Iterable[Tensor]) -> set[StorageWeakRef]:
    """Return what memory tensors lie in."""
    storages = map(storage_of, tensors)
    return {StorageWeakRef(storage) for storage in storages if storage is not None}


def tensors_in(value: Any) -> list[Tensor]:
    """List the tensors in nested lists."""
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in tensors_in(part)]
    return [value] if isinstance(value, Tensor) else []


def _getter(places: Sequence[int]) -> Callable[[list[Any]], Any]:
    """Read several registers, as a list or a tuple."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return operator.itemgetter(slice(places[0], places[0] + 1) if places else slice(0))


def collect(*parts: Any) -> tuple[Any, ...]:
    """Make a tuple."""
    return parts


def _call_by_names(operation: Callable[..., Any], names: tuple[str, ...], *values: Any) -> Any:
    return operation(*values[len(names) :], **dict(zip(names, values, strict=False)))


def _with_workspace(*args: Any) -> Any:
    """Run a layer of an LSTM on a CPU, which keeps what its gradient needs in grad mode alone."""
    with torch.enable_grad():
        return aten.mkldnn_rnn_layer.default(*args)
