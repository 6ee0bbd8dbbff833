"""Gradients of costs of bits, one for each element of a plate, and their variances."""

from __future__ import annotations

import pyro
import pyro.distributions as dist

from pyro_gumbel.infer import Estimator_ELBO, config_gradient

DRAWS = 100_000


def gradients(cost, logits, estimator, num_particles=1, event=False):
    """Gradients of ``E[cost(b)]``, one for each element of a plate; prior and guide cancel."""
    phi = logits.clone().requires_grad_()

    def law(phi):
        fn = dist.Bernoulli(logits=phi)
        return fn.to_event(1) if event else fn

    def model():
        with pyro.plate("copies", len(phi)):
            pyro.factor("cost", cost(pyro.sample("z", law(phi.detach()))))

    def guide():
        with pyro.plate("copies", len(phi)):
            pyro.sample("z", law(phi))

    elbo = Estimator_ELBO(num_particles, vectorize_particles=True, max_plate_nesting=1)
    elbo.loss_and_grads(model, config_gradient(guide, estimator))
    return -phi.grad


def check_variance(draws, mean, variance):
    """Compare mean and variance of 100,000 draws with their exact values."""
    assert abs(draws.mean() - mean) < 5 * draws.std() / len(draws) ** 0.5 + 1e-15
    squares = (draws - mean) ** 2
    error = squares.std() / len(draws) ** 0.5
    assert abs(squares.mean() - variance) < 5 * error + 1e-9 * variance + 1e-20
    assert error <= 0.02 * variance + 1e-20
