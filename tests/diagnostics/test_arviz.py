"""The container of ArviZ: groups, labels, files."""

from __future__ import annotations

from pathlib import Path

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from helpers.toys import drawn

from pyro_gumbel._arviz import group
from pyro_gumbel.diagnostics import to_arviz
from pyro_gumbel.infer import recover


def test_groups(tmp_path: Path) -> None:
    draws, exact = drawn()
    data = to_arviz(draws, exact)
    gradients = group(data, "gradients")
    assert set(gradients.data_vars) == set(exact)
    assert gradients["b_logits"].dims == ("chain", "draw", "estimator", "row", "category")
    np.testing.assert_array_equal(
        gradients["b_logits"].sel(estimator="reinmax"), draws["reinmax"]["b_logits"]
    )
    assert gradients.attrs["inference_library"] == "pyro"
    statistics = group(data, "sample_stats")
    names = {"elbo", "loss", "grad_norm", "seconds", "evaluations", "num_particles"}
    assert set(statistics.data_vars) == names
    assert all(statistics[name].dims == ("chain", "draw", "estimator") for name in names)
    assert (statistics["num_particles"] == 1).all()
    np.testing.assert_array_equal(
        statistics["seconds"].sel(estimator="score"), draws["score"].coords["seconds"]
    )
    np.testing.assert_array_equal(
        statistics["elbo"].sel(estimator="score"), -draws["score"].coords["loss"]
    )
    constants = group(data, "constant_data")
    np.testing.assert_array_equal(constants["w"], np.float32(0.9))
    np.testing.assert_allclose(constants["b_logits.gradient"], exact["b_logits"])
    assert list(constants["b_logits"].coords["category"].values) == ["x", "y", "z"]

    data.to_netcdf(str(tmp_path / "gradients.nc"))
    read = az.from_netcdf(str(tmp_path / "gradients.nc"))
    for name in ("gradients", "sample_stats", "constant_data"):
        xr.testing.assert_allclose(group(read, name), group(data, name))


def test_statistics_of_arviz() -> None:
    draws, _ = drawn()
    summary = az.summary(draws["score"], kind="diagnostics")
    assert "b_logits[0, x]" in summary.index
    assert len(az.summary(draws["score"])) == 3 + 6 + 1 + 1
    error = az.mcse(draws["score"])["w"]
    values = draws["score"]["w"].values
    assert float(error) == pytest.approx(values.std(ddof=1) / 80**0.5, rel=0.5)
    # A dict of Datasets is stacked as any other.
    index = xr.IndexVariable("estimator", list(draws))
    assert xr.concat(list(draws.values()), dim=index)["w"].sizes["estimator"] == 2


def test_summary_by_the_name_of_the_group() -> None:
    draws, _ = drawn()
    summary = az.summary(to_arviz(draws), group="gradients", kind="diagnostics")
    assert {"w[score]", "w[reinmax]", "b_logits[score, 0, x]"} <= set(summary.index)


@pytest.mark.parametrize("project", [None, 2])
def test_every_dimension_has_coordinates(project: int | None) -> None:
    data = to_arviz(*drawn(project=project, dims=None, coords=None))
    for name in ("gradients", "sample_stats", "constant_data"):
        found = group(data, name)
        assert set(found.dims) <= set(found.coords)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # a constant has no R-hat
@pytest.mark.filterwarnings("ignore:Your data appears to have a single value")
def test_statistics_are_summarised_and_drawn() -> None:
    draws, _ = drawn()
    data = to_arviz(draws)
    summary = az.summary(data, group="sample_stats", kind="diagnostics")
    assert {"elbo[score]", "evaluations[reinmax]"} <= set(summary.index)
    assert az.plot_trace(group(data, "sample_stats")) is not None
    plt.close("all")


def test_posterior() -> None:
    draws, _ = drawn()
    samples = torch.randn(4, 100, 3)
    given = xr.Dataset({"z": (("chain", "draw", "z_dim_0"), samples.numpy())})
    for posterior in (given, {"z": samples}, {"z": samples.numpy()}):
        data = to_arviz(draws, posterior=posterior)
        np.testing.assert_array_equal(group(data, "posterior")["z"], samples)
        assert list(az.summary(data, kind="diagnostics").index) == ["z[0]", "z[1]", "z[2]"]
    assert "posterior" not in list(to_arviz(draws).groups())


def test_recovered_sites_are_a_posterior_of_one_chain(tmp_path: Path) -> None:
    def model() -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(w, 1.0), obs=torch.tensor([-1.0, 0.0, 2.0]))

    def guide() -> None:
        with pyro.plate("data", 3):
            pyro.sample("w", dist.Normal(0.3, 0.5))

    found = recover(model, guide, num_samples=50)
    data = to_arviz(drawn()[0], posterior=found)
    posterior = group(data, "posterior")
    assert posterior["z"].dims == ("chain", "draw", "z_dim_0")
    assert dict(posterior.sizes) == {"chain": 1, "draw": 50, "w_dim_0": 3, "z_dim_0": 3}
    np.testing.assert_array_equal(posterior["z"].squeeze("chain"), found["z"])
    assert {"z[0]", "w[2]"} <= set(az.summary(data, kind="stats").index)
    data.to_netcdf(str(tmp_path / "posterior.nc"))
    read = group(az.from_netcdf(str(tmp_path / "posterior.nc")), "posterior")
    xr.testing.assert_allclose(read, posterior)
    probs = recover(model, guide, num_samples=4, marginals=True)
    assert group(to_arviz(drawn()[0], posterior=probs), "posterior")["z"].shape == (1, 4, 3, 2)


def test_projections(tmp_path: Path) -> None:
    draws, exact = drawn(project=2)
    data = to_arviz(draws, exact)
    assert group(data, "gradients")["w"].dims == ("chain", "draw", "estimator", "direction")
    assert "cosine" in group(data, "sample_stats")
    assert "b_logits.gradient" in group(data, "constant_data")
    data.to_netcdf(str(tmp_path / "projections.nc"))


def test_slashes_in_names(tmp_path: Path) -> None:
    draws = {"e": xr.Dataset({"scope/z": (("chain", "draw"), np.zeros((2, 5)))})}
    data = to_arviz(draws)
    data.to_netcdf(str(tmp_path / "scoped.nc"))
    assert list(group(data, "gradients").data_vars) == ["scope.z"]


def test_errors() -> None:
    draws, _ = drawn()
    short = {"a": draws["score"], "b": draws["reinmax"].isel(draw=slice(5))}
    with pytest.raises(ValueError, match="numbers of chains and draws differ"):
        to_arviz(short)
    with pytest.raises(ValueError, match="reference has no parameter 'a_logits'"):
        to_arviz(draws, xr.Dataset())
    with pytest.raises(ValueError, match="draws is empty"):
        to_arviz({})
    with pytest.raises(TypeError, match="draws must be a dict of Datasets"):
        to_arviz(None)
    with pytest.raises(TypeError, match="posterior must be a Dataset, or a dict of.*Tensor"):
        to_arviz(draws, posterior=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"'z' has shape \(7,\).*chains and draws first"):
        to_arviz(draws, posterior={"z": torch.zeros(7)})
