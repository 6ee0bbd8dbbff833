"""Kullback-Leibler divergences in closed form."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Distribution,
    HalfNormal,
    OneHotCategorical,
    TransformedDistribution,
    kl_divergence,
    register_kl,
)
from torch.distributions import Gumbel as TorchGumbel
from torch.distributions.kl import _KL_REGISTRY

from pyro_gumbel.distributions._base import at_hand, broadcast_shapes, plain_eager
from pyro_gumbel.distributions._categorical import bit_log_masses, log_probs
from pyro_gumbel.distributions._law import law_of, nearest_library
from pyro_gumbel.distributions._numerics import noise_dtype
from pyro_gumbel.distributions.families import unwrap
from pyro_gumbel.distributions.gumbel import Gumbel, TruncatedGumbel
from pyro_gumbel.distributions.one_hot import OneHot
from pyro_gumbel.distributions.relaxed import RelaxedOneHot
from pyro_gumbel.distributions.relaxed_bernoulli import RelaxedBernoulli

__all__: list[str] = []  # importing the module registers the divergences


def kl_from_log_probs(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the divergence over the last dimension; infinite only if q is 0 where p is not."""
    if plain_eager():
        return _Divergence.apply(log_p, log_q)
    p, difference = _probs_and_difference(log_p, log_q)
    return (p * difference).sum(-1)


def _probs_and_difference(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    absent = p == 0  # including underflow, since 0 * inf would be nan
    return p, log_p.masked_fill(absent, 0.0) - log_q.masked_fill(absent, 0.0)


class _Divergence(torch.autograd.Function):
    """The divergence with a faster backward pass, which reuses tensors of the forward pass."""

    @staticmethod
    def forward(ctx: Any, log_p: Tensor, log_q: Tensor) -> Tensor:
        p, difference = log_p.exp(), log_p - log_q
        divergence = (p * difference).sum(-1)
        # Mask zero probabilities, since 0 * inf is nan. If reading the result is free, do so only
        # when it is nan, which is cheaper.
        if not at_hand(divergence) or divergence.sum().isnan():
            difference.masked_fill_(p == 0, 0.0)
            divergence = (p * difference).sum(-1)
        ctx.save_for_backward(log_p, log_q, p, difference)
        return divergence

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        log_p, log_q, p, difference = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives
            p, difference = _probs_and_difference(log_p, log_q)
        weight = grad.unsqueeze(-1) * p
        for_p = for_q = None
        if ctx.needs_input_grad[0]:
            for_p = torch.addcmul(weight, weight, difference)
        if ctx.needs_input_grad[1]:
            for_q = -weight
        return for_p, for_q


def closed_form_kl(p: Distribution, q: Distribution) -> Tensor:
    """Return torch's ``kl_divergence``; raise ``NotImplementedError`` where it is not valid.

    Torch uses the closed forms of parent classes, even for a subclass that overrides the
    distribution, and those of base distributions, even if a transform is not one-to-one.
    """
    if not (law_of(p) and law_of(q)) and not any(
        # Private: if it moves, the import fails. kl_divergence alone would take a parent's form.
        _serves(p, of) and _serves(q, to)
        for of, to in _KL_REGISTRY
    ):
        names = f"{type(p).__name__} and {type(q).__name__}"
        raise NotImplementedError(f"No KL divergence is registered for {names} themselves.")
    half_normals = all(isinstance(unwrap(fn), HalfNormal) for fn in (p, q))
    if not (half_normals or _is_one_to_one(p)):
        raise NotImplementedError(
            f"The KL divergence of {type(p).__name__} differs from that of its base distribution, "
            "since its transform is not one-to-one."
        )
    return kl_divergence(p, q)


def _is_one_to_one(fn: Distribution) -> bool:
    """Return whether all transforms of ``fn`` are one-to-one."""
    fn = unwrap(fn)
    if not isinstance(fn, TransformedDistribution):
        return True
    return all(part.bijective for part in fn.transforms) and _is_one_to_one(fn.base_dist)


def _serves(fn: Distribution, kind: type) -> bool:
    """Return whether a closed form registered for a class is valid for ``fn``."""
    own = law_of(fn) is not None or nearest_library(kind) is not kind
    return isinstance(fn, kind) and own


def _check(*distributions: Distribution) -> None:
    """Raise ``NotImplementedError`` if a distribution has no closed form."""
    for distribution in distributions:
        name = type(distribution).__name__
        if law_of(distribution) is None:
            raise NotImplementedError(
                f"{name} overrides the distribution of its parent class, so the parent's "
                "closed-form KL divergence is not valid. Register one by "
                "torch.distributions.register_kl, or estimate it from log_prob."
            )
        if isinstance(distribution, TruncatedGumbel):
            raise NotImplementedError(
                f"The KL divergence of {name} has no closed form; estimate it from log_prob."
            )
        if not getattr(distribution, "straight_through", True):
            raise NotImplementedError(
                f"The KL divergence of the relaxed density {name} has no closed form; use "
                f"{name}(..., straight_through=True) or OneHot for the discrete distribution, or "
                "estimate it from log_prob."
            )


def _finish(p: Distribution, q: Distribution, divergence: Tensor) -> Tensor:
    dtypes = [_dtype(p), _dtype(q)]
    shape = broadcast_shapes(p.batch_shape, q.batch_shape)
    return divergence.to(torch.promote_types(*dtypes)).expand(shape)


def _dtype(distribution: Distribution) -> torch.dtype:
    own = getattr(distribution, "dtype", None)
    return own if own is not None else distribution.mean.dtype


def _kl_one_hot(p: Distribution, q: Distribution) -> Tensor:
    _check(p, q)
    if p.event_shape != q.event_shape:
        raise ValueError(
            f"KL divergence between {p!r} and {q!r}: the numbers of categories differ, "
            f"{p.event_shape[0]} and {q.event_shape[0]}."
        )
    return _finish(p, q, kl_from_log_probs(log_probs(p), log_probs(q)))


def _kl_bernoulli(p: Distribution, q: Distribution) -> Tensor:
    _check(p, q)
    return _finish(p, q, kl_from_log_probs(bit_log_masses(p), bit_log_masses(q)))


def _kl_gumbel(p: Any, q: Any) -> Tensor:
    _check(p, q)
    dtype = noise_dtype(torch.promote_types(_dtype(p), _dtype(q)))
    p_loc, p_scale, q_loc, q_scale = (x.to(dtype) for x in (p.loc, p.scale, q.loc, q.scale))
    shifted = TorchGumbel(p_loc - q_loc, p_scale, validate_args=False)
    centred = TorchGumbel(torch.zeros_like(q_loc), q_scale, validate_args=False)
    return _finish(p, q, kl_divergence(shifted, centred))


_FAMILIES = {
    _kl_one_hot: (OneHot, RelaxedOneHot, OneHotCategorical),
    _kl_bernoulli: (RelaxedBernoulli, Bernoulli),
    _kl_gumbel: (Gumbel, TorchGumbel),  # and TruncatedGumbel, a Gumbel, which it refuses
}
for _function, _family in _FAMILIES.items():
    for _p, _q in itertools.product(_family, repeat=2):
        if (_p, _q) not in _KL_REGISTRY:
            register_kl(_p, _q)(_function)
