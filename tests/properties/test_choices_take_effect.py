"""A choice of an estimator takes effect, or it is refused by name."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormalMessenger

from pyro_gumbel.estimators import Enumerate, MovingAverage, ReinMax, Score
from pyro_gumbel.infer import (
    CapturedSVI,
    Estimator_ELBO,
    ImportanceWeighted_ELBO,
    config_gradient,
)

P = torch.tensor([0.2, 0.8])
ONE = torch.tensor(1.0)


def model_with(site_infer=None, observed_infer=None):
    """A latent ``z`` and an observed ``x``, each with options of its own."""

    def model():
        z = pyro.sample("z", dist.OneHotCategorical(P), infer=dict(site_infer or {}))
        pyro.sample("x", dist.Normal(z[..., 1], 1.0), obs=ONE, infer=dict(observed_infer or {}))

    return model


def guide_with(site_infer=None, observed_infer=None):
    def guide():
        logits = pyro.param("logits", torch.zeros(2))
        pyro.sample("z", dist.OneHotCategorical(logits=logits), infer=dict(site_infer or {}))
        if observed_infer is not None:
            infer = {"is_auxiliary": True, **observed_infer}
            pyro.sample("a", dist.Normal(0.0, 1.0), obs=ONE, infer=infer)

    return guide


CALLS = {
    "loss": lambda elbo, *programs: elbo.loss(*programs),
    "loss_and_grads": lambda elbo, *programs: elbo.loss_and_grads(*programs),
    "differentiable_loss": lambda elbo, *programs: elbo.differentiable_loss(*programs),
}
ELBOS = {
    "one particle": Estimator_ELBO,
    "loop": lambda: Estimator_ELBO(2),
    "rows": lambda: Estimator_ELBO(2, vectorize_particles=True),
    "importance weighted": lambda: ImportanceWeighted_ELBO(2),
}
MODELS = {
    "in place": lambda: model_with({"gradient": ReinMax()}),
    "by name": lambda: model_with({"gradient": "reinmax"}),
    "auto": lambda: model_with({"gradient": "auto"}),
    "configured": lambda: config_gradient(model_with(), ReinMax()),
    "configured by a dict": lambda: config_gradient(model_with(), {"z": "reinmax"}),
    "configured by a callable": lambda: config_gradient(model_with(), lambda msg: ReinMax()),
    "configured inside": lambda: poutine.scale(config_gradient(model_with(), "score"), scale=0.5),
    "infer_config": lambda: poutine.infer_config(
        model_with(), config_fn=lambda site: {"gradient": ReinMax()}
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("make_elbo", ELBOS.values(), ids=ELBOS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_an_estimator_at_a_models_site_is_refused(make, make_elbo, call):
    match = (
        r"model's site 'z' has infer\['gradient'\].* and estimators only take effect in "
        r"the guide\. .*config_gradient\(guide, \{'z': .*\}\)"
    )
    with pytest.raises(ValueError, match=match):
        call(make_elbo(), make(), guide_with())


@pytest.mark.parametrize("svi_class", [SVI, CapturedSVI])
def test_svi_refuses_it_at_its_first_step(svi_class):
    model = config_gradient(model_with(), ReinMax())
    svi = svi_class(model, guide_with(), pyro.optim.Adam({"lr": 0.1}), Estimator_ELBO())
    with pytest.raises(ValueError, match="model's site 'z' has infer"):
        svi.step()


def test_another_choice_in_the_guide_does_not_excuse_it():
    guide = guide_with({"gradient": Score(MovingAverage())})
    with pytest.raises(ValueError, match="model's site 'z' has infer"):
        Estimator_ELBO().loss(model_with({"gradient": ReinMax()}), guide)


@pytest.mark.parametrize("key", ["gradients", "Gradient", "gradiant", "grad_ient", "estimator"])
def test_a_misspelt_option_is_refused_everywhere(key):
    """Other options of a model's sites are left to whoever reads them."""
    option = {key: ReinMax()}
    match = rf"infer\['{key}'\].*'gradient'"
    for model, guide in [
        (model_with(option), guide_with()),
        (model_with(None, option), guide_with()),
        (model_with(), guide_with(option)),
        (model_with(), guide_with(None, option)),
    ]:
        with pytest.raises(ValueError, match=match):
            Estimator_ELBO().loss_and_grads(model, guide)


def test_an_estimator_at_an_observed_site_is_refused():
    option = {"gradient": ReinMax()}
    with pytest.raises(ValueError, match=r"model's site 'x' has infer\['gradient'\].*observed"):
        Estimator_ELBO().loss(model_with(None, option), guide_with())
    with pytest.raises(ValueError, match=r"guide's site 'a' has infer\['gradient'\].*observed"):
        Estimator_ELBO().loss(model_with(), guide_with(None, option))


