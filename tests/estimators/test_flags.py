"""Estimators written for version 0.1: their flags, methods and saved states."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.coupled_problems import copies, copy_gradients, exact
from helpers.problems import worst_z
from torch import nn

from pyro_gumbel.distributions import straight_through
from pyro_gumbel.estimators import (
    Branches,
    DoubleControlVariate,
    Enumerate,
    Estimator,
    Exponential,
    GumbelSoftmax,
    GumbelStraightThrough,
    Linear,
    LocalExpectation,
    MovingAverage,
    MuProp,
    NeuralBaseline,
    Pathwise,
    Rebar,
    Relax,
    Rodeo,
    Route,
    Score,
    StraightThrough,
    SumAndSample,
)
from pyro_gumbel.infer import Estimator_ELBO, GradientWarning, ImportanceWeighted_ELBO

LOGITS = torch.tensor([0.4, -1.1, 0.2])
OLD = "of version 0.1"
TABLE = torch.tensor([0.7, -1.9, 1.2])


def gradient(family, estimator, *, loss=None, index=False):
    """Return the loss and the gradient of a step from a fixed seed."""
    logits = LOGITS.clone().requires_grad_()

    def model():
        with pyro.plate("n", 2):
            z = pyro.sample("z", family(torch.zeros(2, 3)))
            cost = TABLE[z.argmax(-1)] if index else ((z * TABLE).sum(-1) - 0.3) ** 3
            pyro.factor("cost", cost)

    def guide():
        with pyro.plate("n", 2):
            pyro.sample("z", family(logits.expand(2, 3)), infer={"gradient": estimator})

    pyro.set_rng_seed(3)
    value = (loss or Estimator_ELBO()).loss_and_grads(model, guide)
    return torch.cat([torch.tensor([float(value)]), logits.grad])


def normals(loc):
    return dist.Normal(loc, 1.0).to_event(1)


def bits(logits):
    return dist.Bernoulli(logits=logits).to_event(1)


def one_hots(logits):
    return dist.OneHotCategorical(logits=logits)


def old_pathwise():
    class Old(Estimator):
        unbiased = True
        sites = "a reparameterised site"
        pathwise = True

        def supports(self, fn):
            return fn.has_rsample

        def draw(self, fn):
            return fn.rsample()

    return Old


def old_straight_through():
    class Old(Estimator):
        unbiased = False
        sites = "one-hot"
        pathwise = True
        needs_linked_value = True

        def supports(self, fn):
            return isinstance(fn, torch.distributions.OneHotCategorical)

        def draw(self, fn):
            return straight_through(Estimator.draw(self, fn), fn.logits.softmax(-1))

        def log_prob(self, fn, value):
            return (value * fn.logits.detach()).sum(-1)

    return Old


def old_gumbel_softmax():
    class Old(Estimator):
        unbiased = False
        sites = "one-hot"
        pathwise = True
        relaxed = True

        def supports(self, fn):
            return isinstance(fn, torch.distributions.OneHotCategorical)

        def draw(self, fn):
            return GumbelSoftmax(0.5).draw(fn)

    return Old


def old_enumerate():
    class Old(Estimator):
        unbiased = True
        sites = "any site with enumerate_support"
        enumerates = True

        def supports(self, fn):
            return fn.has_enumerate_support

        def draw(self, fn):
            return fn.enumerate_support(expand=False)

    return Old


def old_muprop():
    class Old(Estimator):
        unbiased = True
        sites = "Bernoulli"
        num_values = 2
        differentiates = True
        branches_are_draws = False

        def supports(self, fn):
            return isinstance(fn, torch.distributions.Bernoulli)

        def draw(self, fn):
            return MuProp().draw(fn)

        def log_prob(self, fn, value):
            return MuProp().log_prob(fn, value)

        def surrogate(self, site):
            return MuProp().surrogate(site)

    return Old


def old_local_expectation():
    class Old(Estimator):
        unbiased = True
        sites = "one-hot"
        num_values = 3
        branches_are_draws = False
        moves_plates = True
        branches_have_graph = False

        def supports(self, fn):
            return isinstance(fn, torch.distributions.OneHotCategorical)

        def draw(self, fn):
            return LocalExpectation().draw_block(fn, 0)

        def surrogate(self, site):
            index = site.values.argmax(-1).movedim(0, -1)
            probs = site.logits.softmax(-1).gather(-1, index)
            return (probs * site.cost.movedim(0, -1)).sum(-1)

    return Old


def old_rebar():
    rebar = Rebar(0.5, learn=False)

    class Old(Estimator):
        unbiased = True
        sites = "one-hot"
        num_values = 3
        differentiates = True
        branches_are_draws = False
        needs_linked_value = True
        draws_from_logits = True

        def supports(self, fn):
            return isinstance(fn, torch.distributions.OneHotCategorical)

        def draw(self, fn):
            return rebar.draw(fn)

        def log_prob(self, fn, value):
            return rebar.log_prob(fn, value)

        def surrogate(self, site):
            return rebar.surrogate(site)

    return Old


NON_DRAWS = {"branches_are_draws": False}
COUNTERFACTUAL = {**NON_DRAWS, "moves_plates": True, "branches_have_graph": False}
ROUTE = {"route": Route.PATHWISE}
CASES = {
    "pathwise": (old_pathwise, Pathwise(), normals, {"pathwise": True}, ROUTE),
    "needs_linked_value": (
        old_straight_through, StraightThrough(), one_hots,
        {"pathwise": True, "needs_linked_value": True}, {**ROUTE, "needs_smooth_cost": True},
    ),
    "relaxed": (old_gumbel_softmax, GumbelSoftmax(0.5), one_hots, {"pathwise": True}, ROUTE),
    "enumerates": (
        old_enumerate, Enumerate(), one_hots, {"enumerates": True}, {"route": Route.ENUMERATE},
    ),
    "differentiates": (
        old_muprop, MuProp(), bits, {"differentiates": True, **NON_DRAWS},
        {"route": Route.COST_GRADIENT, "branches": Branches.RELAXED},
    ),
    "draws_from_logits": (
        old_rebar, Rebar(0.5, learn=False), one_hots,
        {"differentiates": True, **NON_DRAWS, "needs_linked_value": True},
        {"route": Route.COST_GRADIENT, "branches": Branches.RELAXED, "needs_smooth_cost": True},
    ),
    "moves_plates": (
        old_local_expectation, LocalExpectation(), one_hots, COUNTERFACTUAL,
        {"branches": Branches.COUNTERFACTUAL},
    ),
}  # fmt: skip


def as_code(attributes):
    return ", ".join(f"{name} = {value}" for name, value in attributes.items())


@pytest.mark.parametrize("case", CASES)
def test_a_class_with_an_old_flag_runs_and_warns(case):
    """The step is the library's own, from the same random numbers."""
    make, own, family, flags, instead = CASES[case]
    with pytest.warns(DeprecationWarning, match=OLD) as caught:
        old = make()
    (warning,) = caught
    assert str(warning.message) == (
        f"Old has {as_code(flags)}, of version 0.1 of pyro_gumbel. Write {as_code(instead)}."
    )
    assert warning.filename == __file__
    torch.testing.assert_close(gradient(family, old()), gradient(family, own))


