"""The importance-weighted bound against enumeration over all tuples of states, and quadrature."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_gumbel.estimators import (
    DisARM,
    Estimator,
    GumbelSoftmax,
    LeaveOneOut,
    ReinMax,
    Score,
)
from pyro_gumbel.infer import Estimator_ELBO, ImportanceWeighted_ELBO, config_gradient

DATA = torch.tensor([0.7, -1.3], dtype=torch.float64)
PARAMS = {
    "phi": torch.tensor([0.4, -0.9], dtype=torch.float64),
    "psi": torch.tensor([[0.5, -0.2, 0.1], [-0.6, 0.3, 0.8]], dtype=torch.float64),
    "theta": torch.tensor([0.6, -0.4, 1.1], dtype=torch.float64),
}


def model(data: Tensor) -> None:
    theta = pyro.param("theta")
    with pyro.plate("data", len(data), dim=-1):
        b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.3, dtype=theta.dtype)))
        prior = torch.tensor([0.2, 0.5, 0.3], dtype=theta.dtype)
        z = pyro.sample("z", dist.OneHotCategorical(probs=prior))
        pyro.sample("x", dist.Normal((z * theta).sum(-1) * (1 + b) ** 2, 0.8), obs=data)


def guide(data: Tensor) -> None:
    phi, psi = pyro.param("phi"), pyro.param("psi")
    with pyro.plate("data", len(data), dim=-1):
        b = pyro.sample("b", dist.Bernoulli(logits=phi[: len(data)]))
        pyro.sample("z", dist.OneHotCategorical(logits=psi[: len(data)] + b.unsqueeze(-1)))


def reset(dtype: torch.dtype = torch.float64) -> None:
    pyro.clear_param_store()
    for name, value in PARAMS.items():
        pyro.param(name, value.to(dtype).clone())


def gradients() -> Tensor:
    store = pyro.get_param_store()
    parts = []
    for name in PARAMS:
        param = store._params[name]
        parts.append(torch.zeros_like(param) if param.grad is None else param.grad.clone())
        param.grad = None
    return torch.cat([part.flatten() for part in parts]).double()


def states(datum: int) -> tuple[Tensor, Tensor]:
    """Log q and log w of the six states of one datum, from the formulas."""
    phi, psi, theta = (pyro.param(name) for name in PARAMS)
    prior = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    log_q, log_w = [], []
    for b, z in itertools.product((0.0, 1.0), torch.eye(3, dtype=torch.float64)):
        bit = torch.tensor(b, dtype=torch.float64)
        q = dist.Bernoulli(logits=phi[datum]).log_prob(bit)
        q = q + (z * (psi[datum] + bit).log_softmax(-1)).sum()
        p = dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64)).log_prob(bit)
        p = p + (z * prior.log()).sum()
        p = p + dist.Normal((z * theta).sum() * (1 + bit) ** 2, 0.8).log_prob(DATA[datum])
        log_q.append(q)
        log_w.append(p - q)
    return torch.stack(log_q), torch.stack(log_w)


@functools.cache
def exact(num_particles: int) -> tuple[float, Tensor]:
    """Sum over the counts of states among the particles; the bound and minus its gradient."""
    reset()
    bound = torch.zeros((), dtype=torch.float64)
    for datum in range(len(DATA)):
        log_q, log_w = states(datum)
        multinomial = dist.Multinomial(num_particles, logits=log_q)
        for drawn in itertools.combinations_with_replacement(range(6), num_particles):
            counts = torch.bincount(torch.tensor(drawn), minlength=6).double()
            mean = (log_w + counts.log()).logsumexp(0) - np.log(num_particles)
            bound = bound + multinomial.log_prob(counts).exp() * mean
    (-bound).backward()
    return bound.item(), gradients()


def exact_by_tuples(num_particles: int) -> tuple[float, Tensor]:
    """The same, tuple by tuple."""
    reset()
    bound = torch.zeros((), dtype=torch.float64)
    for datum in range(len(DATA)):
        log_q, log_w = states(datum)
        for drawn in itertools.product(range(6), repeat=num_particles):
            mean = log_w[list(drawn)].logsumexp(0) - np.log(num_particles)
            bound = bound + log_q[list(drawn)].sum().exp() * mean
    (-bound).backward()
    return bound.item(), gradients()


def draw(estimator: Estimator, elbo: ImportanceWeighted_ELBO) -> tuple[Tensor, Tensor]:
    configured = config_gradient(guide, estimator)
    grads, losses = [], []
    for _ in range(NUM_DRAWS):
        losses.append(float(elbo.loss_and_grads(many(model), many(configured), DATA)))
        grads.append(gradients())
    return torch.stack(grads), torch.tensor(losses)


NUM_DRAWS, REPEATS = 40, 1000


def many(program: Callable[..., None]) -> Callable[..., None]:
    """Independent repeats of a program in one call, as rows of a plate that every site is in."""
    return pyro.plate("repeats", REPEATS, dim=-2)(program)


def assert_unbiased(
    grads: Tensor, losses: Tensor, value: float, gradient: Tensor, precision: float = 0.02
) -> None:
    grads, losses = grads / REPEATS, losses / REPEATS
    error = grads.std(0) / len(grads) ** 0.5
    assert error.norm() < precision * gradient.norm()
    assert ((grads.mean(0) - gradient) / error).abs().max() < 5
    assert abs(losses.mean() + value) < 5 * losses.std() / len(losses) ** 0.5


def test_oracles_agree() -> None:
    one, other = exact(2), exact_by_tuples(2)
    assert one[0] == pytest.approx(other[0], rel=1e-12)
    torch.testing.assert_close(one[1], other[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("num_particles", [2, 5])
def test_vimco_is_unbiased(num_particles: int, dtype: torch.dtype, vectorize: bool) -> None:
    value, gradient = exact(num_particles)
    reset(dtype)
    elbo = ImportanceWeighted_ELBO(
        num_particles, vectorize_particles=vectorize, max_plate_nesting=2
    )
    assert_unbiased(*draw(Score(), elbo), value, gradient)


class NoReplacement(ImportanceWeighted_ELBO):
    """A planted error: log q enters the weights without its gradient."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.full_scores = False


