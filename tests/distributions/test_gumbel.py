"""Gumbel distributions against scipy and quadrature, and their tails in float32."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch
from helpers.laws import DTYPES, mean_z
from torch.distributions import kl_divergence

from pyro_gumbel.distributions import Gumbel, TruncatedGumbel

EULER = 0.5772156649015329


@pytest.mark.parametrize(("loc", "scale"), [(0.0, 1.0), (-3.0, 0.2), (10.0, 7.0)])
def test_against_scipy(loc, scale):
    ours = Gumbel(*torch.tensor([loc, scale], dtype=torch.float64))
    scipys = scipy.stats.gumbel_r(loc, scale)
    x = torch.linspace(loc - 4 * scale, loc + 40 * scale, 101, dtype=torch.float64)
    p = torch.linspace(1e-9, 1 - 1e-9, 101, dtype=torch.float64)
    close = {"rtol": 1e-12, "atol": 0.0}
    torch.testing.assert_close(ours.log_prob(x), torch.tensor(scipys.logpdf(x)), **close)
    torch.testing.assert_close(ours.cdf(x), torch.tensor(scipys.cdf(x)), **close)
    torch.testing.assert_close(ours.icdf(p), torch.tensor(scipys.ppf(p)), rtol=1e-12, atol=1e-12)
    assert ours.mean.item() == pytest.approx(scipys.mean(), rel=1e-12)
    assert ours.variance.item() == pytest.approx(scipys.var(), rel=1e-12)
    assert ours.stddev.item() == pytest.approx(scipys.std(), rel=1e-12)
    assert ours.entropy().item() == pytest.approx(float(scipys.entropy()), rel=1e-12)
    assert ours.mode.item() == loc


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_within_one_percent_in_every_dtype(dtype):
    d = Gumbel(torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype))
    draws = d.sample((1_000_000,))
    assert draws.dtype == dtype
    assert draws.double().mean().item() == pytest.approx(EULER, rel=0.01)
    assert draws.double().var().item() == pytest.approx(math.pi**2 / 6, rel=0.01)
    assert draws.max().item() > 10  # the upper tail is there


def test_float32_tails():
    d = Gumbel(0.0, 1.0)
    assert d.icdf(torch.tensor(1e-8)).item() == pytest.approx(-math.log(-math.log(1e-8)), rel=1e-6)
    assert d.icdf(torch.tensor(1e-8)).item() == pytest.approx(-2.913, abs=1e-3)
    assert d.cdf(torch.tensor(-4.0)).item() == pytest.approx(math.exp(-math.exp(4)), rel=1e-4)
    assert d.cdf(torch.tensor(-3.0)).item() == pytest.approx(1.9e-9, rel=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cdf_and_log_prob_are_defined_everywhere(dtype):
    x = torch.tensor([-math.inf, -1e4, -100, -10, -4.5, 0, 20, 100, 1e4, math.inf], dtype=dtype)
    x = x.requires_grad_()
    d = Gumbel(torch.zeros((), dtype=dtype), 1.0)
    cdf = d.cdf(x)
    assert ((cdf >= 0) & (cdf <= 1)).all()
    assert (cdf.diff() >= 0).all()
    assert torch.autograd.grad(cdf.sum(), x)[0].isfinite().all()
    log_prob = d.log_prob(x)
    assert not log_prob.isnan().any()
    assert log_prob[0] == log_prob[-1] == -math.inf


def test_icdf_inverts_cdf_and_reaches_the_ends():
    d = Gumbel(torch.tensor(1.5).double(), 0.5)
    x = torch.linspace(0, 6, 25, dtype=torch.float64)
    torch.testing.assert_close(d.icdf(d.cdf(x)), x, rtol=1e-9, atol=1e-9)
    assert d.icdf(torch.tensor([0.0, 1.0])).tolist() == [-math.inf, math.inf]


def test_rsample_is_pathwise():
    loc = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x = Gumbel(loc, scale).rsample((50,))
    by_loc, by_scale = torch.autograd.grad(x.sum(), (loc, scale))
    assert by_loc.item() == 50
    assert by_scale.item() == pytest.approx(((x - loc) / scale).sum().item(), rel=1e-12)


def test_gumbel_max_is_softmax():
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0])
    draws = Gumbel(logits, 1.0).sample((100_000,))
    frequencies = torch.nn.functional.one_hot(draws.argmax(-1), 4)
    for category, probability in enumerate(logits.softmax(-1).tolist()):
        assert abs(mean_z(frequencies[:, category], probability)) < 5


PAIRS = [((0.3, 1.5), (-0.4, 0.8)), ((0.0, 1.0), (0.0, 1.0)), ((2.0, 0.5), (1.0, 3.0))]


@pytest.mark.parametrize(("p", "q"), PAIRS)
@pytest.mark.parametrize("other", [Gumbel, dist.Gumbel, torch.distributions.Gumbel])
def test_kl_by_quadrature(p, q, other):
    p, q = (torch.tensor(pair, dtype=torch.float64) for pair in (p, q))
    p, q = Gumbel(*p), other(*q)

    def integrand(x):
        x = torch.tensor(x, dtype=torch.float64)
        return (p.log_prob(x).exp() * (p.log_prob(x) - q.log_prob(x))).item()

    ends = (
        p.icdf(torch.tensor(1e-13).double()).item(),
        p.icdf(torch.tensor(1 - 1e-13).double()).item(),
    )
    expected, _ = scipy.integrate.quad(integrand, *ends, epsabs=1e-10, limit=200)
    assert kl_divergence(p, q).item() == pytest.approx(expected, abs=1e-8)
    reverse = kl_divergence(other(p.loc, p.scale), Gumbel(q.loc, q.scale))
    assert reverse.item() == pytest.approx(expected, abs=1e-8)


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
def test_truncated_density_by_quadrature(upper):
    d = truncated(upper)
    assert integrate(d, torch.ones_like) == pytest.approx(1, abs=1e-10)
    assert integrate(d, lambda x: x) == pytest.approx(d.mean.item(), abs=1e-8)
    assert integrate(d, lambda x: -d.log_prob(x)) == pytest.approx(d.entropy().item(), abs=1e-8)


@pytest.mark.parametrize("upper", UPPERS)
def test_truncated_is_the_conditional_of_a_gumbel(upper):
    d, free = truncated(upper), Gumbel(torch.tensor(LOC, dtype=torch.float64), SCALE)
    bound = torch.tensor(upper, dtype=torch.float64)
    x = d.icdf(torch.linspace(0.05, 1, 20, dtype=torch.float64))
    x = x[x.isfinite()]
    ratio = free.log_prob(x) - free.cdf(bound).log()
    torch.testing.assert_close(d.log_prob(x), ratio, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(d.cdf(x), free.cdf(x) / free.cdf(bound), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("upper", UPPERS)
def test_distribution_of_truncated_samples(upper):
    d = truncated(upper)
    draws = d.sample((50_000,))
    assert (draws <= upper).all()
    uniform = d.cdf(draws)
    assert scipy.stats.kstest(uniform.numpy(), "uniform").pvalue > 2e-5
    assert abs(mean_z(draws, d.mean.item())) < 5


BOUNDS = [-60.0, -20.0, 0.0, 5.0, 80.0, math.inf]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("upper", BOUNDS)
def test_truncated_samples_score_finite(dtype, upper):
    d = TruncatedGumbel(torch.zeros((), dtype=dtype), upper)
    x = d.sample((1000,))
    assert x.dtype == dtype
    assert (x <= upper).all()
    assert d.log_prob(x).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES[:3])  # e^20 does not fit float16
@pytest.mark.parametrize("upper", BOUNDS)
def test_gradients_of_truncated_samples_are_finite(dtype, upper):
    parameters = torch.tensor([0.0, 1.0], dtype=dtype, requires_grad=True)
    d = TruncatedGumbel(parameters[0], upper, parameters[1])
    x = d.rsample((100,))
    total = (d.log_prob(x) + d.cdf(x)).sum() + d.mean + d.entropy()
    assert torch.autograd.grad(total, parameters)[0].isfinite().all()


def test_gradients_of_truncated_samples():
    given = (torch.tensor([0.3, -1.0]), torch.tensor([0.1, 4.0]), torch.tensor([2.0, 0.7]))
    given = tuple(tensor.double().requires_grad_() for tensor in given)
    u = torch.tensor([0.2, 0.9], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *args: TruncatedGumbel(*args).icdf(u), given)
    x = torch.tensor([-1.0, 0.05], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, *args: TruncatedGumbel(*args).log_prob(x), (x, *given)
    )
    assert torch.autograd.gradcheck(lambda *args: TruncatedGumbel(*args).mean, given)


def test_truncated_beyond_the_bound():
    d = TruncatedGumbel(0.0, 1.0, validate_args=False)
    assert d.log_prob(torch.tensor(1.5)) == -math.inf
    assert d.cdf(torch.tensor([1.0, 1.5])).tolist() == [1, 1]
    assert d.mode == 0
    assert TruncatedGumbel(0.0, -1.0).mode == -1


def test_truncated_variance_has_no_closed_form():
    with pytest.raises(NotImplementedError, match="variance has no closed form"):
        _ = truncated(1.0).variance
    with pytest.raises(NotImplementedError, match="stddev has no closed form"):
        _ = truncated(1.0).stddev
