"""Families that come after a discrete latent, and latents of other families."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions import transforms as T

from helpers.user_programs.program import (
    NOT_RECORDED,
    bit,
    copies,
    normal,
    one_hot,
    param,
    program,
    table,
)
from pyro_gumbel.distributions import OneHot

FEW_OR_MANY = table(0.05, 5.0)


def positive(name, value):
    return param(name, value, constraint=constraints.positive)


@program(reference="trace", refused=("Rebar*",))
def poisson_after_bit(n):
    """Counts below a bit, and a one-hot after them."""
    rates = table(0.3, 2.0)

    def model():
        with copies(n):
            b = bit("b", -0.4)
            k = pyro.sample("k", dist.Poisson(rates[b.long()]))
            z = one_hot("z", table(0.0, 0.3))
            normal("x", 0.3 * k + z[..., 1], 1.0, obs=torch.full((n,), 1.4))

    def guide():
        with copies(n):
            b = bit("b", param("b", 0.2))
            pyro.sample("k", dist.Poisson((0.2 + 1.5 * b) * positive("rate", 1.1)))
            one_hot("z", param("z", 0.2, -0.3))

    return model, guide


def _loss_of_poisson_between(b_):
    q = torch.stack([-b_, b_]).sigmoid()
    prior = torch.tensor([0.4, -0.4]).sigmoid()
    return (q * (q.log() - prior.log() - FEW_OR_MANY / 2)).sum()


@program(
    reference=_loss_of_poisson_between,
    copies=1,
    draws=1500,
    importance=False,
    only=("looped", "vectorized", "first:DisARM*"),
)
def poisson_between_alone(n):
    """Without replicates: what one site takes from the generator is next to another's numbers."""

    def model():
        b = bit("b", -0.4)
        k = pyro.sample("k", dist.Poisson(FEW_OR_MANY[b.long()]))
        z = one_hot("z", table(0.0, 0.0))
        pyro.factor("f", k * z[..., 1])

    def guide():
        b = bit("b", param("b", 0.2))
        pyro.sample("k", dist.Poisson(FEW_OR_MANY[b.long()]))
        one_hot("z", table(0.0, 0.0))

    return model, guide


@program(reference="enum")
def gamma_and_beta_after_bit(n):
    def model():
        with copies(n):
            b = bit("b", 0.3)
            g = pyro.sample("g", dist.Gamma(2.0 + b, 1.5))
            p = pyro.sample("p", dist.Beta(1.5, 1.0 + b))
            normal("x", g * p, 0.8, obs=torch.full((n,), 0.9))

    def guide():
        with copies(n):
            b = bit("b", param("b", -0.2))
            pyro.sample("g", dist.Gamma(positive("ga", 2.2), positive("gb", 1.3) + 0.5 * b))
            pyro.sample("p", dist.Beta(positive("pa", 1.8) + b, positive("pb", 1.4)))

    return model, guide


@program(reference="enum")
def dirichlet_then_words(n):
    """A topic model's document: proportions, then topics of its words."""
    topics = table([0.6, 0.3, 0.1], [0.1, 0.2, 0.7])

    def model():
        with copies(n, dim=-2):
            theta = pyro.sample("theta", dist.Dirichlet(table(1.2, 0.8)))
            with pyro.plate("word", 3, dim=-1):
                z = pyro.sample("z", dist.OneHotCategorical(theta))
                pyro.sample("w", dist.Categorical(z @ topics), obs=table(0, 2, 2).expand(n, 3))

    def guide():
        with copies(n, dim=-2):
            theta = pyro.sample("theta", dist.Dirichlet(param("theta", 0.6, 0.3).exp()))
            with pyro.plate("word", 3, dim=-1):
                pyro.sample(
                    "z", dist.OneHotCategorical(logits=theta.log() + param("z", 0.2, -0.3))
                )

    return model, guide


