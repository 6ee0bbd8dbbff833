"""Values declared dependent, masked, or drawn in the guide alone. Against exact gradients."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.problems import (
    Problem,
    bit_values,
    draw_gradients,
    exact_gradient,
    one_hot_values,
    relative_error,
    worst_z,
)
from helpers.programs import check, check_loss, constant

from pyro_gumbel.estimators import (
    Enumerate,
    LeaveOneOut,
    Score,
)
from pyro_gumbel.infer._costs import Costs

DOUBLE = torch.float64


POINTS = torch.tensor([0.3, -1.0, 2.0, 0.8, -0.4], dtype=DOUBLE)


@pytest.mark.parametrize("family", ["one_hot", "bernoulli", "categorical"])
def test_to_event(family):
    """Two latents declared dependent share one cost. 100 steps of 1,000 particles."""
    make = {
        "one_hot": lambda logits: dist.OneHotCategorical(logits=logits),
        "bernoulli": lambda logits: dist.Bernoulli(logits=logits[..., 0]),
        "categorical": lambda logits: dist.Categorical(logits=logits),
    }[family]
    weight = torch.tensor([[0.5, -1.0], [1.5, 0.3]], dtype=DOUBLE)

    def number(z):
        return z @ constant([0.2, 1.0, -0.7], weight) if family == "one_hot" else z.to(DOUBLE)

    def model():
        with pyro.plate("n", 2):
            prior = constant([0.3, -0.4, 0.8], weight).expand(2, 2, 3)
            z = pyro.sample("z", make(prior).to_event(1))
            mean = (number(z) * weight).sum(-1) ** 2
            pyro.sample("x", dist.Normal(mean, 1.0), obs=constant([1.0, -0.5], weight))

    def guide():
        with pyro.plate("n", 2):
            pyro.sample("z", make(pyro.param("logits")).to_event(1))

    generator = torch.Generator().manual_seed(0)
    params = {"logits": torch.randn(2, 2, 3, generator=generator, dtype=DOUBLE)}
    indices = [v.reshape(2, 2) for v in torch.cartesian_prod(*[torch.arange(3.0)] * 4)]
    supports = {
        "one_hot": one_hot_values((2, 2), 3),
        "bernoulli": bit_values((2, 2)),
        "categorical": indices,
    }[family]
    problem = Problem(model, guide, params, {"z": supports})
    elbo, gradient = exact_gradient(problem)
    draws, losses = draw_gradients(problem, Score(LeaveOneOut()), 100, num_particles=1000)
    check(draws, gradient)
    check_loss(losses, elbo)


@pytest.mark.parametrize("vectorize", [False, True])
def test_enumerate_under_a_to_event_of_one(vectorize):
    """An event of a single variable has a support to sum over; its shape must be kept."""

    def model():
        with pyro.plate("n", 2):
            prior = torch.tensor([[0.2], [0.7]], dtype=DOUBLE)
            z = pyro.sample("z", dist.Bernoulli(prior).to_event(1))
            pyro.sample("x", dist.Normal(2 * z[..., 0], 1.0), obs=prior[:, 0])

    def guide():
        with pyro.plate("n", 2):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("logits")).to_event(1))

    params = {"logits": torch.tensor([[0.3], [-0.8]])}
    problem = Problem(model, guide, params, {"z": bit_values((2, 1))})
    elbo, gradient = exact_gradient(problem)
    draws, losses = draw_gradients(problem, Enumerate(), 1, num_particles=2, vectorize=vectorize)
    torch.testing.assert_close(draws[0], gradient, rtol=1e-10, atol=1e-10)
    assert losses[0].item() == pytest.approx(-elbo, rel=1e-12)


def test_masked_distributions():
    """A mask on the distribution changes its score, never its law. 100 x 1,000 draws."""
    mask = torch.tensor([True, False])

    def model():
        with pyro.plate("n", 2):
            z = pyro.sample("z", dist.Bernoulli(constant([0.3, 0.6], POINTS)).mask(mask))
            pyro.sample("x", dist.Normal(2 * z, 1.0), obs=POINTS[:2])

    def guide():
        with pyro.plate("n", 2):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("logits")).mask(mask))

    params = {"logits": torch.tensor([0.3, -0.8])}
    problem = Problem(model, guide, params, {"z": bit_values((2,))})
    elbo, gradient = exact_gradient(problem)
    draws, losses = draw_gradients(problem, Score(LeaveOneOut()), 100, num_particles=1000)
    check(draws, gradient)
    check_loss(losses, elbo)
    found, _ = draw_gradients(problem, Enumerate(), 1)
    torch.testing.assert_close(found[0], gradient, rtol=1e-10, atol=1e-10)


def auxiliary():
    """The auxiliary site's law depends on z, so its term belongs to z's cost."""

    def model():
        w = pyro.param("w")
        z = pyro.sample("z", dist.Bernoulli(constant(0.3, w)))
        pyro.sample("x", dist.Normal(w * (2 * z - 1), 1.0), obs=constant(1.3, w))

    def guide():
        z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("z_logit")))
        u = dist.Bernoulli(logits=pyro.param("u_logit") + 3 * z)
        pyro.sample("u", u, infer={"is_auxiliary": True})

    params = {
        "w": torch.tensor(1.0),
        "z_logit": torch.tensor(0.3),
        "u_logit": torch.tensor(-1.0),
    }
    supports = {"z": bit_values(()), "u": bit_values(())}
    return Problem(model, guide, params, supports)


@pytest.mark.parametrize(
    "estimator",
    ["auto", {"z": Score(LeaveOneOut()), "u": Enumerate()}, {"z": Enumerate(), "u": Score()}],
    ids=["auto", "enumerate_auxiliary", "enumerate_first"],
)
def test_auxiliary_sites(estimator):
    """100 steps of 1,000 particles."""
    problem = auxiliary()
    elbo, gradient = exact_gradient(problem)
    draws, losses = draw_gradients(problem, estimator, 100, num_particles=1000)
    check(draws, gradient)
    check_loss(losses, elbo)


def test_dropping_the_auxiliary_term_is_caught(monkeypatch):
    """The planted error: the cost leaves out what the guide alone has."""
    whole = Costs.downstream

    def without(self, *args, **kwargs):
        terms = [term for term in self.terms if term.site != "u"]
        assert len(terms) < len(self.terms)
        return whole(Costs(terms, self.enumerated, self.layout), *args, **kwargs)

    monkeypatch.setattr(Costs, "downstream", without)
    problem = auxiliary()
    _, gradient = exact_gradient(problem)
    draws, _ = draw_gradients(problem, "auto", 100, num_particles=1000)
    assert relative_error(draws, gradient) < 0.02
    assert worst_z(draws, gradient) > 5
