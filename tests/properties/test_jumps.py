"""Estimators that use the cost's gradient, where programs read values through jumps."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.jump_programs import BIT, FAMILIES, ONE_HOT, PLACES, TABLE, Programs, placed
from torch import Tensor, nn

from pyro_gumbel.estimators import (
    DoubleControlVariate,
    Estimator,
    GappedStraightThrough,
    GumbelRao,
    GumbelSoftmax,
    GumbelStraightThrough,
    MuProp,
    Rebar,
    ReinMax,
    ReinMaxRao,
    Relax,
    Rodeo,
    StraightThrough,
)
from pyro_gumbel.infer import Estimator_ELBO, GradientWarning, config_gradient


class Critic(nn.Module):
    def __init__(self, family: str) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(()))
        self.joined = family == "one-hot"

    def forward(self, value: Tensor) -> Tensor:
        return self.slope * (value[..., 0] if self.joined else value)


Make = Callable[[str], Estimator]
# These replace hard draws in the cost by relaxed ones, so they need its whole gradient.
NEED_SMOOTH: dict[str, Make] = {
    "rebar": lambda family: Rebar(),
    "relax": lambda family: Relax(Critic(family)),
}
# The gradient enters only control variates, whose mean is zero for any gradient.
ANY_COST: dict[str, Make] = {
    "muprop": lambda family: MuProp(),
    "double control variate": lambda family: DoubleControlVariate(3),
}
BIASED: dict[str, Make] = {
    "straight_through": lambda family: StraightThrough(),
    "gumbel_softmax": lambda family: GumbelSoftmax(0.5),
    "gumbel_straight_through": lambda family: GumbelStraightThrough(0.5),
    "gumbel_rao": lambda family: GumbelRao(0.5),
    "reinmax": lambda family: ReinMax(),
}
FOR_ONE_HOT = {
    "gapped": lambda family: GappedStraightThrough(0.5),
    "reinmax_rao": lambda family: ReinMaxRao(0.5),
}
JUMPS = [(family, read) for family in FAMILIES for read in FAMILIES[family].jumps]


def fill(estimator: Estimator) -> Estimator:
    """Move the learnt coefficients from zero, where they hide the control variates."""
    for parameter in estimator.parameters():
        parameter.data += 0.3
    return estimator


def refused(reader: str, what: str) -> str:
    return rf"(?s)site 'z', {what}.*needs the cost's gradient.*site '{reader}' depends"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("family", "read"), JUMPS)
@pytest.mark.parametrize("make", NEED_SMOOTH.values(), ids=NEED_SMOOTH)
def test_unbiased_estimators_refuse_jumps(make: Make, family: str, read: str, place: str) -> None:
    programs = placed(FAMILIES[family], FAMILIES[family].jumps[read], place, size=2)
    guide = config_gradient(programs.guide, {"z": make(family)})
    with pytest.raises(ValueError, match=refused(PLACES[place], "Re")):
        Estimator_ELBO().loss_and_grads(programs.model, guide)


def warnings_of(elbo: Estimator_ELBO, programs: Programs, estimator: Estimator) -> list[str]:
    """Run two steps, and return the warnings."""
    guide = config_gradient(programs.guide, {"z": estimator})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            elbo.loss_and_grads(programs.model, guide)
    assert {warning.category for warning in seen} <= {GradientWarning}
    return [str(warning.message) for warning in seen]


@pytest.mark.parametrize(("family", "read"), JUMPS)
@pytest.mark.parametrize("make", BIASED.values(), ids=BIASED)
def test_biased_estimators_warn_once(make: Make, family: str, read: str) -> None:
    programs = placed(FAMILIES[family], FAMILIES[family].jumps[read], "one site", size=2)
    (message,) = warnings_of(Estimator_ELBO(), programs, make(family))
    assert re.search(refused("x0", ""), message)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("read", ["argmax", "both"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["gumbel_softmax", "reinmax"])
def test_biased_estimators_warn_in_any_place(
    name: str, family: str, read: str, place: str
) -> None:
    programs = placed(FAMILIES[family], FAMILIES[family].jumps[read], place, size=2)
    (message,) = warnings_of(Estimator_ELBO(), programs, BIASED[name](family))
    assert re.search(refused(PLACES[place], ""), message)


@pytest.mark.parametrize("read", ONE_HOT.jumps)
@pytest.mark.parametrize("make", FOR_ONE_HOT.values(), ids=FOR_ONE_HOT)
def test_biased_one_hot_estimators_warn(make: Make, read: str) -> None:
    programs = placed(ONE_HOT, ONE_HOT.jumps[read], "one site", size=2)
    guide = config_gradient(programs.guide, {"z": make("one-hot")})
    with pytest.warns(GradientWarning, match=refused("x0", "")):
        Estimator_ELBO().loss_and_grads(programs.model, guide)


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", NEED_SMOOTH.values(), ids=NEED_SMOOTH)
def test_smooth_programs_are_accepted(
    make: Make, family: str, place: str, vectorize: bool
) -> None:
    programs = placed(FAMILIES[family], FAMILIES[family].smooth, place)
    elbo = Estimator_ELBO(vectorize_particles=vectorize, max_plate_nesting=2)
    assert programs.worst_z(elbo, make(family)) < 5


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("family", "read"), JUMPS)
@pytest.mark.parametrize("make", ANY_COST.values(), ids=ANY_COST)
def test_control_variates_accept_jumps(make: Make, family: str, read: str, place: str) -> None:
    programs = placed(FAMILIES[family], FAMILIES[family].jumps[read], place)
    assert programs.worst_z(Estimator_ELBO(), fill(make(family))) < 5


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("read", BIT.jumps)
def test_rodeo_accepts_jumps(read: str, place: str) -> None:
    programs = placed(BIT, BIT.jumps[read], place)
    assert programs.worst_z(Estimator_ELBO(), fill(Rodeo(3))) < 5


@pytest.mark.parametrize("place", ["one site", "two sites"])
@pytest.mark.parametrize("family", FAMILIES)
def test_reinmax_is_exact_for_quadratic_costs(family: str, place: str) -> None:
    programs = placed(FAMILIES[family], FAMILIES[family].smooth, place)
    assert programs.worst_z(Estimator_ELBO(), ReinMax()) < 5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chain_of_biased_estimators_gives_no_warning(family: str) -> None:
    programs = placed(FAMILIES[family], FAMILIES[family].smooth, "guide", size=2)
    guide = config_gradient(programs.guide, {"z": ReinMax(), "y": ReinMax()})
    Estimator_ELBO().loss_and_grads(programs.model, guide)


def small_guide() -> None:
    logits = pyro.param("logits", torch.zeros(3))
    with pyro.plate("data", 4):
        pyro.sample("z", dist.OneHotCategorical(logits=logits))


def reader(read: Callable[..., Tensor]) -> Callable[..., None]:
    def model(*args: Tensor) -> None:
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.OneHotCategorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(read(z, *args), 1.0), obs=torch.zeros(4))

    return model


@pytest.mark.parametrize("vectorize", [False, True])
def test_a_jump_that_only_later_data_reach(vectorize: bool) -> None:
    """The program branches on its data, so one batch does not show every branch."""

    def read(z: Tensor, x: Tensor) -> Tensor:
        return z @ TABLE if x.sum() > 0 else TABLE[z.argmax(-1)]

    guide = config_gradient(lambda x: small_guide(), Rebar())
    elbo = Estimator_ELBO(2, vectorize_particles=vectorize, max_plate_nesting=1)
    model = reader(read)
    elbo.loss_and_grads(model, guide, torch.ones(2))
    with pytest.raises(ValueError, match=refused("x", "Rebar")):
        elbo.loss_and_grads(model, guide, -torch.ones(2))


@pytest.mark.parametrize("vectorize", [False, True])
def test_a_jump_behind_a_reparameterised_value(vectorize: bool) -> None:
    def model() -> None:
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.OneHotCategorical(torch.ones(3)))
            y = pyro.sample("y", dist.Normal(z @ TABLE, 1.0))
            pyro.sample("x", dist.Normal(torch.where(y > 0, 1.0, -1.0), 1.0), obs=torch.zeros(4))

    def guide() -> None:
        logits = pyro.param("logits", torch.zeros(3))
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.OneHotCategorical(logits=logits))
            pyro.sample("y", dist.Normal(z @ TABLE, 1.0))

    configured = config_gradient(guide, {"z": Rebar(), "y": "pathwise"})
    elbo = Estimator_ELBO(2, vectorize_particles=vectorize, max_plate_nesting=1)
    with pytest.raises(ValueError, match=refused("x", "Rebar")):
        elbo.loss_and_grads(model, configured)


def test_a_jump_that_few_values_cause() -> None:
    """All four elements must take the third category, which happens once in 81 draws."""

    def read(z: Tensor) -> Tensor:
        return z @ TABLE + (z[..., 2] > 0.5).all() * 1.0

    guide = config_gradient(small_guide, Rebar())
    with pytest.raises(ValueError, match=refused("x", "Rebar")):
        Estimator_ELBO().loss_and_grads(reader(read), guide)


SMOOTH_READS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan check": lambda z: z @ TABLE if not z.isnan().any() else z[..., 0],
    "print": lambda z: z @ TABLE + 0 * len(str(z)),
    "batch norm": nn.BatchNorm1d(3).forward,
    "gelu": lambda z: nn.functional.gelu(z @ TABLE),
    "unused index": lambda z: (z.argmax(-1), z @ TABLE)[1],
}


@pytest.mark.parametrize("name", SMOOTH_READS)
def test_operations_that_are_not_jumps(name: str) -> None:
    read = SMOOTH_READS[name]
    guide = config_gradient(small_guide, Rebar())
    model = reader(lambda z: read(z) if read(z).dim() == 1 else read(z).sum(-1))
    assert torch.isfinite(Estimator_ELBO().loss_and_grads(model, guide))


LIKELIHOODS: dict[str, Callable[[Tensor], dist.TorchDistribution]] = {
    "Laplace": lambda mean: dist.Laplace(mean, 1.0),
    "HalfNormal": lambda mean: dist.HalfNormal(mean.exp()),
    "Uniform": lambda mean: dist.Uniform(mean - 9, mean + 9),
    "Poisson": lambda mean: dist.Poisson(mean.exp()),
    "ZeroInflatedPoisson": lambda mean: dist.ZeroInflatedPoisson(mean.exp(), gate=mean.sigmoid()),
    "Categorical": lambda mean: dist.Categorical(logits=mean[..., None] * TABLE),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_case_distinctions_of_distributions_are_not_jumps(name: str) -> None:
    def model() -> None:
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.OneHotCategorical(torch.ones(3)))
            pyro.sample("x", LIKELIHOODS[name](z @ TABLE), obs=torch.ones(4))

    for estimator in (Rebar(), ReinMax()):
        guide = config_gradient(small_guide, estimator)
        assert torch.isfinite(Estimator_ELBO().loss_and_grads(model, guide))


class ByIndex(dist.OneHotCategorical):
    """A user's family, which is scored by its own method."""

    def log_prob(self, value: Tensor) -> Tensor:
        return self.logits.gather(-1, value.argmax(-1, keepdim=True)).squeeze(-1)


