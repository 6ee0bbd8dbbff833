"""Noise and logarithms: distribution, precision, finite values and gradients."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from helpers.laws import DTYPES, HALF, count_z, mean_z

from pyro_gumbel.distributions import _numerics as noise_module
from pyro_gumbel.distributions import gumbel_noise
from pyro_gumbel.distributions._numerics import exact_log, logistic_noise, uniform_noise

LAWS = {
    "gumbel": (gumbel_noise, scipy.stats.gumbel_r),
    "logistic": (logistic_noise, scipy.stats.logistic),
}


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_law(name, dtype):
    draw, law = LAWS[name]
    noise = draw((200_000,), dtype)
    assert scipy.stats.kstest(noise.double().numpy(), law.cdf).pvalue > 2e-5
    assert abs(mean_z(noise, law.mean())) < 5
    assert abs(mean_z((noise - law.mean()).square(), law.var())) < 5


@pytest.mark.parametrize("name", LAWS)
def test_precision_and_shape(name):
    draw, _ = LAWS[name]
    for dtype in HALF:
        assert draw((2, 3), dtype).dtype == torch.float32
    assert draw((2, 3), torch.float64).dtype == torch.float64
    assert draw((2, 3), torch.float32, "cpu").shape == (2, 3)
    assert draw((), torch.float32).shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tails(dtype):
    num_draws = 4_000_000
    noise = gumbel_noise((num_draws,), dtype)
    upper = (noise > 11).sum().item()
    assert abs(count_z(upper, num_draws, -math.expm1(-math.exp(-11)))) < 5
    lower = (noise < -2.4).sum().item()
    assert abs(count_z(lower, num_draws, math.exp(-math.exp(2.4)))) < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_cell_of_the_lattice_is_finite(dtype, monkeypatch):
    eps = torch.finfo(dtype).eps
    ends = torch.tensor([0.0, eps / 2, eps, 0.5 - eps, 0.5, 1 - eps, 1 - eps / 2], dtype=dtype)
    monkeypatch.setattr(noise_module.torch, "rand", lambda *args, **kwargs: ends.clone())
    gumbel = noise_module.gumbel_noise((7,), dtype)
    assert gumbel.isfinite().all()
    # -log(-log(1 - u)) at the middle of the cell: the first sits at a quarter of eps.
    assert gumbel[0].item() == pytest.approx(-math.log(eps / 4), rel=1e-6)
    assert gumbel[1].item() == pytest.approx(-math.log(3 * eps / 4), rel=1e-6)
    logistic = noise_module.logistic_noise((7,), dtype)
    assert logistic.isfinite().all()
    assert logistic[0].item() == pytest.approx(-logistic[-1].item(), rel=1e-5)


def test_uniform_noise_excludes_both_ends(monkeypatch):
    ends = torch.tensor([0.0, 1 - 2.0**-24])
    monkeypatch.setattr(noise_module.torch, "rand", lambda *args, **kwargs: ends.clone())
    noise = uniform_noise((2,), torch.bfloat16)
    assert 0 < noise[0] < noise[1] < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_logarithm_has_finite_gradients(dtype):
    tiny = torch.finfo(dtype).tiny
    probs = torch.tensor([0.0, tiny / 4, tiny, 0.3, 1.0], dtype=dtype, requires_grad=True)
    value = exact_log(probs)
    assert value[0] == -math.inf
    torch.testing.assert_close(value[2:], probs[2:].log())
    (gradient,) = torch.autograd.grad(value[1:].sum() + 1e3 * value[0], probs)
    torch.testing.assert_close(gradient, torch.where(probs < tiny, 0.0, 1 / probs.detach()))
    # Transformed code has a formula of its own.
    by_element = torch.func.vmap(torch.func.grad(exact_log))(probs.detach())
    torch.testing.assert_close(by_element, gradient)
    torch.testing.assert_close(torch.func.vmap(exact_log)(probs)[2:], value[2:])


def test_the_logarithm_has_second_derivatives():
    probs = torch.rand(5, dtype=torch.float64) + 0.1
    assert torch.autograd.gradcheck(exact_log, probs.requires_grad_())
    assert torch.autograd.gradgradcheck(exact_log, probs)
