"""Gradient draws as a labelled Dataset: its names, and how they are recorded."""

from __future__ import annotations

import datetime
import math
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from scipy import stats
from torch import Tensor

from pyro_gumbel.diagnostics._moments import BATCH, SPREAD, Moments, free_name
from pyro_gumbel.diagnostics._state import Step

__all__ = ["RESERVED", "Recorder", "check_dims", "check_names", "dims_of"]

_MAX_BYTES = 4 * 2**30

# Dimensions and coordinates of the draws, which no parameter can share its name with.
_TAKEN = (
    "all block chain cosine direction draw estimator evaluations grad_norm loss parameter "
    "parameter_norm repeat seconds site site_effect square_trace trace trace_variance"
)
RESERVED = frozenset(_TAKEN.split())


def check_names(names: Iterable[str]) -> None:
    """Refuse parameters whose names the draws need."""
    taken = sorted(RESERVED & set(names))
    if taken:
        raise ValueError(
            f"Parameter {taken[0]!r} has the name of a dimension or a statistic of the draws; "
            f"rename it, or leave it out by params=[...]. Reserved are {sorted(RESERVED)}."
        )


def check_dims(dims: Any, names: Collection[str]) -> None:
    """Check that ``dims`` has free names of dimensions of known parameters."""
    if dims is None:
        return
    if not isinstance(dims, Mapping) or not all(map(_are_names, dims.values())):
        raise TypeError(
            "dims must be a dict of lists, such as dims={'logits': ['datum', 'category']}; got "
            f"{dims!r}."
        )
    for name, own in dims.items():
        if name not in names:
            raise ValueError(f"dims: no parameter is called {name!r}; there are {list(names)}.")
        taken = sorted(RESERVED.union(names) & set(own))
        if taken:
            raise ValueError(
                f"dims: parameter {name!r} cannot have a dimension {taken[0]!r}: a parameter, a "
                "dimension or a statistic of the draws has that name. Choose another."
            )


def _are_names(own: Any) -> bool:
    return isinstance(own, (list, tuple)) and all(isinstance(name, str) for name in own)


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


class Recorder:
    """Takes in the gradients of one estimator, draw by draw.

    Either each coordinate of each draw is kept, in the parameter's own precision. Or, with
    ``project``, each draw's inner product with a few directions, its norm and its cosine, and once
    for all draws the moments of each coordinate. The directions are random, of length one, and the
    same in every call. The cosine is that with the mean of all other draws so far.
    """

    def __init__(
        self,
        leaves: dict[str, Tensor],
        shape: tuple[int, int],
        dims: dict[str, list[str]] | None,
        project: int | None,
    ) -> None:
        self.leaves, self.shape, self.project = leaves, shape, project
        self.dims = {n: dims_of(n, leaf.dim(), dims, leaves) for n, leaf in leaves.items()}
        self.steps = {name: np.zeros(shape) for name in Step._fields}
        self.norms = np.zeros((*shape, len(leaves)))
        self.cosines = np.zeros(shape)
        sizes = {name: leaf.numel() for name, leaf in leaves.items()}
        self._moments = Moments(list(sizes.values()))
        if project is None:
            self._check_memory()
            self._kept = {
                name: np.empty((*shape, sizes[name]), _numpy(leaf.new_empty(0)).dtype)
                for name, leaf in leaves.items()
            }
        else:
            self._kept = {name: np.empty((*shape, project)) for name in leaves}
            generator = torch.Generator().manual_seed(0)
            random = [torch.randn(size, project, generator=generator) for size in sizes.values()]
            self._directions = [
                torch.nn.functional.normalize(own, dim=0).to(leaf)
                for own, leaf in zip(random, leaves.values(), strict=True)
            ]
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
        kept = rows
        if self.project is not None:
            kept = [row @ own for row, own in zip(rows, self._directions, strict=True)]
            self.cosines[at] = self._moments.update(torch.cat(rows, 1)).cpu().numpy()
        for array, row in zip(self._kept.values(), kept, strict=True):
            array[at] = _numpy(row)
        self._places.clear()

    def dataset(self) -> xr.Dataset:
        """Label the draws, and what was noted beside them."""
        self._flush()
        each, leaves = ("chain", "draw"), self.leaves
        coords: dict[str, Any] = {
            "chain": np.arange(self.shape[0]),
            "draw": np.arange(self.shape[1]),
            "grad_norm": (each, np.sqrt((self.norms**2).sum(-1))),
            **{name: (each, values) for name, values in self.steps.items()},
        }
        for name, leaf in leaves.items():
            # Values have a dimension of their own: a coordinate that only some of the variables
            # have stands in the way of stacking them, which ArviZ does.
            value = leaf.detach().double().flatten().cpu().clone().numpy()
            index = free_name(f"{name}.index", leaves)
            coords[free_name(f"{name}.value", leaves)] = ([index], value)
        attrs = self._attributes()
        if self.project is None:
            data = {
                name: (
                    (*each, *self.dims[name]),
                    self._kept[name].reshape(*self.shape, *leaf.shape),
                )
                for name, leaf in leaves.items()
            }
        else:
            data = {name: ((*each, "direction"), kept) for name, kept in self._kept.items()}
            coords |= {"cosine": (each, self.cosines), **self._summary()}
            attrs |= {"project": self.project, "moments_of": self._moments.count}
        return xr.Dataset(data, coords, attrs)

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
        columns = zip(SPREAD, self._moments.spreads().T, strict=True)
        return coords | {name: (["block"], column) for name, column in columns}

    def _attributes(self) -> dict[str, Any]:
        leaves = self.leaves.values()
        coarsest = max((leaf.dtype for leaf in leaves), key=lambda dtype: torch.finfo(dtype).eps)
        seconds = self.steps["seconds"]
        # The median's standard deviation, from the median absolute deviation of normal draws: the
        # machine's pauses count for nothing.
        deviation = stats.median_abs_deviation(seconds, axis=None, scale="normal")
        evaluations = np.percentile(self.steps["evaluations"], 50, method="lower")
        return {
            "gradient_of": "loss (negative ELBO), by unconstrained parameters",
            "device": str(next(iter(leaves)).device),
            "dtype": str(coarsest).removeprefix("torch."),  # the precision of the gradients
            "seconds": float(np.median(seconds)),
            "seconds_mcse": float(1.2533 * deviation / np.sqrt(seconds.size)),
            "evaluations": int(evaluations),
            "inference_library": "pyro",
            "inference_library_version": pyro.__version__,
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        }


def _norms(rows: Tensor) -> Tensor:
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return torch.linalg.vector_norm(rows, dim=1, dtype=dtype).double()


def _numpy(tensor: Tensor) -> np.ndarray:
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return (tensor.float() if half else tensor).cpu().numpy()
