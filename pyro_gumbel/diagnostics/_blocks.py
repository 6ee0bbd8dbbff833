"""Statistics of gradient draws by blocks of coordinates, from either form of draws."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr

from pyro_gumbel.diagnostics._moments import BATCH, Moments, Spread
from pyro_gumbel.diagnostics._storage import (
    SPREAD,
    free_name,
    is_projected,
    own_coordinate,
    parameters_of,
)

__all__ = [
    "Block",
    "blocks_of",
    "check_draws",
    "check_reference",
    "own_shape",
    "reference_blocks",
    "rounding_of",
]


@dataclass(frozen=True)
class Block:
    """Statistics of some coordinates: a parameter's, a single one, or all.

    Attributes:
        mean: Their mean over draws, ``(n,)``.
        variance: Their sample variances, ``(n,)``.
        spread: How they scatter; ``None`` for a gradient that is known exactly.
        norms: The norm of each draw, ``(chain, draw)``; empty for an exact gradient.
    """

    mean: np.ndarray
    variance: np.ndarray
    spread: Spread | None
    norms: np.ndarray

    @property
    def scatter(self) -> Spread:
        """The spread of a block of draws."""
        assert self.spread is not None
        return self.spread


_NONE = np.empty((0, 0))


def is_drawn(dataset: xr.Dataset) -> bool:
    """Return whether a Dataset holds draws, rather than an exact gradient."""
    return "chain" in dataset.dims and "draw" in dataset.dims


def own_shape(dataset: xr.Dataset, name: str) -> tuple[int, ...]:
    """The parameter's own shape."""
    if is_projected(dataset):
        return own_coordinate(dataset, name, "mean").shape
    return dataset[name].shape[2 if is_drawn(dataset) else 0 :]


