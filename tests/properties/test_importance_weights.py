"""Importance weights at their edges: impossible values, particles of different structure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_gumbel.estimators import Score
from pyro_gumbel.infer import ImportanceWeighted_ELBO, config_gradient


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def gradients(loss: Any, model: Any, guide: Any) -> Tensor:
    loss.loss_and_grads(model, guide)
    found = []
    for param in pyro.get_param_store()._params.values():
        found.append(torch.zeros_like(param) if param.grad is None else param.grad.clone())
        param.grad = None
    return torch.cat([grad.flatten() for grad in found])


LOGITS = torch.tensor([0.4, -0.3, 0.9], dtype=torch.float64)
SCORES = torch.tensor([-math.inf, -1.2, 0.7], dtype=torch.float64)  # the first is impossible


def forbidding(n: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """A categorical site whose first state the model forbids, in a plate of data."""

    def model() -> None:
        with pyro.plate("n", n):
            z = pyro.sample("z", dist.Categorical(torch.ones(3)))
            pyro.factor("f", SCORES[z])

    def guide() -> None:
        logits = pyro.param("logits", LOGITS.clone())
        with pyro.plate("n", n):
            pyro.sample("z", dist.Categorical(logits=logits))

    return model, guide


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
def test_impossible_states_leave_the_gradient_finite(vectorize: bool) -> None:
    model, guide = forbidding(200)  # three of them in one datum, too
    loss = ImportanceWeighted_ELBO(
        3, vectorize_particles=vectorize, max_plate_nesting=1, default=Score()
    )
    found = gradients(loss, model, guide)
    assert found.isfinite().all()
    assert found[0] > 0  # a step leads away from what is impossible
    assert loss.loss(model, guide) == math.inf


def vimco_by_formula(z: Tensor) -> Tensor:
    """The gradient at states ``z (K, n)``; a particle's stand-in is of the possible others."""
    logits = LOGITS.clone().requires_grad_()
    log_q = logits.log_softmax(-1)[z]
    log_w = SCORES[z] - math.log(3) - log_q
    surrogate = torch.zeros(())
    for column, scores in zip(log_w.T, log_q.T, strict=True):
        possible = [w for w in column if w > -math.inf]
        if possible:
            surrogate = surrogate + torch.stack(possible).logsumexp(0)
        for k, score in enumerate(scores):
            others = [w.item() for j, w in enumerate(column) if j != k and w > -math.inf]
            if others:
                stand_in = sum(others) / len(others)
                without = torch.tensor([*others, stand_in]).logsumexp(0)
                signal = torch.stack(possible).logsumexp(0).detach() - without
                surrogate = surrogate + signal * score
    (grad,) = torch.autograd.grad(-surrogate, logits)
    return grad


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
def test_vimco_leaves_impossible_states_out_of_its_baseline(vectorize: bool) -> None:
    model, guide = forbidding(40)
    drawn: list[Tensor] = []

    def recorded() -> None:
        traced = poutine.trace(model)
        traced()
        drawn.append(traced.trace.nodes["z"]["value"])

    loss = ImportanceWeighted_ELBO(
        3, vectorize_particles=vectorize, max_plate_nesting=1, default=Score()
    )
    gradients(loss, recorded, guide)  # whatever is found out about the programs is known now
    drawn.clear()
    found = gradients(loss, recorded, guide)
    z = torch.stack(drawn).reshape(3, 40)
    torch.testing.assert_close(found, vimco_by_formula(z), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("doubly", [False, True], ids=["plain", "doubly"])
@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
def test_impossible_values_leave_the_path_finite(vectorize: bool, doubly: bool) -> None:
    def model() -> None:
        with pyro.plate("n", 100):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("f", torch.where(z < 0, -math.inf, -z))

    def guide() -> None:
        loc = pyro.param("loc", torch.tensor(0.1))
        with pyro.plate("n", 100):
            pyro.sample("z", dist.Normal(loc, pyro.param("scale", torch.tensor(0.8))))

    loss = ImportanceWeighted_ELBO(
        2, doubly_reparameterized=doubly, vectorize_particles=vectorize, max_plate_nesting=1
    )
    found = gradients(loss, model, guide)
    assert found.isfinite().all()
    assert (found != 0).all()


def growing_model() -> None:
    """A second bit, a plate of more bits, or neither, as the first draws decide."""
    b = pyro.sample("b", dist.Bernoulli(0.3))
    mean = b - 0.5
    if b > 0:
        c = pyro.sample("c", dist.Bernoulli(0.6))
        mean = mean + 2 * c
        if c > 0:
            with pyro.plate("inner", 2):
                mean = mean + pyro.sample("d", dist.Bernoulli(0.7)).sum()
    pyro.sample("x", dist.Normal(mean, 0.8), obs=torch.tensor(3.2))


def growing_guide() -> None:
    logits = pyro.param("logits", torch.tensor([0.2, -0.4, 0.5]))
    b = pyro.sample("b", dist.Bernoulli(logits=logits[0]))
    if b > 0:
        c = pyro.sample("c", dist.Bernoulli(logits=logits[1]))
        if c > 0:
            with pyro.plate("inner", 2):
                pyro.sample("d", dist.Bernoulli(logits=logits[2]))


def growing_exact(num_particles: int) -> Tensor:
    """The bound's gradient by a sum over all tuples of states."""
    logits = torch.tensor([0.2, -0.4, 0.5], requires_grad=True)
    q, p = dist.Bernoulli(logits=logits), dist.Bernoulli(torch.tensor([0.3, 0.6, 0.7]))
    log_q, log_w = [], []
    for bits in [(0,), (1, 0), *((1, 1, *d) for d in itertools.product((0, 1), repeat=2))]:
        terms = torch.tensor([0, 1, 2, 2][: len(bits)])
        values = torch.tensor(bits, dtype=torch.float64)
        q_bits, p_bits = (
            torch.stack([law.log_prob(value)[i] for i, value in zip(terms, values, strict=True)])
            for law in (q, p)
        )
        mean = values @ torch.tensor([1.0, 2.0, 1.0, 1.0])[: len(bits)] - 0.5
        likelihood = dist.Normal(mean, 0.8).log_prob(torch.tensor(3.2))
        log_q.append(q_bits.sum())
        log_w.append(p_bits.sum() + likelihood - q_bits.sum())
    chances, weights = torch.stack(log_q), torch.stack(log_w)
    bound = torch.zeros(())
    for states in itertools.product(range(len(log_q)), repeat=num_particles):
        mean_weight = weights[list(states)].logsumexp(0) - math.log(num_particles)
        bound = bound + chances[list(states)].sum().exp() * mean_weight
    (grad,) = torch.autograd.grad(-bound, logits)
    return grad


@pytest.mark.slow
@pytest.mark.parametrize("num_particles", [2, 3])
def test_particles_of_different_structure(num_particles: int) -> None:
    """A site that some particles lack has the signals of those that have it."""
    exact = growing_exact(num_particles)
    loss = ImportanceWeighted_ELBO(num_particles, max_plate_nesting=1)
    guide = config_gradient(growing_guide, Score())
    draws = torch.stack([gradients(loss, growing_model, guide) for _ in range(1500)])
    error = draws.std(0) / math.sqrt(len(draws))
    assert error.norm() < 0.1 * exact.norm()
    assert ((draws.mean(0) - exact) / error).abs().max() < 5


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
def test_a_guide_in_single_precision_meets_data_in_double(vectorize: bool) -> None:
    def model() -> None:
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float32), 1.0))
            pyro.sample("x", dist.Normal(z.double(), 1.0), obs=torch.ones(3))

    def guide() -> None:
        loc = pyro.param("loc", torch.tensor(0.2, dtype=torch.float32))
        with pyro.plate("n", 3):
            pyro.sample("z", dist.Normal(loc, 0.9))

    loss = ImportanceWeighted_ELBO(
        2, doubly_reparameterized=True, vectorize_particles=vectorize, max_plate_nesting=1
    )
    found = gradients(loss, model, guide)
    assert found.dtype == torch.float32
    assert found.isfinite().all()


