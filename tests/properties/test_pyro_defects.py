"""Tests that known errors of other relaxed distributions and losses do not occur here.

Here are wrong answers. Crashes and leaks are in ``test_pyro_crashes``.
"""

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
from pyro.infer import SVI, Trace_ELBO

from pyro_gumbel.distributions import (
    Gumbel,
    RelaxedOneHot,
)
from pyro_gumbel.estimators import (
    LeaveOneOut,
    Score,
    StraightThrough,
)
from pyro_gumbel.infer import (
    Estimator_ELBO,
    ImportanceWeighted_ELBO,
    config_gradient,
)

PRIOR = torch.tensor([0.05, 0.15, 0.30, 0.50])
DOUBLE = torch.float64


@pytest.mark.parametrize("temperature", [0.3, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("guide_kind", ["estimator", "distribution"])
def test_prior_is_respected(temperature, guide_kind):
    """A straight-through guide under a plain one-hot prior goes to the prior, not to uniform."""

    def model():
        pyro.sample("z", dist.OneHotCategorical(probs=PRIOR))

    def guide():
        logits = pyro.param("logits", torch.zeros(4))
        if guide_kind == "estimator":
            q = dist.OneHotCategorical(logits=logits)
            pyro.sample("z", q, infer={"gradient": StraightThrough(temperature)})
        else:
            pyro.sample("z", RelaxedOneHot(temperature, logits=logits, straight_through=True))

    elbo = Estimator_ELBO(64, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.985}), elbo)
    for _ in range(300):
        svi.step()
    assert (pyro.param("logits").softmax(-1) - PRIOR).abs().max() < 0.02


@pytest.mark.parametrize("temperature", [0.3, 0.5, 1.0])
def test_loss_is_zero_where_guide_and_prior_agree(temperature):
    """Not 17.1, 9.4 or 5.7 nats, as where a density is held against a mass."""

    def model():
        pyro.sample("z", dist.OneHotCategorical(logits=torch.zeros(5)))

    def guide():
        q = RelaxedOneHot(temperature, logits=torch.zeros(5), straight_through=True)
        pyro.sample("z", q)

    elbo = Estimator_ELBO(100, vectorize_particles=True)
    assert abs(elbo.loss(model, guide)) < 1e-5
    assert (
        abs(Trace_ELBO(100, vectorize_particles=True, max_plate_nesting=0).loss(model, guide))
        < 1e-5
    )


@pytest.mark.parametrize("straight_through", [False, True])
def test_score_belongs_to_the_value_alone(straight_through):
    d = RelaxedOneHot(0.5, logits=torch.zeros(3), straight_through=straight_through)
    x = d.rsample((2,))
    score = d.log_prob(x)
    assert score.isfinite().all()
    for same in (x.clone(), x.detach(), torch.stack(list(x)), x[:]):
        assert torch.equal(d.log_prob(same), score)


def test_sample_and_rsample_are_both_hard():
    d = RelaxedOneHot(0.5, logits=torch.zeros(3), straight_through=True)
    for draws in (d.sample((100,)), d.rsample((100,))):
        assert set(draws.unique().tolist()) == {0.0, 1.0}
        assert (draws.sum(-1) == 1).all()


@pytest.mark.parametrize("estimator", ["score", "pathwise"])
def test_choice_of_gradient_survives_events_and_plates(estimator):
    """Chosen by configuration: the distribution's flag is never set, so nothing can lose it."""
    loc = torch.zeros(4, 2, requires_grad=True)

    def program(loc):
        with pyro.plate("b", 4):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("g", Gumbel(loc[:, 0], 1.0).mask(torch.tensor([True] * 3 + [False])))

    seen = []

    class Spy(Score):
        def surrogate(self, site):
            seen.append(site.name)
            return super().surrogate(site)

    choice = Spy() if estimator == "score" else estimator
    guide = config_gradient(lambda: program(loc), choice)
    Estimator_ELBO(2).loss_and_grads(lambda: program(torch.ones(4, 2)), guide)
    assert seen == (["z", "g"] if estimator == "score" else [])
    assert loc.grad.abs().min() > 0
    assert dist.Normal(0.0, 1.0).has_rsample


def toy(observe):
    """One bit, seen through ``observe``."""

    def model():
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5, dtype=DOUBLE)))
        pyro.sample("x", dist.Normal(observe(z), 1.0), obs=torch.tensor(1.3, dtype=DOUBLE))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l")))

    return Problem(model, guide, {"l": torch.tensor(0.3)}, {"z": bit_values(())})


