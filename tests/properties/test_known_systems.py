"""Gumbel tricks, gradients, changes of variables and games, against known answers."""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from scipy import integrate
from torch import Tensor

import grammar
import sequence_gan
from control import Decisions
from pyro_gumbel.distributions import (
    ExpRelaxedOneHot,
    Gumbel,
    OneHot,
    RelaxedBernoulli,
    RelaxedOneHot,
    gumbel_noise,
)
from pyro_gumbel.estimators import LeaveOneOut, MovingAverage, Pathwise, Score
from pyro_gumbel.infer import Estimator_ELBO, config_gradient
from two_gradients import A, B, gaussian_kl, gradients

DOUBLE = torch.float64


# The Gumbel distribution


@pytest.mark.parametrize(("loc", "scale"), [(0.0, 1.0), (-1.5, 0.4), (30.0, 7.0)])
def test_gumbel_against_scipy(loc: float, scale: float) -> None:
    ours = Gumbel(torch.tensor(loc, dtype=DOUBLE), torch.tensor(scale, dtype=DOUBLE))
    theirs = scipy.stats.gumbel_r(loc, scale)
    value = torch.linspace(loc - 3 * scale, loc + 20 * scale, 101, dtype=DOUBLE)
    level = torch.linspace(1e-6, 1 - 1e-6, 101, dtype=DOUBLE)
    np.testing.assert_allclose(ours.log_prob(value), theirs.logpdf(value), rtol=1e-10)
    np.testing.assert_allclose(ours.cdf(value), theirs.cdf(value), rtol=1e-10)
    np.testing.assert_allclose(ours.icdf(level), theirs.ppf(level), rtol=1e-10)
    draws = ours.sample((20_000,)).numpy()
    assert scipy.stats.kstest(draws, theirs.cdf).pvalue > 2e-5


# The Gumbel-max trick


