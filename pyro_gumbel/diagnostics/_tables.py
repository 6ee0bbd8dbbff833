"""Draws of one estimator as statistics of blocks of coordinates, in whatever form they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr

from pyro_gumbel.diagnostics._moments import BATCH, Moments, Spread
from pyro_gumbel.diagnostics._recorder import statistic

__all__ = [
    "Block",
    "blocks_of",
    "check_draws",
    "check_reference",
    "is_drawn",
    "parameters_of",
    "reference_blocks",
    "rounding_of",
]

_SPREAD = ("trace", "trace_variance", "square_trace")


@dataclass(frozen=True)
class Block:
    """Statistics of some coordinates: a parameter's, or all.

    Attributes:
        mean: Their mean over draws, ``(n,)``.
        spread: How they scatter; ``None`` for a gradient that is known exactly.
        norms: The norm of each draw, ``(N,)``; empty for an exact gradient.
    """

    mean: np.ndarray
    spread: Spread | None
    norms: np.ndarray


def is_drawn(dataset: xr.Dataset) -> bool:
    """Tell draws from an exact gradient."""
    return "chain" in dataset.dims and "draw" in dataset.dims


def parameters_of(dataset: xr.Dataset) -> list[str]:
    """The names of the parameters."""
    return [str(name) for name in dataset.data_vars]


def check_draws(draws: Any) -> dict[str, xr.Dataset]:
    """Check that ``draws`` are draws of the same parameters by one or more estimators.

    Raises:
        TypeError: If they are no dict of Datasets.
        ValueError: If there are none, or of different parameters or shapes, or too few.
    """
    if isinstance(draws, xr.Dataset):
        draws = {str(draws.attrs.get("estimator", "draws")): draws}
    if not isinstance(draws, Mapping) or not all(
        isinstance(dataset, xr.Dataset) for dataset in draws.values()
    ):
        raise TypeError(
            "draws must be a dict of Datasets by label, as gradient_draws(...) returns it; got "
            f"{type(draws).__name__}."
        )
    if not draws:
        raise ValueError("draws is empty; gradient_draws(..., estimators={...}) makes some.")
    first_label, first = next(iter(draws.items()))
    for label, dataset in draws.items():
        _check_one(label, dataset)
        if set(parameters_of(dataset)) != set(parameters_of(first)):
            raise ValueError(
                f"draws of {label!r} are of the parameters {parameters_of(dataset)}, those of "
                f"{first_label!r} of {parameters_of(first)}. Draw both with the same params=."
            )
        for name in parameters_of(first):
            one, other = _own_shape(first, name), _own_shape(dataset, name)
            if one != other:
                raise ValueError(
                    f"draws of {label!r} have shape {other} at parameter {name!r}, those of "
                    f"{first_label!r} {one}."
                )
    return dict(draws)


def _check_one(label: str, dataset: xr.Dataset) -> None:
    if not dataset.data_vars:
        raise ValueError(f"draws of {label!r} hold no parameter.")
    for name in parameters_of(dataset):
        if tuple(dataset[name].dims[:2]) != ("chain", "draw"):
            raise ValueError(
                f"draws of {label!r}: {name!r} has dims {tuple(dataset[name].dims)}; they must "
                "start with 'chain', 'draw'."
            )
    number = dataset.sizes["chain"] * dataset.sizes["draw"]
    if number < 2:
        raise ValueError(
            f"draws of {label!r} are {number} in number; a variance takes at least 2."
        )


def _projected(dataset: xr.Dataset) -> bool:
    return "project" in dataset.attrs


def _own_shape(dataset: xr.Dataset, name: str) -> tuple[int, ...]:
    """The parameter's own shape."""
    if _projected(dataset):
        return statistic(dataset, name, "mean").shape
    shape = dataset[name].shape
    return tuple(shape[2:] if is_drawn(dataset) else shape)


def blocks_of(dataset: xr.Dataset, names: list[str]) -> dict[str, Block]:
    """Sum up draws: a block for each of the parameters ``names``, and the block ``"all"``."""
    if _projected(dataset):
        return _stored_blocks(dataset, names)
    sizes = [int(np.prod(_own_shape(dataset, name), dtype=int)) for name in names]
    moments = Moments(sizes)
    squares = []
    for batch in _batches(dataset, names):
        moments.update(batch)
        pieces = batch.double().split(sizes, 1)
        squares.append(torch.stack([(piece**2).sum(1) for piece in pieces], 1))
    squared = torch.cat(squares).numpy()
    means = moments.mean.split(sizes)
    blocks = {
        name: Block(means[index].numpy(), moments.spread(index), np.sqrt(squared[:, index]))
        for index, name in enumerate(names)
    }
    return blocks | {"all": Block(moments.mean.numpy(), moments.spread(), np.sqrt(squared.sum(1)))}


