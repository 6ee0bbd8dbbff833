"""Estimators are read from a command line."""

from __future__ import annotations

import pytest

import gradients


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("reinmax", ("ReinMax(1.0)", 2)),
        ("score:4", ("Score(LeaveOneOut())", 4)),
        ("score:1", ("Score(MovingAverage(0.9))", 1)),
        ("auto", ("Score(LeaveOneOut())", 2)),
        ("reinmax@1.3", ("ReinMax(1.3)", 2)),
        ("reinmax@.5", ("ReinMax(0.5)", 2)),
        ("reinmax@5e-1", ("ReinMax(0.5)", 2)),
        ("gumbel_rao@0.5:3", ("GumbelRao(0.5, num_samples=10)", 3)),
    ],
)
def test_parse(text: str, expected: tuple[str, int]) -> None:
    choice, num_particles = gradients.parse(text, num_particles=2)
    assert (repr(choice), num_particles) == expected


def test_temperature_goes_to_those_that_have_one() -> None:
    assert repr(gradients.parse("reinmax_rao", 1, 0.7)[0]) == "ReinMaxRao(0.7, num_samples=10)"
    assert repr(gradients.parse("score", 2, 0.7)[0]) == "Score(LeaveOneOut())"


def test_auto_is_pathwise_where_it_can_be() -> None:
    assert repr(gradients.parse("auto", reparameterized=True)[0]).startswith("Pathwise")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("reinmx", "unknown estimator name.*Did you mean 'reinmax'"),
        ("score@0.5", "score has no temperature"),
        ("reinmax:0", "at least 1"),
        ("ReinMax()", "write NAME, NAME@TEMPERATURE or NAME:K"),
        ("reinmax@1.3.2", "write NAME, NAME@TEMPERATURE or NAME:K"),
        ("reinmax@-1", "temperature must be positive"),
    ],
)
def test_parse_refuses(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        gradients.parse(text)
