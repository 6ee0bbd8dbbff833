"""The one-hot categorical distribution, with exact draws and a multilinear log-mass."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_gumbel.distributions._base import plain_eager
from pyro_gumbel.distributions._categorical import CategoricalDistribution
from pyro_gumbel.distributions._constraints import relaxed_simplex
from pyro_gumbel.distributions._numerics import (
    entropy,
    noise_dtype,
    perturb,
    with_signature,
)

__all__ = ["OneHot", "draw_one_hot", "multilinear_log_prob"]

_FUSED_FROM = 1 << 16  # with fewer logits, launches dominate the time of a draw on a GPU

# Replaces log 0 in gradients: below log-masses of practice, and finite in float16.
_LOG_ZERO_GRADIENT = -32768.0


def draw_one_hot(logits: Tensor, sample_shape: Sequence[int] = ()) -> Tensor:
    r"""Draw exact one-hot values of ``Categorical(logits)``, without gradient.

    .. math:: P(D = \mathrm{onehot}(c)) = \mathrm{softmax}(\phi)_c

    ``logits`` are log-probabilities up to a constant, ``batch_shape + (C,)``; the result is
    ``sample_shape + batch_shape + (C,)`` in their dtype. On a CPU a draw compares one uniform
    number per row, in float64, with the cumulative probabilities. On other devices it is the arg
    max of logits plus Gumbel noise, in float32 or better; on a GPU with Triton this is one kernel.
    A category with logit :math:`-\infty` is never drawn.

    References:
        The Concrete Distribution (Maddison, Mnih, Teh, 2017), https://arxiv.org/abs/1611.00712

    Example:
        >>> draw_one_hot(torch.tensor([0.0, -math.inf]))
        tensor([1., 0.])
    """
    if logits.is_cuda and logits.numel() >= _FUSED_FROM and plain_eager():
        draw = _fused_draw(logits.detach(), torch.Size(sample_shape))
        if draw is not None:
            return draw
    phi = logits.detach().to(noise_dtype(logits.dtype))
    # A common offset of all categories would increase rounding errors.
    phi = phi - phi.amax(-1, keepdim=True)
    if phi.is_cpu and plain_eager():
        index = draw_index(phi.exp_(), torch.Size(sample_shape))
        shape = index.shape[:-1] + logits.shape[-1:]
        return torch.zeros(shape, dtype=logits.dtype).scatter_(-1, index, 1)
    return one_hot_argmax(perturb(phi, (*sample_shape, *phi.shape)), logits.dtype)


def _fused_draw(logits: Tensor, sample_shape: torch.Size) -> Tensor | None:
    """Draw by the Triton kernel, if it supports these logits."""
    kernel = None if logits.dtype == torch.float64 else _fused_kernel(logits.device)
    return None if kernel is None else kernel(logits, sample_shape)


@functools.cache
def _fused_kernel(device: torch.device) -> Callable[[Tensor, torch.Size], Tensor | None] | None:
    """Return the kernel if Triton is installed and can compile for the device."""
    try:
        from pyro_gumbel.distributions import _triton
    except ImportError:
        return None
    try:
        _triton.try_out(device)
    except Exception as error:  # of any type, for a missing compiler or driver
        warnings.warn(
            f"Triton is installed and cannot compile for {device}, so one-hot draws are several "
            f"times slower: {type(error).__name__}: {error}",
            stacklevel=2,
        )
        return None
    return _triton.one_hot_draw


def draw_index(weights: Tensor, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
    """Draw indices, ``sample_shape + batch_shape + (1,)``, in proportion to ``weights``."""
    batch_shape, num_categories = weights.shape[:-1], weights.shape[-1]
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    uniform = torch.rand((*batch_shape, sample_shape.numel()), dtype=torch.float64)
    # The first category whose cumulative weight exceeds the number. Its weight is not zero, since
    # then its cumulative weight would equal that of the category before it.
    index = torch.searchsorted(cumulative, uniform.mul_(cumulative[..., -1:]), right=True)
    index.clamp_(max=num_categories - 1)  # NaN weights give an index past the end
    return index.movedim(-1, 0).reshape(*sample_shape, *batch_shape, 1)


def one_hot_argmax(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Return one-hot values of the largest score in each row, without gradient."""
    index = scores.detach().max(-1, keepdim=True).indices  # on CPU `max` is faster than `argmax`
    return one_at(index, scores.shape[-1], dtype)


def one_at(index: Tensor, num_categories: int, dtype: torch.dtype) -> Tensor:
    """Return one-hot values ``(..., num_categories)`` of ``index``, ``(..., 1)``."""
    zero = torch.zeros((), dtype=dtype, device=index.device)
    return zero.expand(*index.shape[:-1], num_categories).scatter(-1, index, 1)


