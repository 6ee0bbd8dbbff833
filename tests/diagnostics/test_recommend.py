"""Recommendations on problems whose answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from toys import bits, chain

from pyro_gumbel.diagnostics import Recommendation, gradient_draws, recommend
from pyro_gumbel.estimators import (
    ARMS,
    DisARM,
    Enumerate,
    Estimator,
    LeaveOneOut,
    MovingAverage,
    Pathwise,
    Score,
    StraightThrough,
)
from pyro_gumbel.estimators.straight_through import OneHotEstimator
from pyro_gumbel.infer import config_gradient


def small():
    """Few states, in a plate: all of them can be summed."""
    problem = chain()
    problem.reset(torch.float32)
    return problem.model, problem.guide, ()


def black_box():
    """A table of costs, read by an index: no gradient passes."""
    table = 2 * torch.randn(2**5, generator=torch.Generator().manual_seed(1))

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(torch.full((5,), 0.4)).to_event(1))
        pyro.factor("f", table[(z.detach().long() * 2 ** torch.arange(5)).sum(-1)])

    def guide() -> None:
        logits = pyro.param("l", torch.tensor([0.3, -0.2, 0.5, 0.0, 0.1]))
        pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

    return model, guide, ()


def decoder():
    """Sixteen latents of eight categories for each of fifty images, through networks."""
    latents, categories, pixels = 16, 8, 64
    encoder = nn.Sequential(nn.Linear(pixels, 64), nn.ReLU(), nn.Linear(64, latents * categories))
    network = nn.Sequential(nn.Linear(latents * categories, 64), nn.ReLU(), nn.Linear(64, pixels))
    x = (torch.rand(50, pixels) < torch.rand(pixels)).float()

    def model(x: torch.Tensor) -> None:
        pyro.module("decoder", network)
        with pyro.plate("n", len(x)):
            prior = dist.OneHotCategorical(logits=torch.zeros(latents, categories))
            z = pyro.sample("z", prior.to_event(1))
            pixel = dist.Bernoulli(logits=network(z.flatten(-2)))
            pyro.sample("x", pixel.to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("n", len(x)):
            logits = encoder(x).unflatten(-1, (latents, categories))
            pyro.sample("z", dist.OneHotCategorical(logits=logits).to_event(1))

    return model, guide, (x,)


def continuous():
    """Reparameterised latents."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        pyro.sample("x", dist.Normal((z**2).sum(-1), 1.0), obs=torch.tensor(2.0))

    def guide() -> None:
        loc = pyro.param("m", torch.full((5,), 0.3))
        scale = pyro.param("s", torch.ones(5), constraint=dist.constraints.positive)
        pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return model, guide, ()


