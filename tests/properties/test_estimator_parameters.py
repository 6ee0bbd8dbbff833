"""Estimates do not depend on the form of a distribution's parameters."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_gumbel.distributions import OneHot, RelaxedBernoulli, RelaxedOneHot
from pyro_gumbel.estimators import (
    DisARM,
    DisARMTree,
    DoubleControlVariate,
    Estimator,
    LocalExpectation,
    MuProp,
    Rebar,
    Relax,
    SumAndSample,
    UnorderedSet,
)
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

START = torch.tensor([[0.5, -0.2, 0.1], [-0.4, 0.3, 0.9]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
ONE_HOTS = {
    "derived": lambda logits: dist.OneHotCategorical(logits=logits + 0.0),
    "probs": lambda logits: dist.OneHotCategorical(probs=logits.softmax(-1)),
    "own": lambda logits: OneHot(logits=logits),
    "own_probs": lambda logits: OneHot(probs=logits.softmax(-1)),
    "straight_through": lambda logits: RelaxedOneHot(0.5, logits=logits, straight_through=True),
}
BITS = {
    "derived": lambda logits: dist.Bernoulli(logits=logits + 0.0),
    "probs": lambda logits: dist.Bernoulli(probs=logits.sigmoid()),
}


def critic():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Linear(3, 1).double()


def gradient(law, estimator, *, bits, num_particles, vectorize):
    """Return the gradients of the program's and the estimator's parameters for a fixed seed."""
    pyro.clear_param_store()
    prior = dist.Bernoulli(0.3) if bits else dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5]))
    start = START[:, 0] if bits else START

    def model():
        with pyro.plate("n", 2):
            z = pyro.sample("z", prior)
            mean = 2.0 * z if bits else z.double() @ WEIGHTS
            pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.tensor([0.4, 1.2]).double())

    def guide():
        logits = pyro.param("logits", start.clone(), event_dim=0 if bits else 1)
        with pyro.plate("n", 2):
            pyro.sample("z", law(logits))

    elbo = Estimator_ELBO(num_particles, vectorize_particles=vectorize, max_plate_nesting=1)
    pyro.set_rng_seed(7)
    elbo.loss_and_grads(model, config_gradient(guide, {"z": estimator}))
    own = [p.grad for p in estimator.parameters() if p.grad is not None]
    return [pyro.get_param_store()._params["logits"].grad, *own]


def check_alike(make, law, bits, num_particles, vectorize):
    """Compare the gradient with that of Pyro's own class."""
    options = {"bits": bits, "num_particles": num_particles, "vectorize": vectorize}
    own = dist.Bernoulli if bits else dist.OneHotCategorical
    plain = gradient(lambda logits: own(logits=logits), make(), **options)
    other = gradient(law, make(), **options)
    assert plain[0].abs().sum() > 0
    torch.testing.assert_close(other, plain)


PARTICLES = pytest.mark.parametrize(
    ("num_particles", "vectorize"), [(1, False), (3, False), (3, True)]
)


@PARTICLES
@pytest.mark.parametrize("given", ONE_HOTS)
@pytest.mark.parametrize(
    "make",
    [
        Rebar,
        lambda: Relax(critic()),
        MuProp,
        DoubleControlVariate,
        DisARMTree,
        LocalExpectation,
        lambda: SumAndSample(1),
        lambda: UnorderedSet(2),
    ],
    ids=["rebar", "relax", "muprop", "double", "tree", "local", "sum", "set"],
)
def test_one_hot(make, given, num_particles, vectorize):
    """Test the parameter itself as the logits of all particles, which share its graph."""
    check_alike(make, ONE_HOTS[given], False, num_particles, vectorize)


@PARTICLES
@pytest.mark.parametrize("given", BITS)
@pytest.mark.parametrize("make", [Rebar, MuProp, DoubleControlVariate, DisARM, LocalExpectation])
def test_bits(make, given, num_particles, vectorize):
    check_alike(make, BITS[given], True, num_particles, vectorize)


@PARTICLES
@pytest.mark.parametrize("make", [Rebar, DisARM])
def test_bits_of_the_relaxed_class(make, num_particles, vectorize):
    """Test estimators with their own noise, since the class draws by another formula."""

    def law(logits):
        return RelaxedBernoulli(0.5, logits=logits, straight_through=True)

    check_alike(make, law, True, num_particles, vectorize)


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("make", [Rebar, MuProp, DisARM])
def test_parameter_that_is_itself_the_logits_of_every_particle(make, vectorize):
    """Outside of plates the distribution holds the parameter itself."""

    def of(law):
        def model():
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(2 * z, 1.0), obs=torch.tensor(0.7))

        def guide():
            logit = pyro.param("logit", torch.tensor(0.2, dtype=torch.float64))
            pyro.sample("z", law(logit))

        pyro.clear_param_store()
        pyro.set_rng_seed(5)
        elbo = Estimator_ELBO(3, vectorize_particles=vectorize, max_plate_nesting=0)
        elbo.loss_and_grads(model, config_gradient(guide, {"z": make()}))
        return pyro.get_param_store()._params["logit"].grad

    direct = of(lambda logit: dist.Bernoulli(logits=logit))
    assert direct != 0
    torch.testing.assert_close(direct, of(lambda logit: dist.Bernoulli(logits=logit + 0.0)))


class Unprepared(Estimator):
    """An estimator that calls ``logits_gradients`` without the flag for it."""

    unbiased = True
    sites = "one-hot"
    num_values = 2

    def supports(self, fn):
        return True

    def draw(self, fn):
        return torch.stack([fn.sample(), fn.sample()])

    def surrogate(self, site):
        return site.logits_gradients(site.totals.sum())


def test_gradient_in_logits_has_to_be_asked_for():
    with pytest.raises(TypeError, match="Unprepared calls logits_gradients.*draws_from_logits"):
        gradient(ONE_HOTS["own"], Unprepared(), bits=False, num_particles=1, vectorize=False)