def check_draws(draws: Any) -> dict[str, xr.Dataset]:
    """Check that ``draws`` are draws of the same parameters by one or more estimators.

    Raises:
        TypeError: If they are not a dict of Datasets.
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
        if not dataset.data_vars:
            raise ValueError(f"draws of {label!r} hold no parameter.")
        for name, array in dataset.data_vars.items():
            if array.dims[:2] != ("chain", "draw"):
                raise ValueError(
                    f"draws of {label!r}: {name!r} has dims {array.dims}; they must start with "
                    "'chain', 'draw'."
                )
        number = dataset.sizes["chain"] * dataset.sizes["draw"]
        if number < 2:
            raise ValueError(f"draws of {label!r}: got {number}; a variance takes at least 2.")
        one, other = _shapes(first), _shapes(dataset)
        if one != other:
            raise ValueError(
                f"draws of {label!r} are of parameters of the shapes {other}, those of "
                f"{first_label!r} of {one}. Draw both with the same params=."
            )
    return dict(draws)


def _shapes(dataset: xr.Dataset) -> dict[str, tuple[int, ...]]:
    return {name: own_shape(dataset, name) for name in parameters_of(dataset)}


def check_reference(reference: Any) -> None:
    """Refuse a reference of another kind.

    Raises:
        TypeError: If it is not a Dataset.
    """
    if not isinstance(reference, xr.Dataset):
        raise TypeError(
            "reference must be a Dataset: what exact_gradient(...) returns, or draws[label] of an "
            f"unbiased estimator; got {type(reference).__name__}."
        )


def blocks_of(dataset: xr.Dataset, *, each: bool = False) -> dict[str, Block]:
    """Summarise draws: a block for each parameter, or each coordinate, and the block ``"all"``.

    Raises:
        ValueError: If projections were cut, or blocks of their coordinates are wanted.
    """
    names = parameters_of(dataset)
    return _summarise(dataset, names, _parts(dataset, names, each=each), each=each)


def reference_blocks(
    reference: xr.Dataset, draws: xr.Dataset, *, each: bool = False
) -> dict[str, Block]:
    """Summarise a reference for draws: an exact gradient, or draws of an unbiased estimator.

    Raises:
        TypeError: If it is not a Dataset.
        ValueError: If a parameter is missing from it, has another shape or other coordinates, or
            is not finite.
    """
    check_reference(reference)
    names = parameters_of(draws)
    for name in names:
        _check_fit(reference, draws, name)
    parts = _parts(draws, names, each=each)
    if is_drawn(reference):
        return _summarise(reference, names, parts, each=each)
    means = [reference[name].values.astype(float).reshape(-1) for name in names]
    for name, mean in zip(names, means, strict=True):
        if not np.isfinite(mean).all():
            raise ValueError(f"reference is not finite at parameter {name!r}.")
    whole = np.concatenate(means)
    pieces = np.split(whole, np.cumsum(list(parts.values()))[:-1])
    known = dict(zip(parts, pieces, strict=True)) | {"all": whole}
    return {part: Block(mean, np.zeros_like(mean), None, _NONE) for part, mean in known.items()}


def _check_fit(reference: xr.Dataset, draws: xr.Dataset, name: str) -> None:
    if name not in reference:
        raise ValueError(
            f"reference has no parameter {name!r}; it has {parameters_of(reference)}."
        )
    one, other = own_shape(draws, name), own_shape(reference, name)
    if one != other:
        raise ValueError(
            f"reference has shape {other} at parameter {name!r}, the draws have {one}."
        )
    # Values are matched by position, so labels in another order would be matched wrongly.
    for dim in set(reference[name].dims) & set(draws[name].dims) - {"chain", "draw"}:
        if dim not in reference.coords or dim not in draws.coords:
            continue
        mine, theirs = draws.coords[dim].values.tolist(), reference.coords[dim].values.tolist()
        if mine != theirs:
            raise ValueError(
                f"reference has the coordinates {theirs} in dimension {dim!r} of parameter "
                f"{name!r}, the draws have {mine}. Write reference.sel({dim}={mine})."
            )


def _parts(draws: xr.Dataset, names: list[str], *, each: bool) -> dict[str, int]:
    """The sizes of blocks, in order: parameters, or coordinates labelled ``name[i, j]``."""
    if not each:
        return {name: math.prod(own_shape(draws, name)) for name in names}
    parts = {}
    for name in names:
        own = [draws[name][dim].values for dim in draws[name].dims[2:]]
        for index in np.ndindex(*map(len, own)):
            at = ", ".join(str(labels[i]) for labels, i in zip(own, index, strict=True))
            parts[free_name(f"{name}[{at}]", names) if at else name] = 1
    return parts


def _summarise(
    dataset: xr.Dataset, names: list[str], parts: dict[str, int], *, each: bool
) -> dict[str, Block]:
    if not is_projected(dataset):
        return _pass_over(dataset, names, parts)
    if each:
        raise ValueError(
            "by='coordinate' needs the draws themselves; these were kept as projections. Draw "
            "without project=, for the parameters of interest: params=[...]."
        )
    return _stored(dataset, names)


def _pass_over(dataset: xr.Dataset, names: list[str], parts: dict[str, int]) -> dict[str, Block]:
    """Pass once over the draws, chain after chain, a few at a time."""
    sizes = list(parts.values())
    shape = (dataset.sizes["chain"], dataset.sizes["draw"])
    arrays = [dataset[name].values for name in names]
    rows = [array.reshape(math.prod(shape), math.prod(array.shape[2:])) for array in arrays]
    moments = Moments(sizes)
    lengths = []
    for start in range(0, math.prod(shape), BATCH):
        batch = np.concatenate([row[start : start + BATCH] for row in rows], 1)
        draws = torch.from_numpy(batch.astype(float))
        moments.update(draws)
        pieces = [torch.linalg.vector_norm(piece, dim=1) for piece in draws.split(sizes, 1)]
        lengths.append(torch.stack(pieces, 1))
    norms = torch.cat(lengths).numpy().reshape(*shape, len(parts))
    means = [piece.numpy() for piece in moments.mean.split(sizes)]
    variances = [piece.numpy() for piece in moments.variance.split(sizes)]
    blocks = {
        part: Block(means[i], variances[i], moments.spread(i), norms[..., i])
        for i, part in enumerate(parts)
    }
    return blocks | {"all": _joined(list(blocks.values()), moments.spread())}


def _stored(dataset: xr.Dataset, names: list[str]) -> dict[str, Block]:
    """Read the moments that projections were stored with."""
    count = dataset.sizes["chain"] * dataset.sizes["draw"]
    of = dataset.attrs.get("moments_of", count)
    if of != count:
        raise ValueError(
            f"draws kept as projections are cut to {count}, and their moments are those of all "
            f"{of}. Give them whole, or draw with num_draws={dataset.sizes['draw']}."
        )
    columns = [dataset.coords[name].values for name in ("block", *SPREAD)]
    spreads = {
        block: Spread(count, *map(float, row)) for block, *row in zip(*columns, strict=True)
    }
    norms = dataset.coords["parameter_norm"].transpose("chain", "draw", "parameter")
    blocks = {}
    for name in names:
        mean, variance = (
            own_coordinate(dataset, name, statistic).values.reshape(-1).astype(float)
            for statistic in ("mean", "variance")
        )
        blocks[name] = Block(mean, variance, spreads[name], norms.sel(parameter=name).values)
    whole = spreads["all"] if len(names) == len(norms.parameter) else None
    return blocks | {"all": _joined(list(blocks.values()), whole)}


def _joined(blocks: list[Block], spread: Spread | None) -> Block:
    """Join blocks; their joint scatter is bounded by those of each where it is not known."""
    if spread is None:
        parts = [block.scatter for block in blocks]
        spread = Spread(
            parts[0].count,
            sum(part.trace for part in parts),
            sum(math.sqrt(part.trace_variance) for part in parts) ** 2,
            sum(math.sqrt(part.square_trace) for part in parts) ** 2,
        )
    return Block(
        np.concatenate([block.mean for block in blocks]),
        np.concatenate([block.variance for block in blocks]),
        spread,
        np.sqrt(sum(block.norms**2 for block in blocks)),
    )


def rounding_of(dataset: xr.Dataset, size: Any) -> Any:
    """The error that rounding may put into a gradient of that size.

    Where terms cancel, as at an optimum, the gradient is far smaller than the terms of its sum.
    Their size is taken from the loss.
    """
    dtype = str(dataset.attrs.get("dtype", next(iter(dataset.data_vars.values())).dtype))
    eps = {"float64": 2.0**-52, "float32": 2.0**-23}.get(dtype, 2.0**-10)
    loss = np.abs(dataset.coords["loss"].values) if "loss" in dataset.coords else np.zeros(1)
    finite = loss[np.isfinite(loss)]
    return eps * (64 * size + 4 * (finite.mean() if finite.size else 0.0))
