"""The differences between ArviZ 0.x and 1.x, in one file that needs neither torch nor Pyro.

ArviZ 0.x imports matplotlib, so ArviZ is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import xarray as xr

_FEWEST = 25  # draws that have a tail
_SIZES = 10  # of which it consists at least: a fit to steps depends on where they are cut

# ArviZ 1.2 and later has an attribute "InferenceData" too, so the version decides.
ARVIZ_1 = int(version("arviz").split(".", 1)[0]) >= 1


def tree(groups: Mapping[str, xr.Dataset]) -> Any:
    """Put named groups into an ``arviz.InferenceData`` (0.x) or an ``xarray.DataTree`` (1.x).

    ArviZ's functions need coordinates, so dimensions without any are numbered. Slashes in names,
    which netCDF cannot hold, become dots.
    """
    ready = {name: _without_slashes(_numbered(dataset)) for name, dataset in groups.items()}
    if ARVIZ_1:
        return xr.DataTree.from_dict(ready)
    import arviz as az

    return az.InferenceData(**ready, warn_on_custom_groups=False)


def _numbered(dataset: xr.Dataset) -> xr.Dataset:
    missing = [dim for dim in dataset.dims if dim not in dataset.coords]
    return dataset.assign_coords({dim: np.arange(dataset.sizes[dim]) for dim in missing})


def _without_slashes(dataset: xr.Dataset) -> xr.Dataset:
    taken = {str(name) for name in (*dataset.variables, *dataset.dims)}
    renamed = {}
    for name in sorted(name for name in taken if "/" in name):
        free = name.replace("/", ".")
        while free in taken:
            free += "_"
        taken.add(free)
        renamed[name] = free
    return dataset.rename(renamed)


def group(data: Any, name: str) -> xr.Dataset:
    """Take one group out of a container as a Dataset."""
    node = data[name]
    return node.to_dataset() if isinstance(node, xr.DataTree) else node


def psislw(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pareto-smooth log weights along the last axis; return them and the shape of the tail."""
    if ARVIZ_1:
        from arviz_stats.base import array_stats

        # ArviZ 1.x expects log likelihoods, the negative of log weights, and turns them round.
        return array_stats.psislw(-log_weights, axis=-1)
    import arviz as az

    return az.psislw(log_weights)


def tail_khat(log_values: np.ndarray) -> float:
    """Estimate the Pareto shape of the upper tail of positive values, given their logarithms.

    It is ``nan`` for fewer than 25 draws, or if the largest are of fewer than ten different sizes.
    """
    number = len(log_values)
    tail = int(np.ceil(min(number / 5, 3 * number**0.5)))
    if number < _FEWEST or np.isnan(log_values).any():
        return float("nan")
    largest = np.partition(log_values, number - tail)[number - tail :]
    sizes = np.unique(largest.round(5))  # draws that are equal may differ by rounding
    if len(sizes) < min(_SIZES, tail):
        return float("nan")
    with np.errstate(all="ignore"):
        khat = float(psislw(np.ascontiguousarray(log_values))[1])
    return khat if np.isfinite(khat) else float("nan")


def pareto_khat(values: np.ndarray) -> float:
    """Estimate the Pareto shape as :func:`tail_khat`, from values that may be zero."""
    # A draw of zero is in the lower tail, whatever its logarithm is set to.
    return tail_khat(np.log(np.maximum(values, np.finfo(np.float64).tiny)))


def folded_rhat(values: np.ndarray) -> float:
    """Compute the folded split R-hat of ``(chains, draws)``: whether they differ in spread."""
    import arviz as az

    dataset = xr.Dataset({"values": (("chain", "draw"), values)})
    return float(az.rhat(dataset, method="folded")["values"])


def plot_forest(draws: Mapping[str, xr.Dataset], **kwargs: Any) -> Any:
    """Draw intervals of several Datasets over one another, with a legend."""
    import arviz as az

    if ARVIZ_1:
        collection = az.plot_forest(dict(draws), combined=True, **kwargs)
        collection.add_legend("model")
        return collection
    # Of several Datasets ArviZ 0.x takes the variables in an order that changes from run to run.
    kwargs.setdefault("var_names", list(next(iter(draws.values())).data_vars))
    axes = az.plot_forest(list(draws.values()), model_names=list(draws), combined=True, **kwargs)
    axis = np.ravel(axes)[0]
    legend = axis.get_legend()
    lines = legend.legend_handles[::-1]  # in the order of the rows
    labels = [text.get_text() for text in legend.get_texts()][::-1]
    # Beside the intervals, not on them.
    axis.legend(lines, labels, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    return axes
