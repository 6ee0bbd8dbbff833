"""Checks name what is biased, and find the shapes of weights that theory gives."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from helpers.toys import bits
from pyro import poutine
from pyro.infer.autoguide import AutoNormalMessenger

from pyro_gumbel.diagnostics import (
    check_unbiased,
    compare_gradients,
    exact_gradient,
    gradient_draws,
    guide_khat,
)
from pyro_gumbel.estimators import Estimator, GumbelSoftmax, LeaveOneOut, Score, Site
from pyro_gumbel.infer import Estimator_ELBO, config_gradient


class Planted(Estimator):
    """The score function with a cost that is a little too large."""

    unbiased = True
    sites = "any site with log_prob"

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def supports(self, fn) -> bool:
        return True

    def surrogate(self, site: Site) -> torch.Tensor:
        return self.factor * site.cost[0] * site.log_prob


MANY = {"num_draws": 300, "num_particles": 20, "vectorize_particles": True}


@pytest.fixture
def problem():
    problem = bits()
    problem.reset(torch.float64)
    return problem


@pytest.mark.parametrize("estimator", [Planted(), Score(LeaveOneOut()), {"z": "disarm"}])
def test_unbiased(problem, estimator) -> None:
    found = check_unbiased(problem.model, problem.guide, estimator=estimator, **MANY)
    assert 0 < found.z < 5
    assert re.fullmatch(r"w|logits\[\d, \d\]", found.coordinate)
    assert found.resolution < 0.1
    assert found.num_draws == MANY["num_draws"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_do_not_pass(problem, value: float) -> None:
    """Neither here nor in a table, whichever parameter they are of."""

    class Spoilt(Estimator_ELBO):
        def loss_and_grads(self, *args, **kwargs):
            loss = super().loss_and_grads(*args, **kwargs)
            pyro.param("w").unconstrained().grad.mul_(value)
            return loss

    with pytest.raises(AssertionError, match="no estimate: at w the mean of 50 draws is"):
        check_unbiased(problem.model, problem.guide, estimator=Spoilt(), num_draws=50)
    draws = gradient_draws(
        problem.model, problem.guide, estimators={"spoilt": Spoilt()}, num_draws=50, progress=False
    )
    exact = exact_gradient(problem.model, problem.guide)
    row = compare_gradients(draws, exact).loc["spoilt"]
    assert np.isnan(row.bias_z)
    assert "not finite" in row.warning
    for function in (
        lambda: compare_gradients(draws, exact * np.nan),
        lambda: check_unbiased(
            problem.model, problem.guide, estimator="score", num_draws=50, reference=exact * np.nan
        ),
    ):
        with pytest.raises(ValueError, match="reference is not finite at parameter"):
            function()


def test_rounding_at_an_optimum_passes() -> None:
    """There the gradient is the small difference of large numbers."""
    x = 50 + 2 * torch.randn(500, generator=torch.Generator().manual_seed(0))
    weights, locs = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([48.0, 50.0, 52.0])

    def model() -> None:
        with pyro.plate("d", 500):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(locs[z], 1.0), obs=x)

    def guide() -> None:
        logits = (dist.Normal(locs, 1.0).log_prob(x[:, None]) + weights.log()).log_softmax(-1)
        with pyro.plate("d", 500):
            pyro.sample("z", dist.Categorical(logits=pyro.param("l", logits, event_dim=1)))

    pyro.clear_param_store()
    found = check_unbiased(model, guide, estimator="enumerate", num_draws=20)
    assert found.z < 1
    draws = gradient_draws(
        model, guide, estimators={"exact": "enumerate"}, num_draws=20, progress=False
    )
    assert compare_gradients(draws, exact_gradient(model, guide)).bias_z["exact"] < 1


def test_gradients_are_good_to_the_coarsest_dtype() -> None:
    w = torch.linspace(-0.6, 0.7, 50)

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(z * 3.3, 0.7), obs=torch.tensor(0.77))

    def guide() -> None:
        a = pyro.param("a", torch.tensor(0.3, dtype=torch.float64))
        logit = (pyro.param("w", w) * torch.linspace(-3, 3, 50)).sum() + a.float()
        pyro.sample("z", dist.Bernoulli(logits=logit))

    pyro.clear_param_store()
    draws = gradient_draws(
        model, guide, estimators={"exact": "enumerate"}, num_draws=20, progress=False
    )
    assert draws["exact"].attrs["dtype"] == "float32"
    assert compare_gradients(draws, exact_gradient(model, guide)).bias_z["exact"] < 1


def test_planted_error(problem) -> None:
    with pytest.raises(AssertionError) as caught:
        check_unbiased(problem.model, problem.guide, estimator=Planted(1.5), **MANY)
    found = re.fullmatch(
        r"biased: at logits\[(\d), (\d)\] the mean of 300 draws is (\S+), the exact gradient "
        r"(\S+), (\S+) standard errors apart; about (\S+) draws are enough to see it.",
        str(caught.value),
    )
    row, column, mean, exact, z, needed = found.groups()
    truth = exact_gradient(problem.model, problem.guide)["logits"]
    assert float(exact) == pytest.approx(float(truth[int(row), int(column)]), rel=1e-4)
    assert float(mean) == pytest.approx(1.5 * float(exact), rel=0.3)
    assert float(z) > 5
    expected = 300 * (5 / float(z)) ** 2
    assert float(needed.replace(",", "")) == pytest.approx(expected, rel=0.05)


def test_reference_that_is_drawn(problem) -> None:
    options = {"num_chains": 1, "seed": 9, "site_draws": 0, "progress": False, **MANY}
    for project in (None, 1):
        reference = gradient_draws(
            problem.model, problem.guide, estimators={"r": Planted()}, project=project, **options
        )["r"]
        found = check_unbiased(
            problem.model, problem.guide, estimator=Planted(), reference=reference, **MANY
        )
        assert found.z < 5


def test_coarse_check_warns(problem) -> None:
    with pytest.warns(UserWarning, match=r"known to \d+% .*num_draws=[\d,]+ would show 10 %"):
        check_unbiased(problem.model, problem.guide, estimator=Planted(), num_draws=20)


def test_missed_rare_events_pass() -> None:
    """Draws that all miss a rare event have no variance there; that is no infinite z."""

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(1e-4))
        pyro.factor("f", 5.0 * z * pyro.param("rare", torch.zeros(2))[0])

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(1e-4))
        pyro.sample("y", dist.Normal(pyro.param("rare", torch.zeros(2))[1], 1.0),
                    infer={"is_auxiliary": True})  # fmt: skip
        pyro.factor("g", torch.randn(()) * pyro.param("rare", torch.zeros(2))[1], has_rsample=True)

    reference = xr.Dataset({"rare": ("i", np.array([-5e-4, 0.0]))})
    with pytest.warns(UserWarning, match="a smaller bias goes unseen"):
        found = check_unbiased(model, guide, estimator="score", reference=reference, num_draws=400)
    assert found.z < 5


def test_error_mentions_missed_events() -> None:
    def model() -> None:
        pyro.sample("z", dist.Bernoulli(0.3))

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(-9.0))))

    match = r"biased: at l .* Or it is short of rare events: about 0 of 240 draws carry the var"
    pyro.clear_param_store()
    with pytest.raises(AssertionError, match=match):
        check_unbiased(model, guide, estimator=Score(None), num_draws=240)


def test_one_draw_is_refused(problem) -> None:
    with pytest.raises(ValueError, match="num_draws must be an integer of at least 2; got 1"):
        check_unbiased(problem.model, problem.guide, estimator="score", num_draws=1)


@pytest.mark.parametrize(
    ("reference", "match"),
    [
        (xr.Dataset({"w": 0.0}), r"reference has no parameter 'logits'"),
        (xr.Dataset({"w": 0.0, "logits": 0.0}), r"shape \(\) at parameter 'logits'.*\(2, 2\)"),
    ],
)
def test_errors(problem, reference, match) -> None:
    with pytest.raises(ValueError, match=match):
        check_unbiased(
            problem.model, problem.guide, estimator="score", reference=reference, num_draws=5
        )


# The shape of a guide's importance weights, where theory gives it

SIZE = 3


def programs(scales: list[float]) -> tuple[Callable[[], None], Callable[[], None]]:
    """A standard normal posterior in each of three data points, and guides of other widths."""

    def model() -> None:
        with pyro.plate("n", SIZE):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide() -> None:
        with pyro.plate("n", SIZE):
            pyro.sample("z", dist.Normal(0.0, torch.tensor(scales)))

    return model, guide


def test_known_shapes() -> None:
    # The weights of a normal of variance s^2 < 1 against a standard one have the shape 1 - s^2.
    variances = np.array([0.1, 0.6, 4.0])
    khats = guide_khat(*programs(list(variances**0.5)), plate="n", num_samples=3000)
    assert khats.dims == ("n",)
    assert abs(float(khats[0]) - 0.9) < 0.35
    assert abs(float(khats[1]) - 0.4) < 0.35
    assert float(khats[2]) < 0.1  # bounded weights
    assert guide_khat(*programs(list(variances**0.5)), num_samples=1000) > 0.5


def test_nothing_is_wrong_with_a_guide_that_is_the_posterior() -> None:
    assert guide_khat(*programs([1.0, 1.0, 1.0]), num_samples=50) == 0.0
    khats = guide_khat(*programs([1.0, 0.3, 1.0]), plate="n", num_samples=200)
    assert (khats.values == 0).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rounding_is_no_tail(dtype: torch.dtype) -> None:
    """The posterior by its closed form: weights are equal but for the last digits."""
    x = torch.linspace(-3.0, 5.0, 200, dtype=dtype)

    def model() -> None:
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=dtype), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide() -> None:
        with pyro.plate("n", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x, 0.2**0.5))

    assert guide_khat(model, guide, num_samples=100) == 0.0
    assert (guide_khat(model, guide, plate="n", num_samples=100) == 0).all()


def test_a_guide_that_draws_impossible_values_alone() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("never", torch.where(z < 90.0, -math.inf, 0.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    assert guide_khat(model, guide, num_samples=50) == math.inf


def minibatches(size: int | None, scale: float = 1.0) -> tuple[Callable[[], None], ...]:
    """Sixty data points that are all alike; and the minibatches that were met."""
    seen: list[list[int]] = []

    @poutine.scale(scale=scale)
    def model() -> None:
        with pyro.plate("d", 60, subsample_size=size) as index:
            seen.append(index.tolist())
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(60)[index])

    @poutine.scale(scale=scale)
    def guide() -> None:
        with pyro.plate("d", 60, subsample_size=size):
            pyro.sample("z", dist.Normal(0.45, 0.65))

    return model, guide, seen


def test_a_minibatch_is_judged_as_the_whole_plate_is() -> None:
    model, guide, _ = minibatches(None)
    whole = guide_khat(model, guide, plate="d")
    model, guide, seen = minibatches(6)
    part = guide_khat(model, guide, plate="d")
    assert part.sizes == {"d": 6}
    error = (float(whole.var()) / 60 + float(part.var()) / 6) ** 0.5
    assert abs(float(whole.mean() - part.mean())) < 5 * error
    assert error < 0.1
    assert len(seen) >= 1000
    assert all(index == seen[0] for index in seen)


@pytest.mark.parametrize("plate", ["d", None])
@pytest.mark.parametrize("size", [6, None])
def test_scales_do_not_flatter(size: int | None, plate: str | None) -> None:
    """Weights are ratios of densities, whatever the loss is multiplied by."""
    plain, scaled = (
        guide_khat(*minibatches(size, scale)[:2], plate=plate, num_samples=100)
        for scale in (1.0, 1 / 60)
    )
    np.testing.assert_allclose(scaled, plain, rtol=1e-5)


def test_a_latent_outside_a_subsampled_plate_is_warned_of() -> None:
    def model(size: int | None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("d", 8, subsample_size=size) as index:
            pyro.sample("x", dist.Normal(w, 1.0), obs=torch.ones(8)[index])

    def guide(size: int | None) -> None:
        pyro.sample("w", dist.Normal(0.9, 0.3))

    with pytest.warns(UserWarning, match="'w' is outside the plate 'd'.*2 of its 8 elements"):
        guide_khat(model, guide, 2, num_samples=50)
    assert guide_khat(model, guide, None, num_samples=50) < 0.7


def test_discrete_guide_is_drawn_hard() -> None:
    seen = []

    def model() -> None:
        seen.append(pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5]))))

    def guide() -> None:
        pyro.sample("z", dist.OneHotCategorical(logits=pyro.param("l", torch.zeros(3))))

    configured = config_gradient(guide, GumbelSoftmax(0.5))
    guide_khat(model, configured, num_samples=50)
    assert all(set(z.tolist()) == {0.0, 1.0} for z in seen)


def test_a_guide_that_handles_the_model() -> None:
    """It runs the model, whose data it does not draw."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    guide = AutoNormalMessenger(model)
    guide()
    guide.locs.z, guide.scales.z = torch.tensor(0.5), torch.tensor(0.5**0.5)
    assert guide_khat(model, guide, num_samples=50) == 0.0


def test_same_seed_same_value() -> None:
    values = [guide_khat(*programs([0.5, 0.7, 0.9]), num_samples=60, seed=s) for s in (1, 1, 2)]
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_samples": 10}, "num_samples must be an integer of at least 25; got 10"),
        ({"plate": "data", "num_samples": 30}, r"no plate is called 'data'; there are \['n'\]"),
    ],
)
def test_errors_of_the_khat(options, match) -> None:
    with pytest.raises(ValueError, match=match):
        guide_khat(*programs([1.0, 1.0, 0.5]), **options)


def test_a_latent_that_is_missing_from_the_guide_is_told() -> None:
    def model() -> None:
        pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("w", dist.Normal(0.0, 1.0))

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(0.4))

    with pytest.raises(ValueError, match="latent site 'w' is missing from the guide"):
        guide_khat(model, guide)
