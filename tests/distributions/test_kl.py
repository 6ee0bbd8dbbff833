"""KL divergences in closed form against enumeration, with probabilities of zero."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from helpers.laws import DTYPES
from torch.distributions import kl_divergence

from pyro_gumbel.distributions import (
    ExpRelaxedOneHot,
    Gumbel,
    OneHot,
    RelaxedBernoulli,
    RelaxedOneHot,
    TruncatedGumbel,
)
from pyro_gumbel.distributions.kl import kl_from_log_probs

ONE_HOT = {
    "OneHot": OneHot,
    "RelaxedOneHot": lambda **given: RelaxedOneHot(0.3, **given, straight_through=True),
    "pyro": dist.OneHotCategorical,
    "torch": torch.distributions.OneHotCategorical,
}
BERNOULLI = {
    "RelaxedBernoulli": lambda **given: RelaxedBernoulli(0.3, **given, straight_through=True),
    "pyro": dist.Bernoulli,
    "torch": torch.distributions.Bernoulli,
}


def pairs(family):
    ours = [name for name in family if name not in {"pyro", "torch"}]
    return [(p, q) for p in family for q in family if p in ours or q in ours]


@pytest.mark.parametrize(("p", "q"), pairs(ONE_HOT))
def test_one_hot_by_enumeration(p, q):
    p_logits = torch.randn(4, 5, dtype=torch.float64)
    q_logits = torch.randn(5, dtype=torch.float64)
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    divergence = kl_divergence(ONE_HOT[p](logits=p_logits), ONE_HOT[q](logits=q_logits))
    torch.testing.assert_close(divergence, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("p", "q"), pairs(ONE_HOT))
def test_one_hot_with_probabilities_of_zero(p, q):
    some, fewer = torch.tensor([0.2, 0.8, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    inside = kl_divergence(ONE_HOT[p](probs=fewer), ONE_HOT[q](probs=some))
    assert inside.item() == pytest.approx(math.log(1 / 0.8), rel=1e-6)
    outside = kl_divergence(ONE_HOT[p](probs=some), ONE_HOT[q](probs=fewer))
    assert outside.item() == math.inf
    assert kl_divergence(ONE_HOT[p](probs=some), ONE_HOT[q](probs=some)).item() == 0


@pytest.mark.parametrize(("p", "q"), pairs(BERNOULLI))
def test_bernoulli_by_enumeration(p, q):
    p_probs, q_probs = torch.rand(2, 6, dtype=torch.float64).unbind()
    expected = p_probs * (p_probs / q_probs).log()
    expected = expected + (1 - p_probs) * ((1 - p_probs) / (1 - q_probs)).log()
    divergence = kl_divergence(BERNOULLI[p](probs=p_probs), BERNOULLI[q](probs=q_probs))
    torch.testing.assert_close(divergence, expected, rtol=1e-9, atol=1e-9)
    from_logits = kl_divergence(
        BERNOULLI[p](logits=p_probs.logit()), BERNOULLI[q](logits=q_probs.logit())
    )
    torch.testing.assert_close(from_logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("p", "q"), pairs(BERNOULLI))
def test_bernoulli_with_probabilities_of_zero(p, q):
    certain, open_ = torch.tensor([0.0, 1.0]), torch.tensor([0.25, 0.25])
    inside = kl_divergence(BERNOULLI[p](probs=certain), BERNOULLI[q](probs=open_))
    torch.testing.assert_close(inside, torch.tensor([math.log(4 / 3), math.log(4)]))
    outside = kl_divergence(BERNOULLI[p](probs=open_), BERNOULLI[q](probs=certain))
    assert outside.tolist() == [math.inf, math.inf]


def test_under_independent_and_gradients():
    logits = torch.randn(4, 5, requires_grad=True)
    p = RelaxedOneHot(0.5, logits=logits, straight_through=True)
    q = dist.OneHotCategorical(probs=torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0])).expand([4])
    finite = dist.OneHotCategorical(probs=torch.full((4, 5), 0.2))
    total = kl_divergence(p.to_event(1), finite.to_event(1))
    torch.testing.assert_close(total, kl_divergence(p, finite).sum())
    assert torch.autograd.grad(total, logits)[0].isfinite().all()
    masked = torch.tensor([0.0, 0.5, 0.5, 0.0, 0.0], requires_grad=True)
    divergence = kl_divergence(OneHot(probs=masked), q.base_dist if hasattr(q, "base_dist") else q)
    assert torch.autograd.grad(divergence.sum(), masked)[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_and_shape(dtype):
    logits = torch.randn(3, 4).to(dtype)
    divergence = kl_divergence(OneHot(logits=logits).expand([2, 3]), OneHot(logits=logits[0]))
    assert divergence.dtype == dtype
    assert divergence.shape == (2, 3)


def test_no_closed_form():
    phi = torch.zeros(3)
    hard, soft = OneHot(logits=phi), RelaxedOneHot(0.5, logits=phi)
    with pytest.raises(NotImplementedError, match="straight_through=True"):
        kl_divergence(soft, hard)
    with pytest.raises(NotImplementedError, match="straight_through=True"):
        kl_divergence(hard, soft)
    with pytest.raises(NotImplementedError, match="straight_through=True"):
        kl_divergence(RelaxedBernoulli(0.5, logits=phi), dist.Bernoulli(logits=phi))
    with pytest.raises(NotImplementedError):
        kl_divergence(ExpRelaxedOneHot(0.5, logits=phi), hard)
    with pytest.raises(NotImplementedError, match="TruncatedGumbel"):
        kl_divergence(TruncatedGumbel(0.0, 1.0), Gumbel(0.0))


def test_numbers_of_categories_must_agree():
    with pytest.raises(ValueError, match="numbers of categories differ, 3 and 4"):
        kl_divergence(OneHot(logits=torch.zeros(3)), OneHot(logits=torch.zeros(4)))


@pytest.mark.parametrize("p", ONE_HOT)
def test_a_probability_that_underflows_where_the_other_is_zero(p):
    logits = torch.tensor([200.0, 0.0, -200.0], requires_grad=True)
    other = dist.OneHotCategorical(probs=torch.tensor([0.5, 0.5, 0.0]))
    divergence = kl_divergence(ONE_HOT[p](logits=logits), OneHot(probs=other.probs))
    assert divergence.item() == pytest.approx(math.log(2), rel=1e-6)
    (gradient,) = torch.autograd.grad(divergence, logits)
    assert torch.equal(gradient, torch.zeros(3))


def test_zeros_outlast_expansion():
    """Test with and without logits that torch has computed."""
    for look in (lambda d: None, lambda d: d.logits):
        other = dist.OneHotCategorical(probs=torch.tensor([0.5, 0.5, 0.0]))
        look(other)
        some = OneHot(probs=torch.tensor([0.2, 0.3, 0.5]))
        assert kl_divergence(some, other).item() == math.inf
        assert torch.isinf(kl_divergence(some, other.expand([2]))).all()
    low = dist.OneHotCategorical(logits=torch.tensor([0.0, 0.0, -200.0]))
    assert low.probs[-1] == 0
    finite = kl_divergence(OneHot(probs=torch.tensor([0.2, 0.3, 0.5])), low.expand([2]))
    assert torch.isfinite(finite).all()


DOUBLE = {"dtype": torch.float64}


@pytest.mark.parametrize("q_shape", [(5,), (1, 5), (3, 5), (2, 3, 5)])
def test_first_and_second_derivatives_sum_over_what_was_broadcast(q_shape):
    p_logits = torch.randn(3, 5, **DOUBLE, requires_grad=True)
    q_logits = torch.randn(q_shape, **DOUBLE, requires_grad=True)

    def divergence(p, q):
        return kl_divergence(OneHot(logits=p), dist.OneHotCategorical(logits=q))

    assert torch.autograd.gradcheck(divergence, (p_logits, q_logits))
    assert torch.autograd.gradgradcheck(divergence, (p_logits, q_logits))


def test_gradients_at_probabilities_of_zero():
    log_p = torch.tensor([0.25, 0.75, 0.0], **DOUBLE).log().requires_grad_()
    log_q = torch.tensor([0.5, 0.5, 0.0], **DOUBLE).log().requires_grad_()
    kl_from_log_probs(log_p, log_q).backward()
    p = torch.tensor([0.25, 0.75, 0.0], **DOUBLE)
    difference = torch.tensor([math.log(0.5), math.log(1.5), 0.0], **DOUBLE)
    torch.testing.assert_close(log_p.grad, p * (difference + 1), rtol=1e-12, atol=0)
    torch.testing.assert_close(log_q.grad, -p, rtol=0, atol=0)


def test_gradients_come_in_each_arguments_own_dtype():
    log_p = torch.randn(4, 3).log_softmax(-1).requires_grad_()
    log_q = torch.randn(3, **DOUBLE).log_softmax(-1).requires_grad_()
    divergence = kl_from_log_probs(log_p, log_q)
    divergence.sum().backward()
    assert (divergence.dtype, log_p.grad.dtype, log_q.grad.dtype) == (
        torch.float64,
        torch.float32,
        torch.float64,
    )


def test_under_transforms_as_without():
    log_p, log_q = torch.randn(2, 4, 3, **DOUBLE).log_softmax(-1).unbind()
    by_row = torch.func.vmap(torch.func.grad(kl_from_log_probs))(log_p, log_q)
    log_p.requires_grad_()
    (whole,) = torch.autograd.grad(kl_from_log_probs(log_p, log_q).sum(), log_p)
    torch.testing.assert_close(by_row, whole, rtol=1e-12, atol=1e-15)
