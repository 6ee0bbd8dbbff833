"""Unbiased estimators against enumeration, and the same check on planted errors.

Every check states the number of draws, asks for ``|z| < 5`` in every coordinate, and that the
standard error of the mean gradient is below 2 % of the exact gradient's norm, so that an error of
that size would be seen. The planted errors must fail it.
"""

from __future__ import annotations

import functools

import pytest
import torch
from helpers.problems import draw_gradients, exact_gradient, relative_error, worst_z
from helpers.programs import CHAIN_EVENT_DIMS, LOCAL, SIZE, chain, copies, copy_gradients
from torch import nn

from pyro_gumbel.estimators import (
    Enumerate,
    LeaveOneOut,
    MovingAverage,
    NeuralBaseline,
    Score,
)
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

DOUBLE = torch.float64


@functools.cache
def exact(family):
    return exact_gradient(chain(family))


class Constant(nn.Module):
    """A poor baseline, and so a sharp test of what must not depend on it."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(-2.0))

    def forward(self, *args, **kwargs):
        return self.value


def mixed():
    return {"a": Score(LeaveOneOut()), "b": Score(MovingAverage()), "c": Enumerate()}


CHOICES = {
    "auto": lambda: "auto",
    "score": Score,
    "leave_one_out": lambda: Score(LeaveOneOut()),
    "moving_average": lambda: Score(MovingAverage()),
    "neural_baseline": lambda: Score(NeuralBaseline(Constant(), Constant())),
    "enumerate_first": lambda: {"a": Enumerate(), "b": Score(LeaveOneOut()), "c": Score()},
    "enumerate_middle": lambda: {"a": Score(), "b": Enumerate(), "c": Score(LeaveOneOut())},
    "enumerate_last": mixed,
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("family", [name for name in LOCAL if name != "poisson"])
def test_chain_with_scale_and_mask(family, choice):
    """40 steps of 2,500 particles."""
    elbo, gradient = exact(family)
    draws, losses = draw_gradients(chain(family), CHOICES[choice](), 40, num_particles=2500)
    assert relative_error(draws, gradient) < 0.02
    assert worst_z(draws, gradient) < 5
    assert worst_z(losses[:, None], torch.tensor([-elbo])) < 5


@pytest.mark.parametrize("choice", ["score", "leave_one_out", "enumerate_first", "enumerate_last"])
def test_counts(choice):
    """40 steps of 7,000 particles; the heavy tail of a squared count needs them."""
    elbo, gradient = exact("poisson")
    draws, losses = draw_gradients(chain("poisson"), CHOICES[choice](), 40, num_particles=7000)
    assert relative_error(draws, gradient) < 0.02
    assert worst_z(draws, gradient) < 5
    assert worst_z(losses[:, None], torch.tensor([-elbo])) < 5


@pytest.mark.parametrize("choice", ["leave_one_out", "enumerate_last"])
def test_float32(choice):
    """40 steps of 2,500 particles."""
    elbo, gradient = exact("one_hot")
    draws, losses = draw_gradients(
        chain("one_hot"), CHOICES[choice](), 40, num_particles=2500, dtype=torch.float32
    )
    assert relative_error(draws, gradient) < 0.02
    assert worst_z(draws, gradient) < 5
    assert worst_z(losses[:, None], torch.tensor([-elbo])) < 5


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("family", ["one_hot", "categorical", "bernoulli"])
def test_enumerate_is_exact(family, vectorize):
    elbo, gradient = exact(family)
    draws, losses = draw_gradients(
        chain(family), Enumerate(), 1, num_particles=2, vectorize=vectorize
    )
    torch.testing.assert_close(draws[0], gradient, rtol=1e-10, atol=1e-10)
    assert losses[0].item() == pytest.approx(-elbo, rel=1e-12)


# Copies: each gives an estimate from few particles, as users take them.


def copied_draws(estimator, *, num_particles, vectorize=True, number=40_000, dtype=DOUBLE):
    problem = copies(chain("one_hot"), CHAIN_EVENT_DIMS, number)
    elbo = Estimator_ELBO(
        num_particles=num_particles, vectorize_particles=vectorize, max_plate_nesting=2
    )
    return copy_gradients(problem, config_gradient(problem.guide, estimator), elbo, dtype)


def passes(draws, gradient):
    """The check of this file."""
    assert relative_error(draws, gradient) < 0.02
    return worst_z(draws, gradient) < 5


@pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorised"])
@pytest.mark.parametrize(
    ("choice", "num_particles"),
    [("score", 1), ("score", 3), ("leave_one_out", 2), ("leave_one_out", 4), ("auto", 2)],
)
def test_few_particles(choice, num_particles, vectorize):
    """40,000 independent estimates."""
    draws = copied_draws(CHOICES[choice](), num_particles=num_particles, vectorize=vectorize)
    assert passes(draws, exact("one_hot")[1])


@pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorised"])
def test_enumerate_between_scores_with_few_particles(vectorize):
    """40,000 independent estimates."""
    draws = copied_draws(CHOICES["enumerate_middle"](), num_particles=2, vectorize=vectorize)
    assert passes(draws, exact("one_hot")[1])


def test_few_particles_float32():
    """40,000 independent estimates."""
    draws = copied_draws(Score(LeaveOneOut()), num_particles=2, dtype=torch.float32)
    assert passes(draws, exact("one_hot")[1])


# Planted errors.


class OwnDraw(LeaveOneOut):
    """The mean over all particles, the particle's own cost included."""

    def forward(self, site):
        return site.cost[0].mean(0), None


class WrongNeighbours(LeaveOneOut):
    """The others' sum over R in place of R - 1: fine, for a constant shrinks it; see below."""

    def forward(self, site):
        cost = site.cost[0]
        return (cost.sum(0) - cost) / cost.shape[0], None


class AttachedBaseline(LeaveOneOut):
    """A baseline that is a function of the draw and carries a gradient."""

    def forward(self, site):
        return site.log_prob, None


class AttachedCost(Score):
    """The cost's own gradient passes through the surrogate."""

    def surrogate(self, site):
        return site.live_cost[0] * site.log_prob


class WrongDivisor(Score):
    """Particles averaged by R - 1."""

    def surrogate(self, site):
        size = site.cost.shape[1]
        return super().surrogate(site) * size / (size - 1)


class ScaledScore(Score):
    """The score scaled like the cost."""

    def surrogate(self, site):
        return 1.7 * super().surrogate(site)


PLANTED = {
    "own_draw": lambda: Score(OwnDraw()),
    "attached_baseline": lambda: Score(AttachedBaseline()),
    "attached_cost": AttachedCost,
    "wrong_divisor": lambda: WrongDivisor(LeaveOneOut()),
    "scaled_score": lambda: ScaledScore(LeaveOneOut()),
}


@pytest.mark.parametrize("error", PLANTED)
def test_planted_error_is_caught(error):
    draws = copied_draws(PLANTED[error](), num_particles=3)
    assert not passes(draws, exact("one_hot")[1])


def test_a_baseline_may_be_wrong_without_bias():
    """The sharpness above is not that of a check that refuses everything unusual."""
    draws = copied_draws(Score(WrongNeighbours()), num_particles=3)
    assert passes(draws, exact("one_hot")[1])


def test_the_plate_has_elements_of_its_own():
    """The plate has two elements, is scaled, and has one element masked."""
    gradient = exact("one_hot")[1]
    assert gradient.numel() == 1 + 3 + 3 + SIZE * 3 + 1
    assert gradient.abs().max() > 1
