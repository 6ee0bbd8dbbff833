"""Programs for the coupled estimators, with exact gradients, and many independent copies of them.

A copy has parameters of its own and lies in a plate left of the program's, so that one step gives
as many independent estimates as there are copies, from few particles each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from helpers.problems import Problem, bit_values, exact_gradient, one_hot_values
from pyro_gumbel.infer import Estimator_ELBO, config_gradient


def constant(values: Any, like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype)


def bit_layers() -> Problem:
    """Two layers of two bits for each element of a scaled plate."""

    def model() -> None:
        w = pyro.param("w")
        with pyro.plate("n", 2), poutine.scale(scale=1.7):
            y = pyro.sample("y", dist.Bernoulli(logits=constant([0.4, -0.7], w)).to_event(1))
            prior = 1.2 * y.flip(-1) - 0.5
            z = pyro.sample("z", dist.Bernoulli(logits=prior).to_event(1))
            mean = w * (0.3 + z[..., 0] + 0.7 * z[..., 1]) ** 2 / 2 + y[..., 0] * z[..., 1]
            pyro.sample("x", dist.Normal(mean, 0.9), obs=constant([1.1, -0.4], w))

    def guide() -> None:
        with pyro.plate("n", 2), poutine.scale(scale=1.7):
            logits = pyro.param("y_logits")
            y = pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1))
            logits = pyro.param("z_logits") + pyro.param("y_to_z") * y
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

    params = {
        "w": torch.tensor(0.8),
        "y_logits": torch.tensor([[0.3, -0.6], [0.9, 0.2]]),
        "z_logits": torch.tensor([[-0.4, 0.7], [0.1, -1.0]]),
        "y_to_z": torch.tensor([0.8, -0.5]),
    }
    supports = {"y": bit_values((2, 2)), "z": bit_values((2, 2))}
    return Problem(model, guide, params, supports)


def one_hot_chain(*, as_index: bool = False) -> Problem:
    """Sites of three and four categories, each given the one before; one datum is masked.

    ``as_index`` makes them categorical.
    """
    family = dist.Categorical if as_index else dist.OneHotCategorical
    mask = torch.tensor([True, False])

    def pick(table: Tensor, z: Tensor) -> Tensor:
        """Return the row of a table that a value selects."""
        if not as_index:
            return (z.unsqueeze(-1) * table).sum(-2)
        index = z.long()[..., None, None].expand(*z.shape, 1, table.shape[-1])
        return table.expand(*z.shape, *table.shape[-2:]).gather(-2, index).squeeze(-2)

    def model() -> None:
        w = pyro.param("w")
        table = constant([[0.5, -0.2, 0.1, 0.0], [-1.0, 0.3, 0.0, 0.4], [0.0, 0.0, 0.9, -0.3]], w)
        slopes = constant([[0.9], [-0.3], [0.4]], w)
        levels = constant([[0.3], [-1.0], [1.4], [0.6]], w)
        with pyro.plate("n", 2):
            y = pyro.sample("y", family(constant([0.2, 0.3, 0.5], w)))
            z = pyro.sample("z", family(logits=pick(table, y)))
            mean = w * pick(levels, z)[..., 0] + pick(slopes, y)[..., 0] * pick(levels, z)[..., 0]
            with poutine.mask(mask=mask):
                pyro.sample("x", dist.Normal(mean, 0.7), obs=constant([1.2, -3.0], w))

    def guide() -> None:
        with pyro.plate("n", 2):
            y = pyro.sample("y", family(logits=pyro.param("y_logits")))
            logits = pyro.param("z_logits") + pick(pyro.param("y_to_z"), y)
            pyro.sample("z", family(logits=logits))

    params = {
        "w": torch.tensor(0.9),
        "y_logits": torch.tensor([[0.3, -0.5, 0.1], [0.0, 0.6, -0.2]]),
        "z_logits": torch.tensor([[0.2, 0.6, -0.1, 0.0], [-0.4, 0.3, 0.5, 0.1]]),
        "y_to_z": torch.tensor(
            [[0.5, 0.0, -0.4, 0.1], [0.0, 0.7, 0.2, -0.6], [-0.3, 0.1, 0.8, 0]]
        ),
    }
    supports = {"y": one_hot_values((2,), 3), "z": one_hot_values((2,), 4)}
    if as_index:
        supports = {name: [v.argmax(-1) for v in values] for name, values in supports.items()}
    return Problem(model, guide, params, supports)


def nested_plates() -> Problem:
    """A Bernoulli site in the outer plate, a one-hot site in both, subsampled."""
    rows = torch.tensor([0, 2])

    def model() -> None:
        w = pyro.param("w")
        data = constant([[0.2, 1.0], [9.0, 9.0], [-0.7, 0.4]], w)
        with pyro.plate("outer", 3, subsample=rows, dim=-2) as index:
            y = pyro.sample("y", dist.Bernoulli(constant(0.3, w)))
            with pyro.plate("inner", 2, dim=-1):
                prior = constant([0.5, -0.5, 0.1], w) + y.unsqueeze(-1) * constant([1, 0, -1], w)
                z = pyro.sample("z", dist.OneHotCategorical(logits=prior))
                mean = w * (z * constant([0.3, -1.0, 1.4], w)).sum(-1) + 0.5 * y
                pyro.sample("x", dist.Normal(mean, 1.0), obs=data[index])

    def guide() -> None:
        with pyro.plate("outer", 3, subsample=rows, dim=-2):
            y = pyro.sample("y", dist.Bernoulli(logits=pyro.param("y_logits")))
            with pyro.plate("inner", 2, dim=-1):
                logits = pyro.param("z_logits") + y.unsqueeze(-1) * pyro.param("y_to_z")
                pyro.sample("z", dist.OneHotCategorical(logits=logits))

    params = {
        "w": torch.tensor([[0.9]]),
        "y_logits": torch.tensor([[0.4], [-0.3]]),
        "z_logits": torch.tensor([[[0.2, 0.6, -0.1], [0.0, 0.3, 0.8]]] * 2),
        "y_to_z": torch.tensor([[[0.5, -0.3, 0.2]]]),
    }
    supports = {"y": bit_values((2, 1)), "z": one_hot_values((2, 2), 3)}
    return Problem(model, guide, params, supports)


def between_normals(family: str) -> Problem:
    """A Normal site, a discrete one given it, a Normal one given that: ``u -> z -> v``."""
    bits = family == "bernoulli"
    levels = [0.2, 1.3] if bits else [0.3, -1.0, 1.4]

    def law(logits: Tensor) -> Any:
        return dist.Bernoulli(logits=logits) if bits else dist.OneHotCategorical(logits=logits)

    def level(z: Tensor, values: Tensor) -> Tensor:
        if bits:
            return values[0] + z * (values[1] - values[0])
        return (z * values).sum(-1)

    def given(u: Tensor, base: Tensor, slope: Tensor) -> Tensor:
        return base + (u if bits else u.unsqueeze(-1)) * slope

    def model() -> None:
        w = pyro.param("w")
        with pyro.plate("n", 1):
            u = pyro.sample("u", dist.Normal(constant(0.2, w), 1.0))
            shape = 0.4 if bits else [0.5, -0.5, 0.2]
            z = pyro.sample("z", law(given(u, constant(shape, w), constant(0.3, w))))
            v = pyro.sample("v", dist.Normal(level(z, constant(levels, w)), 0.8))
            pyro.sample("x", dist.Normal(w * v.sin() + 0.4 * u, 0.6), obs=constant([0.9], w))

    def guide() -> None:
        with pyro.plate("n", 1):
            u = pyro.sample("u", dist.Normal(pyro.param("u_loc"), 0.7))
            z = pyro.sample("z", law(given(u, pyro.param("z_logits"), pyro.param("u_to_z"))))
            loc = pyro.param("v_loc") + level(z, constant(levels, u)) * pyro.param("z_to_v")
            pyro.sample("v", dist.Normal(loc, 0.5))

    params = {
        "w": torch.tensor([1.2]),
        "u_loc": torch.tensor([0.3]),
        "z_logits": torch.tensor([0.4]) if bits else torch.tensor([[0.3, -0.2, 0.1]]),
        "u_to_z": torch.tensor([0.8]) if bits else torch.tensor([[0.6, -0.9, 0.2]]),
        "v_loc": torch.tensor([0.1]),
        "z_to_v": torch.tensor([0.7]),
    }
    supports = {"z": bit_values((1,)) if bits else one_hot_values((1,), 3)}
    return Problem(model, guide, params, supports)


def quadrature_gradient(problem: Problem) -> tuple[float, Tensor]:
    """Integrate the Normal sites by Gauss-Hermite, sum the discrete one: (ELBO, loss gradient)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    noise = torch.tensor(nodes)
    weight = torch.tensor(weights / weights.sum())
    first, second = (x.reshape(-1, 1) for x in torch.meshgrid(noise, noise, indexing="ij"))
    weight = (weight[:, None] * weight).reshape(-1, 1)
    problem.reset(torch.float64)
    elbo = torch.zeros((), dtype=torch.float64)
    for z in problem.supports["z"]:
        shift = {"u": first, "v": second}
        held = {"z": z.double().expand(len(weight), *z.shape)}
        rows = pyro.plate("rows", len(weight), dim=-2)
        guide = rows(_shifted(poutine.condition(problem.guide, data=held), shift))
        guide_trace = poutine.trace(guide).get_trace()
        values = {name: guide_trace.nodes[name]["value"] for name in "uzv"}
        model = rows(poutine.condition(problem.model, data=values))
        model_trace = poutine.trace(model).get_trace()
        guide_trace.compute_log_prob()
        model_trace.compute_log_prob()
        log_q = {name: guide_trace.nodes[name]["log_prob"] for name in "uzv"}
        log_p = sum(model_trace.nodes[name]["log_prob"] for name in "uzvx")
        elbo = elbo + (weight * log_q["z"].exp() * (log_p - sum(log_q.values()))).sum()
    (-elbo).backward()
    return elbo.item(), problem.gradients()


