"""Programs whose terms are scaled, masked and subsampled, and their path gradients by formula."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Normal

from pyro_gumbel.infer import config_gradient

__all__ = [
    "CASES",
    "X",
    "Case",
    "by_formula",
    "gradients",
    "mean_gradients",
    "paired_gap",
    "programs",
    "recorded_gradients",
]

PARAMS = {"m": 0.3, "log_s": -0.4, "a": -0.5, "log_t": 0.1, "b": 0.4}
FULL = 4  # elements of the inner plate
X = 0.9


@dataclass(frozen=True)
class Case:
    """Repetitions of a global variable ``w``, and an inner plate of ``z`` with data ``x``.

    Scales and masks are numbers or lists over the elements of the inner plate.
    """

    size: int | None = None  # of the inner plate's minibatch
    repeats_of: int = 1  # the outer plate's full size, in minibatches
    scale_w: float = 1.0
    scale_z: Any = 1.0
    scale_x: Any = 1.0
    mask_z: Any = True  # by a handler
    fn_mask: Any = True  # by the distribution
    event: bool = False  # the elements are joined by to_event
    bits: bool = False  # of discrete sites beside z

    @property
    def elements(self) -> int:
        return self.size or FULL

    def coefficient(self, scale: Any, *masks: Any) -> Tensor:
        """The factor of a log-density in the log weight, ``(elements,)``."""
        total = torch.full((self.elements,), FULL / self.elements) * torch.tensor(scale)
        for mask in masks:
            total = total * torch.tensor(mask)
        return total


CASES = {
    "plain": Case(),
    "subsampled": Case(size=2),
    "scaled": Case(scale_z=0.3),
    "enlarged": Case(scale_z=2.5),
    "different_scales": Case(scale_w=0.5, scale_z=1.7, scale_x=0.8),
    "weights": Case(scale_z=[0.5, 2.0, 1.0, 0.1], scale_x=[0.5, 2.0, 1.0, 0.1]),
    "masked": Case(mask_z=[True, False, True, False]),
    "masked_out": Case(mask_z=False),
    "masked_distribution": Case(fn_mask=[True, True, False, False]),
    "masks_and_scales": Case(
        size=3, scale_z=0.6, mask_z=[True, True, False], fn_mask=[True, False, True]
    ),
    "common_subsample": Case(repeats_of=3, scale_z=0.7),
    "both_subsamples": Case(repeats_of=3, size=2),
    "event": Case(event=True, scale_z=0.4),
    "masked_event": Case(event=True, fn_mask=[True, False, True, False], scale_z=1.6),
    "bits": Case(bits=True, size=2, scale_z=0.6),
}


def programs(case: Case, repeats: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """A model and its guide."""

    @contextlib.contextmanager
    def weighed(scale: Any, mask: Any = True) -> Iterator[None]:
        scale = torch.tensor(scale) if isinstance(scale, list) else scale
        with poutine.scale(scale=scale), poutine.mask(mask=torch.tensor(mask)):
            yield

    def outer() -> Any:
        full = repeats * case.repeats_of
        return pyro.plate("rep", full, subsample_size=repeats, dim=-1 if case.event else -2)

    def inner() -> Any:
        if case.event:
            return contextlib.nullcontext()
        return pyro.plate("data", FULL, subsample_size=case.size, dim=-1)

    def normal(loc: Any, scale: Any) -> Any:
        """A distribution of the inner elements."""
        loc = torch.as_tensor(loc)
        fn = dist.Normal((loc.unsqueeze(-1) if case.event else loc) * torch.ones(()), scale)
        fn = fn.expand(torch.broadcast_shapes(fn.batch_shape, (case.elements,)))
        fn = fn.mask(torch.tensor(case.fn_mask))
        return fn.to_event(1) if case.event else fn

    def model() -> None:
        with outer():
            with weighed(case.scale_w):
                w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with inner():
                with weighed(case.scale_z, case.mask_z):
                    z = pyro.sample("z", normal(w, 1.2))
                d = pyro.sample("d", dist.Bernoulli(0.3)) if case.bits else 0.0
                with weighed(case.scale_x):
                    fn = dist.Normal(z + d, 0.7)
                    x = torch.full_like(z, X)
                    pyro.sample("x", fn.to_event(1) if case.event else fn, obs=x)

    def guide() -> None:
        p = {name: pyro.param(name, torch.tensor(value)) for name, value in PARAMS.items()}
        with outer():
            with weighed(case.scale_w):
                pyro.sample("w", dist.Normal(p["m"], p["log_s"].exp()))
            with inner():
                with weighed(case.scale_z, case.mask_z):
                    pyro.sample("z", normal(p["a"], p["log_t"].exp()))
                if case.bits:
                    pyro.sample("d", dist.Bernoulli(logits=p["b"]))

    return model, guide


def gradients(loss: Any, model: Any, guide: Any) -> Tensor:
    """The gradients of one step in the parameters; zeros where there are none."""
    loss.loss_and_grads(model, guide)
    found = []
    for param in pyro.get_param_store()._params.values():
        found.append(torch.zeros_like(param) if param.grad is None else param.grad.clone())
        param.grad = None
    return torch.cat([grad.flatten() for grad in found])


def recorded_gradients(
    loss: Any, config: Any, case: Case, repeats: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of one step, and its draws ``w (K, n)`` and ``z (K, n, elements)``."""
    model, guide = programs(case, repeats)
    drawn: dict[str, list[Tensor]] = {"w": [], "z": []}

    def recorded() -> None:
        traced = poutine.trace(model)
        traced()
        for site, values in drawn.items():
            values.append(traced.trace.nodes[site]["value"].detach())

    guide = config_gradient(guide, config)
    gradients(loss, recorded, guide)  # whatever is found out about the programs is known now
    drawn["w"].clear()
    drawn["z"].clear()
    found = gradients(loss, recorded, guide)
    shape = (loss.num_particles, repeats)
    w, z = (torch.stack(values) for values in drawn.values())
    return found, w.reshape(shape), z.reshape(*shape, case.elements)


