"""Distributions that users derive from others, or write from nothing."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.testing.rejection_gamma import RejectionGamma, ShapeAugmentedBeta

from helpers.user_programs.program import (
    NOT_RECORDED,
    bit,
    category,
    copies,
    normal,
    one_hot,
    param,
    program,
    table,
)


class MaskedCategorical(dist.Categorical):
    """The second category is forbidden."""

    def _law(self):
        return (self.logits + table(0.0, -math.inf, 0.0)).log_softmax(-1)

    def sample(self, sample_shape=()):
        return torch.distributions.Categorical(logits=self._law()).sample(sample_shape)

    def log_prob(self, value):
        law, index = torch.broadcast_tensors(self._law(), value.long().unsqueeze(-1))
        return law.gather(-1, index[..., :1]).squeeze(-1)

    def enumerate_support(self, expand=True):
        value = torch.tensor([0, 2]).reshape((-1,) + (1,) * len(self.batch_shape))
        return value.expand((-1, *self.batch_shape)) if expand else value


class EpsilonGreedy(dist.OneHotCategorical):
    """With probability 0.3 any category, all alike."""

    def _law(self):
        return 0.7 * self.probs + 0.3 / self.probs.shape[-1]

    def sample(self, sample_shape=()):
        return torch.distributions.OneHotCategorical(self._law()).sample(sample_shape)

    def log_prob(self, value):
        return (value * self._law().log()).sum(-1)


class NoisyBit(dist.Bernoulli):
    """A bit that is turned with probability 0.2."""

    def _law(self):
        return 0.2 + 0.6 * self.probs

    def sample(self, sample_shape=()):
        return torch.bernoulli(self._law().expand(self._extended_shape(sample_shape)))

    def log_prob(self, value):
        return torch.distributions.Bernoulli(self._law()).log_prob(value)


class TidyBit(dist.Bernoulli):
    """Another constructor and a helper; the distribution is the parent's."""

    @classmethod
    def of_odds(cls, odds):
        return cls(logits=torch.as_tensor(odds).log())

    @property
    def odds(self):
        return self.logits.exp()


class SkewNormal(dist.Normal):
    """The larger of two normals: its own draws, its own density."""

    def rsample(self, sample_shape=()):
        shape = self._extended_shape(sample_shape)
        return self.loc + self.scale * torch.maximum(torch.randn(shape), torch.randn(shape))

    def sample(self, sample_shape=()):
        return self.rsample(sample_shape).detach()

    def log_prob(self, value):
        z = (value - self.loc) / self.scale
        cdf = torch.distributions.Normal(0.0, 1.0).cdf(z).clamp(min=1e-12)
        return super().log_prob(value) + math.log(2) + cdf.log()

    def expand(self, batch_shape, _instance=None):
        return super().expand(batch_shape, self._get_checked_instance(SkewNormal, _instance))


class Tent(dist.TorchDistribution):
    """A triangle's density on (c - 1, c + 1); no ``expand``, and a tuple for a batch shape."""

    arg_constraints = {}
    support = constraints.real
    has_rsample = True

    def __init__(self, centre):
        self.centre = centre
        super().__init__(batch_shape=tuple(centre.shape), event_shape=())
        self._batch_shape = tuple(centre.shape)

    def rsample(self, sample_shape=()):
        shape = tuple(sample_shape) + tuple(self._batch_shape)
        return self.centre + torch.rand(shape) - torch.rand(shape)

    def log_prob(self, value):
        return (1 - (value - self.centre).abs()).clamp(min=1e-6).log()


@program(reference="enum")
def masked_categorical_in_guide(n):
    def model():
        with copies(n):
            b = bit("b", 0.3)
            z = category("z", b.unsqueeze(-1) * table(0.3, -0.2, 0.1))
            normal("x", table(-1.0, 30.0, 1.5)[z] + b, 0.8, obs=torch.full((n,), 0.9))

    def guide():
        with copies(n):
            bit("b", param("b", -0.2))
            pyro.sample("z", MaskedCategorical(logits=param("z", 0.2, -0.4, 0.5)))

    return model, guide


@program(reference="enum")
def masked_categorical_in_model(n):
    def model():
        with copies(n):
            b = bit("b", 0.3)
            z = pyro.sample("z", MaskedCategorical(logits=b.unsqueeze(-1) * table(0.3, -0.2, 0.1)))
            normal("x", table(-1.0, 30.0, 1.5)[z] + b, 0.8, obs=torch.full((n,), 0.9))

    def guide():
        with copies(n):
            bit("b", param("b", -0.2))
            pyro.sample("z", MaskedCategorical(logits=param("z", 0.2, -0.4, 0.5)))

    return model, guide


