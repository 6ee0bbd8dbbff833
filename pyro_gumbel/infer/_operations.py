"""Classify torch operations by the arguments whose values they use, and undo their writes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, UntypedStorage
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "Operation",
    "Undo",
    "calling_module",
    "detached",
    "hide_from_compiler",
    "is_library",
    "leaves",
    "reads_shape_alone",
    "storage_of",
    "tensors",
    "version",
    "written_arguments",
]

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

    def __enter__(self) -> Any:
        # torch.compile gives up for good on code that it meets under a dispatch mode.
        loaded = "torch._dynamo" in sys.modules  # else nothing is compiled
        stance = torch.compiler.set_stance("force_eager") if loaded else nullcontext()
        self._stance: AbstractContextManager[Any] = stance
        stance.__enter__()
        return super().__enter__()

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
        self._stance.__exit__(*error)
        super().__exit__(*error)
        for storage, copy in self._copies.values():
            storage.copy_(copy)
        for tensor in self._without_gradient.values():
            if tensor.requires_grad:
                tensor.detach_()
        self.keep()

    def keep(self) -> None:
        """Keep the contents as they are now."""
        self._made.clear()
        self._copies.clear()
        self._without_gradient.clear()


def storage_of(tensor: Tensor) -> UntypedStorage | None:
    """Return a tensor's storage, or ``None`` for a tensor without one, such as a sparse one."""
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
    """Yield the leaves of nested lists, tuples and dicts."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    else:
        yield value


# Schemas are private: if they move, the first step that reads one raises AttributeError.
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


def _named(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Discontinuous functions for which autograd defines a gradient, and random draws, whose gradient
# it sets to zero.
_STEPS = _named(
    "angle bernoulli binomial ceil copysign div divide fake_quantize_per_channel_affine "
    "fake_quantize_per_tensor_affine fix floor floor_divide floordiv fmod frac hardshrink "
    "heaviside mod normal poisson remainder rfloordiv rmod round sgn sign threshold true_divide "
    "trunc"
)
_DIVISIONS = frozenset(["div", "divide", "true_divide"])  # discontinuous with a rounding mode
_COMPARISONS = _named(
    "all and any bitwise_and bitwise_not bitwise_or bitwise_xor bucketize eq ge greater "
    "greater_equal gt invert isclose isin le less less_equal logical_and logical_not logical_or "
    "logical_xor lt ne not_equal or searchsorted xor"
)
# Constant in every valid run.
_VALIDITY = frozenset(["isfinite", "isinf", "isnan", "isneginf", "isposinf"])
# The second argument gives only a shape, dtype or device.
_OF_FIRST = frozenset(["expand_as", "reshape_as", "to", "type_as", "view_as"])
_SHAPES = _named(
    "dense_dim data_ptr dim dim_order element_size get_device hash len ndimension nelement nnz "
    "numel size sparse_dim storage_offset stride"
)
_DESCRIPTIONS = _named(
    ".device .dtype .is_cuda .is_leaf .is_sparse .layout .ndim .requires_grad .shape ._version"
)
_SHAPED_BY_FIRST = frozenset(["argwhere", "nonzero", "unique", "unique_consecutive"])
_SHAPED_BY_SECOND = frozenset(["masked_select", "repeat_interleave"])
_SELECTIONS = frozenset(["getitem", "narrow", "tensor_split"])
_CONVERSIONS = frozenset(["__bool__", "__complex__", "__float__", "__index__", "__int__"])
_CONSTRUCTORS = frozenset(["as_tensor", "asarray", "tensor"])
# Their integer results count elements, and depend only on the second argument.
_PACKINGS = frozenset(["pack_padded_sequence", "pad_packed_sequence"])
# Code of distributions, and of our losses' checks. The number that a loss returns is not a check.
_LIBRARIES = (
    "pyro.distributions",
    "pyro.ops.",
    "pyro.poutine.scale_messenger",
    "pyro.util",
    "pyro_gumbel.distributions",
    "pyro_gumbel.estimators",
    "pyro_gumbel.infer._",
    "pyro_gumbel.infer._checks",
    "pyro_gumbel.infer._state",
    "torch.distributions",
)
_MODES = (__name__, "pyro_gumbel.infer._dependence", "pyro_gumbel.infer._operations")


class Operation:
    """A call of a torch function.

    Attributes:
        name: The function's name without leading and trailing underscores, so that the in-place
            form has the same name. The name of an attribute starts with a point.
        inputs: The tensors among the arguments.
        sources: The inputs whose values are used, not only their shape, dtype or device.
        below_autograd: Whether this is an operator of the dispatcher, as TorchScript calls them.
            Its result has no gradient yet.
    """

    def __init__(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.name = _name(func)
        self.below_autograd = isinstance(func, OpOverload)
        self.inputs = tensors((args, kwargs))
        used = self._used()
        self.sources = self.inputs if used is None else tensors(used)
        self._versions = [] if self.below_autograd else [version(x) for x in self.inputs]

    def _used(self) -> Any:
        """Return the arguments whose values are used; ``None`` for all."""
        if self.name in _VALIDITY:
            return ()
        if self.name in _OF_FIRST:
            return self.args[:1]
        if self.name.endswith("_like") or self.name.startswith("new_"):
            return self.args[1:], self.kwargs
        return None

    def sources_of(self, result: Tensor) -> list[Tensor]:
        """List the inputs that one of the results may depend on."""
        if self.name in _PACKINGS and not result.is_floating_point():
            return tensors(self.args[1:])
        return self.sources

    @property
    def jumps(self) -> bool:
        """True if the function is discontinuous, even if it has a gradient."""
        if self.name in _DIVISIONS:
            return self.kwargs.get("rounding_mode") is not None
        return self.name in _STEPS or self.name in _COMPARISONS

    @property
    def compares(self) -> bool:
        """True if the function compares, or combines comparisons."""
        return self.name in _COMPARISONS

    @property
    def selectors(self) -> list[Tensor]:
        """The arguments whose values choose which part of the first the result views."""
        return tensors(self.args[1:]) if self.name in _SELECTIONS else []

    @property
    def tangents(self) -> list[Tensor]:
        """The tangents that forward-mode differentiation attaches to the result."""
        return tensors((self.args[1:], self.kwargs)) if self.name == "make_dual" else []

    @property
    def converts(self) -> bool:
        """True if it converts tensors to numbers, for which torch warns of a lost gradient."""
        if self.name in _CONSTRUCTORS:
            return bool(self.args) and not isinstance(self.args[0], Tensor)
        return getattr(self.func, "__name__", "") in _CONVERSIONS

    def read_into_python(self, result: Any) -> list[Tensor]:
        """List the inputs whose values reach Python: as a number, a shape or a later ``.grad``."""
        if self.name in _SHAPED_BY_FIRST or self.name == "backward":
            return self.sources
        if self.name in _SHAPED_BY_SECOND:
            return tensors((self.args[1:], self.kwargs))
        if self.name == "getitem":
            return [x for x in tensors(self.args[1]) if x.dtype in (torch.bool, torch.uint8)]
        if self.name in _SHAPES or self.name.startswith((".", "is_")):
            return self.sources if self.name == "is_nonzero" else []
        numbers = any(isinstance(leaf, _NUMBERS) for leaf in leaves(result))
        return self.sources if numbers else []

    def written(self) -> list[Tensor]:
        """Return the inputs that the call wrote to. Valid after the call."""
        if self.below_autograd:
            return written_arguments(self.func, self.args, self.kwargs)
        pairs = zip(self.inputs, self._versions, strict=True)
        return [tensor for tensor, before in pairs if version(tensor) != before]


_NUMBERS = (bool, int, float, complex, np.ndarray, np.generic)


def _name(func: Any) -> str:
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        return "." + getattr(getattr(func, "__self__", None), "__name__", "")
    return name.split(".")[0].strip("_")


@functools.lru_cache(maxsize=1024)
def reads_shape_alone(func: Any) -> bool:
    """Return whether a function returns a number or name that does not depend on values."""
    return _name(func) in _SHAPES or _name(func) in _DESCRIPTIONS


def version(tensor: Tensor) -> int:
    """Return torch's count of writes to a tensor, 0 for an inference tensor."""
    # Private: torch has no public name for this count.
    return 0 if tensor.is_inference() else tensor._version


def tensors(value: Any) -> list[Tensor]:
    """List the tensors in nested arguments or results, without ``torch.func`` wrappers."""
    return [_bare(leaf) for leaf in leaves(value) if isinstance(leaf, Tensor)]


def _bare(tensor: Tensor) -> Tensor:
    # Private: without it, wrappers of torch.func count as tensors of their own.
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def detached(value: Any) -> Any:
    """Copy nested arguments, and detach all tensors."""
    return pytree.tree_map_only(Tensor, Tensor.detach, value)


def calling_module() -> str:
    """Return the name of the module that called torch, skipping torch's functions."""
    return next((name for name in _modules() if not _is_internal(name)), "")


def _modules() -> Iterator[str]:
    frame = sys._getframe()
    while frame is not None:
        yield frame.f_globals.get("__name__", "")
        frame = frame.f_back  # type: ignore[assignment]


def _is_internal(name: str) -> bool:
    if name.startswith(("torch.distributions", "torch.nn.modules", "torch.nn.utils")):
        return False
    return name.split(".")[0] == "torch" or name in _MODES


def is_library(module: str) -> bool:
    """Return whether a module belongs to distributions or our losses, not to a program."""
    return module.startswith(_LIBRARIES)
