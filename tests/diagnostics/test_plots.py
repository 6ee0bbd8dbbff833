"""Figures of draws, of training and of costs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from helpers.toys import drawn
from matplotlib.colors import to_rgba

from pyro_gumbel._arviz import ARVIZ_1
from pyro_gumbel.diagnostics import (
    compare_gradients,
    plot_efficiency,
    plot_gradients,
    plot_training,
)


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


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
    # A row has one colour in both panels, whatever the order of rows.
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
