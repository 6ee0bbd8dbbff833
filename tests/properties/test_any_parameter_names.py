"""Diagnostics accept parameters of any name and size."""

from __future__ import annotations

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr

from pyro_gumbel._arviz import group
from pyro_gumbel.diagnostics import (
    check_unbiased,
    compare_gradients,
    exact_gradient,
    gradient_draws,
    plot_gradients,
    recommend,
    to_arviz,
    train,
)
from pyro_gumbel.estimators import Enumerate, Score

SIZES = {
    "x": (2,),
    "x.mean": (),
    "x.mean_": (),
    "x.variance": (),
    "x.value": (),
    "x.index": (),
    "x.gradient": (),
    "x_dim_0": (),
    "x[0]": (),
    "nothing": (0, 3),
}


def model() -> None:
    with pyro.plate("bits", 2):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.3, 0.6])))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor([0.9, 0.2]))


def guide() -> None:
    logits = torch.zeros(2)
    for number, (name, size) in enumerate(SIZES.items()):
        start = torch.linspace(0.1, 0.4, max(torch.Size(size).numel(), 1))
        value = pyro.param(name, start[: torch.Size(size).numel()].view(size))
        logits = logits + (number + 1) / 10 * (value if size == (2,) else value.sum())
    with pyro.plate("bits", 2):
        pyro.sample("z", dist.Bernoulli(logits=logits))


def drawn(**options) -> dict[str, xr.Dataset]:
    defaults = {"num_draws": 40, "num_chains": 2, "progress": False}
    return gradient_draws(model, guide, estimators={"score": Score()}, **(defaults | options))


def exact() -> xr.Dataset:
    return exact_gradient(model, guide)


def test_exact_gradients() -> None:
    """Every scalar enters as ``x`` does, by another factor."""
    found = exact()
    assert {name: found[name].shape for name in found} == SIZES
    scalars = [name for name, size in SIZES.items() if size == ()]
    factors = [(number + 1) / 10 for number, size in enumerate(SIZES.values()) if size == ()]
    slope = float(found["x"].sum()) / 0.1
    np.testing.assert_allclose(
        [found[name] for name in scalars], slope * np.array(factors), rtol=1e-5
    )


@pytest.mark.parametrize("project", [None, 2])
def test_draws_and_their_statistics(project: int | None) -> None:
    draws = drawn(project=project)["score"]
    plain = drawn()["score"]
    assert set(draws.data_vars) == set(SIZES)
    assert plain["x"].dims == ("chain", "draw", "x_dim_0_")
    starts = {name: value.detach().double() for name, value in made().items()}
    values = {"x": "x.value_", "nothing": "nothing.value", "x.mean": "x.mean.value"}
    for name, label in values.items():
        np.testing.assert_array_equal(draws.coords[label], starts[name].flatten())


def made() -> dict[str, torch.Tensor]:
    guide()
    found = dict(pyro.get_param_store().items())
    pyro.clear_param_store()
    return found


def test_moments_of_projections() -> None:
    plain, draws = drawn()["score"], drawn(project=2)["score"]
    labels = {"x": "x.mean__", "x.mean": "x.mean.mean", "nothing": "nothing.mean"}
    for name, label in labels.items():
        np.testing.assert_allclose(
            draws.coords[label], plain[name].mean(("chain", "draw")), rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("project", [None, 2])
@pytest.mark.parametrize("by", [None, "parameter"])
def test_tables(project: int | None, by: str | None) -> None:
    table = compare_gradients(drawn(project=project), exact(), by=by)
    assert len(table) == (1 if by is None else len(SIZES))
    assert table.bias_z.max() < 5


def test_table_by_coordinate() -> None:
    """An element of one parameter may have the name of another."""
    draws = drawn()
    table = compare_gradients(draws, exact(), by="coordinate")
    elements = {"x[0]_": draws["score"]["x"][..., 0], "x[0]": draws["score"]["x[0]"]}
    for label, values in elements.items():
        variance = float(values.astype(float).var(ddof=1))
        assert table.variance["score", label] == pytest.approx(variance)


def test_check_unbiased() -> None:
    assert check_unbiased(model, guide, estimator=Enumerate(), num_draws=5).z < 5
    with pytest.warns(UserWarning, match="a smaller bias goes unseen"):
        assert check_unbiased(model, guide, estimator=Score(), num_draws=50).z < 5


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # a constant has no R-hat
@pytest.mark.parametrize("project", [None, 2])
def test_container(project: int | None) -> None:
    data = to_arviz(drawn(project=project), exact())
    assert set(group(data, "gradients").data_vars) == set(SIZES)
    constants = group(data, "constant_data")
    assert constants["x.gradient"].shape == ()  # the parameter; beside x stands
    np.testing.assert_allclose(constants["x.gradient_"], exact()["x"], rtol=1e-6)
    assert len(az.summary(data, group="sample_stats", kind="diagnostics")) >= 6


def test_paths_and_dots_may_coincide(tmp_path) -> None:
    values = np.random.default_rng(0).normal(size=(2, 5))
    both = {name: (("chain", "draw"), values + i) for i, name in enumerate(("net/a", "net.a"))}
    data = to_arviz({"e": xr.Dataset(both)})
    assert list(group(data, "gradients").data_vars) == ["net.a_", "net.a"]
    data.to_netcdf(str(tmp_path / "both.nc"))


def test_pictures_training_and_recommendation() -> None:
    assert plot_gradients(drawn(), exact()) is not None
    optim = pyro.optim.SGD({"lr": 0.1})
    history = train(
        model, guide, estimators={"s": Score()}, optim=optim, num_steps=2, progress=False
    )
    assert np.isfinite(history.grad_norm).all()
    found = recommend(
        model, guide, candidates={"e": Enumerate()}, budget_evaluations=200, progress=False
    )
    assert found.config == {"z": found.config["z"]}
