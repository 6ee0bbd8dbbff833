"""Guides with normalising flows: those that know no inverse score their own draws all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from torch import Tensor

from pyro_gumbel.infer import Estimator_ELBO, ImportanceWeighted_ELBO

WITHOUT_INVERSE: dict[str, Callable[[int], Any]] = {
    "planar": T.planar,
    "radial": T.radial,
    "sylvester": T.sylvester,
    "polynomial": T.polynomial,
    "neural_autoregressive": T.neural_autoregressive,
    "block_autoregressive": T.block_autoregressive,
}
LOSSES = {
    "elbo": (Estimator_ELBO, Trace_ELBO),
    "iwae": (ImportanceWeighted_ELBO, RenyiELBO),
}


def model() -> None:
    z = pyro.sample("z", dist.Normal(torch.tensor([0.3, -0.2]), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z.sum(-1), 0.7), obs=torch.tensor(1.0))


def guide_of(flow: Any) -> Callable[[], None]:
    def guide() -> None:
        pyro.module("flow", flow)
        base = dist.Normal(pyro.param("loc", torch.tensor([0.1, -0.4])), torch.ones(2))
        pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    return guide


def step(elbo: Any, guide: Callable[[], None]) -> list[Tensor]:
    """The loss and the gradients of one step from a known seed."""
    pyro.set_rng_seed(3)
    loss = torch.as_tensor(elbo.loss_and_grads(model, guide))
    params = list(pyro.get_param_store()._params.values())
    grads = [param.grad.clone() for param in params if param.grad is not None]
    for param in params:
        param.grad = None
    return [loss, *grads]


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("vectorize", [True, False], ids=["rows", "loop"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("flow", WITHOUT_INVERSE)
def test_flows_without_an_inverse_step_as_pyro_does(
    flow: str, loss: str, vectorize: bool, num_particles: int
) -> None:
    guide = guide_of(WITHOUT_INVERSE[flow](2))
    ours, pyros = (
        step(
            kind(num_particles=num_particles, vectorize_particles=vectorize, max_plate_nesting=0),
            guide,
        )
        for kind in LOSSES[loss]
    )
    assert len(ours) > 2
    torch.testing.assert_close(ours, pyros, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("vectorize", [True, False], ids=["rows", "loop"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_flow_of_an_autoguide_steps_as_pyro_s(
    loss: str, vectorize: bool, num_particles: int
) -> None:
    guide = AutoNormalizingFlow(model, T.planar)
    guide()
    ours, pyros = (
        step(
            kind(num_particles=num_particles, vectorize_particles=vectorize, max_plate_nesting=0),
            guide,
        )
        for kind in LOSSES[loss]
    )
    assert len(ours) > 2
    torch.testing.assert_close(ours, pyros, rtol=1e-5, atol=1e-6)
