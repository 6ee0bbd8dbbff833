"""Small programs that between them use what a program may use; their exact gradients are known."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from helpers.problems import Problem, bit_values, one_hot_values, relative_error, worst_z

SIZE = 2
MAX_COUNT = 8  # of a Poisson site of rate below 0.4: what lies beyond has mass 1e-9


def constant(values: Any, like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype)


def count_values(batch: tuple[int, ...], largest: int) -> list[Tensor]:
    size = torch.Size(batch).numel()
    grid = torch.cartesian_prod(*[torch.arange(largest + 1.0)] * size).reshape(-1, size)
    return list(grid.reshape(-1, *batch).unbind(0))


LOCAL = {
    "one_hot": lambda logits: dist.OneHotCategorical(logits=logits),
    "categorical": lambda logits: dist.Categorical(logits=logits),
    "bernoulli": lambda logits: dist.Bernoulli(logits=logits[..., 0]),
    "poisson": lambda logits: dist.Poisson((logits[..., 0] - 2).exp()),
}
SUPPORTS = {
    "one_hot": one_hot_values((SIZE,), 3),
    "categorical": count_values((SIZE,), 2),
    "bernoulli": bit_values((SIZE,)),
    "poisson": count_values((SIZE,), MAX_COUNT),
}


def feature(family: str, z: Tensor) -> Tensor:
    """A number for each value, not linear in it."""
    if family == "one_hot":
        return (z * constant([0.3, -1.0, 1.4], z)).sum(-1)
    if family == "categorical":
        return torch.tensor([0.3, -1.0, 1.4], dtype=torch.float64)[z.long()]
    return (0.3 + 0.9 * z) ** 2


def chain(family: str) -> Problem:
    """A global one-hot, a local site of the family, a local bit: each given the one before.

    The plate is scaled; the bit is masked for one element; the prior is skewed; the model has a
    parameter.
    """
    mask = torch.tensor([True, False])

    def model() -> None:
        w = pyro.param("w")
        a = pyro.sample("a", dist.OneHotCategorical(constant([0.1, 0.2, 0.7], w)))
        push = (a * constant([0.4, -0.8, 0.1], w)).sum(-1)
        with pyro.plate("n", SIZE), poutine.scale(scale=1.7):
            prior = push.unsqueeze(-1) * constant([1.0, -1.0, 0.5], w)
            prior = prior + constant([0.5, -0.5, -1.0], w)
            b = pyro.sample("b", LOCAL[family](prior))
            f = feature(family, b).to(w.dtype)
            with poutine.mask(mask=mask):
                c = pyro.sample("c", dist.Bernoulli(logits=0.5 * f - 1))
            x = dist.Normal(w * f + c * push, 0.8)
            pyro.sample("x", x, obs=constant([1.1, -0.6], w))

    def guide() -> None:
        a = pyro.sample("a", dist.OneHotCategorical(logits=pyro.param("a_logits")))
        push = (a * pyro.param("a_to_b")).sum(-1)
        with pyro.plate("n", SIZE), poutine.scale(scale=1.7):
            tilt = constant([1.0, 0.0, -1.0], push)
            logits = pyro.param("b_logits") + push.unsqueeze(-1) * tilt
            b = pyro.sample("b", LOCAL[family](logits))
            f = feature(family, b).to(logits.dtype)
            with poutine.mask(mask=mask):
                pyro.sample("c", dist.Bernoulli(logits=pyro.param("c_logit") + 0.7 * f))

    params = {
        "w": torch.tensor(0.9),
        "a_logits": torch.tensor([0.3, 0.1, -0.4]),
        "a_to_b": torch.tensor([0.5, -0.3, 0.2]),
        "b_logits": torch.tensor([[0.2, 0.6, -0.1], [-0.4, 0.3, 0.8]]),
        "c_logit": torch.tensor(0.4),
    }
    supports = {"a": one_hot_values((), 3), "b": SUPPORTS[family], "c": bit_values((SIZE,))}
    return Problem(model, guide, params, supports)


CHAIN_EVENT_DIMS = {"w": 0, "a_logits": 1, "a_to_b": 1, "b_logits": 1, "c_logit": 0}


def copies(problem: Problem, event_dims: dict[str, int], number: int, nesting: int = 1) -> Problem:
    """Many independent copies of a program in a plate, each with parameters of its own.

    One step then gives as many independent gradients. Parameters get the shape ``(copies,) +
    batch + event``, their batch filled up to ``nesting`` dimensions.
    """

    def wrap(program: Any) -> Any:
        def wrapped(*args: Any) -> None:
            with pyro.plate("copies", number, dim=-nesting - 1):
                program(*args)

        return wrapped

    params = {}
    for name, value in problem.params.items():
        batch = value.shape[: value.dim() - event_dims[name]]
        event = value.shape[len(batch) :]
        full = (1,) * (nesting - len(batch)) + tuple(batch) + tuple(event)
        params[name] = value.reshape(full).expand(number, *full).clone()
    return Problem(
        wrap(problem.model), wrap(problem.guide), params, problem.supports, problem.args
    )


def copy_gradients(problem: Problem, guide: Any, elbo: Any, dtype: torch.dtype) -> Tensor:
    """Take one step; return the copies' gradients ``(copies, parameters)``, float64."""
    problem.reset(dtype)
    elbo.loss_and_grads(problem.model, guide, *problem.args)
    store = pyro.get_param_store()._params
    grads = [
        torch.zeros_like(store[name]) if store[name].grad is None else store[name].grad
        for name in problem.params
    ]
    return torch.cat([grad.flatten(1) for grad in grads], 1).double()


def nested() -> Problem:
    """A plate in a plate, the inner one scaled."""
    table = torch.tensor([[0.3, -0.6, 1.0], [-1.2, 0.5, 0.8]], dtype=torch.float64)

    def model() -> None:
        with pyro.plate("outer", 3, dim=-1):
            g = pyro.sample("g", dist.Bernoulli(constant([0.2, 0.7, 0.4], table)))
            with pyro.plate("inner", 2, dim=-2), poutine.scale(scale=0.6):
                h = pyro.sample("h", dist.Bernoulli(0.2 + 0.5 * g))
                pyro.sample("x", dist.Normal(2 * h * (1 + g), 1.0), obs=table)

    def guide() -> None:
        with pyro.plate("outer", 3, dim=-1):
            g = pyro.sample("g", dist.Bernoulli(logits=pyro.param("g_logits")))
            with pyro.plate("inner", 2, dim=-2), poutine.scale(scale=0.6):
                pyro.sample("h", dist.Bernoulli(logits=pyro.param("h_logits") + g))

    params = {"g_logits": torch.tensor([0.1, -0.5, 0.9]), "h_logits": torch.full((2, 1), 0.2)}
    return Problem(model, guide, params, {"g": bit_values((3,)), "h": bit_values((2, 3))})


def check(draws: Tensor, gradient: Tensor) -> None:
    """Ask for no bias, and for standard errors that would show one of 2 %."""
    assert relative_error(draws, gradient) < 0.02
    assert worst_z(draws, gradient) < 5


def check_loss(losses: Tensor, elbo: float) -> None:
    """Ask for the mean loss to be minus the ELBO."""
    assert worst_z(losses[:, None], torch.tensor([-elbo])) < 5
