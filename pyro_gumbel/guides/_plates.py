"""The plates of a model as one call makes them: sizes and subsamples included."""

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
    """What a plate of the model is in one call.

    Attributes:
        name: Its name.
        dim: Its dimension, counted from the right.
        size: Its full size.
        subsample_size: How many of its elements the model looks at.
        subsample: Their indices where the model chose them itself.
        device: Where the model wanted drawn indices to be.
    """

    name: str
    dim: int
    size: int
    subsample_size: int
    subsample: Tensor | None = None
    device: Any = None

    def whole(self) -> PlateShape:
        """The same with all of its elements."""
        return replace(self, subsample_size=self.size, subsample=None)

    def make(self) -> pyro.plate:
        """Make the guide's plate of this name; the model will find its indices there."""
        chosen = self.subsample is not None  # all elements in another order, perhaps
        return pyro.plate(
            self.name,
            self.size,
            subsample_size=None if chosen else self.subsample_size,
            subsample=self.subsample if chosen else None,
            dim=self.dim,
            device=self.device,
        )


class _AllPlatesRead(Exception):
    """Raised to leave the model as soon as there is no more to learn."""


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
        if msg["value"] is None:  # torch's own draw of a one-hot looks at values: no recording
            msg["value"] = sample_detached(unwrap(cast(Any, msg["fn"])))


def read_plates(
    model: Callable[..., Any], names: Iterable[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, PlateShape]:
    """Run the model until a site in each of the named plates was met, unseen by other handlers.

    The plates of a guide have to be those of the model, or the ELBO would be scaled wrongly; only
    the model knows them. What comes before the last of these sites runs twice a step.

    Raises:
        ValueError: If a plate is not met.
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
        f"The model's plates {sorted(reader.missing)} were there when the guide was set up, and "
        "are missing in this call. A guide of this kind needs a model whose structure does not "
        "vary."
    )