def _shifted(program: Callable[..., Any], shift: dict[str, Tensor]) -> Callable[..., Any]:
    """Set each Normal site to its quadrature nodes, with gradient."""

    class Shift(poutine.messenger.Messenger):
        def _pyro_sample(self, msg: Any) -> None:
            if msg["name"] in shift:
                fn = msg["fn"]
                msg["value"] = fn.loc + fn.scale * shift[msg["name"]]

    return Shift()(program)


PROBLEMS: dict[str, tuple[Callable[[], Problem], int, dict[str, int]]] = {
    # the program, its plates, the event dimensions of its parameters
    "bits": (bit_layers, 1, {"w": 0, "y_logits": 1, "z_logits": 1, "y_to_z": 1}),
    "one_hot": (one_hot_chain, 1, {"w": 0, "y_logits": 1, "z_logits": 1, "y_to_z": 2}),
    "categorical": (
        functools.partial(one_hot_chain, as_index=True),
        1,
        {"w": 0, "y_logits": 1, "z_logits": 1, "y_to_z": 2},
    ),
    "nested": (nested_plates, 2, {"w": 0, "y_logits": 0, "z_logits": 1, "y_to_z": 1}),
    "normal_one_hot": (
        functools.partial(between_normals, "one_hot"),
        1,
        {"w": 0, "u_loc": 0, "z_logits": 1, "u_to_z": 1, "v_loc": 0, "z_to_v": 0},
    ),
    "normal_bernoulli": (
        functools.partial(between_normals, "bernoulli"),
        1,
        {"w": 0, "u_loc": 0, "z_logits": 0, "u_to_z": 0, "v_loc": 0, "z_to_v": 0},
    ),
}