@program(reference="mean_field", importance=False)
def divergences_in_closed_form(n):
    """Held against Pyro's mean-field loss; some families have no closed form."""

    def model():
        with copies(n, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            g = pyro.sample("g", dist.Gamma(2.0, 1.0))
            h = pyro.sample("h", dist.HalfCauchy(1.0))
            with pyro.plate("item", 3, dim=-1):
                w = normal("w", 0.0, 1.5)
                normal("x", z.sum(-1) + w, 0.5 + g + h, obs=torch.full((n, 3), 0.9))

    def guide():
        with copies(n, dim=-2):
            q = dist.Normal(param("z", 0.3, -0.4), positive("s", 0.8) * torch.ones(2))
            pyro.sample("z", q.to_event(1))
            pyro.sample("g", dist.Gamma(positive("ga", 1.7), positive("gb", 1.3)))
            pyro.sample("h", dist.LogNormal(param("h", -0.4), 0.5))
            with pyro.plate("item", 3, dim=-1):
                normal("w", param("w", 0.2, -0.1, 0.5), 0.9)

    return model, guide


@program(reference="trace")
def binomial_and_negative_binomial(n):
    def model():
        with copies(n):
            b = bit("b", 0.3)
            k = pyro.sample("k", dist.Binomial(4, 0.3 + 0.3 * b))
            m = pyro.sample("m", dist.NegativeBinomial(2.0, logits=b - 1.0))
            normal("x", 0.5 * k - 0.4 * m, 0.9, obs=torch.full((n,), 0.6))

    def guide():
        with copies(n):
            b = bit("b", param("b", -0.2))
            pyro.sample("k", dist.Binomial(4, logits=param("k", 0.1) - 0.5 * b))
            pyro.sample("m", dist.NegativeBinomial(2.0, logits=param("m", -0.9) + 0.3 * b))

    return model, guide


@program(reference="trace", refused=NOT_RECORDED)
def von_mises_after_bit(n):
    """Drawn by rejection, not reparameterised."""

    def model():
        with copies(n):
            b = bit("b", 0.3)
            a = pyro.sample("a", dist.VonMises(b, 1.5))
            pyro.sample("x", dist.VonMises(a, 2.0), obs=torch.full((n,), 1.0))

    def guide():
        with copies(n):
            b = bit("b", param("b", -0.2))
            pyro.sample("a", dist.VonMises(param("a", 0.4) + 0.5 * b, positive("c", 1.8)))

    return model, guide


@program(reference="trace")
def geometric_and_multinomial(n):
    def model():
        with copies(n):
            g = pyro.sample("g", dist.Geometric(0.4 * torch.ones(n)))
            m = pyro.sample("m", dist.Multinomial(3, table(0.3, 0.3, 0.4)))
            loc = 0.4 * g + (m * table(0.5, -0.5, 0.2)).sum(-1)
            normal("x", loc, 0.9, obs=torch.full((n,), 0.7))

    def guide():
        with copies(n):
            pyro.sample("g", dist.Geometric(logits=param("g", -0.1)))
            pyro.sample("m", dist.Multinomial(3, logits=param("m", 0.2, -0.1, 0.3)))

    return model, guide


@program(reference="enum")
def zero_inflated_counts(n):
    data = table(0.0, 3.0, 1.0)

    def model():
        with copies(n, dim=-2):
            b = bit("b", 0.1)
            with pyro.plate("item", 3, dim=-1):
                z = bit("z", b - 0.5)
                rate = (0.4 + z + 0.5 * b) * positive("rate", 1.2)
                d = dist.ZeroInflatedPoisson(rate=rate, gate=0.2 + 0.3 * z)
                pyro.sample("x", d, obs=data.expand(n, 3))

    def guide():
        with copies(n, dim=-2):
            b = bit("b", param("b", -0.2))
            with pyro.plate("item", 3, dim=-1):
                bit("z", param("z", -0.5, 0.9, 0.2) + param("w", 0.3) * b)

    return model, guide


@program(reference="enum")
def transformed_latents(n):
    """A log-normal, a logistic-normal by hand, a folded normal and a half-Cauchy prior."""

    def model():
        with copies(n):
            b = bit("b", 0.2)
            s = pyro.sample("s", dist.HalfCauchy(1.0 + b))
            u = pyro.sample("u", dist.Beta(1.5, 1.2))
            f = pyro.sample("f", dist.HalfNormal(1.0))
            normal("x", u + 0.5 * f, 0.5 + s, obs=torch.full((n,), 1.1))

    def guide():
        with copies(n):
            b = bit("b", param("b", -0.3))
            pyro.sample("s", dist.LogNormal(param("s", -0.2) + 0.3 * b, 0.5))
            base = dist.Normal(param("u", 0.1), positive("us", 0.9))
            pyro.sample("u", dist.TransformedDistribution(base, [T.SigmoidTransform()]))
            pyro.sample("f", dist.FoldedDistribution(dist.Normal(param("f", 0.6), 0.7)))

    return model, guide


@program(reference="enum")
def truncated_latent(n):
    """A truncated normal, written by the inverse of its distribution function."""

    class Truncated(dist.TorchDistribution):
        arg_constraints = {"loc": constraints.real}
        support = constraints.greater_than(0.0)
        has_rsample = True

        def __init__(self, loc):
            self.loc = loc
            self.base = dist.Normal(loc, 1.0)
            super().__init__(loc.shape, ())

        def expand(self, batch_shape, _instance=None):
            return Truncated(self.loc.expand(batch_shape))

        def rsample(self, sample_shape=()):
            low = self.base.cdf(torch.zeros_like(self.loc))
            u = torch.rand(self._extended_shape(sample_shape)).clamp(1e-4, 1 - 1e-4)
            return self.base.icdf(low + u * (1 - low)).clamp(min=1e-5)

        def log_prob(self, value):
            return self.base.log_prob(value) - self.base.cdf(self.loc * 2).log()

    def model():
        with copies(n):
            b = bit("b", 0.2)
            t = pyro.sample("t", dist.Exponential(0.6 + b))
            normal("x", t, 0.8, obs=torch.full((n,), 1.2))

    def guide():
        with copies(n):
            b = bit("b", param("b", -0.3))
            pyro.sample("t", Truncated(param("t", 0.5) - 0.4 * b))

    return model, guide


@program(reference="trace", refused=NOT_RECORDED)
def flow_beside_bit(n):
    """A spline and an affine autoregressive flow, both of which remember their inputs."""

    def model():
        with copies(n):
            b = bit("b", 0.2)
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            normal("x", z.sum(-1) + b, 0.7, obs=torch.full((n,), 1.2))

    spline = T.Spline(2, count_bins=4)
    affine = T.affine_autoregressive(2, hidden_dims=[4])

    def guide():
        pyro.module("spline", spline)
        pyro.module("affine", affine)
        with copies(n):
            bit("b", param("b", -0.3))
            base = dist.Normal(param("z", 0.3, -0.2), torch.ones(2)).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [spline, affine]))

    return model, guide


