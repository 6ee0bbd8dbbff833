"""Bad configurations, options and parameters: errors that name the culprit and the remedy."""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from helpers.faulty import (
    BIT,
    MISFIT,
    ONE_HOT,
    PLATED_ONE_HOT,
    UNNAMED,
    P,
    misnamed,
    named_arguments,
    observed,
    site,
    step,
    with_gradient,
)
from torch import nn

from pyro_gumbel.estimators import (
    Exponential,
    GappedStraightThrough,
    GumbelRao,
    GumbelSoftmax,
    GumbelStraightThrough,
    LeaveOneOut,
    Linear,
    LocalExpectation,
    MovingAverage,
    NeuralBaseline,
    Rebar,
    ReinMax,
    ReinMaxRao,
    Relax,
    Score,
    StraightThrough,
)
from pyro_gumbel.infer import Estimator_ELBO, ImportanceWeighted_ELBO, config_gradient

ROWS = {
    # config_gradient: what it is given
    "no config": (
        lambda: config_gradient(ONE_HOT),
        TypeError,
        r"config is missing; write config_gradient\(guide, config\)",
    ),
    "nothing": (
        lambda: config_gradient(),
        TypeError,
        r"config is missing; write config_gradient\(guide, config\)",
    ),
    "guide left out": (
        lambda: config_gradient({"z": ReinMax()}),
        TypeError,
        r"expected the guide as the first argument, got \{'z': ReinMax\(1.0\)\}.*"
        r"@config_gradient\(config=",
    ),
    "a name first": (
        lambda: config_gradient("reinmax"),
        TypeError,
        r"expected the guide as the first argument, got 'reinmax'",
    ),
    "swapped": (
        lambda: config_gradient({"z": "reinmax"}, ONE_HOT),
        TypeError,
        r"expected the guide as the first argument, got \{'z': 'reinmax'\}; "
        r"write config_gradient\(guide",
    ),
    "an estimator first": (
        lambda: config_gradient(ReinMax(), ONE_HOT),
        TypeError,
        r"expected the guide as the first argument, got ReinMax\(1.0\)",
    ),
    "decorated no program": (
        lambda: config_gradient(config="reinmax")(3),
        TypeError,
        r"expected the guide as the first argument, got 3",
    ),
    "unknown name": (
        lambda: config_gradient(ONE_HOT, "rienmax"),
        ValueError,
        r"'rienmax', an unknown estimator name; the names are \[.*'score'.*Did you mean 'reinmax'",
    ),
    "no name without a network": (
        lambda: config_gradient(ONE_HOT, "relax"),
        ValueError,
        r"'relax', an unknown estimator name;.*Relax needs a network: write Relax\(critic\)",
    ),
    "unknown name of a site": (
        lambda: config_gradient(ONE_HOT, {"z": "gumbel"}),
        ValueError,
        r"for site 'z' got 'gumbel', an unknown estimator name",
    ),
    "a class's name": (
        lambda: config_gradient(ONE_HOT, "ReinMax"),
        ValueError,
        r"'ReinMax', an unknown estimator name.*Did you mean 'reinmax'",
    ),
    "a class": (
        lambda: config_gradient(ONE_HOT, {"z": ReinMax}),
        TypeError,
        r"for site 'z' got the class ReinMax; give an object: ReinMax\(\)",
    ),
    "a class for all": (
        lambda: config_gradient(ONE_HOT, ReinMax),
        TypeError,
        r"config_gradient: got the class ReinMax; give an object: ReinMax\(\)",
    ),
    "a number": (
        lambda: config_gradient(ONE_HOT, {"z": 0.5}),
        TypeError,
        r"for site 'z' got 0.5; give an estimator such as ReinMax\(\), or a name such as",
    ),
    "a number for all": (
        lambda: config_gradient(ONE_HOT, 0.5),
        TypeError,
        r"config_gradient: got 0.5; give an estimator such as ReinMax\(\)",
    ),
    "a callable's nonsense": (
        lambda: config_gradient(ONE_HOT, lambda msg: 3)(),
        TypeError,
        r"at site 'z', the config callable returned 3; give an estimator",
    ),
    "unknown site": (
        lambda: config_gradient(misnamed, {"latent_x": ReinMax()})(),
        ValueError,
        r"no latent site 'latent_x'; its sites are \['latent_z'\]. Did you mean 'latent_z'\?.*"
        r"use a callable",
    ),
    "a site in another case": (
        lambda: config_gradient(ONE_HOT, {"Z": ReinMax()})(),
        ValueError,
        r"no latent site 'Z'; its sites are \['z'\]. Did you mean 'z'\? Observed sites of the "
        r"model have no estimator",
    ),
    "a site that is no name": (
        lambda: config_gradient(ONE_HOT, {0: ReinMax(), "a": ReinMax()})(),
        ValueError,
        r"no latent site 0; its sites are \['z'\]",
    ),
    "a site that is observed": (
        lambda: config_gradient(observed, {"z": ReinMax()})(),
        ValueError,
        r"site 'z' is observed in the guide, and only latent sites have estimators: \[\]. Remove "
        r"'z' from the config, or remove obs=.*use a callable",
    ),
    # infer={...} at the site
    "infer: a number": (
        step(BIT, site(lambda: dist.Bernoulli(0.3), gradient=1)),
        TypeError,
        r"at site 'z', infer\['gradient'\] is 1; give an estimator",
    ),
    "infer: unknown name": (
        step(BIT, site(lambda: dist.Bernoulli(0.3), gradient="scorer")),
        ValueError,
        r"at site 'z', infer\['gradient'\] is 'scorer', an unknown est.*Did you mean 'score'",
    ),
    "infer: Pyro's baseline": (
        step(BIT, site(lambda: dist.Bernoulli(0.3), baseline={"typo": 1})),
        ValueError,
        r"At site 'z', infer\['baseline'\] has no effect in Estimator_ELBO; write "
        r"infer=\{'gradient': Score\(MovingAverage\(\)\)\}",
    ),
    "infer: Pyro's enumerate": (
        step(BIT, site(lambda: dist.Bernoulli(0.3), enumerate="parallel")),
        ValueError,
        r"infer\['enumerate'\] has no effect in .*; write infer=\{'gradient': Enumerate\(\)\}",
    ),
    "infer: a typo": (
        step(BIT, site(lambda: dist.Bernoulli(0.3), estimator="nonsense")),
        ValueError,
        r"infer\['estimator'\] has no effect in .*; the option for an estimator is 'gradient'",
    ),
    # Estimator_ELBO's options
    "default: unknown": (
        lambda: Estimator_ELBO(default="reinmaks"),
        ValueError,
        r"Estimator_ELBO: default is 'reinmaks', an unknown estimator name.*'reinmax'\?",
    ),
    "default: a class": (
        lambda: Estimator_ELBO(default=Score),
        TypeError,
        r"Estimator_ELBO: default is the class Score; give an object: Score\(\)",
    ),
    "no particles": (
        lambda: Estimator_ELBO(num_particles=0),
        ValueError,
        r"Estimator_ELBO: num_particles must be an integer of at least 1; got 0",
    ),
    "half a particle": (
        lambda: Estimator_ELBO(num_particles=1.5),
        ValueError,
        r"num_particles must be an integer of at least 1; got 1.5",
    ),
    "a misspelt option": (
        lambda: Estimator_ELBO(vectorise_particles=True),
        TypeError,
        r"Estimator_ELBO has no argument 'vectorise_particles'; its arguments are \["
        r"'num_particles', 'analytic_kl', .*Did you mean 'vectorize_particles'\?",
    ),
    "a misspelt option of the importance-weighted bound": (
        lambda: ImportanceWeighted_ELBO(2, doubly_reparametrized=True),
        TypeError,
        r"ImportanceWeighted_ELBO has no argument .*Did you mean 'doubly_reparameterized'\?",
    ),
    "recording by torch.jit": (
        lambda: Estimator_ELBO(jit_options={"check_trace": False}),
        TypeError,
        r"Estimator_ELBO: jit_options has no effect; .*CapturedSVI\(model, guide, optim, loss\)",
    ),
    "another bound's exponent": (
        lambda: ImportanceWeighted_ELBO(2, tail_adaptive_beta=-0.5),
        TypeError,
        r"ImportanceWeighted_ELBO: tail_adaptive_beta has no effect; .*TraceTailAdaptive_ELBO",
    ),
    "a deprecated option": (
        lambda: Estimator_ELBO(max_iarange_nesting=1),
        TypeError,
        r"Estimator_ELBO: max_iarange_nesting has no effect; write max_plate_nesting",
    ),
    "an option of no kind": (
        lambda: Estimator_ELBO(kwargs=3),
        TypeError,
        r"Estimator_ELBO has no argument 'kwargs'",
    ),
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


def test_options_of_pyro_and_of_subclasses_are_known():
    class Louder(Estimator_ELBO):
        def __init__(self, *, volume=1, **kwargs):
            super().__init__(**kwargs)

    assert Louder(volume=2, retain_graph=True, max_plate_nesting=1).retain_graph
    with pytest.raises(TypeError, match="Louder has no argument 'volumes'.*Did you mean 'volume'"):
        Louder(volumes=2)
    with pytest.raises(TypeError, match="Louder: jit_options has no effect"):
        Louder(jit_options={})


def test_only_options_with_an_effect_are_suggested():
    with pytest.raises(TypeError, match="has no argument 'jit_option'") as caught:
        Estimator_ELBO(jit_option={})
    assert "'retain_graph'" in str(caught.value)
    assert "'jit_options'" not in str(caught.value)


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
def test_numbers_of_numpy_are_temperatures(make):
    assert make(np.float32(0.5)).temperature == 0.5


def test_numbers_of_numpy_become_pythons():
    assert repr(GumbelSoftmax(np.float32(0.5))) == "GumbelSoftmax(0.5)"
    assert repr(Linear(np.float64(1), np.float32(0.5), np.int64(3))) == "Linear(1.0, 0.5, 3)"
    assert repr(MovingAverage(np.float32(0.5))) == "MovingAverage(0.5)"


def test_backward_temperature_is_checked_by_its_own_name():
    with pytest.raises(ValueError, match="backward_temperature must be positive; got 0"):
        GumbelStraightThrough(1.0, backward_temperature=0)


def test_switches_of_warnings_are_accepted():
    elbo = Estimator_ELBO(ignore_jit_warnings=True, strict_enumeration_warning=False)
    assert elbo.num_particles == 1
