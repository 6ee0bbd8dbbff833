"""Kullback-Leibler divergences in closed form."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, OneHotCategorical, register_kl
from torch.distributions import Gumbel as TorchGumbel
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from pyro_gumbel.distributions._base import broadcast_shapes, plain_eager
from pyro_gumbel.distributions._categorical import CategoricalDistribution
from pyro_gumbel.distributions._noise import noise_dtype
from pyro_gumbel.distributions._parameters import CategoricalParameters
from pyro_gumbel.distributions.gumbel import EULER_GAMMA, Gumbel
from pyro_gumbel.distributions.one_hot import OneHot
from pyro_gumbel.distributions.relaxed import RelaxedOneHot
from pyro_gumbel.distributions.relaxed_bernoulli import RelaxedBernoulli
from pyro_gumbel.distributions.truncated_gumbel import TruncatedGumbel

__all__: list[str] = []


def kl_from_log_probs(log_p: Tensor, log_q: Tensor) -> Tensor:
    r""":math:`\sum_c p_c (\log p_c - \log q_c)` over the last dimension.

    Terms with :math:`p_c = 0` are zero, whatever :math:`q_c`; a term with only
    :math:`q_c = 0` is infinite.
    """
    if plain_eager():
        return _Divergence.apply(log_p, log_q)
    p, difference = _probs_and_difference(log_p, log_q)
    return (p * difference).sum(-1)


def _probs_and_difference(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    absent = p == 0  # also where it underflows: 0 * inf would be nan
    return p, log_p.masked_fill(absent, 0.0) - log_q.masked_fill(absent, 0.0)


class _Divergence(torch.autograd.Function):
    """The same in two thirds of the time: what the way back needs is there already."""

    @staticmethod
    def forward(ctx: Any, log_p: Tensor, log_q: Tensor) -> Tensor:
        p, difference = log_p.exp(), log_p - log_q
        divergence = (p * difference).sum(-1)
        # Zeros need care where 0 * inf is nan. To ask is cheaper than to take it always, where no
        # device has to be waited for and nothing is being recorded.
        if not _is_at_hand(divergence) or divergence.sum().isnan():
            difference.masked_fill_(p == 0, 0.0)
            divergence = (p * difference).sum(-1)
        ctx.save_for_backward(log_p, log_q, p, difference)
        return divergence

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        log_p, log_q, p, difference = ctx.saved_tensors
        if torch.is_grad_enabled():  # it will be differentiated once more
            p, difference = _probs_and_difference(log_p, log_q)
        weight = grad.unsqueeze(-1) * p
        for_p = for_q = None
        if ctx.needs_input_grad[0]:
            for_p = torch.addcmul(weight, weight, difference)
        if ctx.needs_input_grad[1]:
            for_q = -weight
        return for_p, for_q


def _is_at_hand(tensor: Tensor) -> bool:
    """Whether a tensor's values can be looked at, now and for good, without waiting."""
    return tensor.is_cpu and _len_torch_dispatch_stack() == 0 and not torch.jit.is_tracing()


def _gives_probs(distribution: Any) -> bool:
    """Whether torch's (one-hot) categorical or Bernoulli was given ``probs``."""
    return distribution._param is distribution.__dict__.get("probs")


def one_hot_log_probs(distribution: Any) -> Tensor:
    """Log-probabilities of a one-hot distribution, ours, Pyro's or torch's, exact at zeros."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution._parameters.log_probs
    return categorical_log_probs(distribution._categorical)


def categorical_log_probs(categorical: Any) -> Tensor:
    """Log-probabilities of torch's distribution over indices, exact at zeros."""
    if _gives_probs(categorical):  # torch's own logits of these would hide the zeros
        return CategoricalParameters(categorical.probs, None).log_probs
    logits = categorical.logits
    if "probs" in categorical.__dict__:
        # After expand torch cannot tell which was given. Logits of a probability that underflows
        # are far lower than those it gives to a zero.
        lowest = math.log(torch.finfo(logits.dtype).tiny)
        zero = (categorical.probs == 0) & (logits > lowest)
        logits = logits.masked_fill(zero, -math.inf)
    if logits.dtype == noise_dtype(logits.dtype):
        return logits  # torch has normalised them
    return CategoricalParameters(None, logits).log_probs


