"""Each family of latent site gets a guide that fits it and starts at the prior."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_gumbel.distributions import OneHot, RelaxedOneHot
from pyro_gumbel.distributions.families import unwrap
from pyro_gumbel.guides import AutoAmortized, AutoDiscrete
from pyro_gumbel.infer import Estimator_ELBO

N = 5
PROBS = torch.tensor([0.1, 0.2, 0.7])

# A prior, and the family of its guide.
SAME_FAMILY: list[tuple[Any, type]] = [
    (dist.OneHotCategorical(PROBS), OneHot),
    (OneHot(PROBS), OneHot),
    (dist.OneHotCategoricalStraightThrough(PROBS), OneHot),
    (RelaxedOneHot(0.5, PROBS, straight_through=True), OneHot),
    (dist.OneHotCategorical(PROBS).expand([4]).to_event(1), OneHot),
    (dist.Bernoulli(torch.tensor(0.3)), dist.Bernoulli),
    (dist.Bernoulli(torch.tensor(0.3)).expand([2, 3]).to_event(2), dist.Bernoulli),
    (dist.Categorical(PROBS), dist.Categorical),
    (dist.Poisson(torch.tensor(3.0)), dist.Poisson),
    (dist.Geometric(torch.tensor(0.3)), dist.Geometric),
    (dist.Binomial(4, torch.tensor(0.3)), dist.Binomial),
    (dist.Binomial(torch.tensor([4.0, 4.0]), torch.tensor([0.3, 0.9])).to_event(1), dist.Binomial),
    (dist.NegativeBinomial(torch.tensor(2.5), torch.tensor(0.3)), dist.NegativeBinomial),
    (dist.Normal(torch.tensor([100.0, -3.0]), torch.tensor([10.0, 0.1])).to_event(1), dist.Normal),
    (dist.LogNormal(torch.tensor(-2.0), 0.5), dist.LogNormal),
    (dist.Beta(torch.tensor(2.0), torch.tensor(0.5)), dist.Beta),
    (dist.Gamma(torch.tensor(2.0), torch.tensor(0.5)), dist.Gamma),
    (dist.Dirichlet(torch.tensor([0.5, 1.0, 4.0])), dist.Dirichlet),
]
TRANSPORTED = [
    dist.Exponential(torch.tensor(2.0)),
    dist.Uniform(torch.tensor(-1.0), torch.tensor(3.0)),
    dist.HalfNormal(torch.tensor(2.0)).expand([3]).to_event(1),
    dist.StudentT(torch.tensor(4.0)),
    dist.MultivariateNormal(torch.zeros(3), torch.eye(3)),
    dist.LKJCholesky(3, torch.tensor(1.0)),
    dist.TransformedDistribution(
        dist.Normal(torch.zeros(2), 1.0), [dist.transforms.StickBreakingTransform()]
    ),
]


class Constant(nn.Module):
    """Constant features."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), 2, dtype=x.dtype)


def model_of(prior: Any):
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            numbers = z.reshape(*z.shape[: z.dim() - prior.event_dim], -1)
            numbers = numbers.to(torch.get_default_dtype())
            loc = (numbers * torch.arange(1.0, numbers.shape[-1] + 1)).sum(-1)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    return model


def ids(case: Any) -> str | None:
    if isinstance(case, type):
        return None
    return type(unwrap(case)).__name__


@pytest.mark.parametrize(("prior", "family"), SAME_FAMILY, ids=ids)
def test_guide_of_the_same_family_starts_at_the_prior(prior: Any, family: type) -> None:
    guide = AutoAmortized(model_of(prior), Constant())
    fn = guide.posterior(torch.zeros(N))["z"]
    assert type(unwrap(fn)) is family
    assert fn.batch_shape == (N,)
    assert fn.event_shape == prior.event_shape
    value = prior.sample((N,))
    torch.testing.assert_close(fn.log_prob(value), prior.log_prob(value), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prior", TRANSPORTED, ids=ids)
def test_other_continuous_sites_get_a_normal_transformed_to_their_support(prior: Any) -> None:
    guide = AutoAmortized(model_of(prior), Constant())
    value = guide(torch.zeros(N))["z"]
    assert value.shape == (N, *prior.event_shape)
    assert prior.support.check(value).all()
    fn = guide.posterior(torch.zeros(N + 2))["z"]  # another batch size
    assert fn.has_rsample
    assert fn.log_prob(value[0]).isfinite().all()


def test_a_uniform_guide_is_logit_normal() -> None:
    guide = AutoAmortized(
        model_of(dist.Uniform(torch.tensor(-1.0), torch.tensor(3.0))), Constant()
    )
    guide.setup(torch.zeros(N))
    with torch.no_grad():
        guide.heads["z"].linear.bias.copy_(torch.tensor([0.4, -1.0]))
    value = torch.tensor([-0.5, 0.2, 1.0, 2.2, 2.9], dtype=torch.float64)
    unit = (value + 1) / 4
    normal = torch.distributions.Normal(0.4, torch.tensor(-1.0).double().exp())
    expected = normal.log_prob(unit.logit()) - (unit * (1 - unit)).log() - torch.tensor(4.0).log()
    actual = guide.posterior(torch.zeros(N))["z"].log_prob(value.float())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prior", [prior for prior, _ in SAME_FAMILY] + TRANSPORTED, ids=ids)
@pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorized"])
def test_gradients_reach_the_encoder(prior: Any, vectorize: bool) -> None:
    encoder = nn.Linear(1, 4)
    model = model_of(prior)
    guide = AutoAmortized(lambda x: model(x[:, 0]), encoder)
    x = torch.linspace(-1, 1, N)[:, None]
    elbo = Estimator_ELBO(4, vectorize_particles=vectorize)
    assert torch.isfinite(elbo.loss_and_grads(guide.model, guide, x))
    gradient = torch.cat([parameter.grad.flatten() for parameter in encoder.parameters()])
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    "prior", [prior for prior, _ in SAME_FAMILY if prior.support.is_discrete], ids=ids
)
def test_mean_field_guide_starts_at_the_prior(prior: Any) -> None:
    fn = AutoDiscrete(model_of(prior)).posterior(torch.zeros(N))["z"]
    value = prior.sample((N,))
    torch.testing.assert_close(fn.log_prob(value), prior.log_prob(value), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_impossible_categories_start_finite(dtype: torch.dtype) -> None:
    prior = OneHot(torch.tensor([0.0, 0.4, 0.6], dtype=dtype))
    guide = AutoDiscrete(model_of(prior))
    probs = guide.posterior(torch.zeros(N, dtype=dtype))["z"].probs
    assert probs.dtype == dtype
    assert guide.heads["z"].raw.isfinite().all()
    torch.testing.assert_close(probs, prior.probs.expand(N, 3), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("prior", "match"),
    [
        (dist.Multinomial(3, PROBS), "'z' is a Multinomial .*has no head.*AutoGuideList"),
        (
            dist.Binomial(torch.arange(1.0, N + 1), torch.tensor(0.5)),
            "total_count differs between",
        ),
        (dist.Delta(torch.tensor(1.0)), "'z' is a Delta.*pyro.deterministic"),
        (
            dist.Uniform(torch.zeros(N), torch.arange(1.0, N + 1)),
            "'z' has a support that differs between elements",
        ),
    ],
    ids=ids,
)
def test_sites_without_a_head(prior: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AutoAmortized(model_of(prior), Constant())(torch.zeros(N))
