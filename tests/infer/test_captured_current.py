"""Changes between two steps of what a recording reads."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.captured import steps_of
from pyro.infer import SVI
from torch import nn

from pyro_gumbel.estimators import Exponential, GumbelStraightThrough, Relax
from pyro_gumbel.infer import CapturedSVI, Estimator_ELBO, config_gradient


def guide():
    pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.zeros(()))))


def model():
    z = pyro.sample("z", dist.Bernoulli(0.5))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(3.0))


def make(svi_class, model=model, guide=guide, optim=None, **options):
    optim = optim or pyro.optim.Adam({"lr": 0.05, "fused": True})
    return svi_class(model, guide, optim, Estimator_ELBO(max_plate_nesting=0, **options))


def same(scenario):
    """Run a scenario, given the class, by both."""
    outcomes = []
    for svi_class in (SVI, CapturedSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        outcome = scenario(svi_class)
        store = {name: p.detach().clone() for name, p in pyro.get_param_store().items()}
        outcomes.append((outcome, store))
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-4, atol=1e-5)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("shift", torch.tensor(0.0))


@pytest.mark.parametrize("assign", [False, True])
def test_another_tensor_in_a_buffers_place(assign):
    def scenario(svi_class):
        net = Net()

        def model():
            pyro.module("net", net)
            pyro.sample("x", dist.Normal(net.weight + net.shift, 1.0), obs=torch.tensor(3.0))

        svi = make(svi_class, model, lambda: None)
        losses = [svi.step() for _ in range(5)]
        if assign:
            net.load_state_dict({"shift": torch.tensor(2.0)}, strict=False, assign=True)
        else:
            net.shift = torch.tensor(2.0)
        return losses + [svi.step() for _ in range(5)]

    same(scenario)


def test_a_parameter_of_the_first_step_only():
    def scenario(svi_class):
        first = [True]

        def model():
            shift = pyro.param("shift", torch.ones(())) if first else 0.0
            mean = pyro.param("mean", torch.zeros(()))
            pyro.sample("x", dist.Normal(mean + shift, 1.0), obs=torch.tensor(3.0))

        svi = make(svi_class, model, lambda: None)
        losses = [svi.step()]
        first.clear()
        return losses + [svi.step() for _ in range(10)]

    same(scenario)


def test_a_parameter_that_goes_later_is_noticed():
    early = [True]

    def model():
        shift = pyro.param("shift", torch.ones(())) if early else 0.0
        mean = pyro.param("mean", torch.zeros(()))
        pyro.sample("x", dist.Normal(mean + shift, 1.0), obs=torch.tensor(3.0))

    pyro.clear_param_store()
    svi = make(CapturedSVI, model, lambda: None)
    svi.check_every = 3
    for _ in range(4):
        svi.step()
    early.clear()
    with pytest.raises(RuntimeError, match=r"\['shift'\] were there in the first step only"):
        [svi.step() for _ in range(4)]
    for _ in range(4):
        svi.step()


def test_parameters_of_estimators_are_not_missed():
    pyro.clear_param_store()
    svi = make(CapturedSVI, guide=config_gradient(guide, Relax(nn.Linear(1, 1))))
    for _ in range(5):
        svi.step()
    assert all(step.replays == 3 for step in steps_of(svi))


def test_another_default_estimator():
    def scenario(svi_class):
        svi = make(svi_class, default="straight_through")
        losses = [svi.step() for _ in range(5)]
        svi.loss.__self__.default = "reinmax"
        return losses + [svi.step() for _ in range(10)]

    same(scenario)


def test_another_number_of_an_estimator():
    def scenario(svi_class):
        estimator = GumbelStraightThrough(1.0)
        svi = make(svi_class, guide=config_gradient(guide, estimator))
        losses = [svi.step() for _ in range(5)]
        estimator.temperature = 0.3
        return losses + [svi.step() for _ in range(10)]

    same(scenario)


def test_another_autocast_type():
    weight = torch.eye(2)

    def model():
        mean = weight @ pyro.param("mean", torch.ones(2))
        seen.append(mean.dtype)
        pyro.sample("x", dist.Normal(mean.float(), 1.0).to_event(1), obs=torch.ones(2))

    pyro.clear_param_store()
    svi = make(CapturedSVI, model, lambda: None)
    for dtype in (torch.bfloat16, torch.float16):
        seen: list[torch.dtype] = []
        with torch.autocast("cpu", dtype):
            svi.step()
        assert set(seen) == {dtype}


class Interrupted(pyro.optim.PyroOptim):
    """Is interrupted when ``now`` is set."""

    now = False

    def __call__(self, *args, **kwargs):
        if self.now:
            self.now = False
            raise KeyboardInterrupt
        super().__call__(*args, **kwargs)


@pytest.mark.parametrize("step", [0, 1, 2, 5])
def test_an_interrupted_optimiser_leaves_schedules_as_they_are_in_svi(step):
    def scenario(svi_class):
        temperature = Exponential(1.0, 0.3, 0.01)
        optim = Interrupted(torch.optim.Adam, {"lr": 0.01, "fused": True})
        configured = config_gradient(guide, GumbelStraightThrough(temperature))
        svi = make(svi_class, guide=configured, optim=optim)
        for number in range(8):
            optim.now = number == step
            try:
                svi.step()
            except KeyboardInterrupt:
                assert number == step
        return temperature.step_count

    same(scenario)
