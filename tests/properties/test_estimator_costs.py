"""Costs of coupled estimators: evaluations of the programs."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_gumbel.estimators import (
    ARMS,
    DisARM,
    DisARMTree,
    DoubleControlVariate,
    LeaveOneOut,
    LocalExpectation,
    MuProp,
    Rebar,
    Relax,
    Rodeo,
    Score,
    SumAndSample,
    UnorderedSet,
)
from pyro_gumbel.infer import Estimator_ELBO, config_gradient


class Counted:
    """A chain of a Bernoulli and a one-hot site that counts the rows of each model call."""

    def __init__(self):
        self.bits = torch.tensor([0.3, -0.2, 0.5], requires_grad=True)
        self.logits = torch.tensor([0.1, 0.4, -0.3, 0.2], requires_grad=True)
        self.rows = []

    def model(self):
        y = pyro.sample("y", dist.Bernoulli(logits=torch.zeros(3)).to_event(1))
        z = pyro.sample("z", dist.OneHotCategorical(logits=torch.zeros(4)))
        self.rows.append(z.shape[:-1].numel())
        pyro.factor("x", y.sum(-1) * z[..., 0] + z[..., 1])

    def guide(self):
        y = pyro.sample("y", dist.Bernoulli(logits=self.bits).to_event(1))
        pyro.sample("z", dist.OneHotCategorical(logits=self.logits + y.sum(-1, keepdim=True)))

    def evaluations(self, choice, *, num_particles=1, vectorize=True, **options):
        """Count the evaluations of the second step, since the first also checks the programs."""
        elbo = Estimator_ELBO(num_particles, vectorize_particles=vectorize, **options)
        guide = config_gradient(self.guide, choice)
        elbo.loss_and_grads(self.model, guide)
        self.rows.clear()
        elbo.loss_and_grads(self.model, guide)
        return sum(self.rows)


vectorized = pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorised"])
PLAIN = Score(LeaveOneOut())
FOR_BITS = {
    "disarm": (DisARM, 2),
    "arms": (lambda: ARMS(5), 5),
    "double_control_variate": (lambda: DoubleControlVariate(3), 3),
    "rodeo": (lambda: Rodeo(4), 4),
    "muprop": (MuProp, 2),
    "rebar": (Rebar, 3),
    "rebar_fixed": (lambda: Rebar(learn=False), 3),
    "local_expectation": (LocalExpectation, 1 + 3),
    "local_expectation_by_one": (lambda: LocalExpectation(chunk_size=1), 1 + 3),
}
FOR_ONE_HOT = {
    "tree": (DisARMTree, 2),
    "double_control_variate": (lambda: DoubleControlVariate(3), 3),
    "muprop": (MuProp, 2),
    "rebar": (Rebar, 3),
    "relax": (lambda: Relax(torch.nn.Linear(4, 1)), 3),
    "local_expectation": (LocalExpectation, 1 + 3),
    "sum_and_sample": (lambda: SumAndSample(3), 4),
    "unordered_set": (lambda: UnorderedSet(3), 3),
}


@vectorized
@pytest.mark.parametrize("name", FOR_BITS)
def test_bits_take_what_is_said(name, vectorize):
    make, count = FOR_BITS[name]
    choice = {"y": make(), "z": PLAIN}
    assert Counted().evaluations(choice, num_particles=2, vectorize=vectorize) == 2 * count


@vectorized
@pytest.mark.parametrize("name", FOR_ONE_HOT)
def test_one_hot_takes_what_is_said(name, vectorize):
    make, count = FOR_ONE_HOT[name]
    choice = {"y": PLAIN, "z": make()}
    assert Counted().evaluations(choice, num_particles=2, vectorize=vectorize) == 2 * count


@vectorized
@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize(
    ("first", "second", "count"),
    [
        (ARMS(4), DisARMTree(), 1 + 3 + 1),
        (LocalExpectation(), UnorderedSet(3), 1 + 3 + 2),
        (Rebar(), Rebar(), 1 + 2 + 2),
        (DoubleControlVariate(3), LocalExpectation(), 1 + 2 + 3),
    ],
    ids=repr,
)
def test_a_chain_adds_up(first, second, count, num_particles, vectorize):
    """Two coupled sites take ``1 + sum(K - 1)`` evaluations, not the product of their ``K``."""
    found = Counted().evaluations(
        {"y": first, "z": second}, num_particles=num_particles, vectorize=vectorize
    )
    assert found == num_particles * count


def test_chunks_bound_the_rows_of_a_pass():
    program = Counted()
    program.evaluations({"y": LocalExpectation(chunk_size=2), "z": PLAIN}, num_particles=5)
    assert program.rows == [5, 10, 5]


@vectorized
def test_evaluating_takes_one_path(vectorize):
    program = Counted()
    guide = config_gradient(program.guide, {"y": ARMS(4), "z": LocalExpectation()})
    elbo = Estimator_ELBO(3, vectorize_particles=vectorize, max_plate_nesting=0)
    elbo.loss(program.model, guide)
    program.rows.clear()
    elbo.loss(program.model, guide)
    assert sum(program.rows) == 3


@vectorized
def test_all_paths_of_a_step_see_one_minibatch(vectorize):
    seen = []

    def model():
        with pyro.plate("n", 50, subsample_size=2) as index:
            seen.append(index)
            z = pyro.sample("z", dist.OneHotCategorical(logits=torch.zeros(4)))
            pyro.factor("x", z[..., 0])

    logits = torch.zeros(4, requires_grad=True)

    def guide():
        with pyro.plate("n", 50, subsample_size=2) as index:
            seen.append(index)
            pyro.sample("z", dist.OneHotCategorical(logits=logits))

    elbo = Estimator_ELBO(2, vectorize_particles=vectorize, max_plate_nesting=1)
    guide = config_gradient(guide, LocalExpectation(chunk_size=1))
    steps = []
    for _ in range(3):
        seen.clear()
        elbo.loss_and_grads(model, guide)
        steps.append(seen[-1].tolist())
    # The last step's passes: rows of the main path, then each of the three branches.
    assert len(seen) == 2 * (4 if vectorize else 2 * 4)
    assert all(index.tolist() == steps[-1] for index in seen)
    assert len({tuple(step) for step in steps}) > 1


def test_branches_without_graph_keep_none():
    """Only the main path's run of the model records a graph."""
    recorded = []

    def model():
        z = pyro.sample("z", dist.OneHotCategorical(logits=torch.zeros(4)))
        weight = pyro.param("w", torch.tensor(1.0))
        recorded.append((weight * z[..., 0]).requires_grad)
        pyro.factor("x", weight * z[..., 0])

    logits = torch.zeros(4, requires_grad=True)

    def guide():
        pyro.sample("z", dist.OneHotCategorical(logits=logits))

    for estimator in (LocalExpectation(), SumAndSample(2), UnorderedSet(3)):
        elbo, configured = Estimator_ELBO(max_plate_nesting=0), config_gradient(guide, estimator)
        elbo.loss_and_grads(model, configured)  # also checks how the cost depends on the value
        recorded.clear()
        elbo.loss_and_grads(model, configured)
        assert recorded == [True] + [False] * (len(recorded) - 1)
        assert len(recorded) > 2


def test_branches_that_are_draws_are_rows_of_one_call():
    program = Counted()
    program.evaluations({"y": ARMS(4), "z": DoubleControlVariate(3)}, num_particles=5)
    assert program.rows == [5 * (1 + 3 + 2)]


def test_relaxed_values_of_the_last_site_have_a_call_of_their_own():
    """The main path's backward pass then does not include them."""
    program = Counted()
    program.evaluations({"y": Rebar(), "z": Rebar()}, num_particles=5)
    assert program.rows == [5 * (1 + 2), 5 * 2]
