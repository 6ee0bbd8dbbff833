"""The joint states of a guide's discrete sites, and the plates that are summed apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor

from pyro_gumbel.diagnostics._programs import plates_of
from pyro_gumbel.distributions.families import event_dims, has_law_of, support_values, unwrap

__all__ = ["DiscreteSite", "States", "discrete_sites"]


@dataclass(frozen=True)
class DiscreteSite:
    """A discrete latent site.

    Attributes:
        name: Its name.
        support: The values of one variable, ``(C,) + event_shape`` of the variable alone.
        batch_shape: The site's batch shape.
        inner_shape: The shape of the independent variables that ``to_event`` bundles.
        plates: Its vectorised plates, by name and dimension.
    """

    name: str
    support: Tensor
    batch_shape: tuple[int, ...]
    inner_shape: tuple[int, ...]
    plates: dict[str, int]

    def joint_shape(self, parallel: frozenset[str]) -> tuple[int, ...]:
        """The batch shape with the dimensions of ``parallel`` plates set to one."""
        shape = list(self.batch_shape)
        for name, dim in self.plates.items():
            if name in parallel:
                shape[dim] = 1
        return tuple(shape)

    def num_states(self, parallel: frozenset[str]) -> int:
        """Number of joint values of the variables that are not summed one by one."""
        variables = math.prod(self.joint_shape(parallel)) * math.prod(self.inner_shape)
        return len(self.support) ** variables

    def values(self, digits: Tensor) -> Tensor:
        """Look up values: ``digits`` has some shape and then that of the inner variables."""
        return self.support[digits]


def discrete_sites(sites: dict[str, Any]) -> list[DiscreteSite]:
    """Describe the latent sites of a guide's run, in order.

    Raises:
        ValueError: If one of them cannot be enumerated.
    """
    found = []
    for name, site in sites.items():
        fn = unwrap(site["fn"])
        if has_law_of(fn, Delta):
            continue  # one state
        if not fn.has_enumerate_support:
            raise ValueError(
                f"Site {name!r} ({type(fn).__name__}) cannot be enumerated, so there is no exact "
                "gradient to be had. Take a long run of an unbiased estimator as the reference: "
                "gradient_draws(..., estimators={'reference': 'auto'}, num_draws=100_000, "
                "project=8, seed=1)['reference']."
            )
        support = support_values(fn)
        plates = {frame.name: frame.dim for frame in plates_of(site)}
        found.append(
            DiscreteSite(
                name,
                support.reshape(len(support), *fn.event_shape),
                tuple(site["fn"].batch_shape),
                _inner_shape(site["fn"]),
                plates,
            )
        )
    return found


def _inner_shape(fn: Any) -> tuple[int, ...]:
    base = unwrap(fn)
    return tuple(base.batch_shape[len(base.batch_shape) - event_dims(fn) :])


@dataclass(frozen=True)
class States:
    """All joint states, numbered, where elements of ``parallel`` plates take the same state.

    Attributes:
        sites: The sites.
        parallel: Plates whose elements are independent of one another, and so summed one by one.
        nesting: Number of dimensions that the programs' plates take.
    """

    sites: list[DiscreteSite]
    parallel: frozenset[str]
    nesting: int

    @property
    def count(self) -> int:
        """The number of states."""
        return math.prod(site.num_states(self.parallel) for site in self.sites)

    def digits(self, states: Tensor) -> dict[str, Tensor]:
        """Number each variable's value: ``(R,) + joint_shape + inner_shape`` for each site."""
        found = {}
        for site in reversed(self.sites):
            size = site.num_states(self.parallel)
            shape = (*site.joint_shape(self.parallel), *site.inner_shape)
            base, number = len(site.support), math.prod(shape)
            powers = base ** torch.arange(number)
            own = states.remainder(size)
            found[site.name] = (own[:, None] // powers).remainder(base).reshape(-1, *shape)
            states = states.div(size, rounding_mode="floor")
        return found

    def rows(self, digits: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn digits into values of which each state is a row, left of all plates."""
        values = {}
        for site in self.sites:
            own = digits[site.name]
            value = site.values(own)
            event = value.shape[1 + len(site.batch_shape) :]
            ones = (1,) * (self.nesting - len(site.batch_shape))
            value = value.reshape(
                len(own), *ones, *own.shape[1 : 1 + len(site.batch_shape)], *event
            )
            values[site.name] = value.expand(len(own), *ones, *site.batch_shape, *event)
        return values