def mean_gradients(
    loss: Any, model: Any, guide: Any, repeats: int, batches: int = 24
) -> tuple[Tensor, Tensor]:
    """The mean gradient of a repetition, by batches of them, and its standard error."""
    draws = torch.stack([gradients(loss, model, guide) for _ in range(batches)]) / repeats
    return draws.mean(0), draws.std(0) / math.sqrt(batches)


def paired_gap(losses: list[Any], model: Any, guides: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Two mean gradients' difference at the same seeds, its error, and the first's mean."""
    repeats, batches = 500, 24
    plate = pyro.plate("repeats", repeats, dim=-1)
    draws = []
    for loss, guide in zip(losses, guides, strict=True):
        found = []
        for seed in range(batches):
            pyro.set_rng_seed(seed)
            found.append(gradients(loss, plate(model), plate(guide)) / repeats)
        draws.append(torch.stack(found))
    gap = draws[1] - draws[0]
    return gap.mean(0), gap.std(0) / math.sqrt(batches), draws[0].mean(0)


def by_formula(case: Case, w: Tensor, z: Tensor, weigh: Callable[[Tensor, Any], Tensor]) -> Tensor:
    """The gradient that passes through given draws alone.

    Args:
        case: Of the programs.
        w: Draws ``(K, n)``.
        z: Draws ``(K, n, elements)``.
        weigh: Gives the weight of a path from all log weights, particles first, and from the
            coefficient of its ``log q`` in them.
    """
    p = {name: torch.tensor(value, requires_grad=True) for name, value in PARAMS.items()}
    q_w = Normal(p["m"].detach(), p["log_s"].detach().exp())
    q_z = Normal(p["a"].detach(), p["log_t"].detach().exp())
    w, z = w.requires_grad_(), z.requires_grad_()
    c_w, c_x = case.scale_w, case.coefficient(case.scale_x)
    c_z = case.coefficient(case.scale_z, case.mask_z, case.fn_mask)
    log_w = c_w * (Normal(0.0, 1.0).log_prob(w) - q_w.log_prob(w))
    ratios = Normal(w.unsqueeze(-1), 1.2).log_prob(z) - q_z.log_prob(z)
    likelihoods = Normal(z, 0.7).log_prob(torch.tensor(X))
    log_w = log_w + (c_z * ratios + c_x * likelihoods).sum(-1)
    slope_w, slope_z = torch.autograd.grad(log_w.sum(), (w, z))
    at_w, at_z = weigh(log_w.detach(), c_w), weigh(log_w.detach().unsqueeze(-1), c_z)
    # The values as functions of the parameters, at the noise that they were drawn by.
    path_w = p["m"] + p["log_s"].exp() * ((w - q_w.loc) / q_w.scale).detach()
    path_z = p["a"] + p["log_t"].exp() * ((z - q_z.loc) / q_z.scale).detach()
    bound = case.repeats_of * ((at_w * slope_w * path_w).sum() + (at_z * slope_z * path_z).sum())
    (-bound).backward()
    return torch.stack([torch.zeros(()) if v.grad is None else v.grad for v in p.values()])
