"""Small programs with exact gradients by enumeration, and gradient draws to compare."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_gumbel.estimators import Estimator
from pyro_gumbel.infer import Estimator_ELBO, config_gradient


@dataclass
class Problem:
    """A model, a guide, the guide's supports and initial parameters.

    ``supports`` lists for each discrete site the values it can take, batch shape included.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    params: dict[str, Tensor]
    supports: dict[str, list[Tensor]]
    args: tuple[Any, ...] = field(default=())

    def reset(self, dtype: torch.dtype) -> None:
        """Put new parameters into the store."""
        pyro.clear_param_store()
        for name, value in self.params.items():
            pyro.param(name, value.to(dtype).clone())

    def gradients(self) -> Tensor:
        """Read the parameters' gradients as one vector and clear them."""
        store = pyro.get_param_store()
        parts = []
        for name in self.params:
            param = store._params[name]
            parts.append(torch.zeros_like(param) if param.grad is None else param.grad.clone())
            param.grad = None
        return torch.cat([part.flatten() for part in parts]).double()


def one_hot_values(batch: tuple[int, ...], categories: int) -> list[Tensor]:
    """Every value of a plate of one-hot sites."""
    eye = torch.eye(categories)
    size = torch.Size(batch).numel()
    return [
        eye[list(index)].reshape(*batch, categories)
        for index in itertools.product(range(categories), repeat=size)
    ]


def bit_values(batch: tuple[int, ...]) -> list[Tensor]:
    """Every value of a plate of bits."""
    size = torch.Size(batch).numel()
    return [
        torch.tensor(bits, dtype=torch.float32).reshape(batch)
        for bits in itertools.product((0.0, 1.0), repeat=size)
    ]


def exact_gradient(problem: Problem) -> tuple[float, Tensor]:
    """Sum ``q(z) (log p - log q)`` over every joint state by plain Pyro: (ELBO, loss gradient)."""
    problem.reset(torch.float64)
    elbo = torch.zeros((), dtype=torch.float64)
    for state in itertools.product(*problem.supports.values()):
        values = dict(zip(problem.supports, (value.double() for value in state), strict=True))
        guide_trace = poutine.trace(poutine.condition(problem.guide, data=values)).get_trace(
            *problem.args
        )
        model_trace = poutine.trace(poutine.condition(problem.model, data=values)).get_trace(
            *problem.args
        )
        log_q = sum(_plain_log_prob(guide_trace.nodes[name]).sum() for name in values)
        guide_trace.compute_log_prob()
        model_trace.compute_log_prob()
        # Conditioned sites count as observed in both traces.
        reward = model_trace.log_prob_sum() - guide_trace.log_prob_sum()
        elbo = elbo + log_q.exp() * reward
    (-elbo).backward()
    return elbo.item(), problem.gradients()


def _plain_log_prob(site: Any) -> Tensor:
    """The log-probability of the draw: a mask changes the score alone."""
    fn = site["fn"]
    while isinstance(fn, dist.MaskedDistribution):
        fn = fn.base_dist
    return fn.log_prob(site["value"])


def draw_gradients(
    problem: Problem,
    estimator: Estimator | str | dict[str, Any],
    num_draws: int,
    *,
    num_particles: int = 1,
    vectorize: bool = True,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Draw gradients ``(draws, size)`` and losses ``(draws,)``, float64."""
    problem.reset(dtype)
    elbo = Estimator_ELBO(num_particles=num_particles, vectorize_particles=vectorize, **options)
    guide = config_gradient(problem.guide, estimator)
    gradients, losses = [], []
    for _ in range(num_draws):
        losses.append(float(elbo.loss_and_grads(problem.model, guide, *problem.args)))
        gradients.append(problem.gradients())
    return torch.stack(gradients), torch.tensor(losses, dtype=torch.float64)


def worst_z(draws: Tensor, exact: Tensor) -> float:
    """The largest distance of a coordinate's mean from its exact value, in standard errors."""
    error = draws.std(0) / draws.shape[0] ** 0.5
    # A coordinate without any spread must be right outright.
    floor = 1e-6 * (1 + exact.abs())
    return ((draws.mean(0) - exact).abs() / (error + floor)).max().item()


def relative_error(draws: Tensor, exact: Tensor) -> float:
    """The standard error of the mean gradient relative to the exact gradient's norm."""
    return ((draws.var(0) / draws.shape[0]).sum().sqrt() / exact.norm()).item()
