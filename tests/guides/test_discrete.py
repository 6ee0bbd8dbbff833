"""AutoDiscrete against exact posteriors, with other guides, under subsampling; its errors."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.guide_programs import LOCS, WEIGHTS, X, log_joint, mixture
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_value
from torch import Tensor

from pyro_gumbel.estimators import ReinMax
from pyro_gumbel.guides import AutoDiscrete
from pyro_gumbel.infer import Estimator_ELBO


def set_exact(guide: AutoDiscrete, *args: Any) -> None:
    guide.setup(*args)
    with torch.no_grad():
        guide.heads["z"].raw.copy_(log_joint(X))


@pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorized"])
def test_exact_posterior_gives_the_evidence_in_every_draw(vectorize: bool) -> None:
    guide = AutoDiscrete(mixture)
    set_exact(guide, X)
    loss = Estimator_ELBO(2, vectorize_particles=vectorize).loss(mixture, guide, X)
    assert loss == pytest.approx(-log_joint(X).logsumexp(-1).sum().item(), rel=1e-6)


@pytest.mark.parametrize("first", [None, 2])
def test_subsampled_elements_use_their_own_parameters(first: int | None) -> None:
    guide = AutoDiscrete(mixture)
    set_exact(guide, X, first)
    elbo = Estimator_ELBO(2, vectorize_particles=True, max_plate_nesting=1)
    # With subsamples of one datum each loss is that datum's evidence, five times.
    possible = -5 * log_joint(X).logsumexp(-1)
    losses = torch.tensor([elbo.loss(mixture, guide, X, 1) for _ in range(100)])
    distance = (losses[:, None] - possible).abs()
    assert (distance.min(-1).values < 1e-4).all()
    assert set(distance.argmin(-1).tolist()) == set(range(5))


def test_posterior_and_median_have_all_elements() -> None:
    guide = AutoDiscrete(mixture)
    set_exact(guide, X, 2)
    expected = log_joint(X).argmax(-1)
    assert torch.equal(guide.median(X, 2)["z"].argmax(-1), expected)
    probs = guide.posterior(X, 2)["z"].probs
    torch.testing.assert_close(probs, log_joint(X).softmax(-1))
    assert guide(X, 2)["z"].shape == (2, 3)  # a step's is of its subsample, as before


# At the posterior each draw gives the evidence, so the score function, like a sum, has no noise
# there, and what is left is the rest of the way. ReinMax has noise: with these particles, a
# standard deviation of up to 0.006 in a probability, over ten seeds.
REST_OF_THE_WAY = 2e-3
FIVE_DEVIATIONS_OF_REINMAX = 0.03


@pytest.mark.parametrize(
    ("gradient", "distance"),
    [
        ("enumerate", REST_OF_THE_WAY),
        ({"z": "score"}, REST_OF_THE_WAY),
        ("reinmax", FIVE_DEVIATIONS_OF_REINMAX),
        (ReinMax(), FIVE_DEVIATIONS_OF_REINMAX),
    ],
)
def test_training_finds_the_posterior(gradient: Any, distance: float) -> None:
    guide = AutoDiscrete(mixture, gradient=gradient)
    elbo = Estimator_ELBO(64, vectorize_particles=True, max_plate_nesting=1)
    optim = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.99, "betas": (0.9, 0.95)})
    svi = SVI(mixture, guide, optim, elbo)
    for _ in range(400):
        svi.step(X)
    probs = guide.posterior(X)["z"].probs
    torch.testing.assert_close(probs, log_joint(X).softmax(-1), rtol=0, atol=distance)
    assert torch.equal(guide.median(X)["z"].argmax(-1), log_joint(X).argmax(-1))


@pytest.mark.parametrize("kind", ["bernoulli", "categorical"])
def test_other_families(kind: str) -> None:
    """Bits and indices: the exact mean-field posterior by enumeration."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            if kind == "bernoulli":
                z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)).expand([1]).to_event(1))[
                    ..., 0
                ]
                loc = LOCS[0] + (LOCS[1] - LOCS[0]) * z
            else:
                loc = LOCS[pyro.sample("z", dist.Categorical(WEIGHTS))]
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    prior = torch.tensor([0.7, 0.3]) if kind == "bernoulli" else WEIGHTS
    joint = prior.log() + dist.Normal(LOCS[: len(prior)], 1.0).log_prob(X[:, None])
    guide = AutoDiscrete(model)
    guide.setup(X)
    raw = joint[:, 1:] - joint[:, :1] if kind == "bernoulli" else joint
    with torch.no_grad():
        guide.heads["z"].raw.copy_(raw.reshape(guide.heads["z"].raw.shape))
    loss = Estimator_ELBO().loss(model, guide, X)
    assert loss == pytest.approx(-joint.logsumexp(-1).sum().item(), rel=1e-6)


def test_beside_another_guide() -> None:
    """Locations by AutoNormal, assignments by AutoDiscrete: the usual mixture."""
    pyro.set_rng_seed(2)
    x = torch.cat([torch.randn(30) * 0.3 - 2, torch.randn(30) * 0.3 + 2])

    def model(x: Tensor) -> None:
        with pyro.plate("components", 2):
            loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(torch.ones(2)))
            pyro.sample("x", dist.Normal((z * loc).sum(-1), 0.3), obs=x)

    guide = AutoGuideList(model)
    start = init_to_value(values={"loc": torch.tensor([-0.5, 0.5])})
    guide.append(AutoNormal(poutine.block(model, hide=["z"]), init_loc_fn=start))
    guide.append(AutoDiscrete(poutine.block(model, hide=["loc"]), gradient="reinmax"))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Estimator_ELBO())
    for _ in range(400):
        svi.step(x)
    median = guide.median(x)
    # Steps of .05 keep a location within three of its posterior's standard deviations.
    distance = median["loc"] - torch.stack([x[:30].mean(), x[30:].mean()])
    assert distance.abs().max() < 3 * 0.3 / 30**0.5
    assert median["z"].argmax(-1).tolist() == [0] * 30 + [1] * 30


def test_continuous_latents_are_left_alone() -> None:
    def model(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.4)))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    assert list(AutoDiscrete(model)(X)) == ["z"]


def only_continuous(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(torch.tensor(0.4)), obs=torch.ones(len(x)))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def in_a_loop(x: Tensor) -> None:
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"z_{i}", dist.Bernoulli(torch.tensor(0.4)))


def masked(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(torch.tensor(0.4)).mask(x > 0))


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (only_continuous, r"no discrete latent site; its latent sites are \['loc'\].*remove"),
        (in_a_loop, "'z_0' is in the sequential plate 'data'"),
        (masked, "'z' is masked in the model"),
    ],
)
def test_errors(model: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AutoDiscrete(model)(X)


def test_other_data_than_at_setup() -> None:
    guide = AutoDiscrete(mixture)
    guide(X)
    with pytest.raises(ValueError, match="'data' had 5 elements .* and has 3 now.*AutoAmortized"):
        guide(X[:3])


def test_observed_site_in_the_config() -> None:
    with pytest.raises(ValueError, match="'x', which is observed"):
        AutoDiscrete(mixture, gradient={"x": "reinmax"})(X)
