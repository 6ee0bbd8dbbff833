"""A function of tensors, recorded as a graph of operations and replayed."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_gumbel.infer._operations import Undo, storage_of, written_arguments

__all__ = [
    "NotRecordable",
    "Recording",
    "is_library",
    "record",
    "set_torch_generators",
    "torch_generators",
]

aten = torch.ops.aten
_READERS = {"tolist", "numpy", "__array__", "__dlpack__", "__float__", "__index__"}
_MAKERS = {"tensor", "as_tensor", "asarray", "sparse_coo_tensor", "new", "new_tensor"}
_VIEWS = (aten.detach.default, aten.expand.default, aten.view.default, aten.alias.default)
_LITERALS = (aten.lift_fresh.default, aten.lift_fresh_copy.default)
_READ = "Read constants outside of the program."
_LIBRARIES = ("torch", "pyro", "pyro_gumbel", "numpy")


class NotRecordable(RuntimeError):  # noqa: N818
    """A replay could not do what the program does."""


class Recording:
    """A recorded function, without Pyro, Python control flow or autograd.

    Tensors that the function did not take as inputs are held by reference: changes in place are
    seen, other objects in their place are not.

    Attributes:
        held: The tensors that are held.
        written: Those among them that the operations write to.
        written_inputs: The positions of the inputs that they write to.
        has_checks: Whether libraries check values in it.
    """

    def __init__(
        self, recorder: _Recorder, inputs: Sequence[Tensor], output: Any, *, compile: bool
    ) -> None:
        self.held = recorder.held
        self.written = [tensor for tensor in self.held if recorder.writes_to(tensor)]
        self.written_inputs = [i for i, tensor in enumerate(inputs) if recorder.writes_to(tensor)]
        self.has_checks = bool(output[1])
        graph, values = recorder.finished_graph(output)
        self._play = _compiled(graph, values) if compile else _Player(graph, values)

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Any, Sequence[Tensor]]:
        """Play the recording.

        Returns:
            What the function returned, in tuples, and for each device on which libraries check
            values a boolean: whether a check went another way than in the recorded run. If one is
            true, what the function returned is void.
        """
        return self._play(*inputs)


def record(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    *,
    compile: bool = False,
    branches: bool = True,
) -> tuple[Any, Recording]:
    """Run a function once and record its operations.

    Where code of torch, Pyro or this package branches on a tensor, as the checks of distributions
    do, the condition is recorded too: each replay computes it anew.

    Args:
        function: Takes tensors and returns nested lists of tensors; may differentiate.
        inputs: Its arguments. They must be distinct objects; their memory may overlap.
        compile: Whether to have the recording compiled by ``torch.compile``.
        branches: Whether this package may branch where it can also compute both.

    Returns:
        What the function returned, and the recording.

    Raises:
        NotRecordable: If the function depends on the value of a tensor, or draws from another
            generator than torch's global one. On this and any other error the tensors that it
            wrote to are restored.
    """
    # On a GPU autograd works in threads of its own, out of the recorder's sight.
    serial = torch.autograd.set_multithreading_enabled(False)
    with _Recorder(inputs, branches) as recorder, serial, _Reads() as reads:
        returned = function(*inputs)
        output = (returned, reads.broken())
        recorder.check_generators()
        if any(map(recorder.writes_to, reads.copies)):
            _refuse("writes to an element at a tensor's place", "Write index_put or torch.where.")
    return returned, Recording(recorder, inputs, output, compile=compile)


def is_library(frame: Any) -> bool:
    """Return whether a frame runs code of torch, Pyro, this package or Python's own."""
    package = str(frame.f_globals.get("__name__")).partition(".")[0]
    return package in _LIBRARIES or package in sys.stdlib_module_names


