"""What a comparison of estimators has to show: tables, pictures, and the draws in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import xarray as xr

from pyro_gumbel.diagnostics import plot_efficiency, plot_gradients, to_arviz

mpl.use("Agg")  # no display is needed
import matplotlib.pyplot as plt  # noqa: E402

SHOWN = ["relative_bias", "bias_z", "relative_std", "snr", "cosine", "seconds", "evaluations"]


def show(table: pd.DataFrame, title: str) -> None:
    print(f"\n{title}: gradient of the encoder\n")
    print(table[SHOWN].to_string(float_format="{:.3g}".format), flush=True)


def write_tables(tables: Mapping[Any, pd.DataFrame], folder: Path) -> None:
    """Write all figures, and draw them: over epochs, and at the last noise against price."""
    folder.mkdir(parents=True, exist_ok=True)
    pd.concat(dict(tables), names=["epoch"]).to_csv(folder / "table.csv")
    plot_efficiency(list(tables.values())[-1]).savefig(folder / "efficiency.png", dpi=90)
    if len(tables) > 1:
        plot_epochs(tables).savefig(folder / "epochs.png", dpi=90)
    plt.close("all")


def plot_epochs(tables: Mapping[Any, pd.DataFrame]) -> mpl.figure.Figure:
    """Draw relative bias and relative standard deviation of every estimator over epochs."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for axis, column in zip(axes, ("relative_bias", "relative_std"), strict=True):
        for name in sorted(next(iter(tables.values())).index):
            values = [table.loc[name, column] for table in tables.values()]
            axis.plot(list(tables), values, marker="o", label=name)
        axis.set(xlabel="epoch", ylabel=column.replace("_", " "), yscale="log")
        axis.set_xticks(list(tables))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.3)
    axes[1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    return figure


def write_draws(draws: Mapping[str, xr.Dataset], exact: xr.Dataset | None, folder: Path) -> None:
    """Write draws for ArviZ, and draw those of the first four logits over one another."""
    to_arviz(draws, exact).to_netcdf(str(folder / "gradients.nc"))
    (name,) = next(iter(draws.values())).data_vars
    short = {name: "gradient by the bias of logit"}
    few = {  # in the order that gives each estimator its colour in the other pictures
        label: draws[label][[name]].isel(logit=slice(4)).rename(short) for label in sorted(draws)
    }
    if exact is not None:
        exact = exact[[name]].isel(logit=slice(4)).rename(short)
    forest = plot_gradients(few, exact)
    if hasattr(forest, "savefig"):  # ArviZ 1.x
        forest.savefig(str(folder / "forest.png"))
    else:
        axis = forest.ravel()[0]
        axis.set_xlabel("gradient of the loss")
        figure = axis.figure
        figure.savefig(str(folder / "forest.png"), dpi=70, bbox_inches="tight")
    plt.close("all")
