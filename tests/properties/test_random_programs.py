"""Random discrete programs against sums over all their states."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import pyro
import pytest
import torch
from helpers.user_programs.random_programs import PLATES, RandomProgram, RandomSite
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from pyro import poutine

from pyro_gumbel.estimators import (
    ARMS,
    DisARM,
    DisARMTree,
    DoubleControlVariate,
    Enumerate,
    LeaveOneOut,
    LocalExpectation,
    MuProp,
    Rebar,
    Rodeo,
    Score,
    SumAndSample,
    UnorderedSet,
)
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

EXAMPLES = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # to shrink a failure takes minutes
    suppress_health_check=list(HealthCheck),
)
SMOOTH = (Rebar, MuProp, DoubleControlVariate, Rodeo)  # live on the cost's gradient in the value
WHOLE_PLATES = (
    Enumerate,
    LocalExpectation,
    SumAndSample,
    UnorderedSet,
)  # move all elements at once
CHOICES = {
    "bit": [DisARM, ARMS, DoubleControlVariate, Rodeo, MuProp, Rebar, LocalExpectation],
    "one_hot": [DisARMTree, DoubleControlVariate, MuProp, Rebar, LocalExpectation],
    "category": [DisARMTree, LocalExpectation],
}
for _choices in CHOICES.values():
    _choices += [Enumerate, Score, lambda: Score(LeaveOneOut())]
for _family in ("one_hot", "category"):
    CHOICES[_family] += [lambda: SumAndSample(1), lambda: UnorderedSet(2)]


@st.composite
def programs(draw, gathers=None):
    """Two to four sites, each in plates of its own, below some of those before."""
    sites: list[RandomSite] = []
    gathered = draw(st.booleans()) if gathers is None else gathers
    for number in range(draw(st.integers(2, 4))):
        plates = draw(st.sampled_from(sorted(PLATES)))
        above = [s.name for s in sites if set(PLATES[s.plates]) <= set(PLATES[plates])]
        inside = [s.name for s in sites if set(PLATES[plates]) < set(PLATES[s.plates])]
        beside = [*above, *inside] if gathered else above
        sites.append(
            RandomSite(
                name=f"z{number}",
                family=draw(st.sampled_from(sorted(CHOICES))),
                plates=plates,
                guide_parents=tuple(draw(st.sets(st.sampled_from(above)))) if above else (),
                model_parents=tuple(draw(st.sets(st.sampled_from(beside)))) if beside else (),
                by_index=draw(st.booleans()),
            )
        )
    program = RandomProgram(
        tuple(sites),
        scaled=draw(st.booleans()),
        masked=draw(st.booleans()),
        gathers=gathered,
        seed=draw(st.integers(0, 10_000)),
    )
    assume(program.states() <= 4000)
    return program


def gradients(elbo, program, guide):
    """A loss of one replicate, and the gradients by name."""
    with poutine.trace(param_only=True) as capture:
        loss = elbo.loss_and_grads(program.model, guide)
    found = {}
    for name, site in sorted(capture.trace.nodes.items()):
        value = site["value"].unconstrained()
        found[name] = value.grad.clone() / program.copies
        value.grad = None
    return float(loss) / program.copies, found


@settings(EXAMPLES, max_examples=40)
@given(program=programs(gathers=False), vectorize=st.booleans())
def test_sums_over_the_supports_are_exact(program, vectorize):
    pyro.clear_param_store()
    loss, exact = program.exact()
    elbo = Estimator_ELBO(2, vectorize_particles=vectorize)
    got, found = gradients(elbo, program, config_gradient(program.guide, Enumerate()))
    assert got == pytest.approx(loss, rel=1e-4, abs=1e-4)
    for name, gradient in exact.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4)


def unbiased_choice(program, data, vectorize):
    """Means of 20 steps of 500 replicates under estimators that chance chooses."""
    pyro.clear_param_store()
    loss, exact = program.exact()
    chosen = {s.name: data.draw(st.sampled_from(CHOICES[s.family]))() for s in program.sites}
    many = replace(program, copies=500)
    elbo = Estimator_ELBO(2, vectorize_particles=vectorize)
    guide = config_gradient(many.guide, chosen)
    if refusal_expected(program, chosen):
        with contextlib.suppress(ValueError):  # they may serve it all the same, rightly
            gradients(elbo, many, guide)
        return
    draws = []
    for _ in range(20):
        got, found = gradients(elbo, many, guide)
        parts = [torch.tensor([got]), *(found[name].flatten() for name in exact)]
        draws.append(torch.cat(parts).double())
    draws = torch.stack(draws)
    expected = torch.cat([torch.tensor([loss]), *(g.flatten() for g in exact.values())]).double()
    error = draws.std(0) / math.sqrt(len(draws))
    z = (draws.mean(0) - expected).abs() / (error + 1e-4 * (1 + expected.abs()))
    assert z.max() < 7, (chosen, z.max())  # 20 draws: heavier tails than a normal's
    assert (error / expected.abs().max()).max() < 0.05


def refusal_expected(program, chosen):
    """Where the program reads by an index or gathers a plate, some estimators are refused."""
    return any(
        (isinstance(chosen[site.name], SMOOTH) and (site.by_index or site.family == "category"))
        or (isinstance(chosen[site.name], WHOLE_PLATES) and site.plates and program.gathers)
        for site in program.sites
    )


@settings(EXAMPLES, max_examples=6)
@given(program=programs(), data=st.data(), vectorize=st.booleans())
def test_estimators_of_any_kind_together_are_unbiased(program, data, vectorize):
    unbiased_choice(program, data, vectorize)


@pytest.mark.slow
@settings(EXAMPLES, max_examples=150)
@given(program=programs(), data=st.data(), vectorize=st.booleans())
def test_many_estimators_of_any_kind_together_are_unbiased(program, data, vectorize):
    unbiased_choice(program, data, vectorize)