@functools.cache
def exact(name: str) -> tuple[float, Tensor]:
    """The ELBO of a program and its loss's gradient."""
    make = PROBLEMS[name][0]
    return quadrature_gradient(make()) if name.startswith("normal") else exact_gradient(make())


def copies(name: str, number: int) -> Problem:
    """Independent copies of a program."""
    make, nesting, event_dims = PROBLEMS[name]
    return copy_program(make(), event_dims, number, nesting)


def copy_program(
    problem: Problem, event_dims: dict[str, int], number: int, nesting: int
) -> Problem:
    """Put a program into a plate, with a copy of the parameters for each element."""

    def wrap(program: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> None:
            with pyro.plate("copies", number, dim=-nesting - 1):
                program(*args)

        return wrapped

    params = {}
    for name, value in problem.params.items():
        batch = value.dim() - event_dims[name]
        full = (1,) * (nesting - batch) + tuple(value.shape)
        params[name] = value.reshape(full).expand(number, *full).clone()
    return Problem(wrap(problem.model), wrap(problem.guide), params, problem.supports)


def copy_gradients(
    problem: Problem,
    estimator: Any,
    *,
    num_particles: int = 1,
    vectorize: bool = True,
    dtype: torch.dtype = torch.float64,
    nesting: int = 2,
    **options: Any,
) -> Tensor:
    """Take one step; return each copy's gradient, ``(copies, parameters)``, float64."""
    problem.reset(dtype)
    elbo = Estimator_ELBO(
        num_particles=num_particles,
        vectorize_particles=vectorize,
        max_plate_nesting=nesting,
        **options,
    )
    elbo.loss_and_grads(problem.model, config_gradient(problem.guide, estimator))
    store = pyro.get_param_store()._params
    parts = []
    for name in problem.params:
        grad = store[name].grad
        grad = torch.zeros_like(store[name]) if grad is None else grad
        parts.append(grad.reshape(len(grad), -1))
    return torch.cat(parts, 1).double()
