"""Sums over marked sites of the model against Pyro's and brute force, where shapes could mislead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

from pyro_gumbel.infer import Estimator_ELBO

SUM = {"enumerate": "parallel"}
Program = Callable[..., Any]


def no_guide() -> None: ...


def loss_and_grads(elbo: Any, model: Program, guide: Program) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    loss = elbo.differentiable_loss(model, guide)
    names = sorted(pyro.get_param_store().keys())
    params = [pyro.param(name).unconstrained() for name in names]
    return loss, list(torch.autograd.grad(loss, params))


def assert_as_pyro(model: Program, guide: Program, *, nesting: int) -> None:
    pyro.clear_param_store()
    with torch.random.fork_rng():
        expected, grads = loss_and_grads(TraceEnum_ELBO(max_plate_nesting=nesting), model, guide)
        loss, ours = loss_and_grads(Estimator_ELBO(max_plate_nesting=nesting), model, guide)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours, grads)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("depends", [True, False])
@pytest.mark.parametrize("nesting", [0, 1])
def test_sites_of_events(size: int, depends: bool, nesting: int) -> None:
    """The dimensions that ``to_event`` joined are not those of summed values."""

    def model() -> None:
        logits = pyro.param("logits", torch.tensor([0.3, -0.2, 0.5]))
        z = pyro.sample("z", dist.Categorical(logits=logits), infer=SUM)
        shift = torch.tensor([0.0, 3.0, -1.0])[z]
        loc = (shift if depends else torch.zeros(())).unsqueeze(-1)
        w = pyro.sample("w", dist.Normal(loc.expand(*loc.shape[:-1], size), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(w.sum(-1) + shift, 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        loc = pyro.param("loc", torch.full((size,), 0.2))
        pyro.sample("w", dist.Normal(loc, 1.0).to_event(1))

    assert_as_pyro(model, guide, nesting=nesting)


@pytest.mark.parametrize("validate", [True, False])
def test_a_value_used_outside_of_its_chain(validate: bool) -> None:
    def model() -> None:
        z = torch.tensor(0)
        for t in pyro.markov(range(2)):
            probs = torch.tensor([[0.2, 0.8], [0.6, 0.4]])[z]
            z = pyro.sample(f"z{t}", dist.Categorical(probs), infer=SUM)
        pyro.sample("x", dist.Normal(z.float(), 1.0), obs=torch.tensor(1.0))

    with (
        pyro.validation_enabled(validate),
        pytest.raises(ValueError, match=r"'x' has the log-probability shape .*pyro\.markov"),
    ):
        Estimator_ELBO(max_plate_nesting=0).loss(model, no_guide)
