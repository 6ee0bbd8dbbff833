"""Plates of discrete sites with recorded or prescribed coupled draws, and exact means."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_gumbel.estimators import Route
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

DOUBLE = torch.float64
EXACT = {"rtol": 1e-10, "atol": 1e-10}
PARTICLES = 3


class BitSite:
    """Elements of three Bernoulli variables joined by ``to_event``, with a nonlinear cost."""

    variables = 3
    prior = torch.tensor([0.6, -0.3, 0.2], dtype=DOUBLE)
    first = torch.tensor([0.9, -0.7, 0.5], dtype=DOUBLE)
    second = torch.tensor([-0.4, 1.1, 0.8], dtype=DOUBLE)

    def __init__(self, size: int) -> None:
        phi = torch.tensor([0.4, -1.1, 0.9], dtype=DOUBLE)
        shift = torch.linspace(-0.5, 0.5, size, dtype=DOUBLE).unsqueeze(-1) if size > 1 else 0.0
        self.size = size
        self.phi = (phi + shift).expand(size, 3).clone().requires_grad_()

    def law(self, logits: Tensor) -> Any:
        return dist.Bernoulli(logits=logits).to_event(1)

    def reward(self, z: Tensor) -> Tensor:
        """The likelihood's part of the cost."""
        return ((z * self.first).sum(-1) + 0.3) ** 3 + (z * self.second).sum(-1).exp()

    def log_mass(self, z: Tensor, logits: Tensor) -> Tensor:
        return (z * logits - torch.nn.functional.softplus(logits)).sum(-1)

    def mean(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def score(self, z: Tensor) -> Tensor:
        return z - self.mean(self.phi.detach())

    def jacobian_product(self, slope: Tensor) -> Tensor:
        """Multiply the Jacobian of the mean in the logits with a gradient in the value."""
        theta = self.phi.detach().sigmoid()
        return theta * (1 - theta) * slope

    def cost(self, z: Tensor) -> Tensor:
        """``f = log p - log q``, with the guide's parameters detached."""
        return (
            self.reward(z)
            + self.log_mass(z, self.prior.expand_as(self.phi))
            - self.log_mass(z, self.phi.detach())
        )

    def slope(self, z: Tensor) -> Tensor:
        """The gradient of the cost in the value."""
        z = z.detach().clone().requires_grad_()
        return torch.autograd.grad(self.cost(z).sum(), z)[0]

    def model(self) -> None:
        with pyro.plate("n", self.size):
            z = pyro.sample("z", self.law(self.prior.expand(self.phi.shape)))
            pyro.factor("x", self.reward(z))

    def guide(self) -> None:
        with pyro.plate("n", self.size):
            pyro.sample("z", self.law(self.phi))

    def gradient(self, estimator: Any, *, num_particles: int = 1, vectorize: bool = True) -> Any:
        """Take a step; return each element's gradient of the ELBO, and the site."""
        seen = []
        surrogate = estimator.surrogate

        def watched(site: Any) -> Any:
            seen.append(site)
            return surrogate(site)

        estimator.surrogate = watched
        self.phi.grad = None
        elbo = Estimator_ELBO(
            num_particles=num_particles, vectorize_particles=vectorize, max_plate_nesting=1
        )
        elbo.loss_and_grads(self.model, config_gradient(self.guide, estimator))
        del estimator.surrogate
        return -self.phi.grad, seen[0]

    def states(self) -> Tensor:
        """Every value of one element, ``(states, ...)``."""
        return torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)), dtype=DOUBLE)

    def exact(self) -> Tensor:
        """The exact gradient of one element's ELBO in its logits (the first's)."""
        phi = self.phi.detach()[0].clone().requires_grad_()
        states = self.states()
        held = self.cost(states.unsqueeze(1).expand(len(states), self.size, -1))[:, 0]
        log_q = self.log_mass(states, phi)
        return torch.autograd.grad((log_q.exp() * held).sum(), phi)[0]


