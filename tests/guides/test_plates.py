"""The plates of automatic guides: subsamples, nesting, and the data plate."""

from __future__ import annotations

import contextlib
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.guide_programs import LOCS, WEIGHTS, X, column, mixture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pyro_gumbel.distributions import OneHot
from pyro_gumbel.guides import AutoAmortized, AutoDiscrete
from pyro_gumbel.infer import Estimator_ELBO

TOTAL = 12


CLASSES = torch.arange(TOTAL) % 4


MATCH = 0.97  # a datum is its latent class, or else any other at 0.01


def likelihood(z: Tensor) -> Any:
    return dist.Categorical(MATCH * z + (1 - MATCH) / 3 * (1 - z))


def from_argument(x: Tensor) -> None:
    with pyro.plate("data", TOTAL, subsample_size=len(x)):
        z = pyro.sample("z", OneHot(torch.ones(4)))
        pyro.sample("x", likelihood(z), obs=x)


def from_indices(x: Tensor, indices: Tensor) -> None:
    with pyro.plate("data", TOTAL, subsample=indices) as chosen:
        z = pyro.sample("z", OneHot(torch.ones(4)))
        pyro.sample("x", likelihood(z), obs=CLASSES[chosen])


def inside(x: Tensor, size: int) -> None:
    with pyro.plate("data", TOTAL, subsample_size=size):
        batch = pyro.subsample(x, event_dim=0)
        z = pyro.sample("z", OneHot(torch.ones(4)))
        pyro.sample("x", likelihood(z), obs=batch)


def all_rows(x: Tensor, *_: Any) -> Tensor:
    return nn.functional.one_hot(x, 4).float()


def present_rows(x: Tensor, *_: Any) -> Tensor:
    return all_rows(pyro.subsample(x, event_dim=0))


def some_of(x: Tensor, size: int) -> tuple[Tensor]:
    return (x[torch.randperm(TOTAL)[:size]],)


def some_indices(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    indices = torch.randperm(TOTAL)[:size]
    return x[indices], indices


def everything(x: Tensor, size: int) -> tuple[Tensor, int]:
    return x, size


SUBSAMPLED = {
    "argument": (from_argument, all_rows, some_of),
    "indices": (from_indices, all_rows, some_indices),
    "inside": (inside, all_rows, everything),
    "both inside": (inside, present_rows, everything),
}


@pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorized"])
@pytest.mark.parametrize("first", [TOTAL, 5], ids=["set up on all", "set up on a part"])
@pytest.mark.parametrize("way", SUBSAMPLED)
def test_subsampling(way: str, first: int, vectorize: bool) -> None:
    """Every row meets its own datum, and the bound is scaled to all data."""
    model, encoder, arguments = SUBSAMPLED[way]
    guide = AutoAmortized(model, encoder)
    guide.setup(*arguments(CLASSES, first))
    with torch.no_grad():  # the guide is sure of the datum's class
        guide.heads["z"].linear.weight.copy_(200 * torch.eye(4))
    elbo = Estimator_ELBO(2, vectorize_particles=vectorize, max_plate_nesting=1)
    expected = -TOTAL * (torch.tensor(0.25).log() + torch.tensor(MATCH).log()).item()
    for size in (5, TOTAL, 3):
        loss = elbo.loss(model, guide, *arguments(CLASSES, size))
        assert loss == pytest.approx(expected, rel=1e-5)


def test_create_plates_is_asked_first() -> None:
    calls = []

    def create_plates(x: Tensor) -> pyro.plate:
        calls.append(len(x))
        return pyro.plate("data", len(x), dim=-1)

    guide = AutoAmortized(mixture, column, create_plates=create_plates)
    assert guide(X)["z"].shape == (5, 3)
    assert calls


def topics(counts: Tensor) -> None:
    """Documents to the left of words, and a plate of topics that has nothing to do with either."""
    documents, words = counts.shape
    with pyro.plate("topics", 2):
        pyro.sample("weight", dist.Gamma(2.0, 1.0))
    with pyro.plate("documents", documents, dim=-2):
        length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
        with pyro.plate("words", words, dim=-1):
            topic = pyro.sample("topic", dist.Categorical(torch.ones(3)))
            pyro.sample("counts", dist.Poisson(length * (1 + topic)), obs=counts)


@pytest.mark.parametrize("autoregressive", [False, True])
@pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorized"])
def test_nested_plates(vectorize: bool, autoregressive: bool) -> None:
    counts = torch.tensor([[1.0, 2.0, 0.0, 4.0], [0.0, 1.0, 1.0, 3.0], [5.0, 2.0, 1.0, 0.0]])
    guide = AutoAmortized(topics, nn.Linear(4, 6), autoregressive=autoregressive)
    values = guide(counts)
    assert {name: tuple(value.shape) for name, value in values.items()} == {
        "weight": (2,),
        "length": (3, 1),
        "topic": (3, 4),
    }
    assert guide.heads["topic"].linear.weight.shape == (12, 7 if autoregressive else 6)
    elbo = Estimator_ELBO(3, vectorize_particles=vectorize)
    for batch in (counts, counts[:2]):
        assert torch.isfinite(elbo.loss_and_grads(topics, guide, batch))


def test_rows_of_a_nested_site_belong_to_their_datum() -> None:
    counts = torch.rand(3, 4).round()
    guide = AutoAmortized(topics, lambda counts: torch.eye(3)[: len(counts)])
    guide.setup(counts)
    raw = torch.randn(3, 4, 3)  # documents, words, topics
    with torch.no_grad():
        guide.heads["topic"].linear.weight.copy_(raw.flatten(1).T)
        guide.heads["topic"].linear.bias.zero_()
    probs = guide.posterior(counts)["topic"].probs
    torch.testing.assert_close(probs, raw.softmax(-1))


def test_a_factor_is_data() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(WEIGHTS))
            pyro.factor("likelihood", dist.Normal(z @ LOCS, 1.0).log_prob(x))

    assert AutoAmortized(model, column)(X)["z"].shape == (5, 3)


