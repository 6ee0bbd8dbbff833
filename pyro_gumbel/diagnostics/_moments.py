"""The labels of gradient draws, and their moments in one pass by blocks of coordinates.

The memory that moments take does not grow with the number of draws.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

__all__ = [
    "BATCH",
    "SPREAD",
    "Block",
    "Moments",
    "blocks_of",
    "check_draws",
    "check_reference",
    "dims_of",
    "free_name",
    "is_projected",
    "own_array",
    "own_coordinate",
    "parameters_of",
    "reference_blocks",
    "rounding_of",
]

BATCH = 32
SPREAD = ("trace", "trace_variance", "square_trace")


def free_name(name: str, taken: Container[Any]) -> str:
    """Append underscores until the name is free."""
    while name in taken:
        name += "_"
    return name


def dims_of(
    name: str, rank: int, dims: Mapping[str, Sequence[str]] | None, names: Container[Any]
) -> list[str]:
    """The names of a parameter's own dimensions: the caller's, or ``<name>_dim_0``, ..."""
    if dims is None or name not in dims:
        return [free_name(f"{name}_dim_{axis}", names) for axis in range(rank)]
    if len(dims[name]) != rank:
        raise ValueError(
            f"dims: parameter {name!r} has {rank} dimensions of its own; got names for "
            f"{len(dims[name])}: {list(dims[name])}."
        )
    return list(dims[name])


def own_coordinate(dataset: xr.Dataset, name: str, statistic: str) -> xr.DataArray:
    """Read what stands beside a parameter's draws as ``<name>.<statistic>``."""
    return dataset.coords[free_name(f"{name}.{statistic}", dataset.data_vars)]


def parameters_of(dataset: xr.Dataset) -> list[str]:
    """The names of the parameters."""
    return [str(name) for name in dataset.data_vars]


def is_projected(dataset: xr.Dataset) -> bool:
    """Return whether draws are kept as projections and moments."""
    return "project" in dataset.attrs


def own_array(dataset: xr.Dataset, name: str) -> xr.DataArray:
    """An array with the parameter's own dimensions: of one draw, or of an exact gradient."""
    if is_projected(dataset):
        return own_coordinate(dataset, name, "mean")
    array = dataset[name]
    return array[0, 0] if array.dims[:2] == ("chain", "draw") else array


@dataclass(frozen=True)
class Block:
    r"""Statistics of some coordinates: a parameter's, a single one, or all.

    :math:`\Sigma` is the covariance of one draw. A gradient that is known exactly is the mean of
    infinitely many draws without scatter.
    """

    mean: np.ndarray  # over draws, (n,)
    variance: np.ndarray  # of the sample, (n,)
    norms: np.ndarray  # of each draw, (chain, draw)
    count: float  # of draws
    trace: float  # estimate of tr Sigma, the sum of sample variances
    trace_variance: float  # of that estimate
    square_trace: float  # estimate of tr Sigma^2, at most (tr Sigma)^2

    @property
    def carriers(self) -> float:
        """The effective number of draws in the trace: their count over the distances' kurtosis.

        It is a third of the count for normal draws in one dimension. It is ``k`` if all draws but
        ``k`` are equal, and 0 if all are.
        """
        if not self.trace:
            return 0.0
        return self.count / (1 + self.count * self.trace_variance / self.trace**2)


