"""The budget of a recommendation: what it buys, in seconds and in evaluations."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.decisions import bits_program, black_box, quick, small

from pyro_gumbel.estimators import (
    DisARM,
    DoubleControlVariate,
    Enumerate,
    Estimator,
    Score,
    StraightThrough,
)


class Clock:
    """Time that passes only while a model runs, so that verdicts do not rest on the machine."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def on(
        self,
        make: Callable[[], Any],
        seconds: float = 1e-3,
        pauses: Mapping[int, float] = MappingProxyType({}),
    ) -> Callable[[], Any]:
        """Let each run of the model take so long, and some, by number, so much longer."""

        def timed() -> Any:
            model, guide, args = make()
            number = itertools.count()

            @functools.wraps(model)
            def slow(*args: Any) -> None:
                self.now += seconds + pauses.get(next(number), 0.0)
                model(*args)

            return slow, guide, args

        return timed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


@pytest.mark.parametrize("number", range(12, 24))
def test_a_pause_of_the_machine_rules_nothing_out(clock: Clock, number: int) -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(z, 0.5), obs=torch.tensor(0.8))

    found = quick(
        clock.on(lambda: (model, some_site, ()), 1e-2, {number: 0.15}),
        candidates={"straight": StraightThrough(), "exact": Enumerate()},
        budget_evaluations=None,
        budget_seconds=2.0,
    )
    assert isinstance(found.config["z"], Enumerate)
    assert found.table.draws.notna().all()


def test_what_failed_is_printed_with_its_reason() -> None:
    found = quick(
        black_box,
        candidates={"score": Score(), "sixteen": DoubleControlVariate(16)},
        budget_evaluations=200,
    )
    assert str(found).splitlines()[-1] == (
        "sixteen: too slow for the budget: 16 evaluations a gradient"
    )
    assert "score:" not in str(found)


def test_a_step_in_seconds_decides_likewise(clock: Clock) -> None:
    candidates: dict[str, Estimator] = {"score": Score(), "st": StraightThrough()}
    options = {"candidates": candidates, "make": clock.on(bits_program, 2e-3)}
    options |= {"budget_evaluations": None, "budget_seconds": 2.0}
    assert isinstance(quick(step_seconds=1000.0, **options).config["z"], Score)
    assert isinstance(quick(step_seconds=1e-4, **options).config["z"], StraightThrough)


FEW = {"score": Score(), "disarm": DisARM(), "straight": StraightThrough()}


@pytest.mark.parametrize("max_states", [20_000, 2], ids=["exact", "drawn"])
def test_budget_of_seconds_is_kept(clock: Clock, max_states: int) -> None:
    found = quick(
        clock.on(small, 2e-3),
        candidates=FEW,
        max_states=max_states,
        budget_evaluations=None,
        budget_seconds=1.0,
    )
    assert 0.75 < clock.now < 1.1
    assert found.table.draws.max() > 15
    # The cost of a gradient is known, and so is what a second buys.
    noisy = found.table[found.table.variance > 0]
    np.testing.assert_allclose(noisy.seconds, 2e-3 * noisy.evaluations)
    np.testing.assert_allclose(noisy.efficiency, 1 / (noisy.variance * noisy.seconds))


@pytest.mark.parametrize(
    ("candidates", "max_states"), [(None, 20_000), (FEW, 2)], ids=["all, exact", "few, drawn"]
)
def test_budget_of_evaluations_is_kept(candidates: Any, max_states: int) -> None:
    model, guide, args = small()
    runs = 0

    def counted() -> None:
        nonlocal runs
        runs += 1
        model()

    found = quick(
        lambda: (counted, guide, args),
        candidates=candidates,
        max_states=max_states,
        budget_evaluations=1000,
    )
    assert runs < 1100  # an evaluation is a run at most
    spent = (found.table.draws * found.table.evaluations).sum()
    assert 250 < spent < 1000


def test_budget_of_evaluations_ignores_the_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    candidates = {"score": Score(), "straight": StraightThrough(), "disarm": DisARM()}
    steady = quick(bits_program, candidates=candidates)
    ticks = itertools.accumulate(np.random.default_rng(0).exponential(5.0, size=10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    busy = quick(bits_program, candidates=candidates)
    timed = ["seconds", "seconds_mcse", "efficiency", "efficiency_mcse"]
    pd.testing.assert_frame_equal(steady.table.drop(columns=timed), busy.table.drop(columns=timed))
    assert steady.message == busy.message


def test_expensive_candidates_are_left_out() -> None:
    found = quick(
        black_box,
        candidates={"score": Score(), "sixteen": DoubleControlVariate(16)},
        budget_evaluations=200,
    )
    assert isinstance(found.config["z"], Score)
    assert "The budget was too short for 1 of 2 candidates" in found.message
    assert "too slow for the budget: 16 evaluations" in found.table.loc["sixteen", "warning"]


def test_much_too_short_a_budget_still_gives_an_answer() -> None:
    found = quick(black_box, budget_evaluations=2)
    assert set(found.config) == {"z"}
    assert "The budget was too short for" in found.message
    assert "not tried: the budget was too short" in set(found.table.warning)
    assert found.table.draws.sum() < 10


@pytest.mark.parametrize("unit", ["seconds", "evaluations"])
def test_states_visited_one_by_one_keep_to_the_budget(clock: Clock, unit: str) -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(torch.full((12,), 0.4)).to_event(1))
        pyro.factor("f", z.sum() if z[0] > 0 else -z.prod())

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.zeros(12))).to_event(1))

    options = {"budget_evaluations": None, "budget_seconds": 2.0} if unit == "seconds" else {}
    found = quick(clock.on(lambda: (model, guide, ())), candidates={"s": Score()}, **options)
    assert "against a long run of" in found.message
    assert clock.now < 2.1


def some_site() -> None:
    pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.zeros(()))))