def count(logits: Tensor, draws: int) -> Tensor:
    counts = torch.zeros_like(logits)
    for size in [500] * (draws // 500):
        index = (logits + gumbel_noise((size, *logits.shape), logits.dtype, logits.device)).argmax(
            -1
        )
        counts += torch.bincount(index, minlength=len(logits))
    return counts


@pytest.mark.parametrize("kind", ["logits", "classes", "words"])
def test_arg_max_is_a_softmax_draw(kind: str) -> None:
    pyro.set_rng_seed(7)
    if kind == "logits":
        logits, draws = torch.tensor([1.0, 0.0, -1.0, 0.5, 2.0]), 100_000
    elif kind == "classes":  # x'theta
        logits, draws = torch.randn(4) @ torch.randn(4, 6), 100_000
    else:  # u'v, a vocabulary of word vectors
        logits, draws = torch.randn(50_000, 40) @ torch.randn(40) / 3, 2_000
    counts, probs = count(logits, draws), logits.softmax(-1).double()
    # Rare words are pooled with the rest, so that each class is expected ten times at least.
    common = probs * draws >= 10
    observed = torch.cat([counts[common].double(), counts[~common].sum()[None].double()])
    expected = torch.cat([probs[common], probs[~common].sum()[None]]) * draws
    used = expected > 0
    pvalue = scipy.stats.chisquare(observed[used], expected[used] * draws / expected.sum()).pvalue
    assert pvalue > 2e-5


def test_the_largest_of_many_is_below_a_value() -> None:
    """P(max over i != k of Z_i <= z) is a product of distribution functions."""
    locs = torch.tensor([0.3, -1.0, 0.8])
    draws = Gumbel(locs).sample((100_000,)).amax(-1)
    for z in (0.0, 1.0, 2.5):
        exact = Gumbel(locs).cdf(torch.tensor(z)).prod().item()
        error = math.sqrt(exact * (1 - exact) / len(draws))
        assert abs((draws <= z).float().mean().item() - exact) < 5 * error


# The score function on a trajectory


@pytest.mark.parametrize(
    ("baseline", "particles"), [(None, 1), (MovingAverage(), 1), (LeaveOneOut(), 4)], ids=repr
)
def test_policy_gradient_against_enumeration(baseline: Any, particles: int) -> None:
    task = Decisions(states=3, actions=2, horizon=3)
    with torch.no_grad():
        task.logits.copy_(torch.randn(3, 2, generator=torch.Generator().manual_seed(1)))
    (exact,) = torch.autograd.grad(task.value(task.logits), task.logits)
    elbo = Estimator_ELBO(particles, vectorize_particles=True, max_plate_nesting=1)
    guide = config_gradient(task.guide, Score(baseline))
    draws, episodes = [], 800
    for _ in range(60):
        task.logits.grad = None
        elbo.loss_and_grads(task.model, guide, task.first_states(episodes))
        draws.append(-task.logits.grad / episodes)
    drawn = torch.stack(draws[1:])  # the first step of a moving average has no past
    error = drawn.std(0) / len(drawn) ** 0.5
    assert ((drawn.mean(0) - exact).abs() < 5 * error).all()
    assert (error < 0.05 * exact.norm()).all()


def test_a_learnt_policy_is_the_best_one() -> None:
    task = Decisions()
    elbo = Estimator_ELBO(4, vectorize_particles=True, max_plate_nesting=1)
    guide = config_gradient(task.guide, Score(LeaveOneOut()))
    svi = pyro.infer.SVI(task.model, guide, pyro.optim.Adam({"lr": 0.2}), elbo)
    first = task.value(task.logits).item()
    for _ in range(80):
        svi.step(task.first_states(16))
    gained = task.value(task.logits).item() - first
    assert gained > 0.95 * (task.best_value() - first)


# Two gradients of one expectation


@pytest.mark.parametrize("theta", [-2.0, -B / A, 1.0])
@pytest.mark.parametrize("label", ["score, no baseline", "score, leave-one-out of 4", "pathwise"])
def test_both_gradients_are_the_exact_one(label: str, theta: float) -> None:
    drawn = gradients(theta, label, 50_000).double()
    error = drawn.std() / len(drawn) ** 0.5
    assert abs(drawn.mean() - 2 * A * (A * theta + B)) < 5 * error


def test_variances_of_both_gradients_are_those_of_the_closed_forms() -> None:
    """With f = z^2, m = a theta + b: pathwise 2 a z has 4 a^2; z^2 a (z - m) has more."""
    theta = 1.0
    m = A * theta + B
    pathwise = gradients(theta, "pathwise", 100_000).double().var().item()
    # The variance of a sample's variance is (kurtosis - 1) v^2 / n; a normal's kurtosis is 3.
    assert abs(pathwise - 4 * A**2) < 5 * 4 * A**2 * (2 / 100_000) ** 0.5
    # Moments of e ~ N(0, 1) in a (m + e)^2 e, minus the square of the mean.
    second = A**2 * (m**4 + 6 * m**2 * 3 + 15)
    score = gradients(theta, "score, no baseline", 400_000).double().var().item()
    assert score == pytest.approx(second - (2 * A * m) ** 2, rel=0.05)


def test_descent_by_pathwise_gradients_stops_at_the_optimum() -> None:
    theta = torch.tensor([2.0], requires_grad=True)

    def guide() -> None:
        pyro.sample("z", dist.Normal(A * theta + B, 1.0).to_event(1))

    def model() -> None:
        z = pyro.sample("z", dist.Normal((A * theta + B).detach(), 1.0).to_event(1))
        pyro.factor("cost", -(z**2).sum(-1))

    elbo = Estimator_ELBO(100, vectorize_particles=True, max_plate_nesting=0)
    configured = config_gradient(guide, Pathwise(sticking_the_landing=True))
    for _ in range(100):
        theta.grad = None
        elbo.loss_and_grads(model, configured)
        with torch.no_grad():
            theta -= 0.05 * theta.grad
    # The last iterate's sd is about sqrt(lr / 2 * variance / curvature).
    sd = math.sqrt(0.05 / 2 * (4 * A**2 / 100) / (2 * A**2))
    assert abs(theta.item() + B / A) < 5 * sd


# Change of variables


def test_relaxed_bit_is_a_logistic_moved_by_autograds_jacobian() -> None:
    temperature, log_odds = 0.7, 0.4
    y = torch.linspace(0.01, 0.99, 99, dtype=DOUBLE, requires_grad=True)
    noise = temperature * y.logit() - log_odds
    (slope,) = torch.autograd.grad(noise.sum(), y)
    expected = scipy.stats.logistic.logpdf(noise.detach()) + slope.abs().log().numpy()
    ours = RelaxedBernoulli(temperature, logits=torch.tensor(log_odds, dtype=DOUBLE))
    np.testing.assert_allclose(ours.log_prob(y.detach()), expected, rtol=1e-10)


@pytest.mark.parametrize("categories", [2, 3, 5])
def test_simplex_and_log_simplex_differ_by_the_jacobian(categories: int) -> None:
    """From log ratios to the first coordinates of the simplex."""
    logits = torch.randn(categories, dtype=DOUBLE)
    ratios = torch.randn(categories - 1, dtype=DOUBLE)

    def simplex(ratios: Tensor) -> Tensor:
        return torch.nn.functional.pad(ratios, (0, 1)).softmax(-1)

    jacobian = torch.autograd.functional.jacobian(lambda r: simplex(r)[:-1], ratios)
    value = simplex(ratios)
    log_law = ExpRelaxedOneHot(0.6, logits=logits).log_prob(value.log())
    law = RelaxedOneHot(0.6, logits=logits).log_prob(value)
    torch.testing.assert_close(law, log_law - jacobian.slogdet().logabsdet)


# The auto-encoder's bound


@pytest.mark.parametrize("analytic", [False, True], ids=["sampled KL", "closed-form KL"])
def test_elbo_of_a_linear_gaussian_model(analytic: bool) -> None:
    """The bound is E[log P(x | z)] - KL(Q(z | x) || N(0, 1)), and log P(x) at the posterior."""
    x, weight = torch.tensor([0.5, -1.2, 2.0], dtype=DOUBLE), 0.8

    def model() -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=DOUBLE), 1.0))
            pyro.sample("x", dist.Normal(weight * z, 1.0), obs=x)

    def guide(loc: Tensor, scale: Tensor) -> None:
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(loc, scale))

    elbo = Estimator_ELBO(500, vectorize_particles=True, max_plate_nesting=1, analytic_kl=analytic)

    def losses(loc: Tensor, scale: Tensor) -> Tensor:
        configured = [elbo.loss(lambda *_: model(), guide, loc, scale) for _ in range(20)]
        return torch.tensor(configured, dtype=DOUBLE)

    loc, scale = 0.3 * x, torch.full((3,), 0.6, dtype=DOUBLE)
    fit = -0.5 * ((x - weight * loc) ** 2 + (weight * scale) ** 2 + math.log(2 * math.pi))
    kl = 0.5 * (scale**2 + loc**2 - 1 - 2 * scale.log())
    drawn = losses(loc, scale)
    error = drawn.std() / 20**0.5
    assert abs(drawn.mean() + (fit - kl).sum()) < 5 * error
    precision = 1 + weight**2
    posterior = weight * x / precision, torch.full((3,), precision**-0.5, dtype=DOUBLE)
    evidence = dist.Normal(torch.zeros_like(x), precision**0.5).log_prob(x).sum()
    at_best = losses(*posterior)
    assert abs(at_best.mean() + evidence) < 5 * at_best.std() / 20**0.5 + 1e-9


