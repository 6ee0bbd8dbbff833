"""Draws and masses follow a distribution's parameters in the form that the user gave."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_gumbel.estimators as E  # noqa: N812
from pyro_gumbel.distributions import OneHot, RelaxedBernoulli, RelaxedOneHot
from pyro_gumbel.distributions._categorical import log_odds, log_probs, weights
from pyro_gumbel.distributions.families import (
    base_noise,
    from_noise,
    log_mass,
    sample_detached,
    to_index,
)
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

DRAWS = 20_000
INDEX = {
    "categorical": dist.Categorical,
    "one_hot": dist.OneHotCategorical,
    "torch": torch.distributions.OneHotCategorical,
    "OneHot": OneHot,
    "RelaxedOneHot": lambda **given: RelaxedOneHot(0.5, straight_through=True, **given),
}
BITS = {
    "bernoulli": dist.Bernoulli,
    "RelaxedBernoulli": lambda **given: RelaxedBernoulli(0.5, straight_through=True, **given),
}
HARD = [
    E.StraightThrough(),
    E.GumbelStraightThrough(0.5),
    E.GumbelRao(0.5),
    E.ReinMax(),
    E.MuProp(),
    E.DoubleControlVariate(),
    E.Rebar(),
]
ONE_HOT_ESTIMATORS = [
    *HARD, E.GappedStraightThrough(), E.ReinMaxRao(), E.DisARMTree(), E.SumAndSample(2)
]  # fmt: skip
BIT_ESTIMATORS = [*HARD, E.DisARM(), E.ARMS(), E.Rodeo()]
families = pytest.mark.parametrize("family", INDEX)
bits = pytest.mark.parametrize("family", BITS)
forms = pytest.mark.parametrize("form", ["probs", "logits"])
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
read_before = pytest.mark.parametrize("read_before", [False, True], ids=["fresh", "both_read"])


def given(family, form, probs, dtype):
    """The numbers in the form and the dtype, and the exact probabilities that they stand for.

    Torch's classes normalise in the dtype itself: what they hold then is what counts.
    """
    binary = family in BITS
    numbers = probs if form == "probs" else probs.logit() if binary else probs.log()
    numbers = numbers.to(dtype)
    fn = {**INDEX, **BITS}[family](**{form: numbers})
    held = (numbers if hasattr(fn, "dtype") else fn._param).double()
    if binary:
        return numbers, held if form == "probs" else held.sigmoid()
    exact = held if form == "probs" else held.exp()
    return numbers, exact / exact.sum(-1, keepdim=True)


def make(family, form, numbers, batch, read_before):
    """A distribution in a plate; torch derives the other form where it is asked before."""
    fn = {**INDEX, **BITS}[family](**{form: numbers})
    if read_before:
        assert fn.probs.shape == fn.logits.shape
    return fn.expand(batch)


def spread(num_categories):
    """Probabilities from zero to near one, tiny ones among them."""
    probs = torch.logspace(0, -9, num_categories, dtype=torch.float64)
    probs[1::7] = 0.0
    return probs / probs.sum()


def worst_z(draws, probs):
    """Compare the shares of categories with their probabilities."""
    count = draws.numel()
    counts = torch.bincount(draws.long().flatten(), minlength=len(probs)).double()
    error = (count * probs * (1 - probs)).sqrt()
    assert (counts[probs == 0] == 0).all()
    # A count below one has no standard error to speak of.
    return ((counts - count * probs).abs() / error.clamp(min=1.0)).max().item()


@read_before
@dtypes
@forms
@families
def test_masses_and_weights_are_exact(family, form, dtype, read_before):
    numbers, exact = given(family, form, spread(40), dtype)
    fn = make(family, form, numbers, (3,), read_before)
    masses = log_probs(fn).double().exp()
    shares = weights(fn).double()
    for found in (masses, shares / shares.sum(-1, keepdim=True)):
        torch.testing.assert_close(found, exact.expand(3, -1), rtol=2e-5, atol=0.0)
    assert (masses[:, exact == 0] == 0).all()


@read_before
@dtypes
@forms
@families
def test_draws_follow_the_numbers(family, form, dtype, read_before):
    numbers, exact = given(family, form, spread(40), dtype)
    fn = make(family, form, numbers, (DRAWS,), read_before)
    noise = base_noise(fn)
    assert noise.dtype == torch.float64
    for value in (sample_detached(fn), from_noise(fn, noise)):
        assert value.shape == fn.batch_shape + fn.event_shape
        assert value.dtype == (torch.int64 if family == "categorical" else dtype)
        assert worst_z(to_index(fn, value), exact) < 5


@forms
@pytest.mark.parametrize("estimator", [E.Score(), *ONE_HOT_ESTIMATORS], ids=repr)
def test_estimators_draw_by_the_numbers(estimator, form):
    """In a dtype in which torch's derived logits are far off."""
    numbers, exact = given("one_hot", form, spread(40), torch.bfloat16)
    fn = make("one_hot", form, numbers, (DRAWS,), True)
    value = estimator.draw(fn).detach()
    assert value.dtype == torch.bfloat16
    first = value[0] if estimator.num_values > 1 else value
    assert worst_z(to_index(fn, first), exact) < 5


