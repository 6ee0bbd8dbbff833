"""The table: each figure against its definition, errors that cover, warnings that are earned."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from helpers.toys import bits, chain
from scipy import stats

from pyro_gumbel.diagnostics import compare_gradients, exact_gradient, gradient_draws
from pyro_gumbel.estimators import Estimator


def made(values: np.ndarray, **others: np.ndarray) -> xr.Dataset:
    """Draws of a parameter ``a``, and of others."""
    arrays = {"a": values, **others}
    return xr.Dataset(
        {
            name: (("chain", "draw", *(f"{name}_dim_{i}" for i in range(array.ndim - 2))), array)
            for name, array in arrays.items()
        }
    )


def correlated(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Normal draws of five coordinates of very different variance that share a factor."""
    scales = np.array([3.0, 1.0, 0.5, 0.1, 0.01])
    noise = rng.normal(size=(*shape, 5)) + 0.8 * rng.normal(size=(*shape, 1))
    return scales * noise


def test_figures_are_as_defined() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(2.0, 1.0, size=(4, 100, 3)), rng.normal(-1.0, 0.5, size=(4, 100))
    draws = made(a, b=b)
    draws.attrs |= {"seconds": 0.02, "seconds_mcse": 0.001, "evaluations": 3}
    reference = xr.Dataset({"a": ("a_dim_0", [2.0, 2.2, 1.9]), "b": ((), -1.1), "c": ((), 0.0)})
    row = compare_gradients({"mine": draws}, reference).loc["mine"]

    rows = np.concatenate([a.reshape(400, 3), b.reshape(400, 1)], 1)
    exact = np.array([2.0, 2.2, 1.9, -1.1])
    mean, variance = rows.mean(0), rows.var(0, ddof=1).sum()
    difference = np.linalg.norm(mean - exact)
    assert row.bias == pytest.approx(difference)
    assert row.relative_bias == pytest.approx(difference / np.linalg.norm(exact))
    assert row.variance == pytest.approx(variance)
    assert row.relative_std == pytest.approx(np.sqrt(variance) / np.linalg.norm(exact))
    alone = compare_gradients({"mine": draws}).loc["mine"]
    assert alone.relative_std == pytest.approx(np.sqrt(variance) / np.linalg.norm(mean))
    assert np.isnan(alone[["bias", "bias_z", "mse", "cosine"]].astype(float)).all()
    squared_bias = max(difference**2 - variance / 400, 0.0)
    assert row.mse == pytest.approx(variance + squared_bias)
    assert row.snr == pytest.approx(np.sqrt((mean @ mean - variance / 400) / variance))
    cosine = mean @ exact / np.linalg.norm(mean) / np.linalg.norm(exact)
    assert row.cosine == pytest.approx(cosine)
    assert row.evaluations == 3
    assert row.efficiency == pytest.approx(1 / (variance * 0.02))
    deviations = ((rows - mean) ** 2).sum(1)
    assert row.variance_mcse == pytest.approx(deviations.std() / 20, rel=0.05)


def test_by_parameter_and_by_coordinate() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(2.0, 1.0, size=(4, 100, 2)), rng.normal(-1.0, 0.5, size=(4, 100))
    draws, reference = made(a, b=b), xr.Dataset({"a": ("a_dim_0", [2.0, 2.2]), "b": ((), -1.1)})
    parameters = compare_gradients({"m": draws}, reference, by="parameter")
    assert list(parameters.index) == [("m", "a"), ("m", "b")]
    assert parameters.loc[("m", "a"), "variance"] == pytest.approx(
        a.reshape(400, 2).var(0, ddof=1).sum()
    )
    named = draws.assign_coords(a_dim_0=["x", "y"])
    named_reference = reference.assign_coords(a_dim_0=["x", "y"])
    coordinates = compare_gradients({"m": named}, named_reference, by="coordinate")
    assert list(coordinates.index) == [("m", "a[x]"), ("m", "a[y]"), ("m", "b")]
    # Of one coordinate the figures are the elementary ones.
    row = coordinates.loc[("m", "b")]
    error = b.std(ddof=1) / 20
    assert row.bias == pytest.approx(abs(b.mean() + 1.1))
    assert row.bias_mcse == pytest.approx(error, rel=1e-6)
    assert row.bias_z == pytest.approx(abs(b.mean() + 1.1) / error, rel=1e-6)