def test_closed_form_kl_of_one_hot_latents() -> None:
    q, p = torch.tensor([0.2, 0.5, 0.3], dtype=DOUBLE), torch.tensor([0.6, 0.3, 0.1], dtype=DOUBLE)
    expected = (q * (q / p).log()).sum()
    elbo = Estimator_ELBO(analytic_kl=True)
    loss = elbo.loss(lambda: pyro.sample("z", OneHot(p)), lambda: pyro.sample("z", OneHot(q)))
    assert loss == pytest.approx(expected.item(), rel=1e-9)


# The KL divergence of Gaussians


def test_gaussian_kl_of_full_covariances() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(2, 4, 4, generator=generator, dtype=DOUBLE)
    cov1, cov2 = factors @ factors.mT + 0.3 * torch.eye(4, dtype=DOUBLE)
    mean1, mean2 = torch.randn(2, 4, generator=generator, dtype=DOUBLE)
    p, q = dist.MultivariateNormal(mean1, cov1), dist.MultivariateNormal(mean2, cov2)
    exact = gaussian_kl(mean1, cov1, mean2, cov2)
    torch.testing.assert_close(exact, torch.distributions.kl_divergence(p, q))
    draws = p.sample((100_000,))
    ratio = p.log_prob(draws) - q.log_prob(draws)
    assert abs(ratio.mean() - exact) < 5 * ratio.std() / len(ratio) ** 0.5


