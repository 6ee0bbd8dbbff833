"""A branch of a coupled site draws later sites from the right distributions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_gumbel.estimators import ARMS, DisARM
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

LOW, HIGH = 0.05, 3.0

# Families whose samplers use a number of random numbers that depends on the parameters.
FAMILIES: dict[str, Callable[[Tensor], dist.Distribution]] = {
    "poisson": lambda rate: dist.Poisson(rate),
    "gamma": lambda rate: dist.Gamma(rate + 0.1, 2.0),
    "beta": lambda rate: dist.Beta(rate + 0.1, 1.5),
    "dirichlet": lambda rate: dist.Dirichlet(torch.stack([rate + 0.2, rate / 2 + 0.5], -1)),
    "binomial": lambda rate: dist.Binomial(5, rate / 4),
    "von_mises": lambda rate: dist.VonMises(rate - 1, rate + 0.5),
    "normal": lambda rate: dist.Normal(rate, 1.0),
    "bernoulli": lambda rate: dist.Bernoulli(rate / 4),
    "masked": lambda rate: dist.Poisson(rate).mask(False),
    "transformed": lambda rate: dist.LogNormal(rate, 0.4),
    "mixture": lambda rate: dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7]).expand(*rate.shape, 2)),
        dist.Gamma(torch.stack([rate + 0.1, rate + 1.0], -1), 2.0),
    ),
}


def recording(family: str, shape: tuple[int, ...], seen: list[tuple[Tensor, ...]]):
    """A guide of a bit, a site of the family and a Normal; the model keeps what it is given."""

    def numbers(value: Tensor) -> Tensor:
        return value[..., 0] if family == "dirichlet" else value

    def site(bit: Tensor) -> dist.Distribution:
        return FAMILIES[family](torch.where(bit > 0, HIGH, LOW))

    def guide() -> None:
        with pyro.plate("n", shape[-1]):
            bit = pyro.sample("bit", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.2))))
            pyro.sample("middle", site(bit))
            pyro.sample("last", dist.Normal(bit, 1.0))

    def model() -> None:
        with pyro.plate("n", shape[-1]):
            bit = pyro.sample("bit", dist.Bernoulli(0.4))
            middle = pyro.sample("middle", site(bit))
            last = pyro.sample("last", dist.Normal(0.0, 1.0))
        seen.append(tuple(t.detach().flatten() for t in (bit, numbers(middle), last)))

    return model, guide


def reference(family: str, rate: float) -> tuple[float, float]:
    """Mean and variance of the family's number, by torch's own sampler."""
    draws = FAMILIES[family](torch.full((400_000,), rate, dtype=torch.float64)).sample()
    draws = draws[..., 0] if family == "dirichlet" else draws
    return draws.mean().item(), draws.var().item()


def check_moments(family: str, seen: list[tuple[Tensor, ...]]) -> None:
    """Means, variances and covariances given the bit, by z-score."""
    bit, middle, last = (torch.cat(tensors).double() for tensors in zip(*seen, strict=True))
    for value, rate in ((0.0, LOW), (1.0, HIGH)):
        mean, variance = reference(family, rate)
        chosen = bit == value
        x, y = middle[chosen] - mean, last[chosen] - value
        count = len(x)
        assert count > 500
        means = [x.mean() * math.sqrt(count / variance), y.mean() * math.sqrt(count)]
        spread = (x**2 - variance).mean() / (x**2).std() * math.sqrt(count)
        together = (x * y).mean() / math.sqrt(variance) * math.sqrt(count)
        assert max(abs(float(z)) for z in (*means, spread, together)) < 5


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_means_and_covariances_of_large_plates(family: str, vectorize: bool) -> None:
    seen: list[tuple[Tensor, ...]] = []
    model, guide = recording(family, (20_000,), seen)
    config = config_gradient(guide, {"bit": DisARM(), "middle": "score", "last": "score"})
    elbo = Estimator_ELBO(vectorize_particles=vectorize)
    elbo.loss_and_grads(model, config)
    draws = seen[1:] if vectorize else seen  # the first are the preflight's
    assert sum(bits.numel() for bits, _, _ in draws) == 40_000
    check_moments(family, draws)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["poisson", "gamma", "beta", "dirichlet", "von_mises"])
def test_means_and_covariances_of_single_values(family: str) -> None:
    # One value a run: numbers that two sites share would show as a covariance.
    seen: list[tuple[Tensor, ...]] = []
    model, guide = recording(family, (1,), seen)
    config = config_gradient(guide, {"bit": ARMS(6), "middle": "score", "last": "score"})
    elbo = Estimator_ELBO()
    for _ in range(1_000):
        elbo.loss_and_grads(model, config)
    check_moments(family, seen)


def test_gradient_beside_a_count_of_another_rate() -> None:
    rates = torch.tensor([LOW, HIGH])
    count = 2_000

    def model() -> None:
        with pyro.plate("n", count):
            bit = pyro.sample("bit", dist.Bernoulli(0.4))
            middle = pyro.sample("middle", dist.Poisson(rates[bit.long()]))
            z = pyro.sample("z", dist.OneHotCategorical(torch.ones(2)))
            pyro.factor("cost", middle * z[..., 1])

    def guide() -> None:
        with pyro.plate("n", count):
            bit = pyro.sample("bit", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.2))))
            pyro.sample("middle", dist.Poisson(rates[bit.long()]))
            pyro.sample("z", dist.OneHotCategorical(torch.ones(2)))

    config = config_gradient(guide, {"bit": DisARM(), "middle": "score", "z": "score"})
    elbo, draws = Estimator_ELBO(), []
    for _ in range(40):
        elbo.loss_and_grads(model, config)
        draws.append(pyro.param("l").unconstrained().grad.item() / count)
        pyro.param("l").unconstrained().grad = None
    logit = torch.tensor(0.2, requires_grad=True)
    q = torch.stack([(-logit).sigmoid(), logit.sigmoid()])
    loss = (q * (q.log() - torch.tensor([0.6, 0.4]).log() - rates / 2)).sum()
    (exact,) = torch.autograd.grad(loss, logit)
    found = torch.tensor(draws)
    error = found.std() / math.sqrt(len(draws))
    assert error < 0.02  # a tenth of it is seen
    assert abs((found.mean() - exact) / error) < 5


def test_a_step_sets_no_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, ...]] = []
    model, guide = recording("poisson", (3,), seen)
    config = config_gradient(guide, {"bit": DisARM(), "middle": "score", "last": "score"})
    elbo = Estimator_ELBO(2)
    elbo.loss_and_grads(model, config)

    def forbidden(*args: object) -> None:
        raise AssertionError("a step sets the generator")

    monkeypatch.setattr(torch, "set_rng_state", forbidden)
    monkeypatch.setattr(torch, "manual_seed", forbidden)
    elbo.loss_and_grads(model, config)


@pytest.mark.parametrize("vectorize", [False, True])
def test_noise_outside_of_sites_is_drawn_anew(vectorize: bool) -> None:
    count = 20_000
    dropout = nn.Dropout(0.5)
    seen: list[Tensor] = []

    def guide() -> None:
        with pyro.plate("n", count):
            pyro.sample("bit", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.2))))

    def model() -> None:
        with pyro.plate("n", count):
            bit = pyro.sample("bit", dist.Bernoulli(0.4))
            kept = dropout(torch.ones_like(bit)) / 2
            noise = torch.rand(bit.shape)
            pyro.factor("cost", kept * noise)
        seen.append(torch.stack([kept.flatten(), noise.flatten()]).detach().clone())

    elbo = Estimator_ELBO(vectorize_particles=vectorize)
    elbo.loss_and_grads(model, config_gradient(guide, "disarm"))
    kept, noise = torch.cat(seen[1:] if vectorize else seen, -1).double()
    assert len(kept) == 2 * count
    first, second = (noise - 0.5).chunk(2)
    independent = (first * second).mean() * 12 * math.sqrt(count)
    mean = (noise.mean() - 0.5) * math.sqrt(12 * len(noise))
    share = (kept.mean() - 0.5) * 2 * math.sqrt(len(kept))
    assert max(abs(float(z)) for z in (independent, mean, share)) < 5


@pytest.mark.parametrize("vectorize", [False, True])
def test_shared_noise_lowers_the_variance(vectorize: bool) -> None:
    # The cost differs between the branches by the bit alone where the Normal is drawn from the
    # main path's noise; else each difference has the variance of two Normals.
    def model() -> None:
        with pyro.plate("n", 500):
            pyro.sample("bit", dist.Bernoulli(0.5))
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.factor("cost", 10 * x)

    def guide() -> None:
        with pyro.plate("n", 500):
            pyro.sample("bit", dist.Bernoulli(logits=pyro.param("l", torch.zeros(500))))
            pyro.sample("x", dist.Normal(0.0, 1.0))

    elbo = Estimator_ELBO(vectorize_particles=vectorize)
    elbo.loss_and_grads(model, config_gradient(guide, {"bit": DisARM(), "x": "pathwise"}))
    assert pyro.param("l").unconstrained().grad.abs().max() < 1e-4
