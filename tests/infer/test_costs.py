"""Closed-form KL divergences change the variance of the gradient and not its mean."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.problems import (
    Problem,
    bit_values,
    draw_gradients,
    exact_gradient,
    relative_error,
    worst_z,
)
from helpers.programs import check, check_loss, constant, nested
from pyro import poutine

from pyro_gumbel.estimators import (
    Enumerate,
)
from pyro_gumbel.infer import Estimator_ELBO

DOUBLE = torch.float64


POINTS = torch.tensor([0.3, -1.0, 2.0, 0.8, -0.4], dtype=DOUBLE)


@pytest.mark.parametrize("choice", ["score", "auto", "enumerate"])
def test_analytic_kl_changes_noise_only(choice):
    """Compare 100 steps of 300 particles with and without, on a chain with closed-form terms."""
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


def test_analytic_kl_needs_equal_scales_in_model_and_guide():
    """With a tempered prior the mean of log q - 0.5 log p is not a KL divergence."""

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


def test_analytic_kl_needs_the_same_order_of_sites():
    """The guide draws b first, and the model a. The KL of a given b has no closed form."""

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


@pytest.mark.parametrize("family", [dist.Categorical, dist.OneHotCategorical])
def test_an_impossible_category_leaves_a_gradient(family):
    logits = torch.tensor([0.4, -math.inf, -0.3], dtype=DOUBLE, requires_grad=True)
    prior = torch.tensor([0.5, 0.2, 0.3], dtype=DOUBLE)
    Estimator_ELBO(analytic_kl=True).loss_and_grads(
        lambda: pyro.sample("z", family(prior)), lambda: pyro.sample("z", family(logits=logits))
    )
    possible = logits.detach()[[0, 2]].requires_grad_()
    log_q = possible.log_softmax(-1)
    (log_q.exp() * (log_q - prior[[0, 2]].log())).sum().backward()
    torch.testing.assert_close(logits.grad[[0, 2]], possible.grad, rtol=1e-10, atol=0)
    assert logits.grad[1] == 0


@pytest.mark.parametrize("certain", [1.0, 0.0])
@pytest.mark.parametrize("given", ["logits", "probs"])
def test_a_certain_bit_leaves_a_gradient(given, certain):
    value = torch.tensor(certain if given == "probs" else math.inf * (2 * certain - 1))
    value.requires_grad_()
    loss = Estimator_ELBO(analytic_kl=True).loss_and_grads(
        lambda: pyro.sample("z", dist.Bernoulli(0.3)),
        lambda: pyro.sample("z", dist.Bernoulli(**{given: value})),
    )
    assert float(loss) == pytest.approx(-math.log(0.3 if certain else 0.7), rel=1e-6)
    assert value.grad.isfinite()


@pytest.mark.parametrize("family", [dist.Bernoulli, dist.Categorical, dist.OneHotCategorical])
@pytest.mark.parametrize("given", ["logits", "probs"])
def test_closed_forms_equal_those_of_torch(family, given):
    sizes = (3,) if family is dist.Bernoulli else (3, 4)
    pyro.set_rng_seed(0)
    q, p = torch.rand(2, *sizes, dtype=DOUBLE)
    q = q.requires_grad_()

    def program(parameter):
        with pyro.plate("n", 3):
            pyro.sample("z", family(**{given: parameter}))

    elbo = Estimator_ELBO(analytic_kl=True)
    loss = elbo.loss_and_grads(lambda: program(p), lambda: program(q))
    fns = (family(**{given: parameter}) for parameter in (q, p))
    exact = torch.distributions.kl_divergence(*fns).sum()
    assert float(loss) == pytest.approx(exact.item(), rel=1e-10)
    torch.testing.assert_close(q.grad, torch.autograd.grad(exact, q)[0], rtol=1e-8, atol=1e-12)


def folded(loc):
    return dist.FoldedDistribution(dist.Normal(torch.tensor(loc), 0.7))


def scaled_after_folding(loc):
    scaling = dist.transforms.AffineTransform(0.0, 2.0)
    return dist.TransformedDistribution(folded(loc), [scaling])


@pytest.mark.parametrize(
    ("q", "p"),
    [
        (folded(0.8), dist.HalfNormal(1.0)),
        (folded(0.8), folded(-0.8)),
        (scaled_after_folding(0.8), scaled_after_folding(0.3)),
    ],
    ids=["folded and half", "folded", "folded within"],
)
def test_kl_of_bases_needs_a_bijective_transform(q, p):
    """Otherwise the bases have another KL divergence, so the KL is estimated from draws."""

    def model():
        pyro.sample("z", p)

    def guide():
        pyro.sample("z", q)

    losses = []
    for analytic in (False, True):
        pyro.set_rng_seed(0)
        losses.append(Estimator_ELBO(analytic_kl=analytic).loss(model, guide))
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("q", "p"),
    [
        (dist.HalfNormal(0.7), dist.HalfNormal(1.0)),
        (dist.LogNormal(0.3, 0.7), dist.LogNormal(0, 1)),
    ],
    ids=["half normal", "log normal"],
)
def test_transformed_distributions_with_a_closed_form_keep_it(q, p):
    elbo = Estimator_ELBO(analytic_kl=True)
    losses = [elbo.loss(lambda: pyro.sample("z", p), lambda: pyro.sample("z", q)) for _ in "ab"]
    assert losses == pytest.approx([torch.distributions.kl_divergence(q, p).item()] * 2)