def test_structure_has_to_stay() -> None:
    def model(x: Tensor) -> None:
        if len(x) > 3:
            mixture(x)

    guide = AutoAmortized(model, column)
    guide(X)
    with pytest.raises(
        ValueError, match=r"had the plates \['data'\] when the guide was set up.*are missing"
    ):
        guide(X[:2])


FAMILIES = {
    "bernoulli": dist.Bernoulli(torch.tensor(0.3)),
    "one_hot": dist.OneHotCategorical(WEIGHTS),
    "categorical": dist.Categorical(WEIGHTS),
}


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    data=st.integers(1, 3),
    outer=st.integers(0, 3),  # 0: no such plate
    inner=st.integers(0, 3),
    event=st.lists(st.integers(1, 3), max_size=2),
    family=st.sampled_from(sorted(FAMILIES)),
    vectorize=st.booleans(),
    autoregressive=st.booleans(),
)
def test_any_shape_of_plates_and_events(
    data: int,
    outer: int,
    inner: int,
    event: list[int],
    family: str,
    vectorize: bool,
    autoregressive: bool,
) -> None:
    """At the prior the loss is zero, and values have the shapes of the model."""
    prior = FAMILIES[family].expand(event).to_event(len(event))
    sizes = {"outer": (outer, -3), "data": (data, -2), "inner": (inner, -1)}
    seen = {}

    def model() -> None:
        with contextlib.ExitStack() as stack:
            for name, (size, dim) in sizes.items():
                if size:
                    stack.enter_context(pyro.plate(name, size, dim=dim))
            for name in ("first", "second"):
                seen[name] = pyro.sample(name, prior).shape

    pyro.clear_param_store()
    guides = [
        AutoDiscrete(model),
        AutoAmortized(
            model, lambda: torch.zeros(data, 2), plate="data", autoregressive=autoregressive
        ),
    ]
    for guide in guides:
        values = guide()
        model()
        assert {name: value.shape for name, value in values.items()} == seen
        for head in guide.heads.values():
            if hasattr(head, "linear"):
                torch.nn.init.zeros_(head.linear.weight)
        elbo = Estimator_ELBO(2, vectorize_particles=vectorize, max_plate_nesting=3)
        assert abs(float(elbo.loss_and_grads(model, guide))) < 1e-4
