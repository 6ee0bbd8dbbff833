"""Labels of draws, projections and what stands beside them; moments of draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from helpers.toys import bits, chain, draw

from pyro_gumbel._validate import RESERVED
from pyro_gumbel.diagnostics import (
    compare_gradients,
    exact_gradient,
    gradient_draws,
)
from pyro_gumbel.diagnostics._moments import Block, Moments, blocks_of
from pyro_gumbel.diagnostics.compare import bias_of, two_sided_z


def correlated(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Normal draws of five coordinates of very different variance that share a factor."""
    scales = np.array([3.0, 1.0, 0.5, 0.1, 0.01])
    noise = rng.normal(size=(*shape, 5)) + 0.8 * rng.normal(size=(*shape, 1))
    return scales * noise


@pytest.mark.parametrize("law", ["normal", "discrete"])
def test_trace_of_the_squared_covariance(law: str) -> None:
    rng = np.random.default_rng(2)
    if law == "normal":
        draws = correlated((40_000,), rng)
        scales = np.array([3.0, 1.0, 0.5, 0.1, 0.01])
        covariance = np.outer(scales, scales) * (np.eye(5) + 0.64)
    else:
        probs = np.array([0.7, 0.2, 0.05, 0.04, 0.01])
        draws = np.eye(5)[rng.choice(5, size=40_000, p=probs)]
        covariance = np.diag(probs) - np.outer(probs, probs)
    estimates = []
    for part in np.split(draws, 50):
        moments = Moments([3, 2])
        for batch in np.array_split(part, 25):
            moments.update(torch.from_numpy(batch))
        trace, _, square_trace = moments.spreads().T
        estimates.append([*square_trace, *trace])
    exact = [
        np.trace(block @ block) for block in (covariance[:3, :3], covariance[3:, 3:], covariance)
    ]
    exact += [np.trace(block) for block in (covariance[:3, :3], covariance[3:, 3:], covariance)]
    estimates = np.array(estimates)
    z = (estimates.mean(0) - exact) / (estimates.std(0) / 50**0.5)
    assert np.abs(z).max() < 5  # 50 estimates of 800 draws each
    assert (estimates.std(0) / 50**0.5 < 0.05 * np.abs(exact)).all()


def test_equal_draws_have_variance_zero() -> None:
    moments = Moments([4])
    row = torch.tensor([[0.1, 1e8, -3e-7, 2.0]])
    for _ in range(3):
        moments.update(row.expand(7, 4))
    assert (moments.spreads() == 0).all()
    assert torch.equal(moments.mean, row[0].double())


def test_far_tails_of_the_bias_test() -> None:
    zero = np.zeros(1)
    exact = Block(zero, zero, zero, np.inf, 0.0, 0.0, 0.0)
    for distance in (0.05, 0.3, 3.0, 300.0):
        drawn = Block(zero + distance, zero + 1, zero, 100, 1.0, 0.0, 1.0)
        found = bias_of(drawn, exact, 0.0)
        assert two_sided_z([found.log_tail]) == pytest.approx(distance * 10, rel=1e-6)


def test_draws_that_carry_the_variance() -> None:
    rng = np.random.default_rng(0)
    few = np.zeros(300)
    few[[7, 50, 51, 222]] = 9.0
    laws = {100: rng.normal(size=300), 4: few, 300: np.arange(300) % 2, 0: np.full(300, 0.1)}
    for expected, values in laws.items():
        draws = xr.Dataset({"a": (("chain", "draw"), values.astype(float)[None])})
        assert blocks_of(draws)["all"].carriers == pytest.approx(expected, rel=0.2)


def test_labels_and_provenance() -> None:
    problem = chain()
    problem.reset(torch.float32)
    drawn = draw(
        problem,
        {"reinmax": "reinmax"},
        num_particles=3,
        dims={"b_logits": ["row", "category"]},
        coords={"category": ["x", "y", "z"]},
    )["reinmax"]
    assert set(drawn) == set(problem.params)
    assert drawn["b_logits"].dims == ("chain", "draw", "row", "category")
    assert drawn["a_logits"].dims == ("chain", "draw", "a_logits_dim_0")
    assert list(drawn.category.values) == ["x", "y", "z"]
    np.testing.assert_array_equal(
        drawn.coords["b_logits.value"], problem.params["b_logits"].flatten()
    )
    expected = {"estimator": "reinmax", "num_particles": 3, "seed": 0, "device": "cpu"}
    assert {key: drawn.attrs[key] for key in expected} == expected
    assert drawn.attrs["seconds"] > 0
    assert drawn.attrs["dtype"] == "float32"


def test_seconds_of_each_draw() -> None:
    problem = chain()
    problem.reset(torch.float32)
    for project in (None, 2):
        drawn = draw(problem, {"r": "reinmax"}, project=project)["r"]
        assert drawn.coords["seconds"].dims == ("chain", "draw")
        assert float(drawn.coords["seconds"].min()) > 0
        assert drawn.attrs["seconds"] == float(drawn.coords["seconds"].median())