KNOWN = {
    "small": (small, 15, (Enumerate,)),
    "black_box": (black_box, 20, (DisARM, ARMS, Score)),
    "decoder": (decoder, 25, (OneHotEstimator,)),
    "continuous": (continuous, 8, (Pathwise,)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_known_answers(name: str) -> None:
    make, budget, expected = KNOWN[name]
    model, guide, args = make()
    found = recommend(model, guide, *args, budget_seconds=budget, progress=False)
    assert all(isinstance(choice, expected) for choice in found.config.values()), str(found)
    unpacked, table = found
    assert unpacked is found.config
    assert table.index[0].split(",")[0] in str(table.index)
    # The configuration is one that can be used.
    elbo = found.elbo()
    elbo.loss_and_grads(model, config_gradient(guide, found.config), *args)
    assert elbo.num_particles == found.num_particles


def quick(make=small, **options: Any) -> Recommendation:
    model, guide, args = make()
    return recommend(model, guide, *args, **({"budget_seconds": 2.0, "progress": False} | options))


def test_candidates_of_the_caller() -> None:
    found = quick(
        candidates={"exact": Enumerate(), "straight": StraightThrough(), "score": Score()}
    )
    assert found.config == {"a": found.config["a"], "b": found.config["a"], "c": found.config["a"]}
    assert isinstance(found.config["a"], Enumerate)
    assert {"exact", "straight", "score"} <= set(found.table.index)
    assert found.table.loc["exact", "error"] < 1e-6
    assert "against the exact gradient" in found.message
    assert not found.within_noise
    assert "Enumerate()" in str(found)


def test_visible_bias_is_said() -> None:
    found = quick(
        black_box,
        candidates={"straight": StraightThrough()},
        num_particles=1,
    )
    assert isinstance(found.config["z"], StraightThrough)
    assert "Its bias is visible" in found.message
    assert "biased" in found.table.loc["straight", "warning"]
    assert "needs the cost's gradient" in found.table.loc["straight", "warning"]


def test_twins_are_measured_once() -> None:
    twin = quick(candidates={"one": Score(), "other": Score(None)}, make=bits_program)
    assert list(twin.table.index) == ["one"]


def bits_program():
    problem = bits()
    problem.reset(torch.float32)
    return problem.model, problem.guide, ()


@pytest.mark.slow  # the clock decides how many draws its verdict rests on
def test_equal_candidates_are_within_noise() -> None:
    found = quick(
        candidates={"one": Score(MovingAverage(0.9)), "other": Score(MovingAverage(0.91))},
        make=bits_program,
    )
    assert found.within_noise
    assert "Within noise" in found.message


def test_long_run_as_reference() -> None:
    found = quick(
        max_states=2, candidates={"score": Score(LeaveOneOut()), "st": StraightThrough()}
    )
    assert "long run of" in found.message


@pytest.mark.slow  # it rests on seconds, which a busy machine stretches
def test_step_seconds_decide_between_bias_and_noise() -> None:
    """Much time a step averages noise away, but not bias."""
    candidates: dict[str, Estimator] = {"score": Score(), "st": StraightThrough()}
    options = {"candidates": candidates, "budget_seconds": 4.0, "make": bits_program}
    patient = quick(step_seconds=1000.0, **options)
    assert isinstance(patient.config["z"], Score)
    hasty = quick(step_seconds=1e-4, **options)
    assert isinstance(hasty.config["z"], StraightThrough)


def test_sites_may_differ() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3))
        y = pyro.sample("y", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(y, 1.0), obs=torch.tensor(0.4))

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.2))))
        pyro.sample("y", dist.Normal(pyro.param("m", torch.tensor(0.0)), 0.8))

    found = recommend(
        model,
        guide,
        budget_seconds=3.0,
        candidates={"exact": Enumerate(), "disarm": DisARM()},
        progress=False,
    )
    assert isinstance(found.config["z"], (Enumerate, DisARM))
    assert isinstance(found.config["y"], Pathwise)


def test_parameters_not_made_yet_are_the_same_for_all() -> None:
    def model() -> None:
        pyro.sample("z", dist.Bernoulli(0.3))

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", lambda: torch.randn(()))))

    found = recommend(
        model,
        guide,
        budget_seconds=1.0,
        candidates={"exact": Enumerate(), "score": Score()},
        progress=False,
    )
    assert found.table.bias_z.max() < 5


def test_draws_agree_with_the_table() -> None:
    found = quick(candidates={"score": Score()}, make=bits_program)
    model, guide, _ = bits_program()
    draws = gradient_draws(
        model, guide, estimators={"s": Score()}, num_draws=200, site_draws=0, progress=False
    )["s"]
    variance = sum(float(draws[name].var(("chain", "draw"), ddof=1).sum()) for name in draws)
    row = found.table.loc["score"]
    assert abs(row.variance - variance) < 5 * np.hypot(row.variance_mcse, 0.1 * variance)


def no_sites() -> None:
    pyro.param("l", torch.zeros(()))
    pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))


def some_site() -> None:
    pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.zeros(()))))


def broken_model() -> None:
    pyro.sample("z", dist.Bernoulli(0.5))
    if torch.is_grad_enabled():
        raise RuntimeError("only without gradient")


@pytest.mark.parametrize(
    ("model", "guide", "options", "error", "match"),
    [
        (no_sites, no_sites, {}, ValueError, "the guide has no latent site"),
        (
            some_site,
            some_site,
            {"budget_seconds": 0},
            ValueError,
            "budget_seconds must be positive",
        ),
        (
            some_site,
            some_site,
            {"step_seconds": -1.0},
            ValueError,
            "step_seconds must be positive",
        ),
        (
            some_site,
            some_site,
            {"candidates": {"r": "reinmax"}},
            TypeError,
            r"candidates\['r'\] must be an estimator such as ReinMax\(\)",
        ),
        (
            some_site,
            some_site,
            {"candidates": {"p": Pathwise()}},
            ValueError,
            r"no candidate of \['p'\] can serve a site",
        ),
        (
            broken_model,
            some_site,
            {"candidates": {"s": Score()}},
            ValueError,
            "no candidate runs on these programs. s: cannot be run: RuntimeError: only without",
        ),
    ],
)
def test_errors(model, guide, options, error, match) -> None:
    with pytest.raises(error, match=match):
        recommend(model, guide, **({"budget_seconds": 0.5, "progress": False} | options))