@forms
@pytest.mark.parametrize("estimator", [E.Score(), *BIT_ESTIMATORS], ids=repr)
def test_estimators_draw_bits_by_the_numbers(estimator, form):
    probs = torch.tensor([0.0, 3e-3, 0.3, 0.998], dtype=torch.float64)
    numbers, exact = given("bernoulli", form, probs, torch.bfloat16)
    fn = make("bernoulli", form, numbers, (DRAWS, 4), True)
    value = estimator.draw(fn).detach()
    assert value.dtype == torch.bfloat16
    share = (value[0] if estimator.num_values > 1 else value).double().mean(0)
    error = (exact * (1 - exact) / DRAWS).sqrt().clamp(min=1 / DRAWS)
    assert ((share - exact).abs() / error).max() < 5


@read_before
@dtypes
@forms
@bits
def test_bits_follow_the_numbers(family, form, dtype, read_before):
    probs = torch.tensor([0.0, 1e-9, 3e-3, 0.3, 0.9, 1 - 1e-6, 1.0], dtype=torch.float64)
    numbers, exact = given(family, form, probs, dtype)
    fn = make(family, form, numbers, (DRAWS, 7), read_before)
    torch.testing.assert_close(log_odds(fn)[0].double(), exact.logit(), rtol=2e-6, atol=2e-6)
    for value in (sample_detached(fn), from_noise(fn, base_noise(fn))):
        assert value.dtype == dtype
        share = value.double().mean(0)
        error = (exact * (1 - exact) / DRAWS).sqrt().clamp(min=1 / DRAWS)
        assert ((share - exact).abs() / error).max() < 5
        assert (share[exact == 0] == 0).all()
        assert (share[exact == 1] == 1).all()


@forms
@dtypes
def test_many_tiny_categories_keep_their_share(form, dtype):
    """One category in fifty thousand has half of the mass, the others the rest."""
    num_draws = 100 if dtype in (torch.bfloat16, torch.float16) else 500
    probs = torch.full((50_000,), 1e-5, dtype=torch.float64)
    probs[7], probs[::5] = 0.5, 0.0
    with pyro.validation_enabled(False):  # torch takes none of these for a simplex
        numbers, exact = given("one_hot", form, probs, dtype)
        fn = make("one_hot", form, numbers, (num_draws,), True)
    index = sample_detached(fn).argmax(-1)
    assert (exact[index] > 0).all()
    share, expected = (index == 7).double().mean(), exact[7]
    assert (share - expected).abs() < 5 * (expected * (1 - expected) / num_draws).sqrt()
    torch.testing.assert_close(log_probs(fn)[0].double().exp(), exact, rtol=1e-4, atol=0.0)


def test_noise_reaches_categories_of_any_probability():
    fn = dist.Categorical(probs=torch.tensor([1.0, 1e-12, 0.0]))
    assert from_noise(fn, torch.tensor([0.0, 28.0, 60.0], dtype=torch.float64)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", [*INDEX, *BITS])
def test_masses_have_the_gradient_of_torch_in_probabilities(family, dtype):
    binary = family in BITS
    raw = torch.tensor([0.2, 0.5, 0.3, 0.7], dtype=dtype, requires_grad=True)
    fn = {**INDEX, **BITS}[family](probs=raw)
    law = dist.Bernoulli(probs=raw) if binary else dist.OneHotCategorical(probs=raw)
    value = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=dtype)
    scored = value.argmax() if family == "categorical" else value
    (ours,) = torch.autograd.grad(log_mass(fn, scored).sum(), raw)
    (torchs,) = torch.autograd.grad(law.log_prob(value).sum(), raw)
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("family", [*INDEX, *BITS])
def test_empty_plates_have_no_numbers_to_tell_apart(family):
    shape = (0,) if family in BITS else (0, 3)
    with pyro.validation_enabled(False):  # torch cannot check no vectors
        fn = make(family, "probs", torch.ones(shape), (2, 0), read_before=True)
        value = sample_detached(fn)
        assert value.shape == fn.batch_shape + fn.event_shape
        assert log_mass(fn, value).shape == (2, 0)


