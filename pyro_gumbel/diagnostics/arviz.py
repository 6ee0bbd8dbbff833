"""Gradient draws in the container of the installed ArviZ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr

from pyro_gumbel._arviz import tree
from pyro_gumbel.diagnostics._moments import (
    check_draws,
    dims_of,
    free_name,
    own_array,
    own_coordinate,
    parameters_of,
    reference_blocks,
)
from pyro_gumbel.infer._recover import Recovered

__all__ = ["to_arviz"]

_PER_DRAW = ("loss", "grad_norm", "seconds", "evaluations", "cosine")


def to_arviz(
    draws: Any,
    reference: xr.Dataset | None = None,
    *,
    posterior: xr.Dataset | Mapping[str, Any] | None = None,
) -> Any:
    """Put draws, their statistics and the reference into one container.

    Groups:

    * ``gradients``: the draws, dims ``chain, draw, estimator`` and the parameter's own;
    * ``sample_stats``: ``elbo``, ``loss``, ``grad_norm``, ``seconds``, ``evaluations`` and
      ``num_particles`` (``cosine`` with projections), all of dims ``chain, draw, estimator``;
    * ``constant_data``: the parameters' values, and ``<name>.gradient``, the reference;
    * ``posterior``: posterior samples, where they are given.

    Every dimension has coordinates. Slashes in names, which netCDF cannot hold, become dots.

    Args:
        draws: What :func:`gradient_draws` returns; the same number of draws for all estimators.
        reference: What :func:`exact_gradient` returns, or draws whose mean is to be kept.
        posterior: Samples of latent variables: a Dataset of dims ``chain, draw, ...``, or a dict
            of arrays or tensors of that shape, as ``MCMC.get_samples(group_by_chain=True)``
            returns it, or what :func:`~pyro_gumbel.infer.recover` returns, which is one chain.

    Returns:
        ``arviz.InferenceData`` (ArviZ 0.x) or ``xarray.DataTree`` (1.x); ``to_netcdf`` writes
        either, and ``arviz.from_netcdf`` of either reads it.

    Raises:
        TypeError: If draws, reference or posterior are of another kind.
        ValueError: If estimators differ in parameters or in the number of draws, the reference
            does not fit, or the posterior has no dimensions ``chain, draw``.

    Example:
        >>> noise = np.random.default_rng(0).normal(size=(2, 50))
        >>> data = to_arviz({"noisy": xr.Dataset({"l": (("chain", "draw"), noise)})})
        >>> data["gradients"]["l"].dims
        ('chain', 'draw', 'estimator')

        ArviZ looks for a group ``posterior`` unless another is named, 0.x and 1.x alike:

        >>> import arviz as az
        >>> list(az.summary(data, group="gradients").index)
        ['l[noisy]']
    """
    draws = check_draws(draws)
    sizes = {label: (d.sizes["chain"], d.sizes["draw"]) for label, d in draws.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"to_arviz: the estimators' numbers of chains and draws differ: {sizes}. Draw as many "
            "with each, or convert them one by one."
        )
    configs = "; ".join(f"{label}: {d.attrs.get('config', '')}" for label, d in draws.items())
    gradients = {n: d[parameters_of(d)].reset_coords(drop=True) for n, d in draws.items()}
    groups = {
        "gradients": _join(gradients).assign_attrs(config=configs),
        "sample_stats": _join({label: _statistics(dataset) for label, dataset in draws.items()}),
        "constant_data": _constants(next(iter(draws.values())), reference),
    }
    if posterior is not None:
        groups["posterior"] = _posterior(posterior)
    return tree(groups)


def _statistics(dataset: xr.Dataset) -> xr.Dataset:
    each = dataset.reset_coords()[[name for name in _PER_DRAW if name in dataset.coords]]
    if "loss" in each:
        each["elbo"] = -each["loss"]
    shape = (dataset.sizes["chain"], dataset.sizes["draw"])
    for name in ("evaluations", "num_particles"):
        if name not in each:
            value = float(dataset.attrs.get(name, np.nan))
            each[name] = (("chain", "draw"), np.full(shape, value))
    return each.drop_attrs()


def _join(datasets: dict[str, xr.Dataset]) -> xr.Dataset:
    index = xr.IndexVariable("estimator", list(datasets))
    joined = xr.concat(
        list(datasets.values()), dim=index, join="exact", combine_attrs="drop_conflicts"
    )
    return joined.transpose("chain", "draw", "estimator", ...)


def _constants(first: xr.Dataset, reference: xr.Dataset | None) -> xr.Dataset:
    names, data, attrs = parameters_of(first), {}, {}
    blocks = {} if reference is None else reference_blocks(reference, first)
    for name in names:
        own = own_array(first, name).reset_coords(drop=True)
        if free_name(f"{name}.value", names) in first.coords:
            value = own_coordinate(first, name, "value").values
            data[name] = own.copy(data=value.reshape(own.shape))
        if reference is not None:
            gradient = own.copy(data=blocks[name].mean.reshape(own.shape))
            data[free_name(f"{name}.gradient", names)] = gradient
            attrs["reference"] = str(reference.attrs.get("estimator", ""))
    return xr.Dataset(data, attrs=attrs)


def _posterior(given: Any) -> xr.Dataset:
    if not isinstance(given, Mapping):
        raise TypeError(
            "posterior must be a Dataset, or a dict of arrays, such as posterior={'z': samples}; "
            f"got {type(given).__name__}."
        )
    if isinstance(given, Recovered):
        given = {name: value.unsqueeze(0) for name, value in given.items()}
    if not isinstance(given, xr.Dataset):
        given = xr.Dataset({name: _samples(name, value, given) for name, value in given.items()})
    for name, array in given.data_vars.items():
        if array.dims[:2] != ("chain", "draw"):
            raise ValueError(
                f"posterior: {name!r} has shape {array.shape}, dims {array.dims}; expected chains "
                "and draws first, such as MCMC.get_samples(group_by_chain=True), or value[None] "
                "of a single chain."
            )
    return given


def _samples(name: str, value: Any, names: Mapping[str, Any]) -> xr.Variable:
    array = torch.as_tensor(value).detach().cpu().numpy()
    dims = ("chain", "draw", *dims_of(name, max(array.ndim - 2, 0), None, names))
    return xr.Variable(dims[: array.ndim], array)