@pytest.mark.parametrize("case", CASES)
def test_what_the_warning_says_replaces_the_flags(case):
    make, own, *_, instead = CASES[case]
    with pytest.warns(DeprecationWarning, match=OLD):
        old = make()
    new = type("New", (Estimator,), instead)
    for name in ("route", "branches", "differentiates_branches", "needs_smooth_cost"):
        assert getattr(old(), name) == getattr(new(), name)
    assert (new.route, new.branches) == (own.route, own.branches)


def test_the_example_of_the_old_documentation_runs_without_a_warning():
    class AntitheticPair(Estimator):
        unbiased = True
        sites = "Bernoulli"
        num_values = 2

        def supports(self, fn):
            return isinstance(fn, torch.distributions.Bernoulli)

        def draw(self, fn):
            noise, probs = torch.rand_like(fn.probs), fn.probs.detach()
            return torch.stack([noise < probs, 1 - noise < probs]).to(noise.dtype)

        def surrogate(self, site):
            first, second = site.values
            logits = site.logits[..., 0]
            weight = (first - second) * logits.detach().abs().sigmoid() / 2
            return site.per_variable(site.cost[0] - site.cost[1]) * weight * logits

    draws = copy_gradients(copies("bits", 7_500), AntitheticPair())
    assert worst_z(draws, exact("bits")[1]) < 5


