"""A model and a guide as a user writes them, with what a comparison needs to know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample

PROGRAMS: dict[str, Program] = {}
NOT_RECORDED = ("captured*",)  # these draw until a value is accepted, or select by a mask
Pair = tuple[Callable[..., Any], Callable[..., Any]]


@dataclass(frozen=True)
class Program:
    """The makers of a model and a guide, and the settings of the comparison.

    Attributes:
        make: Makes the two, given a number of independent replicates.
        copies: That number: they stand in a plate and share parameters, so that one gradient has a
            small standard error.
        reference: ``"trace"``, ``"enum"`` or ``"mean_field"`` for a loss of Pyro's, or a function
            of the parameters' constrained values that returns the exact loss of one replicate.
        jitter: Standard deviation of what is added to the initial parameters, for guides that
            start where a gradient vanishes.
        vectorized: Whether the programs broadcast over a plate of particles.
        importance: Whether the importance-weighted bound is compared.
        draws: Number of gradients at most; a multiple with ``--draws``.
        refused: Patterns of the objectives that refuse the programs, by design.
        only: Patterns of the objectives that are asked for, where all would take too long.
    """

    make: Callable[[int], Pair]
    copies: int = 1000
    reference: str | Callable[..., torch.Tensor] = "trace"
    jitter: float = 0.0
    vectorized: bool = True
    importance: bool = True
    draws: int = 80
    refused: tuple[str, ...] = ()
    only: tuple[str, ...] = ("*",)

    @property
    def name(self) -> str:
        return self.make.__name__

    def refuses(self, objective: str) -> bool:
        return any(fnmatch(objective, pattern) for pattern in self.refused)

    def asks(self, objective: str) -> bool:
        return any(fnmatch(objective, pattern) for pattern in self.only)

    def start(self) -> Setup:
        """Make the programs, with the same parameters every time, in a store of their own."""
        pyro.set_rng_seed(0)
        with pyro.get_param_store().scope() as store:
            return self._start(store)

    def _start(self, store: Any) -> Setup:
        model, guide = self.make(self.copies)
        with poutine.block(), torch.no_grad():
            guide_trace = poutine.trace(guide).get_trace()
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace()
            for _, value in sorted(pyro.get_param_store()._params.items()):
                value.add_(self.jitter * torch.randn_like(value))
        latents = {
            name: site["fn"]
            for name, site in guide_trace.nodes.items()
            if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
        }
        nesting = max(_nesting(guide_trace), _nesting(model_trace))
        return Setup(model, guide, self.copies, latents, nesting, store)


@dataclass
class Setup:
    """Two programs with initialised parameters, and what a run of them showed."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    copies: int
    latents: dict[str, Any]
    nesting: int
    store: Any

    def parameters(self) -> Any:
        """The context in which the programs find their parameters."""
        return pyro.get_param_store().scope(self.store)


def _nesting(trace: Any) -> int:
    frames = [f for site in trace.nodes.values() for f in site.get("cond_indep_stack", ())]
    return max([-f.dim for f in frames if f.vectorized], default=0)


def program(**options: Any) -> Callable[[Callable[[int], Pair]], Callable[[int], Pair]]:
    """Register a function that makes a model and a guide."""

    def register(make: Callable[[int], Pair]) -> Callable[[int], Pair]:
        made = Program(make, **options)
        if made.name in PROGRAMS:
            raise ValueError(f"there are two programs {made.name!r}")
        PROGRAMS[made.name] = made
        return make

    return register


def param(name: str, *value: float, **options: Any) -> torch.Tensor:
    """A parameter ``name_``, a number or a vector, by its initial value."""
    start = torch.tensor(value[0] if len(value) == 1 else value)
    return pyro.param(f"{name}_", start, **options)


def copies(n: int, dim: int = -1) -> Any:
    """The plate of replicates."""
    return pyro.plate("copies", n, dim=dim)


def bit(name: str, logits: Any, **options: Any) -> torch.Tensor:
    return pyro.sample(name, dist.Bernoulli(logits=torch.as_tensor(logits)), **options)


def one_hot(name: str, logits: Any, **options: Any) -> torch.Tensor:
    return pyro.sample(name, dist.OneHotCategorical(logits=torch.as_tensor(logits)), **options)


def category(name: str, logits: Any, **options: Any) -> torch.Tensor:
    return pyro.sample(name, dist.Categorical(logits=torch.as_tensor(logits)), **options)


def normal(name: str, loc: Any, scale: Any = 1.0, **options: Any) -> torch.Tensor:
    return pyro.sample(name, dist.Normal(torch.as_tensor(loc), scale), **options)


def table(*values: Any) -> torch.Tensor:
    return torch.tensor(values)
