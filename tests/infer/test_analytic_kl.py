"""Closed-form KL divergences change the noise, never the mean."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import (
    Problem,
    bit_values,
    draw_gradients,
    exact_gradient,
    relative_error,
    worst_z,
)
from programs import check, check_loss, constant, nested
from pyro import poutine

from pyro_gumbel.estimators import (
    Enumerate,
)
from pyro_gumbel.infer import Estimator_ELBO

DOUBLE = torch.float64


POINTS = torch.tensor([0.3, -1.0, 2.0, 0.8, -0.4], dtype=DOUBLE)


@pytest.mark.parametrize("choice", ["score", "auto", "enumerate"])
def test_analytic_kl_changes_noise_only(choice):
    """100 steps of 300 particles, both ways, on a chain whose terms it may replace."""
    problem = nested()
    estimator = Enumerate() if choice == "enumerate" else choice
    elbo, gradient = exact_gradient(problem)
    sampled, _ = draw_gradients(problem, estimator, 100, num_particles=300)
    closed, losses = draw_gradients(problem, estimator, 100, num_particles=300, analytic_kl=True)
    assert worst_z(closed, gradient) < 5
    assert worst_z(sampled, gradient) < 5
    assert relative_error(closed, gradient) < 0.02
    check_loss(losses, elbo)


def test_analytic_kl_is_exact_without_data():
    """The loss is the KL itself, at every draw."""
    p = torch.tensor([0.1, 0.2, 0.7], dtype=DOUBLE)
    q = torch.tensor([0.3, 0.4, 0.3], dtype=DOUBLE)

    def model():
        pyro.sample("z", dist.OneHotCategorical(p))

    def guide():
        pyro.sample("z", dist.OneHotCategorical(q))

    exact = (q * (q / p).log()).sum().item()
    losses = {Estimator_ELBO(analytic_kl=True).loss(model, guide) for _ in range(5)}
    assert len(losses) == 1
    assert losses.pop() == pytest.approx(exact, rel=1e-12)


def test_analytic_kl_only_where_model_and_guide_are_scaled_alike():
    """A tempered prior: 0.5 log p - log q has no KL divergence as its mean. 100 x 1,000 draws."""

    def model():
        with poutine.scale(scale=0.5):
            pyro.sample("z", dist.Bernoulli(constant(0.2, POINTS)))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l")))

    problem = Problem(model, guide, {"l": torch.tensor(0.3)}, {"z": bit_values(())})
    elbo, gradient = exact_gradient(problem)
    draws, losses = draw_gradients(problem, "auto", 100, num_particles=1000, analytic_kl=True)
    check(draws, gradient)
    check_loss(losses, elbo)


def test_analytic_kl_not_where_the_order_of_sites_differs():
    """In the guide b comes first, in the model a: a's KL given b would be one of another law."""

    def model():
        a = pyro.sample("a", dist.Bernoulli(constant(0.2, POINTS)))
        pyro.sample("b", dist.Bernoulli(0.1 + 0.7 * a))

    def guide():
        b = pyro.sample("b", dist.Bernoulli(logits=pyro.param("b_logit")))
        pyro.sample("a", dist.Bernoulli(logits=pyro.param("a_logit") + 2 * b))

    params = {"a_logit": torch.tensor(0.3), "b_logit": torch.tensor(-0.5)}
    problem = Problem(model, guide, params, {"a": bit_values(()), "b": bit_values(())})
    elbo, gradient = exact_gradient(problem)
    draws, losses = draw_gradients(problem, "auto", 100, num_particles=1000, analytic_kl=True)
    check(draws, gradient)
    check_loss(losses, elbo)