def test_an_old_flag_has_its_effect():
    """Each flag refuses or warns where version 0.1 did."""
    with pytest.warns(DeprecationWarning, match=OLD):
        through, local, relaxed = (
            old_straight_through()(), old_local_expectation()(), old_gumbel_softmax()()
        )  # fmt: skip
    with pytest.warns(GradientWarning, match="Old.* needs the cost's gradient"):
        gradient(one_hots, through, index=True)
    weighted = ImportanceWeighted_ELBO(2)
    gradient(one_hots, through, loss=weighted)
    with pytest.raises(ValueError, match="no importance-weighted form"):
        gradient(one_hots, relaxed, loss=weighted)

    def model():
        with pyro.plate("n", 2):
            z = pyro.sample("z", one_hots(torch.zeros(2, 3)))
        pyro.sample("x", dist.Normal((z * TABLE).sum(), 1.0), obs=torch.tensor(0.0))

    def guide():
        with pyro.plate("n", 2):
            pyro.sample("z", one_hots(torch.zeros(2, 3)), infer={"gradient": local})

    with pytest.raises(ValueError, match="moves all elements of the plate 'n' at once"):
        Estimator_ELBO().loss_and_grads(model, guide)


@pytest.mark.parametrize(
    ("flags", "attributes", "instead"),
    [
        ({"pathwise": False}, {"route": Route.SCORE}, "Delete it"),
        ({"branches_have_graph": False}, {"differentiates_branches": False},
         "Write differentiates_branches = False"),
        ({"moves_plates": True},
         {"branches": Branches.COUNTERFACTUAL, "differentiates_branches": True},
         "Write branches = Branches.COUNTERFACTUAL, differentiates_branches = True"),
        ({"branches_are_draws": False}, {"branches": Branches.RELAXED}, "Write branches ="),
    ],
)  # fmt: skip
def test_other_combinations_of_flags(flags, attributes, instead):
    with pytest.warns(DeprecationWarning, match=instead):
        old = type("Old", (Estimator,), flags)
    for name, value in attributes.items():
        assert getattr(old(), name) == value


def test_flags_of_a_subclass_override_those_of_its_parent():
    with pytest.warns(DeprecationWarning, match="Parent"):
        parent = type("Parent", (Estimator,), {"pathwise": True, "moves_plates": True})
    with pytest.warns(DeprecationWarning, match="Child"):
        child = type("Child", (parent,), {"pathwise": False, "moves_plates": False})
    assert (parent.route, parent.branches) == (Route.PATHWISE, Branches.COUNTERFACTUAL)
    assert (child.route, child.branches) == (Route.SCORE, Branches.SAMPLES)


def test_an_old_flag_can_be_set_on_an_estimator():
    class Old(Score):
        def __init__(self):
            super().__init__()
            self.pathwise = True

    with pytest.warns(DeprecationWarning, match=r"Old has pathwise = True.*Route.PATHWISE") as got:
        old = Old()
    assert got[0].filename == __file__
    assert old.route is Route.PATHWISE
    assert Score().route is Old.route is Route.SCORE


@pytest.mark.parametrize("case", CASES)
def test_an_old_flag_can_be_read_from_an_estimator(case):
    _, own, _, flags, instead = CASES[case]
    for flag, value in flags.items():
        with pytest.warns(DeprecationWarning, match=rf"\.{flag} is {OLD}.* Read ") as got:
            assert getattr(own, flag) is value
        assert got[0].filename == __file__
        assert any(f" {name}" in str(got[0].message) for name in [*instead, "differentiates_"])
    with pytest.raises(AttributeError, match="has no attribute 'no_flag'"):
        own.no_flag  # noqa: B018


@pytest.mark.parametrize(
    ("flag", "value", "instead"),
    [
        ("branches_are_draws", True, "branches is Branches.SAMPLES"),
        ("moves_plates", False, "branches is Branches.COUNTERFACTUAL"),
        ("pathwise", False, "route is Route.PATHWISE"),
        ("needs_linked_value", False, "needs_smooth_cost"),
        ("branches_have_graph", True, "differentiates_branches"),
    ],
)
def test_flags_of_the_score_function(flag, value, instead):
    with pytest.warns(DeprecationWarning, match=rf"Score\.{flag} is {OLD}.* Read {instead}\."):
        assert getattr(Score(), flag) is value


