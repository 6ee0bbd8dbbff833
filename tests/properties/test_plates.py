"""Plates, events, masks and auxiliary sites, against exact gradients."""

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
from helpers.programs import check, check_loss, constant, nested

from pyro_gumbel.estimators import (
    Enumerate,
    LeaveOneOut,
    MovingAverage,
    NeuralBaseline,
    Score,
)
from pyro_gumbel.infer import Estimator_ELBO, config_gradient
from pyro_gumbel.infer._costs import Costs

DOUBLE = torch.float64
POINTS = torch.tensor([0.3, -1.0, 2.0, 0.8, -0.4], dtype=DOUBLE)


@pytest.mark.parametrize(
    "estimator",
    ["auto", {"g": Enumerate(), "h": Score(LeaveOneOut())}, {"g": Score(), "h": Enumerate()}],
    ids=["auto", "enumerate_outer", "enumerate_inner"],
)
def test_nested_plates(estimator):
    """100 steps of 1,000 particles; each element's cost is its own."""
    problem = nested()
    elbo, gradient = exact_gradient(problem)
    draws, losses = draw_gradients(problem, estimator, 100, num_particles=1000)
    check(draws, gradient)
    check_loss(losses, elbo)


def test_a_plates_elements_are_not_charged_with_each_others_costs():
    """Exactly: with other elements' data moved far away, its draws give what they gave."""
    gradients = []
    for far in (0.0, 1e6):
        pyro.set_rng_seed(3)
        phi = torch.zeros(4, dtype=DOUBLE, requires_grad=True)
        data = torch.tensor([0.3, 1.0, -0.5, far], dtype=DOUBLE)

        def model(data=data):
            with pyro.plate("n", 4):
                z = pyro.sample("z", dist.Bernoulli(torch.full((4,), 0.3, dtype=DOUBLE)))
                pyro.sample("x", dist.Normal(z, 1.0), obs=data)

        def guide(phi=phi):
            with pyro.plate("n", 4):
                pyro.sample("z", dist.Bernoulli(logits=phi))

        Estimator_ELBO(3, default=Score(LeaveOneOut())).loss_and_grads(model, guide)
        gradients.append(phi.grad)
    assert torch.equal(gradients[0][:3], gradients[1][:3])
    assert gradients[0][3] != gradients[1][3]


def test_two_plates_of_one_dimension_beside_an_enumerated_site():
    """Plates of two and of three elements, both at dim -1; 100 steps of 1,000 particles."""
    data = torch.tensor([0.3, -1.0, 2.0], dtype=DOUBLE)

    def model():
        with pyro.plate("pairs", 2):
            z = pyro.sample("z", dist.Bernoulli(constant([0.3, 0.6], data)))
            w = pyro.sample("w", dist.Bernoulli(0.2 + 0.5 * z))
            pyro.sample("x", dist.Normal(w + 2 * z, 1.0), obs=constant([1.3, 0.2], data))
        with pyro.plate("triples", 3):
            v = pyro.sample("v", dist.Bernoulli(constant(0.4, data)))
            pyro.sample("y", dist.Normal(v, 1.0), obs=data)

    def guide():
        with pyro.plate("pairs", 2):
            z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("z_logits")))
            pyro.sample("w", dist.Bernoulli(logits=pyro.param("w_logits") + z))
        with pyro.plate("triples", 3):
            pyro.sample("v", dist.Bernoulli(logits=pyro.param("v_logits")))

    params = {
        "z_logits": torch.tensor([0.3, -0.5]),
        "w_logits": torch.tensor([0.2, 0.9]),
        "v_logits": torch.tensor([0.4, 0.1, -0.2]),
    }
    supports = {"z": bit_values((2,)), "w": bit_values((2,)), "v": bit_values((3,))}
    problem = Problem(model, guide, params, supports)
    elbo, gradient = exact_gradient(problem)
    estimator = {"z": Enumerate(), "w": Score(LeaveOneOut()), "v": Score(LeaveOneOut())}
    draws, losses = draw_gradients(problem, estimator, 100, num_particles=1000)
    check(draws, gradient)
    check_loss(losses, elbo)


