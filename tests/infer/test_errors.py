"""Bad input: an error that names the culprit and says what to write instead."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_gumbel.distributions import RelaxedOneHot
from pyro_gumbel.estimators import (
    Enumerate,
    Exponential,
    GappedStraightThrough,
    GumbelRao,
    GumbelSoftmax,
    GumbelStraightThrough,
    LeaveOneOut,
    Linear,
    MovingAverage,
    NeuralBaseline,
    Pathwise,
    ReinMax,
    ReinMaxRao,
    Score,
    StraightThrough,
)
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

P = torch.tensor([0.2, 0.3, 0.5])
LOGITS = P.log()
HALF = torch.tensor(0.5)


def site(fn, **infer):
    """A program of one site, made anew at each run."""

    def program(*args, **kwargs):
        return pyro.sample("z", fn(), infer=infer)

    return program


ONE_HOT = site(lambda: dist.OneHotCategorical(P))
BIT = site(lambda: dist.Bernoulli(0.3))
INDEX = site(lambda: dist.Categorical(P))
NORMAL = site(lambda: dist.Normal(0.0, 1.0))
RELAXED = site(lambda: RelaxedOneHot(HALF, probs=P))
PYRO_HARD = site(lambda: dist.RelaxedOneHotCategoricalStraightThrough(HALF, probs=P))
PYRO_HARD_BIT = site(lambda: dist.RelaxedBernoulliStraightThrough(HALF, probs=HALF))
PYRO_SOFT = site(lambda: dist.RelaxedOneHotCategorical(HALF, probs=P))


def step(model, guide, *args, elbo=None):
    """Take one step."""
    return lambda: (elbo or Estimator_ELBO()).loss_and_grads(model, guide, *args)


def with_gradient(program, estimator, **options):
    return step(program, config_gradient(program, estimator), elbo=Estimator_ELBO(**options))


def empty(*args):
    pass


def observed(*args):
    pyro.sample("z", dist.Bernoulli(0.3), obs=torch.tensor(1.0))


def misnamed(*args):
    pyro.sample("latent_z", dist.Bernoulli(0.3))


def plated(fn, size=2):
    def program(*args):
        with pyro.plate("rows", size):
            return pyro.sample("z", fn())

    return program


def enumerated_inside_observed_outside():
    with pyro.plate("rows", 2):
        z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.3)))
    pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=HALF)


PLATED_ONE_HOT = plated(lambda: dist.OneHotCategorical(P.expand(2, 3)))
MISFIT = NeuralBaseline(nn.Linear(3, 7), lambda *args: P)
UNNAMED = NeuralBaseline(nn.Linear(3, 1), "pixels")


def named_arguments(images):
    ONE_HOT()


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
        r"first argument is the guide; got \{'z': ReinMax\(1.0\)\}.*@config_gradient\(config=",
    ),
    "a name first": (
        lambda: config_gradient("reinmax"),
        TypeError,
        r"first argument is the guide; got 'reinmax'",
    ),
    "unknown name": (
        lambda: config_gradient(ONE_HOT, "rienmax"),
        ValueError,
        r"'rienmax', which names no estimator; names are \[.*'score'.*Did you mean 'reinmax'",
    ),
    "unknown name of a site": (
        lambda: config_gradient(ONE_HOT, {"z": "gumbel"}),
        ValueError,
        r"for site 'z' got 'gumbel', which names no estimator",
    ),
    "a class": (
        lambda: config_gradient(ONE_HOT, {"z": ReinMax}),
        TypeError,
        r"for site 'z' got the class ReinMax; give an object: ReinMax\(\)",
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
        r"give a callable",
    ),
    "a site that is observed": (
        lambda: config_gradient(observed, {"z": ReinMax()})(),
        ValueError,
        r"no latent site 'z'; its sites are \[\]",
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
        r"at site 'z', infer\['gradient'\] is 'scorer', which names no.*Did you mean 'score'",
    ),
    "infer: Pyro's baseline": (
        step(BIT, site(lambda: dist.Bernoulli(0.3), baseline={"typo": 1})),
        ValueError,
        r"At site 'z', Estimator_ELBO does not know infer\['baseline'\]; write "
        r"infer=\{'gradient': Score\(MovingAverage\(\)\)\}",
    ),
    "infer: Pyro's enumerate": (
        step(BIT, site(lambda: dist.Bernoulli(0.3), enumerate="parallel")),
        ValueError,
        r"does not know infer\['enumerate'\]; write infer=\{'gradient': Enumerate\(\)\}",
    ),
    "infer: a typo": (
        step(BIT, site(lambda: dist.Bernoulli(0.3), estimator="nonsense")),
        ValueError,
        r"does not know infer\['estimator'\]; the option that chooses an estimator is 'gradient'",
    ),
    # Estimator_ELBO's options
    "default: unknown": (
        lambda: Estimator_ELBO(default="reinmaks"),
        ValueError,
        r"Estimator_ELBO: default is 'reinmaks', which names no estimator.*'reinmax'\?",
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
    # Estimator against site
    "reinmax on an index": (
        with_gradient(INDEX, ReinMax()),
        ValueError,
        r"At site 'z', ReinMax\(1.0\) cannot serve a Categorical site: it needs one-hot or "
        r"Bernoulli. What would work: .*enumerate, .*score",
    ),
    "reinmax on a normal": (
        with_gradient(NORMAL, ReinMax()),
        ValueError,
        r"cannot serve a Normal site.*What would work: pathwise, score",
    ),
    "pathwise on a bit": (
        with_gradient(BIT, Pathwise()),
        ValueError,
        r"cannot serve a Bernoulli site: it needs a reparameterised site \(has rsample\). "
        r"What would work: .*reinmax, .*score",
    ),
    "gapped on a bit": (
        with_gradient(BIT, GappedStraightThrough()),
        ValueError,
        r"GappedStraightThrough\(0.5, gap=1.0\) cannot serve a Bernoulli site: it needs one-hot",
    ),
    "enumerate counts": (
        with_gradient(site(lambda: dist.Poisson(1.0)), Enumerate()),
        ValueError,
        r"Enumerate\(\) cannot serve a Poisson site: it needs any site with enumerate_support. "
        r"What would work: score",
    ),
    "enumerate an event": (
        with_gradient(site(lambda: dist.Bernoulli(P).to_event(1)), Enumerate()),
        ValueError,
        r"At site 'z'.*Enumerate\(\).*to_event.*is a product.*pyro.plate",
    ),
    "enumerated inside, used outside": (
        with_gradient(enumerated_inside_observed_outside, {"z": Enumerate()}),
        ValueError,
        r"Site 'x', outside the plate 'rows', depends on the enumerated site 'z' inside it.*"
        r"Use another estimator at 'z', such as Score\(\) or ReinMax\(\)",
    ),
    "leave-one-out alone": (
        with_gradient(BIT, Score(LeaveOneOut())),
        ValueError,
        r"At site 'z', Score\(LeaveOneOut\(\)\) needs num_particles >= 2; got 1. Write "
        r"Estimator_ELBO\(num_particles=2\), or use Score\(MovingAverage\(\)\)",
    ),
    # Model against guide
    "missing from the guide": (
        step(BIT, empty),
        ValueError,
        r"latent site 'z' is missing from the guide, whose sites are \[\]. Sample it in the guide",
    ),
    "misnamed in the guide": (
        step(BIT, misnamed),
        ValueError,
        r"'z' is missing from the guide, whose sites are \['latent_z'\]",
    ),
    "observed in the model": (
        step(observed, BIT),
        ValueError,
        r"Site 'z' is observed in the model and sampled in the guide; remove it from the guide",
    ),
    "an index and a vector": (
        step(ONE_HOT, INDEX),
        ValueError,
        r"At site 'z', model and guide disagree on event_dim: the model's OneHotCategorical has "
        r"event shape \(3,\), the guide's Categorical has \(\).*\.to_event",
    ),
    "to_event on one side": (
        step(
            site(lambda: dist.Bernoulli(P).to_event(1)), plated(lambda: dist.Bernoulli(P), size=3)
        ),
        ValueError,
        r"At site 'z', model and guide disagree on event_dim.*the same \.to_event",
    ),
    "numbers of categories": (
        step(ONE_HOT, site(lambda: dist.OneHotCategorical(torch.ones(4)))),
        ValueError,
        r"At site 'z', model and guide disagree on the event shape: OneHotCategorical has \(3,\) "
        r"in the model, OneHotCategorical has \(4,\) in the guide",
    ),
    "a density facing a mass": (
        step(ONE_HOT, RELAXED),
        ValueError,
        r"At site 'z', the guide's RelaxedOneHot has a density and the model's OneHotCategorical "
        r"has a mass: their ratio is no ELBO.*OneHotCategorical\(...\).*"
        r"config_gradient\(guide, \{'z': ReinMax\(\)\}\)",
    ),
    "a mass facing a density": (
        step(RELAXED, ONE_HOT),
        ValueError,
        r"the guide's OneHotCategorical has a mass and the model's RelaxedOneHot has a density",
    ),
    "Pyro's relaxed facing a mass": (
        step(ONE_HOT, PYRO_SOFT),
        ValueError,
        r"the guide's RelaxedOneHotCategorical has a density.*OneHotCategorical has a mass",
    ),
    "Pyro's straight-through in the guide": (
        step(ONE_HOT, PYRO_HARD),
        ValueError,
        r"At site 'z', the guide's RelaxedOneHotCategoricalStraightThrough draws hard values and "
        r"scores them by the density of soft ones.*Write OneHotCategorical\(logits=...\) in the "
        r"model and in the guide, and config_gradient\(guide, \{'z': GumbelStraightThrough",
    ),
    "Pyro's straight-through in the model": (
        step(PYRO_HARD, ONE_HOT),
        ValueError,
        r"the model's RelaxedOneHotCategoricalStraightThrough draws hard values",
    ),
    "Pyro's straight-through in both": (
        step(PYRO_HARD, PYRO_HARD),
        ValueError,
        r"StraightThrough draws hard values",
    ),
    "Pyro's straight-through bit": (
        step(BIT, PYRO_HARD_BIT),
        ValueError,
        r"the guide's RelaxedBernoulliStraightThrough draws.*Write Bernoulli\(logits=...\)",
    ),
    # Parameters of estimators
    "decay": (lambda: MovingAverage(1.0), ValueError, r"decay must lie in \[0, 1\); got 1.0"),
    "negative decay": (lambda: MovingAverage(-0.1), ValueError, r"decay .*; got -0.1"),
    "nan decay": (lambda: MovingAverage(math.nan), ValueError, r"decay .*; got nan"),
    "baseline's class": (
        lambda: Score(LeaveOneOut),
        TypeError,
        r"Score: baseline must be an object such as LeaveOneOut\(\).*got <class",
    ),
    "baseline's name": (lambda: Score("leave_one_out"), TypeError, r"got 'leave_one_out'"),
    "neural baseline's input": (
        step(named_arguments, config_gradient(named_arguments, {"z": Score(UNNAMED)}), P),
        ValueError,
        r"NeuralBaseline at site 'z': input='pixels' names no argument of the guide or the model; "
        r"they have \['images'\].*or give a callable",
    ),
    "neural baseline's output": (
        step(PLATED_ONE_HOT, config_gradient(PLATED_ONE_HOT, {"z": Score(MISFIT)})),
        ValueError,
        r"NeuralBaseline at site 'z': the module returned shape \(7,\), which does not broadcast "
        r"to the site's batch shape \(2,\); return one prediction for each element of the plate",
    ),
    "gap": (lambda: GappedStraightThrough(gap=-1.0), ValueError, r"gap must not be.*got -1.0"),
    "nan gap": (lambda: GappedStraightThrough(gap=math.nan), ValueError, r"gap .*got nan"),
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
        r"StraightThrough: temperature of shape \(3,\) does not broadcast to the site's batch "
        r"shape \(2,\); give a number or one temperature for each element of the batch",
    ),
    "temperature with an event": (
        with_gradient(PLATED_ONE_HOT, StraightThrough(torch.ones(2, 1))),
        ValueError,
        r"temperature of shape \(2, 1\) does not broadcast",
    ),
    # Schedules
    "start": (lambda: Exponential(0.0, 0.1, 1.0), ValueError, r"Exponential: start must be posi"),
    "end": (lambda: Exponential(1.0, -0.1, 1.0), ValueError, r"Exponential: end must be positive"),
    "infinite start": (lambda: Linear(math.inf, 1.0, 3), ValueError, r"Linear: start .*got inf"),
    "linear end": (lambda: Linear(1.0, 0.0, 3), ValueError, r"Linear: end must be positive"),
    "steps": (lambda: Linear(1.0, 0.5, 0), ValueError, r"Linear: steps must be at least 1; got 0"),
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
    # NaN
    "nan logits": (
        step(ONE_HOT, site(lambda: dist.OneHotCategorical(logits=LOGITS * math.nan))),
        ValueError,
        r"parameter logits .*nan",
    ),
    # Pyro's hooks that are not ours
    "a trace": (
        lambda: Estimator_ELBO()._get_trace(None, None, (), {}),
        NotImplementedError,
        r"call loss or loss_and_grads",
    ),
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
@pytest.mark.parametrize("temperature", ["0.5", None, [1.0]])
def test_temperature_that_is_none(make, temperature):
    with pytest.raises(TypeError, match=f"{make.__name__}: temperature must be a number"):
        make(temperature)


def test_backward_temperature_is_checked_by_its_own_name():
    with pytest.raises(ValueError, match="backward_temperature must be positive; got 0"):
        GumbelStraightThrough(1.0, backward_temperature=0)


def test_an_unmarked_auxiliary_site_is_warned_of():
    def guide():
        BIT()
        pyro.sample("u", dist.Bernoulli(0.5))

    with pytest.warns(UserWarning, match=r"Site 'u' is in the guide and not in the model; .*aux"):
        Estimator_ELBO().loss(BIT, guide)


@pytest.mark.parametrize("vectorize", [False, True])
def test_a_failing_step_leaves_no_handler_behind(vectorize):
    """After any of these errors the next step works."""
    elbo = Estimator_ELBO(2, vectorize_particles=vectorize)
    for _ in range(2):
        with pytest.raises(ValueError, match="is missing from the guide"):
            elbo.loss_and_grads(BIT, empty)
        assert abs(float(elbo.loss_and_grads(BIT, BIT))) < 1e-6
        assert not pyro.poutine.runtime.am_i_wrapped()
