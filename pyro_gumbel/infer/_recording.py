"""A function of tensors, recorded as a graph of operations and replayed."""

from __future__ import annotations

import functools
import operator
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_gumbel.infer._operations import Undo, storage_of, tensors, written_arguments
from pyro_gumbel.infer._state import preserved_rng, set_torch_generators, torch_generators

__all__ = ["CudaGraph", "NotRecordable", "Recording", "is_library", "record", "restorer"]

aten = torch.ops.aten
_READERS = {"tolist", "numpy", "__array__", "__dlpack__", "__float__", "__index__"}
_MAKERS = {"tensor", "as_tensor", "asarray", "sparse_coo_tensor", "new", "new_tensor"}
_VIEWS = (aten.detach.default, aten.expand.default, aten.view.default, aten.alias.default)
_LITERALS = (aten.lift_fresh.default, aten.lift_fresh_copy.default)
_INDICES = (torch.int64, torch.int32)
_READ = "Read constants outside of the program."
_LIBRARIES = ("torch", "pyro", "pyro_gumbel", "numpy")


class NotRecordable(RuntimeError):  # noqa: N818
    """A replay could not do what the program does."""


class Recording(NamedTuple):
    """A recorded function, without Pyro, Python control flow or autograd.

    Tensors that are not inputs are held by reference: changes in place are seen.
    """

    held: list[Tensor]
    written: list[Tensor]  # those held that the operations write to
    written_inputs: list[int]  # likewise, by their positions
    has_checks: bool
    devices: dict[Any, Any]  # of results, each with an operation
    values: list[Any]  # to play with after the inputs
    play: Callable[..., Any]

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
        """Return what the function does, and conditions: it is void unless they all hold."""
        with torch.no_grad():
            return self.play(*inputs, *self.values)


class CudaGraph:
    """A function of tensors as one CUDA graph. What a call returns, the next one overwrites."""

    def __init__(self, function: Any, inputs: Sequence[Tensor], device: torch.device) -> None:
        # A kernel reads a number on the CPU once, when it is captured.
        self._inputs = [tensor.detach().to(device, copy=True) for tensor in inputs]
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            # Libraries set themselves up outside of the capture; nothing is to change by that.
            with torch.cuda.stream(stream), preserved_rng(), Undo():
                function(self._inputs)
            stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            # Threads that load data may use the device meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._returned = function(self._inputs)

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        for static, tensor in zip(self._inputs, inputs, strict=True):
            static.copy_(tensor)
        self._graph.replay()
        return self._returned


def record(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    compile: bool = False,
    branches: bool = True,  # whether this package may branch where it can also compute both
) -> tuple[Any, Recording]:
    """Run a function of distinct tensors once; return its result and the recorded operations.

    Where libraries branch on a tensor, as the checks of distributions do, the condition is
    recorded too. On an error the tensors that were written to are restored.
    """
    # On a GPU autograd works in threads of its own, out of the recorder's sight.
    serial = torch.autograd.set_multithreading_enabled(False)
    before = repr((random.getstate(), np.random.get_state()))
    with _Recorder(inputs, branches) as recorder, serial, _Reads() as reads:
        returned = function(*inputs)
        conditions = reads.joined_conditions()
        recorder.check_generators()
        if repr((random.getstate(), np.random.get_state())) != before:
            raise NotRecordable(
                "the program draws from Python's or NumPy's generator; draw with torch."
            )
        if any(map(recorder.writes_to, reads.copies)):
            _refuse("writes to an element at a tensor's place", "Write index_put or torch.where.")
    return returned, recorder.finish(inputs, returned, conditions, compile)


def is_library(frame: Any) -> bool:
    """Return whether a frame runs code of torch, Pyro, this package or Python's own."""
    package = str(frame.f_globals.get("__name__")).partition(".")[0]
    return package in _LIBRARIES or package in sys.stdlib_module_names


def restorer(tensors: Sequence[Tensor]) -> Callable[[], None]:
    """Return a function that restores tensors and torch's generators."""
    generators, values = torch_generators(), [tensor.clone() for tensor in tensors]

    def restore() -> None:
        set_torch_generators(generators)
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)

    return restore


