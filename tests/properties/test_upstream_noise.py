"""Random numbers outside of sites, before a site whose estimator draws several values."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_gumbel.infer import Estimator_ELBO, config_gradient

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


class Programs(nn.Module):
    """A guide whose encoder drops inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def model(self, x: torch.Tensor) -> None:
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(self, x: torch.Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("n", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)[:, 0]))


def step(elbo: Estimator_ELBO, programs: Programs, choice: str) -> torch.Tensor:
    return elbo.loss_and_grads(programs.model, config_gradient(programs.guide, choice), X)


@pytest.mark.parametrize("choice", ["disarm", "arms", "rebar", "double_control_variate"])
def test_looped_branches_with_noise_of_their_own_are_refused(choice: str) -> None:
    with pytest.raises(ValueError, match="At site 'z'.*dropout"):
        step(Estimator_ELBO(), Programs(), choice)


@pytest.mark.parametrize("choice", ["local_expectation", "rebar"])
def test_branches_in_later_passes_are_refused(choice: str) -> None:
    with pytest.raises(ValueError, match="At site 'z'.*dropout"):
        step(Estimator_ELBO(vectorize_particles=True), Programs(), choice)


def test_rows_that_share_the_noise_are_served() -> None:
    assert step(Estimator_ELBO(vectorize_particles=True), Programs(), "disarm").isfinite()


@pytest.mark.parametrize("choice", ["disarm", "rebar", "local_expectation"])
@pytest.mark.parametrize("vectorize", [False, True])
def test_evaluation_mode_is_served(choice: str, vectorize: bool) -> None:
    elbo = Estimator_ELBO(vectorize_particles=vectorize)
    assert step(elbo, Programs().eval(), choice).isfinite()


@pytest.mark.parametrize("choice", ["score", "reinmax", "enumerate"])
@pytest.mark.parametrize("vectorize", [False, True])
def test_single_values_are_served(choice: str, vectorize: bool) -> None:
    elbo = Estimator_ELBO(2, vectorize_particles=vectorize)
    assert step(elbo, Programs(), choice).isfinite()


def test_rows_with_noise_of_their_own_are_refused() -> None:
    def guide() -> None:
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Bernoulli(logits=u + torch.rand(u.shape)))

    def model() -> None:
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Bernoulli(logits=u))

    elbo = Estimator_ELBO(2, vectorize_particles=True)
    with pytest.raises(ValueError, match="At site 'z'.*outside of sample sites"):
        elbo.loss_and_grads(model, config_gradient(guide, {"z": "disarm"}))
