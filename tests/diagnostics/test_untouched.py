"""Diagnostics leave no trace: everything is, bit for bit, as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

from pyro_gumbel.diagnostics import (
    check_unbiased,
    exact_gradient,
    gradient_draws,
    guide_khat,
    recommend,
    train,
)
from pyro_gumbel.estimators import (
    Exponential,
    GumbelStraightThrough,
    MovingAverage,
    NeuralBaseline,
    Score,
)
from pyro_gumbel.infer import Estimator_ELBO, config_gradient


class Problem:
    """A module with a buffer, a plain parameter, and estimators that remember."""

    def __init__(self) -> None:
        self.encoder = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 3))
        self.moving = Score(MovingAverage())
        self.neural = Score(NeuralBaseline(torch.nn.Linear(2, 1), "x"))
        self.annealed = GumbelStraightThrough(Exponential(1.0, 0.1, 0.1))
        config = {"a": self.moving, "c": "score", "d": self.annealed}
        self.configured = config_gradient(self.guide, config)
        self.x = torch.randn(5, 2)

    def model(self, x: torch.Tensor) -> None:
        w = pyro.param("w", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("n", len(x)):
            a = pyro.sample("a", dist.Bernoulli(0.4))
            b = pyro.sample("b", dist.Bernoulli(0.4))
            c = pyro.sample("c", dist.Bernoulli(0.6))
            d = pyro.sample("d", dist.Bernoulli(0.6))
            mean = w * (a + b * c) + d
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x.sum(-1))

    def guide(self, x: torch.Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("n", len(x)):
            logits = self.encoder(x)
            pyro.sample("a", dist.Bernoulli(logits=logits[:, 0]))
            pyro.sample("b", dist.Bernoulli(logits=logits[:, 1]), infer={"gradient": self.neural})
            pyro.sample("c", dist.Bernoulli(logits=logits[:, 2]))
            pyro.sample("d", dist.Bernoulli(logits=logits[:, 2]))


class Watched:
    """All that must not change."""

    def __init__(self) -> None:
        self.problem = Problem()
        self.elbo = Estimator_ELBO()
        self.optim = pyro.optim.Adam({"lr": 0.05})
        svi = SVI(self.problem.model, self.problem.configured, self.optim, self.elbo)
        for _ in range(3):
            svi.step(self.problem.x)
        self.step = svi.step
        for leaf in pyro.get_param_store()._params.values():
            leaf.grad = torch.full_like(leaf, 0.25)

    def state(self) -> dict[str, Any]:
        store = pyro.get_param_store()
        problem = self.problem
        estimators = (problem.moving, problem.neural, problem.annealed)
        named = {k: v for k, v in vars(self.elbo._auto).items() if isinstance(v, torch.nn.Module)}
        return {
            "names": list(store.keys()),
            "leaves": [id(leaf) for leaf in store._params.values()],
            "values": [leaf.detach().clone() for leaf in store._params.values()],
            "gradients": [leaf.grad.clone() for leaf in store._params.values()],
            "buffers": {k: v.clone() for k, v in problem.encoder.state_dict().items()},
            "optimizer": self.optim.get_state(),
            "estimators": [estimator.state_dict() for estimator in estimators],
            "named": {name: module.state_dict() for name, module in named.items()},
            "generators": [torch.get_rng_state(), np.random.get_state(), random.getstate()],
        }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


QUIET = {"progress": False}
OPTIM = pyro.optim.Adam({"lr": 0.1})
CALLS: dict[str, Callable[[Watched], Any]] = {
    "gradient_draws": lambda w: gradient_draws(
        w.problem.model,
        w.problem.configured,
        w.problem.x,
        estimators={
            "as it is": w.elbo,
            "annealed": {"a": w.problem.annealed},
            "named": "rebar",
            "several": (w.problem.moving, Estimator_ELBO(2)),
        },
        num_draws=4,
        **QUIET,
    ),
    "gradient_draws, projected, elsewhere": lambda w: gradient_draws(
        w.problem.model,
        w.problem.configured,
        w.problem.x,
        estimators={"as it is": w.elbo},
        num_draws=4,
        project=2,
        params={"w": torch.tensor(3.0)},
        **QUIET,
    ),
    "exact_gradient": lambda w: exact_gradient(w.problem.model, w.problem.configured, w.problem.x),
    "guide_khat": lambda w: guide_khat(
        w.problem.model, w.problem.configured, w.problem.x, num_samples=30
    ),
    "train": lambda w: train(
        w.problem.model,
        w.problem.configured,
        w.problem.x,
        estimators={"as it is": w.elbo, "rebar": "rebar"},
        optim=w.optim,
        num_steps=3,
        seeds=2,
        **QUIET,
    ),
    "recommend": lambda w: recommend(
        w.problem.model,
        w.problem.configured,
        w.problem.x,
        budget_seconds=0.5,
        candidates={"annealed": w.problem.annealed, "moving": w.problem.moving},
        **QUIET,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_changes(name: str) -> None:
    watched = Watched()
    before = watched.state()
    CALLS[name](watched)
    after = watched.state()
    changed = [key for key in before if not same(before[key], after[key])]
    assert changed == []


def test_the_next_step_is_the_same() -> None:
    losses = []
    for disturb in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        watched = Watched()
        if disturb:
            CALLS["gradient_draws"](watched)
            CALLS["train"](watched)
        losses.append([watched.step(watched.problem.x) for _ in range(3)])
    assert losses[0] == losses[1]


def test_state_is_put_back_after_an_error() -> None:
    watched = Watched()
    before = watched.state()
    with pytest.raises(ValueError, match="num_values|cannot serve"):
        gradient_draws(
            watched.problem.model,
            watched.problem.configured,
            watched.problem.x,
            estimators={"fine": "score", "not for bits": "disarm_tree"},
            num_draws=3,
            **QUIET,
        )
    assert same(before, watched.state())


def test_module_that_the_store_has_not_met() -> None:
    problem = Problem()
    weight = problem.encoder[1].weight
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    train(
        lambda x: problem.model(x),
        lambda x: problem.guide(x),
        problem.x,
        estimators={"score": "score"},
        optim=OPTIM,
        num_steps=2,
        **QUIET,
    )
    assert torch.equal(weight, before)
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert len(pyro.get_param_store()) == 0


def test_check_unbiased_changes_nothing() -> None:
    watched = Watched()
    before = watched.state()
    with pytest.warns(UserWarning, match="a smaller bias goes unseen"):
        check_unbiased(
            watched.problem.model,
            watched.problem.guide,
            watched.problem.x,
            estimator=watched.problem.moving,
            num_draws=20,
        )
    assert same(before, watched.state())
