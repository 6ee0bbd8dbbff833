"""What differs between ArviZ 0.x and 1.x, without torch, Pyro or the package.

Runs by itself in an environment that has arviz, h5netcdf, matplotlib and pytest:
``python -m pytest --noconftest tests/test_arviz.py``.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import xarray as xr

FILE = Path(__file__).parents[1] / "pyro_gumbel" / "_arviz.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_arviz_by_path", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


shim = load()


def draws(scale: float = 1.0, seed: int = 0) -> xr.Dataset:
    rng = np.random.default_rng(seed)
    values = scale * rng.normal(size=(4, 100, 2))
    coords = {"chain": np.arange(4), "draw": np.arange(100), "category": ["x", "y"]}
    return xr.Dataset({"net$$$0.weight": (("chain", "draw", "category"), values)}, coords)


def test_import_is_silent_and_light() -> None:
    """Neither torch nor a plotting library comes along."""
    program = (
        "import importlib.util, sys, warnings\n"
        "warnings.simplefilter('error')\n"
        f"spec = importlib.util.spec_from_file_location('a', {str(FILE)!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "found = {'torch', 'pyro', 'matplotlib', 'arviz'} & set(sys.modules)\n"
        "sys.exit(f'imported: {found}' if found else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_version() -> None:
    import arviz as az

    assert az.__version__.startswith("1.") == shim.ARVIZ_1


def test_tree_and_group(tmp_path: Path) -> None:
    import arviz as az

    data = shim.tree({"gradients": draws(), "sample_stats": draws(2.0)})
    xr.testing.assert_equal(shim.group(data, "gradients"), draws())
    data.to_netcdf(str(tmp_path / "draws.nc"))
    read = az.from_netcdf(str(tmp_path / "draws.nc"))
    xr.testing.assert_allclose(shim.group(read, "sample_stats"), draws(2.0))


def unlabelled() -> xr.Dataset:
    """Draws whose dimensions have no coordinates, under a name that is a path."""
    values = np.random.default_rng(0).normal(size=(4, 100, 2))
    return xr.Dataset({"net/weight": (("chain", "draw", "net/weight_dim_0"), values)})


def test_every_dimension_has_coordinates() -> None:
    found = shim.group(shim.tree({"gradients": unlabelled()}), "gradients")
    assert set(found.coords) == {"chain", "draw", "net.weight_dim_0"}
    assert list(found.coords["draw"].values) == list(range(100))
    labelled = draws().assign_coords(draw=np.arange(5, 105))
    kept = shim.group(shim.tree({"gradients": labelled}), "gradients")
    xr.testing.assert_identical(kept, labelled)


@pytest.mark.parametrize("name", ["gradients", "sample_stats"])
def test_any_group_is_summarised(name: str) -> None:
    import arviz as az

    data = shim.tree({"gradients": unlabelled(), "sample_stats": unlabelled()})
    summary = az.summary(data, group=name, kind="diagnostics")
    assert list(summary.index) == ["net.weight[0]", "net.weight[1]"]
    frame = shim.group(data, name).to_dataframe()
    assert frame.index.names == ["chain", "draw", "net.weight_dim_0"]


def test_a_posterior_of_one_chain(tmp_path: Path) -> None:
    """Recovered sites: one chain, whole numbers, next to the gradients."""
    import arviz as az

    z = np.random.default_rng(0).integers(0, 3, size=(1, 50, 2))
    posterior = xr.Dataset({"z": (("chain", "draw", "z_dim_0"), z)})
    data = shim.tree({"gradients": draws(), "posterior": posterior})
    assert list(az.summary(data, kind="stats").index) == ["z[0]", "z[1]"]
    data.to_netcdf(str(tmp_path / "posterior.nc"))
    read = shim.group(az.from_netcdf(str(tmp_path / "posterior.nc")), "posterior")
    np.testing.assert_array_equal(read["z"], z)
    assert read.sizes["draw"] == 50


@pytest.mark.skipif(shim.ARVIZ_1, reason="a DataTree has no to_dataframe")
@pytest.mark.filterwarnings("ignore:The inplace keyword")  # pandas 3.1 deprecates it
def test_any_group_becomes_a_frame() -> None:
    data = shim.tree({"gradients": unlabelled(), "sample_stats": unlabelled()})
    assert data.to_dataframe(groups="gradients").shape == (400, 4)


@pytest.mark.parametrize(("freedom", "shape"), [(1.2, 0.83), (3.0, 0.33), (30.0, 0.03)])
def test_pareto_khat_of_student_t(freedom: float, shape: float) -> None:
    rng = np.random.default_rng(0)
    values = np.abs(rng.standard_t(freedom, size=(20, 4000)))
    khats = np.array([float(shim.pareto_khat(row)) for row in values])
    # Twenty estimates of 4,000 draws; the tail of 190 draws leaves a bias of the size of 0.05.
    assert abs(khats.mean() - shape) < 5 * khats.std() / 20**0.5 + 0.06


@pytest.mark.parametrize(
    "values",
    [
        np.ones(500),
        np.repeat([0.0, 1.0], 250),
        np.zeros(500),
        np.arange(4.0),
        np.repeat([1.0, 2.0, 4.0, 8.0, 16.0], [700, 60, 20, 10, 10]),
    ],
    ids=["equal", "ties", "zero", "few", "steps"],
)
def test_no_tail_to_speak_of(values: np.ndarray) -> None:
    assert np.isnan(shim.pareto_khat(values))


def test_few_draws_have_a_shape_if_all_differ() -> None:
    assert np.isfinite(shim.pareto_khat(np.random.default_rng(0).exponential(size=30)))


def test_a_tail_of_many_steps_has_a_shape() -> None:
    values = np.abs(np.random.default_rng(0).standard_t(1.2, size=4000)).round(1)
    assert shim.pareto_khat(values) > 0.6


def test_khat_takes_exact_zeros() -> None:
    values = np.abs(np.random.default_rng(0).standard_t(1.2, size=4000))
    values[:1000] = 0
    assert shim.pareto_khat(values) > 0.6


def test_smoothed_weights() -> None:
    log_weights = np.random.default_rng(0).normal(size=1000)
    smoothed, khat = shim.psislw(log_weights)
    assert np.exp(smoothed).sum() == pytest.approx(1.0)
    assert np.corrcoef(smoothed, log_weights)[0, 1] > 0.99
    assert float(khat) < 0.7


def test_folded_rhat() -> None:
    rng = np.random.default_rng(0)
    steady = rng.normal(size=(4, 500))
    assert shim.folded_rhat(steady) < 1.01
    assert shim.folded_rhat(steady * np.array([[1.0], [1.2], [1.5], [2.0]])) > 1.01


@pytest.mark.skipif(shim.ARVIZ_1, reason="rows have no tick labels in ArviZ 1.x")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:arviz")
def test_rows_are_in_the_order_of_the_variables() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = xr.Dataset({name: (("chain", "draw"), np.eye(4, 9)) for name in "pcadbq"})
    axis = np.ravel(shim.plot_forest({"one": data, "two": data}))[0]
    assert [label.get_text() for label in axis.get_yticklabels()][::-1] == list("pcadbq")
    plt.close("all")


# matplotlib 3.11 deprecates an interface that ArviZ 0.23 draws with.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:arviz")
def test_plot_forest(tmp_path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.legend import Legend

    picture = shim.plot_forest({"one": draws(), "two": draws(2.0, 1)})
    figure = picture if shim.ARVIZ_1 else np.ravel(picture)[0].figure
    legends = [text.get_text() for text in plt.gcf().findobj(Legend)[0].get_texts()]
    assert legends == ["one", "two"]
    figure.savefig(str(tmp_path / "forest.png"))
    assert (tmp_path / "forest.png").stat().st_size > 5000
    plt.close("all")