@pytest.mark.parametrize(
    ("dims", "error", "match"),
    [
        ({"logit": ["a"]}, ValueError, "no parameter is called 'logit'; there are .*'w'"),
        (["a"], TypeError, r"dims must be a dict of lists.*got \['a'\]"),
        ({"logits": "ab"}, TypeError, "dims must be a dict of lists"),
        ({"logits": ["a", "chain"]}, ValueError, "'logits' cannot have a dimension 'chain'"),
    ],
)
def test_names_of_dimensions(dims: Any, error: type[Exception], match: str) -> None:
    problem = bits()
    problem.reset(torch.float32)
    with pytest.raises(error, match=match):
        draw(problem, {"s": "score"}, num_draws=6, dims=dims)
    with pytest.raises(error, match=match):
        exact_gradient(problem.model, problem.guide, dims=dims)


def test_projections_of_more_parameters_are_a_reference() -> None:
    """Only the parameters of the draws count, not the noise of the others."""
    problem = chain()
    problem.reset(torch.float64)
    options = {"num_draws": 60, "num_chains": 1}
    draws = draw(problem, {"s": "score"}, params=["w"], **options)
    everything = draw(problem, {"s": "score"}, seed=1, project=1, **options)["s"]
    alone = draw(problem, {"s": "score"}, seed=1, project=1, params=["w"], **options)["s"]
    columns = ["bias", "bias_mcse", "bias_z", "mse", "cosine"]
    one, other = (compare_gradients(draws, r)[columns] for r in (everything, alone))
    np.testing.assert_allclose(one, other, rtol=1e-9)


def test_projections_are_not_cut() -> None:
    """Their moments are kept for all draws at once."""
    problem = bits()
    problem.reset(torch.float32)
    whole = draw(problem, {"s": "score"}, num_draws=20, project=2)["s"]
    assert len(compare_gradients(whole)) == 1
    with pytest.raises(ValueError, match=r"are cut to \d+, and their moments are those of all"):
        compare_gradients(whole.isel(draw=slice(10)))


def test_projections_and_moments() -> None:
    problem = chain()
    problem.reset(torch.float32)
    full = draw(problem, {"s": "score"}, num_draws=75)["s"]
    part = draw(problem, {"s": "score"}, num_draws=75, project=3)["s"]
    assert all(part[name].dims == ("chain", "draw", "direction") for name in part)
    assert part.sizes["direction"] == 3
    for name in problem.params:
        own = full[name].astype(float)
        np.testing.assert_allclose(
            part.coords[f"{name}.mean"], own.mean(("chain", "draw")), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            part.coords[f"{name}.variance"], own.var(("chain", "draw"), ddof=1), rtol=1e-5
        )
        norm = np.sqrt((own**2).sum([d for d in own.dims if d not in ("chain", "draw")]))
        np.testing.assert_allclose(
            part.coords["parameter_norm"].sel(parameter=name), norm, rtol=1e-6
        )
    np.testing.assert_allclose(part.coords["grad_norm"], full.coords["grad_norm"], rtol=1e-6)
    # A direction is of length one and the same in every call.
    again = draw(problem, {"e": "enumerate"}, num_draws=1, project=3)["e"]
    gradient = exact_gradient(problem.model, problem.guide)["b_logits"].values.ravel()
    assert (np.abs(again["b_logits"]) <= np.linalg.norm(gradient) * (1 + 1e-5)).all()
    ratio = part["w"] / full["w"]
    np.testing.assert_allclose(abs(ratio), 1.0, rtol=1e-5)  # one coordinate: the sign at most


def test_cosines_are_with_all_other_draws_so_far() -> None:
    problem = bits()
    problem.reset(torch.float64)
    options = {"num_draws": 40, "num_chains": 1}
    part = draw(problem, {"s": "score"}, project=1, **options)["s"]
    full = draw(problem, {"s": "score"}, **options)["s"]
    rows = np.concatenate([full[n].values.reshape(40, -1) for n in ("w", "logits")], 1)
    # Draws come in batches of 32: the last eight have seen all forty.
    others = (rows.sum(0) - rows[-8:]) / 39
    norms = np.linalg.norm(rows[-8:], axis=1) * np.linalg.norm(others, axis=1)
    expected = (rows[-8:] * others).sum(1) / norms
    np.testing.assert_allclose(part.coords["cosine"][0, -8:], expected, rtol=1e-9)


def taken(name: str) -> Callable[[], None]:
    def program() -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param(name, torch.tensor(0.0))))

    return program


def big_guide() -> None:
    logits = pyro.param("l", torch.zeros(100_000))
    pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))


@pytest.mark.parametrize("project", [None, 1])
def test_names_beside_the_draws_are_reserved(project: int | None) -> None:
    problem = bits()
    problem.reset(torch.float32)
    drawn = draw(problem, {"s": "score"}, site_draws=2, project=project)["s"]
    own = {name for name in [*drawn.coords, *drawn.dims] if name.split(".")[0] in RESERVED}
    others = {name for name in [*drawn.coords, *drawn.dims] if name.startswith(("w", "logits"))}
    assert own | others == {*drawn.coords, *drawn.dims}
    assert "seconds" in own


def test_reserved_name() -> None:
    options = {"estimators": {"s": "score"}, "num_draws": 2, "progress": False}
    for name in ("site", "seconds"):
        program = taken(name)
        with pytest.raises(ValueError, match=f"'{name}' has the name of a dimension or a stat"):
            gradient_draws(program, program, **options)


def test_too_much_to_keep() -> None:
    options = {"estimators": {"s": "score"}, "num_draws": 5000, "progress": False}
    with pytest.raises(ValueError, match=r"take 7.5 GiB. Keep projections and moments"):
        gradient_draws(big_guide, big_guide, **options)
