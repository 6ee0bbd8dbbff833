"""Baselines: gradients as published, draw by draw, and exact variances."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.formulas import EXACT
from helpers.scored import DOUBLE, SIZE, Program, elbo_of
from torch import nn

from pyro_gumbel.estimators import LeaveOneOut, MovingAverage, NeuralBaseline, Score
from pyro_gumbel.infer import Estimator_ELBO


@pytest.mark.parametrize("num_particles", [2, 5])
def test_leave_one_out(vectorize, num_particles):
    """Element by element: 1 / (R - 1) sum_r (f_r - mean f) score_r."""
    program = Program()
    draws = program.step(elbo_of(num_particles, vectorize), Score(LeaveOneOut()))
    costs = program.costs(draws)
    centred = (costs - costs.mean(0)).unsqueeze(-1)
    expected = -(centred * program.scores(draws)).sum(0) / (num_particles - 1)
    torch.testing.assert_close(program.phi.grad, expected, **EXACT)


def test_moving_average(vectorize):
    """The baseline is the weighted mean of past steps, and zero in the first."""
    program, baseline = Program(), MovingAverage(decay=0.7)
    past = []
    for step in range(4):
        program.phi.grad = None
        draws = program.step(elbo_of(3, vectorize), Score(baseline))
        weights = [0.7 ** (step - 1 - s) for s in range(step)]
        total = sum(w * m for w, m in zip(weights, past, strict=True))
        expected = total / sum(weights) if past else 0.0
        torch.testing.assert_close(program.phi.grad, program.expect(draws, expected), **EXACT)
        past.append(program.costs(draws).mean())


def test_neural_baseline(vectorize):
    """The prediction is subtracted, and is trained by squared error."""
    program = Program()
    module = nn.Linear(4, 1).double()
    x = torch.randn(SIZE, 4, dtype=DOUBLE)
    draws = program.step(elbo_of(3, vectorize), Score(NeuralBaseline(module, "x")), x)
    prediction = module(x).squeeze(-1)
    expected = program.expect(draws, prediction.detach())
    torch.testing.assert_close(program.phi.grad, expected, **EXACT)
    loss = ((program.costs(draws) - prediction) ** 2).sum(-1).mean()
    for parameter in module.parameters():
        (grad,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        torch.testing.assert_close(parameter.grad, grad, **EXACT)


@pytest.mark.parametrize(
    "read",
    ["x", lambda x: x, lambda *args, **kwargs: args[0]],
    ids=["by_name", "by_callable", "by_position"],
)
def test_neural_baseline_reads_its_input(read):
    program = Program()
    module = nn.Linear(4, 1).double()
    x = torch.randn(SIZE, 4, dtype=DOUBLE)
    draws = program.step(elbo_of(2, vectorize=True), Score(NeuralBaseline(module, read)), x)
    expected = program.expect(draws, module(x).squeeze(-1).detach())
    torch.testing.assert_close(program.phi.grad, expected, **EXACT)


COPIES = 100_000
ODDS = [0.3, -1.5]  # near probability 1/2, where leave-one-out is at its best, and far from it


def log_joint_minus_log_q(bit, odds):
    z = torch.tensor(bit, dtype=DOUBLE)
    log_q = dist.Bernoulli(logits=torch.tensor(odds, dtype=DOUBLE)).log_prob(z)
    log_x = dist.Normal(2 * z - 1, 1.0).log_prob(torch.tensor(1.3, dtype=DOUBLE))
    return (math.log(0.5) + log_x - log_q).item()


def exact_variances(num_particles, odds):
    """Sum over the number of ones to get both estimates' variances."""
    theta = 1 / (1 + math.exp(-odds))
    cost, score = [log_joint_minus_log_q(bit, odds) for bit in (0.0, 1.0)], [-theta, 1 - theta]
    moments = {"plain": [0.0, 0.0], "leave_one_out": [0.0, 0.0]}
    for ones in range(num_particles + 1):
        weight = math.comb(num_particles, ones) * theta**ones
        weight *= (1 - theta) ** (num_particles - ones)
        counts = [num_particles - ones, ones]
        mean = sum(n * f for n, f in zip(counts, cost, strict=True)) / num_particles
        found = {
            "plain": sum(n * f * s for n, f, s in zip(counts, cost, score, strict=True))
            / num_particles,
            "leave_one_out": sum(
                n * (f - mean) * s for n, f, s in zip(counts, cost, score, strict=True)
            )
            / (num_particles - 1),
        }
        for name, value in found.items():
            moments[name][0] += weight * value
            moments[name][1] += weight * value**2
    return {name: second - first**2 for name, (first, second) in moments.items()}