class Moments:
    """Mean and variance of each coordinate; scatter and norms of blocks of the given sizes.

    Everything is taken relative to the first draw, so that equal draws have a variance of zero.
    """

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.count = 0
        self._pairs = 0
        self._shift: Tensor | None = None
        self._norms: list[Tensor] = []

    def update(self, draws: Tensor) -> Tensor:
        """Take in a batch of shape ``(B, n)``; return cosines with the others' mean.

        Operations on single draws are in their own precision, sums over batches in double.
        """
        shift = self._start(draws) if self._shift is None else self._shift
        wide = torch.promote_types(draws.dtype, torch.float32)
        pieces = draws.to(wide).split(self.sizes, 1)
        self._norms.append(torch.stack([piece.norm(dim=1) for piece in pieces], 1).double())
        x = draws - shift
        batch, total = len(x), self.count + len(x)
        mean = x.mean(0)
        deviations = x.sub_(mean)
        step = mean.double() - self.offset
        self.squares += deviations.square().sum(0)
        self.squares += step**2 * (self.count * batch / total)
        self.offset += step * (batch / total)
        self.count = total
        self._scatter(deviations.add_((mean.double() - self.offset).to(x.dtype)))
        return self._cosines(draws)

    def _start(self, draws: Tensor) -> Tensor:
        self._shift = draws[0].clone()
        self.offset = torch.zeros_like(self._shift, dtype=torch.float64)
        self.squares = torch.zeros_like(self.offset)
        # Sums over draws of squared deviations, of their squares, and over pairs of draws of
        # products that estimate the trace of Sigma squared: for each block, and last for all.
        self._sums = self.offset.new_zeros(3, len(self.sizes) + 1)
        return self._shift

    @property
    def mean(self) -> Tensor:
        """The mean of each coordinate, ``(n,)``."""
        assert self._shift is not None
        return self._shift + self.offset

    @property
    def variance(self) -> Tensor:
        """The sample variance of each coordinate, ``(n,)``."""
        return self.squares / (self.count - 1)

    @property
    def norms(self) -> np.ndarray:
        """The norm of each block of each draw, ``(draws, blocks)``."""
        return torch.cat(self._norms).cpu().numpy()

    def spreads(self) -> np.ndarray:
        """Compute what ``SPREAD`` names, for each block and last for all, ``(blocks + 1, 3)``."""
        pieces = [*self.squares.split(self.sizes), self.squares]
        trace = torch.stack([piece.sum() for piece in pieces]) / (self.count - 1)
        mean, mean_of_squares = self._sums[:2] / self.count
        trace_variance = (mean_of_squares - mean**2).clamp(min=0) / self.count
        # Within the bounds that hold for any covariance; the upper one if there are too few draws.
        dimensions = trace.new_tensor([max(len(piece), 1) for piece in pieces])
        estimate = self._sums[2] / self._pairs if self._pairs else trace**2
        square_trace = estimate.clamp(trace**2 / dimensions, trace**2)
        return torch.stack([trace, trace_variance, square_trace], 1).cpu().numpy()

    def _scatter(self, x: Tensor) -> None:
        """Add up squared deviations, and products that estimate the trace of Sigma squared."""
        grams = [(piece @ piece.T).double() for piece in x.split(self.sizes, 1)]
        stacked = torch.stack([*grams, torch.stack(grams).sum(0)])  # (blocks, B, B)
        deviations = stacked.diagonal(dim1=1, dim2=2)
        self._sums[0] += deviations.sum(1)
        self._sums[1] += (deviations**2).sum(1)
        batch = len(x)
        if batch < 4:
            return
        # For i != j, with the mean over the draws other than i and j: unbiased for tr Sigma^2,
        # for any distribution of the draws (Chen, Qin, 2010).
        others = stacked.sum(1, keepdim=True) - stacked - deviations[:, None, :]
        products = stacked - others / (batch - 2)  # (x_i - mean of others)' x_j
        both = products * products.transpose(1, 2)
        self._sums[2] += both.sum((1, 2)) - both.diagonal(dim1=1, dim2=2).sum(1)
        self._pairs += batch * (batch - 1)

    def _cosines(self, draws: Tensor) -> Tensor:
        if self.count < 2:
            return draws.new_full((len(draws),), torch.nan)
        total = self.mean * self.count
        along = (draws @ total.to(draws.dtype)).double()
        lengths = torch.linalg.vector_norm(draws, dim=1).double().square()
        # With t the sum of all draws, the others' mean points along t - g.
        others = (total @ total - 2 * along + lengths).clamp(min=0)
        return (along - lengths) / (lengths * others).sqrt()


def check_draws(draws: Any) -> dict[str, xr.Dataset]:
    """Check that ``draws`` are draws of the same parameters by one or more estimators."""
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
    shapes = {}
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
        shapes[label] = {n: own_array(dataset, n).shape for n in parameters_of(dataset)}
        first = next(iter(shapes))
        if shapes[label] != shapes[first]:
            raise ValueError(
                f"draws of {label!r} are of parameters of the shapes {shapes[label]}, those of "
                f"{first!r} of {shapes[first]}. Draw both with the same params=."
            )
    return dict(draws)


def check_reference(reference: Any) -> None:
    """Refuse a reference that is not a Dataset."""
    if not isinstance(reference, xr.Dataset):
        raise TypeError(
            "reference must be a Dataset: what exact_gradient(...) returns, or draws[label] of an "
            f"unbiased estimator; got {type(reference).__name__}."
        )


def blocks_of(
    dataset: xr.Dataset, like: xr.Dataset | None = None, *, each: bool = False
) -> dict[str, Block]:
    """Summarise draws or an exact gradient: a block for each parameter, and the block ``"all"``.

    The parameters are those of ``like``, by default its own; with ``each`` a block has one
    coordinate.
    """
    like = dataset if like is None else like
    names, parts = parameters_of(like), _parts(like, each=each)
    if not {"chain", "draw"} <= set(dataset.dims):
        mean, variance, count, spreads, norms = _exact(dataset, names, len(parts))
    elif is_projected(dataset):
        mean, variance, count, spreads, norms = _stored(dataset, names)
    else:
        mean, variance, count, spreads, norms = _pass_over(dataset, names, list(parts.values()))
    norms = np.concatenate([norms, np.linalg.norm(norms, axis=-1, keepdims=True)], -1)
    cuts = np.cumsum(list(parts.values()))[:-1]
    means, variances = [*np.split(mean, cuts), mean], [*np.split(variance, cuts), variance]
    return {
        part: Block(means[i], variances[i], norms[..., i], count, *map(float, spreads[i]))
        for i, part in enumerate([*parts, "all"])
    }


