"""The relaxed Bernoulli against torch, quadrature and the Bernoulli."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from helpers.laws import DTYPES, HALF, mean_z

from pyro_gumbel.distributions import RelaxedBernoulli

FLOAT64 = {"dtype": torch.float64}


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("logit", [-2.0, 0.5])
def test_density_integrates_to_one(logit, temperature):
    d = RelaxedBernoulli(temperature, logits=torch.tensor(logit, **FLOAT64))
    # Over log-odds below zero, where y keeps its digits; the other half by symmetry.
    ell = torch.linspace(-36 / temperature - 40, 0, 40_001, **FLOAT64)
    mirrored = RelaxedBernoulli(temperature, logits=torch.tensor(-logit, **FLOAT64))
    y = ell.sigmoid()
    log_jacobian = torch.nn.functional.logsigmoid(ell) + torch.nn.functional.logsigmoid(-ell)
    total = 0.0
    for half in (d, mirrored):
        total += torch.trapezoid((half.log_prob(y) + log_jacobian).exp(), ell).item()
    assert total == pytest.approx(1, abs=1e-5)


def test_against_torch():
    logits = torch.randn(5, **FLOAT64)
    value = torch.rand(5, **FLOAT64)
    for temperature in (0.4, 1.0, 5.0):
        torchs = torch.distributions.RelaxedBernoulli(
            torch.tensor(temperature, **FLOAT64), logits=logits
        )
        ours = RelaxedBernoulli(temperature, logits=logits)
        torch.testing.assert_close(
            ours.log_prob(value), torchs.log_prob(value), rtol=1e-9, atol=1e-9
        )


def test_law():
    y = RelaxedBernoulli(0.7, logits=torch.tensor(0.8, **FLOAT64)).sample((50_000,))
    law = scipy.stats.logistic(loc=0.8)
    assert scipy.stats.kstest((0.7 * y.logit()).numpy(), law.cdf).pvalue > 2e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["sample", "rsample"])
def test_law_of_bits(dtype, method):
    probs = torch.tensor([1e-3, 0.3, 0.98]).to(dtype)
    d = RelaxedBernoulli(0.2, probs=probs, straight_through=True)
    bits = getattr(d, method)((100_000,))
    assert ((bits == 0) | (bits == 1)).all()
    for column, probability in enumerate(probs.double().tolist()):
        assert abs(mean_z(bits[:, column], probability)) < 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("straight_through", [False, True])
def test_own_samples_score_finite(dtype, temperature, scale, straight_through):
    logits = (scale * torch.randn(1000).clamp(-1, 1)).to(dtype).requires_grad_()
    given = torch.tensor(temperature, dtype=dtype, requires_grad=True)
    d = RelaxedBernoulli(given, logits=logits, straight_through=straight_through)
    x = d.rsample()
    assert d.support.check(x).all()
    detached = x.detach().requires_grad_()
    score = d.log_prob(x)
    assert score.isfinite().all()
    total = (score + d.log_prob(detached)).float().sum() + x.float().sum()
    for gradient in torch.autograd.grad(total, (logits, given, detached)):
        assert gradient.isfinite().all()


def test_extreme_values_are_read_as_documented():
    d = RelaxedBernoulli(0.5, logits=0.3)
    info = torch.finfo(torch.float32)
    ends = torch.tensor([0.0, 1.0], requires_grad=True)
    score = d.log_prob(ends)
    assert torch.equal(score, d.log_prob(torch.tensor([info.tiny, 1 - info.eps / 2])))
    assert torch.autograd.grad(score.sum(), ends)[0].tolist() == [0, 0]


def test_certain_bits():
    probs = torch.tensor([0.0, 1.0, 0.5], requires_grad=True)
    hard = RelaxedBernoulli(0.5, probs=probs, straight_through=True)
    soft = RelaxedBernoulli(0.5, probs=probs)
    for d in (hard, soft):
        draws = d.sample((100,))
        assert (draws[:, 0] == 0).all()
        assert (draws[:, 1] == 1).all()
        assert d.log_prob(torch.tensor([0.0, 1.0, 0.5]))[:2].tolist() == [0, 0]
        assert d.log_prob(torch.tensor([1.0, 0.0, 0.5]))[:2].tolist() == [-math.inf] * 2
        score = d.log_prob(d.rsample())
        assert torch.autograd.grad(score.sum(), probs)[0].isfinite().all()
    assert hard.entropy().tolist() == pytest.approx([0, 0, math.log(2)])
    assert hard.logits[:2].tolist() == [-math.inf, math.inf]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_against_bernoulli(dtype):
    logits = torch.tensor([-1.0, 0.5, 3.0], dtype=dtype)
    ours = RelaxedBernoulli(0.5, logits=logits, straight_through=True)
    exact = dist.Bernoulli(logits=logits.double())
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps}
    for name in ("probs", "mean", "variance", "mode", "logits"):
        torch.testing.assert_close(getattr(ours, name), getattr(exact, name).to(dtype), **close)
    torch.testing.assert_close(ours.entropy(), exact.entropy().to(dtype), **close)
    for bit in (0.0, 1.0):
        bits = torch.full((3,), bit, dtype=dtype)
        expected = exact.log_prob(bits.double()).to(dtype)
        torch.testing.assert_close(ours.log_prob(bits), expected, **close)
    assert ours.enumerate_support().shape == (2, 3)
    assert ours.enumerate_support(expand=False).shape == (2, 1)


def test_log_mass_is_linear_in_the_value():
    d = RelaxedBernoulli(0.5, probs=0.25, straight_through=True)
    value = torch.tensor(0.3, requires_grad=True)
    score = d.log_prob(value)
    assert score.item() == pytest.approx(0.3 * math.log(0.25) + 0.7 * math.log(0.75), rel=1e-6)
    slope = torch.autograd.grad(score, value)[0].item()
    assert slope == pytest.approx(math.log(0.25 / 0.75), rel=1e-6)


def test_hard_ahead_and_soft_back():
    logits = torch.randn(20, requires_grad=True)
    torch.manual_seed(5)
    hard = RelaxedBernoulli(0.4, logits=logits, straight_through=True).rsample()
    torch.manual_seed(5)
    drawn, soft = RelaxedBernoulli(0.4, logits=logits).rsample_pair()
    assert torch.equal(hard, drawn)
    assert not drawn.requires_grad
    weight = torch.randn(20)
    by_hard, by_soft = (torch.autograd.grad((x * weight).sum(), logits)[0] for x in (hard, soft))
    assert torch.equal(by_hard, by_soft)


def test_derivatives():
    logits = torch.randn(4, **FLOAT64, requires_grad=True)
    temperature = torch.tensor(0.6, **FLOAT64, requires_grad=True)
    value = torch.rand(4, **FLOAT64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, phi, t: RelaxedBernoulli(t, logits=phi).log_prob(v), (value, logits, temperature)
    )


def test_temperature_broadcasts():
    d = RelaxedBernoulli(torch.tensor([[0.5], [1.0]]), logits=torch.zeros(3))
    assert d.batch_shape == (2, 3)
    assert d.log_prob(d.sample((4,))).shape == (4, 2, 3)
    shapes = RelaxedBernoulli.infer_shapes(temperature=(2, 1), logits=(3,))
    assert shapes == (torch.Size([2, 3]), torch.Size([]))


@pytest.mark.parametrize("name", ["mean", "variance", "mode", "entropy", "enumerate_support"])
def test_no_closed_form(name):
    with pytest.raises(NotImplementedError):
        _ = getattr(RelaxedBernoulli(0.5, logits=0.0), name)()


def test_half_precision_draws_both_bits_fairly():
    for dtype in HALF:
        d = RelaxedBernoulli(0.5, logits=torch.zeros((), dtype=dtype), straight_through=True)
        assert abs(mean_z(d.sample((100_000,)), 0.5)) < 5
