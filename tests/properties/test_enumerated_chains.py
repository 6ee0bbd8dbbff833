"""Enumerated chains of the guide cost as much as their steps, and have the values of all paths.

Without ``pyro.markov`` the same programs have a dimension for each site, and cost as much as all
paths.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO
from pyro.ops.indexing import Vindex
from torch import Tensor

from pyro_gumbel.infer import CapturedSVI, Estimator_ELBO, config_gradient
from pyro_gumbel.infer._chains import ChainCosts

ALL = {"enumerate": "parallel"}
X = torch.tensor([0.3, -1.2, 2.1, 0.4, 1.7, -0.6], dtype=torch.float64)
Loop = Callable[..., Iterable[int]]


pytestmark = pytest.mark.usefixtures("in_float64")


def all_paths(steps: Iterable[int], history: int = 1) -> Iterable[int]:
    """Stand for ``pyro.markov``: each site keeps a dimension of its own."""
    return steps


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step(elbo: Any, model: Any, guide: Any, *args: Any) -> tuple[Tensor, dict[str, Tensor]]:
    parameters = pyro.get_param_store()._params
    for parameter in parameters.values():
        parameter.grad = None
    loss = torch.as_tensor(elbo.loss_and_grads(model, guide, *args)).detach()
    return loss, {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


def assert_equal(one: tuple[Tensor, dict[str, Tensor]], other: Any) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=1e-10, atol=1e-10)
    assert one[1].keys() == other[1].keys()
    for name, grad in one[1].items():
        torch.testing.assert_close(grad, other[1][name], rtol=1e-8, atol=1e-10)
        assert grad.abs().max() > 1e-3


def probs(name: str, *shape: int, seed: int = 0) -> Tensor:
    """Logits of a categorical with a parameter."""
    return pyro.param(name, lambda: numbers(*shape, seed=seed))


# Programs of a loop


def hmm(x: Tensor, loop: Loop, size: int = 3, history: int = 1, prefix: str = "") -> None:
    logits = probs("p", *(size,) * (history + 1), seed=1)
    locs = pyro.param("locs", torch.linspace(-1, 2, size))
    past = [torch.tensor(0)] * history
    for t in loop(range(len(x)), history=history):
        z = pyro.sample(f"{prefix}z{t}", dist.Categorical(logits=Vindex(logits)[tuple(past)]))
        pyro.sample(f"{prefix}x{t}", dist.Normal(Vindex(locs)[z], 0.8), obs=x[t])
        past = [*past[1:], z]


def guide_of_hmm(x: Tensor, loop: Loop, size: int = 3, history: int = 1, prefix: str = "") -> None:
    logits = probs("q", len(x), *(size,) * (history + 1), seed=2)
    past = [torch.tensor(0)] * history
    for t in loop(range(len(x)), history=history):
        z = pyro.sample(
            f"{prefix}z{t}", dist.Categorical(logits=Vindex(logits[t])[tuple(past)]), infer=ALL
        )
        past = [*past[1:], z]


def mean_field(x: Tensor, loop: Loop, size: int = 3, history: int = 1) -> None:
    logits = probs("q", len(x), size, seed=2)
    for t in loop(range(len(x)), history=history):
        pyro.sample(f"z{t}", dist.Categorical(logits=logits[t]), infer=ALL)


def backwards(x: Tensor, loop: Loop, size: int = 3, history: int = 1) -> None:
    """The guide has the last step first."""
    logits = probs("q", len(x), size, size, seed=2)
    z = torch.tensor(0)
    for t in loop(reversed(range(len(x)))):
        z = pyro.sample(f"z{t}", dist.Categorical(logits=Vindex(logits[t])[z]), infer=ALL)


@pytest.mark.parametrize("history", [1, 2])
@pytest.mark.parametrize("guide", [guide_of_hmm, mean_field])
def test_a_chain_has_the_sum_over_its_paths(guide: Any, history: int) -> None:
    """By a sum over the paths, by Pyro, and by a dimension for each site."""
    x, size = X[:4], 3
    elbo = Estimator_ELBO()
    found = step(elbo, hmm, guide, x, pyro.markov, size, history)
    assert_equal(found, step(Estimator_ELBO(), hmm, guide, x, all_paths, size, history))
    pyros = step(TraceEnum_ELBO(max_plate_nesting=0), hmm, guide, x, pyro.markov, size, history)
    assert_equal(found, pyros)
    total = torch.zeros(())
    for path in itertools.product(range(size), repeat=len(x)):
        values = {f"z{t}": torch.tensor(z) for t, z in enumerate(path)}
        args = x, all_paths, size, history
        log_q, log_p = (
            poutine.trace(poutine.condition(program, values)).get_trace(*args).log_prob_sum()
            for program in (guide, hmm)
        )
        total = total + log_q.exp() * (log_p - log_q)
    parameters = pyro.get_param_store()._params
    grads = torch.autograd.grad(-total, [*parameters.values()])
    assert_equal(found, (-total.detach(), dict(zip(parameters, grads, strict=True))))


def test_a_guide_may_go_backwards() -> None:
    found = step(Estimator_ELBO(), hmm, backwards, X[:4], pyro.markov)
    assert_equal(found, step(Estimator_ELBO(), hmm, backwards, X[:4], all_paths))


@pytest.mark.parametrize("length", [60, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("guide", [guide_of_hmm, mean_field])
def test_a_long_chain_is_what_it_is_in_pyro(guide: Any, length: int) -> None:
    x = numbers(length, seed=3)
    found = step(Estimator_ELBO(max_plate_nesting=0), hmm, guide, x, pyro.markov)
    assert_equal(found, step(TraceEnum_ELBO(max_plate_nesting=0), hmm, guide, x, pyro.markov))


def forbidden_steps(x: Tensor, loop: Loop, given: str) -> None:
    """State 0 never follows state 2."""
    phi, allowed = probs("q", 3, 3, seed=2), (torch.arange(9).reshape(3, 3) != 6).double()
    numbers = phi.exp() * allowed if given == "probs" else phi + allowed.log()
    z = torch.tensor(0)
    for t in loop(range(len(x))):
        rows = {given: Vindex(numbers)[z]}
        z = pyro.sample(f"z{t}", dist.Categorical(**rows), infer=ALL)


def forbidding(x: Tensor, loop: Loop, given: str) -> None:
    """What the guide never draws costs infinitely much."""
    z = torch.tensor(0)
    for t in loop(range(len(x))):
        table = (torch.arange(9).reshape(3, 3) != 6).double()
        z = pyro.sample(f"z{t}", dist.Categorical(Vindex(table)[z]))
        loc = Vindex(pyro.param("locs", torch.linspace(-1, 2, 3)))[z]
        pyro.sample(f"x{t}", dist.Normal(loc, 0.8), obs=x[t])


@pytest.mark.parametrize("given", ["probs", "logits"])
def test_values_of_probability_zero_may_cost_infinitely_much(given: str) -> None:
    with pyro.validation_enabled(False):  # torch takes no infinite logits
        found = step(Estimator_ELBO(), forbidding, forbidden_steps, X[:4], pyro.markov, given)
        wanted = step(Estimator_ELBO(), forbidding, forbidden_steps, X[:4], all_paths, given)
    assert found[0].isfinite()
    assert_equal(found, wanted)


# Programs of several parts: each has a number from its own parameters at every edge


def steps(x: Tensor) -> range:
    return range(len(x))


def observe(name: str, loc: Tensor, x: Tensor) -> None:
    pyro.sample(name, dist.Normal(loc, 0.8), obs=x)


def switch(name: str, logits: Tensor) -> Tensor:
    return pyro.sample(name, dist.Bernoulli(logits=logits))


def state(name: str, logits: Tensor, infer: Any = None) -> Tensor:
    return pyro.sample(name, dist.Categorical(logits=logits), infer=infer)


def coupled(x: Tensor, loop: Loop) -> None:
    """Two chains, each step of one depending on the other."""
    y, z = torch.tensor(0), torch.tensor(0)
    for t in loop(steps(x)):
        y = state(f"y{t}", Vindex(probs("py", 2, 2, seed=1))[y])
        z = state(f"z{t}", Vindex(probs("pz", 2, 3, 3, seed=2))[y, z])
        observe(f"x{t}", Vindex(probs("loc", 2, 3, seed=3))[y, z], x[t])


def guide_of_coupled(x: Tensor, loop: Loop) -> None:
    y, z = torch.tensor(0), torch.tensor(0)
    for t in loop(steps(x)):
        z = state(f"z{t}", Vindex(probs("qz", 2, 3, 3, seed=4))[y, z], ALL)
        y = state(f"y{t}", Vindex(probs("qy", 3, 2, seed=5))[z], ALL)


def separate_loops(x: Tensor, loop: Loop) -> None:
    y, z = torch.tensor(0), torch.tensor(0)
    for t in loop(steps(x)):
        y = state(f"y{t}", Vindex(probs("qy", 2, 2, seed=4))[y], ALL)
    for t in loop(steps(x)):
        z = state(f"z{t}", Vindex(probs("qz", 3, 3, seed=5))[z], ALL)


def with_whole(x: Tensor, loop: Loop) -> None:
    """A site before the chain and one after it, which every step depends on."""
    a, b = state("a", probs("pa", 2, seed=1)), state("b", probs("pb", 2, seed=2))
    z = torch.tensor(0)
    for t in loop(steps(x)):
        z = state(f"z{t}", Vindex(probs("pz", 2, 3, 3, seed=3))[a, z])
        observe(f"x{t}", Vindex(probs("loc", 2, 2, 3, seed=4))[a, b, z], x[t])


def guide_of_whole(x: Tensor, loop: Loop) -> None:
    a, z = state("a", probs("qa", 2, seed=5), ALL), torch.tensor(0)
    for t in loop(steps(x)):
        z = state(f"z{t}", Vindex(probs("qz", 2, 3, 3, seed=6))[a, z], ALL)
    state("b", Vindex(probs("qb", 2, 2, seed=7))[a], ALL)


def beside_sums(x: Tensor, loop: Loop) -> None:
    """A sum in the model for each step, and one for all steps."""
    z = torch.tensor(0)
    for t in loop(steps(x)):
        z = state(f"z{t}", Vindex(probs("pz", 3, 3, seed=1))[z])
        m = state(f"m{t}", Vindex(probs("pm", 3, 2, seed=2))[z], ALL)
        observe(f"x{t}", Vindex(probs("loc", 3, 2, seed=3))[z, m], x[t])


def guide_of_z(x: Tensor, loop: Loop) -> None:
    z = torch.tensor(0)
    for t in loop(steps(x)):
        z = state(f"z{t}", Vindex(probs("qz", 3, 3, seed=6))[z], ALL)


def ragged(x: Tensor, loop: Loop) -> None:
    """Sequences in a scaled plate, of lengths 4, 1 and 2; one site outside."""
    whole = pyro.sample("whole", dist.Normal(0.0, 1.0))
    lengths = torch.tensor([4, 1, 2])
    with pyro.plate("sequences", 6, subsample=torch.tensor([0, 2, 3])), poutine.scale(scale=0.7):
        z = torch.tensor(0)
        for t in loop(range(4)):
            with poutine.mask(mask=t < lengths):
                z = state(f"z{t}", Vindex(probs("pz", 3, 3, seed=1))[z])
                loc = Vindex(probs("loc", 3, seed=2))[z] + whole
                observe(f"x{t}", loc, x[:3] + t)


def guide_of_ragged(x: Tensor, loop: Loop) -> None:
    loc = pyro.param("q_whole", torch.tensor(0.3))
    pyro.sample("whole", dist.Normal(loc, 0.5))
    lengths = torch.tensor([4, 1, 2])
    plate = pyro.plate("sequences", 6, subsample=torch.tensor([0, 2, 3]))
    with plate as index, poutine.scale(scale=0.7):
        z, n = torch.tensor(0), torch.arange(3)
        for t in loop(range(4)):
            with poutine.mask(mask=t < lengths):
                logits = Vindex(probs("qz", 6, 3, 3, seed=3)[index])[n, z]
                z = state(f"z{t}", logits, ALL)


def outside(x: Tensor, loop: Loop) -> None:
    """A chain outside of two plates of one dimension, with switches in one and data in both."""
    z = torch.tensor(0)
    for t in loop(range(3)):
        z = state(f"z{t}", Vindex(probs("pz", 3, 3, seed=1))[z])
        with pyro.plate(f"data{t}", 2):
            w = switch(f"w{t}", Vindex(probs("pw", 3, seed=2))[z])
            observe(f"x{t}", Vindex(probs("loc", 3, seed=3))[z] * (1 + w), x[:2] + t)
        with pyro.plate(f"more{t}", 3):
            observe(f"v{t}", Vindex(probs("loc", 3, seed=3))[z], x[:3] - t)


def guide_of_outside(x: Tensor, loop: Loop) -> None:
    z = torch.tensor(0)
    for t in loop(range(3)):
        z = state(f"z{t}", Vindex(probs("qz", 3, 3, 3, seed=4))[t, z], ALL)
        with pyro.plate(f"data{t}", 2):
            switch(f"w{t}", Vindex(probs("qw", 3, 2, seed=5))[z, torch.arange(2)])


def nested_plates(x: Tensor, loop: Loop) -> None:
    """Chains outside of plates and inside, with a switch beside each."""
    a, i = torch.tensor(0), torch.arange(2)
    for t in loop(range(2)):
        a = state(f"a{t}", Vindex(probs("pa", 2, 2, seed=1))[a])
        v = switch(f"v{t}", Vindex(probs("pv", 2, seed=2))[a])
        with pyro.plate(f"plate{t}", 2):
            b = state(f"b{t}", Vindex(probs("pb", 2, 2, 2, seed=3))[i, a])
            w = switch(f"w{t}", Vindex(probs("pw", 2, 2, seed=4))[i, b])
            observe(f"x{t}", Vindex(probs("loc", 2, seed=5))[b] * (v + w), x[:2])


def guide_of_nested(x: Tensor, loop: Loop) -> None:
    a, i = torch.tensor(0), torch.arange(2)
    for t in loop(range(2)):
        a = state(f"a{t}", Vindex(probs("qa", 2, 2, seed=6))[a], ALL)
        switch(f"v{t}", Vindex(probs("qv", 2, seed=7))[a])
        with pyro.plate(f"plate{t}", 2):
            b = state(f"b{t}", Vindex(probs("qb", 2, 2, 2, seed=8))[i, a], ALL)
            switch(f"w{t}", Vindex(probs("qw", 2, 2, seed=9))[i, b])


def switched(x: Tensor, loop: Loop) -> None:
    """Each step has a switch and a number, which depend on the state."""
    z = torch.tensor(0)
    with pyro.plate("sequences", 2):
        for t in loop(range(3)):
            z = state(f"z{t}", Vindex(probs("pz", 3, 3, seed=1))[z])
            w = switch(f"w{t}", Vindex(probs("pw", 3, seed=2))[z])
            u = pyro.sample(f"u{t}", dist.Normal(Vindex(probs("pu", 3, seed=3))[z], 1.0))
            observe(f"x{t}", Vindex(probs("loc", 3, seed=4))[z] * (1 + w) + u, x[:2] + t)


def guide_of_switched(x: Tensor, loop: Loop) -> None:
    z, n = torch.tensor(0), torch.arange(2)
    with pyro.plate("sequences", 2):
        for t in loop(range(3)):
            z = state(f"z{t}", Vindex(probs("qz", 2, 3, 3, 3, seed=5))[n, t, z], ALL)
            switch(f"w{t}", Vindex(probs("qw", 2, 3, 3, seed=6))[n, t, z])
            pyro.sample(f"u{t}", dist.Normal(Vindex(probs("qu", 2, 3, 3, seed=7))[n, t, z], 0.5))


def independent_switches(x: Tensor, loop: Loop) -> None:
    """The switches of the guide do not depend on its states."""
    z, n = torch.tensor(0), torch.arange(2)
    with pyro.plate("sequences", 2):
        for t in loop(range(3)):
            switch(f"w{t}", probs("qw", 2, 3, seed=6)[n, t])
            z = state(f"z{t}", Vindex(probs("qz", 2, 3, 3, 3, seed=5))[n, t, z], ALL)
            pyro.sample(f"u{t}", dist.Normal(probs("qu", 2, 3, seed=7)[n, t], 0.5))


PROGRAMS = [
    (coupled, guide_of_coupled),
    (coupled, separate_loops),
    (with_whole, guide_of_whole),
    (beside_sums, guide_of_z),
    (ragged, guide_of_ragged),
    (nested_plates, guide_of_nested),
    (outside, guide_of_outside),
    (switched, guide_of_switched),
    (switched, independent_switches),
]
ROWS = {"num_particles": 2, "vectorize_particles": True}
OPTIONS = [{"num_particles": 2}, ROWS, {"analytic_kl": True}]
CASES = [(*pair, OPTIONS[i % 3]) for i, pair in enumerate(PROGRAMS + PROGRAMS)]


def names(of: Any) -> str:
    return getattr(of, "__name__", str(of))


@pytest.mark.parametrize(("model", "guide", "options"), CASES, ids=names)
def test_each_draw_is_that_with_all_paths(model: Any, guide: Any, options: dict[str, Any]) -> None:
    results = []
    for loop in (pyro.markov, all_paths):
        elbo = Estimator_ELBO(**options)
        pyro.set_rng_seed(0)
        results += [[step(elbo, model, guide, X[:3], loop)]]
        results[-1].append((torch.tensor(elbo.loss(model, guide, X[:3], loop)), {}))
    for one, other in zip(*results, strict=True):
        assert_equal(one, other)


ESTIMATORS = ["disarm", "rebar", "local_expectation", "score", "reinmax"]


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(
    ("model", "guide", "rows"),
    [
        (*PROGRAMS[-4], True),
        (*PROGRAMS[-3], True),
        (*PROGRAMS[-2], True),
        (*PROGRAMS[-2], False),
        (*PROGRAMS[-1], True),
    ],
    ids=names,
)
def test_each_estimate_is_that_with_all_paths(
    model: Any, guide: Any, rows: bool, name: str
) -> None:
    results = []
    for loop in (pyro.markov, all_paths):
        chosen = config_gradient(guide, {f"w{t}": name for t in range(2)})
        elbo = Estimator_ELBO(2, vectorize_particles=rows)
        pyro.set_rng_seed(0)
        results.append(step(elbo, model, chosen, X, loop))
    assert_equal(*results)


def test_a_planted_error_in_the_costs_of_draws_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ChainCosts.downstream

    def wrong(self: Any, *args: Any, **options: Any) -> Tensor:
        """Leave a thousandth of the cost out."""
        return 0.999 * right(self, *args, **options)

    monkeypatch.setattr(ChainCosts, "downstream", wrong)
    with pytest.raises(AssertionError, match="not close"):
        test_each_estimate_is_that_with_all_paths(*PROGRAMS[-2], True, "score")


@pytest.mark.parametrize("choice", ["loss", "step"])
def test_sequences_one_after_the_other_share_dimensions(choice: str) -> None:
    """A dimension for each chain would be more than torch has."""

    def model(number: int) -> None:
        for i in range(number):
            hmm(X[:2], pyro.markov, prefix=f"{i}_")

    def guide(number: int) -> None:
        for i in range(number):
            guide_of_hmm(X[:2], pyro.markov, prefix=f"{i}_")

    loss = {"loss": Estimator_ELBO().loss, "step": Estimator_ELBO().differentiable_loss}[choice]
    many, one = (torch.as_tensor(loss(model, guide, n)).item() for n in (33, 1))
    assert many == pytest.approx(33 * one, rel=1e-10)


def test_a_captured_step_has_a_chain() -> None:
    losses = []
    for kind in (SVI, CapturedSVI):
        pyro.clear_param_store()
        Estimator_ELBO().loss(hmm, guide_of_hmm, X[:4], all_paths)  # which draws the parameters
        svi = kind(hmm, guide_of_hmm, pyro.optim.Adam({"lr": 0.05}), Estimator_ELBO())
        losses.append([float(svi.step(X[:4], pyro.markov)) for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


def test_hidden_sites_of_a_chain_are_no_part_of_it() -> None:
    def guide(x: Tensor, loop: Loop) -> None:
        for t in loop(range(len(x))):
            pyro.sample(f"hidden{t}", dist.Normal(0.0, 1.0))
            state(f"z{t}", probs("q", 3, 3, seed=2)[t], ALL)

    hidden = poutine.block(guide, hide_fn=lambda site: site["name"].startswith("hidden"))
    loss = Estimator_ELBO().loss(hmm, hidden, X[:3], pyro.markov)
    assert loss == pytest.approx(Estimator_ELBO().loss(hmm, mean_field, X[:3], pyro.markov))


# Refusals


def without_markov(x: Tensor) -> None:
    hmm(x, all_paths)


def longer_history(x: Tensor) -> None:
    hmm(x, pyro.markov, 3, 2)


def sum_of_a_chain(x: Tensor) -> None:
    y, z = torch.tensor(0), torch.tensor(0)
    for t in pyro.markov(steps(x)):
        z = state(f"z{t}", Vindex(probs("pz", 3, 3, seed=1))[z])
        y = state(f"y{t}", Vindex(probs("py", 3, 2, 2, seed=2))[z, y], ALL)


def after_the_chain(x: Tensor) -> None:
    z = torch.tensor(0)
    for t in pyro.markov(steps(x)):
        z = state(f"z{t}", Vindex(probs("pz", 3, 3, seed=1))[z])
    observe("x", Vindex(probs("loc", 3, seed=3))[z], x[0])


def before_the_history(x: Tensor) -> None:
    z = [torch.tensor(0)] * 2
    for t in pyro.markov(steps(x)):
        z.append(state(f"z{t}", Vindex(probs("pz", 3, 3, seed=1))[z[-1]]))
        observe(f"x{t}", Vindex(probs("loc", 3, seed=3))[z[-3]], x[t])


def mean_field_of_z(x: Tensor) -> None:
    mean_field(x, pyro.markov)


def before_its_history(x: Tensor) -> None:
    z = [torch.tensor(0)] * 2
    for t in pyro.markov(steps(x)):
        z.append(state(f"z{t}", Vindex(probs("qz", 3, 3, seed=1))[z[-2]], ALL))


def plain_chain(x: Tensor) -> None:
    hmm(x, pyro.markov)


def carried(x: Tensor) -> None:
    z, w = torch.tensor(0), [torch.tensor(0.0)] * 3
    for t in pyro.markov(steps(x)):
        z = state(f"z{t}", Vindex(probs("pz", 3, 3, seed=1))[z])
        w.append(switch(f"w{t}", torch.tensor(0.3)))
        observe(f"x{t}", w[-3] + Vindex(probs("loc", 3, seed=3))[z], x[t])


def with_switches(x: Tensor) -> None:
    z = torch.tensor(0)
    for t in pyro.markov(steps(x)):
        z = state(f"z{t}", Vindex(probs("qz", 3, 3, seed=1))[z], ALL)
        switch(f"w{t}", Vindex(probs("qw", 3, seed=2))[z])


def growing(x: Tensor, size: int = 20, infer: Any = None) -> None:
    """A number keeps the states of all steps."""
    u = torch.tensor(0.0)
    for t in pyro.markov(range(12)):
        z = state(f"z{t}", torch.zeros(size), infer)
        u = pyro.sample(f"u{t}", dist.Normal(u + z, 1.0))


def guide_of_growing(x: Tensor) -> None:
    growing(x, infer=ALL)


def inside(x: Tensor) -> None:
    for t in pyro.markov(range(1)):
        with pyro.plate("data", 2):
            z = state(f"z{t}", probs("pz", 3, seed=1))
        observe(f"x{t}", z.sum(-1, keepdim=True).double(), x[t])


def chain_inside(x: Tensor) -> None:
    with pyro.plate("data", 2):
        for t in pyro.markov(range(1)):
            state(f"z{t}", probs("qz", 3, seed=1), ALL)


REFUSED = [
    (without_markov, mean_field_of_z, "'z0' outside of its pyro.markov.*in both programs"),
    (longer_history, mean_field_of_z, "'z2' of the model may depend on 'z0' and 'z2' at once"),
    (sum_of_a_chain, mean_field_of_z, r"\['y0', .*\['z0', 'z1', .* jointly: 81 states"),
    (after_the_chain, mean_field_of_z, "'x' uses the value of site 'z3' outside of"),
    (before_the_history, mean_field_of_z, "'x2' uses the value of site 'z0' outside of"),
    (plain_chain, before_its_history, "'z2' uses the value of site 'z0' outside of"),
    (carried, with_switches, "'x2' uses the value of site 'w0' outside of"),
    (growing, guide_of_growing, "'z5' may depend on 6 enumerated sites at once, with 64000000"),
    (inside, chain_inside, "outside the plate 'data', depends on the enumerated site 'z0'"),
]


@pytest.mark.parametrize("choice", ["loss", "step"])
@pytest.mark.parametrize(("model", "guide", "message"), REFUSED, ids=names)
def test_what_cannot_be_served_is_refused_by_name(
    model: Any, guide: Any, message: str, choice: str
) -> None:
    loss = {"loss": Estimator_ELBO().loss, "step": Estimator_ELBO().differentiable_loss}[choice]
    with pytest.raises(ValueError, match=message):
        loss(model, guide, X[:4])


@pytest.mark.parametrize(("length", "message"), [(19, "jointly, with 387420489"), (70, "of 61")])
def test_long_chains_without_markov_are_refused(length: int, message: str) -> None:
    with pytest.raises(ValueError, match=rf"{message}.*pyro\.markov"):
        Estimator_ELBO().loss(hmm, guide_of_hmm, numbers(length), all_paths)
