"""The base class: the estimator that its docstring shows, as written."""

from __future__ import annotations

import doctest

import pytest
import torch
from helpers.coupled_problems import copies, copy_gradients, exact
from helpers.problems import relative_error, worst_z
from torch import Tensor

from pyro_gumbel.distributions.families import is_bit, is_one_hot
from pyro_gumbel.estimators import Estimator

COPIES = 15_000


def documented_estimator() -> type[Estimator]:
    """Run the docstring's example, and nothing else, and return the class that it defines."""
    examples = doctest.DocTestParser().get_examples(str(Estimator.__doc__))
    source = "".join(example.source for example in examples)
    assert source.count("\n") <= 16
    namespace = {"torch": torch, "Estimator": Estimator}
    exec(source, namespace)  # noqa: S102
    return namespace["AntitheticPair"]


@pytest.mark.parametrize("num_particles", [1, 3])
def test_the_documented_estimator_is_unbiased(num_particles: int, vectorize: bool) -> None:
    """15,000 estimates: standard errors are below 2 % of the gradient, and |z| < 5."""
    options = {"num_particles": num_particles, "vectorize": vectorize}
    draws = copy_gradients(copies("bits", COPIES), documented_estimator()(), **options)
    assert relative_error(draws, exact("bits")[1]) < 0.02
    assert worst_z(draws, exact("bits")[1]) < 5


def test_a_wrong_weight_is_seen() -> None:
    class Wrong(documented_estimator()):  # type: ignore[misc]
        def surrogate(self, site: object) -> Tensor:
            return 1.1 * super().surrogate(site)

    draws = copy_gradients(copies("bits", COPIES), Wrong())
    assert worst_z(draws, exact("bits")[1]) > 5


def test_its_repr_rebuilds_it() -> None:
    assert repr(documented_estimator()()) == "AntitheticPair()"


def test_families_say_what_an_estimator_supports() -> None:
    class ForBits(Estimator):
        families = (is_bit,)

    class ForBoth(ForBits):
        families = (is_bit, is_one_hot)

    bits = torch.distributions.Bernoulli(0.5)
    one_hot = torch.distributions.OneHotCategorical(torch.ones(3))
    found = [
        kind().supports(fn) for kind in (Estimator, ForBits, ForBoth) for fn in (bits, one_hot)
    ]
    assert found == [False, False, True, False, True, True]