def test_other_attributes_may_have_the_name_of_an_old_flag():
    class Mixture(Estimator):
        def __init__(self):
            super().__init__()
            self.pathwise = Pathwise()

    assert isinstance(Mixture().pathwise, Pathwise)
    assert Mixture.route is Route.SCORE


def test_names_that_stayed_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = {"relaxed": True, "draws_from_logits": True, "num_values": 2, "min_particles": 2}
        estimator = type("Kept", (Estimator,), {**kept, "chunk_size": 8})()
    assert estimator.relaxed
    assert estimator.draws_from_logits


def test_the_old_method_objection_is_called():
    with pytest.warns(DeprecationWarning, match="Old has the method objection.*why_unsupported"):

        class Old(SumAndSample):
            def objection(self, fn, event_dims):
                return super().objection(fn, event_dims) or "it is Monday"

    with pytest.raises(ValueError, match="does not support.*: it is Monday"):
        gradient(one_hots, Old(1))
    with pytest.raises(ValueError, match="draws 5 different categories of 3"):
        gradient(one_hots, Old(4))


def test_the_old_method_draw_shared_is_not_needed():
    with pytest.warns(DeprecationWarning, match="draw_shared.*It is not called any more"):

        class Old(Score):
            def draw_shared(self, fn, dim, copies):
                raise AssertionError

    torch.testing.assert_close(gradient(bits, Old()), gradient(bits, Score()))


def smoothed():
    return GumbelStraightThrough(0.5, backward_temperature=Linear(1.0, 0.5, 10))


STATES = {
    "rebar": (lambda: Rebar(0.5), {"log_temperature": (), "scale": ()}),
    "relax": (
        lambda: Relax(nn.Linear(3, 1)),
        {"log_temperature": (), "scale": (), "critic.weight": (1, 3), "critic.bias": (1,)},
    ),
    "rodeo": (
        lambda: Rodeo(2, hidden=4),
        {"scales": (2,), "network.0.weight": (4, 2), "network.0.bias": (4,),
         "network.2.weight": (2, 4), "network.2.bias": (2,)},
    ),
    "double control variate": (lambda: DoubleControlVariate(2), {"alpha": ()}),
    "neural baseline": (
        lambda: Score(NeuralBaseline(nn.Linear(2, 1), "x")),
        {"baseline.module.weight": (1, 2), "baseline.module.bias": (1,)},
    ),
}  # fmt: skip
AVERAGES = {"sums": {"z": torch.tensor(0.6)}, "weights": {"z": torch.tensor(0.1)}}
COUNT = {"step_count": 7}
EXTRA_STATES = {
    "moving average": (MovingAverage, "_extra_state", AVERAGES),
    "its score": (lambda: Score(MovingAverage()), "baseline._extra_state", AVERAGES),
    "exponential": (lambda: Exponential(1.0, 0.5, 0.1), "_extra_state", COUNT),
    "linear": (lambda: Linear(1.0, 0.5, 10), "_extra_state", COUNT),
    "temperature": (
        lambda: GumbelSoftmax(Exponential(1.0, 0.5, 0.1)), "temperature._extra_state", COUNT
    ),
    "second temperature": (smoothed, "backward_temperature._extra_state", COUNT),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_a_saved_state_loads(name):
    """Keys and shapes are those that version 0.1 saved."""
    make, shapes = STATES[name]
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    module = make()
    module.load_state_dict(state)
    assert module.state_dict().keys() == state.keys()
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, state[key])


@pytest.mark.parametrize("name", EXTRA_STATES)
def test_a_saved_count_or_average_loads(name):
    make, key, extra = EXTRA_STATES[name]
    module = make()
    module.load_state_dict({key: extra})
    assert module.state_dict() == {key: extra}


def test_the_saved_state_of_a_loss_loads():
    """Version 0.1 saved a state by the names of the estimators that the loss had made."""
    elbo = Estimator_ELBO()
    state = {
        "pathwise": {}, "leave_one_out": {},
        "moving_average": {"baseline._extra_state": AVERAGES},
        "rebar": {"log_temperature": torch.tensor(-1.0), "scale": torch.tensor(0.5)},
    }  # fmt: skip
    elbo.load_state_dict(state)
    assert elbo.state_dict() == state