class _Recorder(Undo):
    """Notes operations, refuses those that cannot be replayed, and undoes all on an error."""

    def __init__(self, inputs: Sequence[Tensor], records_branches: bool) -> None:
        super().__init__()
        self.records_branches = records_branches  # read where this package may branch
        self.held: list[Tensor] = []  # that were there before, but for the inputs
        self._graph = fx.Graph()
        self._nodes = WeakTensorKeyDictionary()
        self._values: dict[fx.Node, Any] = {}  # of what is held, and of constants
        self._constants: set[fx.Node] = set()
        self._written: set[StorageWeakRef] = set()
        self._generators = torch_generators()
        for tensor in inputs:
            self._nodes[tensor] = self._placeholder(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "namespace", "") == "profiler":  # marks of time, not operations
            return func(*args, **kwargs)
        _check_operation(func, args, kwargs)
        function, options = func, {}
        if func in _LITERALS:  # such as torch.tensor(0.3), made anew in case that it is changed
            function, arguments = aten.clone.default, (self._constant(args[0].detach().clone()),)
        else:
            arguments, options = self._with_nodes((args, kwargs))
        writes = _memory_of(written_arguments(func, args, kwargs))
        if is_draw := torch.Tag.nondeterministic_seeded in func.tags:
            self.check_generators()
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if is_draw:
            self._generators = torch_generators()
        self._written |= writes
        if func in _VIEWS and result.layout == torch.strided and result.is_set_to(args[0]):
            self._nodes[result] = arguments[0]
        else:
            is_pure = func.namespace == "aten" and not (writes or is_draw)
            self._call(function, arguments, options, result, is_pure=is_pure)
        return result

    def finish(
        self, inputs: Sequence[Tensor], returned: Any, conditions: Any, compile: bool
    ) -> Recording:
        output = self._graph.output(self._with_nodes((returned, conditions)))
        # Operations write to memory, and so may who gets the output.
        self._simplify(self._written | _memory_of(returned))
        returned, conditions = output.args[0]
        conditions = [c for c in dict.fromkeys(conditions) if c not in self._constants]
        output.args = ((returned, conditions),)
        self._graph.eliminate_dead_code(lambda n: not (_is_pure(n) or n in self._values))
        nodes = self._graph.nodes
        return Recording(
            held=self.held,
            written=[tensor for tensor in self.held if self.writes_to(tensor)],
            written_inputs=[i for i, tensor in enumerate(inputs) if self.writes_to(tensor)],
            has_checks=bool(conditions),
            devices={n.meta["device"]: n.target for n in nodes if n.op == "call_function"},
            values=[self._values[node] for node in nodes if node in self._values],
            play=_compiled(self._graph) if compile else _played(self._graph),
        )

    def _simplify(self, changing: set[StorageWeakRef]) -> None:
        """Compute constants and merge equal operations, except on memory that changes."""
        known: dict[str, fx.Node] = {}
        for node in self._graph.nodes:
            parts = (node, *node.all_input_nodes)
            if not _is_pure(node) or any(changing & part.meta["memory"] for part in parts):
                continue
            key = repr((node.target, node.args, node.kwargs))
            same = known.get(key, node)
            if same is node and self._constants.issuperset(node.all_input_nodes):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._values.get)
                with self._graph.inserting_before(node):
                    same = self._constant(node.target(*args, **kwargs))
            if same is not node:
                node.replace_all_uses_with(same)
            known[key] = same

    def check_generators(self) -> None:
        """Check that nothing but the operations has moved torch's generators."""
        with _disable_current_modes():
            same = all(map(torch.equal, torch_generators(), self._generators))
        if not same:
            _refuse("sets the state of torch's generator", "Let it go on.")

    def writes_to(self, tensor: Tensor) -> bool:
        """Return whether an operation writes to the memory of a tensor."""
        return bool(_memory_of(tensor) & self._written)

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._copies.clear()
        super().__exit__(*error)

    def _with_nodes(self, value: Any) -> Any:
        return map_aggregate(value, lambda x: self._node(x) if isinstance(x, Tensor) else x)

    def _node(self, tensor: Tensor) -> fx.Node:
        if tensor not in self._nodes:
            if _memory_of(tensor) & self._made:
                raise NotRecordable("a tensor was made out of the recorder's sight.")
            self.held.append(tensor)
            self._nodes[tensor] = node = self._placeholder(tensor)
            self._values[node] = tensor
        return self._nodes[tensor]

    def _constant(self, value: Any) -> fx.Node:
        node = self._placeholder(value)
        self._values[node] = value
        self._constants.add(node)
        return node

    def _placeholder(self, value: Any) -> fx.Node:
        node = self._graph.placeholder(f"tensor_{len(self._graph.nodes)}")
        node.meta = {"memory": _memory_of(value)}
        return node

    def _call(
        self, function: Any, arguments: Any, options: Any, result: Any, *, is_pure: bool = True
    ) -> None:
        node = self._graph.call_function(function, arguments, options)
        device = next((tensor.device for tensor in tensors(result)), None)
        node.meta = {"memory": _memory_of(result), "device": device, "is_pure": is_pure}
        if isinstance(result, Tensor):
            self._nodes.setdefault(result, node)  # an argument that was written to keeps its node
        elif isinstance(result, (list, tuple)):
            for index, part in enumerate(result):
                if isinstance(part, Tensor):
                    self._call(operator.getitem, (node, index), {}, part)


