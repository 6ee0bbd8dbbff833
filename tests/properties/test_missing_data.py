"""Models sum over missing labels and missing data as TraceEnum_ELBO does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints

from pyro_gumbel.infer import Estimator_ELBO, recover

SUM = {"enumerate": "parallel"}
Program = Callable[..., Any]
X = torch.tensor([0.3, -1.0, 2.0, 1.0], dtype=torch.float64)
SEEN = torch.tensor([True, True, False, True])
LABELS = torch.tensor([0, 1, 0, 1])
LOCS = torch.tensor([-0.5, 2.0], dtype=torch.float64)


pytestmark = pytest.mark.usefixtures("in_float64")


def weights() -> Tensor:
    return pyro.param("weights", torch.tensor([0.3, 0.7]), constraint=constraints.simplex)


def no_guide() -> None: ...


def labels_by_mask() -> None:
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.Categorical(weights()), obs=LABELS, obs_mask=SEEN)
        pyro.sample("x", dist.Normal(LOCS[z], 1.0), obs=X)


def labels_by_none() -> None:
    probs = weights()
    for i in pyro.plate("data", 4):
        given = LABELS[i] if SEEN[i] else None
        z = pyro.sample(f"z{i}", dist.Categorical(probs), obs=given)
        pyro.sample(f"x{i}", dist.Normal(LOCS[z], 1.0), obs=X[i])


def data_by_mask() -> None:
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.Categorical(weights()), infer=SUM)
        pyro.sample("x", dist.Normal(LOCS[z], 1.0), obs=X, obs_mask=SEEN)


def guide_of_data() -> None:
    loc = pyro.param("loc", torch.tensor(0.3))
    with pyro.plate("data", 4), poutine.mask(mask=~SEEN):
        pyro.sample("x_unobserved", dist.Normal(loc, 1.2))


def data_are_nan() -> None:
    """A missing datum must not make the masked gradient NaN."""
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.Categorical(weights()), infer=SUM)
        with poutine.mask(mask=SEEN):
            loc = pyro.param("locs", LOCS.clone())[z]
            pyro.sample("x", dist.Normal(loc, 1.0), obs=X.masked_fill(~SEEN, 1e30))


def steps_by_mask() -> None:
    """A chain of six with gaps, of which some states are impossible."""
    step = pyro.param("step", torch.tensor([[0.8, 0.2], [0.0, 1.0]]))
    z = torch.tensor(0)
    for t in pyro.markov(range(6)):
        z = pyro.sample(f"z{t}", dist.Categorical(Vindex(step)[..., z, :]), infer=SUM)
        with poutine.mask(mask=t % 3 != 1):
            pyro.sample(f"x{t}", dist.Normal(LOCS[z], 1.0), obs=X[t % 4])


CASES: dict[str, tuple[Program, Program]] = {
    "labels, obs_mask": (config_enumerate(labels_by_mask, default="parallel"), no_guide),
    "labels, obs=None": (config_enumerate(labels_by_none, default="parallel"), no_guide),
    "data, obs_mask": (data_by_mask, guide_of_data),
    "data, mask": (data_are_nan, no_guide),
    "steps, mask": (steps_by_mask, no_guide),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("validate", [True, False])
def test_loss_and_gradients_equal_pyros(name: str, validate: bool) -> None:
    model, guide = CASES[name]
    results = []
    with pyro.validation_enabled(validate):
        for elbo in (TraceEnum_ELBO, Estimator_ELBO):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            loss = elbo(max_plate_nesting=1).differentiable_loss(model, guide)
            params = [p for _, p in sorted(pyro.get_param_store().named_parameters())]
            results.append([loss.detach(), *torch.autograd.grad(loss, params)])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert torch.isfinite(ours).all()
    assert any(grad.abs().sum() > 0 for grad in results[1][1:])


@pytest.mark.parametrize("name", ["labels, obs_mask", "labels, obs=None"])
def test_only_missing_labels_are_recovered(name: str) -> None:
    model, guide = CASES[name]
    found = recover(model, guide, marginals=True)
    (site,) = found
    probs = found[site].reshape(-1, 2)[0 if name == "labels, obs=None" else 2]
    joint = torch.tensor([0.3, 0.7]).log() + dist.Normal(LOCS, 1.0).log_prob(X[2])
    torch.testing.assert_close(probs, joint.softmax(-1))
