"""Gradient draws as a labelled Dataset: its names, and how they are recorded."""

from __future__ import annotations

import datetime
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from torch import Tensor

from pyro_gumbel.diagnostics._moments import BATCH, Moments
from pyro_gumbel.diagnostics._replica import Step

__all__ = [
    "SPREAD",
    "Recorder",
    "check_dims",
    "check_names",
    "dims_of",
    "free_name",
    "is_projected",
    "own_coordinate",
    "parameters_of",
]

# Dimensions and coordinates of the draws, which no parameter can share its name with.
_TAKEN = (
    "all block chain cosine direction draw estimator evaluations grad_norm loss parameter "
    "parameter_norm repeat seconds site site_effect square_trace trace trace_variance"
)
RESERVED = frozenset(_TAKEN.split())
SPREAD = ("trace", "trace_variance", "square_trace")
_MAX_BYTES = 4 * 2**30


# Names


def check_names(names: Iterable[str]) -> None:
    """Refuse parameters whose names the draws need.

    Raises:
        ValueError: If there is one.
    """
    taken = sorted(RESERVED & set(names))
    if taken:
        raise ValueError(
            f"Parameter {taken[0]!r} has the name of a dimension or a statistic of the draws; "
            f"rename it, or leave it out by params=[...]. Reserved are {sorted(RESERVED)}."
        )


def check_dims(dims: Any, names: Iterable[str]) -> None:
    """Check that ``dims`` names dimensions of known parameters.

    Raises:
        TypeError: If it is not a dict of lists of names.
        ValueError: If it has an unknown parameter, or a name that is taken.
    """
    if dims is None:
        return
    known = list(names)
    if not isinstance(dims, Mapping) or not all(map(_are_names, dims.values())):
        raise TypeError(
            "dims must be a dict of lists, such as dims={'logits': ['datum', 'category']}; got "
            f"{dims!r}."
        )
    for name, own in dims.items():
        if name not in known:
            raise ValueError(f"dims: no parameter is called {name!r}; there are {known}.")
        taken = sorted((RESERVED | set(known)) & set(own))
        if taken:
            raise ValueError(
                f"dims: parameter {name!r} cannot have a dimension {taken[0]!r}: a parameter, a "
                "dimension or a statistic of the draws has that name. Choose another."
            )


def _are_names(own: Any) -> bool:
    return isinstance(own, (list, tuple)) and all(isinstance(name, str) for name in own)


def free_name(name: str, taken: Collection[Any]) -> str:
    """Append underscores until the name is free."""
    while name in taken:
        name += "_"
    return name


def dims_of(
    name: str, rank: int, dims: dict[str, list[str]] | None, names: Collection[Any]
) -> list[str]:
    """The names of a parameter's own dimensions: the caller's, or ``<name>_dim_0``, ...

    Raises:
        ValueError: If the caller named another number of dimensions.
    """
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


# Recording