def _is_pure(node: fx.Node) -> bool:
    return node.op == "call_function" and node.meta["is_pure"]


def _played(graph: fx.Graph) -> Callable[..., Any]:
    """Have FX run the operations without their Python wrappers."""
    for node in graph.nodes:
        if node.target is aten.mkldnn_rnn_layer.default:
            node.target = _with_workspace
        elif isinstance(node.target, torch._ops.OpOverload):
            # Private: without it, each replayed operation passes through a Python layer.
            operation: Any = functools.partial(node.target._op)
            operation.__name__, operation.__module__ = node.name, __name__  # for FX
            node.target = operation
    return fx.GraphModule({}, graph).forward


def _compiled(graph: fx.Graph) -> Callable[..., Any]:
    """Have ``torch.compile`` fuse the operations."""
    from torch._inductor import config  # private: no public option gives eager random numbers

    compiled = torch.compile(fx.GraphModule({}, graph), fullgraph=True, dynamic=False)

    def play(*inputs: Tensor) -> Any:
        # Eager kernels for the draws, so that the numbers are those of an eager step.
        with config.patch(fallback_random=True):
            return compiled(*inputs)

    return play


def _with_workspace(*args: Any) -> Any:
    """Run a layer of an LSTM on a CPU, which keeps what its gradient needs in grad mode alone."""
    with torch.enable_grad():
        return aten.mkldnn_rnn_layer.default(*args)


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
    """

    def __init__(self) -> None:
        super().__init__()
        self._conditions: list[Tensor] = []
        self.copies: list[Tensor] = []  # that stand for views

    def joined_conditions(self) -> list[Tensor]:
        """Return the conditions, as one on a GPU, where each read waits."""
        if self._conditions and (last := self._conditions[-1]).is_cuda:  # as is the loss
            return [torch.stack([c.to(last.device) for c in self._conditions]).all()]
        return self._conditions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, given = getattr(func, "__name__", ""), (*args, *kwargs.values())
        if func is Tensor.__bool__ and is_library(sys._getframe(1)):
            return self._branch(*args)
        if func is torch.nn.functional.one_hot:
            return self._one_hot(*args, **kwargs)
        if func is Tensor.__getitem__:
            return self._item(*args)
        makes = name in _MAKERS and tensors([x for x in given if isinstance(x, (list, tuple))])
        splits = name == "tensor_split" and tensors(given[1:])
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
        tensors = [n for n, part in enumerate(parts) if isinstance(part, Tensor)]
        places = [n for n in tensors if parts[n].dim() == 0 and parts[n].dtype in _INDICES]
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


def _refuse(what: str, instead: str) -> None:
    raise NotRecordable(
        f"the program {what}: a recorded step would repeat this outcome every time. {instead}"
    )


def _memory_of(value: Any) -> set[StorageWeakRef]:
    storages = map(storage_of, tensors(value))
    return {StorageWeakRef(storage) for storage in storages if storage is not None}