def one_bit_gradient(more=0.0):
    """Of the loss: minus q(0) q(1) times what the ELBO's terms are more at 1 than at 0."""
    q = 1 / (1 + math.exp(-0.3))
    return -q * (1 - q) * (2 * 1.3 - 0.3 + more)


def test_importance_weighted_bound_moves_score_sites():
    """Exactly -0.322 for two samples, not 0. 100 x 2,000 copies."""
    copies = 2000
    odds = torch.full((copies,), 0.3, dtype=DOUBLE, requires_grad=True)

    def model():
        with pyro.plate("copies", copies):
            z = pyro.sample("z", dist.Bernoulli(torch.full((copies,), 0.5, dtype=DOUBLE)))
            pyro.sample("x", dist.Normal(2 * z - 1, 1.0), obs=torch.tensor(1.3, dtype=DOUBLE))

    def guide():
        with pyro.plate("copies", copies):
            pyro.sample("z", dist.Bernoulli(logits=odds))

    elbo = ImportanceWeighted_ELBO(2, vectorize_particles=True)
    draws = []
    for _ in range(100):
        odds.grad = None
        elbo.loss_and_grads(model, guide)
        draws.append(odds.grad)
    draws = torch.cat(draws)[:, None]
    assert worst_z(draws, two_sample_gradient()[None]) < 5
    assert draws.std() / len(draws) ** 0.5 < 0.02 * 0.322


def two_sample_gradient():
    """Of minus the two-sample bound, by summing over the four pairs."""
    odds = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    bits = torch.tensor([0.0, 1.0], dtype=DOUBLE)
    log_q = dist.Bernoulli(logits=odds).log_prob(bits)
    log_p = math.log(0.5) + dist.Normal(2 * bits - 1, 1.0).log_prob(torch.tensor(1.3))
    bound = sum(
        (log_q[i] + log_q[j]).exp()
        * (torch.logaddexp((log_p - log_q)[i], (log_p - log_q)[j]) - math.log(2))
        for i in range(2)
        for j in range(2)
    )
    (gradient,) = torch.autograd.grad(-bound, odds)
    assert gradient.item() == pytest.approx(-0.322, abs=1e-3)
    return gradient


def by_setitem(z):
    buffer = torch.zeros(1, dtype=z.dtype)
    buffer[0] = z.reshape(())
    return 2 * buffer[0] - 1


def by_branch(z):
    return torch.tensor(1.0 if z > 0 else -1.0, dtype=DOUBLE)


def by_item(z):
    return torch.tensor(2 * z.item() - 1, dtype=DOUBLE)


def by_numpy(z):
    return torch.as_tensor(2 * z.detach().numpy() - 1)


@pytest.mark.parametrize("observe", [by_setitem, by_branch, by_item, by_numpy])
def test_no_score_term_is_lost_with_provenance(observe):
    """550 steps of 4 looped particles; how the model reads its value makes no difference."""
    problem = toy(observe)
    _, gradient = exact_gradient(problem)
    assert gradient.item() == pytest.approx(one_bit_gradient(), rel=1e-6)
    draws, _ = draw_gradients(
        problem, Score(LeaveOneOut()), 550, num_particles=4, vectorize=False, max_plate_nesting=0
    )
    assert relative_error(draws, gradient) < 0.02
    assert worst_z(draws, gradient) < 5


def test_guide_only_sites_are_in_the_cost():
    """The case in which -log q of an auxiliary site was left out of the score's weight."""

    def model():
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5, dtype=DOUBLE)))
        pyro.sample("x", dist.Normal(2 * z - 1, 1.0), obs=torch.tensor(1.3, dtype=DOUBLE))

    def guide():
        z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("l")))
        pyro.sample("u", dist.Bernoulli(0.1 + 0.4 * z), infer={"is_auxiliary": True})

    supports = {"z": bit_values(()), "u": bit_values(())}
    problem = Problem(model, guide, {"l": torch.tensor(0.3)}, supports)
    _, gradient = exact_gradient(problem)
    entropy = dist.Bernoulli(torch.tensor([0.1, 0.5], dtype=DOUBLE)).entropy()
    expected = one_bit_gradient((entropy[1] - entropy[0]).item())
    assert gradient.item() == pytest.approx(expected, rel=1e-6)
    draws, _ = draw_gradients(problem, Score(LeaveOneOut()), 100, num_particles=1000)
    assert relative_error(draws, gradient) < 0.02
    assert worst_z(draws, gradient) < 5
