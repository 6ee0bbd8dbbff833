"""Plates of a model in one call, with their sizes and subsamples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import pyro
import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_gumbel.distributions.families import sample_detached, unwrap

__all__ = ["PlateShape", "read_plates"]


@dataclass(frozen=True)
class PlateShape:
    """A plate of the model in one call.

    Attributes:
        name: Its name.
        dim: Its dimension, counted from the right.
        size: Its full size.
        subsample_size: The size of its subsample.
        subsample: Indices of the subsample, if the model chose them.
        device: The device on which the model draws indices.
    """

    name: str
    dim: int
    size: int
    subsample_size: int
    subsample: Tensor | None = None
    device: Any = None

    def whole(self) -> PlateShape:
        """Return the plate with all of its elements."""
        return replace(self, subsample_size=self.size, subsample=None)

    def make(self) -> pyro.plate:
        """Make the guide's plate of this name, whose indices the model will use."""
        chosen = self.subsample is not None  # even a permutation of all elements
        return pyro.plate(
            self.name,
            self.size,
            subsample_size=None if chosen else self.subsample_size,
            subsample=self.subsample if chosen else None,
            dim=self.dim,
            device=self.device,
        )


class _AllPlatesRead(Exception):
    """Raised to leave the model as soon as all plates are known."""


class _PlateReader(Messenger):
    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.missing = set(names)
        self.subsamples: dict[str, tuple[Tensor | None, Any]] = {}
        self.shapes: dict[str, PlateShape] = {}

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            device = cast(Any, msg["fn"]).device
            self.subsamples[cast(str, msg["name"])] = cast(Any, msg["value"]), device
            return
        for frame in msg["cond_indep_stack"]:
            if frame.vectorized and frame.name in self.missing:
                self.missing.discard(frame.name)
                self.shapes[frame.name] = PlateShape(
                    frame.name,
                    cast(int, frame.dim),
                    frame.full_size or frame.size,
                    frame.size,
                    *self.subsamples.get(frame.name, (None, None)),
                )
        if not self.missing:
            raise _AllPlatesRead
        if msg["value"] is None:  # torch's one-hot draw reads values, which breaks recording
            msg["value"] = sample_detached(unwrap(cast(Any, msg["fn"])))


def read_plates(
    model: Callable[..., Any], names: Iterable[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, PlateShape]:
    """Run the model up to a site in each of the named plates, hidden from other handlers.

    The guide's plates must equal the model's; otherwise the ELBO would have a wrong scale. The
    part of the model before the last of these sites runs twice per step.

    Raises:
        ValueError: If the model does not reach a site in a plate.
    """
    reader = _PlateReader(names)
    if not reader.missing:
        return {}
    try:
        with torch.no_grad(), poutine.block(), reader:
            model(*args, **kwargs)
    except _AllPlatesRead:
        return reader.shapes
    raise ValueError(
        f"The model had the plates {sorted(reader.missing)} when the guide was set up, and they "
        "are missing in this call. Automatic guides need a model with the same structure in each "
        "call."
    )
