"""What is kept of gradient draws: all of them, or projections and moments."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_gumbel.diagnostics._moments import BATCH, Moments

__all__ = [
    "RESERVED",
    "AllDraws",
    "Projections",
    "Recorder",
    "check_dims",
    "dims_of",
    "free_name",
    "statistic",
]

# Dimensions and coordinates of the draws, which no parameter can share its name with.
RESERVED = frozenset(
    {
        "all",
        "block",
        "chain",
        "cosine",
        "direction",
        "draw",
        "estimator",
        "grad_norm",
        "loss",
        "parameter",
        "parameter_norm",
        "repeat",
        "seconds",
        "site",
        "site_effect",
        "square_trace",
        "trace",
        "trace_variance",
    }
)

_MAX_BYTES = 4 * 2**30


def check_dims(dims: Any, leaves: Iterable[str]) -> None:
    """Check that ``dims`` names dimensions of parameters that there are.

    Raises:
        TypeError: If it is no dict of lists of names.
        ValueError: If it has an unknown parameter, or a name that the draws' own dimensions have.
    """
    if dims is None:
        return
    known = list(leaves)
    if not isinstance(dims, Mapping) or not all(map(_are_names, dims.values())):
        raise TypeError(
            "dims must be a dict of lists, such as dims={'logits': ['datum', 'category']}; got "
            f"{dims!r}."
        )
    for name, own in dims.items():
        if name not in known:
            raise ValueError(f"dims: no parameter is called {name!r}; there are {known}.")
        taken = sorted({"chain", "draw", "estimator", *known} & set(own))
        if taken:
            raise ValueError(
                f"dims: parameter {name!r} cannot have a dimension {taken[0]!r}: a dimension of "
                "the draws or a parameter has that name. Choose another."
            )


def _are_names(own: Any) -> bool:
    return isinstance(own, (list, tuple)) and all(isinstance(name, str) for name in own)


def free_name(name: str, taken: Collection[Any]) -> str:
    """Append underscores until no parameter has the name."""
    while name in taken:
        name += "_"
    return name


def statistic(dataset: xr.Dataset, name: str, kind: str) -> xr.DataArray:
    """Read a statistic that is kept beside a parameter's draws, ``<name>.<kind>``."""
    return dataset.coords[free_name(f"{name}.{kind}", dataset.data_vars)]


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


