"""Recovered sites follow the exact posterior given the guide's draw, from brute force."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoNormal
from pyro.ops.indexing import Vindex
from torch import Tensor

from pyro_gumbel.infer import recover

SUM = {"enumerate": "parallel"}
Program = Callable[..., Any]
MODES = pytest.mark.parametrize("parallel", [False, True])


pytestmark = pytest.mark.usefixtures("in_float64")


def no_guide(*args: Any) -> None:
    """A guide without sites."""


# Models with values of 0, 1, ..., and the number of values and the shape of each summed site.

INITIAL = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
STEP = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.7, 0.2], [0.4, 0.1, 0.5]], dtype=torch.float64)
LOCS = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)


def chain(x: Tensor, infer: Any = SUM) -> None:
    step = pyro.param("step", STEP)
    z: Any = None
    for t in pyro.markov(range(len(x))):
        probs = INITIAL if z is None else Vindex(step)[..., z, :]
        z = pyro.sample(f"z{t}", dist.Categorical(probs), infer=infer)
        pyro.sample(f"x{t}", dist.Normal(LOCS[z], 0.8), obs=x[t])


def second_order(x: Tensor) -> None:
    before, z = torch.tensor(0), torch.tensor(1)
    for t in pyro.markov(range(len(x)), history=2):
        probs = (Vindex(STEP)[..., before, :] + Vindex(STEP)[..., z, :]) / 2
        before, z = z, pyro.sample(f"z{t}", dist.Categorical(probs), infer=SUM)
        pyro.sample(f"x{t}", dist.Normal(LOCS[z], 0.8), obs=x[t])


def ragged(x: Tensor) -> None:
    """Two sequences, of length 3 and 1."""
    with pyro.plate("sequences", 2):
        z = torch.zeros((), dtype=torch.long)
        for t in pyro.markov(range(3)):
            with poutine.mask(mask=t < torch.tensor([3, 1])):
                z = pyro.sample(f"z{t}", dist.Categorical(Vindex(STEP)[..., z, :]), infer=SUM)
                pyro.sample(f"x{t}", dist.Normal(LOCS[z], 1.0), obs=x.reshape(2, 3)[:, t])


def nested(x: Tensor) -> None:
    """A global site, one in a plate and one in two. The outer plate is the rightmost dimension."""
    y = pyro.sample("y", dist.Bernoulli(0.3), infer=SUM)
    rows, columns = pyro.plate("rows", 2, dim=-1), pyro.plate("columns", 3, dim=-2)
    with rows:
        z = pyro.sample("z", dist.Bernoulli(0.2 + 0.5 * y), infer=SUM)
        with columns:
            w = pyro.sample("w", dist.Bernoulli(0.6 - 0.4 * z), infer=SUM)
            pyro.sample("x", dist.Normal(w + z - y, 1.0), obs=x.reshape(3, 2))


def group_effect(x: Tensor) -> None:
    """Chains in two plates, whose steps depend on a site of the outer plate."""
    groups, members = pyro.plate("groups", 2, dim=-1), pyro.plate("members", 2, dim=-2)
    with groups:
        e = pyro.sample("e", dist.Categorical(torch.tensor([0.3, 0.7])), infer=SUM)
        with members:
            z: Any = 0
            for t in pyro.markov(range(2)):
                rate = Vindex(torch.tensor([[0.2, 0.6], [0.7, 0.1]]))[..., e, z]
                z = pyro.sample(
                    f"z{t}", dist.Categorical(torch.stack([1 - rate, rate], -1)), infer=SUM
                )
                pyro.sample(f"x{t}", dist.Normal(LOCS[z], 1.0), obs=x.reshape(2, 2) + t)


X = torch.tensor([0.3, -1.2, 2.1, 0.4, 1.7, -0.6], dtype=torch.float64)
SHORT = X[:4]
Sites = dict[str, tuple[int, tuple[int, ...]]]
MODELS: dict[str, tuple[Program, Tensor, Sites]] = {
    "chain": (chain, SHORT, {f"z{t}": (3, ()) for t in range(4)}),
    "history of two": (second_order, SHORT, {f"z{t}": (3, ()) for t in range(4)}),
    "ragged": (ragged, X, {f"z{t}": (3, (2,)) for t in range(3)}),
    "group effect": (
        group_effect,
        SHORT,
        {"e": (2, (2,)), "z0": (2, (2, 2)), "z1": (2, (2, 2))},
    ),
    "plates": (nested, X, {"y": (2, ()), "z": (2, (2,)), "w": (2, (3, 2))}),
}
ALL = pytest.mark.parametrize("name", MODELS)


def joint(name: str) -> tuple[dict[str, Tensor], Tensor]:
    """Return all values of the summed sites, and the joint log-probability of each."""
    model, x, sites = MODELS[name]
    elements = {site: torch.Size(shape).numel() for site, (_, shape) in sites.items()}
    numbers = [range(sites[site][0]) for site, count in elements.items() for _ in range(count)]
    rows = torch.tensor(list(itertools.product(*numbers)))
    parts = rows.to(torch.float64 if name == "plates" else rows.dtype).split(
        [*elements.values()], -1
    )
    nesting = max(len(shape) for _, shape in sites.values())
    values = {}
    for (site, (_, shape)), part in zip(sites.items(), parts, strict=True):
        values[site] = part.reshape(-1, *(1,) * (nesting - len(shape)), *shape)
    with torch.no_grad():
        trace = poutine.trace(poutine.condition(model, data=values)).get_trace(x)
        trace.compute_log_prob()
    scored = [site["log_prob"] for site in trace.nodes.values() if "log_prob" in site]
    scores = sum(score.reshape(len(rows), -1).sum(-1) for score in scored if score.dim())
    return {site: value.reshape(-1, *sites[site][1]) for site, value in values.items()}, scores


def seen(name: str, site: str, value: Tensor) -> Tensor:
    """Leave out the steps past the end of a sequence."""
    return value[..., :1] if name == "ragged" and site != "z0" else value


@ALL
@MODES
def test_marginals_equal_sums_over_all_values(name: str, parallel: bool) -> None:
    model, x, sites = MODELS[name]
    found = recover(model, no_guide, x, marginals=True, num_samples=2, parallel=parallel)
    values, scores = joint(name)
    weights = scores.softmax(0)
    for site, (size, shape) in sites.items():
        assert found[site].shape == (2, *shape, size)
        each = torch.nn.functional.one_hot(values[site].long(), size).to(weights)
        expected = torch.tensordot(weights, each, 1)
        for draw in found[site].unbind():
            got, wanted = (seen(name, site, p.movedim(-1, 0)) for p in (draw, expected))
            torch.testing.assert_close(got, wanted)


@ALL
@MODES
def test_draws_have_the_joint_frequencies(name: str, parallel: bool) -> None:
    """Each pair of elements of summed sites, within five standard errors."""
    model, x, sites = MODELS[name]
    draws = 2000 if parallel else 150
    found = recover(model, no_guide, x, num_samples=draws, parallel=parallel)
    values, scores = joint(name)
    weights = scores.softmax(0)

    def moments(each: dict[str, Tensor], weights: Tensor) -> Tensor:
        flat = [seen(name, site, each[site]).reshape(len(weights), -1) for site in sites]
        bits = torch.cat([torch.cat([f == 0, f == 1], -1) for f in flat], -1).to(weights)
        return (weights[:, None] * bits).T @ bits

    expected = moments(values, weights)
    counts = moments(found, torch.full((draws,), 1 / draws))
    error = (expected * (1 - expected) / draws).sqrt() + 1e-9
    assert ((counts - expected).abs() / error).max() < 5


@ALL
@MODES
def test_decoding_finds_the_most_probable_values(name: str, parallel: bool) -> None:
    model, x, sites = MODELS[name]
    found = recover(model, no_guide, x, decode=True, num_samples=2, parallel=parallel)
    values, scores = joint(name)
    best = scores.argmax()
    for site, value in values.items():
        for draw in found[site].unbind():
            torch.testing.assert_close(
                seen(name, site, draw), seen(name, site, value[best].to(draw))
            )


def test_marginals_have_the_gradient_of_sums_over_all_values() -> None:
    found = recover(chain, no_guide, SHORT, marginals=True)["z2"][0, 1]
    step = pyro.get_param_store()._params["step"]
    (grad,) = torch.autograd.grad(found, step)
    values, _ = joint("chain")
    paths = torch.stack([*values.values()], -1)
    logits = (step / step.sum(-1, keepdim=True)).log()  # as Categorical normalises
    scores = INITIAL.log()[paths[:, 0]] + logits[paths[:, :-1], paths[:, 1:]].sum(-1)
    scores = scores + dist.Normal(LOCS[paths], 0.8).log_prob(SHORT).sum(-1)
    (expected,) = torch.autograd.grad((scores.softmax(0) * (paths[:, 2] == 1)).sum(), step)
    torch.testing.assert_close(grad, expected)


# Given the guide's draws


def mixture(x: Tensor, infer: Any = SUM, index: Tensor | None = None, size: int = 6) -> None:
    weight = pyro.sample("weight", dist.Beta(2.0, 3.0))
    locs = pyro.sample("locs", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    with pyro.plate("data", size, subsample=index):
        z = pyro.sample("z", dist.Bernoulli(weight), infer=infer)
        loc = locs[..., 0] + (locs[..., 1] - locs[..., 0]) * z
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def guide_of_mixture(x: Tensor, infer: Any = SUM, index: Tensor | None = None) -> None:
    pyro.sample("weight", dist.Beta(2.0, 2.0))
    loc = pyro.param("loc", torch.tensor([-1.0, 2.0]))
    pyro.sample("locs", dist.Normal(loc, 0.5).to_event(1))


def conditional(found: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return the probabilities of z = 1 given each draw of the guide."""
    weight, locs = found["weight"].unsqueeze(-1), found["locs"]
    fit = dist.Normal(locs.unsqueeze(-2), 1.0).log_prob(x.unsqueeze(-1))
    logits = weight.log() - (1 - weight).log() + fit[..., 1] - fit[..., 0]
    return logits.sigmoid()


