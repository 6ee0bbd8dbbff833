"""Errors while a step is recorded: those of the recording are told, the user's are left alone."""

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


def compiled(mean):
    return torch.compile(nn.Identity())(mean)  # here, for it turns torch's validation off


@torch.jit.script
def scripted(mean):
    if bool(mean.sum() > 5):
        return mean + 1
    return mean - 1


def by_nested(mean):
    return torch.nested.to_padded_tensor(torch.nested.nested_tensor([X]), 0.0)[0] + mean


@pytest.mark.parametrize("mean_of", [compiled, scripted, by_nested])
def test_what_cannot_be_recorded_is_told_in_our_words(mean_of):
    svi = make(observing(mean_of))
    svi.step(X)
    before = pyro.param("mean").detach().clone()
    with pytest.raises(RuntimeError, match=r"^CapturedSVI cannot record.*pyro\.infer\.SVI") as got:
        svi.step(X)
    assert "Trace Shapes" not in str(got.value)
    assert got.value.__cause__ is not None
    torch.testing.assert_close(pyro.param("mean").detach(), before)


@pytest.mark.parametrize("error", [ValueError, RuntimeError, NotImplementedError])
def test_the_users_own_errors_come_through(error):
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


def test_a_wrong_shape_is_told_as_an_eager_step_does():
    wrong = []
    svi = make(observing(lambda mean: mean @ torch.ones(2) if wrong else mean))
    svi.step(X)
    wrong.append(True)
    with pytest.raises(RuntimeError, match="inconsistent tensor size|size mismatch"):
        svi.step(X)


def test_a_failed_recording_leaves_buffers_alone():
    norm = nn.BatchNorm1d(3)

    def mean_of(mean):
        return compiled(norm(mean + torch.arange(2.0)[:, None]).sum(0))

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
    with pytest.raises(RuntimeError, match=rf"Line {line} of .*test_recording_errors\.py: return"):
        svi.step(X)