def test_a_dropped_score_term_is_seen() -> None:
    value, gradient = exact(2)
    reset()
    elbo = NoReplacement(2, vectorize_particles=True, max_plate_nesting=2)
    drawn = draw(Score(), elbo)
    with pytest.raises(AssertionError):
        assert_unbiased(*drawn, value, gradient)


def test_pyro_s_discrete_example_has_its_exact_gradient() -> None:
    """One bit, two particles: the exact gradient is -0.322, where RenyiELBO gives zero."""

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(2 * z - 1, 1.0), obs=torch.tensor(1.3))

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.3))))

    elbo = ImportanceWeighted_ELBO(2, vectorize_particles=True, max_plate_nesting=1)
    grads = []
    for _ in range(NUM_DRAWS):
        elbo.loss_and_grads(many_bits(model), many_bits(guide))
        param = pyro.get_param_store()._params["l"]
        grads.append(param.grad.item() / REPEATS)
        param.grad = None
    draws = torch.tensor(grads)
    error = (draws.std() / len(draws) ** 0.5).item()
    assert error < 0.005
    assert abs(draws.mean().item() + 0.322) < 5 * error + 0.0005  # published to three digits


def many_bits(program: Callable[..., None]) -> Callable[..., None]:
    return pyro.plate("repeats", REPEATS, dim=-1)(program)


MIXED = {
    "phi": torch.tensor(0.4, dtype=torch.float64),
    "loc": torch.tensor([0.3, -0.5], dtype=torch.float64),
    "log_scale": torch.tensor([-0.2, 0.1], dtype=torch.float64),
    "theta": torch.tensor(0.7, dtype=torch.float64),
}


def mixed_model() -> None:
    theta = pyro.param("theta")
    b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.3, dtype=theta.dtype)))
    y = pyro.sample("y", dist.Normal(b - 0.5, 1.2))
    pyro.sample("x", dist.Normal(theta * y + b, 0.7), obs=torch.tensor(0.9, dtype=theta.dtype))


def mixed_guide() -> None:
    loc, scale = pyro.param("loc"), pyro.param("log_scale").exp()
    b = pyro.sample("b", dist.Bernoulli(logits=pyro.param("phi")))
    where = b * loc[1] + (1 - b) * loc[0]
    spread = b * scale[1] + (1 - b) * scale[0]
    pyro.sample("y", dist.Normal(where, spread))


