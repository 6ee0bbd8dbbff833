"""Coupled estimators with impossible values, extreme logits and unusual programs."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.coupled_problems import constant, copy_gradients, copy_program
from helpers.problems import Problem, draw_gradients, exact_gradient, one_hot_values, worst_z
from pyro import poutine

from pyro_gumbel.estimators import (
    ARMS,
    DisARM,
    DisARMTree,
    DoubleControlVariate,
    Estimator,
    LeaveOneOut,
    LocalExpectation,
    MuProp,
    Rebar,
    Rodeo,
    Score,
    SumAndSample,
    UnorderedSet,
)
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

COPIES = 20_000
FOR_BITS = [DisARM, ARMS, LocalExpectation, MuProp, DoubleControlVariate, Rodeo, Rebar]
FOR_ONE_HOT = [
    DisARMTree,
    LocalExpectation,
    MuProp,
    DoubleControlVariate,
    Rebar,
    lambda: SumAndSample(1),
    lambda: SumAndSample(3),
    lambda: UnorderedSet(2),
    lambda: UnorderedSet(4),
]
INDEXED = [DisARMTree, LocalExpectation, lambda: SumAndSample(3), lambda: UnorderedSet(4)]


def name_of(make):
    return repr(make())


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
vectorized = pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorised"])


def impossible_category(*, prior_too, as_index=False):
    """The second of four categories cannot be drawn."""
    family = dist.Categorical if as_index else dist.OneHotCategorical
    prior = [0.2, 0.0, 0.4, 0.4] if prior_too else [0.1, 0.2, 0.3, 0.4]

    def model():
        w = pyro.param("w")
        z = pyro.sample("z", family(constant(prior, w)))
        levels = constant([0.3, -1.0, 1.4, 0.2], w)
        level = levels[z.long()] if as_index else (z * levels).sum(-1)
        pyro.factor("x", w * level**2)

    def guide():
        phi = pyro.param("phi")
        pyro.sample("z", family(logits=phi + constant([0.0, -math.inf, 0.0, 0.0], phi)))

    params = {"w": torch.tensor(0.9), "phi": torch.tensor([0.2, 0.6, -0.1, 0.5])}
    values = [torch.tensor(c) if as_index else torch.eye(4)[c] for c in (0, 2, 3)]
    return Problem(model, guide, params, {"z": values})


@dtypes
@pytest.mark.parametrize("prior_too", [False, True])
@pytest.mark.parametrize("make", FOR_ONE_HOT, ids=name_of)
def test_category_of_logit_minus_infinity(make, prior_too, dtype):
    """20,000 estimates."""
    problem = impossible_category(prior_too=prior_too)
    gradient = exact_gradient(problem)[1]
    wide = copy_program(problem, {"w": 0, "phi": 1}, COPIES, 0)
    draws = copy_gradients(wide, make(), nesting=1, dtype=dtype)
    assert draws.isfinite().all()
    assert worst_z(draws, gradient) < 5
    assert (draws[:, 2] == 0).all()


@pytest.mark.parametrize("make", INDEXED, ids=name_of)
def test_index_of_logit_minus_infinity(make):
    """20,000 estimates."""
    problem = impossible_category(prior_too=False, as_index=True)
    gradient = exact_gradient(problem)[1]
    wide = copy_program(problem, {"w": 0, "phi": 1}, COPIES, 0)
    draws = copy_gradients(wide, make(), nesting=1)
    assert draws.isfinite().all()
    assert worst_z(draws, gradient) < 5


def certain_bit(logit):
    """A Bernoulli variable beside one that is nearly or exactly certain."""

    def model():
        w = pyro.param("w")
        with pyro.plate("n", 2):
            z = pyro.sample("z", dist.Bernoulli(constant([0.3, 0.6], w)))
            pyro.factor("x", w * (0.3 + 0.9 * z) ** 2)

    def guide():
        phi = pyro.param("phi")
        with pyro.plate("n", 2):
            pyro.sample("z", dist.Bernoulli(logits=phi + constant([0.0, logit], phi)))

    params = {"w": torch.tensor(0.9), "phi": torch.tensor([-1.0, 0.0])}
    return Problem(model, guide, params, {})


@dtypes
@pytest.mark.parametrize("logit", [40.0, -1e4, math.inf, -math.inf])
@pytest.mark.parametrize("make", FOR_BITS, ids=name_of)
def test_certain_bits(make, logit, dtype):
    """20,000 estimates against the closed form; the certain variable has zero gradient."""
    wide = copy_program(certain_bit(logit), {"w": 0, "phi": 0}, COPIES, 1)
    draws = copy_gradients(wide, make(), dtype=dtype)
    assert draws.isfinite().all()
    theta = 1 / (1 + math.exp(1.0))
    costs = [
        math.log(prior) - math.log(q) + 0.9 * (0.3 + 0.9 * z) ** 2
        for z, prior, q in ((1.0, 0.3, theta), (0.0, 0.7, 1 - theta))
    ]
    certain = (0.3 + 0.9 * (logit > 0)) ** 2
    for_w = theta * 1.2**2 + (1 - theta) * 0.3**2 + certain
    for_phi = theta * (1 - theta) * (costs[0] - costs[1])
    exact = -torch.tensor([for_w, for_phi, 0.0], dtype=torch.float64)
    assert worst_z(draws, exact) < 5
    assert draws[:, 2].abs().max() < 1e-12


@pytest.mark.parametrize("make", FOR_ONE_HOT, ids=name_of)
def test_extreme_logits(make):
    """With a nearly certain category gradients are finite and small."""
    logits = torch.tensor([60.0, 0.0, 0.5, -30.0], requires_grad=True)
    guide = config_gradient(
        lambda: pyro.sample("z", dist.OneHotCategorical(logits=logits)), make()
    )

    def model():
        z = pyro.sample("z", dist.OneHotCategorical(logits=torch.zeros(4)))
        pyro.factor("x", z[..., 1] * 3)

    elbo = Estimator_ELBO(200, vectorize_particles=True, max_plate_nesting=0)
    loss = elbo.loss_and_grads(model, guide)
    assert loss.isfinite()
    assert logits.grad.abs().max() < 1e-6


@pytest.mark.parametrize("make", FOR_ONE_HOT, ids=name_of)
def test_an_impossible_category_in_half_precision(make):
    logits = torch.tensor([0.3, -math.inf, 1.0, 0.1], dtype=torch.float16, requires_grad=True)
    levels = torch.tensor([0.5, 1.0, -0.7, 0.2], dtype=torch.float16)

    def model():
        z = pyro.sample("z", dist.OneHotCategorical(torch.ones(4, dtype=torch.float16)))
        pyro.factor("x", (z * levels).sum(-1) ** 2)

    guide = config_gradient(
        lambda: pyro.sample("z", dist.OneHotCategorical(logits=logits)), make()
    )
    for _ in range(10):
        Estimator_ELBO(2).loss_and_grads(model, guide)
    assert logits.grad.isfinite().all()
    assert logits.grad[1] == 0
    assert logits.grad.abs().max() > 1e-3


@pytest.mark.parametrize(
    "make", [DisARMTree, LocalExpectation, MuProp, DoubleControlVariate, Rebar], ids=name_of
)
def test_a_single_category_has_no_gradient(make):
    logits = torch.tensor([0.3], requires_grad=True)

    def model():
        z = pyro.sample("z", dist.OneHotCategorical(torch.ones(1)))
        pyro.factor("x", 1.7 * z.sum(-1))

    guide = config_gradient(
        lambda: pyro.sample("z", dist.OneHotCategorical(logits=logits)), make()
    )
    loss = Estimator_ELBO().loss_and_grads(model, guide)
    assert float(loss) == pytest.approx(-1.7)
    assert logits.grad.abs().max() < 1e-6


@vectorized
def test_one_particle_in_nested_plates_without_graph(vectorize):
    """Test later passes of one particle at a site of fewer plates than the data."""

    def model():
        w = pyro.param("w")
        with pyro.plate("inner", 2, dim=-1):
            z = pyro.sample("z", dist.OneHotCategorical(constant([0.2, 0.3, 0.5], w)))
            level = (z * constant([0.3, -1.0, 1.4], w)).sum(-1)
            with pyro.plate("outer", 3, dim=-2):
                data = constant([[0.1, 0.2], [1.0, -1.0], [0.4, 0.0]], w)
                pyro.sample("x", dist.Normal(w * level, 1.0), obs=data)

    def guide():
        with pyro.plate("inner", 2, dim=-1):
            pyro.sample("z", dist.OneHotCategorical(logits=pyro.param("phi")))

    params = {"w": torch.tensor(0.8), "phi": torch.tensor([[0.1, 0.4, -0.2], [0.0, 0.3, 0.5]])}
    problem = Problem(model, guide, params, {"z": one_hot_values((2,), 3)})
    gradient = exact_gradient(problem)[1]
    draws, _ = draw_gradients(problem, LocalExpectation(), 2, vectorize=vectorize)
    # The guide's gradient is exact in every draw; the model's is a draw's.
    torch.testing.assert_close(draws[:, 1:], gradient[1:].expand(2, -1), rtol=1e-10, atol=1e-10)


def test_elements_that_meet_outside_the_plate_are_served_by_draws_of_the_guide():
    """Test the recommended estimators in 40 steps of 1,250 particles."""

    def model():
        w = pyro.param("w")
        with pyro.plate("n", 2):
            z = pyro.sample("z", dist.OneHotCategorical(constant([0.1, 0.2, 0.7], w)))
        level = (z * constant([0.3, -1.0, 1.4], w)).sum(-1)
        both = level[..., :1] * level[..., 1:] if level.dim() > 1 else level[0] * level[1]
        pyro.sample("x", dist.Normal(2 * w * both, 0.9), obs=constant(1.0, w))

    def guide():
        with pyro.plate("n", 2):
            pyro.sample("z", dist.OneHotCategorical(logits=pyro.param("phi")))

    params = {"w": torch.tensor(0.9), "phi": torch.tensor([[0.2, 0.6, -0.1], [-0.4, 0.3, 0.8]])}
    problem = Problem(model, guide, params, {"z": one_hot_values((2,), 3)})
    gradient = exact_gradient(problem)[1]
    for estimator in (DisARMTree(), MuProp(), DoubleControlVariate(2), Rebar()):
        draws, _ = draw_gradients(problem, estimator, 40, num_particles=1_250)
        assert worst_z(draws, gradient) < 5


@pytest.mark.parametrize("vectorize", [False, True])
def test_a_site_that_is_coupled_in_some_runs_only(vectorize):
    """Rows of a site that is absent from a run do not enter the average."""
    logits = torch.zeros(3, requires_grad=True)
    name = "early"

    def guide():
        pyro.sample(name, dist.Bernoulli(logits=logits).to_event(1))

    def model():
        pyro.sample(name, dist.Bernoulli(logits=torch.zeros(3)).to_event(1))

    configured = config_gradient(guide, DisARM())
    elbo = Estimator_ELBO(2, vectorize_particles=vectorize)
    for now in ("early", "early", "late", "late", "early"):
        name = now
        assert abs(float(elbo.loss_and_grads(model, configured))) < 1e-6


class CoupledScore(Estimator):
    """Leave-one-out among coupled values, as a user would write it."""

    unbiased = True
    sites = "Bernoulli"
    num_values = 3

    def supports(self, fn):
        return isinstance(fn, torch.distributions.Bernoulli)

    def draw(self, fn):
        return torch.stack([fn.sample() for _ in range(3)])

    def surrogate(self, site):
        theta = site.logits[..., 0].detach().sigmoid()
        advantage = site.per_variable(site.cost - site.cost.mean(0)) / 2
        return (advantage * (site.values - theta)).sum(0) * site.logits[..., 0]


@vectorized
def test_later_sites_of_a_looped_chain_leave_value_gradients_alone(vectorize):
    """Gradients of an earlier site do not depend on branches of later sites."""
    slopes = {}

    class Watching(DoubleControlVariate):
        def surrogate(self, site):
            slopes["y"] = site.value_gradients()
            return super().surrogate(site)

    y_logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    z_logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    table = torch.tensor([0.7, -1.9], dtype=torch.float64)

    def model():
        prior = torch.zeros(2, dtype=torch.float64)
        y = pyro.sample("y", dist.Bernoulli(logits=prior).to_event(1))
        pyro.sample("z", dist.Bernoulli(logits=prior).to_event(1))
        pyro.factor("x", (y * table).sum(-1))

    def guide():
        pyro.sample("y", dist.Bernoulli(logits=y_logits).to_event(1))
        pyro.sample("z", dist.Bernoulli(logits=z_logits).to_event(1))

    choice = {"y": Watching(2), "z": CoupledScore()}
    elbo = Estimator_ELBO(2, vectorize_particles=vectorize, max_plate_nesting=0)
    elbo.loss_and_grads(model, config_gradient(guide, choice))
    torch.testing.assert_close(slopes["y"], table.expand(2, 2, 2))


def test_scaled_guide_and_model_scale_the_estimate():
    """A scale of both programs multiplies the estimate of the same draws."""
    logits = torch.tensor([0.3, -0.4], requires_grad=True)

    def program(scale):
        def model():
            with poutine.scale(scale=scale), pyro.plate("n", 2):
                z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.2, 0.6])))
                pyro.factor("x", z**2)

        def guide():
            with poutine.scale(scale=scale), pyro.plate("n", 2):
                pyro.sample("z", dist.Bernoulli(logits=logits))

        return model, guide

    for estimator in (DisARM(), ARMS(3), MuProp(), LocalExpectation(), Score(LeaveOneOut())):
        grads = []
        for scale in (1.0, 2.5):
            pyro.set_rng_seed(3)
            logits.grad = None
            model, guide = program(scale)
            elbo = Estimator_ELBO(3, vectorize_particles=True, max_plate_nesting=1)
            elbo.loss_and_grads(model, config_gradient(guide, estimator))
            grads.append(logits.grad.clone())
        assert grads[0].abs().min() > 0
        torch.testing.assert_close(grads[1], 2.5 * grads[0])