def torch_generators() -> list[Tensor]:
    """Return the states of torch's generators (sooner than those of Python and NumPy, too)."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def set_torch_generators(states: Sequence[Tensor]) -> None:
    """Restore what :func:`torch_generators` returned."""
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])


class _Recorder(Undo):
    """Notes operations, refuses those that cannot be replayed, and undoes all on an error.

    Attributes:
        held: The tensors that were there before, but for the inputs.
        records_branches: Whether code of this package may branch on tensors.
    """

    def __init__(self, inputs: Sequence[Tensor], records_branches: bool) -> None:
        super().__init__()
        self.records_branches = records_branches
        self.held: list[Tensor] = []
        self._graph = fx.Graph()
        self._nodes = WeakTensorKeyDictionary()
        self._values: dict[fx.Node, Any] = {}  # of the attributes of the graph
        self._literals: set[fx.Node] = set()
        self._written: set[StorageWeakRef] = set()
        self._generators = torch_generators()
        for number, tensor in enumerate(inputs):
            self._nodes[tensor] = self._noted(self._graph.placeholder(f"input_{number}"), tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _check_operation(func, args, kwargs)
        writes = _memory_of(written_arguments(func, args, kwargs))
        is_draw = torch.Tag.nondeterministic_seeded in func.tags
        if func in _LITERALS:  # such as torch.tensor(0.3), made anew in case that it is changed
            function, arguments, options = aten.clone.default, [self._literal(args[0])], {}
        else:
            function, arguments = func, [self._argument(value) for value in args]
            options = {name: self._argument(value) for name, value in kwargs.items()}
        if is_draw:
            self.check_generators()
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if is_draw:
            self._generators = torch_generators()
        self._written |= writes
        if func in _VIEWS and _is_same_view(result, args[0]):
            self._nodes[result] = arguments[0]
        else:
            is_pure = func.namespace == "aten" and not (writes or is_draw)
            self._add(function, arguments, options, result, is_pure=is_pure)
        return result

    def finished_graph(self, output: Any) -> tuple[fx.Graph, Mapping[fx.Node, Any]]:
        """Make the graph return ``output``, nested lists of tensors.

        Returns:
            The graph, and the values of its attributes.
        """
        self._graph.output(self._argument(output))
        changing = self._written | _memory_of(_tensors_in(output))
        _simplify(self._graph, self._values, self._literals, changing)
        return self._graph, self._values

    def check_generators(self) -> None:
        """Check that nothing but the operations has moved torch's generators."""
        with _disable_current_modes():
            same = all(map(torch.equal, torch_generators(), self._generators))
        if not same:
            _refuse("sets the state of torch's generator", "Let it go on.")

    def writes_to(self, tensor: Tensor) -> bool:
        """Return whether an operation writes to the memory of a tensor."""
        return not self._written.isdisjoint(_memory_of([tensor]))

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._copies.clear()
        super().__exit__(*error)

    def _argument(self, value: Any) -> Any:
        """Return the node of a tensor, and of a list of tensors."""
        if isinstance(value, Tensor):
            node = self._nodes.get(value)
            return self._hold(value) if node is None else node
        if not _tensors_in(value):
            return value
        return self._add(_collect, [self._argument(part) for part in value], {}, value)

    def _add(
        self, function: Any, arguments: Any, options: Any, result: Any, *, is_pure: bool = True
    ) -> fx.Node:
        node = self._graph.call_function(function, tuple(arguments), options)
        self._noted(node, result, is_pure=is_pure)
        if isinstance(result, Tensor):
            if result not in self._nodes:  # else an argument that was written to
                self._nodes[result] = node
        elif isinstance(result, (list, tuple)) and function is not _collect:
            for index, part in enumerate(result):
                if isinstance(part, Tensor):
                    self._add(operator.getitem, [node, index], {}, part)
        return node

    def _hold(self, tensor: Tensor) -> fx.Node:
        if not _memory_of([tensor]).isdisjoint(self._made):
            raise NotRecordable("a tensor was made out of the recorder's sight.")
        self.held.append(tensor)
        self._nodes[tensor] = node = self._attribute(tensor)
        return node

    def _literal(self, tensor: Tensor) -> fx.Node:
        node = self._attribute(tensor.detach().clone())
        self._literals.add(node)
        return node

    def _attribute(self, value: Tensor) -> fx.Node:
        node = self._graph.get_attr(f"tensor_{len(self._values)}")
        self._values[node] = value
        return self._noted(node, value)

    def _noted(self, node: fx.Node, result: Any, *, is_pure: bool = True) -> fx.Node:
        node.meta = {"memory": _memory_of(_tensors_in(result)), "is_pure": is_pure}
        return node


def _simplify(
    graph: fx.Graph,
    values: dict[fx.Node, Any],
    constants: set[fx.Node],
    changing: set[StorageWeakRef],
) -> None:
    """Compute constants, merge equal operations and remove unused ones.

    Args:
        graph: The graph.
        values: The values of its attributes.
        constants: Those that nothing changes.
        changing: The memory that is written to, by operations or by the caller.
    """
    known: dict[str, fx.Node] = {}
    for node in graph.nodes:
        parts = (node, *node.all_input_nodes)
        if not _is_pure(node) or any(changing & part.meta["memory"] for part in parts):
            continue
        key = repr((node.target, node.args, node.kwargs))
        same = known.get(key, node)
        if same is node and constants.issuperset(node.all_input_nodes):
            with graph.inserting_before(node):
                same = graph.get_attr(f"tensor_{len(values)}")
            same.meta = node.meta
            values[same] = _callable(node)(*[values.get(x, x) for x in _arguments(node)])
            constants.add(same)
        if same is not node:
            node.replace_all_uses_with(same)
        known[key] = same
    for node in reversed(graph.nodes):
        if not node.users and (_is_pure(node) or node.op == "get_attr"):
            graph.erase_node(node)


