"""What callers pass: integers of any library will do, other kinds are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
import xarray as xr
from helpers.toys import bit_guide as guide
from helpers.toys import bit_model as model

from pyro_gumbel.diagnostics import (
    check_unbiased,
    compare_gradients,
    exact_gradient,
    gradient_draws,
    guide_khat,
    plot_efficiency,
    plot_gradients,
    plot_training,
    recommend,
    to_arviz,
    train,
)
from pyro_gumbel.estimators import Enumerate, ReinMax, Score

DRAWS = {"e": xr.Dataset({"l": (("chain", "draw"), np.zeros((4, 20)))})}
HISTORY = xr.Dataset(
    {name: (("chain", "draw"), np.ones((1, 20))) for name in ("elbo", "grad_norm", "seconds")},
    {"draw": np.arange(20)},
)


def drawn(model: Any = model, guide: Any = guide, **options: Any) -> dict[str, xr.Dataset]:
    defaults = {"estimators": {"s": Score()}, "num_draws": 5, "num_chains": 2, "progress": False}
    return gradient_draws(model, guide, **(defaults | options))


def checked(model: Any = model, guide: Any = guide, **options: Any) -> Any:
    return check_unbiased(model, guide, **({"estimator": "enumerate", "num_draws": 5} | options))


def exact(model: Any = model, guide: Any = guide, **options: Any) -> xr.Dataset:
    return exact_gradient(model, guide, **options)


def recommended(model: Any = model, guide: Any = guide, **options: Any) -> Any:
    defaults = {"budget_evaluations": 100, "candidates": {"e": Enumerate()}, "progress": False}
    return recommend(model, guide, **(defaults | options))


def timed(**options: Any) -> Any:
    return recommended(budget_evaluations=None, **options)


def judged(model: Any = model, guide: Any = guide, **options: Any) -> Any:
    return guide_khat(model, guide, **({"num_samples": 30} | options))


def trained(model: Any = model, guide: Any = guide, **options: Any) -> xr.Dataset:
    defaults = {"optim": pyro.optim.Adam({"lr": 0.1}), "num_steps": 2, "progress": False}
    return train(model, guide, **({"estimators": {"s": Score()}} | defaults | options))


def compared(**options: Any) -> pd.DataFrame:
    return compare_gradients(DRAWS, **options)


def converted(**options: Any) -> Any:
    return to_arviz(DRAWS, **options)


def pictured(**options: Any) -> Any:
    return plot_gradients(DRAWS, **options)


def followed(**options: Any) -> Any:
    return plot_training(HISTORY, **options)


# Integers

COUNTS = {
    drawn: {
        "num_draws": 1,
        "num_chains": 1,
        "num_warmup": 0,
        "num_particles": 1,
        "project": 1,
        "site_draws": 0,
    },
    checked: {"num_draws": 2, "num_particles": 1, "max_states": 1},
    exact: {"max_states": 1},
    recommended: {"num_particles": 1, "max_states": 1, "budget_evaluations": 1},
    judged: {"num_samples": 25},
    trained: {"num_steps": 1, "num_particles": 1},
}
SEEDED = [drawn, checked, exact, recommended, judged]
EACH = [(function, name, least) for function, own in COUNTS.items() for name, least in own.items()]


@pytest.mark.parametrize("kind", [np.int64, np.uint8])
def test_integers_of_numpy(kind: type[np.integer]) -> None:
    draws = drawn(
        num_draws=kind(6),
        num_chains=kind(2),
        num_warmup=kind(1),
        num_particles=kind(2),
        project=kind(1),
        site_draws=kind(3),
        seed=kind(7),
    )["s"]
    plain = drawn(num_draws=6, num_warmup=1, num_particles=2, project=1, site_draws=3, seed=7)["s"]
    xr.testing.assert_equal(draws.drop_vars("seconds"), plain.drop_vars("seconds"))
    for name in ("num_particles", "seed", "project"):
        assert type(draws.attrs[name]) is int
    assert exact(max_states=kind(9), seed=kind(1)).equals(exact())
    found = checked(num_draws=kind(9), num_particles=kind(1), max_states=kind(9), seed=kind(1))
    assert type(found.num_draws) is int
    best = recommended(num_particles=kind(2), max_states=kind(9), seed=kind(1))
    assert type(best.num_particles) is int
    assert judged(num_samples=kind(30), seed=kind(1)) == pytest.approx(
        judged(num_samples=30, seed=1), nan_ok=True
    )
    history = trained(num_steps=kind(3), num_particles=kind(2), seeds=kind(2))
    assert history.sizes["draw"] == 3
    assert list(history.seed.values) == [0, 1]
    assert list(trained(seeds=np.array([4, 9], kind)).seed.values) == [4, 9]


@pytest.mark.parametrize("value", ["3", 3.0, True, [3]], ids=repr)
@pytest.mark.parametrize(("function", "name", "least"), EACH)
def test_counts_of_another_kind(
    function: Callable[..., Any], name: str, least: int, value: Any
) -> None:
    with pytest.raises(TypeError) as caught:
        function(**{name: value})
    assert str(caught.value).endswith(
        f"{name} must be an integer of at least {least}; got {value!r}."
    )


@pytest.mark.parametrize(("function", "name", "least"), EACH)
def test_counts_that_are_too_small(function: Callable[..., Any], name: str, least: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .* at least {least}; got {least - 1}."):
        function(**{name: least - 1})


@pytest.mark.parametrize("function", SEEDED)
@pytest.mark.parametrize("seed", ["3", 0.5, True, None], ids=repr)
def test_seeds_of_another_kind(function: Callable[..., Any], seed: Any) -> None:
    with pytest.raises(TypeError, match=f"seed must be an integer such as seed=0; got {seed!r}"):
        function(seed=seed)


@pytest.mark.parametrize("function", [drawn, checked, exact, recommended, judged, trained])
@pytest.mark.parametrize("name", ["model", "guide"])
def test_programs_have_to_be_callable(function: Callable[..., Any], name: str) -> None:
    match = f"{name} must be a function or a module .* not what it returns; got None"
    with pytest.raises(TypeError, match=match):
        function(**{name: None})


# Everything else

INTEGERS = r"must be between 1 and 20, a chain's, and an integer; got"
WRONG = [
    (drawn, {"estimators": {3: "score"}}, TypeError, "strings for labels, such as .*; got 3"),
    (drawn, {"coords": ["x"]}, TypeError, r"coords must be a dict, .*; got \['x'\]"),
    (exact, {"coords": 3}, TypeError, "coords must be a dict, .*; got 3"),
    (drawn, {"dims": {"l": 3}}, TypeError, "dims must be a dict of lists.*got {'l': 3}"),
    (exact, {"dims": {"l": [3]}}, TypeError, r"dims must be a dict of lists.*got {'l': \[3\]}"),
    (checked, {"max_z": "5"}, TypeError, "max_z must be positive, a number such as 2.0; got '5'"),
    (checked, {"max_z": 0}, ValueError, "max_z must be positive, a number such as 2.0; got 0"),
    (checked, {"reference": 3.0}, TypeError, "reference must be a Dataset: .*; got float"),
    (timed, {"budget_seconds": "3"}, TypeError, "budget_seconds must be positive.*got '3'"),
    (timed, {"budget_seconds": True}, TypeError, "budget_seconds must be positive.*True"),
    (timed, {"budget_seconds": None}, TypeError, "budget_seconds must be positive.*None"),
    (timed, {"step_seconds": [1]}, TypeError, r"step_seconds must be positive.*got \[1\]"),
    (timed, {"step_seconds": np.nan}, ValueError, "step_seconds must be positive.*got nan"),
    (recommended, {"step_evaluations": "1"}, TypeError, "step_evaluations must be positive"),
    (recommended, {"candidates": ReinMax()}, TypeError, "must be a dict of labels.*got ReinMax"),
    (recommended, {"candidates": ["score"]}, TypeError, r"a dict of labels.*got \['score'\]"),
    (trained, {"estimators": "score"}, TypeError, "must be a dict of labels, .*; got 'score'"),
    (trained, {"seeds": "12"}, TypeError, "seeds must be integers, such as .*; got '12'"),
    (trained, {"seeds": 0.5}, TypeError, "seeds must be integers, such as .*; got 0.5"),
    (trained, {"seeds": True}, TypeError, "seeds must be integers, such as .*; got True"),
    (trained, {"seeds": [0.5]}, TypeError, r"seeds must be integers, such as .*; got \[0.5\]"),
    (trained, {"optim": pyro.optim.Adam}, TypeError, "optim must be a Pyro optimiser"),
    (trained, {"batches": 3}, TypeError, "batches must be a callable from the step's .*; got 3"),
    (trained, {"batches": lambda step: step}, TypeError, r"a tuple of arguments, .*; got 0"),
    (compared, {"reference": 3.0, "by": "coordinate"}, TypeError, "a Dataset: .*; got float"),
    (converted, {"reference": "e"}, TypeError, r"a Dataset: .*draws\[label\].*; got str"),
    (pictured, {"reference": "e"}, TypeError, r"a Dataset: .*draws\[label\].*; got str"),
    (pictured, {"average": "2"}, TypeError, f"average {INTEGERS} '2'"),
    (pictured, {"average": 2.0}, TypeError, f"average {INTEGERS} 2.0"),
    (pictured, {"average": True}, TypeError, f"average {INTEGERS} True"),
    (pictured, {"var_names": 3}, TypeError, r"var_names must be names .*var_names=\['l'\]; got 3"),
    (followed, {"smooth": "2"}, TypeError, "smooth must be between 1 and 20, .*; got '2'"),
]


@pytest.mark.parametrize(("function", "options", "error", "match"), WRONG)
def test_errors(
    function: Callable[..., Any], options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        function(**options)


def test_errors_of_a_table() -> None:
    with pytest.raises(TypeError, match="table must be the table of compare_grad.*; got dict"):
        plot_efficiency(DRAWS)
    with pytest.raises(ValueError, match=r"it has no columns \['bias', 'bias_mcse', 'seconds'"):
        plot_efficiency(pd.DataFrame({"variance": [1.0], "variance_mcse": [0.1]}))


def test_numbers_of_numpy() -> None:
    assert timed(budget_seconds=np.float32(0.1), step_seconds=np.int64(2)).config
    assert recommended(budget_evaluations=np.int64(90), step_evaluations=np.float32(2)).config
    assert checked(max_z=np.float32(5)).z < 5


def test_one_name_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, xr.Dataset] = {}
    monkeypatch.setattr(
        "pyro_gumbel.diagnostics.plots.plot_forest", lambda draws, **_: shown.update(draws)
    )
    values = np.zeros((2, 20))
    draws = xr.Dataset({name: (("chain", "draw"), values) for name in ("loc", "scale")})
    plot_gradients({"e": draws}, var_names="loc", average=np.int64(5))
    assert list(shown["e"]) == ["loc"]
    assert shown["e"].sizes["draw"] == 4


def test_a_list_is_a_batch() -> None:
    """As a loader of data gives it."""
    seen = []

    def given(x: torch.Tensor) -> None:
        seen.append(x.shape)
        guide()

    trained(given, given, batches=lambda step: [torch.zeros(3)])
    assert set(seen) == {(3,)}
