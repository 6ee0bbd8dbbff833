"""A common style of figures: colour-blind-safe colours, and legends outside the axes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no display is needed
import matplotlib.pyplot as plt  # noqa: E402

# Okabe and Ito's colours, ordered so that neighbours differ in lightness, too.
COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442"]
MARKERS = "osD^vPX*"
ESTIMATORS = (  # estimators with a fixed colour, in the order of COLORS
    "reinmax",
    "gumbel_straight_through",
    "straight_through",
    "score",
    "gumbel_rao",
    "reinmax_rao",
    "disarm_tree",
)
EXACT = {"color": "black", "linewidth": 1, "linestyle": "--"}

_RC = {
    "axes.prop_cycle": mpl.cycler(color=COLORS),
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def colors(labels: Iterable[str]) -> dict[str, str]:
    """Assign each estimator its colour of all figures, and other labels the remaining ones.

    If several have one name, such as ``score:2`` and ``score:4``, the first has its colour.
    """
    labels = list(labels)
    own = dict(zip(ESTIMATORS, COLORS, strict=False))
    chosen: dict[str, str] = {}
    for label in labels:
        color = own.pop(re.split("[@:]", label)[0], None)
        if color:
            chosen[label] = color
    left = itertools.cycle([c for c in COLORS if c not in chosen.values()] or COLORS)
    return {label: chosen.get(label) or next(left) for label in labels}


def color_cycle(labels: Iterable[str]) -> AbstractContextManager[None]:
    """Set matplotlib's colour cycle to :func:`colors`, in the order of labels."""
    return mpl.rc_context({"axes.prop_cycle": mpl.cycler(color=[*colors(labels).values(), "0.5"])})


def whole_numbers(axis: Any) -> None:
    """Place the ticks of the x axis at whole numbers."""
    axis.xaxis.get_major_locator().set_params(integer=True)


def panels(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """Make a figure of ``rows`` times ``columns`` axes, each of ``size`` inches."""
    with mpl.rc_context(_RC):
        return plt.subplots(
            rows,
            columns,
            figsize=(size[0] * columns, size[1] * rows),
            squeeze=False,
            layout="constrained",
            **options,
        )


def legend_outside(figure: Any, axes: Iterable[Any], columns: int = 4, **options: Any) -> None:
    """Place one legend below all axes, with each label once."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    options |= {"loc": "outside lower center", "ncols": columns, "frameon": False}
    figure.legend(entries.values(), entries.keys(), **options)


def write(figure: Any, path: Path) -> Path:
    """Write a PNG, and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