def bernoulli_log_masses(distribution: Any) -> Tensor:
    """Log-probabilities of 0 and 1, stacked, of a Bernoulli; exact at zeros."""
    if isinstance(distribution, RelaxedBernoulli):
        return distribution._log_masses()
    if _gives_probs(distribution):
        return RelaxedBernoulli(1.0, distribution.probs, validate_args=False)._log_masses()
    logits = distribution.logits.to(noise_dtype(distribution.logits.dtype))
    return torch.stack([logsigmoid(-logits), logsigmoid(logits)], -1)


def _check_discrete(*distributions: Distribution) -> None:
    for distribution in distributions:
        if getattr(distribution, "straight_through", True):
            continue
        name = type(distribution).__name__
        raise NotImplementedError(
            f"The KL divergence of the relaxed density {name} has no closed form; use "
            f"{name}(..., straight_through=True) or OneHot for the discrete law, or estimate it "
            "from log_prob."
        )


def _finish(p: Distribution, q: Distribution, divergence: Tensor) -> Tensor:
    dtypes = [_dtype(p), _dtype(q)]
    shape = broadcast_shapes(p.batch_shape, q.batch_shape)
    return divergence.to(torch.promote_types(*dtypes)).expand(shape)


def _dtype(distribution: Distribution) -> torch.dtype:
    own = getattr(distribution, "dtype", None)
    return own if own is not None else distribution.mean.dtype


def _kl_one_hot(p: Distribution, q: Distribution) -> Tensor:
    _check_discrete(p, q)
    if p.event_shape != q.event_shape:
        raise ValueError(
            f"KL divergence between {p!r} and {q!r}: the numbers of categories differ, "
            f"{p.event_shape[0]} and {q.event_shape[0]}."
        )
    return _finish(p, q, kl_from_log_probs(one_hot_log_probs(p), one_hot_log_probs(q)))


def _kl_bernoulli(p: Distribution, q: Distribution) -> Tensor:
    _check_discrete(p, q)
    return _finish(p, q, kl_from_log_probs(bernoulli_log_masses(p), bernoulli_log_masses(q)))


def _kl_gumbel(p: Any, q: Any) -> Tensor:
    dtype = noise_dtype(torch.promote_types(_dtype(p), _dtype(q)))
    p_loc, p_scale, q_loc, q_scale = (
        tensor.to(dtype) for tensor in (p.loc, p.scale, q.loc, q.scale)
    )
    ratio = p_scale / q_scale
    shift = (p_loc - q_loc) / q_scale
    divergence = (
        EULER_GAMMA * (ratio - 1) - ratio.log() + shift + ((ratio + 1).lgamma() - shift).exp() - 1
    )
    return _finish(p, q, divergence)


def _kl_truncated(p: Distribution, q: Distribution) -> Tensor:
    raise NotImplementedError(
        "The KL divergence of TruncatedGumbel has no closed form; estimate it from log_prob."
    )


def _register() -> None:
    one_hot = (OneHot, RelaxedOneHot, OneHotCategorical)
    bernoulli = (RelaxedBernoulli, Bernoulli)
    gumbel = (Gumbel, TorchGumbel)
    for family, function in (
        (one_hot, _kl_one_hot),
        (bernoulli, _kl_bernoulli),
        (gumbel, _kl_gumbel),
    ):
        for p in family:
            for q in family:
                if not p.__module__.startswith("torch.") or not q.__module__.startswith("torch."):
                    register_kl(p, q)(function)
    for other in gumbel + (TruncatedGumbel,):
        register_kl(TruncatedGumbel, other)(_kl_truncated)
        register_kl(other, TruncatedGumbel)(_kl_truncated)


_register()