class Recorder:
    """Takes in the gradients of one estimator, draw by draw.

    Either each coordinate of each draw is kept, in the parameter's own precision. Or, with
    ``project``, each draw's inner product with a few directions, its norm and its cosine, and once
    for all draws the moments of each coordinate. The directions are random, of length one, and the
    same in every call. The cosine is that with the mean of all other draws so far.

    Args:
        leaves: The parameters by name.
        shape: Number of chains, and of draws in each.
        dims: Names of the parameters' dimensions.
        project: Number of directions.

    Raises:
        ValueError: If the draws need more than 4 GiB.
    """

    def __init__(
        self,
        leaves: dict[str, Tensor],
        shape: tuple[int, int],
        dims: dict[str, list[str]] | None,
        project: int | None,
    ) -> None:
        self.leaves, self.shape = leaves, shape
        self.dims = {n: dims_of(n, leaf.dim(), dims, leaves) for n, leaf in leaves.items()}
        self.steps = {name: np.zeros(shape) for name in Step._fields}
        self.norms = np.zeros((*shape, len(leaves)))
        self.cosines = np.zeros(shape)
        self._directions = None if project is None else _directions(leaves, project)
        if project is None:
            self._check_memory()
        self._moments = Moments([leaf.numel() for leaf in leaves.values()])
        self._kept = {
            name: np.empty((*shape, leaf.numel()), _numpy(leaf.new_empty(0)).dtype)
            if project is None
            else np.empty((*shape, project))
            for name, leaf in leaves.items()
        }
        self._buffers = [leaf.new_empty(BATCH, leaf.numel()) for leaf in leaves.values()]
        self._places: list[tuple[int, int]] = []

    def _check_memory(self) -> None:
        size = sum(leaf.numel() * leaf.element_size() for leaf in self.leaves.values())
        total = size * math.prod(self.shape)
        if total > _MAX_BYTES:
            raise ValueError(
                f"{self.shape[0]} x {self.shape[1]} draws of {list(self.leaves)} take "
                f"{total / 2**30:.1f} GiB. Keep projections and moments instead, project=8, or "
                "name the parameters to record, params=[...]."
            )

    def add(self, chain: int, draw: int, step: Step, gradients: list[Tensor]) -> None:
        """Take in one draw."""
        for name, value in step._asdict().items():
            self.steps[name][chain, draw] = value
        for buffer, gradient in zip(self._buffers, gradients, strict=True):
            buffer[len(self._places)] = gradient.flatten()
        self._places.append((chain, draw))
        if len(self._places) == BATCH:
            self._flush()

    def _flush(self) -> None:
        if not self._places:
            return
        at = tuple(np.array(self._places).T)
        rows = [buffer[: len(self._places)] for buffer in self._buffers]
        self.norms[at] = torch.stack([_norms(row) for row in rows], 1).cpu().numpy()
        if self._directions is None:
            for kept, row in zip(self._kept.values(), rows, strict=True):
                kept[at] = _numpy(row)
        else:
            for kept, row, along in zip(self._kept.values(), rows, self._directions, strict=True):
                kept[at] = _numpy(row @ along)
            self.cosines[at] = self._moments.update(torch.cat(rows, 1)).cpu().numpy()
        self._places.clear()

    def dataset(self) -> xr.Dataset:
        """Label the draws, and what was noted beside them."""
        self._flush()
        each = ("chain", "draw")
        coords: dict[str, Any] = {
            "chain": np.arange(self.shape[0]),
            "draw": np.arange(self.shape[1]),
            "grad_norm": (each, np.sqrt((self.norms**2).sum(-1))),
            **{name: (each, values) for name, values in self.steps.items()},
            **self._values(),
        }
        if self._directions is not None:
            data: Any = {name: ((*each, "direction"), kept) for name, kept in self._kept.items()}
            coords |= {"cosine": (each, self.cosines), **self._summary()}
            own: dict[str, Any] = {"project": self._directions[0].shape[1]}
            own["moments_of"] = self._moments.count
        else:
            data = {
                name: ((*each, *self.dims[name]), kept.reshape(*self.shape, *leaf.shape))
                for (name, leaf), kept in zip(
                    self.leaves.items(), self._kept.values(), strict=True
                )
            }
            own = {}
        return xr.Dataset(data, coords, own | self._attributes())

    def _values(self) -> dict[str, Any]:
        # Values have a dimension of their own: a coordinate that only some of the variables have
        # stands in the way of stacking them, which ArviZ does.
        return {
            free_name(f"{name}.value", self.leaves): (
                [free_name(f"{name}.index", self.leaves)],
                leaf.detach().double().flatten().cpu().clone().numpy(),
            )
            for name, leaf in self.leaves.items()
        }

    def _summary(self) -> dict[str, Any]:
        coords: dict[str, Any] = {
            "parameter": list(self.leaves),
            "parameter_norm": (["chain", "draw", "parameter"], self.norms),
            "block": [*self.leaves, "all"],
        }
        for statistic in ("mean", "variance"):
            pieces = getattr(self._moments, statistic).cpu().split(self._moments.sizes)
            for (name, leaf), piece in zip(self.leaves.items(), pieces, strict=True):
                label = free_name(f"{name}.{statistic}", self.leaves)
                coords[label] = (self.dims[name], piece.reshape(leaf.shape).numpy())
        spreads = [*map(self._moments.spread, range(len(self.leaves))), self._moments.spread()]
        for statistic in SPREAD:
            values = np.array([getattr(spread, statistic) for spread in spreads])
            coords[statistic] = (["block"], values)
        return coords

    def _attributes(self) -> dict[str, Any]:
        leaves = self.leaves.values()
        coarsest = max((leaf.dtype for leaf in leaves), key=lambda dtype: torch.finfo(dtype).eps)
        seconds = self.steps["seconds"]
        median = np.median(seconds)
        # The median's standard deviation, from the median absolute deviation of normal draws: the
        # machine's pauses count for nothing.
        deviation = 1.4826 * np.median(np.abs(seconds - median))
        evaluations = np.percentile(self.steps["evaluations"], 50, method="lower")
        return {
            "gradient_of": "loss (negative ELBO), by unconstrained parameters",
            "device": str(next(iter(leaves)).device),
            "dtype": str(coarsest).removeprefix("torch."),  # the precision of the gradients
            "seconds": float(median),
            "seconds_mcse": float(1.2533 * deviation / np.sqrt(seconds.size)),
            "evaluations": int(evaluations),
            "inference_library": "pyro",
            "inference_library_version": pyro.__version__,
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        }


def _directions(leaves: dict[str, Tensor], number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.functional.normalize(
            torch.randn(leaf.numel(), number, generator=generator), dim=0
        ).to(leaf)
        for leaf in leaves.values()
    ]


def _norms(rows: Tensor) -> Tensor:
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return torch.linalg.vector_norm(rows, dim=1, dtype=dtype).double()


def _numpy(tensor: Tensor) -> np.ndarray:
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return (tensor.float() if half else tensor).cpu().numpy()
