"""Labelled training histories for ArviZ: a chain is a seed, a draw is an epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xarray as xr

Epochs = Sequence[Mapping[str, float]]


def to_dataset(runs: Mapping[str, Mapping[int, Epochs]], **attrs: object) -> xr.Dataset:
    """Stack ``runs[gradient][seed][epoch]`` into variables of dims ``(chain, draw, gradient)``.

    The dimension ``chain`` also has the coordinate ``seed``. ``draw`` counts epochs from one.
    ``attrs`` describe the runs.
    """
    first = next(iter(runs.values()))
    seeds = list(first)
    num_epochs = len(first[seeds[0]])
    variables = {
        name: (
            ("chain", "draw", "gradient"),
            np.array(
                [
                    [
                        [runs[gradient][seed][epoch][name] for gradient in runs]
                        for epoch in range(num_epochs)
                    ]
                    for seed in seeds
                ]
            ),
        )
        for name in first[seeds[0]][0]
    }
    coords = {
        "chain": np.arange(len(seeds)),
        "seed": ("chain", np.array(seeds)),
        "draw": np.arange(1, num_epochs + 1),
        "gradient": list(runs),
    }
    return xr.Dataset(variables, coords, attrs={k: str(v) for k, v in attrs.items()})


def save(history: xr.Dataset, path: Path) -> None:
    """Write netCDF with one group, ``training``, which ``arviz.from_netcdf`` reads."""
    path.unlink(missing_ok=True)
    history.to_netcdf(path, group="training", engine="h5netcdf")