class Recorder(ABC):
    """Takes in the gradients of one estimator, draw by draw.

    Args:
        leaves: The parameters by name.
        num_chains: Number of chains.
        num_draws: Number of draws in each.
        dims: Names of the parameters' dimensions.
    """

    def __init__(
        self,
        leaves: dict[str, Tensor],
        num_chains: int,
        num_draws: int,
        dims: dict[str, list[str]] | None,
    ) -> None:
        self.leaves = leaves
        self.shape = (num_chains, num_draws)
        self.own_dims = {
            name: dims_of(name, leaf.dim(), dims, leaves) for name, leaf in leaves.items()
        }

    @abstractmethod
    def add(self, chain: int, draw: int, gradients: list[Tensor]) -> None:
        """Take in the gradients of one draw."""

    @abstractmethod
    def variables(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Return data variables, coordinates and attributes."""

    def _norms(self, squares: np.ndarray) -> tuple[list[str], np.ndarray]:
        return ["chain", "draw"], np.sqrt(squares)


class AllDraws(Recorder):
    """Keeps each coordinate of each draw, in the parameter's own precision.

    Raises:
        ValueError: If that needs more than 4 GiB.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        size = sum(leaf.numel() * leaf.element_size() for leaf in self.leaves.values())
        total = size * self.shape[0] * self.shape[1]
        if total > _MAX_BYTES:
            raise ValueError(
                f"{self.shape[0]} x {self.shape[1]} draws of {list(self.leaves)} take "
                f"{total / 2**30:.1f} GiB. Keep projections and moments instead, project=8, or "
                "name the parameters to record, params=[...]."
            )
        self.arrays = {
            name: torch.empty(*self.shape, *leaf.shape, dtype=leaf.dtype)
            for name, leaf in self.leaves.items()
        }

    def add(self, chain: int, draw: int, gradients: list[Tensor]) -> None:
        for array, gradient in zip(self.arrays.values(), gradients, strict=True):
            array[chain, draw] = gradient

    def variables(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        data = {
            name: (["chain", "draw", *self.own_dims[name]], array.float().numpy())
            if array.dtype in (torch.bfloat16, torch.float16)
            else (["chain", "draw", *self.own_dims[name]], array.numpy())
            for name, array in self.arrays.items()
        }
        squares = np.zeros(self.shape)
        for array in self.arrays.values():
            # Not in double, which would take a copy and much longer.
            dtype = torch.promote_types(array.dtype, torch.float32)
            rows = array.reshape(*self.shape, math.prod(array.shape[2:]))
            norms = torch.linalg.vector_norm(rows, dim=2, dtype=dtype)
            squares += norms.double().numpy() ** 2
        return data, {"grad_norm": self._norms(squares)}, {}


class Projections(Recorder):
    """Keeps each draw's inner product with a few fixed directions, its norm and its cosine.

    The directions are random, of length one, and the same in every call. The cosine is that with
    the mean of all other draws so far. The mean and the variance of every coordinate are kept as
    well, once for all draws.
    """

    def __init__(self, *args: Any, directions: int) -> None:
        super().__init__(*args)
        leaves = list(self.leaves.values())
        self.sizes = [leaf.numel() for leaf in leaves]
        generator = torch.Generator().manual_seed(0)
        self.directions = [
            torch.nn.functional.normalize(
                torch.randn(leaf.numel(), directions, generator=generator), dim=0
            ).to(leaf)
            for leaf in leaves
        ]
        self.moments = Moments(self.sizes)
        self.buffer = [leaf.new_empty(BATCH, leaf.numel()) for leaf in leaves]
        self.projected = {name: np.empty((*self.shape, directions)) for name in self.leaves}
        self.norms = np.zeros((*self.shape, len(leaves)))
        self.cosines = np.empty(self.shape)
        self.places: list[tuple[int, int]] = []

    def add(self, chain: int, draw: int, gradients: list[Tensor]) -> None:
        for row, gradient in zip(self.buffer, gradients, strict=True):
            row[len(self.places)] = gradient.flatten()
        self.places.append((chain, draw))
        if len(self.places) == BATCH:
            self._flush()

    def _flush(self) -> None:
        if not self.places:
            return
        rows = [row[: len(self.places)] for row in self.buffer]
        at = tuple(np.array(self.places).T)
        for name, row, directions in zip(self.leaves, rows, self.directions, strict=True):
            self.projected[name][at] = (row @ directions).double().cpu().numpy()
        self.norms[at] = torch.stack([row.norm(dim=1) for row in rows], 1).cpu().numpy()
        self.cosines[at] = self.moments.update(torch.cat(rows, 1)).cpu().numpy()
        self.places.clear()

    def variables(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        self._flush()
        data = {
            name: (["chain", "draw", "direction"], array) for name, array in self.projected.items()
        }
        coords: dict[str, Any] = {
            "grad_norm": self._norms((self.norms**2).sum(-1)),
            "cosine": (["chain", "draw"], self.cosines),
            "parameter": list(self.leaves),
            "parameter_norm": (["chain", "draw", "parameter"], self.norms),
        }
        for kind in ("mean", "variance"):
            pieces = getattr(self.moments, kind).cpu().split(self.sizes)
            for (name, leaf), piece in zip(self.leaves.items(), pieces, strict=True):
                coords[free_name(f"{name}.{kind}", self.leaves)] = (
                    self.own_dims[name],
                    piece.reshape(leaf.shape).numpy(),
                )
        blocks = [self.moments.spread(index) for index in range(len(self.sizes))]
        spreads = [*blocks, self.moments.spread()]
        coords["block"] = [*self.leaves, "all"]
        for kind in ("trace", "trace_variance", "square_trace"):
            values = [getattr(spread, kind) for spread in spreads]
            coords[kind] = (["block"], np.array(values))
        attrs = {"project": len(self.directions[0].T), "moments_of": self.moments.count}
        return data, coords, attrs
