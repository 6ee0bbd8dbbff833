"""Supports whose checks tolerate the rounding errors of samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to, transforms
from torch.distributions.transforms import Transform


def _rounding(value: Tensor) -> float:
    """Return the tolerance of a sum of ``C`` rounded numbers that should be one."""
    num_categories = value.shape[-1]
    info = torch.finfo(value.dtype)
    accumulate = torch.finfo(torch.float64 if value.dtype == torch.float64 else torch.float32).eps
    subnormal = info.tiny * info.eps  # spacing of subnormal numbers
    return 2 * info.eps + 16 * accumulate * math.sqrt(num_categories) + subnormal * num_categories


class _RelaxedSimplex(type(constraints.simplex)):  # type: ignore[misc]
    """The unit simplex, with a tolerance for the dtype and the number of categories."""

    def check(self, value: Tensor) -> Tensor:
        """Check that entries are non-negative and sum to one, up to rounding."""
        dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
        excess = (value.sum(-1, dtype=dtype) - 1).abs()
        return (value.amin(-1) >= 0) & (excess <= max(1e-6, _rounding(value)))

    def __eq__(self, other: object) -> bool:
        """Compare as the same set as torch's simplex."""
        return isinstance(other, type(constraints.simplex))

    def __hash__(self) -> int:
        return hash(type(constraints.simplex))


class _LogSimplex(constraints.Constraint):
    """Vectors of log-probabilities, whose exponentials sum to one."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        """Check that ``logsumexp`` is zero up to rounding of the logarithms."""
        wide = value.to(torch.float64 if value.dtype == torch.float64 else torch.float32)
        # Rounding a logarithm of size log C by eps log C changes its exponential by that factor.
        tolerance = max(1e-6, _rounding(value) * (1 + math.log(value.shape[-1])))
        return wide.logsumexp(-1).abs() <= tolerance


class _LessThanEq(constraints.less_than):
    """Numbers up to and including an upper bound."""

    def check(self, value: Tensor) -> Tensor:
        """Check ``value <= upper_bound``."""
        return value <= self.upper_bound


less_than_eq = _LessThanEq
relaxed_simplex = _RelaxedSimplex()
log_simplex = _LogSimplex()


class LogSoftmaxTransform(Transform):
    """Append a zero and take the log-softmax.

    Densities on the log-simplex are with respect to Lebesgue measure before this map.
    """

    domain = constraints.real_vector
    codomain = log_simplex
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LogSoftmaxTransform)

    def __hash__(self) -> int:
        return hash(LogSoftmaxTransform)

    def _call(self, x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 1)).log_softmax(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        return y[..., :-1] - y[..., -1:]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return zero, since the map preserves volume."""
        return torch.zeros_like(y[..., 0])

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """Add the dependent coordinate."""
        return torch.Size((*shape[:-1], shape[-1] + 1))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """Remove the dependent coordinate."""
        return torch.Size((*shape[:-1], shape[-1] - 1))


# The registries look up the exact type of a constraint.
biject_to.register(_RelaxedSimplex, lambda constraint: transforms.StickBreakingTransform())
transform_to.register(_RelaxedSimplex, lambda constraint: transforms.SoftmaxTransform())
biject_to.register(_LogSimplex, lambda constraint: LogSoftmaxTransform())
transform_to.register(_LogSimplex, lambda constraint: LogSoftmaxTransform())
biject_to.register(_LessThanEq, lambda c: biject_to(constraints.less_than(c.upper_bound)))
transform_to.register(_LessThanEq, lambda c: transform_to(constraints.less_than(c.upper_bound)))
