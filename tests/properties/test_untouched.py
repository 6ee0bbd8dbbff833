"""Diagnostics leave no trace: everything is, bit for bit, as it was."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, JitTrace_ELBO

from pyro_gumbel.diagnostics import (
    check_unbiased,
    exact_gradient,
    gradient_draws,
    guide_khat,
    recommend,
    train,
)
from pyro_gumbel.diagnostics._state import Replica
from pyro_gumbel.estimators import (
    Call,
    Exponential,
    GumbelStraightThrough,
    MovingAverage,
    NeuralBaseline,
    Score,
)
from pyro_gumbel.infer import CapturedSVI, Estimator_ELBO, config_gradient


class Problem:
    """A module with a buffer, a plain parameter, and estimators that remember."""

    def __init__(self) -> None:
        self.encoder = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 3))
        self.moving = Score(MovingAverage())
        self.neural = Score(NeuralBaseline(torch.nn.Linear(2, 1), "x"))
        self.annealed = GumbelStraightThrough(Exponential(1.0, 0.1, 0.1))
        config = {"a": self.moving, "c": "score", "d": self.annealed}
        self.configured = config_gradient(self.guide, config)
        self.x = torch.randn(5, 2)

    def model(self, x: torch.Tensor) -> None:
        w = pyro.param("w", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("n", len(x)):
            a = pyro.sample("a", dist.Bernoulli(0.4))
            b = pyro.sample("b", dist.Bernoulli(0.4))
            c = pyro.sample("c", dist.Bernoulli(0.6))
            d = pyro.sample("d", dist.Bernoulli(0.6))
            mean = w * (a + b * c) + d
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x.sum(-1))

    def guide(self, x: torch.Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("n", len(x)):
            logits = self.encoder(x)
            pyro.sample("a", dist.Bernoulli(logits=logits[:, 0]))
            pyro.sample("b", dist.Bernoulli(logits=logits[:, 1]), infer={"gradient": self.neural})
            pyro.sample("c", dist.Bernoulli(logits=logits[:, 2]))
            pyro.sample("d", dist.Bernoulli(logits=logits[:, 2]))


class Watched:
    """All that must not change."""

    def __init__(self) -> None:
        self.problem = Problem()
        self.elbo = Estimator_ELBO()
        self.optim = pyro.optim.Adam({"lr": 0.05})
        svi = SVI(self.problem.model, self.problem.configured, self.optim, self.elbo)
        for _ in range(3):
            svi.step(self.problem.x)
        self.step = svi.step
        for leaf in pyro.get_param_store()._params.values():
            leaf.grad = torch.full_like(leaf, 0.25)

    def state(self) -> dict[str, Any]:
        store = pyro.get_param_store()
        problem = self.problem
        estimators = (problem.moving, problem.neural, problem.annealed)
        named = {k: v for k, v in vars(self.elbo._auto).items() if isinstance(v, torch.nn.Module)}
        return {
            "names": list(store.keys()),
            "leaves": [id(leaf) for leaf in store._params.values()],
            "values": [leaf.detach().clone() for leaf in store._params.values()],
            "gradients": [leaf.grad.clone() for leaf in store._params.values()],
            "buffers": {k: v.clone() for k, v in problem.encoder.state_dict().items()},
            "optimizer": self.optim.get_state(),
            "estimators": [estimator.state_dict() for estimator in estimators],
            "named": {name: module.state_dict() for name, module in named.items()},
            "generators": [torch.get_rng_state(), np.random.get_state(), random.getstate()],
        }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


class Recording(Estimator_ELBO):
    """A loss of the user's: it holds estimators in containers, and keeps a record of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[float] = []
        self.by_size = {2: [Score(MovingAverage())]}

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        own = config_gradient(guide, {"b": self.by_size[2][0]})
        loss = super().loss_and_grads(model, own, *args, **kwargs)
        self.history.append(float(loss))
        return loss