def multilinear_log_prob(value: Tensor, log_probs: Tensor) -> Tensor:
    r"""Return the multilinear extension of a one-hot log-mass.

    .. math:: \log p(z) = \sum_c z_c \log p_c, \qquad 0 \cdot (-\infty) = 0

    ``value`` is one-hot or relaxed and ``log_probs`` are normalised, both ``(..., C)``; the result
    has the broadcast shape without the last dimension and is differentiable in both. It is
    :math:`-\infty` if ``value`` has weight on a category of probability zero; the gradient in that
    coordinate is large, negative and finite.

    Example:
        >>> multilinear_log_prob(torch.tensor([1.0, 0.0]), torch.tensor([0.0, -math.inf]))
        tensor(0.)
    """
    dtype = torch.promote_types(value.dtype, log_probs.dtype)
    wide = noise_dtype(dtype)
    value, log_probs = torch.broadcast_tensors(value.to(wide), log_probs.to(wide))
    if plain_eager():
        return _Multilinear.apply(value, log_probs).to(dtype)
    finite = log_probs.masked_fill(log_probs == -math.inf, _LOG_ZERO_GRADIENT)
    impossible = (value.detach() * (log_probs == -math.inf)).sum(-1) != 0
    score = (value * finite).sum(-1)
    # Add -inf instead of filling it in, to keep the gradient of impossible rows.
    return (score + torch.zeros_like(score).masked_fill(impossible, -math.inf)).to(dtype)


@with_signature
class _Multilinear(torch.autograd.Function):
    """The multilinear extension in fewer passes, which finds impossible rows by their sum."""

    @staticmethod
    def forward(value: Tensor, log_probs: Tensor) -> Tensor:
        # 0 * lowest = 0, and weight * lowest is below all scores.
        info = torch.finfo(log_probs.dtype)
        score = (value * log_probs.clamp(min=info.min)).sum(-1)
        return score.masked_fill_(score < info.min * 1e-13, -math.inf)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        value, log_probs = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        for_value = for_log_probs = None
        if ctx.needs_input_grad[0]:
            finite = log_probs.nan_to_num(nan=math.nan, posinf=math.inf, neginf=_LOG_ZERO_GRADIENT)
            for_value = grad * finite
        if ctx.needs_input_grad[1]:
            for_log_probs = grad * value
        return for_value, for_log_probs


class OneHot(CategoricalDistribution, torch.distributions.OneHotCategorical):
    r"""One-hot categorical whose log-mass is differentiable in the value.

    .. math:: \log p(z) = \sum_c z_c \log p_c

    It is :class:`~pyro.distributions.OneHotCategorical`, whose ``log_prob`` has no gradient in
    ``z``, with a log-mass that is also defined in the interior of the simplex. A category of
    probability zero is never drawn, and its log-mass is ``-inf``.

    Shapes: ``probs`` or ``logits`` are ``batch_shape + (C,)``; ``event_shape`` is ``(C,)``.

    Args:
        probs: Probabilities, non-negative, normalised here.
        logits: Log-probabilities up to a constant; exactly one of the two is given.
        validate_args: Whether to check arguments; by default Pyro's setting.

    Raises:
        ValueError: If not exactly one of ``probs`` and ``logits`` is given, or it contains NaN.

    Example:
        >>> d = OneHot(probs=torch.tensor([0.2, 0.3, 0.5]))
        >>> z = torch.tensor([0.0, 1.0, 0.0], requires_grad=True)
        >>> torch.autograd.grad(d.log_prob(z), z)[0].exp()
        tensor([0.2000, 0.3000, 0.5000])
    """

    arg_constraints = {"probs": constraints.simplex, "logits": constraints.real_vector}
    support = constraints.one_hot
    has_rsample = False
    has_enumerate_support = True

    def __init__(
        self, probs: Any = None, logits: Any = None, *, validate_args: bool | None = None
    ) -> None:
        self._init_parameter(probs, logits, validate_args)

    @classmethod
    def of(cls, other: CategoricalDistribution) -> OneHot:
        """Return the one-hot distribution with the parameters of ``other``, without a copy."""
        new = cls.__new__(cls)
        new._init_shapes(other.batch_shape, other.event_shape, other._validate_args)
        new._name, new._given, new._derived = other._name, other._given, other._derived
        return new

    @property
    def _accepted(self) -> constraints.Constraint:
        return relaxed_simplex

    @property
    def _categorical(self) -> torch.distributions.Categorical:  # type: ignore[override]
        """The distribution of the index, which torch's code for one-hot vectors uses."""
        given = {self._name: getattr(self, self._name)}
        return torch.distributions.Categorical(**given, validate_args=False)

    @property
    def _param(self) -> Tensor:
        """The parameter whose dtype and device torch's ``enumerate_support`` uses."""
        return self._given

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw one-hot values, ``sample_shape + batch_shape + (C,)``."""
        scores = self._scores.expand(self.param_shape)
        return draw_one_hot(scores, sample_shape).to(self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self._score(multilinear_log_prob(value, self._log_probs), value)

    @property
    def mean(self) -> Tensor:
        """The probabilities."""
        return self.probs

    @property
    def variance(self) -> Tensor:
        """``p (1 - p)`` of every coordinate."""
        probs = self._log_probs.exp()
        return self._broadcast(probs * (1 - probs))

    @property
    def mode(self) -> Tensor:
        """One-hot vector of the most probable category."""
        return self._broadcast(one_hot_argmax(self._scores, self.dtype))

    def entropy(self) -> Tensor:
        return self._statistic(entropy(self._log_probs))
