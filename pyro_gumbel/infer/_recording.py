"""A function of tensors, recorded as a list of operations and played again."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_gumbel.infer._tape import Call, Tape, collect, memory_of, tensors_in
from pyro_gumbel.infer._undo import Undo, written_arguments

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
        tape = recorder.tape(output)
        self._play: Callable[..., Any] = tape.compiled(len(inputs)) if compile else tape

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
    function: Callable[..., Any], inputs: Sequence[Tensor], *, compile: bool = False
) -> tuple[Any, Recording]:
    """Run a function once and record its operations.

    Where code of torch, Pyro or this package branches on a tensor, as the checks of distributions
    do, the condition is recorded too: each replay computes it anew.

    Args:
        function: Takes tensors and returns nested lists of tensors; may differentiate.
        inputs: Its arguments. They must be distinct objects; their memory may overlap.
        compile: Whether to have the recording compiled by ``torch.compile``.

    Returns:
        What the function returned, and the recording.

    Raises:
        NotRecordable: If the function depends on the value of a tensor, or draws from another
            generator than torch's global one. On this and any other error the tensors that it
            wrote to are restored.
    """
    # On a GPU autograd works in threads of its own, out of the recorder's sight.
    serial = torch.autograd.set_multithreading_enabled(False)
    with _Recorder(inputs) as recorder, serial, _Reads() as reads:
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
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.held: list[Tensor] = []
        self._registers: list[Any] = []
        self._constants: set[int] = set()
        self._calls: list[Call] = []
        self._written: set[StorageWeakRef] = set()
        self._places = WeakTensorKeyDictionary()
        self._generators = torch_generators()
        for tensor in inputs:
            self._places[tensor] = self._register(None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _check_operation(func, args, kwargs)
        named = {name: value for name, value in kwargs.items() if tensors_in(value)}
        options = {name: value for name, value in kwargs.items() if name not in named}
        if func in _LITERALS:  # such as torch.tensor(0.3), made anew in case that it is changed
            function, arguments = aten.clone.default, [self._constant(args[0].detach().clone())]
        else:
            function, arguments = func, [self._place(x) for x in (*named.values(), *args)]
        writes = memory_of(written_arguments(func, args, kwargs))
        is_draw = torch.Tag.nondeterministic_seeded in func.tags
        if is_draw:
            self.check_generators()
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if is_draw:
            self._generators = torch_generators()
        self._written |= writes
        if func in _VIEWS and _is_same_view(result, args[0]):
            self._places[result] = arguments[0]
            return result
        is_pure = not (writes or is_draw) and bool(func._schema.returns)
        call = Call(function, arguments, options, tuple(named), is_pure=is_pure)
        self._add(call, result, is_written=bool(writes))
        return result

    def tape(self, output: Any) -> Tape:
        """Make a tape that returns ``output``, nested lists of tensors."""
        result = self._place(output)
        changing = self._written | memory_of(tensors_in(output))
        return Tape(self._calls, self._registers, self._constants, changing, result)

    def check_generators(self) -> None:
        """Check that nothing but the operations has moved torch's generators."""
        with _disable_current_modes():
            same = all(map(torch.equal, torch_generators(), self._generators))
        if not same:
            _refuse("sets the state of torch's generator", "Let it go on.")

    def writes_to(self, tensor: Tensor) -> bool:
        """Return whether an operation writes to the memory of a tensor."""
        return not self._written.isdisjoint(memory_of([tensor]))

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._copies.clear()
        super().__exit__(*error)

    def _place(self, value: Any) -> int:
        """Return the register of an argument; a list of tensors is put together by a call."""
        if isinstance(value, Tensor):
            place = self._places.get(value)
            return self._hold(value) if place is None else place
        if not tensors_in(value):
            return self._constant(value)
        return self._add(Call(collect, [self._place(part) for part in value]), None)

    def _add(self, call: Call, result: Any, *, is_written: bool = False) -> int:
        memory = memory_of(tensors_in(result))
        if isinstance(result, Tensor) and is_written and result in self._places:
            place = self._places[result]
        else:
            place = self._register(None)
        self._calls.append(call._replace(result=place, memory=memory))
        if isinstance(result, Tensor):
            self._places[result] = place
        elif isinstance(result, (list, tuple)):
            for index, part in enumerate(result):
                if isinstance(part, Tensor):
                    self._add(Call(operator.getitem, [place, self._constant(index)]), part)
        return place

    def _register(self, value: Any) -> int:
        self._registers.append(value)
        return len(self._registers) - 1

    def _constant(self, value: Any) -> int:
        place = self._register(value)
        self._constants.add(place)
        return place

    def _hold(self, tensor: Tensor) -> int:
        if not memory_of([tensor]).isdisjoint(self._made):
            raise NotRecordable("a tensor was made out of the recorder's sight.")
        self.held.append(tensor)
        self._places[tensor] = self._register(tensor)
        return self._places[tensor]


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
