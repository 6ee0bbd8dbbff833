"""Repeated losses and gradients, and the difference of two series of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import torch
from pyro import poutine
from torch import Tensor

from helpers.user_programs import Setup

Step = Callable[[], tuple[float, dict[str, Tensor]]]

SIGHT = 5.0  # a difference of so many standard errors is reported
_SHOWN = 8  # larger parameters are compared by their sum and a few random projections
_ROUNDING = 1e-4  # relative error that single precision may make


def gradient_step(compute: Callable[[], float | Tensor]) -> Step:
    """Make a step from a function that computes a loss and leaves gradients.

    Parameters are found as ``SVI`` finds them.
    """

    def step() -> tuple[float, dict[str, Tensor]]:
        with poutine.trace(param_only=True) as capture:
            loss = compute()
        values = {
            name: site["value"].unconstrained() for name, site in capture.trace.nodes.items()
        }
        found = {
            name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
            for name, value in values.items()
        }
        for value in values.values():  # some have two names
            value.grad = None
        return float(loss), found

    return step


class Draws:
    """A series of losses and gradients. Draw ``i`` has the ``i``-th seed.

    Attributes:
        names: ``"loss"``, then parameters' names with the index of a feature.
        rows: A row for each draw and a column for each feature, per replicate.
    """

    def __init__(
        self, make: Callable[[Setup], Step], setup: Setup, parameters: list[str] | None = None
    ) -> None:
        self._setup = setup
        with setup.parameters():
            self._step = make(setup)
        self.parameters = parameters
        self.names: list[str] = []
        self._rows: list[Tensor] = []

    @property
    def rows(self) -> Tensor:
        return torch.stack(self._rows)

    def upto(self, count: int) -> Draws:
        """Extend the series to ``count`` draws, and return it."""
        if len(self._rows) < count:
            with self._setup.parameters():
                self._draw(count)
        return self

    def _draw(self, count: int) -> None:
        while len(self._rows) < count:
            pyro.set_rng_seed(1000 + len(self._rows))
            loss, gradients = self._step()
            if self.parameters is None:
                self.parameters = sorted(pyro.get_param_store().keys())
            parts = {"loss": torch.tensor([loss], dtype=torch.float64)}
            for name in self.parameters:
                # If the structure varies, a run may not use every parameter.
                unused = torch.zeros_like(pyro.get_param_store()._params[name])
                parts[name] = _features(gradients.get(name, unused))
            self.names = [f"{name}#{i}" for name, part in parts.items() for i in range(len(part))]
            self._rows.append(torch.cat(list(parts.values())) / self._setup.copies)

    def scale(self) -> Tensor:
        """Return the size of each feature's parameter: that of its largest feature."""
        size = self.rows.mean(0).abs().tolist()
        owners = [name.split("#")[0] for name in self.names]
        largest = max(size[1:], default=0.0)
        by_owner: dict[str, float] = {}
        for owner, value in zip(owners, size, strict=True):
            by_owner[owner] = max(by_owner.get(owner, 0.0), value, 0.05 * largest, 1e-6)
        by_owner["loss"] = max(size[0], 1.0)
        return torch.tensor([by_owner[owner] for owner in owners], dtype=torch.float64)


def _features(gradient: Tensor) -> Tensor:
    flat = gradient.detach().double().flatten()
    if len(flat) <= _SHOWN:
        return flat
    generator = torch.Generator().manual_seed(len(flat))
    signs = torch.randint(2, (3, len(flat)), generator=generator).double() * 2 - 1
    return torch.cat([flat.sum()[None], signs @ flat])


@dataclass
class Difference:
    """The difference of two series.

    Attributes:
        worst: The feature with the largest difference.
        z: This difference in standard errors.
        resolution: The smallest error, relative to its parameter, that is found in every feature.
        got: The mean of the worst feature.
        expected: Its mean in the reference.
        draws: The number of draws.
    """

    worst: str
    z: float
    resolution: float
    got: float
    expected: float
    draws: int


def difference(draws: Draws, reference: Draws, *, gradient: bool = True) -> Difference:
    """Compare every feature, or the loss alone.

    Draws of the same seed may use the same random numbers. A feature is compared by paired
    differences if these have the smaller standard error. So equal series are found equal at once.
    """
    ours, theirs = draws.rows, reference.rows
    both = min(len(ours), len(theirs))
    pairs = ours[:both] - theirs[:both]
    apart = (ours.var(0) / len(ours) + theirs.var(0) / len(theirs)).sqrt()
    paired = pairs.std(0) / math.sqrt(both)
    error = torch.minimum(apart, paired)
    off = torch.where(paired < apart, pairs.mean(0), ours.mean(0) - theirs.mean(0)).abs()
    scale = reference.scale()
    z = off / (error**2 + (_ROUNDING * scale / SIGHT) ** 2).sqrt()
    z = z.nan_to_num(math.inf)
    count = len(z) if gradient else 1
    worst = int(z[:count].argmax())
    return Difference(
        draws.names[worst],
        z[worst].item(),
        (SIGHT * error / scale)[:count].max().item(),
        ours[:both, worst].mean().item(),
        theirs[:both, worst].mean().item(),
        len(ours),
    )
