"""Programs whose plates or control flow change between steps, and losses within programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_gumbel.estimators import Enumerate, LocalExpectation, Rebar, ReinMax
from pyro_gumbel.infer import Estimator_ELBO, ImportanceWeighted_ELBO, config_gradient


def guide() -> None:
    logits = pyro.param("logits", torch.tensor([0.4, -0.2, 0.1]))
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Bernoulli(logits=logits))


def model() -> None:
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))


class Deepening:
    """Two programs; after some steps their site is in one more plate."""

    deep = False

    def model(self) -> None:
        with self.plates():
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.5))

    def guide(self) -> None:
        with self.plates():
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.3))))

    def plates(self) -> Any:
        return pyro.plate_stack("data", [4, 3] if self.deep else [3])


@pytest.mark.parametrize("estimator", ["score", "disarm", "local_expectation", "rebar", "reinmax"])
@pytest.mark.parametrize("num_particles", [1, 2])
def test_plates_that_come_up_later(estimator: str, num_particles: int) -> None:
    programs = Deepening()
    guide = config_gradient(programs.guide, estimator)
    elbo = Estimator_ELBO(num_particles, vectorize_particles=True)
    elbo.loss_and_grads(programs.model, guide)
    programs.deep = True
    for _ in range(2):
        assert torch.isfinite(elbo.loss_and_grads(programs.model, guide))
    assert elbo.loss(programs.model, guide) > 0


@pytest.mark.parametrize("estimator", ["score", "disarm"])
def test_too_few_plates_are_named(estimator: str) -> None:
    elbo = Estimator_ELBO(vectorize_particles=True, max_plate_nesting=0)
    with pytest.raises(ValueError, match="max_plate_nesting is 0, and the programs' plates take"):
        elbo.loss_and_grads(model, config_gradient(guide, estimator))


@pytest.mark.parametrize("nesting", [1, float("inf")])
def test_a_vectorised_loss_within_another(nesting: float) -> None:
    """Pyro has one plate of a name at a time."""

    def outer() -> None:
        with poutine.block():
            Estimator_ELBO(2, vectorize_particles=True).loss(model, guide)
        guide()

    elbo = Estimator_ELBO(2, vectorize_particles=True, max_plate_nesting=nesting)
    with pytest.raises(ValueError, match="duplicate plate"):
        elbo.loss(model, outer)


def test_enumeration_runs_programs_once_beside_the_preflight() -> None:
    norm, runs = nn.BatchNorm1d(3), []

    def encoding() -> None:
        runs.append(1)
        norm(torch.randn(5, 3))
        guide()

    elbo, configured = Estimator_ELBO(), config_gradient(encoding, Enumerate())
    for _ in range(3):
        elbo.loss_and_grads(model, configured)
    assert len(runs) == 1 + 3
    assert norm.num_batches_tracked == 3


@pytest.mark.parametrize("make", [ReinMax, LocalExpectation])
def test_programs_that_read_numbers_are_followed_ever_more_rarely(
    make: Callable[[], Any],
) -> None:
    runs = []

    def reading(x: Tensor) -> None:
        runs.append(x.mean().item())
        model()

    elbo, configured = Estimator_ELBO(), config_gradient(lambda x: guide(), make())
    branches = 2 if make is LocalExpectation else 1
    for _ in range(16):
        elbo.loss_and_grads(reading, configured, torch.ones(2))
    assert len(runs) == 16 * branches + 4  # followed anew in passes 2, 4, 8 and 16


def test_a_jump_that_later_data_meet() -> None:
    table = torch.tensor([-1.0, 0.5])

    def reading(x: Tensor) -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            mean = z if x.sum() > 0 else table[z.long()]
            pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.zeros(3))

    elbo, configured = Estimator_ELBO(), config_gradient(lambda x: guide(), Rebar())
    for _ in range(5):
        elbo.loss_and_grads(reading, configured, torch.ones(2))
    for _ in range(2):  # passes 6 and 7
        elbo.loss_and_grads(reading, configured, -torch.ones(2))
    for _ in range(2):
        with pytest.raises(ValueError, match="site 'x' depends on the value without one"):
            elbo.loss_and_grads(reading, configured, -torch.ones(2))


def test_doubly_reparameterized_bounds_follow_them_as_rarely() -> None:
    runs = []

    def reading(x: Tensor) -> None:
        runs.append(x.mean().item())
        pyro.sample("y", dist.Normal(0.0, 1.0))

    def proposal(x: Tensor) -> None:
        pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 1.0))

    elbo = ImportanceWeighted_ELBO(2, doubly_reparameterized=True)
    for _ in range(8):
        elbo.loss_and_grads(reading, proposal, torch.ones(2))
    assert len(runs) == 8 * 2 + 4  # of their own after 2, 4, 8 and 16 passes


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("place", ["model", "guide"])
@pytest.mark.parametrize("estimator", ["score", "disarm", "enumerate", "local_expectation"])
def test_values_that_are_changed_in_place(estimator: str, place: str, vectorize: bool) -> None:
    def sample(logits: Tensor, program: str) -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(logits=logits))
            if place == program:
                z[..., :1] = 0.0

    configured = config_gradient(
        lambda: sample(pyro.param("logits", torch.zeros(3)), "guide"), estimator
    )
    elbo = Estimator_ELBO(2, vectorize_particles=vectorize)
    with pytest.raises(ValueError, match="site 'z' was changed in place"):
        elbo.loss_and_grads(lambda: sample(torch.ones(3), "model"), configured)
    with pytest.raises(ValueError, match="site 'z' was changed in place"):
        elbo.loss(lambda: sample(torch.ones(3), "model"), configured)


@pytest.mark.parametrize("estimator", ["disarm", "local_expectation", "reinmax"])
def test_the_first_step_under_a_function_transform(estimator: str) -> None:
    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([0.4, -0.2, 0.1]))

        def forward(self) -> None:
            with pyro.plate("data", 3):
                pyro.sample("z", dist.Bernoulli(logits=self.logits))

    class Model(nn.Module):
        def forward(self) -> None:
            model()

    loss = Estimator_ELBO()(Model(), config_gradient(Guide(), estimator))
    parameters = {name: tensor.detach() for name, tensor in loss.named_parameters()}
    gradients = []
    for _ in range(2):
        pyro.set_rng_seed(0)
        step = torch.func.grad(lambda values: torch.func.functional_call(loss, values, ()))
        gradients.append(step(parameters)["guide.logits"])
    assert (gradients[0] != 0).any()
    torch.testing.assert_close(*gradients)