def contents(value: Any) -> Any:
    """What an object holds at any depth, as values that can be compared."""
    if isinstance(value, torch.nn.Module):
        return {name: part.clone() for name, part in value.state_dict().items()}
    if isinstance(value, dict):
        return {key: contents(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [contents(part) for part in value]
    plain = callable(value) or not hasattr(value, "__dict__")
    return value if plain else contents(vars(value))


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("name", ["gradient_draws", "train"])
def test_a_loss_is_left_as_it_was(name: str, used: bool) -> None:
    watched = Watched()
    watched.elbo = Recording()
    problem = watched.problem
    for _ in range(used):
        watched.elbo.loss_and_grads(problem.model, problem.guide, problem.x)
    before = contents(watched.elbo)
    held = {key: id(value) for key, value in vars(watched.elbo).items()}
    CALLS[name](watched)
    assert same(before, contents(watched.elbo))
    assert held == {key: id(value) for key, value in vars(watched.elbo).items()}
    assert len(watched.elbo.history) == used


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_compiled_loss_of_pyro_can_be_used_before() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.2)), 1.0))

    elbo = JitTrace_ELBO()
    elbo.loss_and_grads(model, guide)
    draws = gradient_draws(model, guide, estimators={"jit": elbo}, num_draws=3, **QUIET)
    assert np.isfinite(draws["jit"]["m"]).all()


def test_copies_of_a_loss_share_nothing_but_the_programs() -> None:
    watched = Watched()
    watched.elbo = Recording()
    call = Call(watched.problem.model, watched.problem.guide, (watched.problem.x,))
    for _ in range(2):
        watched.elbo.loss_and_grads(call.model, call.guide, *call.args)
    replica = Replica(watched.elbo, call)
    mutable = {
        name: value
        for name, value in vars(watched.elbo).items()
        if isinstance(value, (dict, list, set, torch.Tensor)) or hasattr(value, "__dict__")
    }
    assert {"history", "by_size", "_auto"} <= set(mutable)
    assert [name for name in mutable if getattr(replica.elbo, name) is mutable[name]] == []
    assert replica.elbo.history == watched.elbo.history
    assert replica.elbo.by_size[2][0] is not watched.elbo.by_size[2][0]


