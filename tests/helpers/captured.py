"""Programs, and steps by ``SVI`` and ``CapturedSVI`` from the same seed."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

from pyro_gumbel.infer import CapturedSVI, Estimator_ELBO
from pyro_gumbel.infer._captured_step import CapturedStep

DATA = 6
X = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))


@contextmanager
def replayed():
    """Check that a recording is replayed: eager steps would pass as captured ones."""
    replay, number = CapturedStep.replay, 0

    def counted(*args):
        nonlocal number
        number += 1
        return replay(*args)

    with patch.object(CapturedStep, "replay", counted):
        yield
    assert number, "no recorded step was replayed"


def one_hot_programs(dtype=torch.float64):
    """Latents in a plate under a prior that is not uniform; a linear decoder."""
    pyro.set_rng_seed(3)
    encoder = torch.nn.Linear(4, 2 * 3, dtype=dtype)
    decoder = torch.nn.Linear(2 * 3, 4, dtype=dtype)
    prior = torch.tensor([0.2, 0.3, 0.5], dtype=dtype)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(prior.expand(2, 3)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z.flatten(-2))).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            logits = encoder(x).unflatten(-1, (2, 3))
            pyro.sample("z", dist.OneHotCategorical(logits=logits).to_event(1))

    return model, guide, [*encoder.parameters(), *decoder.parameters()]


def batches(number, dtype=torch.float64, size=DATA):
    generator = torch.Generator().manual_seed(5)
    draws = torch.rand(number, size, 4, generator=generator, dtype=dtype)
    return (draws < 0.4).to(dtype)


def make(svi_class, model, guide=lambda *args, **kwargs: None, optim=None, elbo=None, **options):
    options = options if svi_class is CapturedSVI else {}
    optim = optim or pyro.optim.Adam({"lr": 0.05})
    return svi_class(model, guide, optim, elbo or Estimator_ELBO(max_plate_nesting=1), **options)


def same(scenario):
    """Run a scenario, given the class, by both; return what it returned."""
    outcomes = []
    for svi_class in (SVI, CapturedSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        with replayed() if svi_class is CapturedSVI else nullcontext():
            outcome = scenario(svi_class)
        store = {name: p.detach().clone() for name, p in pyro.get_param_store().items()}
        outcomes.append((outcome, store))
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-4, atol=1e-5)
    return outcomes[1][0]


def steps_of(svi):
    """The steps that an SVI has recorded or is about to record, oldest first."""
    return list(svi._steps.values())


def refused(scenario, match):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pytest.raises(RuntimeError, match=match) as error:
        scenario(CapturedSVI)
    assert "Trace Shapes" not in str(error.value)


def observe(mean, x, scale=1.0):
    pyro.sample("x", dist.Normal(mean, scale).to_event(1), obs=x)


class Plain:
    def __init__(self):
        self.net = torch.nn.Dropout(0.5)

    def model(self, x, net=None):
        observe((net or self.net)(pyro.param("a", torch.ones(5)) * x), x + 1)