@dtypes
@read_before
@pytest.mark.parametrize("family", INDEX)
def test_gradients_are_finite_beside_impossible_categories(family, read_before, dtype):
    raw = torch.tensor([0.0, 0.25, 0.75, 1e-7, 1e-42], dtype=dtype).requires_grad_()
    levels = torch.arange(5, dtype=torch.float64)
    fn = make(family, "probs", raw, (), read_before)
    masses = log_probs(fn).exp()
    (gradient,) = torch.autograd.grad((masses * levels).sum(), raw)
    assert gradient.isfinite().all()
    total = raw.detach().double().sum()
    mean = (raw.detach().double() * levels).sum() / total
    expected = (levels - mean) / total
    torch.testing.assert_close(gradient[1:4].double(), expected[1:4], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("family", [*INDEX, *BITS])
def test_the_same_noise_draws_alike_from_laws_that_are_alike(family):
    probs = torch.tensor([[0.2, 0.5, 0.3], [0.25, 0.4, 0.35]], dtype=torch.float64)
    laws = [row[0].expand(DRAWS) if family in BITS else row.expand(DRAWS, 3) for row in probs]
    fns = [{**INDEX, **BITS}[family](probs=law) for law in laws]
    noise = base_noise(fns[0])
    drawn = [to_index(fn, from_noise(fn, noise)) for fn in fns]
    for index, row in zip(drawn, probs, strict=True):
        assert worst_z(index, torch.stack([row[0], 1 - row[0]]) if family in BITS else row) < 5
    assert (drawn[0] == drawn[1]).double().mean() > 0.8


def test_normal_draw_of_noise_carries_its_gradient():
    loc = torch.tensor([0.3, -0.2], requires_grad=True)
    fn = dist.Normal(loc, 2.0)
    noise = base_noise(fn)
    value = from_noise(fn, noise)
    torch.testing.assert_close(value, loc + 2 * noise)
    assert torch.autograd.grad(value.sum(), loc)[0].tolist() == [1.0, 1.0]
    assert not from_noise(fn.has_rsample_(False), noise).requires_grad


@pytest.mark.parametrize("fn", [dist.Poisson(1.0), dist.Gamma(1.0, 1.0), dist.LogNormal(0.0, 1.0)])
def test_other_families_have_no_noise_of_ours(fn):
    assert base_noise(fn) is None


@pytest.mark.parametrize("analytic_kl", [False, True])
@pytest.mark.parametrize("estimator", ["score", "gumbel_rao", "reinmax", "rebar", "disarm_tree"])
@pytest.mark.parametrize("family", [f for f in INDEX if f not in ("categorical", "torch")])
def test_fifty_thousand_categories_are_served(family, estimator, analytic_kl):
    """Their float32 probabilities sum to one up to 3e-6, no simplex to torch."""
    logits = torch.randn(2, 50_000) * 6
    assert not dist.constraints.simplex.check(logits.softmax(-1)).all()
    unchecked = {"validate_args": False} if family == "one_hot" else {}

    def program(scale, form):
        def run():
            phi = pyro.param(form, logits.clone()) * scale
            numbers = phi.softmax(-1) if form == "probs" else phi
            with pyro.plate("n", 2):
                pyro.sample("z", INDEX[family](**{form: numbers}, **unchecked))

        return run

    for form in ("probs", "logits"):
        pyro.clear_param_store()
        guide = config_gradient(program(1.0, form), estimator)
        elbo = Estimator_ELBO(2, vectorize_particles=True, analytic_kl=analytic_kl)
        loss = elbo.loss_and_grads(program(0.9, form), guide)
        gradient = pyro.get_param_store()._params[form].grad
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0