def test_gaussian_kl_of_a_diagonal_to_the_standard_one() -> None:
    loc, scale = torch.tensor([0.3, -1.0], dtype=DOUBLE), torch.tensor([0.5, 2.0], dtype=DOUBLE)
    simple = 0.5 * (scale**2 + loc**2 - 1 - (scale**2).log()).sum()
    zero, one = torch.zeros(2, dtype=DOUBLE), torch.eye(2, dtype=DOUBLE)
    torch.testing.assert_close(gaussian_kl(loc, (scale**2).diag(), zero, one), simple)
    elbo = Estimator_ELBO(analytic_kl=True)
    loss = elbo.loss(
        lambda: pyro.sample("z", dist.Normal(zero, 1.0).to_event(1)),
        lambda: pyro.sample("z", dist.Normal(loc, scale).to_event(1)),
    )
    assert loss == pytest.approx(simple.item(), rel=1e-9)


# The Concrete distribution


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_relaxed_density_integrates_to_one(temperature: float) -> None:
    two = RelaxedOneHot(temperature, logits=torch.tensor([0.4, -0.3], dtype=DOUBLE))

    def density(log_odds: float) -> float:
        y = torch.sigmoid(torch.tensor([log_odds, -log_odds], dtype=DOUBLE))
        return (two.log_prob(y).exp() * y.prod()).item()  # dy = y (1 - y) d log-odds

    total, _ = integrate.quad(density, -30 / temperature, 30 / temperature, limit=200)
    assert total == pytest.approx(1, abs=1e-6)
    three = RelaxedOneHot(temperature, logits=torch.tensor([0.4, -0.3, 1.0], dtype=DOUBLE))
    half = 28 / temperature
    line = torch.linspace(-half, half, 1601, dtype=DOUBLE)
    first, second = torch.meshgrid(line, line, indexing="ij")
    y = torch.stack([first, second, torch.zeros_like(first)], -1).softmax(-1)
    inside = (y > 1e-300).all(-1)
    weight = three.log_prob(y[inside]).exp() * y[inside].prod(-1)
    assert (weight.sum() * (line[1] - line[0]) ** 2).item() == pytest.approx(1, abs=1e-4)


