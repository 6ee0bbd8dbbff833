"""Errors about arguments of estimators, baselines and schedules."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from helpers.faulty import (
    MISFIT,
    ONE_HOT,
    PLATED_ONE_HOT,
    UNNAMED,
    P,
    named_arguments,
    step,
    with_gradient,
)
from torch import nn

from pyro_gumbel.estimators import (
    DisARM,
    Enumerate,
    Exponential,
    GappedStraightThrough,
    GumbelRao,
    GumbelSoftmax,
    GumbelStraightThrough,
    LeaveOneOut,
    Linear,
    LocalExpectation,
    MovingAverage,
    MuProp,
    NeuralBaseline,
    Rebar,
    ReinMax,
    ReinMaxRao,
    Relax,
    Score,
    StraightThrough,
)
from pyro_gumbel.infer import config_gradient

ROWS = {
    # Parameters of estimators
    "decay": (lambda: MovingAverage(1.0), ValueError, r"decay must lie in \[0, 1\); got 1.0"),
    "negative decay": (lambda: MovingAverage(-0.1), ValueError, r"decay .*; got -0.1"),
    "nan decay": (lambda: MovingAverage(math.nan), ValueError, r"decay .*; got nan"),
    "decay's kind": (
        lambda: MovingAverage("a"),
        TypeError,
        r"MovingAverage: decay must be a number, such as decay=0.9; got 'a'",
    ),
    "baseline's class": (
        lambda: Score(LeaveOneOut),
        TypeError,
        r"Score: baseline must be an object such as LeaveOneOut\(\).*got <class",
    ),
    "baseline's name": (lambda: Score("leave_one_out"), TypeError, r"got 'leave_one_out'"),
    "neural baseline's module": (
        lambda: NeuralBaseline(nn.Linear, "x"),
        TypeError,
        r"NeuralBaseline: module must be a torch.nn.Module .*nn.Linear\(3, 1\); got <class",
    ),
    "neural baseline's kind of input": (
        lambda: NeuralBaseline(nn.Linear(3, 1), P),
        TypeError,
        r"NeuralBaseline: input must be the name of an argument.*such as 'x'.*; got tensor",
    ),
    "neural baseline's input": (
        step(named_arguments, config_gradient(named_arguments, {"z": Score(UNNAMED)}), P),
        ValueError,
        r"NeuralBaseline at site 'z': guide and model have no argument 'pixels'; "
        r"their arguments are \['images'\].*or a callable",
    ),
    "neural baseline's output": (
        step(PLATED_ONE_HOT, config_gradient(PLATED_ONE_HOT, {"z": Score(MISFIT)})),
        ValueError,
        r"NeuralBaseline at site 'z': the module returned shape \(7,\), which does not broadcast "
        r"to the site's batch shape \(2,\); return one prediction for each element of the plate",
    ),
    "gap": (lambda: GappedStraightThrough(gap=-1.0), ValueError, r"gap must not be.*got -1.0"),
    "nan gap": (lambda: GappedStraightThrough(gap=math.nan), ValueError, r"gap .*got nan"),
    "gap's kind": (
        lambda: GappedStraightThrough(gap="a"),
        TypeError,
        r"GappedStraightThrough: gap must be a number, such as gap=1.0; got 'a'",
    ),
    "chunk's kind": (
        lambda: LocalExpectation(chunk_size="a"),
        ValueError,
        r"LocalExpectation: chunk_size must be an integer of at least 1; got 'a'",
    ),
    "half a chunk": (
        lambda: LocalExpectation(chunk_size=1.5),
        ValueError,
        r"chunk_size must be an integer of at least 1; got 1.5",
    ),
    "no samples": (
        lambda: GumbelRao(num_samples=0),
        ValueError,
        r"GumbelRao: num_samples must be an integer of at least 1; got 0",
    ),
    "half a sample": (
        lambda: ReinMaxRao(num_samples=1.5),
        ValueError,
        r"ReinMaxRao: num_samples must be an integer of at least 1; got 1.5",
    ),
    "temperature's shape": (
        with_gradient(PLATED_ONE_HOT, StraightThrough(torch.ones(3))),
        ValueError,
        r"At site 'z', StraightThrough\(.*temperature of shape \(3,\) does not broadcast to the "
        r"site's batch shape \(2,\); give a number or one temperature for each element of the",
    ),
    "temperature with an event": (
        with_gradient(PLATED_ONE_HOT, StraightThrough(torch.ones(2, 1))),
        ValueError,
        r"temperature of shape \(2, 1\) does not broadcast",
    ),
    "a temperature for each particle": (
        with_gradient(
            ONE_HOT, GumbelSoftmax(torch.ones(3)), num_particles=3, vectorize_particles=True
        ),
        ValueError,
        r"At site 'z'.*temperature of shape \(3,\) does not broadcast to the site's batch.* \(\)",
    ),
    "a backward temperature for each particle": (
        with_gradient(
            ONE_HOT,
            GumbelStraightThrough(backward_temperature=torch.ones(3)),
            num_particles=3,
            vectorize_particles=True,
        ),
        ValueError,
        r"At site 'z'.*temperature of shape \(3,\) does not broadcast",
    ),
    "drawn without an ELBO": (
        lambda: StraightThrough(torch.ones(3)).draw(dist.OneHotCategorical(P.expand(2, 3))),
        ValueError,
        r"StraightThrough: temperature of shape \(3,\) does not broadcast to .* \(2,\)",
    ),
    # Schedules
    "start": (lambda: Exponential(0.0, 0.1, 1.0), ValueError, r"Exponential: start must be posi"),
    "end": (lambda: Exponential(1.0, -0.1, 1.0), ValueError, r"Exponential: end must be positive"),
    "infinite start": (lambda: Linear(math.inf, 1.0, 3), ValueError, r"Linear: start .*got inf"),
    "linear end": (lambda: Linear(1.0, 0.0, 3), ValueError, r"Linear: end must be positive"),
    "steps": (
        lambda: Linear(1.0, 0.5, 0),
        ValueError,
        r"Linear: steps must be an integer of at least 1; got 0",
    ),
    "half a step": (
        lambda: Linear(1.0, 0.5, 10.9),
        ValueError,
        r"Linear: steps must be an integer of at least 1; got 10.9",
    ),
    "start's kind": (
        lambda: Exponential("1", 0.5, 0.1),
        TypeError,
        r"Exponential: start must be a number, such as start=1.0; got '1'",
    ),
    "end's kind": (
        lambda: Linear(1.0, None, 10),
        TypeError,
        r"Linear: end must be a number, such as end=1.0; got None",
    ),
    "rate's kind": (
        lambda: Exponential(1.0, 0.5, "a"),
        TypeError,
        r"Exponential: rate must be a number, such as rate=0.0001; got 'a'",
    ),
    "rate away": (
        lambda: Exponential(1.0, 0.5, -0.1),
        ValueError,
        r"Exponential: rate=-0.1 never leads from start=1.0 to end=0.5; a positive rate decays",
    ),
    "rate upwards": (
        lambda: Exponential(0.5, 1.0, 0.1),
        ValueError,
        r"rate=0.1 never leads from start=0.5 to end=1.0",
    ),
    "nan rate": (lambda: Exponential(1.0, 0.5, math.nan), ValueError, r"rate=nan never leads"),
}


@pytest.mark.parametrize("row", ROWS)
def test_message(row):
    run, kind, pattern = ROWS[row]
    with pytest.raises(kind, match="(?s)" + pattern):
        run()


TEMPERED = [
    GappedStraightThrough,
    GumbelRao,
    GumbelSoftmax,
    GumbelStraightThrough,
    ReinMax,
    ReinMaxRao,
    StraightThrough,
]


@pytest.mark.parametrize("make", TEMPERED)
@pytest.mark.parametrize(
    "temperature",
    [0.0, -1.0, math.nan, math.inf, torch.tensor([1.0, 0.0]), torch.tensor(math.nan)],
)
def test_temperature_that_is_not_positive(make, temperature):
    with pytest.raises(ValueError, match=f"{make.__name__}: temperature must be positive; got"):
        make(temperature)


@pytest.mark.parametrize("make", TEMPERED)
@pytest.mark.parametrize("temperature", ["0.5", None, [1.0], True])
def test_temperature_that_is_none(make, temperature):
    match = (
        rf"{make.__name__}: temperature must be a number, a tensor or a schedule, such as "
        r"temperature=0.5 or temperature=Exponential\(1.0, 0.5, 1e-4\); got "
    )
    with pytest.raises(TypeError, match=match):
        make(temperature)


@pytest.mark.parametrize("temperature", [Exponential(1.0, 0.5, 0.1), torch.ones(3), "a", True])
@pytest.mark.parametrize("make", [Rebar, lambda given: Relax(nn.Linear(3, 1), temperature=given)])
def test_a_temperature_that_is_trained_starts_from_a_number(make, temperature):
    match = r"(Rebar|Relax): temperature must be a number, such as temperature=0.5; got "
    with pytest.raises(TypeError, match=match):
        make(temperature)


@pytest.mark.parametrize("make", [*TEMPERED, Rebar])
def test_numpy_numbers_are_accepted_as_temperatures(make):
    assert make(np.float32(0.5)).temperature == 0.5


def test_numpy_numbers_become_python_numbers():
    assert repr(GumbelSoftmax(np.float32(0.5))) == "GumbelSoftmax(0.5)"
    assert repr(Linear(np.float64(1), np.float32(0.5), np.int64(3))) == "Linear(1.0, 0.5, 3)"
    assert repr(MovingAverage(np.float32(0.5))) == "MovingAverage(0.5)"


def test_backward_temperature_is_checked_by_its_own_name():
    with pytest.raises(ValueError, match="backward_temperature must be positive; got 0"):
        GumbelStraightThrough(1.0, backward_temperature=0)


@pytest.mark.parametrize("kind", [DisARM, Enumerate, LeaveOneOut, MuProp])
def test_signatures_of_what_takes_no_argument(kind: type) -> None:
    assert not inspect.signature(kind).parameters
    with pytest.raises(TypeError):
        kind(2)
