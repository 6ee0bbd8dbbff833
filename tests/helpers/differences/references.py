"""A program's loss and gradient by Pyro's own losses or by their definition."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.enum import get_importance_trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from helpers.differences.draws import Step, gradient_step
from helpers.user_programs import Program, Setup


@dataclass(frozen=True)
class Quantity:
    """The estimated quantity, and its number of particles.

    The ELBO is one quantity for any number of particles; a reference with as many may have the
    very random numbers.
    """

    particles: int = 1
    vectorized: bool = False
    importance: bool = False


def reference_step(program: Program, setup: Setup, quantity: Quantity) -> Step:
    """Make the step of a reference."""
    if quantity.importance:
        return _importance_step(setup, quantity.particles, vectorized=quantity.vectorized)
    model, guide = setup.model, setup.guide
    if callable(program.reference):
        return _exact_step(program.reference, setup)
    if program.reference == "enum":
        elbo = TraceEnum_ELBO(max_plate_nesting=setup.nesting)
        guide = config_enumerate(guide)
    else:
        kind = {"trace": Trace_ELBO, "mean_field": TraceMeanField_ELBO}[program.reference]
        elbo = kind(
            num_particles=quantity.particles,
            vectorize_particles=quantity.vectorized,
            max_plate_nesting=setup.nesting,
        )
    return gradient_step(lambda: elbo.loss_and_grads(model, guide))


def _exact_step(exact: Any, setup: Setup) -> Step:
    """The step of a function of the parameters, given by their names."""
    names = list(pyro.get_param_store().keys())

    def compute() -> Tensor:
        loss = setup.copies * exact(**{name: pyro.param(name) for name in names})
        loss.backward()
        return loss.detach()

    return gradient_step(compute)


def _importance_step(setup: Setup, count: int, *, vectorized: bool) -> Step:
    """The bound of each element of the plates that every site is in, by the score function.

    Replicates give one another a baseline: they are independent.
    """
    dim = -setup.nesting - 1

    def weigh() -> tuple[Tensor, Tensor, float]:
        """Log weights and scores of what is not reparameterised; the plates' scale."""
        with pyro.validation_enabled(False):  # the plate of particles is around both
            traces = get_importance_trace("flat", math.inf, setup.model, setup.guide, (), {})
        model, guide = traces
        sites = [(site, 1.0) for site in _sample_sites(model)]
        sites += [(site, -1.0) for site in _sample_sites(guide)]
        frames = frozenset.intersection(*(frozenset(s["cond_indep_stack"]) for s, _ in sites))
        common = [f for f in frames if f.vectorized and f.name != "particles"]
        scale = math.prod((f.full_size or f.size) / f.size for f in common)
        dims = {dim, *(f.dim for f in common)}
        weight = sum(sign * _keep(site["log_prob"], dims) for site, sign in sites) / scale
        score = torch.zeros_like(weight)
        for site, sign in sites:
            if sign < 0 and not site["is_observed"]:
                part = site["fn"].score_parts(site["value"]).score_function
                score = score + (_keep(part, dims) if isinstance(part, Tensor) else part)
        return weight, score, scale

    def particles() -> tuple[Tensor, Tensor, float]:
        if vectorized:
            with pyro.plate("particles", count, dim=dim):
                weight, score, scale = weigh()
            return weight.movedim(dim, 0), score.movedim(dim, 0), scale
        with _OneMinibatch():
            weights, scores, (scale, *_) = zip(*(weigh() for _ in range(count)), strict=True)
        return torch.stack(weights), torch.stack(scores), scale

    def compute() -> Tensor:
        weight, score, scale = particles()
        bound = scale * (weight.logsumexp(0) - math.log(count))
        signal = bound.detach() - _mean_of_others(bound.detach())
        (-(bound + signal * score.sum(0)).sum()).backward()
        return -bound.sum().detach()

    return gradient_step(compute)


class _OneMinibatch(Messenger):
    """Gives every particle of a step the minibatch of the first."""

    def __init__(self) -> None:
        super().__init__()
        self._indices: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is None:
            msg["value"] = self._indices.get(msg["name"])

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self._indices[msg["name"]] = msg["value"]


def _sample_sites(trace: Any) -> list[Any]:
    return [site for site in trace.nodes.values() if site["type"] == "sample"]


def _keep(value: Tensor, dims: set[int]) -> Tensor:
    """Sum over the plates that are not common."""
    rest = [dim for dim in range(-value.dim(), 0) if dim not in dims]
    return value.sum(rest, keepdim=True) if rest else value


def _mean_of_others(bound: Tensor) -> Tensor:
    size = bound.numel()
    return (bound.sum() - bound) / (size - 1) if size > 1 else torch.zeros_like(bound)
