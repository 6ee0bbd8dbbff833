"""Estimators beside a summed assignment agree with full enumeration, within two per cent.

Plates have a scale, a mask and minibatches. All minibatches are visited equally often, so that
their choice adds no noise.
"""

from __future__ import annotations

import itertools
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

from pyro_gumbel.infer import Estimator_ELBO, _costs, config_gradient

SUM = {"enumerate": "parallel"}
X = torch.tensor([0.3, -1.2, 2.1, 0.4, 1.7], dtype=torch.float64)
BATCHES = [torch.tensor(index) for index in itertools.combinations(range(5), 3)]
ALL = torch.arange(5)
Gradients = dict[str, Tensor]
Program = Callable[[Tensor], Any]


pytestmark = pytest.mark.usefixtures("in_float64")


def parameters() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        pyro.param("weights", torch.tensor([0.3, -0.2, 0.5])),
        pyro.param("locs", torch.tensor([-1.0, 0.0, 2.0])),
        pyro.param("shift", torch.tensor(0.7)),
        pyro.param("logits", torch.linspace(-0.5, 0.8, 5)),
    )


def model(index: Tensor) -> None:
    """A mixture with a Bernoulli switch for each datum; both shift the mean."""
    weights, locs, shift, _ = parameters()
    x = X[index]
    with pyro.plate("data", 5, subsample=index), poutine.scale(scale=0.8):
        on = pyro.sample("on", dist.Bernoulli(0.3))
        z = pyro.sample("z", dist.Categorical(logits=weights), infer=SUM)
        with poutine.mask(mask=x > -1):
            pyro.sample("x", dist.Normal(Vindex(locs)[z] + shift * on, 1.0), obs=x)


def guide(index: Tensor) -> None:
    logits = parameters()[-1]
    with pyro.plate("data", 5, subsample=index), poutine.scale(scale=0.8):
        pyro.sample("on", dist.Bernoulli(logits=logits[index]))


def guide_with_assignments(index: Tensor) -> None:
    """The same guide, and the assignments from their exact conditional, without parameters."""
    weights, locs, shift, logits = parameters()
    x = X[index].unsqueeze(-1)
    with pyro.plate("data", 5, subsample=index), poutine.scale(scale=0.8):
        on = pyro.sample("on", dist.Bernoulli(logits=logits[index]))
        loc = locs.detach() + shift.detach() * on.unsqueeze(-1)
        fit = dist.Normal(loc, 1.0).log_prob(x).masked_fill(x <= -1, 0.0)
        posterior = dist.Categorical(logits=weights.detach().log_softmax(-1) + fit)
        pyro.sample("z", posterior, infer={"gradient": "score"})


def step(elbo: Any, guide: Program, index: Tensor) -> Gradients:
    parameters()
    params = dict(pyro.get_param_store().named_parameters())
    params = {name: params[name] for name in ("weights", "locs", "shift", "logits")}
    loss = elbo.differentiable_loss(model, guide, index)
    grads = torch.autograd.grad(loss, [*params.values()])
    return {"loss": loss.detach(), **dict(zip(params, grads, strict=True))}


def exact() -> Gradients:
    return step(TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(guide), ALL)


def mean_and_error(name: str, rounds: int, particles: int) -> tuple[Gradients, Gradients]:
    """Return the mean over all minibatches, and its standard error."""
    options = {"vectorize_particles": True, "max_plate_nesting": 1}
    elbo = Estimator_ELBO(particles, default=name, **options)
    steps = [[step(elbo, guide, index) for _ in range(rounds)] for index in BATCHES]
    means, errors = {}, {}
    for key in steps[0][0]:
        rows = torch.stack([torch.stack([g[key] for g in batch]) for batch in steps])
        means[key] = rows.mean((0, 1))
        errors[key] = (rows.var(1) / rounds).sum(0).sqrt() / len(BATCHES)
    return means, errors


def worst(mean: Gradients, error: Gradients, wanted: Gradients) -> float:
    return max(((mean[k] - wanted[k]).abs() / (error[k] + 1e-10)).max().item() for k in wanted)


NAMES = ["disarm", "score", "local_expectation", "rebar", "enumerate"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_mean_is_that_of_full_enumeration(name: str) -> None:
    wanted = exact()
    mean, error = mean_and_error(name, 2 if name == "enumerate" else 30, 400)
    assert worst(mean, error, wanted) < 5
    # An error of two per cent would be seen.
    assert worst({k: 1.02 * v for k, v in wanted.items()}, error, wanted) > 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["disarm", "score", "local_expectation"])
def test_a_planted_error_of_two_per_cent_is_seen(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = _costs.Costs.downstream
    wanted = exact()
    monkeypatch.setattr(_costs.Costs, "downstream", lambda *a, **k: 0.98 * right(*a, **k))
    mean, error = mean_and_error(name, 30, 400)
    assert worst(mean, error, wanted) > 5


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_sum_has_no_more_variance_than_exact_conditional_draws(name: str) -> None:
    options = {"vectorize_particles": True, "max_plate_nesting": 1}
    variances: dict[str, list[float]] = {}
    for program in (guide, config_gradient(guide_with_assignments, {"on": name})):
        elbo = Estimator_ELBO(2, default=name, **options)
        steps = [step(elbo, program, BATCHES[0]) for _ in range(1500)]
        for key in steps[0]:
            rows = torch.stack([grads[key] for grads in steps])
            variances.setdefault(key, []).append(rows.var(0).sum().item())
    for key, (summed, drawn) in variances.items():
        # The loss and the gradient of its site are alike; the ratio has a standard error of 0.08.
        assert summed < 1.4 * drawn + 1e-20, key
    assert variances["locs"][0] < 0.2 * variances["locs"][1]
