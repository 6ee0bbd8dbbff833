"""Double control variates, Rodeo and MuProp: formulas, exact means, independent draws."""

from __future__ import annotations

import pytest
import torch
from helpers.bit_costs import gradients
from helpers.coupled_draws import (
    EXACT,
    BitSite,
    OneHotSite,
    check,
    independent,
    set_alpha,
    set_scales,
    step,
)
from helpers.coupled_laws import BIT_LOGITS, LOGITS, bits, categories, chi_square, code, dtypes

from pyro_gumbel.estimators import (
    DoubleControlVariate,
    LeaveOneOut,
    LocalExpectation,
    MuProp,
    Rebar,
    Rodeo,
    Score,
)

both_sites = pytest.mark.parametrize("site_type", [BitSite, OneHotSite])


def leave_one_out(cost):
    return (cost - cost.mean(0)) * len(cost) / (len(cost) - 1)


@both_sites
@pytest.mark.parametrize("num_samples", [2, 4])
def test_double_control_variate_follows_its_formula(site_type, num_samples, vectorize):
    estimator = DoubleControlVariate(num_samples, learn=False)
    with torch.no_grad():
        estimator.alpha.fill_(-0.6)
    gradient, program, values = step(site_type, estimator, vectorize)
    alpha = estimator.alpha.double()
    slopes = program.slope(values)
    mean = program.mean(program.phi.detach())
    cost = program.cost(values)
    corrected = []
    for k in range(num_samples):
        others = torch.stack([slopes[j] for j in range(num_samples) if j != k]).mean(0)
        corrected.append(cost[k] + alpha * (others * (values[k] - mean)).sum(-1))
    advantage = leave_one_out(torch.stack(corrected)).unsqueeze(-1)
    expected = (advantage * program.score(values)).mean(0)
    expected = expected - alpha * program.jacobian_product(slopes.mean(0))
    torch.testing.assert_close(gradient, expected.mean(0), **EXACT)


def test_double_control_variate_starts_as_leave_one_out():
    gradient, program, values = step(OneHotSite, DoubleControlVariate(3), True)
    advantage = leave_one_out(program.cost(values)).unsqueeze(-1)
    expected = (advantage * program.score(values)).mean(0).mean(0)
    torch.testing.assert_close(gradient, expected, **EXACT)
    score = Score(LeaveOneOut())
    score.draw_block = lambda fn, event_dims: values[:, 0]
    again, _ = program.gradient(score, num_particles=3)
    advantage = leave_one_out(program.cost(values[:, 0])).unsqueeze(-1)
    torch.testing.assert_close(again, (advantage * program.score(values[:, 0])).mean(0), **EXACT)


@pytest.mark.parametrize("num_samples", [2, 3])
def test_rodeo_follows_its_formula(num_samples, vectorize):
    """The Stein operator written as a sum over flipped bits of functions of the whole value."""
    estimator = Rodeo(num_samples, learn=False, hidden=6).double()
    with torch.no_grad():
        estimator.scales.copy_(torch.tensor([0.7, -1.3]))
    gradient, program, values = step(BitSite, estimator, vectorize)
    theta = program.phi.detach().sigmoid()
    cost, slopes = program.cost(values), program.slope(values)
    alpha, beta = estimator.scales

    def network(x, j):
        linear = (slopes[j] * (x - values[j])).sum(-1)
        return estimator.network(torch.stack([linear, cost[j]], -1))

    def stein(function, x):
        total = 0.0
        for i in range(3):
            flipped = x.clone()
            flipped[..., i] = 1 - x[..., i]
            weight = torch.where(x[..., i] > 0, 1 - theta[:, i], theta[:, i])
            change = function(flipped) - function(x)
            total = total + (weight if change.dim() == 2 else weight.unsqueeze(-1)) * change / 3
        return total

    def averaged(k, component, x):
        others = [j for j in range(num_samples) if j != k]
        return torch.stack([network(x, j)[..., component] for j in others]).mean(0)

    expected = 0.0
    for k in range(num_samples):
        baseline = torch.stack(
            [
                cost[j] + alpha * stein(lambda x, j=j: averaged(j, 0, x), values[j])
                for j in range(num_samples)
                if j != k
            ]
        ).mean(0)
        expected = expected + (cost[k] - baseline).unsqueeze(-1) * (values[k] - theta)
        expected = expected + beta * stein(
            lambda x, k=k: averaged(k, 1, x).unsqueeze(-1) * (x - theta), values[k]
        )
    expected = (expected / num_samples).detach()
    torch.testing.assert_close(gradient, expected.mean(0), **EXACT)