@pytest.mark.parametrize("law", ["scalar", "vector", "skewed"])
def test_bias_interval_covers_zero_without_bias(law: str) -> None:
    rng = np.random.default_rng(1)
    makers = {
        "scalar": lambda: rng.normal(size=(4, 50)),
        "vector": lambda: correlated((4, 50), rng),
        "skewed": lambda: (rng.random((4, 50, 20)) < 0.1) - 0.1,
    }
    covered, zs = 0, []
    for _ in range(200):
        values = makers[law]()
        zero = xr.Dataset(
            {
                "a": (
                    tuple(f"a_dim_{i}" for i in range(values.ndim - 2)),
                    np.zeros(values.shape[2:]),
                )
            }
        )
        row = compare_gradients({"e": made(values)}, zero).loc["e"]
        covered += abs(row.bias) <= 1.96 * row.bias_mcse
        zs.append(row.bias_z)
    assert 0.90 <= covered / 200 <= 0.99
    assert max(zs) < 5
    # z is a two-sided quantile: its distribution is that of |N(0, 1)|.
    assert stats.kstest(zs, stats.halfnorm.cdf).pvalue > 1e-4


@pytest.mark.parametrize("reference", ["exact", "drawn", "drawn, projected"])
@pytest.mark.slow
def test_coverage_on_a_program(reference: str) -> None:
    problem = bits()
    problem.reset(torch.float64)
    options = {"num_chains": 1, "site_draws": 0, "progress": False}
    exact = exact_gradient(problem.model, problem.guide)
    covered = 0
    for seed in range(200):
        draws = gradient_draws(
            problem.model, problem.guide, estimators={"s": "score"}, num_draws=60,
            num_warmup=10, seed=seed, **options,
        )  # fmt: skip
        if reference != "exact":
            exact = gradient_draws(
                problem.model, problem.guide, estimators={"s": "score"}, num_draws=40,
                num_warmup=10, seed=1000 + seed,
                project=2 if "projected" in reference else None, **options,
            )["s"]  # fmt: skip
        row = compare_gradients(draws, exact).loc["s"]
        covered += row.bias <= 1.96 * row.bias_mcse
    assert 0.90 <= covered / 200 <= 0.99


@pytest.mark.parametrize("project", [None, 2])
def test_estimators_on_an_enumerable_program(project: int | None) -> None:
    problem = chain()
    problem.reset(torch.float64)
    draws = gradient_draws(
        problem.model,
        problem.guide,
        estimators={"exact": "enumerate", "score": "score", "straight": "straight_through"},
        num_draws=100,
        num_chains=2,
        num_particles=4,
        vectorize_particles=True,
        project=project,
        site_draws=0,
        progress=False,
    )
    exact = exact_gradient(problem.model, problem.guide)
    table = compare_gradients(draws, exact)
    assert table.loc["exact", "variance"] == 0
    assert table.loc["exact", "bias"] < 1e-12
    assert table.loc[["exact", "score"], "bias_z"].max() < 5
    assert table.loc["straight", "bias_z"] > 5
    assert "biased" in table.loc["straight", "warning"]
    assert table.loc[["exact", "score"], "warning"].tolist() == ["", ""]
    assert table.index[0] == "exact"
    assert table.loc["exact", "efficiency"] == math.inf
    assert math.isnan(table.loc["exact", "khat"])


def test_forms_of_the_draws_agree() -> None:
    problem = chain()
    problem.reset(torch.float64)
    options = {"estimators": {"s": "score"}, "num_draws": 40, "site_draws": 0, "progress": False}
    full = gradient_draws(problem.model, problem.guide, **options)
    part = gradient_draws(problem.model, problem.guide, project=2, **options)
    exact = exact_gradient(problem.model, problem.guide)
    columns = ["bias", "bias_mcse", "bias_z", "variance", "variance_mcse", "mse", "snr", "khat"]
    for by in (None, "parameter"):
        one, other = (compare_gradients(draws, exact, by=by, rhat=True) for draws in (full, part))
        np.testing.assert_allclose(one[columns].astype(float), other[columns].astype(float), 1e-6)
        np.testing.assert_allclose(one["rhat"], other["rhat"], rtol=1e-6)


def test_label_as_reference() -> None:
    rng = np.random.default_rng(0)
    draws = {"long": made(rng.normal(size=(4, 500))), "off": made(rng.normal(1, 1, size=(4, 50)))}
    table = compare_gradients(draws, "long")
    assert table.loc["off", "bias_z"] > 5
    assert math.isnan(table.loc["long", "bias"])