PYROS_OWN = {
    "enumerate": "parallel",
    "expand": True,
    "is_auxiliary": True,
    "num_samples": 3,
    "prior": 1,
    "tmc": "mixture",
    "was_observed": True,
    "obs": ONE,
    "_markov_depth": 1,
    "a handler's own": 1,
}


@pytest.mark.parametrize("key", PYROS_OWN)
def test_other_options_of_a_models_sites_are_allowed(key):
    option = {key: PYROS_OWN[key]}
    Estimator_ELBO().loss_and_grads(model_with(option, option), guide_with())


@pytest.mark.parametrize("key", sorted(set(PYROS_OWN) - {"enumerate", "a handler's own"}))
def test_pyros_options_of_a_guides_sites_are_allowed(key):
    option = {key: PYROS_OWN[key]}
    Estimator_ELBO().loss_and_grads(model_with(), guide_with(option, option))


def test_enumeration_that_is_switched_off_is_allowed():
    """As ``config_enumerate(guide, default=None)`` leaves it."""
    option = {"enumerate": None}
    Estimator_ELBO().loss_and_grads(model_with(option, option), guide_with(option, option))


def test_an_uncondition_ed_guide_runs():
    def guide():
        logits = pyro.param("logits", torch.zeros(2))
        pyro.sample("z", dist.OneHotCategorical(logits=logits), obs=torch.tensor([0.0, 1.0]))

    Estimator_ELBO().loss_and_grads(model_with(), poutine.uncondition(guide))


# Choices that do take effect


class Spy(Score):
    """Counts what it served."""

    def __init__(self):
        super().__init__()
        self.served = 0

    def surrogate(self, site):
        self.served += 1
        return super().surrogate(site)


@pytest.mark.parametrize("place", ["same object", "in place", "anew", "configured"])
def test_one_program_may_be_model_and_guide(place):
    """Its choice is that of the guide, too."""
    spy = Spy()
    shared = {
        "same object": lambda: {"gradient": spy},
        "in place": lambda: {"gradient": "score"},
        "anew": lambda: {"gradient": ReinMax()},
        "configured": lambda: {},
    }[place]

    def program():
        pyro.sample("z", dist.OneHotCategorical(P), infer=shared())

    both = config_gradient(program, spy) if place == "configured" else program
    Estimator_ELBO().loss_and_grads(both, both)
    assert spy.served == (place in {"same object", "configured"})


class ModelAsGuide(poutine.messenger.Messenger):
    """A guide that runs the model itself, as Pyro's messenger guides do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def run(self):
        with self, poutine.block(hide_fn=lambda msg: msg["name"] == "x"):
            self.model()


def test_a_guide_that_runs_the_model_has_the_models_choices():
    spy = Spy()
    model = model_with({"gradient": spy})
    Estimator_ELBO().loss_and_grads(model, ModelAsGuide(model).run)
    assert spy.served == 1


def test_the_infer_of_a_replayed_site_is_the_guides():
    """The check reads the model's own options."""
    spy = Spy()
    for guide in (guide_with({"gradient": spy}), config_gradient(guide_with(), spy)):
        Estimator_ELBO().loss_and_grads(model_with({"enumerate": "parallel"}), guide)
    assert spy.served == 2


def test_a_configuration_without_a_choice_is_allowed_anywhere():
    for config in ({}, lambda msg: None):
        Estimator_ELBO().loss(config_gradient(model_with(), config), guide_with())


def test_handlers_that_configure_every_site_leave_factors_alone():
    def guide():
        guide_with()()
        pyro.deterministic("twice", ONE * 2)
        pyro.factor("f", ONE * 0, has_rsample=True)

    spy = Spy()
    everywhere = poutine.infer_config(guide, config_fn=lambda site: {"gradient": spy})
    Estimator_ELBO().loss_and_grads(model_with(), everywhere)
    assert spy.served == 1


# Keys of a config


@pytest.mark.parametrize("key", ["zz", "Z", "x", "a"])
def test_a_dicts_site_that_is_not_a_latent_one_of_the_guide_is_refused(key):
    guide = config_gradient(guide_with(None, {}), {"z": ReinMax(), key: Enumerate()})
    with pytest.raises(ValueError, match=rf"config_gradient: .*site '{key}'"):
        Estimator_ELBO().loss_and_grads(model_with(), guide)


def test_a_messenger_guide_is_not_refused_for_options_of_the_models_own():
    def model():
        pyro.sample("y", dist.Normal(0.0, 1.0), infer={"a handler's own": 1})

    config_gradient(AutoNormalMessenger(model), "pathwise")()
