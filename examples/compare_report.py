"""Tables, figures and a file of draws from a comparison of estimators."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import xarray as xr
from matplotlib.ticker import LogLocator, NullFormatter

import style
from pyro_gumbel.diagnostics import plot_efficiency, plot_gradients, to_arviz

SHOWN = ["relative_bias", "bias_z", "relative_std", "snr", "cosine", "seconds", "evaluations"]
CLEAR = 5  # a bias of fewer standard errors is within noise


def show(table: pd.DataFrame, title: str) -> None:
    print(f"\n{title}: gradient of the encoder\n")
    print(table[SHOWN].to_string(float_format="{:.3g}".format), flush=True)


def write_tables(tables: Mapping[Any, pd.DataFrame], folder: Path) -> list[Path]:
    """Write the table and plots: figures over epochs, and the last noise against cost."""
    last = list(tables.values())[-1]
    written = [folder / "table.csv", folder / "efficiency.png"]
    pd.concat(dict(tables), names=["epoch"]).to_csv(written[0])
    with style.color_cycle(sorted(last.index)):
        plot_efficiency(last).savefig(written[1], dpi=90)
    if len(tables) > 1:
        written.append(style.write(plot_epochs(tables), folder / "epochs.png"))
    plt.close("all")
    return written


def plot_epochs(tables: Mapping[Any, pd.DataFrame]) -> mpl.figure.Figure:
    """Plot relative bias and relative standard deviation of every estimator over epochs."""
    figure, axes = style.panels(1, 2, (5, 3.8))
    names = sorted(next(iter(tables.values())).index)
    for number, (name, color) in enumerate(style.colors(names).items()):
        rows = pd.DataFrame([table.loc[name] for table in tables.values()], index=list(tables))
        look: dict[str, Any] = {
            "color": color,
            "marker": style.MARKERS[number % len(style.MARKERS)],
            "linewidth": max(3 - 0.4 * number, 1),  # so that coinciding curves stay visible
            "markersize": max(10 - number, 7),
        }
        axes[0, 0].plot(rows.relative_bias, **look)
        noise = rows.relative_bias.where(rows.bias_z < CLEAR)
        axes[0, 0].plot(noise, **look | {"linestyle": "", "markerfacecolor": "white"})
        axes[0, 1].plot(rows.relative_std, **look, label=name)
    hollow = {"marker": "o", "linestyle": "", "color": "black", "markerfacecolor": "white"}
    axes[0, 0].plot([], **hollow, label=f"within noise, z < {CLEAR}")
    for axis, label in zip(axes[0], ("relative bias", "relative std"), strict=True):
        axis.set(xlabel="epoch", ylabel=label, yscale="log", xticks=list(tables))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    style.legend_outside(figure, axes[0, ::-1])
    return figure


def write_draws(
    draws: Mapping[str, xr.Dataset], exact: xr.Dataset | None, folder: Path
) -> list[Path]:
    """Write draws for ArviZ, and plot those of the first four logits."""
    written = [folder / "gradients.nc", folder / "forest.png"]
    to_arviz(draws, exact).to_netcdf(str(written[0]))
    (name,) = next(iter(draws.values())).data_vars
    short = {name: "gradient by the bias of logit"}
    few = {  # sorted, so that each estimator has its colour of the other figures
        label: draws[label][[name]].isel(logit=slice(4)).rename(short) for label in sorted(draws)
    }
    if exact is not None:
        exact = exact[[name]].isel(logit=slice(4)).rename(short)
    with style.color_cycle(few):
        forest = plot_gradients(few, exact)
        if hasattr(forest, "savefig"):  # ArviZ 1.x
            forest.savefig(str(written[1]))
        else:
            axis = forest.ravel()[0]
            axis.set_xlabel("gradient of the loss")
            axis.figure.savefig(str(written[1]), dpi=70, bbox_inches="tight")
    plt.close("all")
    return written
