"""Coupled estimators against exact gradients: chains, plates, masks, scales, Normal neighbours.

Every check asks for ``|z| < 5`` in every coordinate, and that the standard error of the mean
gradient is below 2 % of the exact gradient's norm."""

from __future__ import annotations

import pyro
import pytest
import torch
from helpers.coupled_problems import PROBLEMS, copies, copy_gradients, exact
from helpers.problems import relative_error, worst_z
from pyro.infer import SVI
from torch import nn

from pyro_gumbel.estimators import (
    ARMS,
    DisARM,
    DisARMTree,
    DoubleControlVariate,
    Enumerate,
    LeaveOneOut,
    LocalExpectation,
    MuProp,
    Pathwise,
    Rebar,
    ReinMax,
    Relax,
    Rodeo,
    Score,
    SumAndSample,
    UnorderedSet,
)
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

COPIES = 15_000
MANY = 40_000  # cheap, and needed where Normal sites add their own noise


def critic(size):
    net = nn.Sequential(nn.Linear(size, 5), nn.Tanh(), nn.Linear(5, 1))
    return net.double()


BITS = {
    "disarm": DisARM,
    "arms_2": lambda: ARMS(2),
    "arms_3": lambda: ARMS(3),
    "arms_5": lambda: ARMS(5),
    "double_control_variate_2": DoubleControlVariate,
    "double_control_variate_3": lambda: DoubleControlVariate(3),
    "rodeo_2": lambda: Rodeo(2, hidden=8),
    "rodeo_3": lambda: Rodeo(3, hidden=8),
    "muprop": MuProp,
    "rebar": Rebar,
    "local_expectation": lambda: LocalExpectation(chunk_size=2),
}
ONE_HOT = {
    "disarm_tree": DisARMTree,
    "double_control_variate_2": DoubleControlVariate,
    "double_control_variate_3": lambda: DoubleControlVariate(3),
    "muprop": MuProp,
    "rebar": lambda: Rebar(0.8),
    "local_expectation": LocalExpectation,
    "sum_and_sample_1": lambda: SumAndSample(1),
    "sum_and_sample_2": lambda: SumAndSample(2),
    "unordered_set_2": lambda: UnorderedSet(2),
    "unordered_set_3": UnorderedSet,
}
CATEGORICAL = ["disarm_tree", "local_expectation", "sum_and_sample_1", "unordered_set_3"]
MIXED = {
    "disarm_then_rebar": ("bits", lambda: {"y": DisARM(), "z": Rebar()}),
    "rebar_then_disarm": ("bits", lambda: {"y": Rebar(), "z": DisARM()}),
    "rebar_then_score": ("bits", lambda: {"y": Rebar(), "z": Score(LeaveOneOut())}),
    "rebar_then_enumerate": ("one_hot", lambda: {"y": Rebar(), "z": Enumerate()}),
    "rebar_then_local": ("one_hot", lambda: {"y": Rebar(), "z": LocalExpectation()}),
    "local_then_arms": ("bits", lambda: {"y": LocalExpectation(), "z": ARMS(3)}),
    "score_then_rodeo": ("bits", lambda: {"y": Score(LeaveOneOut()), "z": Rodeo(2, hidden=8)}),
    "arms_then_muprop": ("bits", lambda: {"y": ARMS(4), "z": MuProp()}),
    "tree_then_set": ("one_hot", lambda: {"y": DisARMTree(), "z": UnorderedSet(3)}),
    "set_then_tree": ("one_hot", lambda: {"y": UnorderedSet(2), "z": DisARMTree()}),
    "sum_then_variate": ("one_hot", lambda: {"y": SumAndSample(1), "z": DoubleControlVariate(3)}),
    "relax_then_relax": ("one_hot", lambda: {"y": Relax(critic(3)), "z": Relax(critic(4))}),
    "nested_disarm_tree": ("nested", lambda: {"y": DisARM(), "z": DisARMTree()}),
    "nested_rebar": ("nested", lambda: {"y": Rebar(), "z": Rebar()}),
    "nested_local": ("nested", lambda: {"y": LocalExpectation(), "z": LocalExpectation()}),
    "nested_arms_set": ("nested", lambda: {"y": ARMS(3), "z": UnorderedSet(2)}),
    "nested_variates": ("nested", lambda: {"y": Rodeo(2, hidden=8), "z": DoubleControlVariate()}),
}
vectorized = pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorised"])


def check(name, choice, *, number=COPIES, **options):
    """One step of many copies."""
    nesting = PROBLEMS[name][1] + 1
    draws = copy_gradients(copies(name, number), choice, nesting=nesting, **options)
    gradient = exact(name)[1]
    assert relative_error(draws, gradient) < 0.02
    assert worst_z(draws, gradient) < 5
    return draws


@vectorized
@pytest.mark.parametrize("estimator", BITS)
def test_two_layers_of_bits_in_a_scaled_plate(estimator, vectorize):
    """15,000 estimates."""
    check("bits", BITS[estimator](), vectorize=vectorize)


