"""Numerics in float32 or better: conversions, noise, softmaxes, densities, straight-through."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_gumbel.distributions._base import plain_eager

F = TypeVar("F", bound=type[torch.autograd.Function])

# Torch's CPU softmax processes one row at a time. For rows up to this length, operations on the
# whole tensor are faster.
_SHORT_ROW = 64


def with_signature(function: F) -> F:
    """Cache the signature of ``forward``, which torch otherwise computes slowly at every call."""
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
    return function


def noise_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for computing noise and densities of ``dtype``: float32 or float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which autocast does not round products of matrices."""
    kind = like.device.type
    on = torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


@with_signature
class _FiniteGradient(torch.autograd.Function):
    """Convert to float32 or better; clamp the gradient to the range of the input's dtype."""

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        wide = noise_dtype(value.dtype)
        return value.view_as(value) if value.dtype == wide else value.to(wide)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        info = torch.finfo(ctx.dtype)
        return grad.clamp(info.min, info.max).to(ctx.dtype)


def widen(parameter: Tensor) -> Tensor:
    """Return a parameter in float32 or better, with a gradient in the range of its dtype."""
    wide = noise_dtype(parameter.dtype)
    if parameter.dtype == wide:
        return parameter
    if not (plain_eager() and parameter.requires_grad):
        return parameter.to(wide)
    return _FiniteGradient.apply(parameter)


@with_signature
class _ExactLog(torch.autograd.Function):
    @staticmethod
    def forward(probs: Tensor) -> Tensor:
        return probs.log()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (probs,) = ctx.saved_tensors
        tiny = torch.finfo(probs.dtype).tiny
        return (grad / probs.clamp(min=tiny)).masked_fill(probs < tiny, 0.0)


def exact_log(probs: Tensor) -> Tensor:
    """Return the logarithm, exactly ``-inf`` with zero gradient at zero."""
    if plain_eager():
        return _ExactLog.apply(probs)
    # Below the smallest normal number the gradient would overflow.
    log_probs = probs.clamp(min=torch.finfo(probs.dtype).tiny).log()
    return log_probs.masked_fill(probs == 0, -math.inf)


def exact_logit(probs: Tensor) -> Tensor:
    """Return the log-odds, exactly infinite with zero gradient at 0 and 1."""
    info = torch.finfo(probs.dtype)
    log_odds = probs.clamp(info.tiny, 1 - info.eps / 2).logit()
    return log_odds.masked_fill(probs == 0, -math.inf).masked_fill(probs == 1, math.inf)


def _half_cell(dtype: torch.dtype) -> float:
    """Return nearly half of the spacing of ``torch.rand``, k * 2^-b with k = 0, 1, ..."""
    # A shift by half centres the lattice and excludes zero. A little less does not round to one.
    return torch.finfo(dtype).eps * (0.25 - 2.0**-20)


def uniform_noise(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None = None
) -> Tensor:
    """Draw uniform noise strictly inside (0, 1), float32 or better."""
    dtype = noise_dtype(dtype)
    return torch.rand(tuple(shape), dtype=dtype, device=device).add_(_half_cell(dtype))


def log_exponential_noise(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None = None
) -> Tensor:
    """Draw the logarithm of Exp(1) noise, a negative standard Gumbel, one pass cheaper."""
    # log1p keeps a fine resolution at small E, which decide the largest category.
    return uniform_noise(shape, dtype, device).neg_().log1p_().neg_().log_()


def gumbel_noise(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None = None
) -> Tensor:
    r"""Draw standard Gumbel noise :math:`G = -\log E`, :math:`E = -\log(1 - U)`.

    The noise, of ``shape``, is float32, or float64 if ``dtype`` is, since half precision of ``U``
    would cut off the upper tail. Every draw is finite.

    Example:
        >>> gumbel_noise((2, 3), torch.bfloat16).dtype
        torch.float32
    """
    return log_exponential_noise(shape, dtype, device).neg_()


