"""Under autocast, masses, costs and surrogates keep their precision."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate

from pyro_gumbel.estimators import Relax, Score
from pyro_gumbel.estimators.registry import CLASSES
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

LAWS = {
    "one_hot": lambda logits: dist.OneHotCategorical(logits=logits),
    "bernoulli": lambda logits: dist.Bernoulli(logits=logits[..., 0]),
    "categorical": lambda logits: dist.Categorical(logits=logits),
    "poisson": lambda logits: dist.Poisson(logits[..., 0].exp()),
    "normal": lambda logits: dist.Normal(logits[..., 0], logits[..., 1].exp()),
}
START = torch.tensor([[0.3, -0.7, 0.2, 0.9], [1.1, 0.4, -0.5, 0.0]])
WEIGHTS = torch.tensor([0.3, -1.0, 1.4, 0.6])


class Critic(torch.nn.Module):
    """A function of relaxed values without a product of matrices, which autocast would round."""

    def forward(self, value):
        return (value**2).sum(-1)


MAKERS = {**CLASSES, "score": Score, "relax": lambda: Relax(Critic())}


def cases():
    for name, make in MAKERS.items():
        for family, law in LAWS.items():
            fn = law(START)
            if name == "relax" and family == "bernoulli":
                continue  # the critic reads vectors
            if make().supports(fn) and make().why_unsupported(fn, 0) is None:
                yield pytest.param(name, family, id=f"{name}-{family}")


def read(family, z):
    """A number for each value."""
    if family == "categorical":
        return WEIGHTS[z]
    return (z * WEIGHTS).sum(-1) if family == "one_hot" else 0.7 * z


def chain():
    """A chain of summed sites."""
    rows = torch.stack([START[0], START[1], -START[0], -START[1]])
    z = pyro.sample("z_0", dist.Categorical(logits=START[0]))
    for step in pyro.markov(range(1, 6)):
        z = pyro.sample(f"z_{step}", dist.Categorical(logits=rows[z]))
        pyro.sample(f"x_{step}", dist.Normal(WEIGHTS[z], 1.0), obs=torch.tensor(0.4 * step))


def gradient(name, family, *, enabled):
    logits = START.clone().requires_grad_()

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", LAWS[family](torch.zeros_like(START)))
            pyro.sample("x", dist.Normal(read(family, z), 1.0), obs=torch.tensor([0.4, 1.2]))

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", LAWS[family](logits))

    elbo = Estimator_ELBO(2, vectorize_particles=True, max_plate_nesting=1)
    pyro.set_rng_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        loss = elbo.differentiable_loss(model, config_gradient(guide, MAKERS[name]()))
    loss.backward()
    assert loss.dtype == torch.float32
    return loss.detach(), logits.grad


@pytest.mark.parametrize(("name", "family"), list(cases()))
def test_estimates_of_a_program_without_networks_are_the_same(name, family):
    expected, found = (gradient(name, family, enabled=enabled) for enabled in (False, True))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_sums_over_sites_are_the_same():
    model = config_enumerate(chain, "parallel")
    losses = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(Estimator_ELBO().loss(model, lambda: None))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_autocast_rounds_a_product_in_this_program(monkeypatch):
    """Without this, the comparison above would show nothing."""
    monkeypatch.setitem(globals(), "read", lambda family, z: z @ WEIGHTS)
    expected, found = (gradient("reinmax", "one_hot", enabled=on) for on in (False, True))
    assert not torch.allclose(found[1], expected[1], rtol=1e-4)