@program(reference="enum")
def simplex_parameters(n):
    """Probabilities as parameters under constraints, some of them small."""
    start = table(0.05, 0.35, 0.6)

    def model():
        w = pyro.param("prior", table(0.3, 0.5, 0.2), constraint=constraints.simplex)
        with copies(n):
            z = pyro.sample("z", dist.Categorical(w))
            b = pyro.sample("b", dist.Bernoulli(table(0.1, 0.5, 0.9)[z]))
            normal("x", table(-1.0, 0.4, 1.5)[z] + b, 0.8, obs=torch.full((n,), 0.9))

    def guide():
        q = pyro.param("q", start, constraint=constraints.simplex)
        p = pyro.param("p", table(0.3, 0.6, 0.8), constraint=constraints.unit_interval)
        with copies(n):
            z = pyro.sample("z", dist.Categorical(q))
            pyro.sample("b", dist.Bernoulli(p[z]))

    return model, guide


@program(reference="enum", copies=400)
def multivariate_latents(n):
    """A vector with a full covariance and a correlation matrix, below a bit."""

    def model():
        with copies(n):
            b = bit("b", 0.2)
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
            c = pyro.sample("c", dist.LKJCholesky(2, 1.5))
            normal("x", z.sum(-1) + b + c[..., 1, 0], 0.7, obs=torch.full((n,), 1.2))

    def guide():
        tril = table([0.8, 0.0], [0.3, 0.7]) * param("tril", 1.0)
        with copies(n):
            b = bit("b", param("b", -0.3))
            loc = param("z", 0.3, -0.2) + 0.2 * b.unsqueeze(-1)
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))
            pyro.sample("c", dist.LKJCholesky(2, positive("c", 2.0)))

    return model, guide


@program(reference="enum")
def families_of_this_package(n):
    """One-hot vectors and bits of this package's families, in the guide and in the model."""

    def model():
        with copies(n):
            z = pyro.sample("z", OneHot(logits=table(0.3, -0.2, 0.1)))
            b = bit("b", (z * table(1.0, -1.0, 0.2)).sum(-1))
            normal("x", (z * table(-1.0, 0.4, 1.5)).sum(-1) + b, 0.8, obs=torch.full((n,), 0.9))

    def guide():
        with copies(n):
            z = pyro.sample("z", OneHot(logits=param("z", 0.2, -0.4, 0.5)))
            bit("b", param("b", 0.3) + (z * param("w", 0.5, 0.0, -0.5)).sum(-1))

    return model, guide
