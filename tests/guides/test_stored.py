"""Guides and the parameter store: a guide has the parameters that are trained."""

from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

from pyro_gumbel.guides import AutoAmortized, AutoDiscrete
from pyro_gumbel.infer import Estimator_ELBO

X = torch.tensor([0.3, -1.0, 2.5, 1.0])


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(z * 2, 1.0), obs=x)


def discrete():
    return AutoDiscrete(model, gradient="enumerate")


def of_a_function():
    return AutoAmortized(model, lambda x: torch.stack([x, x**2], -1), gradient="enumerate")


def of_a_network():
    network = nn.Sequential(nn.Unflatten(0, (4, 1)), nn.Linear(1, 8), nn.Tanh())
    return AutoAmortized(model, network, gradient="enumerate")


GUIDES = pytest.mark.parametrize("make", [discrete, of_a_function, of_a_network])


def train(guide, steps=30):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Estimator_ELBO())
    for _ in range(steps):
        svi.step(X)
    return probs(guide)


def probs(guide):
    return guide.posterior(X)["z"].probs.detach().clone()


@GUIDES
def test_loaded_store(make, tmp_path):
    trained = train(make())
    pyro.get_param_store().save(str(tmp_path / "store"))
    pyro.clear_param_store()
    pyro.get_param_store().load(str(tmp_path / "store"))
    guide = make()
    torch.testing.assert_close(probs(guide), trained)
    assert not torch.allclose(train(guide), trained)  # and it goes on from there


@GUIDES
def test_store_loaded_under_a_guide_at_work(make, tmp_path):
    guide = make()
    trained = train(guide)
    pyro.get_param_store().save(str(tmp_path / "store"))
    train(guide)
    pyro.clear_param_store()
    pyro.get_param_store().load(str(tmp_path / "store"))
    torch.testing.assert_close(probs(guide), trained)


@GUIDES
def test_second_guide_of_one_session_is_trained(make):
    """As when a cell of a notebook is run again: it goes on where the first one stopped."""
    first = make()
    trained = train(first)
    second = make()
    torch.testing.assert_close(probs(second), trained)
    assert not torch.allclose(train(second), trained)
    torch.testing.assert_close(probs(first), probs(second))


@GUIDES
def test_copy_keeps_its_values(make):
    guide = make()
    trained = train(guide)
    kept = copy.deepcopy(guide)
    train(guide)
    torch.testing.assert_close(probs(kept), trained)


def test_guide_of_another_shape_raises():
    train(discrete(), 1)
    with pytest.raises(
        ValueError, match=r"'AutoDiscrete.heads\$\$\$z.raw' with shape .*clear_param"
    ):
        AutoDiscrete(model)(X[:2])