def perturb(scores: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Add standard Gumbel noise to scores in float32 or better, in ``shape`` if it is given."""
    shape = scores.shape if shape is None else shape
    return scores - log_exponential_noise(shape, scores.dtype, scores.device)


def logistic_noise(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None = None
) -> Tensor:
    """Draw standard logistic noise, the difference of two Gumbels; finite and symmetric."""
    dtype = noise_dtype(dtype)
    uniform = torch.rand(tuple(shape), dtype=dtype, device=device)
    # 1 - u is exact, so both logarithms have a fine resolution near zero.
    complement = (1 - uniform).sub_(_half_cell(dtype))
    return uniform.add_(_half_cell(dtype)).log_().sub_(complement.log_())


@with_signature
class _ShortSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(scores: Tensor, largest: Tensor) -> Tensor:
        shares = scores.sub(largest).exp_()
        return shares.div_(shares.sum(-1, keepdim=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (shares,) = ctx.saved_tensors
        weighted = grad * shares
        return weighted - shares * weighted.sum(-1, keepdim=True), None


def _is_short(scores: Tensor) -> bool:
    return scores.shape[-1] <= _SHORT_ROW and scores.is_cpu and plain_eager()


def softmax(scores: Tensor, largest: Tensor | None = None) -> Tensor:
    """Softmax over the last dimension; ``largest`` are its maxima, ``(..., 1)``, if known."""
    if not _is_short(scores):
        return scores.softmax(-1)
    if largest is None:
        largest = scores.detach().amax(-1, keepdim=True)
    return _ShortSoftmax.apply(scores, largest.detach())


def log_softmax(scores: Tensor) -> Tensor:
    """Log-softmax over the last dimension."""
    if not _is_short(scores):
        return scores.log_softmax(-1)
    shifted = scores - scores.detach().amax(-1, keepdim=True)
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


def entropy(log_probs: Tensor) -> Tensor:
    """Return the entropy in nats over the last dimension."""
    finite = log_probs.masked_fill(log_probs == -math.inf, 0.0)
    return -(log_probs.exp() * finite).sum(-1)


def log_coordinate(value: Tensor) -> Tensor:
    """Return the logarithm in float32 or better, clamped at the smallest normal number.

    Clamped coordinates have zero gradient, and the gradient of others does not overflow.
    """
    tiny = torch.finfo(value.dtype).tiny
    if plain_eager():
        return _FiniteGradient.apply(value).clamp(min=tiny).log()
    # Compiled and transformed code uses plain operations, without the gradient where it might
    # overflow.
    wide = value.to(noise_dtype(value.dtype))
    exact = wide.clamp(min=tiny).log()
    smooth = wide.clamp(min=tiny if value.dtype == torch.float16 else tiny * 2.0**24).log()
    return smooth + (exact - smooth).detach()


def log_coordinate_pair(value: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``log y`` and ``log(1 - y)``, with ``y`` clamped to normal numbers below 1."""
    info = torch.finfo(value.dtype)
    low, high = info.tiny, 1 - info.eps / 2
    if plain_eager():
        bounded = _FiniteGradient.apply(value).clamp(low, high)
        return bounded.log(), (-bounded).log1p()
    bounded = value.to(noise_dtype(value.dtype)).clamp(low, high)
    return log_coordinate(value.clamp(max=high)), (-bounded).log1p()


@with_signature
class _StraightThrough(torch.autograd.Function):
    """Return the first argument, and pass the gradient to the second."""

    generate_vmap_rule = True

    @staticmethod
    def forward(hard: Tensor, soft: Tensor) -> Tensor:
        return hard.view_as(hard)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def jvp(ctx: Any, hard: Tensor | None, soft: Tensor) -> Tensor:
        return soft.view_as(soft)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    r"""Return the value of ``hard`` with the gradient of ``soft``.

    .. math:: y = D, \qquad \frac{\partial y}{\partial \phi} := \frac{\partial s}{\partial \phi}

    The value is exactly that of ``hard`` (D), which gets no gradient. The incoming gradient passes
    to ``soft`` (s), a tensor of the same shape, unchanged and without a copy.

    References:
        Estimating or Propagating Gradients Through Stochastic Neurons
        (Bengio, Leonard, Courville, 2013), https://arxiv.org/abs/1308.3432

    Example:
        >>> soft = torch.tensor([0.3, 0.7], requires_grad=True)
        >>> hard = straight_through(torch.tensor([0.0, 1.0]), soft)
        >>> hard.tolist(), torch.autograd.grad(hard[0], soft)[0].tolist()
        ([0.0, 1.0], [1.0, 0.0])
    """
    if torch.compiler.is_compiling():
        return hard + (soft - soft.detach())  # plain operations, which the compiler fuses
    return _StraightThrough.apply(hard, soft)