def test_reference_noise_is_allowed_for() -> None:
    rng = np.random.default_rng(0)
    short = made(rng.normal(size=(1, 20, 3)) + 0.5)
    long = made(rng.normal(size=(4, 5000, 3)))
    z = compare_gradients({"e": long}, short).loc["e", "bias_z"]
    swapped = compare_gradients({"e": short}, long).loc["e", "bias_z"]
    assert z == pytest.approx(swapped)
    assert z < 6  # 0.5 with 20 draws in 3 dimensions; the long run alone would say 80


class SmallWeights(Estimator):
    """Importance weights with tails so heavy that their variance is infinite."""

    unbiased = True
    sites = "any"

    def supports(self, fn) -> bool:
        return True

    def surrogate(self, site):
        weight = (-0.5 * site.values[0] ** 2 * (1 - 1 / 0.1)).exp()  # Normal(0, 1) over its guide
        return weight * site.log_prob


def test_heavy_tails_are_noted() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 0.1**0.5))

    draws = gradient_draws(
        model,
        guide,
        estimators={"importance weights": SmallWeights(), "pathwise": "pathwise"},
        num_draws=400,
        site_draws=0,
        progress=False,
    )
    table = compare_gradients(draws)
    assert table.loc["importance weights", "khat"] > 0.7
    assert "heavy tails" in table.loc["importance weights", "warning"]
    assert table.loc["pathwise", "khat"] < 0.5
    assert table.loc["pathwise", "warning"] == ""


def test_moving_baseline_is_noted() -> None:
    rng = np.random.default_rng(0)
    steady = rng.normal(size=(4, 500))
    growing = steady * np.array([1.0, 1.2, 1.5, 2.0])[:, None]
    table = compare_gradients({"steady": made(steady), "moving": made(growing)}, rhat=True)
    assert table.loc["steady", "rhat"] < 1.01 < table.loc["moving", "rhat"]
    assert "not exchangeable" in table.loc["moving", "warning"]


def test_infinite_draws_are_noted() -> None:
    values = np.random.default_rng(0).normal(size=(4, 100))
    values[0, 3] = np.inf
    with np.errstate(all="ignore"):
        row = compare_gradients({"e": made(values)}).loc["e"]
    assert "not finite" in row.warning
    assert math.isnan(row.variance)


def test_equal_draws_without_times() -> None:
    row = compare_gradients({"e": made(np.full((4, 20), 0.1))}).loc["e"]
    assert row.variance == 0
    assert row.efficiency == math.inf
    assert math.isnan(row.seconds)


# What the table rests on


# Rare events

RARE = 1 / (1 + math.exp(4.5))


def met_rarely(rng: np.random.Generator) -> np.ndarray:
    """The score function of a bit of logit -4.5, less its mean."""
    return np.where(rng.random((4, 60)) < RARE, 1 - RARE, -RARE)


def test_a_missed_event_is_distinguished_from_a_bias() -> None:
    """In 7 % of repetitions no draw meets it: a bias of no noise that is not the estimator's."""
    rng = np.random.default_rng(0)
    zero = xr.Dataset({"a": 0.0})
    alarms = 0
    for _ in range(200):
        row = compare_gradients({"e": made(met_rarely(rng))}, zero).loc["e"]
        alarms += row.bias_z > 5
        assert ("biased" in row.warning) == (row.bias_z > 5)
        assert ("or short of rare events: about" in row.warning) == (row.bias_z > 5)
    assert 4 <= alarms <= 28


def test_a_bias_is_not_excused_where_many_draws_carry_the_variance() -> None:
    rng = np.random.default_rng(0)
    zero = xr.Dataset({"a": 0.0})
    for _ in range(50):
        row = compare_gradients({"e": made(rng.normal(0.5, 1.0, (4, 60)))}, zero).loc["e"]
        assert row.warning == f"biased (z {row.bias_z:.1f})"
    # One of another parameter is beyond doubt, whatever this one has missed.
    both = made(np.full((4, 60), -RARE), other=rng.normal(1.0, 1.0, (4, 60)))
    row = compare_gradients({"e": both}, xr.Dataset({"a": 0.0, "other": 0.0})).loc["e"]
    assert row.warning == f"biased (z {row.bias_z:.1f})"
    parts = compare_gradients(
        {"e": both}, xr.Dataset({"a": 0.0, "other": 0.0}), by="parameter"
    ).warning
    assert "about 0 of 240 draws carry the variance" in parts["e", "a"]
    assert "rare" not in parts["e", "other"]