@functools.cache
def mixed_exact(num_particles: int, num_nodes: int) -> tuple[float, Tensor]:
    """Sums over bits and Gauss-Hermite nodes: a particle is in one of ``2 * num_nodes`` states.

    As particles are exchangeable, tuples with the same counts of states are summed once.
    """
    nodes, masses = np.polynomial.hermite_e.hermegauss(num_nodes)
    noise, log_masses = torch.as_tensor(nodes), torch.as_tensor(masses / masses.sum()).log()
    params = {name: value.clone().requires_grad_() for name, value in MIXED.items()}
    scales = params["log_scale"].exp()
    log_chance, log_w = [], []
    for bit in (0, 1):
        b = torch.tensor(float(bit), dtype=torch.float64)
        y = params["loc"][bit] + scales[bit] * noise
        q_bit = dist.Bernoulli(logits=params["phi"]).log_prob(b)
        q = q_bit + dist.Normal(params["loc"][bit], scales[bit]).log_prob(y)
        p = dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64)).log_prob(b)
        p = p + dist.Normal(b - 0.5, 1.2).log_prob(y)
        p = p + dist.Normal(params["theta"] * y + b, 0.7).log_prob(
            torch.tensor(0.9, dtype=torch.float64)
        )
        log_chance.append(q_bit + log_masses)
        log_w.append(p - q)
    chances, weights = torch.cat(log_chance), torch.cat(log_w)
    drawn = torch.combinations(torch.arange(2 * num_nodes), num_particles, with_replacement=True)
    counts = torch.zeros(len(drawn), 2 * num_nodes, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    orders = math.lgamma(num_particles + 1) - torch.lgamma(counts + 1).sum(-1)
    chance = (orders + chances[drawn].sum(-1)).exp()
    bound = (chance * (weights[drawn].logsumexp(-1) - math.log(num_particles))).sum()
    grads = torch.autograd.grad(-bound, list(params.values()))
    return bound.item(), torch.cat([grad.flatten() for grad in grads])


MIXED_NODES = {2: 60, 5: 12}


def test_quadrature_has_converged() -> None:
    coarse, fine = mixed_exact(5, 10), mixed_exact(5, MIXED_NODES[5])
    assert coarse[0] == pytest.approx(fine[0], abs=1e-3)
    assert (coarse[1] - fine[1]).norm() < 2e-3 * fine[1].norm()


@pytest.mark.parametrize("num_particles", [2, 5])
@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
@pytest.mark.parametrize("doubly", [False, True], ids=["plain", "doubly"])
def test_mixed_sites_are_unbiased(doubly: bool, vectorize: bool, num_particles: int) -> None:
    value, gradient = mixed_exact(num_particles, MIXED_NODES[num_particles])
    pyro.clear_param_store()
    for name, start in MIXED.items():
        pyro.param(name, start.clone())
    elbo = ImportanceWeighted_ELBO(
        num_particles,
        doubly_reparameterized=doubly,
        vectorize_particles=vectorize,
        max_plate_nesting=1,
    )
    grads, losses = [], []
    for _ in range(NUM_DRAWS):
        losses.append(float(elbo.loss_and_grads(many_bits(mixed_model), many_bits(mixed_guide))))
        params = [pyro.get_param_store()._params[name] for name in MIXED]
        grads.append(torch.cat([param.grad.flatten() for param in params]))
        for param in params:
            param.grad = None
    assert_unbiased(torch.stack(grads), torch.tensor(losses), value, gradient)


def test_one_particle_is_the_elbo() -> None:
    def guide() -> None:
        loc = pyro.param("loc", torch.tensor(0.3))
        pyro.sample("z", dist.Normal(loc, 0.5))

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.8))

    results = []
    for elbo in (ImportanceWeighted_ELBO(1), Estimator_ELBO()):
        pyro.set_rng_seed(3)
        loss = float(elbo.loss_and_grads(model, guide))
        param = pyro.get_param_store()._params["loc"]
        results.append((loss, param.grad.item()))
        param.grad = None
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_the_bound_of_each_datum_is_scaled_outside_the_logarithm() -> None:
    """Subsampling half of the data doubles the bound of each, not the weights inside it."""
    data = torch.tensor([0.7, 0.7, 0.7, 0.7])

    def model(size: int) -> None:
        with pyro.plate("data", 4, subsample_size=size) as index:
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z, 0.5), obs=data[index])

    def guide(size: int) -> None:
        with pyro.plate("data", 4, subsample_size=size):
            pyro.sample("z", dist.Bernoulli(0.6))

    elbo = ImportanceWeighted_ELBO(3, vectorize_particles=True)
    whole = torch.tensor([elbo.loss(model, guide, 4) for _ in range(400)])
    part = torch.tensor([elbo.loss(model, guide, 2) for _ in range(800)])
    error = (whole.var() / len(whole) + part.var() / len(part)).sqrt()
    assert abs(whole.mean() - part.mean()) < 5 * error
    assert error < 0.02 * whole.mean().abs()


