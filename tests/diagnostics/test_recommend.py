"""Recommendations on problems whose answer is known."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.decisions import bits_program, black_box, continuous, decoder, quick, small

from pyro_gumbel.diagnostics import gradient_draws, recommend
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

KNOWN = {
    "small": (small, 20_000, (Enumerate,)),
    "black_box": (black_box, 20_000, (DisARM, ARMS, Score)),
    "decoder": (decoder, 8_000, (OneHotEstimator,)),
    "continuous": (continuous, 10_000, (Pathwise,)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_known_answers(name: str) -> None:
    make, budget, expected = KNOWN[name]
    model, guide, args = make()
    found = recommend(model, guide, *args, budget_evaluations=budget, progress=False)
    assert all(isinstance(choice, expected) for choice in found.config.values()), str(found)
    unpacked, table = found
    assert unpacked is found.config
    assert table.index[0].split(",")[0] in str(table.index)
    # The configuration is one that can be used.
    elbo = found.elbo()
    elbo.loss_and_grads(model, config_gradient(guide, found.config), *args)
    assert elbo.num_particles == found.num_particles


def test_candidates_of_the_caller() -> None:
    found = quick(
        candidates={"exact": Enumerate(), "straight": StraightThrough(), "score": Score()},
        budget_evaluations=800,
    )
    assert found.config == {"a": found.config["a"], "b": found.config["a"], "c": found.config["a"]}
    assert isinstance(found.config["a"], Enumerate)
    assert {"exact", "straight", "score"} <= set(found.table.index)
    assert found.table.loc["exact", "error"] < 1e-6
    assert "against the exact gradient" in found.message
    assert not found.within_noise
    assert "Enumerate()" in str(found)


def test_visible_bias_is_reported() -> None:
    found = quick(
        black_box,
        candidates={"straight": StraightThrough()},
        num_particles=1,
    )
    assert isinstance(found.config["z"], StraightThrough)
    assert "Its bias is visible" in found.message
    assert "biased" in found.table.loc["straight", "warning"]
    assert "needs the cost's gradient" in found.table.loc["straight", "warning"]


def test_estimators_that_miss_the_cost_rank_last() -> None:
    found = quick(
        black_box,
        candidates={"score": Score(LeaveOneOut()), "straight": StraightThrough()},
        step_evaluations=1,
    )
    assert isinstance(found.config["z"], Score)
    assert "straight" not in found.message


def test_a_mixture_that_misses_the_cost_says_so() -> None:
    """Its warning is that of the candidate which brought the estimator."""

    def model() -> None:
        a = pyro.sample("a", dist.Bernoulli(0.4))
        b = pyro.sample("b", dist.Bernoulli(0.4))
        pyro.factor("f", 2 * a + torch.tensor([-3.0, 2.0])[b.long()])

    def guide() -> None:
        for name in ("a", "b"):
            pyro.sample(name, dist.Bernoulli(logits=pyro.param(name + "_l", torch.tensor(0.3))))

    found = quick(
        lambda: (model, guide, ()),
        candidates={"score": Score(LeaveOneOut()), "straight": StraightThrough()},
        budget_evaluations=2000,
        step_evaluations=1000,
    )
    table = found.table
    assert "needs the cost's gradient" in table.warning["straight"]
    assert "needs the cost's gradient" in table.warning["score, a: straight, b: straight"]
    assert "needs the cost's gradient" not in table.warning["score, a: straight"]
    assert isinstance(found.config["b"], Score)


def test_a_moving_average_has_to_be_clearly_ahead() -> None:
    candidates = {"average": Score(MovingAverage()), "others": Score(LeaveOneOut())}
    ahead = quick(bits_program, candidates=candidates, budget_evaluations=3000)
    assert isinstance(ahead.config["z"].baseline, MovingAverage)
    near = quick(bits_program, candidates=candidates, budget_evaluations=400)
    assert isinstance(near.config["z"].baseline, LeaveOneOut)
    assert list(near.table.index) == ["others", "average"]
    assert near.table.error["average"] < near.table.error["others"]
    assert "Within noise: average may be as good" in near.message


def test_twins_are_measured_once() -> None:
    twin = quick(candidates={"one": Score(), "other": Score(None)}, make=bits_program)
    assert list(twin.table.index) == ["one"]


def test_other_warnings_do_not_change_the_rank() -> None:
    """One that speaks up once, as torch often does, has nothing to do with who ran first."""
    model, guide, args = small()
    said: list[str] = []

    def speaking() -> None:
        if torch.is_grad_enabled() and len(said) < 2:
            said.append("now")
            warnings.warn("beta", stacklevel=1)
        model()

    found = quick(
        lambda: (speaking, guide, args),
        candidates={"exact": Enumerate(), "straight": StraightThrough()},
        budget_evaluations=800,
        max_states=1,
    )
    assert isinstance(found.config["a"], Enumerate)
    assert found.table.loc["exact", "warning"] == "beta"


def test_candidates_with_infinite_gradients_fail() -> None:
    """One bad draw is enough: it shows no error, and no step can be taken with it."""

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.factor("f", z.sqrt())  # its slope at zero is infinite

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.2))))

    found = quick(
        lambda: (model, guide, ()),
        candidates={"straight": StraightThrough(), "score": Score()},
    )
    assert isinstance(found.config["z"], Score)
    assert "some gradients are not finite" in found.table.loc["straight", "warning"]
    assert np.isfinite(found.table.loc["score", "error"])


def test_equal_candidates_are_within_noise() -> None:
    found = quick(
        candidates={"one": Score(MovingAverage(0.9)), "other": Score(MovingAverage(0.91))},
        make=bits_program,
    )
    assert list(found.table.evaluations) == [1, 1]
    assert found.within_noise
    assert "Within noise" in found.message


def test_those_within_noise_are_named_and_few() -> None:
    """Labels may have commas, as those of mixtures do."""
    labels = ["a, z: b", "c, z: d", "e", "f", "g", "h"]
    candidates = {label: Score(MovingAverage(0.9 + i / 100)) for i, label in enumerate(labels)}
    found = quick(candidates=candidates, make=bits_program)
    others = list(found.table.index[1:])
    told = f" Within noise: {'; '.join(others[:3])} and 2 more may be as good."
    assert found.message.endswith(told)


def test_message_mentions_missed_events() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.factor("f", 500 * z)

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(-7.0))))

    found = quick(
        lambda: (model, guide, ()), candidates={"score": Score()}, budget_evaluations=200
    )
    assert "short of rare events" in found.table.loc["score", "warning"]
    assert re.search(
        r"Its bias is visible: .* \(z .*\), or its draws are short of rare events: about 0 of "
        r"\d+ draws carry the variance, so see whether the bias stays with many more\.$",
        found.message,
    )


def test_long_run_as_reference() -> None:
    found = quick(
        max_states=2, candidates={"score": Score(LeaveOneOut()), "st": StraightThrough()}
    )
    assert "long run of" in found.message


def test_a_step_decides_between_bias_and_noise() -> None:
    """Many evaluations a step average noise away, but not bias."""
    candidates: dict[str, Estimator] = {"score": Score(), "st": StraightThrough()}
    options = {"candidates": candidates, "make": bits_program}
    patient = quick(step_evaluations=500_000, **options)
    assert isinstance(patient.config["z"], Score)
    hasty = quick(step_evaluations=0.05, **options)
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
        budget_evaluations=800,
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
        budget_evaluations=1000,
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
            {"step_evaluations": 10},
            ValueError,
            "step_evaluations needs a budget in evaluations; got a budget in seconds",
        ),
        (
            some_site,
            some_site,
            {"budget_evaluations": 100, "step_seconds": 1.0},
            ValueError,
            r"step_seconds needs a budget in seconds.*Write step_evaluations=",
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
            r"no candidate of \['p'\] supports a site",
        ),
        (
            broken_model,
            some_site,
            {"candidates": {"s": Score()}, "max_states": 1},
            ValueError,
            "no candidate can be measured here. s: cannot be run: RuntimeError: only without",
        ),
    ],
)
def test_errors(model, guide, options, error, match) -> None:
    with pytest.raises(error, match=match):
        recommend(model, guide, **({"budget_seconds": 0.5, "progress": False} | options))


def test_an_error_of_the_program_is_raised_as_it_is() -> None:
    """It does not mean that there is no exact gradient."""
    with pytest.raises(RuntimeError, match="only without gradient"):
        recommend(broken_model, some_site, candidates={"s": Score()}, progress=False)


def listed() -> None:
    pyro.sample("z", dist.Poisson(pyro.param("r", torch.tensor(2.0))))


@pytest.mark.parametrize(("guide", "states"), [(some_site, 1), (listed, 100)])
def test_states_that_cannot_be_listed_or_are_too_many(guide, states: int) -> None:
    found = recommend(
        guide,
        guide,
        candidates={"s": Score()},
        max_states=states,
        budget_evaluations=200,
        progress=False,
    )
    assert "against a long run of 's'" in found.message