def minibatched():
    """The argument of a step is a minibatch, the indices of some points."""

    def model(batch=None):
        g = pyro.sample("g", dist.Bernoulli(constant(0.3, POINTS)))
        with pyro.plate("data", 5, subsample=batch) as index:
            z = pyro.sample("z", dist.Bernoulli(0.2 + 0.5 * g))
            pyro.sample("x", dist.Normal(2 * z + g, 1.0), obs=POINTS[index])

    def guide(batch=None):
        g = pyro.sample("g", dist.Bernoulli(logits=pyro.param("g_logit")))
        with pyro.plate("data", 5, subsample=batch) as index:
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("z_logits")[index] + 0.5 * g))

    params = {"g_logit": torch.tensor(0.2), "z_logits": torch.tensor([0.1, -0.5, 0.9, 0.0, 0.4])}

    def problem(*args):
        size = len(args[0]) if args else 5
        supports = {"g": bit_values(()), "z": bit_values((size,))}
        return Problem(model, guide, params, supports, args)

    return problem


def test_minibatches_of_a_plate_average_to_the_whole():
    """What the next test compares with: exact gradients of all pairs average to the full one."""
    problem = minibatched()
    pairs = [torch.tensor([i, j]) for i in range(5) for j in range(i)]
    gradients = torch.stack([exact_gradient(problem(pair))[1] for pair in pairs])
    torch.testing.assert_close(gradients.mean(0), exact_gradient(problem())[1])


@pytest.mark.parametrize(
    "baseline",
    [LeaveOneOut, MovingAverage, lambda: NeuralBaseline(ByIndex(), lambda batch: batch)],
    ids=["leave_one_out", "moving_average", "neural"],
)
def test_a_smaller_last_minibatch(baseline):
    """50 epochs of minibatches of 2, 2 and 1 points, 500 particles; one baseline throughout."""
    estimator = {"g": Score(LeaveOneOut()), "z": Score(baseline())}
    problem = minibatched()
    batches = [torch.tensor(indices) for indices in ([0, 1], [2, 3], [4])]
    exact = [exact_gradient(problem(batch)) for batch in batches]
    problem().reset(DOUBLE)
    elbo = Estimator_ELBO(num_particles=500, vectorize_particles=True)
    guide = config_gradient(problem().guide, estimator)
    draws = [[] for _ in batches]
    for _ in range(50):
        for batch, found in zip(batches, draws, strict=True):
            elbo.loss_and_grads(problem().model, guide, batch)
            found.append(problem().gradients())
    for found, (_, gradient) in zip(draws, exact, strict=True):
        assert worst_z(torch.stack(found), gradient) < 5
    check(torch.stack([torch.cat(row) for row in zip(*draws, strict=True)]), _all(exact))


def _all(exact):
    return torch.cat([gradient for _, gradient in exact])


class ByIndex(torch.nn.Module):
    """A prediction for each data point."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.arange(5.0))

    def forward(self, batch):
        return self.table[batch]


@pytest.mark.parametrize("vectorize", [False, True])
def test_particles_share_a_minibatch(vectorize):
    """Drawn once a step: model and guide, and every particle, see the same points."""
    seen = []

    def program(logits, remember):
        with pyro.plate("data", 100, subsample_size=3) as index:
            seen.append(index)
            pyro.sample("z", dist.Bernoulli(logits=logits))

    def model():
        program(torch.tensor(0.1), seen)

    def guide():
        program(pyro.param("l", torch.tensor(0.3)), seen)

    elbo = Estimator_ELBO(4, vectorize_particles=vectorize, max_plate_nesting=1)
    elbo.loss_and_grads(model, guide)
    seen.clear()
    steps = []
    for _ in range(3):
        elbo.loss_and_grads(model, guide)
        assert len(seen) == (2 if vectorize else 8)
        assert all(torch.equal(index, seen[0]) for index in seen)
        steps.append(tuple(seen[0].tolist()))
        seen.clear()
    assert len(set(steps)) > 1


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
    """A mask on the distribution changes its score, never its draws. 100 x 1,000 draws."""
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
    """The auxiliary site depends on z, so its term is part of z's cost."""

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