def bits_exact(scale: float, mask: bool) -> Tensor:
    """The gradient of two particles' bound of a datum in its bit's logit."""
    logit = torch.tensor(0.4, requires_grad=True)
    bits = torch.tensor([0.0, 1.0])
    log_q = dist.Bernoulli(logits=logit).log_prob(bits)
    ratio = dist.Bernoulli(torch.tensor(0.3)).log_prob(bits) - log_q
    log_w = scale * mask * ratio + dist.Normal(2 * bits, 0.7).log_prob(torch.tensor(1.1))
    bounds = torch.logaddexp(log_w, log_w.unsqueeze(-1)) - math.log(2)
    (grad,) = torch.autograd.grad(-(log_q.exp() @ bounds @ log_q.exp()), logit)
    return grad


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
@pytest.mark.parametrize("subsampled", [False, True], ids=["whole", "subsampled"])
@pytest.mark.parametrize(
    ("scale", "mask"), [(1.0, True), (0.3, True), (2.0, True), (1.0, False)], ids=str
)
def test_vimco_of_scaled_and_masked_bits(
    scale: float, mask: bool, subsampled: bool, vectorize: bool
) -> None:
    n, full = 2000, 6000 if subsampled else 2000

    def model() -> None:
        with pyro.plate("n", full, subsample_size=n):
            with poutine.scale(scale=scale), poutine.mask(mask=mask):
                b = pyro.sample("b", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(2 * b, 0.7), obs=torch.full((n,), 1.1))

    def guide() -> None:
        logit = pyro.param("logit", torch.tensor(0.4))
        plate = pyro.plate("n", full, subsample_size=n)
        with plate, poutine.scale(scale=scale), poutine.mask(mask=mask):
            pyro.sample("b", dist.Bernoulli(logits=logit))

    loss = ImportanceWeighted_ELBO(2, vectorize_particles=vectorize, max_plate_nesting=1)
    draws = torch.cat([gradients(loss, model, guide) for _ in range(40)]) / full
    error = draws.std() / math.sqrt(len(draws))
    exact = bits_exact(scale, mask)
    assert error < 0.05 * exact.abs()
    assert abs(draws.mean() - exact) < 5 * error


@pytest.mark.parametrize("vectorize", [False, True])
def test_the_loss_draws_sites_that_a_guide_enumerates(vectorize: bool) -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(2 * z, 1.0), obs=torch.tensor(1.2))

    def guide(infer: dict[str, str]) -> None:
        pyro.sample("z", dist.Bernoulli(0.4), infer=infer)

    losses = []
    for infer in ({}, {"enumerate": "parallel"}):
        pyro.set_rng_seed(0)
        bound = ImportanceWeighted_ELBO(3, vectorize_particles=vectorize)
        losses.append(bound.loss(lambda infer: model(), guide, infer))
    assert losses[0] == losses[1]