@program(reference="enum")
def epsilon_greedy_in_guide(n):
    def model():
        with copies(n):
            z = one_hot("z", table(0.3, -0.2, 1.1))
            b = bit("b", (z * table(1.0, -1.0, 0.2)).sum(-1))
            loc = (z * table(-1.0, 0.4, 1.5)).sum(-1) + b
            normal("x", loc, 0.8, obs=torch.full((n,), 0.9))

    def guide():
        with copies(n):
            z = pyro.sample("z", EpsilonGreedy(logits=param("z", 1.2, -0.8, 0.5)))
            bit("b", param("b", 0.3) + (z * param("w", 0.5, 0.0, -0.5)).sum(-1))

    return model, guide


@program(reference="enum")
def epsilon_greedy_in_model(n):
    def model():
        with copies(n):
            z = pyro.sample("z", EpsilonGreedy(logits=table(1.3, -1.2, 0.1)))
            normal("x", (z * table(-1.0, 0.4, 1.5)).sum(-1), 0.8, obs=torch.full((n,), 0.9))

    def guide():
        with copies(n):
            one_hot("z", param("z", 0.2, -0.4, 0.5))

    return model, guide


@program(reference="enum", refused=("GumbelSoftmax*", "MuProp*", "Rebar*"))
def noisy_bits(n):
    """One in the guide, one in the model."""

    def model():
        with copies(n):
            b = pyro.sample("b", NoisyBit(logits=table(1.5)))
            c = bit("c", b - 0.3)
            normal("x", b + 0.5 * c, 0.6, obs=torch.full((n,), 1.2))

    def guide():
        with copies(n):
            b = bit("b", param("b", -0.6))
            pyro.sample("c", NoisyBit(logits=param("c", 1.1) - b))

    return model, guide


@program(reference="enum")
def tidy_bits(n):
    """A subclass that changes no part of the distribution is used as its parent."""

    def model():
        with copies(n):
            b = pyro.sample("b", TidyBit.of_odds(1.4))
            normal("x", 1.5 * b, 0.6, obs=torch.full((n,), 1.2))

    def guide():
        with copies(n):
            pyro.sample("b", TidyBit(logits=param("b", -0.6)))

    return model, guide


@program(reference="enum")
def skew_normal_below_a_bit(n):
    def model():
        with copies(n):
            b = bit("b", 0.3)
            z = normal("z", b, 1.2)
            normal("x", z, 0.8, obs=torch.full((n,), 1.4))

    def guide():
        with copies(n):
            b = bit("b", param("b", -0.2))
            pyro.sample("z", SkewNormal(param("z", -0.3) + 0.8 * b, param("s", 0.1).exp()))

    return model, guide


@program(reference="enum")
def without_expand(n):
    def model():
        with copies(n):
            b = bit("b", 0.3)
            z = normal("z", b, 1.2)
            normal("x", z, 0.8, obs=torch.full((n,), 1.4))

    def guide():
        with copies(n):
            b = bit("b", param("b", -0.2))
            pyro.sample("z", Tent(param("z", 0.3).expand(b.shape) + 0.4 * b))

    return model, guide


@program(reference="enum", refused=NOT_RECORDED)
def rejection_sampler(n):
    """Its gradient has a part of the score."""

    def truncated(a):
        def propose(shape=()):
            return torch.randn(torch.Size(shape) + a.shape)

        propose.log_prob = lambda x: dist.Normal(0.0, 1.0).log_prob(x)
        return dist.Rejector(
            propose,
            lambda x: torch.nn.functional.logsigmoid(a * x),
            torch.tensor(0.5).log(),
            batch_shape=a.shape,
            event_shape=(),
        )

    def model():
        with copies(n):
            b = bit("b", 0.2)
            z = normal("z", 0.6 + 0.4 * b, 0.9)
            normal("x", z, 1.0, obs=torch.full((n,), 0.5))

    def guide():
        with copies(n):
            b = bit("b", param("b", -0.3))
            pyro.sample("z", truncated(param("a", -0.8) + 0.5 * b))

    return model, guide


@program(reference="trace", refused=NOT_RECORDED)
def rejection_gamma_and_beta(n):
    def model():
        with copies(n):
            g = pyro.sample("g", dist.Gamma(2.0, 1.5))
            p = pyro.sample("p", dist.Beta(1.5, 1.2))
            normal("x", g * p, 0.8, obs=torch.full((n,), 0.9))

    def guide():
        shape = param("g", 0.6).exp().expand([n])
        with copies(n):
            pyro.sample("g", RejectionGamma(shape, param("rate", 0.3).exp().expand([n])))
            a, b = param("a", 0.5).exp().expand([n]), param("c", 0.3).exp().expand([n])
            pyro.sample("p", ShapeAugmentedBeta(a, b))

    return model, guide