@MODES
def test_probabilities_are_conditional_on_the_guides_draws(parallel: bool) -> None:
    options = {"num_samples": 5, "marginals": True, "parallel": parallel}
    found = recover(mixture, guide_of_mixture, X, **options)
    assert found.keys() == {"weight", "locs", "z"}
    assert len(found["weight"].unique()) == 5
    assert found["locs"].shape == (5, 2)
    torch.testing.assert_close(found["z"][..., 1], conditional(found, X))
    (grad,) = torch.autograd.grad(found["z"][2, :, 1].sum(), pyro.param("loc").unconstrained())
    assert grad.abs().min() > 0.1  # through the guide's draw


def test_draws_and_decoded_values_are_conditional_on_the_guides_draws() -> None:
    found = recover(mixture, guide_of_mixture, X, num_samples=1000, parallel=True)
    probs = conditional(found, X)
    error = (probs * (1 - probs)).mean(0) ** 0.5 / 1000**0.5
    assert found["z"].shape == (1000, 6)
    assert (((found["z"] - probs).mean(0)) / error).abs().max() < 5
    # Draws that ignored the guide's draws would have the same mean, but another product.
    product = (found["z"] - probs) * (probs - probs.mean(0))
    assert (product.mean(0) / (product.std(0) / 1000**0.5)).abs().max() < 5
    best = recover(mixture, guide_of_mixture, X, num_samples=9, decode=True)
    torch.testing.assert_close(best["z"], (conditional(best, X) > 0.5).to(X))


