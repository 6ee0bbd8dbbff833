"""The estimator that the base class's docstring shows, run to the letter."""

from __future__ import annotations

import doctest

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.problems import (
    Problem,
    bit_values,
    draw_gradients,
    exact_gradient,
    relative_error,
    worst_z,
)
from torch import Tensor

from pyro_gumbel.estimators import Estimator

X = torch.tensor([0.7, -0.4])


def documented_estimator() -> type[Estimator]:
    """Run the docstring's example, and nothing else, and return the class that it defines."""
    examples = doctest.DocTestParser().get_examples(str(Estimator.__doc__))
    source = "".join(example.source for example in examples)
    assert source.count("\n") <= 16
    namespace = {"torch": torch, "Estimator": Estimator}
    exec(source, namespace)  # noqa: S102
    return namespace["AntitheticPair"]


def model(x: Tensor) -> None:
    weight = pyro.param("weight", torch.zeros(2))
    with pyro.plate("data", 2, dim=-1):
        one = pyro.sample("one", dist.Bernoulli(torch.tensor([0.2, 0.7]).to(weight)).to_event(1))
        two = pyro.sample("two", dist.Bernoulli(logits=one.sum(-1) - 0.4))
        pyro.sample("x", dist.Normal((one * weight).sum(-1) * (1 + two) ** 2, 1.0), obs=x)


def guide(x: Tensor) -> None:
    first, second = pyro.param("first"), pyro.param("second")
    with pyro.plate("data", 2, dim=-1):
        one = pyro.sample("one", dist.Bernoulli(logits=first).to_event(1))
        pyro.sample("two", dist.Bernoulli(logits=one @ second))


@pytest.fixture
def problem() -> Problem:
    params = {
        "first": torch.tensor([[0.4, -1.1], [0.9, 0.2]]),
        "second": torch.tensor([0.8, -0.6]),
        "weight": torch.tensor([1.2, -0.7]),
    }
    supports = {"one": bit_values((2, 2)), "two": bit_values((2,))}
    return Problem(model, guide, params, supports, (X,))


def test_the_documented_estimator_is_unbiased(problem: Problem) -> None:
    _, exact = exact_gradient(problem)
    draws, _ = draw_gradients(problem, documented_estimator()(), 600, num_particles=40)
    assert relative_error(draws, exact) < 0.02
    assert worst_z(draws, exact) < 5


def test_the_documented_estimator_looped_is_unbiased(problem: Problem) -> None:
    _, exact = exact_gradient(problem)
    draws, _ = draw_gradients(
        problem, documented_estimator()(), 400, num_particles=3, vectorize=False
    )
    assert relative_error(draws, exact) < 0.1
    assert worst_z(draws, exact) < 5


def test_a_wrong_weight_is_seen(problem: Problem) -> None:
    class Wrong(documented_estimator()):  # type: ignore[misc]
        def surrogate(self, site: object) -> Tensor:
            return 1.1 * super().surrogate(site)

    _, exact = exact_gradient(problem)
    draws, _ = draw_gradients(problem, Wrong(), 600, num_particles=40)
    assert worst_z(draws, exact) > 5


def test_its_repr_rebuilds_it() -> None:
    assert repr(documented_estimator()()) == "AntitheticPair()"