QUIET = {"progress": False}
OPTIM = pyro.optim.Adam({"lr": 0.1})
CALLS: dict[str, Callable[[Watched], Any]] = {
    "gradient_draws": lambda w: gradient_draws(
        w.problem.model,
        w.problem.configured,
        w.problem.x,
        estimators={
            "as it is": w.elbo,
            "annealed": {"a": w.problem.annealed},
            "named": "rebar",
            "several": (w.problem.moving, Estimator_ELBO(2)),
        },
        num_draws=4,
        **QUIET,
    ),
    "gradient_draws, projected, elsewhere": lambda w: gradient_draws(
        w.problem.model,
        w.problem.configured,
        w.problem.x,
        estimators={"as it is": w.elbo},
        num_draws=4,
        project=2,
        params={"w": torch.tensor(3.0)},
        **QUIET,
    ),
    "exact_gradient": lambda w: exact_gradient(w.problem.model, w.problem.configured, w.problem.x),
    "guide_khat": lambda w: guide_khat(
        w.problem.model, w.problem.configured, w.problem.x, num_samples=30
    ),
    "train": lambda w: train(
        w.problem.model,
        w.problem.configured,
        w.problem.x,
        estimators={"as it is": w.elbo, "rebar": "rebar"},
        optim=w.optim,
        num_steps=3,
        seeds=2,
        **QUIET,
    ),
    "recommend": lambda w: recommend(
        w.problem.model,
        w.problem.configured,
        w.problem.x,
        budget_evaluations=300,
        candidates={"annealed": w.problem.annealed, "moving": w.problem.moving},
        **QUIET,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_changes(name: str) -> None:
    watched = Watched()
    before = watched.state()
    CALLS[name](watched)
    after = watched.state()
    changed = [key for key in before if not same(before[key], after[key])]
    assert changed == []


def test_the_next_step_is_the_same() -> None:
    losses = []
    for disturb in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        watched = Watched()
        if disturb:
            CALLS["gradient_draws"](watched)
            CALLS["train"](watched)
        losses.append([watched.step(watched.problem.x) for _ in range(3)])
    assert losses[0] == losses[1]


def test_state_is_put_back_after_an_error() -> None:
    watched = Watched()
    before = watched.state()
    with pytest.raises(ValueError, match="num_values|does not support"):
        gradient_draws(
            watched.problem.model,
            watched.problem.configured,
            watched.problem.x,
            estimators={"fine": "score", "not for bits": "disarm_tree"},
            num_draws=3,
            **QUIET,
        )
    assert same(before, watched.state())


def test_module_that_the_store_has_not_met() -> None:
    problem = Problem()
    weight = problem.encoder[1].weight
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    train(
        lambda x: problem.model(x),
        lambda x: problem.guide(x),
        problem.x,
        estimators={"score": "score"},
        optim=OPTIM,
        num_steps=2,
        **QUIET,
    )
    assert torch.equal(weight, before)
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert len(pyro.get_param_store()) == 0


def test_check_unbiased_changes_nothing() -> None:
    watched = Watched()
    before = watched.state()
    with pytest.warns(UserWarning, match="a smaller bias goes unseen"):
        check_unbiased(
            watched.problem.model,
            watched.problem.guide,
            watched.problem.x,
            estimator=watched.problem.moving,
            num_draws=20,
        )
    assert same(before, watched.state())


def bare_programs(state: torch.Tensor, network: torch.nn.Module) -> tuple[Any, Any]:
    """Programs that use a module and a tensor which are in no parameter store."""

    def model() -> None:
        pyro.sample("z", dist.Bernoulli(0.4))

    def guide() -> None:
        state.mul_(0.5).add_(1.0)
        shift = network(torch.tensor([[1.0], [3.0]])).sum()
        logit = pyro.param("l", torch.tensor(0.2)) + shift + state
        pyro.sample("z", dist.Bernoulli(logits=logit))

    return model, guide


BARE: dict[str, Callable[..., Any]] = {
    "gradient_draws": lambda m, g: gradient_draws(
        m, g, estimators={"s": "score"}, num_draws=3, **QUIET
    ),
    "exact_gradient": lambda m, g: exact_gradient(m, g),
    "guide_khat": lambda m, g: guide_khat(m, g, num_samples=30),
    "train": lambda m, g: train(
        m, g, estimators={"s": "score"}, optim=OPTIM, num_steps=3, **QUIET
    ),
    "recommend": lambda m, g: recommend(
        m, g, candidates={"s": Score()}, budget_evaluations=200, **QUIET
    ),
}


@pytest.mark.parametrize("name", BARE)
def test_state_outside_the_store_is_put_back(name: str) -> None:
    state = torch.tensor(0.25)
    network = torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.Linear(1, 1))
    network[1].weight.grad = torch.ones(1, 1)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    BARE[name](*bare_programs(state, network))
    assert float(state) == 0.25
    assert same(before, dict(network.state_dict()))
    assert torch.equal(network[1].weight.grad, torch.ones(1, 1))
    assert network[1].bias.grad is None


def test_buffers_of_compiled_and_scripted_modules_are_put_back() -> None:
    def eager(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        return graph.forward

    makers = (lambda net: torch.compile(net, backend=eager), torch.jit.script)
    for make in makers:
        pyro.clear_param_store()
        network = make(torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.Linear(1, 1)))
        before = {key: value.clone() for key, value in network.state_dict().items()}
        programs = bare_programs(torch.tensor(0.25), network)
        gradient_draws(*programs, estimators={"s": "score"}, num_draws=3, **QUIET)
        assert same(before, dict(network.state_dict()))


class Doubling(torch.nn.Module):
    """A module of a user's class, whose frame the compiler may take."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


@pytest.mark.parametrize("kind", [SVI, CapturedSVI])
@pytest.mark.parametrize("warm", [False, True], ids=["new", "compiled before"])
def test_a_step_leaves_compiled_modules_compiled(kind: Any, warm: bool) -> None:
    """The compiler skips code for ever that it has met under a dispatch mode."""
    runs = 0

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(*inputs: torch.Tensor) -> Any:
            nonlocal runs
            runs += 1
            return graph(*inputs)

        return run

    torch._dynamo.reset()
    compiled = torch.compile(Doubling(), backend=backend)
    if warm:
        compiled(torch.ones(()))

    def model() -> None:
        pyro.sample("z", dist.Bernoulli(compiled(torch.tensor(0.2))))

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.2))))

    svi = kind(model, guide, pyro.optim.Adam({}), Estimator_ELBO())
    for _ in range(2):
        svi.step()
    before = runs
    if kind is SVI:
        svi.step()
        assert runs == before + 1
    compiled(torch.ones(()))
    assert runs > before


def test_modules_of_other_threads_go_on() -> None:
    """Nothing is installed for the whole process while programs run."""
    elsewhere = torch.nn.BatchNorm1d(1)
    runs = 0

    def model() -> None:
        nonlocal runs
        runs += 1
        thread = threading.Thread(target=elsewhere, args=(torch.randn(4, 1),))
        thread.start()
        thread.join()
        pyro.sample("z", dist.Bernoulli(0.4))

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.2))))

    gradient_draws(model, guide, estimators={"s": "score"}, num_draws=3, **QUIET)
    assert int(elsewhere.num_batches_tracked) == runs
