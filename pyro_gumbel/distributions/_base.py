"""Base class of the distributions of this package: shapes, expansion and checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

# Private: if these names move, this import fails. Nothing public counts the dispatch modes.
from torch.utils._python_dispatch import _get_current_dispatch_mode, _len_torch_dispatch_stack


def plain_eager() -> bool:
    """Return whether this is eager PyTorch, without a compiler or ``torch.func`` transform."""
    # Private: if it moves, the first draw raises AttributeError.
    return (
        not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None
    )


def checkable(*tensors: Tensor) -> bool:
    """Return whether a Python ``if`` may read these values, so that they can be checked."""
    return plain_eager() and not any(
        tensor.is_meta or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
        for tensor in tensors
    )


def at_hand(tensor: Tensor) -> bool:
    """Return whether Python may read a tensor's values without synchronising or recording."""
    return (
        plain_eager()
        and tensor.is_cpu
        and _len_torch_dispatch_stack() == 0
        and not torch.jit.is_tracing()
    )


def may_branch(condition: Tensor) -> bool:
    """Return whether Python may branch on a tensor: it is at hand, or the branch is recorded."""
    mode = _get_current_dispatch_mode()
    return at_hand(condition) or (plain_eager() and getattr(mode, "records_branches", False))


def broadcast_shapes(*shapes: torch.Size) -> torch.Size:
    """Broadcast shapes, with a fast path for equal and empty shapes."""
    widest = max(shapes, key=len)
    if all(shape == widest or len(shape) == 0 for shape in shapes):
        return widest
    return torch.broadcast_shapes(*shapes)


def joint_shape(*shapes: torch.Size) -> torch.Size | None:
    """Broadcast shapes, or return ``None`` if they do not broadcast."""
    try:
        return broadcast_shapes(*shapes)
    except RuntimeError:
        return None


def broadcasts_to(shape: torch.Size, target: torch.Size) -> bool:
    """Return whether tensors of a shape can be expanded to another."""
    return joint_shape(shape, target) == target


def as_floating(value: Any) -> Tensor:
    """Convert numbers, sequences and integer tensors to a floating-point tensor."""
    tensor = torch.as_tensor(value)
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())


def tensor_of(fn: Any) -> Tensor | None:
    """Return a floating-point tensor among a distribution's parameters, if it has one."""
    for value in getattr(fn, "__dict__", {}).values():
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
        found = tensor_of(value) if isinstance(value, Distribution) else None
        if found is not None:
            return found
    return None


def check_values(name: str, value: Tensor, valid: Tensor, expected: str, hint: str = "") -> None:
    """Raise ``ValueError`` with the argument's name and what it got, unless all are ``valid``."""
    if valid.all():
        return
    if value.isnan().any():
        got = "found NaN"
    else:
        got = f"got values from {value.min().item():g} to {value.max().item():g}"
    shape = tuple(value.shape)
    raise ValueError(f"{name} must {expected}; {got} in a tensor of shape {shape}.{hint}")


class BaseDistribution(TorchDistribution):
    """A distribution that stores its parameters as given and broadcasts them when used.

    Derived tensors are computed once, in the shape of the parameters without batch expansion.
    """

    def _init_shapes(
        self, batch_shape: Sequence[int], event_shape: Sequence[int], validate_args: bool | None
    ) -> None:
        # The subclass checks the constraints of its arguments, in fewer passes.
        Distribution.__init__(
            self, torch.Size(batch_shape), torch.Size(event_shape), validate_args=False
        )
        if validate_args is None:
            # Checks are cheap here, so that only a global switch turns them off.
            validate_args = Distribution._validate_args
        self._validate_args = validate_args
        self._derived: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Omit derived tensors from pickles and deep copies."""
        return {**self.__dict__, "_derived": {}}

    def _derive(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """Return a tensor computed from the parameters, with their gradient, and keep it."""
        derived = self._derived.get(name)
        if derived is None:
            with torch.enable_grad():  # the first use may be a sample() without gradient
                derived = compute()
            # Later uses may be outside of a transform, a compiled program or inference mode.
            if plain_eager() and not torch.is_inference_mode_enabled():
                self._derived[name] = derived
        return derived

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Self:
        """Broadcast to ``batch_shape`` without copying or recomputing a tensor."""
        batch_shape = torch.Size(batch_shape)
        if not broadcasts_to(self.batch_shape, batch_shape):
            raise ValueError(
                f"{type(self).__name__}: batch_shape {tuple(self.batch_shape)} does not expand to "
                f"{tuple(batch_shape)}."
            )
        new = type(self).__new__(type(self)) if _instance is None else _instance
        new.__dict__.update(self.__dict__)  # including has_rsample of the instance
        new._batch_shape = batch_shape  # torch's expand methods set it too
        return new

    @property
    def _accepted(self) -> constraints.Constraint:
        """The values for which ``log_prob`` is defined."""
        return self.support

    def _validate_sample(self, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(
                f"The value of {type(self).__name__}.log_prob must be a tensor; got "
                f"{type(value).__name__}. Write torch.tensor(value)."
            )
        expected = self.batch_shape + self.event_shape
        split = value.dim() - len(self.event_shape)
        if split < 0 or value.shape[split:] != self.event_shape:
            raise ValueError(
                f"The value of {type(self).__name__}.log_prob must have event_shape "
                f"{tuple(self.event_shape)} on the right; got shape {tuple(value.shape)}."
            )
        if joint_shape(value.shape, expected) is None:
            raise ValueError(
                f"The value of {type(self).__name__}.log_prob must broadcast against "
                f"{tuple(expected)}; got shape {tuple(value.shape)}."
            )
        if checkable(value) and not self._accepted.check(value).all():
            raise ValueError(
                f"The value of log_prob of {self!r} must lie within {self._accepted!r}; got a "
                f"value of shape {tuple(value.shape)}:\n{value}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of parameters and samples."""
        raise NotImplementedError

    def _score(self, result: Tensor, value: Tensor) -> Tensor:
        """Cast and broadcast a result of ``log_prob`` or ``cdf`` of ``value``."""
        shape = broadcast_shapes(result.shape, self.batch_shape)
        return result.to(torch.promote_types(self.dtype, value.dtype)).expand(shape)

    def _statistic(self, result: Tensor) -> Tensor:
        """Cast and broadcast a statistic to the batch shape."""
        return result.to(self.dtype).expand(self.batch_shape)

    @property
    def mean(self) -> Tensor:
        return self._closed_form("mean")

    @property
    def mode(self) -> Tensor:
        return self._closed_form("mode")

    @property
    def variance(self) -> Tensor:
        return self._closed_form("variance")

    def entropy(self) -> Tensor:
        return self._closed_form("entropy")

    def _closed_form(self, name: str) -> Tensor:
        raise NotImplementedError(
            f"{type(self).__name__}.{name} has no closed form; estimate it from draws of rsample."
        )