@MODES
def test_each_program_runs_once_per_draw_and_once_before(parallel: bool) -> None:
    runs = []

    def counted(program: Program) -> Program:
        def run(*args: Any) -> None:
            runs.append(program)
            program(*args)

        return run

    for option in ({}, {"decode": True}, {"marginals": True}):
        runs.clear()
        programs = counted(mixture), counted(guide_of_mixture)
        recover(*programs, X, num_samples=4, parallel=parallel, **option)
        assert runs.count(mixture) == runs.count(guide_of_mixture) == (2 if parallel else 5)


def test_both_modes_give_the_same_draw_for_a_seed() -> None:
    """A draw in a loop equals a parallel one, bit for bit."""
    found = []
    for parallel in (False, True):
        pyro.set_rng_seed(3)
        found.append(recover(mixture, guide_of_mixture, X, parallel=parallel))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_auxiliary_sites_are_left_out() -> None:
    guide = AutoNormal(poutine.block(mixture, hide=["z"]))
    assert recover(mixture, guide, X).keys() == {"weight", "locs", "z"}


@MODES
def test_predictive_accepts_the_draws(parallel: bool) -> None:
    draws = recover(nested, no_guide, X, num_samples=400)
    unmarked = poutine.infer_config(nested, lambda site: {})
    uncondition = poutine.uncondition(unmarked)
    found = Predictive(uncondition, draws, return_sites=["w", "x"], parallel=parallel)(X)
    assert torch.equal(found["w"], draws["w"])
    mean = draws["w"] + draws["z"].unsqueeze(1) - draws["y"][:, None, None]
    z = (found["x"] - mean).mean(0) * 400**0.5
    assert found["x"].shape == (400, 3, 2)
    assert z.abs().max() < 5