@vectorized
@pytest.mark.parametrize("estimator", ONE_HOT)
def test_chain_of_one_hot_sites_with_a_masked_datum(estimator, vectorize):
    """15,000 estimates."""
    check("one_hot", ONE_HOT[estimator](), vectorize=vectorize)


@vectorized
@pytest.mark.parametrize("estimator", CATEGORICAL)
def test_chain_of_categorical_sites(estimator, vectorize):
    """15,000 estimates."""
    check("categorical", ONE_HOT[estimator](), vectorize=vectorize)


@vectorized
@pytest.mark.parametrize("estimator", ONE_HOT)
def test_one_hot_between_normals(estimator, vectorize):
    """40,000 estimates against quadrature."""
    choice = {"u": Pathwise(), "z": ONE_HOT[estimator](), "v": Pathwise()}
    check("normal_one_hot", choice, vectorize=vectorize, number=MANY)


@pytest.mark.parametrize("estimator", BITS)
def test_bit_between_normals(estimator):
    """40,000 estimates against quadrature."""
    check("normal_bernoulli", {"z": BITS[estimator]()}, number=MANY)


@vectorized
@pytest.mark.parametrize("mix", MIXED)
def test_estimators_mixed_in_one_program(mix, vectorize):
    """7,500 estimates of two particles each."""
    name, make = MIXED[mix]
    check(name, make(), vectorize=vectorize, num_particles=2, number=COPIES // 2)


def test_normal_scored_beside_rebar():
    """40,000 estimates; the later site's distribution depends on the relaxed value."""
    choice = {"z": Rebar(0.8), "v": Score(LeaveOneOut())}
    check("normal_one_hot", choice, num_particles=2, number=MANY)


@pytest.mark.parametrize("estimator", BITS)
def test_bits_in_float32(estimator):
    """15,000 estimates."""
    check("bits", BITS[estimator](), dtype=torch.float32)


@pytest.mark.parametrize("estimator", ONE_HOT)
def test_one_hot_in_float32(estimator):
    """15,000 estimates."""
    check("one_hot", ONE_HOT[estimator](), dtype=torch.float32)


@pytest.mark.parametrize("estimator", ["disarm_tree", "rebar", "local_expectation"])
def test_closed_form_kl(estimator):
    """15,000 estimates; the site's own divergence is not sampled."""
    check("one_hot", ONE_HOT[estimator](), analytic_kl=True)


LEARNING = {
    "double_control_variate": ("bits", DoubleControlVariate),
    "double_control_variate_one_hot": ("one_hot", lambda: DoubleControlVariate(2)),
    "rodeo": ("bits", lambda: Rodeo(2, hidden=16)),
    "rebar": ("bits", lambda: Rebar(0.1)),
    "rebar_one_hot": ("one_hot", lambda: Rebar(0.25)),
    "relax": ("one_hot", lambda: {"y": Relax(critic(3)), "z": Relax(critic(4))}),
}


def trained(name, choice, num_steps=60):
    """Train the learnable parts by SVI; the program's own parameters do not change."""
    problem = copies(name, 50)
    problem.reset(torch.float64)
    before = {key: value.clone() for key, value in problem.params.items()}
    optim = pyro.optim.Adam(lambda param: {"lr": 0.06 if param.startswith("gradient$") else 0.0})
    elbo = Estimator_ELBO(vectorize_particles=True, max_plate_nesting=2)
    svi = SVI(problem.model, config_gradient(problem.guide, choice), optim, loss=elbo)
    for _ in range(num_steps):
        svi.step()
    for key, value in before.items():
        torch.testing.assert_close(pyro.param(key).detach(), value.double())
    return choice


@pytest.mark.parametrize("case", LEARNING)
def test_training_lowers_the_variance_and_leaves_no_bias(case):
    """5,000 estimates before, 15,000 after; their variances have errors of a few per cent."""
    name, make = LEARNING[case]
    choice = make()
    before = copy_gradients(copies(name, COPIES // 3), choice)
    parts = list(choice.values()) if isinstance(choice, dict) else [choice]
    start = [param.detach().clone() for part in parts for param in part.parameters()]
    after = check(name, trained(name, choice))
    end = [param.detach() for part in parts for param in part.parameters()]
    assert all((a != b).any() for a, b in zip(start, end, strict=True))
    # The first parameter is the model's: no part of the estimator acts on its gradient.
    assert after[:, 1:].var(0).sum() < 0.85 * before[:, 1:].var(0).sum()


def test_learning_switched_off_trains_nothing():
    for estimator in (DoubleControlVariate(learn=False), Rodeo(learn=False), Rebar(learn=False)):
        check("bits", estimator)
        assert all(param.grad is None for param in estimator.parameters())
        assert not [name for name in pyro.get_param_store() if name.startswith("gradient$")]


def test_a_biased_estimator_fails_this_check():
    """The check detects the bias of ReinMax."""
    draws = copy_gradients(copies("one_hot", COPIES), ReinMax())
    assert worst_z(draws, exact("one_hot")[1]) > 5