def test_relaxed_density_at_temperature_one_depends_on_the_value() -> None:
    """(n - 1)! prod_k e^mu_k x_k^-2 / sum_i e^mu_i x_i^-1."""
    mu = torch.tensor([0.4, -0.3, 1.0], dtype=DOUBLE)
    x = torch.tensor([[0.2, 0.3, 0.5], [0.7, 0.2, 0.1]], dtype=DOUBLE)
    factors = mu.exp() * x**-2 / (mu.exp() / x).sum(-1, keepdim=True)
    torch.testing.assert_close(
        RelaxedOneHot(1.0, logits=mu).log_prob(x).exp(), 2 * factors.prod(-1)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_limits_of_the_temperature(dtype: torch.dtype) -> None:
    logits = torch.tensor([0.4, -0.3, 1.0], dtype=dtype)
    draws = 50_000
    cold, hot = (RelaxedOneHot(t, logits=logits).sample((draws,)) for t in (1e-3, 1e3))
    probs = logits.softmax(-1)
    error = (probs * (1 - probs) / draws).sqrt()
    # A draw is off a corner where two perturbed logits are closer than a few temperatures.
    assert (cold.amax(-1) < 0.99).double().mean() < 0.02
    assert ((cold.round().mean(0) - probs).abs() < 5 * error + 0.01).all()
    assert (hot - 1 / 3).abs().max() < 0.02


def test_straight_through_is_hard_forward_and_soft_backward() -> None:
    logits = torch.tensor([0.4, -0.3, 1.0], dtype=DOUBLE, requires_grad=True)
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE)
    state = torch.get_rng_state()
    hard = RelaxedOneHot(0.5, logits=logits, straight_through=True).rsample()
    torch.set_rng_state(state)
    soft = RelaxedOneHot(0.5, logits=logits).rsample()
    assert sorted(hard.tolist()) == [0, 0, 1]
    assert hard.argmax() == soft.argmax()
    (backward,) = torch.autograd.grad((hard * weight).sum(), logits)
    (expected,) = torch.autograd.grad((soft * weight).sum(), logits)
    torch.testing.assert_close(backward, expected)


# An adversarial game with discrete strings


def test_the_language_is_what_its_grammar_draws() -> None:
    strings, probs = grammar.all_strings()
    assert len(set(strings)) == 1365
    assert probs.sum().item() == pytest.approx(1, abs=1e-6)
    assert grammar.decode(grammar.encode(strings)) == strings
    generator = torch.Generator().manual_seed(0)

    def operators() -> int:
        """Rewrite S until none is left; count the operators."""
        open_symbols, used = 1, 0
        while open_symbols and used <= grammar.MAX_OPERATORS:
            if torch.rand((), generator=generator) < grammar.STOP:
                open_symbols -= 1
            else:
                open_symbols, used = open_symbols + 1, used + 1
        return used

    drawn = [k for k in (operators() for _ in range(5000)) if k <= grammar.MAX_OPERATORS]
    counts = np.bincount(drawn, minlength=grammar.MAX_OPERATORS + 1)
    lengths = torch.tensor([s.count("x") - 1 for s in strings])
    expected = [probs[lengths == k].sum().item() * len(drawn) for k in range(len(counts))]
    assert (
        scipy.stats.chisquare(counts, np.array(expected) * counts.sum() / sum(expected)).pvalue
        > 2e-5
    )


def test_the_generators_probabilities_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "LENGTH", 3)
    generator = sequence_gan.Generator(8)
    symbols = len(grammar.ALPHABET)
    index = torch.cartesian_prod(*[torch.arange(symbols)] * 3)
    tokens = torch.nn.functional.one_hot(index, symbols).float()
    probs = generator.log_prob(tokens).exp().detach()
    assert probs.sum().item() == pytest.approx(1, abs=1e-5)
    game = sequence_gan.Game(8, 20_000)
    game.generator = generator
    drawn = game.guide().argmax(-1)
    counts = torch.bincount((drawn * torch.tensor([36, 6, 1])).sum(-1), minlength=216)
    possible = probs > 1e-12
    assert counts[~possible].sum() == 0
    expected = probs[possible].double() / probs[possible].double().sum() * 20_000
    assert scipy.stats.chisquare(counts[possible], expected).pvalue > 2e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyro_gumbel.infer.GradientWarning")  # as the example does
def test_the_adversarial_game_is_won() -> None:
    pyro.enable_validation(False)
    args = argparse.Namespace(
        steps=1000,
        critic_steps=1,
        batch_size=256,
        data_size=5000,
        hidden=64,
        lr=1e-3,
        critic_lr=1e-3,
        penalty=1.0,
        measure_every=1000,
    )
    last = sequence_gan.train(args, "reinmax", 0)[-1]
    assert last["valid"] > 0.9
    assert last["variation"] < 0.2
