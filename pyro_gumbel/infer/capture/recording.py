"""Record a function of tensors as a flat list of operations, and play it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_gumbel.infer.capture.reads import RefuseReads, RefuseValues
from pyro_gumbel.infer.capture.simplify import as_function, is_view_of, simplify, writes_to

__all__ = ["Recording", "record"]

Function = Callable[..., Any]


class Recording:
    """A recorded function, without Pyro, Python control flow or autograd.

    Parameters, buffers and other tensors that the function did not take as inputs are held by
    reference: changes in place are seen, other objects in their place are not.

    Attributes:
        play: The recorded operations as a function of the inputs.
        held: The tensors that are held.
        mutated: Those among them that the operations change in place.
        mutated_inputs: The numbers of the inputs that they change in place.
    """

    def __init__(self, graph: fx.GraphModule, inputs: Sequence[Tensor], *, compile: bool) -> None:
        simplify(graph, inputs)
        self.held = [getattr(graph, n.target) for n in graph.graph.nodes if n.op == "get_attr"]
        self.mutated, self.mutated_inputs = _mutated(graph)
        self.play: Function = _compiled(graph) if compile else as_function(graph)

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        return self.play(*inputs)


def record(
    function: Function, inputs: Sequence[Tensor], *, compile: bool = False
) -> tuple[Any, Recording]:
    """Run ``function`` once, on the values it is given, and record what it does.

    Args:
        function: Takes tensors and returns nested lists of tensors; may differentiate.
        inputs: Its arguments.
        compile: Whether to have the recording compiled by ``torch.compile``.

    Returns:
        What the function returned, and the recording.

    Raises:
        NotRecordable: If the function's course depends on the value of a tensor.
    """
    returned: list[Any] = []

    def run(*inputs: Tensor) -> Any:
        with RefuseReads(), RefuseValues():
            returned.append(function(*inputs))
        return returned[0]

    # An input that is also another one, or held, must not be taken for it.
    inputs = [x.view_as(x) if x.layout == torch.strided else x for x in inputs]
    # On a GPU autograd works in threads of its own, out of the recorder's sight.
    with torch.autograd.set_multithreading_enabled(False), _undescribed():
        graph = make_fx(run)(*inputs)
    return returned[0], Recording(graph, inputs, compile=compile)


@contextmanager
def _undescribed() -> Iterator[None]:
    """Let ``make_fx`` describe no result by a fake tensor: that takes most of a recording.

    It makes a mode for each, with the whole stack in words. Shapes, strides and types it notes
    besides. Where a later torch has no such function, recording takes longer.
    """
    describe = getattr(proxy_tensor, "extract_val", None)
    if describe is None:
        yield
        return

    def skip(value: Any, *args: Any, **kwargs: Any) -> Any:
        plain = type(value) in (Tensor, torch.nn.Parameter)
        return None if plain else describe(value, *args, **kwargs)

    proxy_tensor.extract_val = skip  # type: ignore[assignment]
    try:
        yield
    finally:
        proxy_tensor.extract_val = describe


def _mutated(graph: fx.GraphModule) -> tuple[list[Tensor], list[int]]:
    """Find the held tensors and the inputs that an operation writes to, by a view included."""
    source_of: dict[fx.Node, fx.Node] = {}
    written: dict[fx.Node, None] = {}
    places = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node in graph.graph.nodes:
        if node.op in ("get_attr", "placeholder"):
            source_of[node] = node
        for source in is_view_of(node):
            if source in source_of:
                source_of[node] = source_of[source]
        written.update(dict.fromkeys(source_of[n] for n in writes_to(node) if n in source_of))
    held = [getattr(graph, str(node.target)) for node in written if node.op == "get_attr"]
    unique = {id(tensor): tensor for tensor in held}
    return list(unique.values()), [places.index(node) for node in written if node in places]


def _compiled(graph: fx.GraphModule) -> Function:
    from torch._inductor import config

    graph.recompile()
    compiled = torch.compile(graph, fullgraph=True, dynamic=False)

    def play(*inputs: Tensor) -> Any:
        # Eager kernels for the draws, so that the numbers are those of an eager step.
        with config.patch(fallback_random=True):
            return compiled(*inputs)

    return play