class _Player:
    """Runs operations one after the other, sooner than the code that FX makes does.

    Args:
        graph: The operations.
        values: The values of the graph's attributes.
    """

    def __init__(self, graph: fx.Graph, values: Mapping[fx.Node, Any]) -> None:
        *nodes, output = graph.nodes
        places = {node: place for place, node in enumerate(nodes)}
        registers: list[Any] = [values.get(node) for node in nodes]
        last_use = {part: node for node in nodes for part in (*node.all_input_nodes, node)}
        last_use[output.args[0]] = output
        self._code: list[tuple[Any, Any, int, list[int]]] = []
        for node in nodes:
            if node.op != "call_function":
                continue
            arguments = []
            for value in _arguments(node):
                if isinstance(value, fx.Node):
                    arguments.append(places[value])
                else:
                    arguments.append(len(registers))
                    registers.append(value)
            used = (*node.all_input_nodes, node)
            unused = [places[part] for part in used if last_use[part] is node]
            self._code.append((_callable(node), _getter(arguments), places[node], unused))
        self._registers, self._result = registers, places[output.args[0]]

    def __call__(self, *inputs: Tensor) -> Any:
        registers = self._registers.copy()
        registers[: len(inputs)] = inputs
        for operation, arguments, result, unused in self._code:
            registers[result] = operation(*arguments(registers))
            for place in unused:
                registers[place] = None
        return registers[self._result]


def _compiled(graph: fx.Graph, values: Mapping[fx.Node, Any]) -> Callable[..., Any]:
    """Have ``torch.compile`` fuse the operations."""
    from torch._inductor import config

    attributes = {str(node.target): values[node] for node in graph.nodes if node in values}
    compiled = torch.compile(fx.GraphModule(attributes, graph), fullgraph=True, dynamic=False)

    def play(*inputs: Tensor) -> Any:
        # Eager kernels for the draws, so that the numbers are those of an eager step.
        with config.patch(fallback_random=True):
            return compiled(*inputs)

    return play


def _is_pure(node: fx.Node) -> bool:
    return node.op == "call_function" and node.meta["is_pure"]


def _arguments(node: fx.Node) -> list[Any]:
    """List the arguments of an operation; nodes that are given by name come first."""
    return [*(v for v in node.kwargs.values() if isinstance(v, fx.Node)), *node.args]


def _callable(node: fx.Node) -> Callable[..., Any]:
    """Return the operation of a node as a function of its :func:`_arguments`."""
    function: Any = getattr(node.target, "_op", node.target)
    if node.target is aten.mkldnn_rnn_layer.default:
        function = _with_workspace
    names = [name for name, value in node.kwargs.items() if isinstance(value, fx.Node)]
    options = {name: value for name, value in node.kwargs.items() if name not in names}
    if options:
        function = functools.partial(function, **options)
    return functools.partial(_call_by_names, function, names) if names else function


def _call_by_names(operation: Callable[..., Any], names: Sequence[str], *values: Any) -> Any:
    return operation(*values[len(names) :], **dict(zip(names, values, strict=False)))


def _collect(*parts: Any) -> tuple[Any, ...]:
    return parts


def _with_workspace(*args: Any) -> Any:
    """Run a layer of an LSTM on a CPU, which keeps what its gradient needs in grad mode alone."""
    with torch.enable_grad():
        return aten.mkldnn_rnn_layer.default(*args)


