"""Training histories: what SVI would do, seed by seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.toys import bits, chain
from pyro.infer import SVI

from pyro_gumbel.diagnostics import train
from pyro_gumbel.estimators import ReinMax
from pyro_gumbel.infer import Estimator_ELBO, config_gradient


def run(problem, **options: Any):
    defaults = {"optim": pyro.optim.Adam({"lr": 0.1}), "num_steps": 6, "progress": False}
    return train(problem.model, problem.guide, **(defaults | options))


@pytest.mark.parametrize("factory", [False, True])
def test_steps_are_those_of_svi(factory: bool) -> None:
    problem = chain()
    problem.reset(torch.float64)

    def make() -> pyro.optim.PyroOptim:
        return pyro.optim.ClippedAdam({"lr": 0.1})

    history = run(
        problem,
        estimators={"score": "score", "reinmax": ReinMax()},
        optim=make if factory else make(),
        seeds=[3, 8],
    )
    assert history.elbo.dims == ("chain", "draw", "estimator")
    assert set(history) == {"elbo", "grad_norm", "seconds"}
    assert list(history.seed.values) == [3, 8]
    assert list(history.draw.values) == [1, 2, 3, 4, 5, 6]
    for seed in (3, 8):
        problem.reset(torch.float64)
        pyro.set_rng_seed(seed)
        guide = config_gradient(problem.guide, ReinMax())
        svi = SVI(problem.model, guide, make(), Estimator_ELBO())
        losses = [svi.step() for _ in range(6)]
        mine = history.elbo.sel(estimator="reinmax", chain=[3, 8].index(seed))
        np.testing.assert_allclose(-mine, losses, rtol=1e-12)


def test_norm_of_the_gradient() -> None:
    problem = bits()
    problem.reset(torch.float64)
    history = run(problem, estimators={"r": "reinmax"}, num_steps=1)
    pyro.set_rng_seed(0)
    guide = config_gradient(problem.guide, "reinmax")
    Estimator_ELBO().loss_and_grads(problem.model, guide)
    norm = np.linalg.norm(problem.gradients())
    assert float(history.grad_norm[0, 0, 0]) == pytest.approx(norm)


def test_learnable_estimators_are_trained() -> None:
    problem = bits()
    problem.reset(torch.float32)
    history = run(problem, estimators={"rebar": "rebar"}, num_steps=3)
    assert np.isfinite(history.elbo).all()


def test_minibatches() -> None:
    seen = []

    def model(x: torch.Tensor) -> None:
        seen.append(x.item())
        pyro.sample("z", dist.Bernoulli(0.3))

    def guide(x: torch.Tensor) -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.zeros(()))))

    train(
        model,
        guide,
        estimators={"s": "score"},
        optim=pyro.optim.SGD({"lr": 0.1}),
        num_steps=3,
        batches=lambda step: (torch.tensor(float(step)),),
        progress=False,
    )
    assert seen[-3:] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"estimators": {}}, ValueError, "estimators is empty; write"),
        ({"num_steps": 0}, ValueError, "num_steps must be an integer of at least 1; got 0"),
        ({"seeds": []}, ValueError, "seeds is empty"),
        ({"optim": "adam"}, TypeError, "optim must be a Pyro optimiser"),
        ({"optim": dict}, TypeError, "optim must be a Pyro optimiser"),
    ],
)
def test_errors(options, error, match) -> None:
    problem = bits()
    problem.reset(torch.float32)
    with pytest.raises(error, match=match):
        run(problem, **({"estimators": {"s": "score"}} | options))
