"""A program whose gradient by the score function is known at the values drawn."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch

from pyro_gumbel.infer import Estimator_ELBO, config_gradient

DOUBLE = torch.float64
SIZE, CATEGORIES = 2, 3


class Program:
    """A plate of one-hot sites that records the values of the model's runs."""

    def __init__(self):
        self.prior = torch.tensor([0.1, 0.2, 0.7], dtype=DOUBLE).log()
        self.table = torch.randn(SIZE, CATEGORIES, dtype=DOUBLE)
        self.weight = torch.tensor(0.8, dtype=DOUBLE).requires_grad_()
        self.phi = torch.randn(SIZE, CATEGORIES, dtype=DOUBLE).requires_grad_()
        self.seen = []

    def model(self, x=None):
        with pyro.plate("n", SIZE):
            prior = self.prior.expand(SIZE, CATEGORIES)
            z = pyro.sample("z", dist.OneHotCategorical(logits=prior))
            self.seen.append(z.detach())
            pyro.factor("x", self.weight * (z * self.table).sum(-1))

    def guide(self, x=None):
        with pyro.plate("n", SIZE):
            pyro.sample("z", dist.OneHotCategorical(logits=self.phi))

    def step(self, elbo, estimator, *args):
        """Take a step; return the draws ``(R, SIZE, C)``."""
        self.seen.clear()
        elbo.loss_and_grads(self.model, config_gradient(self.guide, estimator), *args)
        return self.seen[-1] if elbo.vectorize_particles else torch.stack(self.seen)

    def costs(self, draws):
        """Log p - log q of each plate element, ``(R, SIZE)``."""
        log_q = self.phi.detach().log_softmax(-1)
        likelihood = self.weight.detach() * (draws * self.table).sum(-1)
        return likelihood + (draws * (self.prior - log_q)).sum(-1)

    def scores(self, draws):
        """The gradient of ``log q`` in the logits, ``(R, SIZE, C)``."""
        return draws - self.phi.detach().softmax(-1)

    def expect(self, draws, baseline):
        """Return the gradient by the published formula."""
        centred = self.costs(draws) - baseline
        return -(centred.unsqueeze(-1) * self.scores(draws)).mean(0)


def elbo_of(num_particles, vectorize):
    return Estimator_ELBO(
        num_particles=num_particles, vectorize_particles=vectorize, max_plate_nesting=1
    )
