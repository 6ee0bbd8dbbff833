"""The truncated Gumbel against quadrature and against conditioning a Gumbel."""

from __future__ import annotations

import math

import pytest
import scipy.integrate
import scipy.stats
import torch
from helpers.laws import DTYPES, mean_z

from pyro_gumbel.distributions import Gumbel, TruncatedGumbel

LOC, SCALE = 0.3, 2.0
UPPERS = [-12.0, -3.0, 0.3, 2.0, 9.0, math.inf]


def truncated(upper: float) -> TruncatedGumbel:
    loc, scale = torch.tensor([LOC, SCALE], dtype=torch.float64)
    return TruncatedGumbel(loc, upper, scale)


def integrate(d: TruncatedGumbel, function) -> float:
    quantiles = torch.tensor([1e-14, 1e-6, 0.1, 0.5, 0.9, 1 - 1e-14], dtype=torch.float64)
    cuts = [*d.icdf(quantiles).tolist()]
    cuts[-1] = min(d.upper.item(), cuts[-1] + 1)

    def integrand(x):
        x = torch.tensor(x, dtype=torch.float64)
        return (function(x) * d.log_prob(x).exp()).item()

    pieces = zip(cuts, cuts[1:], strict=False)
    return sum(scipy.integrate.quad(integrand, *piece, epsabs=1e-13)[0] for piece in pieces)


@pytest.mark.parametrize("upper", UPPERS)
def test_density_by_quadrature(upper):
    d = truncated(upper)
    assert integrate(d, torch.ones_like) == pytest.approx(1, abs=1e-10)
    assert integrate(d, lambda x: x) == pytest.approx(d.mean.item(), abs=1e-8)
    assert integrate(d, lambda x: -d.log_prob(x)) == pytest.approx(d.entropy().item(), abs=1e-8)


@pytest.mark.parametrize("upper", UPPERS)
def test_is_the_conditional_of_a_gumbel(upper):
    d, free = truncated(upper), Gumbel(torch.tensor(LOC, dtype=torch.float64), SCALE)
    bound = torch.tensor(upper, dtype=torch.float64)
    x = d.icdf(torch.linspace(0.05, 1, 20, dtype=torch.float64))
    x = x[x.isfinite()]
    ratio = free.log_prob(x) - free.cdf(bound).log()
    torch.testing.assert_close(d.log_prob(x), ratio, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(d.cdf(x), free.cdf(x) / free.cdf(bound), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("upper", UPPERS)
def test_law_of_samples(upper):
    d = truncated(upper)
    draws = d.sample((50_000,))
    assert (draws <= upper).all()
    uniform = d.cdf(draws)
    assert scipy.stats.kstest(uniform.numpy(), "uniform").pvalue > 2e-5
    assert abs(mean_z(draws, d.mean.item())) < 5


BOUNDS = [-60.0, -20.0, 0.0, 5.0, 80.0, math.inf]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("upper", BOUNDS)
def test_own_samples_score_finite(dtype, upper):
    d = TruncatedGumbel(torch.zeros((), dtype=dtype), upper)
    x = d.sample((1000,))
    assert x.dtype == dtype
    assert (x <= upper).all()
    assert d.log_prob(x).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES[:3])  # e^20 does not fit float16
@pytest.mark.parametrize("upper", BOUNDS)
def test_gradients_are_finite(dtype, upper):
    parameters = torch.tensor([0.0, 1.0], dtype=dtype, requires_grad=True)
    d = TruncatedGumbel(parameters[0], upper, parameters[1])
    x = d.rsample((100,))
    total = (d.log_prob(x) + d.cdf(x)).sum() + d.mean + d.entropy()
    assert torch.autograd.grad(total, parameters)[0].isfinite().all()


def test_gradients():
    given = (torch.tensor([0.3, -1.0]), torch.tensor([0.1, 4.0]), torch.tensor([2.0, 0.7]))
    given = tuple(tensor.double().requires_grad_() for tensor in given)
    u = torch.tensor([0.2, 0.9], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *args: TruncatedGumbel(*args).icdf(u), given)
    x = torch.tensor([-1.0, 0.05], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, *args: TruncatedGumbel(*args).log_prob(x), (x, *given)
    )
    assert torch.autograd.gradcheck(lambda *args: TruncatedGumbel(*args).mean, given)


def test_beyond_the_bound():
    d = TruncatedGumbel(0.0, 1.0, validate_args=False)
    assert d.log_prob(torch.tensor(1.5)) == -math.inf
    assert d.cdf(torch.tensor([1.0, 1.5])).tolist() == [1, 1]
    assert d.mode == 0
    assert TruncatedGumbel(0.0, -1.0).mode == -1


def test_no_closed_form():
    with pytest.raises(NotImplementedError, match="variance has no closed form"):
        _ = truncated(1.0).variance
    with pytest.raises(NotImplementedError, match="stddev has no closed form"):
        _ = truncated(1.0).stddev
