"""Latent sites of a model, as a guide reads them from one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.distributions import Delta
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_gumbel.distributions.families import expand, has_law_of, masks, unwrap
from pyro_gumbel.guides._heads import Head, find_head

__all__ = ["Latent", "observed_sites", "prototype", "read_latent"]


@dataclass(frozen=True)
class Latent:
    """A latent site of the model.

    Attributes:
        name: Its name.
        head: The map from unconstrained parameters to its guide.
        plates: Its vectorised plates by dimension, the rightmost first: ``{-1: "data", ...}``.
        sizes: The full size of each plate.
        batch: The batch shape of these plates, with ones at dimensions without a plate.
        event_batch: Batch dimensions that ``to_event`` declared dependent.
        start: Initial unconstrained parameters, ``batch + event_batch + (head.size,)``.
    """

    name: str
    head: Head
    plates: dict[int, str]
    sizes: dict[int, int]
    batch: torch.Size
    event_batch: torch.Size
    start: Tensor

    @property
    def event_dim(self) -> int:
        """Return the number of rightmost dimensions of the parameters within an element."""
        return len(self.event_batch) + 1

    def build(self, raw: Tensor) -> Any:
        """Return the guide's distribution from ``(...) + batch + event_batch + (size,)``."""
        fn = self.head.build(raw)
        return fn.to_event(len(self.event_batch)) if self.event_batch else fn

    def features(self, value: Tensor) -> Tensor:
        """Return a value as features ``(...) + batch + (n,)``."""
        numbers = self.head.features(value)
        return numbers.flatten(numbers.dim() - self.event_dim)


@torch.no_grad()
def prototype(
    model: Callable[..., Any],
    init_loc_fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Trace:
    """Run the model once, hidden from other handlers, with ``init_loc_fn``'s initial values."""

    def start(site: Any) -> Tensor:
        # Initialisation strategies may return values outside a discrete support.
        return site["fn"].sample() if site["fn"].support.is_discrete else init_loc_fn(site)

    with poutine.block(), InitMessenger(start):
        return poutine.trace(model).get_trace(*args, **kwargs)


def observed_sites(trace: Trace) -> list[str]:
    """List the observed sites and factors, without deterministic sites and subsamples."""
    return [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and not site_is_subsample(site)
        and not has_law_of(unwrap(site["fn"]), Delta)
    ]


def read_latent(site: Any, shrink: float | None) -> Latent:
    """Read a latent site of the prototype.

    Raises:
        ValueError: If it is masked or in a sequential plate, or it has no head.
    """
    name, fn = site["name"], site["fn"]
    sequential = [frame.name for frame in site["cond_indep_stack"] if not frame.vectorized]
    if sequential:
        raise ValueError(
            f"Site {name!r} is in the sequential plate {sequential[0]!r}; automatic guides need "
            f"vectorised plates. Write `with pyro.plate({sequential[0]!r}, ...)` in place of the "
            "loop."
        )
    if site["mask"] is not None or masks(fn):
        raise ValueError(
            f"Site {name!r} is masked in the model. Without the same mask in the guide, the ELBO "
            "of masked elements is unbounded. Mask only observed sites, or write the guide by "
            "hand."
        )
    prior = unwrap(fn)
    frames = sorted(site["cond_indep_stack"], key=lambda frame: -frame.dim)
    plates = {frame.dim: frame.name for frame in frames}
    sizes = {frame.dim: frame.full_size or frame.size for frame in frames}
    nesting = -min(plates, default=0)
    num_event = fn.event_dim - len(prior.event_shape)
    batch = torch.Size((1,) * (nesting - len(fn.batch_shape)) + tuple(fn.batch_shape))
    event_batch = torch.Size(prior.batch_shape[len(prior.batch_shape) - num_event :])
    prior = expand(prior, batch + event_batch)
    value = site["value"].reshape(batch + event_batch + prior.event_shape)
    head = find_head(name, prior)
    start = head.start(prior, value, shrink)
    return Latent(name, head, plates, sizes, batch, event_batch, start)