def test_a_prior_that_is_scored_by_index() -> None:
    def model() -> None:
        with pyro.plate("data", 4):
            pyro.sample("z", ByIndex(torch.tensor([0.2, 0.3, 0.5]).expand(4, 3)))

    guide = config_gradient(small_guide, Rebar())
    with pytest.raises(ValueError, match=refused("z", "Rebar")):
        Estimator_ELBO().loss_and_grads(model, guide)


def test_the_message_gives_the_code_to_write() -> None:
    guide = config_gradient(small_guide, Rebar())
    match = re.escape("Write the model with products and sums of the value, such as z @ table")
    with pytest.raises(ValueError, match=match):
        Estimator_ELBO().loss_and_grads(reader(lambda z: TABLE[z.argmax(-1)]), guide)


def test_buffers_and_generators_are_left_as_they_were() -> None:
    """A step with the check and one without it are the same."""
    results = []
    for validate in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(7)
        norm = nn.BatchNorm1d(3)
        model = reader(lambda z, norm=norm: norm(z) @ TABLE)
        with pyro.validation_enabled(validate):
            Estimator_ELBO().loss_and_grads(model, config_gradient(small_guide, Rebar()))
        gradient = pyro.get_param_store()._params["logits"].grad
        results.append([gradient, norm.running_mean, norm.num_batches_tracked, torch.rand(2)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
