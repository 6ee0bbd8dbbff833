"""The manual's tutorials run, and each exercise has a solution."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.tutorials import TUTORIALS, code_cells, run
from matplotlib import pyplot
from pyro.infer import SVI
from pyro.ops.indexing import Vindex
from torch import nn

from pyro_gumbel.diagnostics import check_unbiased, compare_gradients, exact_gradient
from pyro_gumbel.diagnostics import gradient_draws as draw
from pyro_gumbel.distributions.families import is_bit
from pyro_gumbel.estimators import Estimator, ReinMax, Relax, Site, StraightThrough
from pyro_gumbel.infer import (
    CapturedSVI,
    Estimator_ELBO,
    config_gradient,
    load_checkpoint,
    recover,
    save_checkpoint,
)

Names = SimpleNamespace  # those that a tutorial's cells define
Solution = Callable[[Names], None]
SOLUTIONS: dict[str, Solution] = {}


def solution(solve: Solution) -> Solution:
    SOLUTIONS[solve.__name__] = solve
    return solve


def test_every_exercise_has_a_solution() -> None:
    assert set(SOLUTIONS) == set(TUTORIALS)


@pytest.mark.parametrize("name", TUTORIALS)
def test_outline(name: str) -> None:
    """It begins with the problem, states its seed, asserts figures, and ends with an exercise."""
    text, cells = TUTORIALS[name].read_text(), "\n".join(code_cells(TUTORIALS[name]))
    assert re.search(r"\A---\n.*?\n---\n\n# [^\n]+\n\n\*\*The problem\.\*\* ", text, re.S)
    assert re.findall(r"^## (.*)", text, re.M)[-1] == "Exercise"
    assert "set_rng_seed(" in cells or "seed=SEED" in cells
    assert max(map(len, cells.splitlines())) <= 88  # the width of a page
    assert re.search(r"^ *(assert |torch\.testing\.assert_close\()", cells, re.M)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLUTIONS)
def test_tutorial_and_solution(name: str) -> None:
    names = run(TUTORIALS[name])
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    SOLUTIONS[name](SimpleNamespace(**names))
    pyplot.close("all")


@solution
def first_discrete_latent(names: Names) -> None:
    class Categories(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Sequential(nn.Linear(80, 128), nn.LeakyReLU(), nn.Linear(128, 64))
            self.encoder = nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(), nn.Linear(128, 80))

        def model(self, x: torch.Tensor) -> None:
            pyro.module("categories", self)
            with pyro.plate("images", len(x)):
                prior = dist.OneHotCategorical(logits=torch.zeros(10, 8))
                z = pyro.sample("z", prior.to_event(1)).flatten(-2)
                pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

        def guide(self, x: torch.Tensor) -> None:
            with pyro.plate("images", len(x)):
                logits = self.encoder(x).unflatten(-1, (10, 8))
                pyro.sample("z", dist.OneHotCategorical(logits=logits).to_event(1))

    net = Categories()
    refused = config_gradient(net.guide, {"z": "disarm"})
    with pytest.raises(ValueError, match=r"does not support .*disarm_tree"):
        Estimator_ELBO().loss(net.model, refused, names.held_out)
    guide = config_gradient(net.guide, {"z": "reinmax"})
    svi = SVI(net.model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=Estimator_ELBO())
    for _ in range(20):
        for batch in names.training[torch.randperm(1500)].split(50):
            svi.step(batch)
    assert names.nats_per_image(net, Estimator_ELBO(num_particles=20)) < names.reference - 3


@solution
def which_estimator(names: Names) -> None:
    net = names.trained(dist.OneHotCategorical, (3, 4), steps=300)
    table = names.measure(net, {"r": ReinMax(), "s": StraightThrough()})
    assert table.relative_bias["r"] < table.relative_bias["s"] / 2
    assert table.relative_std["r"] > table.relative_std["s"]


@solution
def gradients_in_arviz(names: Names) -> None:
    labels = ["reinmax", "straight_through", "disarm_tree", "score", "local_expectation"]
    draws = draw(
        names.model,
        names.guide,
        names.data,
        estimators={label: label for label in labels},
        num_draws=60,
        progress=False,
    )
    exact = exact_gradient(names.model, names.guide, names.data)
    table = compare_gradients(draws, exact, by="parameter").xs("logits", level="parameter")
    assert table.mse.idxmin() == table.variance.idxmin() == "local_expectation"
    # Less noise, and more error: the bias.
    assert table.variance["straight_through"] < table.variance["disarm_tree"]
    assert table.bias["straight_through"] > 5 * table.bias["disarm_tree"]


@solution
def from_pyro(names: Names) -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            w = pyro.sample("w", dist.Bernoulli(0.5))
            weights = torch.tensor([0.4, 0.6])
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(torch.tensor([-2.0, 2.0])[z] + w, 1.0), obs=x)

    @config_gradient(config={"w": "disarm"})
    def guide(x: torch.Tensor) -> None:
        logits = pyro.param("w_logits", torch.zeros(len(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("w", dist.Bernoulli(logits=logits))

    # The states of one datum are independent of the others', so three data show it.
    x = names.data[:3] + torch.tensor([0.0, 0.5, 1.0])
    logits = torch.tensor([0.5, -0.5, 1.0])
    params = {"w_logits": logits}
    found = check_unbiased(model, guide, x, estimator="disarm", num_draws=300, params=params)
    assert found.z < 5


@solution
def tighter_bounds(names: Names) -> None:
    elbos = {}
    for particles in (2, 5, 20):
        names.fitted(names.ImportanceWeighted_ELBO(particles, vectorize_particles=True))
        loss = Estimator_ELBO(2000, vectorize_particles=True)
        elbos[particles] = -loss.loss(names.model, names.guide, names.x)
    assert min(elbos, key=elbos.__getitem__) == 20


@solution
def relaxing_for_hmc(names: Names) -> None:
    relaxed, mcmc = names.sample(0.25)
    assert (names.state_probabilities(relaxed, mcmc) - names.exact).abs().max() < 0.25
    before = names.mcmc.diagnostics()["z_log"]["n_eff"]
    assert mcmc.diagnostics()["z_log"]["n_eff"].min() < before.min()


@solution
def own_estimator(names: Names) -> None:
    class Centred(Estimator):
        unbiased = True
        sites = "Bernoulli"
        families = (is_bit,)

        def surrogate(self, site: Site) -> torch.Tensor:
            cost = site.cost[0]
            return (cost - cost.mean()) * site.log_prob

    # The mean has the element's own cost in it: at a site without a plate nothing is left.
    with pytest.raises(AssertionError, match="biased: at "):
        check_unbiased(names.model, names.guide, names.x, estimator=Centred(), num_draws=2000)


@solution
def sum_what_can_be_summed(names: Names) -> None:
    def hmm(x: torch.Tensor) -> None:
        simplex = dist.constraints.simplex
        logits = pyro.param("initial", torch.ones(3) / 3, constraint=simplex).log()
        means = pyro.param("means", torch.tensor([-2.0, 0.0, 2.0]))
        transition = pyro.param("transition", torch.eye(3) + 0.1, constraint=simplex)
        for t in pyro.markov(range(len(x))):
            infer = {"enumerate": "parallel"}
            z = pyro.sample(f"z_{t}", dist.Categorical(logits=logits), infer=infer)
            pyro.sample(f"x_{t}", dist.Normal(means[z], 0.6), obs=x[t])
            logits = Vindex(transition.log())[z]

    x = names.series
    svi = SVI(hmm, names.no_guide, pyro.optim.Adam({"lr": 0.1}), Estimator_ELBO())
    for _ in range(20):
        svi.step(x)
    assert pyro.param("initial").argmax() == names.path[0]
    drawn = recover(hmm, names.no_guide, x, num_samples=200)["z_20"]
    exact = recover(hmm, names.no_guide, x, marginals=True)["z_20"][0].detach()
    frequencies = torch.bincount(drawn.flatten(), minlength=3) / 200
    error = (exact * (1 - exact) / 200).sqrt()
    assert ((frequencies - exact).abs() < 5 * error + 0.01).all()


@solution
def fast(names: Names) -> None:
    state = {"beta": 1.0}

    def model(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.randn(4, 8))
        with pyro.poutine.scale(scale=state["beta"]), pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(logits=torch.zeros(4)))
            pyro.sample("x", dist.Normal(z @ loc, 1.0).to_event(1), obs=x)

    guide = config_gradient(names.guide, "reinmax")
    optim = pyro.optim.Adam({"lr": 0.01})
    svi = CapturedSVI(model, guide, optim, Estimator_ELBO(), check_every=1)
    for _ in range(3):
        svi.step(names.data)
    state["beta"] = 0.5
    with pytest.raises(RuntimeError, match=r"Pass what changes as an argument, as a tensor"):
        svi.step(names.data)


@solution
def inside_other_trainers(names: Names) -> None:
    critic = nn.Linear(16, 1)
    before = critic.weight.detach().clone()
    guide = config_gradient(names.Guide(), {"z": Relax(critic)})
    loss = Estimator_ELBO(vectorize_particles=True)(names.Model(), guide)
    assert any(parameter is critic.weight for parameter in loss.parameters())
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    for batch in names.images[:200].split(50):
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
    assert not torch.equal(critic.weight, before)


@solution
def stop_and_resume(names: Names) -> None:
    def start() -> tuple[SVI, pyro.optim.PyroLRScheduler]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        settings = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.8}
        scheduler = pyro.optim.ExponentialLR(settings)
        guide = config_gradient(names.guide, {"z": "reinmax"})
        return SVI(names.model, guide, scheduler, Estimator_ELBO()), scheduler

    def go_on(svi: SVI, scheduler: pyro.optim.PyroLRScheduler) -> list[float]:
        losses = []
        for _ in range(4):
            losses.append(svi.step(names.data))
            scheduler.step()
        return losses

    path = names.folder / "scheduled.pt"
    svi, scheduler = start()
    go_on(svi, scheduler)
    save_checkpoint(path, svi)
    expected = go_on(svi, scheduler)
    svi, scheduler = start()
    load_checkpoint(path, svi)
    assert go_on(svi, scheduler) == expected