def reference_blocks(
    reference: xr.Dataset, draws: xr.Dataset, *, each: bool = False
) -> dict[str, Block]:
    """Summarise a reference for draws: an exact gradient, or draws of an unbiased estimator."""
    check_reference(reference)
    for name in parameters_of(draws):
        _check_fit(reference, draws, name)
    return blocks_of(reference, draws, each=each)


def _check_fit(reference: xr.Dataset, draws: xr.Dataset, name: str) -> None:
    if name not in reference:
        raise ValueError(
            f"reference has no parameter {name!r}; it has {parameters_of(reference)}."
        )
    one, other = own_array(draws, name).shape, own_array(reference, name).shape
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


def _parts(draws: xr.Dataset, *, each: bool) -> dict[str, int]:
    """The sizes of blocks, in order: parameters, or coordinates labelled ``name[i, j]``."""
    names = parameters_of(draws)
    if not each:
        return {name: own_array(draws, name).size for name in names}
    if is_projected(draws):
        raise ValueError(
            "by='coordinate' needs the draws themselves; these were kept as projections. Draw "
            "without project=, for the parameters of interest: params=[...]."
        )
    parts = {}
    for name in names:
        own = own_array(draws, name)
        for index in np.ndindex(own.shape):
            at = ", ".join(str(own[d].values[i]) for d, i in zip(own.dims, index, strict=True))
            parts[free_name(f"{name}[{at}]", names) if at else name] = 1
    return parts


Summary = tuple[np.ndarray, np.ndarray, float, np.ndarray, np.ndarray]


def _exact(reference: xr.Dataset, names: list[str], blocks: int) -> Summary:
    for name in names:
        if not np.isfinite(reference[name]).all():
            raise ValueError(f"reference is not finite at parameter {name!r}.")
    mean = np.concatenate([reference[name].values.astype(float).ravel() for name in names])
    spreads, norms = np.zeros((blocks + 1, len(SPREAD))), np.zeros((0, 0, blocks))
    return mean, np.zeros_like(mean), math.inf, spreads, norms


def _pass_over(dataset: xr.Dataset, names: list[str], sizes: list[int]) -> Summary:
    """Pass once over the draws, chain after chain, a few at a time."""
    shape = (dataset.sizes["chain"], dataset.sizes["draw"])
    rows = [dataset[name].values.reshape(math.prod(shape), -1) for name in names]
    moments = Moments(sizes)
    for start in range(0, math.prod(shape), BATCH):
        batch = np.concatenate([row[start : start + BATCH] for row in rows], 1)
        moments.update(torch.from_numpy(batch.astype(float)))
    mean, variance = moments.mean.numpy(), moments.variance.numpy()
    return mean, variance, moments.count, moments.spreads(), moments.norms.reshape(*shape, -1)


def _stored(dataset: xr.Dataset, names: list[str]) -> Summary:
    """Read the moments that are stored beside projected draws."""
    count = dataset.sizes["chain"] * dataset.sizes["draw"]
    of = dataset.attrs.get("moments_of", count)
    if of != count:
        raise ValueError(
            f"draws kept as projections are cut to {count}, and their moments are those of all "
            f"{of}. Give them whole, or draw with num_draws={dataset.sizes['draw']}."
        )
    mean, variance = (
        np.concatenate([own_coordinate(dataset, n, part).values.ravel() for n in names])
        for part in ("mean", "variance")
    )
    norms = dataset.coords["parameter_norm"].transpose("chain", "draw", "parameter")
    columns = np.stack([dataset.coords[name].values for name in SPREAD], 1)
    known = dict(zip(dataset.coords["block"].values, columns, strict=True))
    spreads = np.stack([known[name] for name in names])
    # The joint scatter of some of the parameters is not known: it is bounded by that of each.
    bound = [spreads[:, 0].sum(), *(np.sqrt(spreads[:, 1:]).sum(0) ** 2)]
    whole = known["all"] if len(names) == norms.sizes["parameter"] else np.array(bound)
    own = norms.sel(parameter=names).values
    return mean.astype(float), variance.astype(float), count, np.vstack([spreads, whole]), own


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
