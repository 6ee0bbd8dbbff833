"""Figures: draws of gradients, histories of training, variance against cost.

matplotlib and ArviZ's plots are imported when a figure is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from pyro_gumbel._arviz import plot_forest
from pyro_gumbel._validate import is_integer
from pyro_gumbel.diagnostics._moments import (
    check_draws,
    is_projected,
    parameters_of,
    reference_blocks,
)

__all__ = ["plot_efficiency", "plot_gradients", "plot_training"]

_MAX_ROWS = 40
_SHOWN = {"elbo", "grad_norm", "seconds"}  # of a training run
_PLOTTED = ("bias", "bias_mcse", "variance", "variance_mcse", "seconds", "seconds_mcse")
_MEANS = 20  # averages of draws in a chain


def plot_gradients(
    draws: Any,
    reference: xr.Dataset | None = None,
    *,
    var_names: Sequence[str] | str | None = None,
    average: int | None = None,
    **kwargs: Any,
) -> Any:
    """Draw an interval of each coordinate of the gradient for each estimator.

    An interval is that of means of ``average`` draws. Its position shows the bias, and its width
    the noise that remains after so many draws. The reference is a point.

    Args:
        draws: What :func:`gradient_draws` returns.
        reference: What :func:`exact_gradient` returns, or draws of an unbiased estimator.
        var_names: Parameters to draw.
        average: Draws in a mean. The default is a twentieth of a chain; 1 shows single draws.
        **kwargs: For ``arviz.plot_forest``.

    Returns:
        What ``arviz.plot_forest`` of the installed ArviZ returns: an array of axes (0.x) or a
        ``PlotCollection`` (1.x).

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If draws do not fit together, there are more than 40 rows, or ``average`` is
            not between 1 and a chain's length.

    Example:
        >>> noise = np.random.default_rng(0).normal(size=(4, 500, 2))
        >>> draws = {"noisy": xr.Dataset({"l": (("chain", "draw", "i"), noise)})}
        >>> axes = plot_gradients(draws, xr.Dataset({"l": ("i", [0.0, 0.0])}), average=25)
    """
    draws = check_draws(draws)
    first = next(iter(draws.values()))
    names = _names(first, var_names)
    if (rows := sum(first[name][0, 0].size for name in names)) > _MAX_ROWS:
        raise ValueError(
            f"plot_gradients: {rows} coordinates are too many rows for a figure. Choose "
            f"parameters, var_names=[...], of {parameters_of(first)}, or part of each Dataset, "
            "such as draws[label].isel(...)."
        )
    chains, length = (min(d.sizes[dim] for d in draws.values()) for dim in ("chain", "draw"))
    average = max(length // _MEANS, 1) if average is None else average
    average = _between("average", average, length, "a chain's")
    shown = {}
    for label, dataset in draws.items():
        kept = dataset[names].isel(chain=slice(chains), draw=slice(length)).astype(float)
        means = kept.reset_coords(drop=True).drop_vars(["chain", "draw"], errors="ignore")
        shown[label] = means.coarsen(draw=average, boundary="trim").mean()
    if reference is not None:
        if is_projected(first):
            raise ValueError(
                "plot_gradients: draws that were kept as projections cannot be compared with a "
                "reference; leave it out, or draw without project=, params=[...]."
            )
        blocks, like = reference_blocks(reference, first[names]), next(iter(shown.values()))
        shown["reference"] = like.map(
            lambda array: xr.zeros_like(array) + blocks[array.name].mean.reshape(array.shape[2:])
        )
    return plot_forest(shown, **kwargs)


def _names(draws: xr.Dataset, var_names: Any) -> list[str]:
    known = parameters_of(draws)
    if var_names is None:
        return [name for name in known if draws[name].size]
    names = [var_names] if isinstance(var_names, str) else var_names
    if not isinstance(names, Iterable):
        raise TypeError(
            f"var_names must be names of parameters, such as var_names={known[:1]}; got "
            f"{var_names!r}."
        )
    for name in (names := list(names)):
        if name not in known:
            raise ValueError(f"var_names: no parameter {name!r}; there are {known}.")
    return names


def _between(name: str, value: Any, most: int, what: str) -> int:
    if is_integer(value) and 1 <= value <= most:
        return int(value)
    error = ValueError if is_integer(value) else TypeError
    raise error(f"{name} must be between 1 and {most}, {what}, and an integer; got {value!r}.")


def plot_training(
    histories: xr.Dataset | Mapping[str, xr.Dataset], *, smooth: int | None = None
) -> Any:
    """Draw ELBO and gradient norm of training runs, by step and by second.

    Args:
        histories: What :func:`train` returns, or a dict of such by label.
        smooth: Steps over which a line is averaged; by default a fiftieth of them.

    Returns:
        The matplotlib figure.

    Raises:
        TypeError: If ``smooth`` is not an integer.
        ValueError: If histories are missing, or ``smooth`` is not between one and the steps.

    Example:
        >>> steps = (("chain", "draw"), np.random.default_rng(0).exponential(size=(2, 50)))
        >>> history = xr.Dataset({"elbo": steps, "grad_norm": steps, "seconds": steps})
        >>> figure = plot_training({"score": history}, smooth=5)
        >>> [axis.get_ylabel() for axis in figure.axes]
        ['ELBO', 'ELBO', 'norm of the gradient']
    """
    import matplotlib.pyplot as plt

    lines = _lines(histories)
    steps = min(history.sizes["draw"] for history in lines.values())
    smooth = max(steps // 50, 1) if smooth is None else smooth
    smooth = _between("smooth", smooth, steps, "the steps")
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for number, (label, history) in enumerate(lines.items()):
        smoothed = history.rolling(draw=smooth).mean().isel(draw=slice(smooth - 1, None))
        seconds = history.seconds.mean("chain").values.copy()
        seconds[0] = np.median(seconds[min(1, len(seconds) - 1) :])  # without what it sets up
        panels = (smoothed.draw, "elbo"), (seconds.cumsum()[smooth - 1 :], "elbo")
        for axis, (x, name) in zip(axes, (*panels, (smoothed.draw, "grad_norm")), strict=True):
            chains, colour = smoothed[name], f"C{number}"
            axis.plot(x, chains.mean("chain"), color=colour, label=label)
            low, high = chains.min("chain"), chains.max("chain")
            axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axes[0].set(xlabel="step", ylabel="ELBO", ylim=_limits(lines.values()))
    axes[1].set(xlabel="seconds", ylabel="ELBO", ylim=_limits(lines.values()))
    axes[2].set(xlabel="step", ylabel="norm of the gradient", yscale="log")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    return figure


def _lines(histories: Any) -> dict[str, xr.Dataset]:
    if isinstance(histories, xr.Dataset):
        histories = {"": histories}
    if not isinstance(histories, Mapping) or not histories:
        raise ValueError("histories must be what train(...) returns, or a dict of such.")
    lines = {}
    for prefix, history in histories.items():
        if not isinstance(history, xr.Dataset) or not set(history.data_vars) >= _SHOWN:
            raise ValueError(
                f"histories: {prefix!r} must be a Dataset with {sorted(_SHOWN)}, as train(...) "
                f"returns it; got {type(history).__name__}."
            )
        if "estimator" not in history.dims:
            lines[str(prefix)] = history
            continue
        for label in history.estimator.values:
            lines[f"{prefix} {label}".strip()] = history.sel(estimator=label)
    return lines


def _limits(histories: Iterable[xr.Dataset]) -> tuple[float, float]:
    """Return limits of the axis, without the steep first tenth of the steps."""
    late = [h.elbo.isel(draw=slice(h.sizes["draw"] // 10, None)).values for h in histories]
    low = min(float(np.nanpercentile(values, 1)) for values in late)
    high = max(float(np.nanmax(values)) for values in late)
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def plot_efficiency(table: pd.DataFrame) -> Any:
    """Draw variance against cost, and the bias, from a table of :func:`compare_gradients`.

    Lines join points of the same variance times seconds. Estimators on one line are equally
    efficient.

    Args:
        table: One row for each estimator. If it has a bias, the bias is drawn, too.

    Returns:
        The matplotlib figure.

    Raises:
        TypeError: If it is not a table.
        ValueError: If it lacks a column, or no row has both a variance and a time.

    Example:
        >>> from pyro_gumbel.diagnostics import compare_gradients
        >>> noise = np.random.default_rng(0).normal(size=(4, 500))
        >>> timed = {"seconds": 1e-3, "seconds_mcse": 1e-5}
        >>> draws = {"noisy": xr.Dataset({"l": (("chain", "draw"), noise)}, attrs=timed)}
        >>> figure = plot_efficiency(compare_gradients(draws))
        >>> figure.axes[0].get_ylabel()
        'variance of a draw'
    """
    import matplotlib.pyplot as plt

    wanted = "the table of compare_gradients(gradient_draws(...))"
    if not isinstance(table, pd.DataFrame):
        raise TypeError(f"table must be {wanted}; got {type(table).__name__}.")
    if lacking := [name for name in _PLOTTED if name not in table]:
        raise ValueError(f"table must be {wanted}; it has no columns {lacking}.")
    timed = table[np.isfinite(table.seconds) & (table.variance > 0)]
    if timed.empty:
        raise ValueError(
            f"plot_efficiency: no row has a positive variance and seconds; take {wanted}."
        )
    barred = table[table.bias.notna()]
    panels = 1 if barred.empty else 2
    size = (1 + 4.5 * panels, 4)
    figure, axes = plt.subplots(1, panels, figsize=size, squeeze=False, layout="constrained")
    # By name, so that an estimator has one colour whatever its place in the table.
    colours = {label: f"C{number % 10}" for number, label in enumerate(sorted(table.index))}
    points = _draw_costs(axes[0, 0], timed, colours)
    if panels == 2:
        _draw_biases(axes[0, 1], barred, colours)
    unnamed = [handle for label, handle in points.items() if label not in barred.index]
    if unnamed:  # a reference, or all where there is none
        axes[0, 0].legend(handles=unnamed, frameon=False, fontsize=8)
    return figure


def _draw_costs(axis: Any, timed: pd.DataFrame, colours: dict[Any, str]) -> dict[Any, Any]:
    points = {}
    for label, row in timed.iterrows():
        points[label] = axis.errorbar(
            1e3 * row.seconds,
            row.variance,
            xerr=1e3 * row.seconds_mcse,
            yerr=row.variance_mcse,
            fmt="o",
            color=colours[label],
            label=label,
        )
    axis.set(xscale="log", yscale="log", xlabel="milliseconds a draw", ylabel="variance of a draw")
    x, y = np.array(axis.get_xlim()), np.array(axis.get_ylim())
    for cost in np.geomspace(x[0] * y[0], x[1] * y[1], 8)[1:-1]:
        axis.plot(x, cost / x, color="0.85", linewidth=0.8, zorder=0)
    axis.set(xlim=x, ylim=y)
    _label_ticks(axis.xaxis, *x)
    _label_ticks(axis.yaxis, *y)
    return points


def _label_ticks(axis: Any, low: float, high: float) -> None:
    """Label as many ticks of a logarithmic axis as fit, all in one form."""
    from matplotlib.ticker import LogFormatter

    plain = low >= 1e-4 and high < 1e6

    class OneForm(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            if not super().__call__(x, pos):
                return ""
            return f"{x:g}" if plain else np.format_float_scientific(x, precision=3, trim="-")

    axis.set_major_formatter(OneForm(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    axis.set_minor_formatter(OneForm(labelOnlyBase=False, minor_thresholds=(2, 0.5)))


def _draw_biases(axis: Any, table: pd.DataFrame, colours: dict[Any, str]) -> None:
    """Draw the biases as bars, whose names and colours are the legend of the other panel, too."""
    places = np.arange(len(table))[::-1]
    axis.barh(
        places,
        table.bias,
        xerr=1.96 * table.bias_mcse,
        color=[colours[label] for label in table.index],
        ecolor="0.3",
        height=0.6,
    )
    axis.set_yticks(places, list(table.index))
    axis.set(xlabel="bias, with its 95 % interval")
    axis.set_xlim(left=0)