def _batches(dataset: xr.Dataset, names: list[str]) -> Iterator[torch.Tensor]:
    """Draws as rows, chain after chain, a few at a time."""
    arrays = [dataset[name].values for name in names]
    number = arrays[0].shape[0] * arrays[0].shape[1]
    sizes = [math.prod(array.shape[2:]) for array in arrays]
    rows = [
        torch.from_numpy(np.ascontiguousarray(array)).reshape(number, width)
        for array, width in zip(arrays, sizes, strict=True)
    ]
    for start in range(0, number, BATCH):
        yield torch.cat([row[start : start + BATCH].double() for row in rows], 1)


def _stored_blocks(dataset: xr.Dataset, names: list[str]) -> dict[str, Block]:
    count = dataset.sizes["chain"] * dataset.sizes["draw"]
    of = dataset.attrs.get("moments_of", count)
    if of != count:
        raise ValueError(
            f"draws kept as projections are cut to {count}, and their moments are those of all "
            f"{of}. Give them whole, or draw with num_draws={dataset.sizes['draw']}."
        )
    means = {name: statistic(dataset, name, "mean").values.reshape(-1) for name in names}
    norms = dataset.coords["parameter_norm"].values.reshape(count, -1)
    columns = {name: norms[:, i] for i, name in enumerate(dataset.coords["parameter"].values)}
    statistics = zip(*(dataset.coords[name].values for name in _SPREAD), strict=True)
    spreads = {
        block: Spread(count, *map(float, values))
        for block, values in zip(dataset.coords["block"].values, statistics, strict=True)
    }
    blocks = {name: Block(means[name], spreads[name], columns[name]) for name in names}
    whole = np.concatenate([means[name] for name in names])
    return blocks | {
        "all": Block(whole, spreads["all"], dataset.coords["grad_norm"].values.reshape(-1))
    }


def rounding_of(dataset: xr.Dataset, size: Any) -> Any:
    """The error that rounding may put into a gradient of that size.

    Where terms cancel, as at an optimum, the gradient is far smaller than what it is the sum of.
    The loss tells their size.
    """
    dtype = str(dataset.attrs.get("dtype", next(iter(dataset.data_vars.values())).dtype))
    eps = {"float64": 2.0**-52, "float32": 2.0**-23}.get(dtype, 2.0**-10)
    loss = np.abs(dataset.coords["loss"].values) if "loss" in dataset.coords else np.zeros(1)
    finite = loss[np.isfinite(loss)]
    return eps * (64 * size + 4 * (finite.mean() if finite.size else 0.0))


def check_reference(reference: Any) -> None:
    """Refuse a reference of another kind.

    Raises:
        TypeError: If it is no Dataset.
    """
    if not isinstance(reference, xr.Dataset):
        raise TypeError(
            "reference must be a Dataset: what exact_gradient(...) returns, or draws[label] of an "
            f"unbiased estimator; got {type(reference).__name__}."
        )


def reference_blocks(
    reference: xr.Dataset, draws: xr.Dataset, names: list[str]
) -> dict[str, Block]:
    """Sum up a reference: an exact gradient, or draws of an unbiased estimator.

    Raises:
        TypeError: If it is no Dataset.
        ValueError: If a parameter is missing from it, has another shape or other coordinates, or
            is not finite.
    """
    check_reference(reference)
    for name in names:
        if name not in reference:
            raise ValueError(
                f"reference has no parameter {name!r}; it has {parameters_of(reference)}."
            )
        one, other = _own_shape(draws, name), _own_shape(reference, name)
        if one != other:
            raise ValueError(
                f"reference has shape {other} at parameter {name!r}, the draws have {one}."
            )
        _check_coordinates(reference, draws, name)
    if is_drawn(reference):
        return blocks_of(reference, names)
    means = {name: reference[name].values.astype(float).reshape(-1) for name in names}
    for name, mean in means.items():
        if not np.isfinite(mean).all():
            raise ValueError(f"reference is not finite at parameter {name!r}.")
    nothing = np.empty(0)
    blocks = {name: Block(mean, None, nothing) for name, mean in means.items()}
    return blocks | {"all": Block(np.concatenate(list(means.values())), None, nothing)}


def _check_coordinates(reference: xr.Dataset, draws: xr.Dataset, name: str) -> None:
    """Refuse labels in another order, for values are matched by position."""
    for dim in set(reference[name].dims) & set(draws[name].dims) - {"chain", "draw"}:
        if dim not in reference.coords or dim not in draws.coords:
            continue
        one, other = draws.coords[dim].values.tolist(), reference.coords[dim].values.tolist()
        if one != other:
            raise ValueError(
                f"reference has the coordinates {other} in dimension {dim!r} of parameter "
                f"{name!r}, the draws have {one}. Write reference.sel({dim}={one})."
            )
