"""Bad data and parameters raise the same errors as in Pyro's SVI, at every step."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

import pyro_gumbel.distributions as ours
from pyro_gumbel.infer import CapturedSVI, Estimator_ELBO

STEPS = 30
NAN = float("nan")

# Each family with a good and a bad parameter, and a good and a bad value.
FAMILIES = {
    "normal": (lambda p: dist.Normal(0.0, p), 1.0, -1.0, 0.5, NAN),
    "bernoulli": (lambda p: dist.Bernoulli(p), 0.3, 1.5, 1.0, 2.0),
    "bernoulli, logits": (lambda p: dist.Bernoulli(logits=p), 0.3, NAN, 1.0, 0.5),
    "poisson": (lambda p: dist.Poisson(p), 2.0, -1.0, 3.0, -1.0),
    "categorical": (lambda p: dist.Categorical(p), [0.2, 0.8], [-0.2, 1.2], 1, 2),
    "one-hot": (
        lambda p: dist.OneHotCategorical(p),
        [0.2, 0.8],
        [NAN, 0.8],
        [0.0, 1.0],
        [1.0, 1.0],
    ),
    "one-hot, ours": (lambda p: ours.OneHot(p), [0.2, 0.8], [-0.2, 1.2], [0.0, 1.0], [1.0, 1.0]),
    "beta": (lambda p: dist.Beta(p, 2.0), 1.0, 0.0, 0.5, 1.5),
    "gamma": (lambda p: dist.Gamma(2.0, p), 1.0, -1.0, 0.5, -0.5),
    "exponential": (lambda p: dist.Exponential(p), 1.0, -1.0, 0.5, -0.5),
    "dirichlet": (lambda p: dist.Dirichlet(p), [1.0, 2.0], [1.0, -2.0], [0.3, 0.7], [0.3, 0.9]),
    "log-normal": (lambda p: dist.LogNormal(0.0, p), 1.0, -1.0, 0.5, -0.5),
    "uniform": (lambda p: dist.Uniform(0.0, p), 1.0, NAN, 0.5, 1.5),
    "binomial": (lambda p: dist.Binomial(5, p), 0.3, 1.5, 2.0, 7.0),
    "geometric": (lambda p: dist.Geometric(p), 0.3, 0.0, 2.0, -1.0),
    "negative binomial": (lambda p: dist.NegativeBinomial(5, p), 0.3, 1.5, 2.0, -1.0),
    "student": (lambda p: dist.StudentT(p), 3.0, -3.0, 0.5, NAN),
    "multivariate": (
        lambda p: dist.MultivariateNormal(torch.zeros(2), scale_tril=p * torch.eye(2)),
        1.0,
        -1.0,
        [0.1, 0.2],
        [0.1, NAN],
    ),
    "joined": (
        lambda p: dist.Poisson(p).to_event(1),
        [2.0, 1.0],
        [2.0, -1.0],
        [3.0, 0.0],
        [3.0, -2.0],
    ),
    "masked": (lambda p: dist.Poisson(p).mask(torch.tensor(True)), 2.0, -1.0, 3.0, -1.0),
}


def tensor(value):
    return torch.tensor(value)


def programs(family):
    def model(parameter, x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.5))
        pyro.sample("x", family(parameter), obs=x)

    def guide(parameter, x):
        pyro.sample("z", dist.Normal(pyro.param("mean", torch.tensor(0.0)), 1.0))

    return model, guide


def pyros(model, guide):
    return SVI(model, guide, pyro.optim.SGD({"lr": 0.01}), Trace_ELBO())


def looped(model, guide):
    return SVI(model, guide, pyro.optim.SGD({"lr": 0.01}), Estimator_ELBO(2))


def vectorised(model, guide):
    elbo = Estimator_ELBO(2, vectorize_particles=True, max_plate_nesting=0)
    return SVI(model, guide, pyro.optim.SGD({"lr": 0.01}), elbo)


def captured(model, guide):
    return CapturedSVI(model, guide, pyro.optim.SGD({"lr": 0.01}), Estimator_ELBO())


def captured_rows(model, guide):
    elbo = Estimator_ELBO(2, vectorize_particles=True, max_plate_nesting=0)
    return CapturedSVI(model, guide, pyro.optim.SGD({"lr": 0.01}), elbo)


OURS = [looped, vectorised, captured]


def verdict(svi, *args):
    """What a step raises: its type, whether it names the site, what torch says of the argument."""
    with pytest.raises(Exception) as raised:  # noqa: PT011
        svi.step(*args)
    message = str(raised.value)
    return raised.type, "'x'" in message, "Expected" in message, "within the support" in message


def verdicts(make, family, good, bad):
    """What steps 1, 2 and 30 raise of bad arguments, between steps on good ones."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = make(*programs(family))
    found = []
    for step in range(1, STEPS + 1):
        if step in (1, 2, STEPS):
            before = {name: p.detach().clone() for name, p in pyro.get_param_store().items()}
            found.append(verdict(svi, *bad))
            for name, value in before.items():
                assert torch.equal(pyro.param(name).detach(), value)
        assert svi.step(*good) == pytest.approx(0.0, abs=1e3)
    return found


def same_as_pyro(make, family, good, bad):
    pyro.clear_param_store()
    reference = verdict(pyros(*programs(family)), *bad)
    assert verdicts(make, family, good, bad) == [reference] * 3


@pytest.mark.parametrize("make", OURS)
@pytest.mark.parametrize("name", FAMILIES)
def test_bad_values(name, make):
    family, parameter, _, good, bad = FAMILIES[name]
    parameter, good, bad = map(tensor, (parameter, good, bad))
    same_as_pyro(make, family, (parameter, good), (parameter, bad))


@pytest.mark.parametrize("make", OURS)
@pytest.mark.parametrize("name", FAMILIES)
def test_bad_parameters(name, make):
    family, good, bad, value, _ = FAMILIES[name]
    good, bad, value = map(tensor, (good, bad, value))
    same_as_pyro(make, family, (good, value), (bad, value))


@pytest.mark.parametrize("name", ["bernoulli", "joined"])
def test_vectorised_particles_of_a_captured_step(name):
    family, parameter, bad_parameter, value, bad_value = FAMILIES[name]
    parameter, bad_parameter, value, bad_value = map(
        tensor, (parameter, bad_parameter, value, bad_value)
    )
    for bad in ((parameter, bad_value), (bad_parameter, value)):
        same_as_pyro(captured_rows, family, (parameter, value), bad)


@pytest.mark.parametrize("make", OURS)
def test_a_loss_that_is_nan_brings_a_warning_at_every_step(make):
    def model(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0, validate_args=False), obs=x)

    _, guide = programs(dist.Normal)
    svi = make(model, lambda x: guide(None, x))
    for step in range(1, STEPS + 1):
        if step in (1, 2, STEPS):
            with pytest.warns(UserWarning, match="Encountered NaN: loss"):
                assert svi.step(torch.tensor(NAN)) != 0.0
            pyro.get_param_store()["mean"] = torch.tensor(0.0)
        svi.step(torch.tensor(0.5))