def closed_forms(num_particles, odds):
    """Return the closed forms of the docstring of ``LeaveOneOut``."""
    theta = 1 / (1 + math.exp(-odds))
    at_zero, at_one = (log_joint_minus_log_q(bit, odds) for bit in (0.0, 1.0))
    v = theta * (1 - theta)
    centred = (1 - 2 * theta) ** 2 + 2 * v / (num_particles - 1)
    return {
        "plain": v / num_particles * (theta * at_zero + (1 - theta) * at_one) ** 2,
        "leave_one_out": v / num_particles * centred * (at_one - at_zero) ** 2,
    }


def gradients(estimator, num_particles, odds=ODDS[0]):
    """Return independent estimates, one for each copy."""
    odds = torch.full((COPIES,), odds, dtype=DOUBLE, requires_grad=True)

    def model():
        with pyro.plate("copies", COPIES):
            z = pyro.sample("z", dist.Bernoulli(torch.full((COPIES,), 0.5, dtype=DOUBLE)))
            pyro.sample("x", dist.Normal(2 * z - 1, 1.0), obs=torch.tensor(1.3, dtype=DOUBLE))

    def guide():
        with pyro.plate("copies", COPIES):
            pyro.sample("z", dist.Bernoulli(logits=odds))

    elbo = Estimator_ELBO(num_particles, vectorize_particles=True, default=estimator)
    elbo.loss_and_grads(model, guide)
    return odds.grad


def variance_z(draws, exact):
    squares = (draws - draws.mean()) ** 2
    return ((squares.mean() - exact) / (squares.std() / len(squares) ** 0.5)).abs().item()


@pytest.mark.parametrize("odds", [*ODDS, 0.0])
@pytest.mark.parametrize("num_particles", [2, 4, 16, 128])
def test_variances_of_a_bit_are_those_of_the_closed_forms(num_particles, odds):
    expected = pytest.approx(closed_forms(num_particles, odds), rel=1e-6)
    assert exact_variances(num_particles, odds) == expected


@pytest.mark.parametrize(
    ("odds", "num_particles", "ratio"),
    [(ODDS[0], 4, 5.9992), (ODDS[0], 16, 20.282), (ODDS[1], 4, 0.058569), (ODDS[1], 32, 0.071304)],
)
def test_leave_one_out_against_no_baseline(odds, num_particles, ratio):
    """With 100,000 estimates both variances and their ratio are exact."""
    exact = exact_variances(num_particles, odds)
    plain = gradients(Score(), num_particles, odds)
    centred = gradients(Score(LeaveOneOut()), num_particles, odds)
    assert variance_z(plain, exact["plain"]) < 5
    assert variance_z(centred, exact["leave_one_out"]) < 5
    assert exact["plain"] / exact["leave_one_out"] == pytest.approx(ratio, rel=1e-3)
    assert (plain.var() / centred.var()).item() == pytest.approx(ratio, rel=0.05)


def test_a_moving_average_lowers_the_variance_of_one_particle():
    """The first step has no past, so the second has the lower variance."""
    estimator = Score(MovingAverage(0.9))
    first, second = gradients(estimator, 1), gradients(estimator, 1)
    plain = gradients(Score(), 1)
    assert first.var() == pytest.approx(plain.var().item(), rel=0.05)
    assert second.var() < 0.5 * plain.var()
