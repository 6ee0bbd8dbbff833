"""Configurations: grammar, precedence, errors, and programs left untouched."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.faulty import (
    BIT,
    ONE_HOT,
    misnamed,
    observed,
    site,
    step,
)
from pyro import poutine

from pyro_gumbel.estimators import (
    Enumerate,
    GumbelStraightThrough,
    LeaveOneOut,
    MovingAverage,
    Pathwise,
    ReinMax,
    Score,
    StraightThrough,
)
from pyro_gumbel.infer import (
    Estimator_ELBO,
    config_gradient,
    estimator_names,
)


def program():
    pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.8])))
    pyro.sample("b", dist.Bernoulli(torch.tensor(0.3)))
    pyro.sample("y", dist.Normal(0.0, 1.0))


def configured_at(guide):
    nodes = poutine.trace(guide).get_trace().nodes
    return {
        name: site["infer"].get("gradient")
        for name, site in nodes.items()
        if site["type"] == "sample"
    }


def test_one_estimator_for_all():
    estimator = Score()
    assert configured_at(config_gradient(program, estimator)) == dict.fromkeys("zby", estimator)


def test_a_dict_leaves_others_alone():
    estimator = ReinMax()
    found = configured_at(config_gradient(program, {"z": estimator}))
    assert found == {"z": estimator, "b": None, "y": None}


def test_a_callable_sees_the_site():
    def choose(msg):
        return "score" if isinstance(msg["fn"], dist.Bernoulli) else None

    assert configured_at(config_gradient(program, choose)) == {"z": None, "b": "score", "y": None}


def test_a_decorator():
    estimator = ReinMax()

    @config_gradient(config={"z": estimator})
    def guide():
        """Docstring."""
        program()

    assert configured_at(guide)["z"] is estimator
    assert (guide.__name__, guide.__doc__) == ("guide", "Docstring.")


def test_a_name_stands_for_one_object():
    """So that what a named estimator learns is not lost from step to step."""
    guide = config_gradient(program, {"z": "reinmax", "b": "reinmax"})
    first, second = configured_at(guide), configured_at(guide)
    assert isinstance(first["z"], ReinMax)
    assert first["z"] is first["b"] is second["z"]


def test_every_name_is_a_class_in_snake_case():
    for name in set(estimator_names()) - {"auto", "score"}:
        found = configured_at(config_gradient(program, {"z": name}))["z"]
        assert type(found).__name__.lower() == name.replace("_", "")


def test_the_outermost_configuration_wins():
    def guide():
        p = torch.tensor([0.2, 0.8])
        pyro.sample("z", dist.OneHotCategorical(p), infer={"gradient": inner})

    inner, middle, outer = Score(), ReinMax(), StraightThrough()
    assert configured_at(guide)["z"] is inner
    once = config_gradient(guide, middle)
    assert configured_at(once)["z"] is middle
    assert configured_at(config_gradient(once, outer))["z"] is outer
    # None leaves a choice in place.
    assert configured_at(config_gradient(once, {"z": None}))["z"] is middle


def test_infer_dicts_are_left_as_they_were():
    infer = {"is_auxiliary": True}

    def guide():
        pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.8])), infer=infer)

    configured = config_gradient(guide, ReinMax())
    configured()
    Estimator_ELBO().loss_and_grads(lambda: None, configured)
    assert infer == {"is_auxiliary": True}
    # The model's replayed site shares nothing that is written to.
    model_infer = {}

    def model():
        pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.8])), infer=model_infer)

    Estimator_ELBO(2, vectorize_particles=True).loss_and_grads(model, configured)
    assert infer == {"is_auxiliary": True}
    assert model_infer == {}


def test_plain_losses_of_pyro_still_run_a_configured_guide():
    """The estimator is ignored there, not in the way."""
    guide = config_gradient(program, {"z": ReinMax()})
    assert pyro.infer.Trace_ELBO().loss(program, guide) == pytest.approx(0.0, abs=1e-6)


def test_other_handlers_compose():
    guide = config_gradient(program, {"z": ReinMax()})
    conditioned = poutine.condition(guide, data={"b": torch.tensor(1.0)})
    trace = poutine.trace(conditioned).get_trace()
    assert trace.nodes["b"]["is_observed"]
    assert isinstance(trace.nodes["z"]["infer"]["gradient"], ReinMax)
    scaled = config_gradient(poutine.scale(program, scale=0.5), {"z": ReinMax()})
    assert poutine.trace(scaled).get_trace().nodes["z"]["scale"] == 0.5


def test_a_guide_that_calls_itself():
    @config_gradient(config="score")
    def guide(step=0):
        pyro.sample(f"z{step}", dist.Bernoulli(0.5))
        if step < 3:
            guide(step + 1)

    assert configured_at(guide) == dict.fromkeys(["z0", "z1", "z2", "z3"], "score")


def test_a_configuration_survives_an_error_in_the_guide():
    """The handler is taken off the stack, and the next run is configured again."""
    fail = [True]

    def guide():
        if fail.pop():
            raise RuntimeError("once")
        program()

    configured = config_gradient(guide, {"z": ReinMax()})
    with pytest.raises(RuntimeError, match="once"):
        configured()
    fail.append(False)
    assert isinstance(configured_at(configured)["z"], ReinMax)


class Spy(Score):
    """Counts what it served."""

    def __init__(self):
        super().__init__()
        self.served = []

    def surrogate(self, site):
        self.served.append(site.name)
        return super().surrogate(site)


def test_auto_is_pathwise_where_a_site_can_and_else_score():
    loc = torch.tensor(0.3, requires_grad=True)
    odds = torch.tensor(0.3, requires_grad=True)

    def guide():
        pyro.sample("y", dist.Normal(loc, 1.0))
        pyro.sample("b", dist.Bernoulli(logits=odds))

    def model():
        y = pyro.sample("y", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Bernoulli(0.3))
        pyro.factor("f", -4 * (y - 1) ** 2)

    chosen = {}
    for particles in (1, 2):
        elbo = Estimator_ELBO(particles)
        for fn in (dist.Normal(0.0, 1.0), dist.Bernoulli(0.3)):
            chosen[particles, type(fn).__name__] = repr(elbo._auto.resolve(None, fn, particles))
    assert chosen == {
        (1, "Normal"): "Pathwise(sticking_the_landing=False)",
        (1, "Bernoulli"): "Score(MovingAverage(0.9))",
        (2, "Normal"): "Pathwise(sticking_the_landing=False)",
        (2, "Bernoulli"): "Score(LeaveOneOut())",
    }
    elbo.loss_and_grads(model, guide)
    assert loc.grad.abs() > 0


def test_default_serves_the_sites_that_have_none():
    spy, other = Spy(), Spy()
    guide = config_gradient(program, {"b": other, "y": "pathwise"})
    Estimator_ELBO(default=spy).loss_and_grads(program, guide)
    assert (spy.served, other.served) == (["z"], ["b"])


def test_one_estimator_serves_many_sites_with_state_by_site():
    baseline = MovingAverage()
    guide = config_gradient(program, {"z": Score(baseline), "b": Score(baseline)})
    Estimator_ELBO().loss_and_grads(program, guide)
    assert set(baseline.get_extra_state()["sums"]) == {"z", "b"}


@pytest.mark.parametrize(
    "estimator",
    [
        Score(LeaveOneOut()),
        Score(MovingAverage(0.95)),
        ReinMax(1.3),
        GumbelStraightThrough(1.0, backward_temperature=0.5),
        Enumerate(),
        Pathwise(sticking_the_landing=True),
    ],
    ids=repr,
)
def test_repr_rebuilds(estimator):
    names = {
        cls.__name__: cls
        for cls in (Enumerate, GumbelStraightThrough, LeaveOneOut, MovingAverage, Pathwise)
    } | {"ReinMax": ReinMax, "Score": Score}
    again = eval(repr(estimator), names)
    assert repr(again) == repr(estimator)
    assert type(again) is type(estimator)


@pytest.mark.parametrize("choice", ["score", Score()])
def test_a_point_estimate_keeps_its_gradient_under_the_score_function(choice):
    def model():
        pyro.sample("w", dist.Normal(0.0, 1.0))

    def guide():
        pyro.sample("w", dist.Delta(pyro.param("w_map", torch.tensor(2.0))))

    Estimator_ELBO().loss_and_grads(model, config_gradient(guide, choice))
    torch.testing.assert_close(pyro.param("w_map").unconstrained().grad, torch.tensor(2.0))


ROWS = {
    # Arguments of config_gradient
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
    "a site that is not a string": (
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
    # infer={...} of a site
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
        step(BIT, site(lambda: dist.Bernoulli(0.3), enumerate="serial")),
        ValueError,
        r"'z' of the guide, infer\['enumerate'\] is 'serial'; expected 'parallel' or 'sequential'",
    ),
    "infer: enumeration by draws": (
        step(BIT, site(lambda: dist.Bernoulli(0.3), enumerate="parallel", num_samples=4)),
        ValueError,
        r"'z' of the guide, infer\['num_samples'\] is 4, and enumerated sites have all their",
    ),
    "infer: a typo": (
        step(BIT, site(lambda: dist.Bernoulli(0.3), estimator="nonsense")),
        ValueError,
        r"infer\['estimator'\] has no effect in .*; the option for an estimator is 'gradient'",
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_message(row):
    run, kind, pattern = ROWS[row]
    with pytest.raises(kind, match="(?s)" + pattern):
        run()
