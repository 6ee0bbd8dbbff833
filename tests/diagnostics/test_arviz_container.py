"""The container: groups, labels, files; and the pictures that are drawn from the same draws."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.colors import to_rgba
from toys import chain

from pyro_gumbel._arviz import ARVIZ_1, group
from pyro_gumbel.diagnostics import (
    compare_gradients,
    exact_gradient,
    gradient_draws,
    plot_efficiency,
    plot_gradients,
    plot_training,
    to_arviz,
)

ESTIMATORS = {"score": "score", "reinmax": "reinmax"}


def drawn(**options):
    problem = chain()
    problem.reset(torch.float32)
    settings = {"num_draws": 20, "progress": False, "dims": {"b_logits": ["row", "category"]}}
    settings |= {"coords": {"category": ["x", "y", "z"]}} | options
    draws = gradient_draws(problem.model, problem.guide, estimators=ESTIMATORS, **settings)
    named = {key: settings[key] for key in ("dims", "coords") if key in settings}
    return draws, exact_gradient(problem.model, problem.guide, **named)


@pytest.fixture(autouse=True)
def close_pictures():
    yield
    plt.close("all")


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


def test_posterior() -> None:
    draws, _ = drawn()
    samples = torch.randn(4, 100, 3)
    given = xr.Dataset({"z": (("chain", "draw", "z_dim_0"), samples.numpy())})
    for posterior in (given, {"z": samples}, {"z": samples.numpy()}):
        data = to_arviz(draws, posterior=posterior)
        np.testing.assert_array_equal(group(data, "posterior")["z"], samples)
        assert list(az.summary(data, kind="diagnostics").index) == ["z[0]", "z[1]", "z[2]"]
    assert "posterior" not in list(to_arviz(draws).groups())


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


# Pictures


@pytest.mark.parametrize("with_reference", [False, True])
def test_plot_gradients(with_reference: bool, tmp_path: Path) -> None:
    draws, exact = drawn()
    shorter = {**draws, "reinmax": draws["reinmax"].isel(draw=slice(12), chain=slice(3))}
    picture = plot_gradients(shorter, exact if with_reference else None)
    figure = picture if ARVIZ_1 else np.ravel(picture)[0].figure
    figure.savefig(str(tmp_path / "forest.png"))
    assert (tmp_path / "forest.png").stat().st_size > 5000


def test_plot_gradients_averages_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}
    monkeypatch.setattr(
        "pyro_gumbel.diagnostics.plots.plot_forest", lambda draws, **_: shown.update(draws)
    )
    draws, exact = drawn()
    plot_gradients(draws, exact, var_names=["w"], average=5)
    assert list(shown) == ["score", "reinmax", "reference"]
    assert shown["score"]["w"].shape == (4, 4)
    expected = draws["score"]["w"].values[0, 5:10].mean()
    assert float(shown["score"]["w"][0, 1]) == pytest.approx(expected, rel=1e-5)
    assert (shown["reference"]["w"] == float(exact["w"])).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"var_names": ["v"]}, "no parameter 'v'"),
        ({"average": 21}, "average must be between 1 and 20"),
        ({"average": 0}, "average must be between 1 and 20"),
    ],
)
def test_plot_gradients_errors(options, match) -> None:
    draws, _ = drawn()
    with pytest.raises(ValueError, match=match):
        plot_gradients(draws, **options)


def test_plot_gradients_needs_few_rows() -> None:
    many = {"e": xr.Dataset({"a": (("chain", "draw", "i"), np.zeros((2, 5, 41)))})}
    with pytest.raises(ValueError, match="41 coordinates are too many rows"):
        plot_gradients(many)
    draws, exact = drawn(project=2)
    with pytest.raises(ValueError, match="projections cannot be compared with a reference"):
        plot_gradients(draws, exact)
    assert plot_gradients(draws) is not None


def history(steps: int = 30, chains: int = 2) -> xr.Dataset:
    rng = np.random.default_rng(0)
    dims, shape = ("chain", "draw", "estimator"), (chains, steps, 2)
    return xr.Dataset(
        {name: (dims, rng.random(shape)) for name in ("elbo", "grad_norm", "seconds")},
        {"estimator": ["a", "b"], "draw": np.arange(1, steps + 1)},
    )


def test_plot_training() -> None:
    figure = plot_training(history())
    assert [line.get_label() for line in figure.axes[0].lines] == ["a", "b"]
    both = plot_training({"one": history(), "two": history(chains=1)}, smooth=5)
    labels = [line.get_label() for line in both.axes[0].lines]
    assert labels == ["one a", "one b", "two a", "two b"]
    line = both.axes[0].lines[0]
    expected = history().elbo.sel(estimator="a").mean("chain").values[:5].mean()
    assert line.get_ydata()[0] == pytest.approx(expected)
    assert line.get_xdata()[0] == 5


def test_plot_training_errors() -> None:
    with pytest.raises(ValueError, match="histories must be what train"):
        plot_training({})
    for wrong in ({"a": 3}, history().drop_vars("elbo")):
        with pytest.raises(ValueError, match="must be a Dataset with .*elbo.*as train"):
            plot_training(wrong)
    with pytest.raises(ValueError, match="smooth must be between 1 and 30"):
        plot_training(history(), smooth=31)


def test_plot_efficiency() -> None:
    draws, exact = drawn()
    table = compare_gradients(draws, exact)
    figure = plot_efficiency(table)
    assert len(figure.axes) == 2
    # The bars' names are the points' too: one colour each, in a table of any order.
    points, bars = figure.axes
    names = [text.get_text() for text in bars.get_yticklabels()]
    assert names == list(table.index)
    colours = dict(zip(names, (bar.get_facecolor() for bar in bars.patches), strict=True))
    assert len(set(colours.values())) == len(names)
    for container in points.containers:
        assert to_rgba(container.lines[0].get_color()) == colours[container.get_label()]
    other = plot_efficiency(table[::-1]).axes[1]
    assert [bar.get_facecolor() for bar in other.patches] == list(colours.values())[::-1]
    (alone,) = plot_efficiency(compare_gradients(draws)).axes
    assert {text.get_text() for text in alone.get_legend().get_texts()} == set(names)
    with pytest.raises(ValueError, match="no row has a positive variance and seconds"):
        plot_efficiency(table.assign(seconds=np.nan))


def test_plot_efficiency_names_a_row_without_bias() -> None:
    draws, _ = drawn()
    first, *others = draws
    points, bars = plot_efficiency(compare_gradients(draws, first)).axes
    assert [text.get_text() for text in points.get_legend().get_texts()] == [first]
    assert {text.get_text() for text in bars.get_yticklabels()} == set(others)


@pytest.mark.parametrize("largest", [4e4, 3e6])
def test_plot_efficiency_labels_ticks_in_one_form(largest: float) -> None:
    draws, exact = drawn()
    table = compare_gradients(draws, exact)
    table["variance"] = np.geomspace(largest / 30, largest, len(table))
    figure = plot_efficiency(table)
    figure.canvas.draw()
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels(which="both")]
    assert len({"e" in label for label in labels if label}) == 1


def test_nothing_plots_at_import() -> None:
    program = (
        "import sys, pyro_gumbel.diagnostics\n"
        "found = {'matplotlib', 'arviz', 'arviz_plots'} & set(sys.modules)\n"
        "sys.exit(f'imported: {found}' if found else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
