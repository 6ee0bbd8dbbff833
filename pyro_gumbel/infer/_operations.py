"""Classification of torch operations by their use of the values of their arguments."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from pyro_gumbel.infer._undo import leaves, written_arguments

__all__ = ["Operation", "calling_module", "detached", "is_library", "tensors", "version"]


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
_SHAPED_BY_FIRST = frozenset(["argwhere", "nonzero", "unique", "unique_consecutive"])
_SHAPED_BY_SECOND = frozenset(["masked_select", "repeat_interleave"])
_SELECTIONS = frozenset(["getitem", "narrow", "tensor_split"])
_CONVERSIONS = frozenset(["__bool__", "__complex__", "__float__", "__index__", "__int__"])
_CONSTRUCTORS = frozenset(["as_tensor", "asarray", "tensor"])
# Their integers count elements, and depend on the second argument alone.
_PACKINGS = frozenset(["pack_padded_sequence", "pad_packed_sequence"])
# Code of distributions, and of our losses' checks. The number that a loss returns is not a check.
_LIBRARIES = (
    "pyro.distributions",
    "pyro.poutine.scale_messenger",
    "pyro.util",
    "pyro_gumbel.distributions",
    "pyro_gumbel.estimators",
    "pyro_gumbel.infer._",
    "pyro_gumbel.infer._checks",
    "pyro_gumbel.infer.learnable",
    "torch.distributions",
)
_MODES = (__name__, "pyro_gumbel.infer._dependence", "pyro_gumbel.infer._undo")


class Operation:
    """A call of a torch function.

    Attributes:
        name: The function's name without leading and trailing underscores, the same for the
            in-place form; the name of an attribute is preceded by a point.
        inputs: The tensors among the arguments.
        sources: The inputs whose values are used, not only their shape, dtype or device.
        below_autograd: Whether this is an operator of the dispatcher, as TorchScript calls them:
            its result has no gradient yet.
    """

    def __init__(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.name = _name(func)
        self.below_autograd = isinstance(func, OpOverload)
        self.inputs = tensors((args, kwargs))
        self.sources = tensors(self._used())
        self._versions = [] if self.below_autograd else [version(x) for x in self.inputs]

    def _used(self) -> Any:
        if self.name in _VALIDITY:
            return ()
        if self.name in _OF_FIRST:
            return self.args[:1]
        if self.name.endswith("_like") or self.name.startswith("new_"):
            return self.args[1:], self.kwargs
        return self.args, self.kwargs

    def sources_of(self, result: Tensor) -> list[Tensor]:
        """List the inputs that one of the results may depend on."""
        if self.name in _PACKINGS and not result.is_floating_point():
            return tensors(self.args[1:])
        return self.sources

    @property
    def jumps(self) -> bool:
        """Whether the function is discontinuous, even if it has a gradient."""
        if self.name in _DIVISIONS:
            return self.kwargs.get("rounding_mode") is not None
        return self.name in _STEPS or self.name in _COMPARISONS

    @property
    def compares(self) -> bool:
        """Whether the function compares, or combines comparisons."""
        return self.name in _COMPARISONS

    @property
    def selectors(self) -> list[Tensor]:
        """The arguments whose values choose the part of the first that the result is a view of."""
        return tensors(self.args[1:]) if self.name in _SELECTIONS else []

    @property
    def tangents(self) -> list[Tensor]:
        """The tangents that forward-mode differentiation attaches to the result."""
        return tensors((self.args[1:], self.kwargs)) if self.name == "make_dual" else []

    @property
    def converts(self) -> bool:
        """Whether it makes numbers of tensors, of which torch warns if they have a gradient."""
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
        """List, after the call, the inputs that it wrote to."""
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


def version(tensor: Tensor) -> int:
    """Return how often a tensor was written to, as far as torch counts it."""
    return 0 if tensor.is_inference() else tensor._version


def tensors(value: Any) -> list[Tensor]:
    """List the tensors in a nest of arguments or results, without ``torch.func`` wrappers."""
    return [_bare(leaf) for leaf in leaves(value) if isinstance(leaf, Tensor)]


def _bare(tensor: Tensor) -> Tensor:
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def detached(value: Any) -> Any:
    """Copy a nest of arguments, with all tensors detached."""
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
