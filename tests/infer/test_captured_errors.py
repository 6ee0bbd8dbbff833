"""Errors while a step is recorded."""

from __future__ import annotations

import linecache

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_gumbel.infer import CapturedSVI, Estimator_ELBO

# Torch warns of nested tensors, and of torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore")

X = torch.ones(3)


def make(model):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    optim = pyro.optim.Adam({"lr": 0.05})
    return CapturedSVI(model, lambda x: None, optim, Estimator_ELBO(max_plate_nesting=0))


def observing(mean_of):
    def model(x):
        mean = mean_of(pyro.param("mean", torch.zeros(3)))
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    return model


@torch.jit.script
def scripted(mean):
    if bool(mean.sum() > 5):
        return mean + 1
    return mean - 1


@pytest.mark.parametrize("mean_of", [scripted, lambda mean: mean[mean > -9.0]])
def test_what_cannot_be_recorded_is_refused(mean_of):
    svi = make(observing(mean_of))
    svi.step(X)
    before = pyro.param("mean").detach().clone()
    with pytest.raises(RuntimeError, match=r"^CapturedSVI cannot record.*pyro\.infer\.SVI") as got:
        svi.step(X)
    assert "Trace Shapes" not in str(got.value)
    assert got.value.__cause__ is not None
    torch.testing.assert_close(pyro.param("mean").detach(), before)


@pytest.mark.parametrize("error", [ValueError, RuntimeError, NotImplementedError])
def test_errors_of_the_program_are_raised_as_they_are(error):
    fails = []

    def mean_of(mean):
        if fails:
            raise error("of the user's")
        return mean

    svi = make(observing(mean_of))
    svi.step(X)
    fails.append(True)
    with pytest.raises(error, match="^of the user's"):
        svi.step(X)
    fails.clear()
    for _ in range(4):
        svi.step(X)


def test_a_wrong_shape_raises_what_an_eager_step_does():
    wrong = []
    svi = make(observing(lambda mean: mean @ torch.ones(2) if wrong else mean))
    svi.step(X)
    wrong.append(True)
    with pytest.raises(RuntimeError, match="inconsistent tensor size|size mismatch"):
        svi.step(X)


def test_a_failed_recording_leaves_buffers_alone():
    norm = nn.BatchNorm1d(3)

    def mean_of(mean):
        return scripted(norm(mean + torch.arange(2.0)[:, None]).sum(0))

    svi = make(observing(mean_of))
    svi.step(X)
    before = norm.running_mean.clone(), norm.num_batches_tracked.clone()
    with pytest.raises(RuntimeError, match="cannot record"):
        svi.step(X)
    torch.testing.assert_close((norm.running_mean, norm.num_batches_tracked), before)


def test_refusals_name_the_users_line():
    def mean_of(mean):
        return mean * mean.sum().item()  # here

    svi = make(observing(mean_of))
    svi.step(X)
    line = mean_of.__code__.co_firstlineno + 1
    assert "# here" in linecache.getline(__file__, line)
    with pytest.raises(RuntimeError, match=rf"Line {line} of .*test_captured_errors\.py: return"):
        svi.step(X)