class OneHotSite(BitSite):
    """Elements of four categories."""

    variables = 1
    prior = torch.tensor([0.6, -0.3, 0.2, -0.9], dtype=DOUBLE).log_softmax(-1)
    first = torch.tensor([0.9, -0.7, 0.5, 1.6], dtype=DOUBLE)
    second = torch.tensor([-0.4, 1.1, 0.8, 0.1], dtype=DOUBLE)

    def __init__(self, size: int) -> None:
        super().__init__(size)
        phi = torch.tensor([0.4, -1.1, 0.9, 0.1], dtype=DOUBLE)
        tilt = torch.linspace(0, 1, size, dtype=DOUBLE).unsqueeze(-1) if size > 1 else 0.0
        self.phi = (phi * (1 + tilt)).expand(size, 4).clone().requires_grad_()

    def law(self, logits: Tensor) -> Any:
        return dist.OneHotCategorical(logits=logits)

    def log_mass(self, z: Tensor, logits: Tensor) -> Tensor:
        return (z * logits.log_softmax(-1)).sum(-1)

    def mean(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def jacobian_product(self, slope: Tensor) -> Tensor:
        pi = self.phi.detach().softmax(-1)
        return pi * (slope - (pi * slope).sum(-1, keepdim=True))

    def states(self) -> Tensor:
        return torch.eye(4, dtype=DOUBLE)


def prescribe(estimator: Any, block: Tensor) -> Any:
    """Replace the draws of an estimator by ``block``, ``(K, elements, ...)``."""
    differentiates = estimator.route is Route.COST_GRADIENT

    def draw_block(fn: Any, event_dims: int) -> Tensor:
        rank = len(fn.batch_shape + fn.event_shape) + 1
        rows = block.unsqueeze(1) if rank > block.dim() else block
        full = rows.expand(block.shape[:1] + fn.batch_shape + fn.event_shape).clone()
        return full.requires_grad_() if differentiates else full

    estimator.draw_block = draw_block
    return estimator


def pattern_law(theta: Tensor, num_samples: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Joint distribution of ``K`` bits of a Dirichlet copula, by inclusion and exclusion.

    With :math:`p` the probability of the rarer value, ``m`` given draws all take it with
    probability :math:`\\max(0, m p^{1/(K-1)} - m + 1)^{K-1}`.
    """
    rarer = torch.minimum(theta, 1 - theta)
    flip = theta > 0.5

    def together(m: int) -> Tensor:
        power = num_samples - 1
        return (m * rarer ** (1 / power) - m + 1).clamp(min=0) ** power if m else rarer**0

    for pattern in itertools.product((0, 1), repeat=num_samples):
        for_rarer = torch.zeros_like(theta)
        for_common = torch.zeros_like(theta)
        # Probability that the ones of the pattern, or its zeros, are what is rare.
        for total, count in ((for_rarer, sum(pattern)), (for_common, num_samples - sum(pattern))):
            for extra in range(num_samples - count + 1):
                sign = (-1) ** extra * math.comb(num_samples - count, extra)
                total += sign * together(count + extra)
        yield pattern, torch.where(flip, for_common, for_rarer)


def step(site_type: type[BitSite], estimator: Any, vectorize: bool) -> Any:
    """Return the gradient, the program, and the values drawn, ``(K, R, elements, ...)``."""
    program = site_type(2)
    gradient, site = program.gradient(estimator, num_particles=PARTICLES, vectorize=vectorize)
    values = site.values.detach()
    assert values.shape[1:] == (PARTICLES, *program.phi.shape)
    torch.testing.assert_close(site.cost, program.cost(values), **EXACT)
    return gradient, program, values


def set_alpha(estimator, alpha):
    with torch.no_grad():
        estimator.alpha.fill_(alpha)
    return estimator


def set_scales(estimator):
    """Set coefficients far from their start, and enlarge the network."""
    with torch.no_grad():
        estimator.scales.copy_(torch.tensor([-0.7, 0.4]))
        for parameter in estimator.network.parameters():
            parameter.mul_(2.0)
    return estimator


def expectation(site_type, estimator, combinations):
    """Average over ``[(values of shape (K, ...), probability), ...]``."""
    blocks, probs = zip(*combinations, strict=True)
    probs = torch.stack([torch.as_tensor(prob, dtype=DOUBLE) for prob in probs])
    torch.testing.assert_close(probs.sum(), torch.ones((), dtype=DOUBLE), **EXACT)
    site = site_type(1)
    phi = site.phi.detach()
    site.phi = phi.expand(len(blocks), *phi.shape[1:]).clone().requires_grad_()
    site.size = len(blocks)
    gradients, _ = site.gradient(prescribe(estimator, torch.stack(blocks, 1).to(DOUBLE)))
    return (probs.reshape(-1, *[1] * (phi.dim() - 1)) * gradients).sum(0), site_type(1).exact()


def per_bit(joint):
    """Combinations of all bits: ``joint`` lists each bit's patterns over the ``K`` values."""
    patterns, probs = zip(*joint, strict=True)
    patterns = torch.tensor(patterns, dtype=DOUBLE)  # (patterns, K)
    probs = torch.stack(probs)  # (patterns, bits)
    combinations = []
    for choice in itertools.product(range(len(patterns)), repeat=3):
        value = torch.stack([patterns[c] for c in choice], -1)  # (K, bits)
        prob = torch.stack([probs[c, bit] for bit, c in enumerate(choice)]).prod()
        combinations.append((value, prob))
    return [(value, prob) for value, prob in combinations if prob > 0]


def independent(site, count):
    """All combinations of ``count`` independent draws."""
    states = site.states()
    mass = site.log_mass(states, site.phi.detach()[0]).exp()
    return [
        (states[list(index)], mass[list(index)].prod())
        for index in itertools.product(range(len(states)), repeat=count)
    ]


def check(site_type, estimator, combinations):
    mean, exact = expectation(site_type, estimator, combinations)
    assert exact.abs().min() > 0.01
    torch.testing.assert_close(mean, exact, **EXACT)


def ordered(site, count):
    """Every ordered draw of different categories with its probability."""
    probs = site.phi.detach()[0].softmax(-1)
    combinations = []
    for drawn in itertools.permutations(range(4), count):
        left, prob = 1.0, 1.0
        for category in drawn:
            prob = prob * probs[category] / left
            left = left - probs[category]
        combinations.append((site.states()[list(drawn)], prob))
    return combinations