# Errors

FINE = np.zeros((4, 10))
ERRORS = [
    ({}, None, {}, ValueError, "draws is empty"),
    ([made(FINE)], None, {}, TypeError, "draws must be a dict of Datasets"),
    ({"e": FINE}, None, {}, TypeError, "draws must be a dict of Datasets"),
    ({"e": made(FINE[:1, :1])}, None, {}, ValueError, "'e': got 1; a variance"),
    ({"e": made(FINE[:, :0])}, None, {}, ValueError, "'e': got 0; a variance"),
    ({"e": xr.Dataset()}, None, {}, ValueError, "'e' hold no parameter"),
    ({"e": xr.Dataset({"a": ("draw", FINE[0])})}, None, {}, ValueError, "must start with 'chain'"),
    (
        {"e": made(FINE), "f": made(FINE, b=FINE)},
        None,
        {},
        ValueError,
        r"of 'f' are of .* shapes {'a': \(\), 'b': \(\)}, those of 'e' of {'a': \(\)}",
    ),
    (
        {"e": made(FINE), "f": made(np.zeros((4, 10, 2)))},
        None,
        {},
        ValueError,
        r"of 'f' are of .* shapes {'a': \(2,\)}, those of 'e' of {'a': \(\)}",
    ),
    ({"e": made(FINE)}, xr.Dataset({"b": 0.0}), {}, ValueError, "reference has no parameter 'a'"),
    (
        {"e": made(FINE)},
        xr.Dataset({"a": ("i", [0.0, 1.0])}),
        {},
        ValueError,
        r"reference has shape \(2,\) at parameter 'a', the draws have \(\)",
    ),
    ({"e": made(FINE)}, 3.0, {}, TypeError, "reference must be a Dataset"),
    ({"e": made(FINE)}, "f", {}, ValueError, "no draws are labelled 'f'"),
    ({"e": made(FINE)}, None, {"by": "chain"}, ValueError, "by must be one of"),
    ({"e": made(FINE)}, None, {"by": "site"}, ValueError, "site_draws=200"),
    ({"e": made(FINE[:1])}, None, {"rhat": True}, ValueError, r"R-hat takes at least 2 chains"),
]  # fmt: skip


@pytest.mark.parametrize(("draws", "reference", "options", "error", "match"), ERRORS)
def test_errors(draws, reference, options, error, match) -> None:
    with pytest.raises(error, match=match):
        compare_gradients(draws, reference, **options)


def test_coordinates_of_projections() -> None:
    problem = bits()
    problem.reset(torch.float32)
    draws = gradient_draws(
        problem.model, problem.guide, estimators={"r": "reinmax"}, num_draws=5, project=1,
        progress=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="by='coordinate' needs the draws themselves"):
        compare_gradients(draws, by="coordinate")


def test_small_parameter_is_not_drowned_by_the_noise_of_a_large_one() -> None:
    rng = np.random.default_rng(0)
    draws = made(0.01 * rng.normal(size=(4, 100)) + 0.005, loud=10 * rng.normal(size=(4, 100)))
    reference = xr.Dataset({"a": 0.0, "loud": 0.0})
    row = compare_gradients({"e": draws}, reference).loc["e"]
    assert row.bias_z > 5
    assert row.bias < 3 * row.bias_mcse


def test_a_reference_in_another_order_is_refused() -> None:
    noise = np.random.default_rng(0).normal(size=(2, 50, 3))
    draws = xr.Dataset({"a": (("chain", "draw", "cat"), noise)}, {"cat": ["x", "y", "z"]})
    exact = xr.Dataset({"a": ("cat", [0.0, 1.0, 2.0])}, {"cat": ["z", "y", "x"]})
    with pytest.raises(ValueError, match=r"Write reference.sel\(cat=\['x', 'y', 'z'\]\)"):
        compare_gradients({"e": draws}, exact)
    sorted_ = exact.sel(cat=["x", "y", "z"])
    expected = np.linalg.norm(noise.mean((0, 1)) - [2.0, 1.0, 0.0])
    assert compare_gradients({"e": draws}, sorted_).bias["e"] == pytest.approx(expected)