# Plates and structure


@MODES
def test_a_given_minibatch_is_recovered(parallel: bool) -> None:
    index = torch.tensor([4, 1])
    options = {"num_samples": 3, "marginals": True, "parallel": parallel}
    found = recover(mixture, guide_of_mixture, X[index], SUM, index, **options)
    torch.testing.assert_close(found["z"][..., 1], conditional(found, X[index]))


def test_a_plate_that_draws_a_minibatch_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", 6, subsample_size=2) as index:
            z = pyro.sample("z", dist.Bernoulli(0.3), infer=SUM)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    with pytest.raises(ValueError, match=r"plate 'data' draws 2 of 6 data.*subsample=indices"):
        recover(model, no_guide, X)


def test_plates_may_depend_on_the_draw() -> None:
    def model(x: Tensor) -> None:
        deep = bool(pyro.sample("deep", dist.Bernoulli(0.5)))
        z = pyro.sample("z", dist.Bernoulli(0.3), infer=SUM)
        if deep:
            with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 2, dim=-1):
                pyro.sample("x", dist.Normal(3 * z, 1.0), obs=x.reshape(3, 2))

    def guide(x: Tensor) -> None:
        pyro.sample("deep", dist.Bernoulli(0.5))

    found = recover(model, guide, X, num_samples=20, marginals=True)
    logit = torch.tensor(0.3 / 0.7).log() + (3 * X - 4.5).sum()
    expected = torch.where(found["deep"] > 0, logit.sigmoid(), 0.3)
    assert 0 < found["deep"].sum() < 20
    torch.testing.assert_close(found["z"][:, 1], expected)


def test_draws_that_differ_in_sites_are_refused() -> None:
    def model(x: Tensor) -> None:
        count = int(pyro.sample("count", dist.Bernoulli(0.5)))
        for i in range(1 + count):
            pyro.sample(f"z{i}", dist.Bernoulli(0.3), infer=SUM)

    def guide(x: Tensor) -> None:
        pyro.sample("count", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match=r"draws of site 'z1' differ in shape, or some lack it"):
        recover(model, guide, X, num_samples=20)


def unmarked(x: Tensor) -> None:
    pyro.sample("y", dist.Bernoulli(0.3), infer=SUM)
    pyro.sample("z", dist.Bernoulli(0.3))


def scaled_in_parts(x: Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(0.3), infer=SUM)
    with pyro.plate("data", 12, subsample=torch.arange(len(x))):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


REFUSED: dict[str, tuple[Program, dict[str, Any]]] = {
    "decode=True or marginals=True, not both": (chain, {"decode": True, "marginals": True}),
    "num_samples must be an integer of at least 1; got 0": (chain, {"num_samples": 0}),
    "different scales": (scaled_in_parts, {}),
    "'z' is missing from the guide.*enumerate": (unmarked, {}),
    "no summed site. Mark a discrete site": (no_guide, {}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_programs_and_options_without_an_answer_are_refused(message: str) -> None:
    model, options = REFUSED[message]
    with pytest.raises(ValueError, match=message):
        recover(model, no_guide, X, **options)


@pytest.mark.parametrize("option", [{}, {"decode": True}, {"marginals": True}])
def test_impossible_data_are_refused(option: dict[str, Any]) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3), infer=SUM)
            pyro.sample("x", dist.Uniform(z, z + 1, validate_args=False), obs=x)

    possible = recover(model, no_guide, torch.tensor([0.5, 1.5]), **option)["z"]
    assert torch.equal(possible[0].reshape(2, -1)[:, -1], torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"probability zero .* summed site 'z'"):
        recover(model, no_guide, torch.tensor([0.5, 2.5]), **option)