@pytest.mark.parametrize(
    ("estimator", "num_particles", "match"),
    [
        (Score(LeaveOneOut()), 2, "'b'.*uses its own baseline"),
        (Score(), 1, "'b'.*num_particles >= 2.*ImportanceWeighted_ELBO\\(2\\)"),
        (DisARM(), 2, "'b'.*DisARM.*no importance-weighted form.*Score"),
        (GumbelSoftmax(0.5), 2, "'b'.*GumbelSoftmax.*no importance-weighted form"),
    ],
)
def test_estimators_without_an_importance_weighted_form_are_refused(
    estimator: Estimator, num_particles: int, match: str
) -> None:
    reset()
    elbo = ImportanceWeighted_ELBO(num_particles, default=ReinMax())
    with pytest.raises(ValueError, match=match):
        elbo.loss_and_grads(model, config_gradient(guide, {"b": estimator}), DATA)


def test_no_closed_form_of_the_divergence() -> None:
    with pytest.raises(
        TypeError, match=r"does not support analytic_kl.*Estimator_ELBO\(analytic_kl=True"
    ):
        ImportanceWeighted_ELBO(2, analytic_kl=True)


def test_a_site_outside_the_plate_of_other_terms() -> None:
    """The weights have a dimension for the plate, and the site's score has none.

    Two particles of one Bernoulli have four outcomes. The gradient is a function of the outcome,
    so its mean is a sum.
    """
    x = torch.tensor([0.4, 1.9], dtype=torch.float64)
    start = torch.tensor(0.2, dtype=torch.float64)
    drawn = []

    def outer() -> None:
        g = pyro.sample("g", dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64)))
        with pyro.plate("n", 2):
            pyro.sample("x", dist.Normal(2 * g, 1.0), obs=x)

    def outer_guide() -> None:
        logit = pyro.param("logit", start.clone())
        drawn.append(pyro.sample("g", dist.Bernoulli(logits=logit)))

    def step(vectorize: bool) -> float:
        pyro.clear_param_store()
        elbo = ImportanceWeighted_ELBO(2, vectorize_particles=vectorize, max_plate_nesting=1)
        elbo.loss_and_grads(outer, outer_guide)
        return dict(pyro.get_param_store().named_parameters())["logit"].grad.item()

    logit = start.clone().requires_grad_()
    bits = torch.tensor([0.0, 1.0], dtype=torch.float64)
    log_q = dist.Bernoulli(logits=logit).log_prob(bits)
    log_w = dist.Bernoulli(0.3).log_prob(bits).double() - log_q
    log_w = log_w + dist.Normal(2 * bits[:, None], 1.0).log_prob(x).sum(-1)
    pairs = torch.logaddexp(log_w[:, None], log_w) - math.log(2)
    chances = (log_q[:, None] + log_q).exp()
    (expected,) = torch.autograd.grad(-(chances * pairs).sum(), logit)

    found = {}
    for _ in range(60):
        gradient = step(False)
        found[tuple(int(bit) for bit in drawn[-2:])] = gradient
    assert len(found) == 4
    mean = sum(chances[outcome].item() * gradient for outcome, gradient in found.items())
    assert mean == pytest.approx(expected.item(), rel=1e-6)
    pyro.set_rng_seed(1)
    one = step(False)
    pyro.set_rng_seed(1)
    assert one == pytest.approx(step(True), rel=1e-9)
