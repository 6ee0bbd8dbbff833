"""Sums over a support leave out values of probability zero, even of infinite cost."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_gumbel.distributions import OneHot, RelaxedBernoulli, RelaxedOneHot
from pyro_gumbel.estimators import Enumerate, LocalExpectation, SumAndSample, UnorderedSet
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

COSTS = torch.tensor([0.3, -math.inf, 1.0, 0.6])
PRIOR = torch.tensor([0.2, 0.3, 0.4, 0.1])
START = torch.tensor([0.3, 0.0, 0.2, -0.4])
SUMS = [Enumerate(), LocalExpectation(), SumAndSample(3), UnorderedSet(4)]
FAMILIES = {
    "index": dist.Categorical,
    "one_hot": dist.OneHotCategorical,
    "OneHot": OneHot,
    "RelaxedOneHot": lambda **given: RelaxedOneHot(0.5, straight_through=True, **given),
}
BITS = {
    "bit": dist.Bernoulli,
    "RelaxedBernoulli": lambda **given: RelaxedBernoulli(0.5, straight_through=True, **given),
}
FORBID = {
    "probs": lambda phi: {"probs": phi.exp() * (PRIOR != 0.3)},
    "logits": lambda phi: {"logits": phi + torch.tensor([0.0, -math.inf, 0.0, 0.0])},
    "underflow": lambda phi: {"logits": phi + torch.tensor([0.0, -200.0, 0.0, 0.0])},
}
sums = pytest.mark.parametrize("estimator", SUMS, ids=lambda e: type(e).__name__)
forms = pytest.mark.parametrize("form", FORBID)


def gradient(model, guide, estimator, **options):
    pyro.clear_param_store()
    with pyro.validation_enabled(False):  # torch takes no infinite logits
        elbo = Estimator_ELBO(max_plate_nesting=1, **options)
        loss = elbo.loss_and_grads(model, config_gradient(guide, estimator))
    return loss, pyro.get_param_store()._params["phi"].grad


def reference(start, allowed):
    """Loss and gradient of one element, over the values that can be drawn."""
    phi = start.clone().requires_grad_()
    q = phi[allowed].log_softmax(0)
    loss = (q.exp() * (q - PRIOR[allowed].log() - COSTS[allowed])).sum()
    return loss, torch.autograd.grad(loss, phi)[0]


@forms
@sums
@pytest.mark.parametrize("read_before", [False, True], ids=["fresh", "both_read"])
@pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorised"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sums_leave_out_an_infinite_cost(family, vectorize, read_before, estimator, form):
    def model():
        with pyro.plate("n", 2):
            z = pyro.sample("z", FAMILIES["index" if family == "index" else "one_hot"](PRIOR))
            pyro.factor("x", COSTS[z if family == "index" else z.argmax(-1)])

    def guide():
        phi = pyro.param("phi", START.clone())
        fn = FAMILIES[family](**FORBID[form](phi))
        assert not read_before or fn.probs.shape == fn.logits.shape
        with pyro.plate("n", 2):
            pyro.sample("z", fn)

    options = {"num_particles": 2, "vectorize_particles": vectorize}
    loss, grad = gradient(model, guide, estimator, **options)
    exact_loss, exact_grad = reference(START, [0, 2, 3])
    torch.testing.assert_close(grad, 2 * exact_grad)
    assert loss.isfinite()
    if isinstance(estimator, Enumerate):
        torch.testing.assert_close(loss, 2 * exact_loss.detach())


@pytest.mark.parametrize("certain", [0.0, 1.0])
@pytest.mark.parametrize("form", ["probs", "logits"])
@pytest.mark.parametrize("estimator", SUMS[:2], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("family", BITS)
def test_certain_bits(family, estimator, form, certain):
    """The second of two bits is certain, and what it never is costs infinitely much."""

    def model():
        with pyro.plate("n", 2):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.3, 0.6])))
            forbidden = (torch.arange(2) == 1) & (z != certain)
            pyro.factor("x", torch.where(forbidden, -math.inf, z * 0.7))

    def guide():
        phi = pyro.param("phi", torch.tensor([0.4, 0.1]))
        probs = torch.where(torch.arange(2) == 1, certain, phi.sigmoid())
        numbers = {"probs": probs} if form == "probs" else {"logits": probs.logit()}
        with pyro.plate("n", 2):
            pyro.sample("z", BITS[family](**numbers))

    _, grad = gradient(model, guide, estimator)
    phi = torch.tensor(0.4, requires_grad=True)
    q = dist.Bernoulli(logits=phi)
    loss = torch.distributions.kl_divergence(q, dist.Bernoulli(0.3)) - 0.7 * q.probs
    expected = torch.autograd.grad(loss, phi)[0]
    assert grad[1] == 0
    torch.testing.assert_close(grad[0], expected)


@forms
def test_sums_of_several_sites(form):
    """The distribution of the second site excludes the value that the first one drew."""
    table = torch.tensor([[0.2, -0.4, 0.6], [0.5, 0.1, -0.3], [-0.2, 0.3, 0.4]])
    allowed = 1 - torch.eye(3)
    levels = torch.where(torch.eye(3) == 1, -math.inf, table + 0.5)

    def model():
        with pyro.plate("n", 2):
            a = pyro.sample("a", dist.Categorical(torch.ones(3)))
            b = pyro.sample("b", dist.Categorical(torch.ones(3)))
            pyro.factor("x", levels[a, b])

    def guide():
        phi = pyro.param("phi", table.clone())
        with pyro.plate("n", 2):
            a = pyro.sample("a", dist.Categorical(logits=phi[0]))
            numbers = {
                "probs": {"probs": phi.exp() * allowed},
                "logits": {"logits": phi + allowed.log()},
                "underflow": {"logits": phi - 200 * torch.eye(3)},
            }[form]
            rows = {name: given[a] for name, given in numbers.items()}
            pyro.sample("b", dist.Categorical(**rows))

    loss, grad = gradient(model, guide, Enumerate())
    phi = table.clone().requires_grad_()
    q = phi[0].log_softmax(0)[:, None] + (phi + allowed.log()).log_softmax(1)
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    exact = sum(q[p].exp() * (q[p] + 2 * math.log(3) - levels[p]) for p in pairs)
    torch.testing.assert_close(loss, 2 * exact.detach())
    torch.testing.assert_close(grad, 2 * torch.autograd.grad(exact, phi)[0])


def test_an_infinite_cost_of_a_possible_value_stays():
    def model():
        z = pyro.sample("z", dist.Categorical(PRIOR))
        pyro.factor("x", COSTS[z])

    def guide():
        pyro.sample("z", dist.Categorical(logits=pyro.param("phi", START.clone())))

    assert gradient(model, guide, Enumerate())[0] == math.inf
