"""Gradient draws in the container of the installed ArviZ."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from pyro_gumbel._arviz import tree
from pyro_gumbel.diagnostics._tables import check_draws, is_drawn, parameters_of, reference_blocks

__all__ = ["to_arviz"]

_STATISTICS = ("loss", "grad_norm", "seconds", "cosine")


def to_arviz(draws: Any, reference: xr.Dataset | None = None) -> Any:
    """Put draws, their statistics and the reference into one container.

    Groups:

    * ``gradients``: the draws, dims ``chain, draw, estimator`` and the parameter's own;
    * ``sample_stats``: ``elbo``, ``loss``, ``grad_norm`` and ``seconds`` of each draw (and
      ``cosine`` with projections), ``evaluations`` and ``num_particles`` of each estimator;
    * ``constant_data``: the parameters' values, and ``<name>.gradient``, the reference.

    Slashes in names, which netCDF cannot hold, become dots.

    Args:
        draws: What :func:`gradient_draws` returns; the same number of draws for all estimators.
        reference: What :func:`exact_gradient` returns, or draws whose mean is to be kept.

    Returns:
        ``arviz.InferenceData`` (ArviZ 0.x) or ``xarray.DataTree`` (1.x); ``to_netcdf`` writes
        either, and ``arviz.from_netcdf`` of either reads it.

    Raises:
        TypeError: If draws or reference are of another kind.
        ValueError: If estimators differ in parameters or in the number of draws, or the reference
            does not fit.

    Example:
        >>> noise = np.random.default_rng(0).normal(size=(2, 50))
        >>> data = to_arviz({"noisy": xr.Dataset({"l": (("chain", "draw"), noise)})})
        >>> data["gradients"]["l"].dims
        ('chain', 'draw', 'estimator')

        ArviZ looks for a group ``posterior`` unless it is told the name, 0.x and 1.x alike:

        >>> import arviz as az
        >>> list(az.summary(data, group="gradients").index)
        ['l[noisy]']
    """
    draws = check_draws(draws)
    _check_sizes(draws)
    names = parameters_of(next(iter(draws.values())))
    labels = list(draws)
    gradients = _join({label: _variables(dataset, names) for label, dataset in draws.items()})
    gradients.attrs = _common_attributes(draws)
    groups = {
        "gradients": gradients,
        "sample_stats": _statistics(draws, labels),
        "constant_data": _constants(next(iter(draws.values())), names, reference),
    }
    return tree({name: _writable(dataset) for name, dataset in groups.items()})


def _variables(dataset: xr.Dataset, names: list[str]) -> xr.Dataset:
    """The draws without what is kept beside them; coordinates of their dimensions stay."""
    kept = dataset[names]
    return kept.drop_vars([str(name) for name in kept.coords if name not in kept.dims])


def _join(datasets: dict[str, xr.Dataset]) -> xr.Dataset:
    index = xr.IndexVariable("estimator", list(datasets))
    joined = xr.concat(list(datasets.values()), dim=index, join="exact", combine_attrs="drop")
    return joined.transpose("chain", "draw", "estimator", ...)


def _statistics(draws: dict[str, xr.Dataset], labels: list[str]) -> xr.Dataset:
    first = next(iter(draws.values()))
    variables: dict[str, Any] = {}
    for name in _STATISTICS:
        if all(name in dataset.coords for dataset in draws.values()):
            stacked = np.stack([dataset.coords[name].values for dataset in draws.values()], -1)
            variables[name] = (("chain", "draw", "estimator"), stacked)
    if "loss" in variables:
        variables["elbo"] = (variables["loss"][0], -variables["loss"][1])
    for name in ("evaluations", "num_particles"):
        values = [float(dataset.attrs.get(name, np.nan)) for dataset in draws.values()]
        variables[name] = (("estimator",), np.array(values))
    coords: dict[str, Any] = {"estimator": labels}
    coords |= {dim: np.arange(first.sizes[dim]) for dim in ("chain", "draw")}
    return xr.Dataset(variables, coords)


def _constants(first: xr.Dataset, names: list[str], reference: xr.Dataset | None) -> xr.Dataset:
    variables: dict[str, Any] = {}
    for name in names:
        if f"{name}.value" in first.coords:
            dims, shape = _own(first, name)
            variables[name] = (dims, first.coords[f"{name}.value"].values.reshape(shape))
    if reference is not None:
        blocks = reference_blocks(reference, first, names)
        for name in names:
            dims, shape = _own(first, name)
            variables[f"{name}.gradient"] = (dims, blocks[name].mean.reshape(shape))
    data = xr.Dataset(variables)
    own = {dim: first.coords[dim] for dim in data.dims if dim in first.coords}
    data = data.assign_coords(own)
    if reference is not None:
        data.attrs["reference"] = str(reference.attrs.get("estimator", ""))
    return data


def _own(dataset: xr.Dataset, name: str) -> tuple[list[str], tuple[int, ...]]:
    """A parameter's own dimensions and shape."""
    if "project" in dataset.attrs:
        array = dataset.coords[f"{name}.mean"]
        return list(map(str, array.dims)), array.shape
    array = dataset[name]
    skip = 2 if is_drawn(dataset) else 0
    return list(map(str, array.dims[skip:])), array.shape[skip:]


def _check_sizes(draws: dict[str, xr.Dataset]) -> None:
    sizes = {label: (d.sizes["chain"], d.sizes["draw"]) for label, d in draws.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"to_arviz: the estimators' numbers of chains and draws differ: {sizes}. Draw as many "
            "with each, or convert them one by one."
        )


def _common_attributes(draws: dict[str, xr.Dataset]) -> dict[str, Any]:
    attributes = [dataset.attrs for dataset in draws.values()]
    shared = {
        key: value
        for key, value in attributes[0].items()
        if all(other.get(key) == value for other in attributes)
    }
    for key in ("config",):
        shared[key] = "; ".join(f"{label}: {d.attrs.get(key, '')}" for label, d in draws.items())
    return shared


def _writable(dataset: xr.Dataset) -> xr.Dataset:
    everything = [*dataset.variables, *dataset.dims]
    return dataset.rename(
        {name: str(name).replace("/", ".") for name in everything if "/" in str(name)}
    )
