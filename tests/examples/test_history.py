"""ArviZ reads the histories of the examples."""

from __future__ import annotations

from pathlib import Path

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr

import history


def test_history_is_read_by_arviz(tmp_path: Path) -> None:
    epochs = {
        name: {
            seed: [{"train_loss": 10.0 * seed + i + shift} for i in range(4)] for seed in (3, 5)
        }
        for name, shift in (("a", 0.0), ("b", 0.5))
    }
    written = history.to_dataset(epochs, images="digits")
    assert float(written.train_loss.sel(chain=1, draw=2, gradient="b")) == 51.5
    assert written.seed.values.tolist() == [3, 5]
    history.save(written, tmp_path / "history.nc")
    history.save(written, tmp_path / "history.nc")  # over an older one
    assert "training" in az.from_netcdf(tmp_path / "history.nc")
    read = xr.load_dataset(tmp_path / "history.nc", group="training")
    np.testing.assert_array_equal(read.train_loss, written.train_loss)
    assert read.attrs["images"] == "digits"
    summary = az.summary(read, kind="diagnostics")
    assert list(summary.index) == ["train_loss[a]", "train_loss[b]"]
    az.plot_trace(read)
    plt.close("all")
