"""Make a recorded graph shorter without changing what it computes."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["as_function", "is_view_of", "simplify", "writes_to"]

aten = torch.ops.aten
_VIEWS = (aten.detach.default, aten.expand.default, aten.view.default, aten.alias.default)
_LITERALS = (aten.lift_fresh_copy.default, aten.lift_fresh.default)
_BATCH_NORMS = (
    aten.native_batch_norm.default,
    aten.cudnn_batch_norm.default,
    aten.miopen_batch_norm.default,
)
_SHAPED_LIKE = (  # of their first argument only the shape, the dtype and the device matter
    aten.full_like.default,
    aten.new_full.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.ones_like.default,
    aten.zeros_like.default,
)
_LARGEST = 1 << 16  # elements of a result that is kept
_FACTORIES = (
    aten.arange.default,
    aten.full.default,
    aten.ones.default,
    aten.scalar_tensor.default,
    aten.zeros.default,
)


def simplify(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
    """Drop views that change nothing, compute what depends on literals alone, drop the unused.

    The value of a surrogate is of the latter: its gradient starts from a one. What is computed
    twice, once with a gradient and once without, is computed once. The module's own code is left
    as it was, for writing it anew takes long: ``recompile()`` does it where it is needed.
    """
    for node in list(graph.graph.nodes):
        if node.target in _VIEWS and _layout(node) == _layout(node.args[0]):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    _fold(graph, _common_device(graph, inputs))
    _share(graph)
    graph.graph.eliminate_dead_code()  # it keeps draws and changes in place
    graph.graph.lint()


def writes_to(node: fx.Node) -> list[fx.Node]:
    """The arguments that an operation changes in place."""
    if node.target in _BATCH_NORMS:  # running mean and variance: their schemas do not say so
        return [value for value in node.args[3:5] if isinstance(value, fx.Node)]
    return [value for is_written, value in _aliased(node) if is_written]


def is_view_of(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory the result of an operation shares."""
    return [value for _, value in _aliased(node)]


def as_function(graph: fx.GraphModule) -> Callable[..., Any]:
    """Turn a graph into a Python function that calls the operations without detours.

    A graph module looks every operation and tensor up by name each time, which takes as long as
    small operations themselves.
    """
    code = graph.graph.python_code("self")
    names: dict[str, Any] = dict(code.globals)

    def operation(match: re.Match[str]) -> str:
        overload = operator.attrgetter(".".join(match.groups()))(torch.ops)
        name = "_".join(match.groups())
        names[name] = getattr(overload, "_op", overload)
        return f"{name}("

    def tensor(match: re.Match[str]) -> str:
        name = f"held{match[1]}"
        names[name] = getattr(graph, match[1])
        return name

    source = re.sub(r"torch\.ops\.(\w+)\.(\w+)\.(\w+)\(", operation, code.src)
    source = re.sub(r"\bself\.(\w+)", tensor, source)
    namespace: dict[str, Any] = {}
    exec(compile(source, "<recorded step>", "exec"), names, namespace)
    function = namespace["forward"]
    return lambda *inputs: function(None, *inputs)


def _common_device(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> torch.device | None:
    """The device of all tensors that go into a graph, if it is one."""
    held = [getattr(graph, n.target) for n in graph.graph.nodes if n.op == "get_attr"]
    devices = {tensor.device for tensor in [*held, *inputs]}
    return devices.pop() if len(devices) == 1 else None


def _fold(graph: fx.GraphModule, device: torch.device | None) -> None:
    """Replace operations on literals (``torch.tensor(0.3)``) by their results."""
    known: dict[fx.Node, Tensor] = {}
    changing = _changing(graph)
    for node in list(graph.graph.nodes):
        if not _is_deterministic(node):
            continue
        stand_in = _stand_in(node, device)
        if stand_in is None and not _is_foldable(node, known):
            continue
        if node in changing or writes_to(node):
            continue
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs),
            lambda n: _value(graph, n, known) if stand_in is None else stand_in,  # noqa: B023
        )
        result = node.target(*args, **kwargs)
        if isinstance(result, Tensor) and result.numel() <= _LARGEST:
            known[node] = result
    for count, (node, value) in enumerate(known.items()):
        if all(user in known for user in node.users):
            continue
        name = f"_literal{count}"
        graph.register_buffer(name, value, persistent=False)
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(graph.graph.get_attr(name))


def _share(graph: fx.GraphModule) -> None:
    """Replace an operation by an earlier one that is the same, of the same arguments."""
    earlier: dict[tuple[Any, ...], fx.Node] = {}
    changing = _changing(graph)
    for node in list(graph.graph.nodes):
        if not _is_deterministic(node) or changing.intersection([node, *node.all_input_nodes]):
            continue
        key = (node.target, repr(node.args), repr(node.kwargs))  # nodes by their names
        if key in earlier:
            node.replace_all_uses_with(earlier[key])
            graph.graph.erase_node(node)
        else:
            earlier[key] = node


def _changing(graph: fx.GraphModule) -> set[fx.Node]:
    """What is changed in place, by a view of it too, or returned to a caller who may do that."""
    changing = {target for node in graph.graph.nodes for target in writes_to(node)}
    changing.update(graph.graph.output_node().all_input_nodes)
    for node in reversed(graph.graph.nodes):
        if node in changing:
            changing.update(is_view_of(node))
    for node in graph.graph.nodes:
        if changing.intersection(is_view_of(node)):
            changing.add(node)
    return changing


def _stand_in(node: fx.Node, device: torch.device | None) -> Tensor | None:
    """A tensor without values in place of one that lends its shape alone."""
    if node.target not in _SHAPED_LIKE or device is None:
        return None
    meta = node.args[0].meta.get("tensor_meta") if isinstance(node.args[0], fx.Node) else None
    if meta is None:
        return None
    return torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device=device)


def _is_deterministic(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags


def _is_foldable(node: fx.Node, known: dict[fx.Node, Tensor]) -> bool:
    if node.target in _LITERALS or node.target in _FACTORIES:
        return True
    inputs = node.all_input_nodes
    return bool(inputs) and all(source in known for source in inputs)


def _value(graph: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Tensor]) -> Tensor:
    return known[node] if node in known else getattr(graph, str(node.target))


def _aliased(node: fx.Node) -> list[tuple[bool, fx.Node]]:
    """Arguments whose memory a result shares or an operation writes to; the latter are marked."""
    if node.target is operator.getitem:  # one of several results
        return [(False, node.all_input_nodes[0])]
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    found: list[tuple[bool, fx.Node]] = []
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is None:
            continue
        given = node.args[position : position + 1] or (node.kwargs.get(argument.name),)
        values = given[0] if isinstance(given[0], (list, tuple)) else given
        is_written = argument.alias_info.is_write
        found += [(is_written, value) for value in values if isinstance(value, fx.Node)]
    return found


def _layout(node: fx.Node) -> Any:
    meta = node.meta.get("tensor_meta")
    return object() if meta is None else (meta.shape, meta.stride, meta.dtype)
