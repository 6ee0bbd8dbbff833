"""The number of runs of the programs, and the state that a step leaves unchanged."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoHierarchicalNormalMessenger,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
)
from torch import nn
from torch.distributions import Distribution

from pyro_gumbel.estimators import DisARM
from pyro_gumbel.infer import Estimator_ELBO, ImportanceWeighted_ELBO, config_gradient

DATA = torch.tensor([2.0, 3.0, 4.0])
ELBOS = {
    "looped": lambda: Estimator_ELBO(2),
    "vectorised": lambda: Estimator_ELBO(2, vectorize_particles=True),
    "importance": lambda: ImportanceWeighted_ELBO(2, vectorize_particles=True),
}
PASSES = {"looped": 2, "vectorised": 1, "importance": 1}
PREFLIGHTS = {"looped": 0, "vectorised": 1, "importance": 1}


class Counted:
    """A program that counts its runs."""

    def __init__(self, program: Callable[..., Any]) -> None:
        self.program = program
        self.runs = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.runs += 1
        return self.program(*args, **kwargs)


def model(x: torch.Tensor = DATA) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(3 * z, 1.0), obs=x)


def guide(x: torch.Tensor = DATA) -> None:
    logits = pyro.param("logits", torch.zeros(3))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=logits))


@pytest.mark.parametrize("kind", ELBOS)
def test_one_run_a_pass_beside_the_preflight(kind: str) -> None:
    elbo = ELBOS[kind]()
    pair = Counted(model), Counted(guide)
    for _ in range(5):
        elbo.loss_and_grads(*pair)
    assert [program.runs for program in pair] == [PREFLIGHTS[kind] + 5 * PASSES[kind]] * 2
    elbo.loss(*pair)
    assert [program.runs for program in pair] == [PREFLIGHTS[kind] + 6 * PASSES[kind]] * 2


def test_branches_run_once_each() -> None:
    pair = Counted(model), Counted(config_gradient(guide, DisARM()))
    elbo = Estimator_ELBO()
    for _ in range(3):
        elbo.loss_and_grads(*pair)
    assert [program.runs for program in pair] == [3 * 2] * 2


@pytest.mark.parametrize("kind", ELBOS)
def test_two_pairs_in_turn_need_one_preflight_each(kind: str) -> None:
    elbo = ELBOS[kind]()
    pairs = [(Counted(model), Counted(guide)) for _ in range(2)]
    for _ in range(5):
        for pair in pairs:
            elbo.loss_and_grads(*pair)
    runs = [program.runs for pair in pairs for program in pair]
    assert runs == [PREFLIGHTS[kind] + 5 * PASSES[kind]] * 4


def test_methods_of_one_object_need_one_preflight() -> None:
    class Programs:
        def __init__(self) -> None:
            self.runs = 0

        def model(self) -> None:
            self.runs += 1
            model()

        def guide(self) -> None:
            guide()

    programs, elbo = Programs(), Estimator_ELBO(vectorize_particles=True)
    for _ in range(4):
        elbo.loss_and_grads(programs.model, programs.guide)
    assert programs.runs == 5


def test_structures_of_arguments_have_plans_of_their_own() -> None:
    def partly(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3), obs=y)
            pyro.sample("x", dist.Normal(3 * z, 1.0), obs=x)

    def guide_partly(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        if y is None:
            guide(x)

    pair = Counted(partly), Counted(guide_partly)
    elbo = Estimator_ELBO(vectorize_particles=True)
    for _ in range(4):
        elbo.loss_and_grads(*pair, DATA)
        elbo.loss_and_grads(*pair, DATA, torch.ones(3))
    assert pair[0].runs == 2 + 8


@pytest.mark.parametrize("kind", ELBOS)
@pytest.mark.parametrize("error", [ValueError, RuntimeError, IndexError, KeyError])
@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_an_error_of_a_program_is_raised_once(
    kind: str, error: type[Exception], step: int
) -> None:
    elbo, counted = ELBOS[kind](), Counted(model)
    fails = False

    def failing(x: torch.Tensor = DATA) -> None:
        counted(x)
        if fails:
            raise error("of the user's own")

    for _ in range(step - 1):
        elbo.loss_and_grads(failing, guide)
    runs, fails = counted.runs, True
    with pytest.raises(error, match="of the user's own"):
        elbo.loss_and_grads(failing, guide)
    assert counted.runs == runs + 1  # not run again
    fails = False
    elbo.loss_and_grads(failing, guide)


@pytest.mark.parametrize("kind", ELBOS)
def test_batch_norm_sees_a_batch_a_pass(kind: str) -> None:
    norm = nn.BatchNorm1d(1)
    twin = nn.BatchNorm1d(1)

    def normed(x: torch.Tensor) -> None:
        pyro.module("norm", norm)
        logits = norm(x[:, None])[:, 0]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=logits))

    for config in (normed, config_gradient(normed, "rebar")):
        norm.load_state_dict(twin.state_dict())
        elbo = ELBOS[kind]() if config is normed else Estimator_ELBO()
        elbo.loss_and_grads(model, config, DATA)
        passes = PASSES[kind] if config is normed else 3
        assert norm.num_batches_tracked == passes
        fresh = nn.BatchNorm1d(1)
        for _ in range(passes):
            fresh(DATA[:, None])
        assert torch.equal(norm.running_mean, fresh.running_mean)
        assert torch.equal(norm.running_var, fresh.running_var)


@pytest.mark.parametrize("kind", ELBOS)
def test_torchs_switch_of_validation_is_left_alone(kind: str) -> None:
    seen = []

    def looking() -> None:
        seen.append(Distribution.__dict__["_validate_args"])
        model()

    elbo = ELBOS[kind]()
    for _ in range(4):
        elbo.loss_and_grads(looking, guide)
    assert set(seen) == {True}


@pytest.mark.parametrize("kind", ELBOS)
@pytest.mark.parametrize("step", [1, 2, 3, 30])
def test_a_distribution_at_no_site_is_checked_at_every_step(kind: str, step: int) -> None:
    scale = 1.0

    def scored_by_hand() -> None:
        model()
        pyro.factor("prior", dist.Normal(0.0, scale).log_prob(torch.tensor(0.3)))

    elbo = ELBOS[kind]()
    for _ in range(step - 1):
        elbo.loss_and_grads(scored_by_hand, guide)
    scale = -1.0
    with pytest.raises(ValueError, match="scale"):
        elbo.loss_and_grads(scored_by_hand, guide)


@pytest.mark.parametrize("where", ["guide", "model"])
@pytest.mark.parametrize("same", [True, False])
def test_an_elbo_within_a_program(where: str, same: bool) -> None:
    outer = Estimator_ELBO(2)
    inner = outer if same else Estimator_ELBO()
    losses = []

    def within() -> None:
        with poutine.block():
            losses.append(inner.differentiable_loss(model, guide))

    def outer_model() -> None:
        if where == "model":
            within()
        pyro.sample("w", dist.Bernoulli(0.4))

    def outer_guide() -> None:
        if where == "guide":
            within()
        pyro.sample("w", dist.Bernoulli(pyro.param("p", torch.tensor(0.4))))

    loss = outer.loss_and_grads(outer_model, outer_guide)
    assert abs(loss) < 1e-6
    assert len(losses) == 2
    assert all(torch.isfinite(value) for value in losses)


def test_a_step_beside_another_threads_is_refused() -> None:
    inside, go_on = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def waiting() -> None:
        model()
        inside.set()
        go_on.wait(30)

    def run() -> None:
        try:
            Estimator_ELBO().loss(waiting, guide)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert inside.wait(30)
    with pytest.raises(RuntimeError, match="Another thread is running a step"):
        Estimator_ELBO().loss_and_grads(model, guide)
    go_on.set()
    thread.join()
    assert errors == []
    Estimator_ELBO().loss_and_grads(model, guide)


def test_fresh_programs_leave_nothing_behind() -> None:
    elbo = Estimator_ELBO(vectorize_particles=True)

    def take(count: int) -> None:
        for _ in range(count):
            elbo.loss(lambda: model(), lambda: guide())

    take(20)
    gc.collect()
    before = len(gc.get_objects())
    take(200)
    gc.collect()
    assert len(gc.get_objects()) - before < 100


@pytest.mark.parametrize("vectorize", [False, True])
def test_structure_that_changes_from_step_to_step(vectorize: bool) -> None:
    # The flag decides which of two bits there are; the gradient of each is known.
    flags = {"second": False}
    count = 4_000

    def varying(p: torch.Tensor, q: torch.Tensor) -> None:
        with pyro.plate("n", count):
            pyro.sample("first", dist.Bernoulli(logits=p))
            if flags["second"]:
                with pyro.plate("m", 2, dim=-2):
                    pyro.sample("second", dist.Bernoulli(logits=q))

    def its_model() -> None:
        varying(torch.tensor(1.0), torch.tensor(-2.0))

    def its_guide() -> None:
        varying(*(pyro.param(name, torch.tensor(0.0)) for name in "pq"))

    pair = Counted(its_model), config_gradient(its_guide, DisARM())
    elbo = Estimator_ELBO(vectorize_particles=vectorize)
    gradients: dict[tuple[bool, str], list[float]] = {}
    for step in range(24):
        flags["second"] = step % 4 in (1, 3)
        for name in "pq":
            if name in pyro.get_param_store():
                pyro.get_param_store()._params[name].grad = None
        elbo.loss_and_grads(*pair)
        for name in "pq":
            grad = pyro.get_param_store()._params[name].grad
            value = 0.0 if grad is None else grad.item()
            gradients.setdefault((flags["second"], name), []).append(value / count)
    # d KL / d logit = q (1 - q) (logit - prior logit) at logit 0
    exact = {(False, "p"): -0.25, (True, "p"): -0.25, (False, "q"): 0.0, (True, "q"): 1.0}
    for key, values in gradients.items():
        found = torch.tensor(values)
        error = found.std() / len(values) ** 0.5
        assert error < 0.01
        assert abs(found.mean() - exact[key]) < 5 * error + 1e-9


@pytest.mark.parametrize("vectorize", [True, False])
def test_options_may_change_between_steps(vectorize: bool) -> None:
    count = 400

    def plated(logits: torch.Tensor) -> None:
        with pyro.plate("n", count):
            pyro.sample("z", dist.Bernoulli(logits=logits))

    def its_model() -> None:
        plated(torch.tensor(-1.0))

    def its_guide() -> None:
        plated(pyro.param("l", torch.tensor(0.0)))

    elbo = Estimator_ELBO(4, vectorize_particles=vectorize)
    elbo.loss(its_model, its_guide)
    for options in (
        {"num_particles": 16},
        {"num_particles": 3},
        {"vectorize_particles": not vectorize},
        {"default": "disarm"},
        {"vectorize_particles": vectorize},
        {"default": "enumerate"},
        {"num_particles": 1},
        {"default": "reinmax"},
    ):
        for name, value in options.items():
            setattr(elbo, name, value)
        draws = []
        for _ in range(30):
            pyro.param("l").unconstrained().grad = None
            elbo.loss_and_grads(its_model, its_guide)
            draws.append(pyro.param("l").unconstrained().grad / count)
        found = torch.stack(draws)
        error = found.std() / len(draws) ** 0.5
        assert error < 0.02
        assert abs(found.mean() - 0.25) < 5 * error + 1e-5, options


MESSENGERS = [AutoNormalMessenger, AutoHierarchicalNormalMessenger, AutoRegressiveMessenger]


def normal_model(x: torch.Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(z, 1.0))
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Normal(w, 1.0))
        pyro.sample("x", dist.Normal(y, 0.5), obs=x)


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("make", MESSENGERS)
def test_guides_that_are_handlers_of_the_model(make: type, vectorize: bool) -> None:
    auto = make(normal_model)
    auto(DATA)
    values, grads = [], []
    for loss in (
        Estimator_ELBO(3, vectorize_particles=vectorize, max_plate_nesting=1),
        Trace_ELBO(3, vectorize_particles=vectorize, max_plate_nesting=1),
    ):
        pyro.set_rng_seed(3)
        auto.zero_grad()
        values.append(float(loss.loss_and_grads(normal_model, auto, DATA)))
        grads.append([p.grad.clone() for p in auto.parameters() if p.grad is not None])
        auto.zero_grad()
    assert len(grads[0]) == len(grads[1]) > 0
    assert values[0] == pytest.approx(values[1], rel=1e-5)  # of the same draws
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_handler_guide_learns_the_posterior() -> None:
    def simple(x: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    auto = AutoNormalMessenger(simple)
    svi = SVI(simple, auto, pyro.optim.Adam({"lr": 0.05}), Estimator_ELBO(4))
    losses = [svi.step(DATA) for _ in range(400)]
    evidence = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(DATA)
    assert abs(sum(losses[-100:]) / 100 + float(evidence)) < 0.05
    median = auto.median(DATA)["z"].detach()
    assert abs(float(median) - 2.25) < 0.15


def test_a_program_that_counts_particles_runs_in_the_particle_plate_alone() -> None:
    shapes = []

    def reshaping() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        shapes.append(z.shape)
        pyro.factor("f", z.reshape(5, 1).squeeze(-1))

    def its_guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))

    elbo = Estimator_ELBO(5, vectorize_particles=True, max_plate_nesting=0)
    elbo.loss_and_grads(reshaping, its_guide)
    assert set(shapes) == {torch.Size([5])}


def test_plates_beyond_max_plate_nesting_are_named() -> None:
    def nested() -> None:
        with pyro.plate("a", 2), pyro.plate("b", 3):
            pyro.sample("z", dist.Bernoulli(0.3))

    elbo = Estimator_ELBO(2, vectorize_particles=True, max_plate_nesting=1)
    with pytest.raises(ValueError, match="max_plate_nesting is 1"):
        elbo.loss_and_grads(nested, nested)
