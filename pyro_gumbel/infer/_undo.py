"""Restoration of the tensors that a run writes to."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Undo", "hide_from_compiler", "leaves", "storage_of", "written_arguments"]

# They write running statistics, which their schemas do not declare.
_NORMS = ("aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm")
_RUNNING_STATISTICS = [3, 4]


class Undo(TorchDispatchMode):
    """Restores, on exit, the contents of tensors that existed before.

    Programs keep state in tensors that they write in place: running statistics, counters, vectors
    of a power iteration. Tensors made inside keep their contents. Attributes of Python objects are
    not restored.

    Inside, compiled modules run uncompiled, and the operations of TorchScript become visible to
    function modes.

    Example:
        >>> count = torch.zeros(())
        >>> with Undo():
        ...     count += 1
        >>> count
        tensor(0.)
    """

    supports_higher_order_operators = True

    def __init__(self, *, restore: bool = True) -> None:
        super().__init__()
        hide_from_compiler(self)
        self._restore = restore
        self._made: set[StorageWeakRef] = set()
        self._copies: dict[StorageWeakRef, tuple[UntypedStorage, UntypedStorage]] = {}
        self._without_gradient: dict[int, Tensor] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operation imports the compiler, which takes a second

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._restore:
            return func(*args, **kwargs)
        for tensor in written_arguments(func, args, kwargs):
            self._remember(tensor)
        result = func(*args, **kwargs)
        for tensor in _new_results(func, result):
            storage = storage_of(tensor)
            if storage is not None:
                self._made.add(StorageWeakRef(storage))
        return result

    def _remember(self, tensor: Tensor) -> None:
        storage = storage_of(tensor)
        if storage is None or tensor.is_meta:
            return
        key = StorageWeakRef(storage)
        if key in self._made:
            return
        if key not in self._copies:
            self._copies[key] = (storage, storage.clone())
        owner = tensor if tensor._base is None else tensor._base
        if not owner.requires_grad:
            self._without_gradient[id(owner)] = owner

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for storage, copy in self._copies.values():
            storage.copy_(copy)
        for tensor in self._without_gradient.values():
            if tensor.requires_grad:
                tensor.detach_()
        self._made.clear()
        self._copies.clear()
        self._without_gradient.clear()


def storage_of(tensor: Tensor) -> UntypedStorage | None:
    """Return the memory of a tensor, ``None`` if it has none of its own, like a sparse one."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def written_arguments(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """List the arguments that an operator of the dispatcher writes to."""
    written = [args[place] for place in _written_places(func) if place < len(args)]
    written += [kwargs[name] for name in _written_names(func) if name in kwargs]
    return [leaf for leaf in leaves(written) if isinstance(leaf, Tensor)]


def leaves(value: Any) -> Iterator[Any]:
    """Yield what is in a nest of lists, tuples and dicts."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    else:
        yield value


@functools.cache
def _written_places(func: Any) -> list[int]:
    arguments = func._schema.arguments
    places = [place for place, argument in enumerate(arguments) if _is_write(argument)]
    return places + (_RUNNING_STATISTICS if func._schema.name in _NORMS else [])


@functools.cache
def _written_names(func: Any) -> list[str]:
    return [argument.name for argument in func._schema.arguments if _is_write(argument)]


def _is_write(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _new_results(func: Any, result: Any) -> list[Tensor]:
    """List the results that are not views of arguments."""
    results = result if isinstance(result, tuple) else (result,)
    new = [results[place] for place in _new_places(func) if place < len(results)]
    return [leaf for leaf in leaves(new) if isinstance(leaf, Tensor)]


@functools.cache
def _new_places(func: Any) -> list[int]:
    if func is torch.ops.aten.lift_fresh.default:  # the last step of torch.tensor
        return [0]
    returns = func._schema.returns
    return [place for place, result in enumerate(returns) if result.alias_info is None]


def hide_from_compiler(mode: Any) -> None:
    """Keep ``torch.compile`` from compiling a mode's handler with the program."""
    if "torch._dynamo" in sys.modules:  # else nothing is compiled
        mode.__class__ = _hidden(mode.__class__)


@functools.cache
def _hidden(kind: type) -> type:
    handlers = ("__torch_function__", "__torch_dispatch__")
    hidden = {
        name: torch.compiler.disable(kind.__dict__[name])
        for name in handlers
        if name in kind.__dict__
    }
    return type(kind.__name__, (kind,), hidden)
