"""Names of estimators, and the object of each name."""

from __future__ import annotations

import inspect

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_gumbel import estimators
from pyro_gumbel.estimators import Estimator, LeaveOneOut, MovingAverage, Rebar, ReinMax
from pyro_gumbel.estimators.registry import (
    CLASSES,
    DefaultEstimators,
    NamedEstimators,
    snake_case,
)
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

WRITTEN = {
    "ARMS": "arms",
    "DisARM": "disarm",
    "DisARMTree": "disarm_tree",
    "ExponentialArrival": "exponential_arrival",
    "GumbelStraightThrough": "gumbel_straight_through",
    "MuProp": "muprop",
    "ReinMax": "reinmax",
    "ReinMaxRao": "reinmax_rao",
    "RelaxedTopK": "relaxed_top_k",
    "SIMPLE": "simple",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_acronyms_stay_whole(name):
    assert snake_case(name) == WRITTEN[name]


def needs_arguments(kind):
    parameters = inspect.signature(kind.__init__).parameters.values()
    return any(
        one.default is one.empty
        for one in list(parameters)[1:]
        if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    )


def test_every_public_estimator_has_a_name():
    """Except those that need an argument, and Score, whose baseline depends on the particles."""
    public = {getattr(estimators, name) for name in estimators.__all__}
    kinds = {kind for kind in public if inspect.isclass(kind) and issubclass(kind, Estimator)}
    missing = {kind.__name__ for kind in kinds - set(CLASSES.values())}
    complete = {kind.__name__ for kind in kinds if not needs_arguments(kind)}
    assert missing & complete == {"Estimator", "Score"}
    assert "Relax" in missing


@pytest.mark.parametrize("name", CLASSES)
def test_a_name_stands_for_its_class_with_default_arguments(name):
    made = NamedEstimators()[name]
    assert type(made) is CLASSES[name]
    assert repr(made) == repr(CLASSES[name]())


def test_a_name_stands_for_one_object_of_its_holder():
    first, second = NamedEstimators(), NamedEstimators()
    assert first["rebar"] is first["rebar"]
    assert first["rebar"] is not second["rebar"]
    assert list(first) == ["rebar"]
    with pytest.raises(ValueError, match=r"Unknown estimator name 'rebarr'; the names are \["):
        first["rebarr"]


def test_auto_and_score_follow_distribution_and_particles():
    auto = DefaultEstimators()
    normal, bit = dist.Normal(0.0, 1.0), dist.Bernoulli(0.3)
    assert auto.resolve("auto", normal, 1) is auto.resolve(None, normal, 4) is auto["pathwise"]
    assert isinstance(auto.resolve("auto", bit, 1).baseline, MovingAverage)
    assert isinstance(auto.resolve("auto", bit, 2).baseline, LeaveOneOut)
    assert auto.resolve("score", normal, 1) is auto["moving_average"]
    assert auto.resolve("reinmax", bit, 1) is auto.resolve("reinmax", bit, 2)
    given = ReinMax()
    assert auto.resolve(given, bit, 1) is given


def program():
    pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.8])))
    pyro.sample("b", dist.Bernoulli(torch.tensor(0.3)))


def guide():
    pyro.sample("z", dist.OneHotCategorical(logits=pyro.param("l", torch.zeros(2))))
    pyro.sample("b", dist.Bernoulli(logits=pyro.param("m", torch.zeros(()))))


def test_a_name_in_a_config_is_the_guides_and_a_default_the_elbos():
    configured = config_gradient(guide, {"z": "rebar"})
    elbo = Estimator_ELBO(default="rebar")
    elbo.loss_and_grads(program, configured)
    store = pyro.get_param_store()._params
    of_guide = poutine.trace(configured).get_trace().nodes["z"]["infer"]["gradient"]
    of_elbo = elbo.known_estimators(guide)[0]
    assert isinstance(of_guide, Rebar)
    assert store["gradient$z$$$log_temperature"] is of_guide.log_temperature
    assert store["gradient$b$$$log_temperature"] is of_elbo.log_temperature
    # Another loss with the same guide goes on with the guide's, and has a default of its own.
    other = Estimator_ELBO(default="rebar")
    other.loss_and_grads(program, configured)
    assert store["gradient$z$$$log_temperature"] is of_guide.log_temperature
    assert (
        store["gradient$b$$$log_temperature"] is other.known_estimators(guide)[0].log_temperature
    )


@pytest.mark.parametrize("holder", [NamedEstimators, DefaultEstimators])
def test_the_state_of_names_is_restored(holder):
    one, other = holder(), holder()
    one["rebar"].scale.data.fill_(3.0)
    one["reinmax"]
    other.load_state_dict(one.state_dict())
    assert other["rebar"].scale.item() == 3.0
    assert set(other) == set(one)
    with pytest.raises(ValueError, match="Unknown estimator name 'nonsense'"):
        other.load_state_dict({"nonsense": {}})
