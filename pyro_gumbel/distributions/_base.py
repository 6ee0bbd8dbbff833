"""Shapes, expansion and checks that all distributions of this package share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.utils._python_dispatch import _len_torch_dispatch_stack


def plain_eager() -> bool:
    """Return whether plain PyTorch runs, not a compiler or a ``torch.func`` transform."""
    return (
        not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None
    )


def checkable(*tensors: Tensor) -> bool:
    """Return whether a Python ``if`` may look at these values.

    It may not inside ``torch.func`` transforms, while a program is being compiled or captured in a
    CUDA graph, and for tensors without data. Checks of values are skipped there, checks of shapes
    are not.
    """
    if not plain_eager():
        return False
    for tensor in tensors:
        if tensor.is_meta or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()):
            return False
    return True


def at_hand(tensor: Tensor) -> bool:
    """Return whether a tensor's values can be looked at, now and for good, without waiting."""
    return (
        plain_eager()
        and tensor.is_cpu
        and _len_torch_dispatch_stack() == 0
        and not torch.jit.is_tracing()
    )


def may_cache() -> bool:
    """Return whether a derived tensor may be kept for later calls.

    Not if it belongs to a ``torch.func`` transform, a compiled program or inference mode, which
    later calls may be outside of.
    """
    return plain_eager() and not torch.is_inference_mode_enabled()


def broadcast_shapes(*shapes: torch.Size) -> torch.Size:
    """Broadcast shapes; at once where nothing is to be done."""
    widest = max(shapes, key=len)
    if all(shape == widest or len(shape) == 0 for shape in shapes):
        return widest
    return torch.broadcast_shapes(*shapes)


def as_floating(value: Any) -> Tensor:
    """Turn numbers, sequences and integer tensors into a floating-point tensor."""
    tensor = torch.as_tensor(value)
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())


def _expands(shape: torch.Size, to: torch.Size) -> bool:
    if len(shape) > len(to):
        return False
    aligned = zip(reversed(shape), reversed(to), strict=False)
    return all(old in (1, new) for old, new in aligned)


class BaseDistribution(TorchDistribution):
    """A distribution whose parameters are kept as given and broadcast only when used."""

    def _init_shapes(
        self, batch_shape: Sequence[int], event_shape: Sequence[int], validate_args: bool | None
    ) -> None:
        # The constraints on the arguments are checked by the subclass, in fewer passes.
        Distribution.__init__(
            self, torch.Size(batch_shape), torch.Size(event_shape), validate_args=False
        )
        if validate_args is None:
            # Checks of distributions here cost little, so that they are left out only where
            # nobody wants any.
            validate_args = Distribution._validate_args
        self._validate_args = validate_args

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Self:
        """Broadcast to ``batch_shape`` without touching, copying or recomputing a tensor."""
        batch_shape = torch.Size(batch_shape)
        if not _expands(self.batch_shape, batch_shape):
            raise ValueError(
                f"{type(self).__name__}: batch_shape {tuple(self.batch_shape)} does not expand to "
                f"{tuple(batch_shape)}."
            )
        new = type(self).__new__(type(self)) if _instance is None else _instance
        new.__dict__.update(self.__dict__)  # also a has_rsample that was set on the instance
        new._batch_shape = batch_shape
        return new

    @property
    def _accepted(self) -> constraints.Constraint:
        """Values that ``log_prob`` is defined for."""
        return self.support

    def _validate_sample(self, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(
                f"The value scored by {type(self).__name__} must be a tensor; got "
                f"{type(value).__name__}. Write torch.tensor(value)."
            )
        expected = self.batch_shape + self.event_shape
        split = value.dim() - len(self.event_shape)
        if split < 0 or value.shape[split:] != self.event_shape:
            raise ValueError(
                f"The value scored by {type(self).__name__} must have event_shape "
                f"{tuple(self.event_shape)} on the right, but its shape is {tuple(value.shape)}."
            )
        try:
            broadcast_shapes(value.shape, expected)
        except RuntimeError:
            raise ValueError(
                f"The value scored by {type(self).__name__} must broadcast against "
                f"{tuple(expected)}, but its shape is {tuple(value.shape)}."
            ) from None
        if checkable(value) and not self._accepted.check(value).all():
            raise ValueError(
                f"The value scored by {self!r} must lie within {self._accepted!r}, but it does "
                f"not; the value, of shape {tuple(value.shape)}, is\n{value}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of parameters and samples."""
        raise NotImplementedError

    def _score(self, result: Tensor, value: Tensor) -> Tensor:
        """Cast and broadcast what ``log_prob`` (or ``cdf``) of ``value`` returns."""
        shape = broadcast_shapes(result.shape, self.batch_shape)
        return result.to(torch.promote_types(self.dtype, value.dtype)).expand(shape)

    def _statistic(self, result: Tensor) -> Tensor:
        """Cast and broadcast a number for each element of the batch."""
        return result.to(self.dtype).expand(self.batch_shape)

    def _not_closed_form(self, name: str) -> NotImplementedError:
        return NotImplementedError(
            f"{type(self).__name__}.{name} has no closed form; estimate it from draws of rsample."
        )