@both_sites
def test_muprop_follows_its_formula(site_type, vectorize):
    gradient, program, values = step(site_type, MuProp(), vectorize)
    mean = program.mean(program.phi.detach()).expand_as(values[0])
    torch.testing.assert_close(values[1], mean, **EXACT)
    slope = program.slope(mean)
    first_order = program.cost(mean) + (slope * (values[0] - mean)).sum(-1)
    advantage = (program.cost(values[0]) - first_order).unsqueeze(-1)
    expected = advantage * program.score(values[0]) + program.jacobian_product(slope)
    torch.testing.assert_close(gradient, expected.mean(0), **EXACT)


DOUBLE = torch.float64


@pytest.mark.parametrize("site_type", [BitSite, OneHotSite])
@pytest.mark.parametrize("alpha", [0.0, -0.8, 3.0])
@pytest.mark.parametrize("num_samples", [2, 3])
def test_double_control_variate_has_the_exact_mean(site_type, alpha, num_samples):
    estimator = set_alpha(DoubleControlVariate(num_samples, learn=False), alpha)
    check(site_type, estimator, independent(site_type(1), num_samples))


@pytest.mark.parametrize("num_samples", [2, 3])
def test_rodeo_has_the_exact_mean(num_samples):
    estimator = set_scales(Rodeo(num_samples, learn=False, hidden=7).double())
    check(BitSite, estimator, independent(BitSite(1), num_samples))


@pytest.mark.parametrize("site_type", [BitSite, OneHotSite])
def test_muprop_has_the_exact_mean(site_type):
    site = site_type(1)
    mean = site.mean(site.phi.detach()[0])
    combinations = [(torch.stack([value[0], mean]), prob) for value, prob in independent(site, 1)]
    check(site_type, MuProp(), combinations)


@dtypes
@pytest.mark.parametrize(
    "estimator", [DoubleControlVariate(2), Rodeo(3), MuProp(), Rebar()], ids=repr
)
def test_hard_bits_are_independent(estimator, dtype):
    values = bits(estimator, dtype)
    hard = values if isinstance(estimator, (DoubleControlVariate, Rodeo)) else values[:1]
    theta = torch.tensor(BIT_LOGITS, dtype=torch.float64).sigmoid()
    for bit, prob in enumerate(theta):
        pair = torch.stack([1 - prob, prob])
        probs = pair
        for _ in range(len(hard) - 1):
            probs = (probs[:, None] * pair).flatten()
        assert chi_square(code(hard[..., bit], 2), probs) > 2e-5


@dtypes
@pytest.mark.parametrize(
    "estimator", [DoubleControlVariate(2), MuProp(), Rebar(), LocalExpectation()], ids=repr
)
def test_first_category_is_the_guides(estimator, dtype):
    first = categories(estimator, dtype)[0].argmax(-1)
    assert chi_square(first, LOGITS.softmax(-1)) > 2e-5


@pytest.mark.parametrize("theta", [0.1, 0.5, 0.8])
def test_double_control_variate_leaves_nothing_of_a_linear_cost(theta):
    estimator = DoubleControlVariate(2, learn=False)
    with torch.no_grad():
        estimator.alpha.fill_(-1.0)
    logits = torch.full((1000,), theta, dtype=DOUBLE).logit()
    draws = gradients(lambda b: 0.2 + 0.7 * b, logits, estimator)
    exact = torch.full_like(draws, 0.7 * theta * (1 - theta))
    torch.testing.assert_close(draws, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("estimator", ["variate", "rodeo", "rebar"])
def test_learnable_parts_descend_the_squared_estimate(estimator, vectorize):
    """Their gradient is that of the estimate's squared length, by central differences."""
    torch.manual_seed(0)
    make = {
        "variate": lambda: DoubleControlVariate(2),
        "rodeo": lambda: Rodeo(2, hidden=3),
        "rebar": lambda: Rebar(0.8),
    }[estimator]()
    make = make.double()
    with torch.no_grad():
        for parameter in make.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))

    def squared_length():
        program = BitSite(4)
        torch.manual_seed(3)
        gradient, _ = program.gradient(make, vectorize=vectorize)
        return (gradient**2).sum()

    make.zero_grad()
    squared_length()
    for parameter in make.parameters():
        found = parameter.grad.clone().flatten()[0]
        values = []
        for step_size in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.view(-1)[0] += step_size
                start = parameter.view(-1)[0].clone()
            values.append(squared_length())
            with torch.no_grad():
                parameter.view(-1)[0] = start - step_size
        # The loss is lowered: its gradient is that of the squared length itself.
        numeric = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close(found, numeric.to(found), rtol=1e-5, atol=1e-7)
        make.zero_grad()
        squared_length()