def _getter(places: Sequence[int]) -> Callable[[list[Any]], Any]:
    """Read several registers, as a list or a tuple."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return operator.itemgetter(slice(places[0], places[0] + 1) if places else slice(0))


def _memory_of(tensors: Iterable[Tensor]) -> set[StorageWeakRef]:
    """Return the memory that tensors lie in."""
    storages = map(storage_of, tensors)
    return {StorageWeakRef(storage) for storage in storages if storage is not None}


def _tensors_in(value: Any) -> list[Tensor]:
    """List the tensors in nested lists."""
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors_in(part)]
    return [value] if isinstance(value, Tensor) else []


def _check_operation(func: Any, args: Any, kwargs: Any) -> None:
    """Refuse an operation whose outcome the recording could only repeat, not compute."""
    if not isinstance(func, torch._ops.OpOverload):
        _refuse(f"calls {func}", "Call operations of torch's.")
    selects = torch.Tag.dynamic_output_shape in func.tags
    if func is aten.index.Tensor:  # dynamic only where a mask selects
        selects = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if torch.Tag.data_dependent_output in func.tags:
        _refuse(f"turns a tensor into a number ({func})", _READ)
    if selects:
        _refuse(f"selects by a tensor's values ({func})", "Write torch.where(...).")
    if isinstance(kwargs.get("generator"), torch.Generator):
        _refuse(f"draws from a torch.Generator of its own ({func})", "Draw from torch's own.")


class _Reads(TorchFunctionMode):
    """Refuses what hands the numbers of tensors to Python, and notes the conditions of libraries.

    Memory that is read behind torch's back is out of sight: ``untyped_storage()``, ``data_ptr()``
    and ``torch.utils.dlpack.to_dlpack``.

    Attributes:
        copies: What stands for views of other tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conditions: list[Tensor] = []
        self.copies: list[Tensor] = []

    def broken(self) -> list[Tensor]:
        """Compute for each device whether one of the conditions does not hold."""
        devices = dict.fromkeys(condition.device for condition in self._conditions)
        groups = [[c for c in self._conditions if c.device == device] for device in devices]
        return [torch.stack(group).all().logical_not() for group in groups]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, given = getattr(func, "__name__", ""), (*args, *kwargs.values())
        if func is Tensor.__bool__ and is_library(sys._getframe(1)):
            return self._branch(*args)
        if func is torch.nn.functional.one_hot:
            return self._one_hot(*args, **kwargs)
        if func is Tensor.__getitem__:
            return self._item(*args)
        makes = name in _MAKERS and any(map(_holds_tensor, given))
        splits = name == "tensor_split" and any(isinstance(other, Tensor) for other in given[1:])
        if name in _READERS or makes or splits:
            _refuse(f"turns a tensor into numbers ({name})", _READ)
        return func(*args, **kwargs)

    def _branch(self, condition: Tensor) -> bool:
        with _disable_current_modes():
            outcome = bool(condition)
        holds = condition.detach().reshape(()).bool()
        self._conditions.append(holds if outcome else holds.logical_not())
        return outcome

    def _item(self, tensor: Tensor, index: Any) -> Tensor:
        """``tensor[index]``, as a copy where the index is a single number, which is not read."""
        parts = index if isinstance(index, tuple) else (index,)
        places = [n for n, part in enumerate(parts) if _is_single(part)]
        others = [part for n, part in enumerate(parts) if n not in places]
        if len(places) != 1 or not all(part is ... or isinstance(part, slice) for part in others):
            return tensor[index]
        (place,) = places
        dim = place - len(parts) if any(part is ... for part in parts[:place]) else place
        row = (*parts[:place], parts[place].reshape(1), *parts[place + 1 :])
        self.copies.append(tensor[row].squeeze(dim))
        return self.copies[-1]

    def _one_hot(self, tensor: Tensor, num_classes: int = -1) -> Tensor:
        """``one_hot`` without its look at the smallest and the largest value."""
        if num_classes <= 0 or tensor.dtype != torch.int64:
            return torch.nn.functional.one_hot(tensor, num_classes)
        if not self._branch(((tensor >= 0) & (tensor < num_classes)).all()):
            with _disable_current_modes():
                torch.nn.functional.one_hot(tensor, num_classes)  # which raises
        classes = torch.arange(num_classes, device=tensor.device)
        return (tensor.unsqueeze(-1) == classes).long()


def _is_single(part: Any) -> bool:
    return (
        isinstance(part, Tensor) and part.dim() == 0 and part.dtype in (torch.int64, torch.int32)
    )


def _refuse(what: str, instead: str) -> None:
    raise NotRecordable(
        f"the program {what}: a recorded step would repeat this step's outcome for ever. {instead}"
    )


def _holds_tensor(data: Any) -> bool:
    return isinstance(data, (list, tuple)) and any(
        isinstance(part, Tensor) or _holds_tensor(part) for part in data
    )


def _is_same_view(view: Tensor, base: Tensor) -> bool:
    if view.layout != torch.strided or base.layout != torch.strided:
        return False
    one, other = ((x.shape, x.stride(), x.storage_offset(), x.dtype) for x in (view, base))
    return one == other
