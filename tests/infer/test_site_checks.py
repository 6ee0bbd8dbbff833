"""Validation: in full once, then at sites, and never less strict there."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyro_gumbel.distributions import OneHot
from pyro_gumbel.distributions._base import LIGHT
from pyro_gumbel.infer import CapturedSVI, Estimator_ELBO
from pyro_gumbel.infer.site_checks import SiteChecks

NAN, INF = float("nan"), float("inf")


def t(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


def observing(make: Callable[[Tensor], Any]) -> Callable[..., None]:
    """A model whose observed site has the argument given, beside a latent one."""

    def model(argument: Tensor, x: Tensor) -> None:
        with pyro.plate("n", 2):
            pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", make(argument), obs=x)

    return model


def guide(*args: Tensor) -> None:
    with pyro.plate("n", 2):
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor([0.1, -0.4]))))


def latent(make: Callable[[Tensor], Any]) -> Callable[..., None]:
    def program(argument: Tensor) -> None:
        pyro.param("l", torch.zeros(2))
        pyro.sample("z", make(argument))

    return program


ARGUMENTS = {  # what is made of the argument, a good one, a bad one, a value, what is said
    "bernoulli_probs": (lambda a: dist.Bernoulli(a), t(0.2, 0.4), t(0.2, 1.4), t(1, 0)),
    "bernoulli_logits": (lambda a: dist.Bernoulli(logits=a), t(0.2, 4.0), t(NAN, 1.4), t(1, 0)),
    "normal_loc": (lambda a: dist.Normal(a, 1.0), t(0.2, 4.0), t(0.2, NAN), t(1, 0)),
    "normal_scale": (lambda a: dist.Normal(0.0, a), t(0.2, 4.0), t(0.2, -1.0), t(1, 0)),
    "gamma": (lambda a: dist.Gamma(a, 1.0), t(0.2, 4.0), t(0.2, -0.5), t(1, 2)),
    "beta": (lambda a: dist.Beta(1.0, a), t(0.2, 4.0), t(0.2, -0.5), t(0.1, 0.2)),
    "poisson": (lambda a: dist.Poisson(a), t(0.2, 4.0), t(0.2, -0.5), t(1, 2)),
    "exponential": (lambda a: dist.Exponential(a), t(0.2, 4.0), t(0.2, -0.5), t(1, 2)),
    "laplace": (lambda a: dist.Laplace(0.0, a), t(0.2, 4.0), t(0.2, -0.5), t(1, 2)),
    "binomial": (lambda a: dist.Binomial(a, t(0.3, 0.4)), t(2, 3), t(2, -3), t(1, 0)),
    "binomial_probs": (lambda a: dist.Binomial(3, a), t(0.3, 0.4), t(0.2, 1.2), t(1, 0)),
    "dirichlet": (
        lambda a: dist.Dirichlet(torch.stack([a, a], -1)),
        t(0.2, 0.5),
        t(0.2, -0.5),
        torch.tensor([[0.3, 0.7], [0.4, 0.6]]),
    ),
    "categorical": (
        lambda a: dist.Categorical(torch.stack([a, 1 + a], -1)),
        t(0.2, 0.5),
        t(0.2, -0.5),
        torch.tensor([0, 1]),
    ),
    "one_hot": (
        lambda a: dist.OneHotCategorical(logits=torch.stack([a, 1 + a], -1)),
        t(0.2, 0.5),
        t(0.2, NAN),
        torch.eye(2),
    ),
    "own_one_hot": (
        lambda a: OneHot(logits=torch.stack([a, 1 + a], -1)),
        t(0.2, 0.5),
        t(0.2, NAN),
        torch.eye(2),
    ),
    "masked": (
        lambda a: dist.Normal(0.0, a).mask(t(1, 0).bool()),
        t(0.2, 4.0),
        t(0.2, -1.0),
        t(1, 0),
    ),
    "bundled": (
        lambda a: dist.Normal(0.0, torch.stack([a, a], -1)).to_event(1),
        t(0.2, 4.0),
        t(0.2, -1.0),
        torch.eye(2),
    ),
    # A family that is not known here keeps torch's own checks.
    "geometric": (lambda a: dist.Geometric(a), t(0.2, 0.3), t(0.2, 0.0), t(1, 2)),
    "log_normal": (lambda a: dist.LogNormal(0.0, a), t(0.2, 0.3), t(0.2, -0.4), t(1, 2)),
    "student": (lambda a: dist.StudentT(a), t(2.0, 3.0), t(2.0, -1.0), t(0.1, 0.2)),
}


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_bad_argument_is_told_at_any_step(name: str, vectorize: bool) -> None:
    make, good, bad, value = ARGUMENTS[name]
    elbo = Estimator_ELBO(2, vectorize_particles=vectorize)
    for _ in range(3):
        assert torch.isfinite(elbo.loss_and_grads(observing(make), guide, good, value))
    model = observing(make)
    for _ in range(3):
        elbo.loss_and_grads(model, guide, good, value)
    with pytest.raises(
        ValueError, match=r"Expected parameter|Expected value argument|must be numbers"
    ):
        elbo.loss_and_grads(model, guide, bad, value)
    with pyro.validation_enabled(False):
        elbo.loss_and_grads(model, guide, bad, value)


VALUES = {  # what is made of the argument, the argument, a good value, a bad one
    "bernoulli": (lambda a: dist.Bernoulli(a), t(0.2, 0.4), t(1, 0), t(0.5, 0)),
    "bernoulli_beyond": (lambda a: dist.Bernoulli(a), t(0.2, 0.4), t(1, 0), t(2, 0)),
    "bernoulli_infinite": (lambda a: dist.Bernoulli(a), t(0.2, 0.4), t(1, 0), t(INF, 0)),
    "bernoulli_nan": (lambda a: dist.Bernoulli(a), t(0.2, 0.4), t(1, 0), t(NAN, 0)),
    "normal": (lambda a: dist.Normal(a, 1.0), t(0.2, 0.4), t(1, INF), t(1, NAN)),
    "poisson": (lambda a: dist.Poisson(a), t(0.2, 0.4), t(1, 0), t(0.5, 1)),
    "exponential": (lambda a: dist.Exponential(a), t(0.2, 0.4), t(1, 2), t(-1, 1)),
    "binomial": (lambda a: dist.Binomial(3, a), t(0.2, 0.4), t(1, 2), t(4, 1)),
    "categorical": (
        lambda a: dist.Categorical(torch.stack([a, 1 + a], -1)),
        t(0.2, 0.5),
        torch.tensor([0, 1]),
        torch.tensor([0, 2]),
    ),
    "one_hot": (
        lambda a: dist.OneHotCategorical(torch.stack([a, 1 + a], -1)),
        t(0.2, 0.5),
        torch.eye(2),
        torch.ones(2, 2),
    ),
    "own_one_hot": (
        lambda a: OneHot(torch.stack([a, 1 + a], -1)),
        t(0.2, 0.5),
        torch.eye(2),
        torch.ones(2, 2),
    ),
    "shape": (lambda a: dist.Normal(a, 1.0), t(0.2, 0.4), t(1, 2), t(1, 2, 3)),
    "broadcast": (lambda a: dist.Poisson(a), t(0.2, 0.4), t(3), t(-3)),
    "uniform": (lambda a: dist.Uniform(0.0, a), t(0.2, 0.4), t(0.1, 0.2), t(0.3, 0.2)),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_bad_value_is_told_at_any_step(name: str) -> None:
    make, argument, good, bad = VALUES[name]
    elbo, model = Estimator_ELBO(), observing(make)
    for _ in range(3):
        elbo.loss_and_grads(model, guide, argument, good)
    with pytest.raises(ValueError, match="'x'"):
        elbo.loss_and_grads(model, guide, argument, bad)
    elbo.loss_and_grads(model, guide, argument, good)


def test_errors_lead_to_the_line() -> None:
    make, good, bad, value = ARGUMENTS["normal_scale"]
    elbo, model = Estimator_ELBO(), observing(make)
    elbo.loss_and_grads(model, guide, good, value)
    with pytest.raises(ValueError, match="Expected parameter scale") as caught:
        elbo.loss_and_grads(model, guide, bad, value)
    assert any("dist.Normal(0.0, a)" in str(entry.statement) for entry in caught.traceback)


def test_latent_arguments_and_values() -> None:
    """A guide's bad argument, before it is drawn from, and a draw that the model cannot have."""
    elbo = Estimator_ELBO()
    model, normal = latent(lambda a: dist.Exponential(1.0)), latent(lambda a: dist.Normal(a, 0.1))
    for _ in range(3):
        elbo.loss_and_grads(model, normal, t(3.0).squeeze())
    with pytest.raises(ValueError, match=r"Scoring site 'z' \(Exponential;.*GreaterThanEq"):
        elbo.loss_and_grads(model, normal, t(-3.0).squeeze())
    model, bits = latent(lambda a: dist.Bernoulli(0.3)), latent(lambda a: dist.Bernoulli(a))
    for _ in range(3):
        elbo.loss_and_grads(model, bits, t(0.5).squeeze())
    with pytest.raises(ValueError, match="Expected parameter probs"):
        elbo.loss_and_grads(model, bits, t(1.5).squeeze())


def test_who_wants_no_checks_gets_none() -> None:
    make, good, bad, value = ARGUMENTS["gamma"]
    elbo, model = Estimator_ELBO(), observing(lambda a: dist.Gamma(a, 1.0, validate_args=False))
    for argument in (good, good, bad):
        elbo.loss_and_grads(model, guide, argument, value)


def test_a_distribution_made_beforehand_keeps_its_checks() -> None:
    prior = dist.Poisson(t(0.2, 0.4), validate_args=True)
    elbo, model = Estimator_ELBO(), observing(lambda _: prior)
    for _ in range(3):
        elbo.loss_and_grads(model, guide, None, t(1, 2))
    with pytest.raises(ValueError, match="'x'"):
        elbo.loss_and_grads(model, guide, None, t(-1, 2))


def test_logits_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on no softmax is taken to look at logits."""
    checked: list[int] = []
    check = type(constraints.simplex).check

    def counting(self: Any, value: Tensor) -> Tensor:
        checked.append(1)
        return check(self, value)

    monkeypatch.setattr(type(constraints.simplex), "check", counting)

    def one_hot() -> None:
        logits = pyro.param("logits", torch.tensor([0.3, 0.1, -0.2]))
        pyro.sample("z", dist.OneHotCategorical(logits=logits))

    elbo, counts = Estimator_ELBO(), []
    for _ in range(3):
        elbo.loss_and_grads(one_hot, one_hot)
        counts.append(len(checked))
    assert counts[0] > 0
    assert counts[1] == counts[2] == counts[0]


def hidden(x: Tensor) -> None:
    pyro.sample("z", dist.Bernoulli(0.3))
    pyro.factor("f", dist.Normal(0.0, x).log_prob(torch.tensor(1.0)))


def well_hidden(x: Tensor) -> None:
    pyro.sample("z", dist.Bernoulli(0.3))
    factor = dist.Unit(dist.Normal(0.0, x).log_prob(torch.tensor(1.0)), validate_args=False)
    pyro.sample("f", factor, obs=torch.empty(0))


def bit(x: Tensor) -> None:
    pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.2))))


@pytest.mark.parametrize("model", [hidden, well_hidden])
def test_a_bound_of_nan_calls_torch(model: Callable[..., None]) -> None:
    """Distributions that are no sites are looked at again, before any gradient is taken."""
    elbo = Estimator_ELBO()
    for _ in range(3):
        elbo.loss_and_grads(model, bit, torch.tensor(1.0))
    pyro.param("l").unconstrained().grad = None
    with pytest.raises(ValueError, match="Expected parameter scale"):
        elbo.loss_and_grads(model, bit, torch.tensor(-1.0))
    assert pyro.param("l").unconstrained().grad is None
    with pytest.raises(ValueError, match="Expected parameter scale"):
        elbo.loss(model, bit, torch.tensor(-1.0))


def test_nan_that_no_check_explains_is_warned_of() -> None:
    def model(x: Tensor) -> None:
        pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("f", dist.Unit(x, validate_args=False), obs=torch.empty(0))

    elbo = Estimator_ELBO()
    for _ in range(2):
        elbo.loss_and_grads(model, bit, torch.tensor(1.0))
    state = torch.get_rng_state()
    expected = torch.rand(3)
    torch.set_rng_state(state)
    with pytest.warns(UserWarning, match="NaN"):
        elbo.loss(model, bit, torch.tensor(NAN))
    # What was run to find the cause has drawn nothing: one bit is what the loss takes.
    torch.set_rng_state(state)
    torch.rand(())
    assert torch.equal(torch.rand(2), expected[1:])


def test_the_switch_is_as_it_was() -> None:
    elbo = Estimator_ELBO()

    def failing(x: Tensor) -> None:
        pyro.sample("z", dist.Bernoulli(0.3))
        if x < 0:
            raise KeyError("stop")

    for x in (1.0, 1.0, -1.0):
        try:
            elbo.loss_and_grads(failing, bit, torch.tensor(x))
        except KeyError:
            assert x < 0
        assert Distribution._validate_args is True
    with pyro.validation_enabled(False):
        elbo.loss_and_grads(failing, bit, torch.tensor(1.0))
        assert Distribution._validate_args is False


def test_the_mark_of_light_checks_survives_copies() -> None:
    assert not LIGHT
    assert copy.deepcopy(LIGHT) is LIGHT
    assert pickle.loads(pickle.dumps(LIGHT)) is LIGHT


def test_a_family_met_now_and_then_has_torch_checks() -> None:
    def model(x: Tensor) -> None:
        pyro.sample("z", dist.Bernoulli(0.3))
        if x.dim():
            pyro.sample("x", dist.InverseGamma(x, 1.0), obs=torch.tensor([1.0]))

    elbo = Estimator_ELBO()
    for _ in range(2):
        for _ in range(2):
            elbo.loss_and_grads(model, bit, torch.tensor(1.0))
        with pytest.raises(ValueError, match="Expected parameter"):
            elbo.loss_and_grads(model, bit, t(-0.5))


def test_other_programs_are_checked_in_full() -> None:
    elbo = Estimator_ELBO()
    for _ in range(2):
        elbo.loss_and_grads(bit, bit, None)
    with pytest.raises(ValueError, match="Expected parameter scale"):
        elbo.loss_and_grads(hidden, bit, torch.tensor(-1.0))


def test_a_captured_step_of_nan_leaves_parameters_alone() -> None:
    make, good, bad, value = ARGUMENTS["normal_scale"]
    svi = CapturedSVI(observing(make), guide, pyro.optim.Adam({}), Estimator_ELBO())
    for _ in range(4):
        svi.step(good, value)
    kept = pyro.param("l").detach().clone()
    with pytest.raises(ValueError, match="Expected parameter scale"):
        svi.step(bad, value)
    assert torch.equal(pyro.param("l"), kept)


def steps(elbo: Estimator_ELBO, model: Any, guide: Any, *arguments: Any) -> list[float]:
    return [float(elbo.loss_and_grads(model, guide, argument)) for argument in arguments]


class Counted:
    """An ELBO's light runs so far."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number = 0
        light_run = SiteChecks.light_run

        def counting(checks: SiteChecks) -> Any:
            self.number += 1
            return light_run(checks)

        monkeypatch.setattr(SiteChecks, "light_run", counting)


@pytest.mark.parametrize("vectorize", [False, True])
def test_light_runs_are_what_most_runs_are(
    monkeypatch: pytest.MonkeyPatch, vectorize: bool
) -> None:
    """Data that broadcast over particles, masks and bundles included."""
    count = Counted(monkeypatch)

    def model() -> None:
        with pyro.plate("n", 2), pyro.poutine.mask(mask=t(1, 0).bool()):
            z = pyro.sample("z", dist.OneHotCategorical(t(0.2, 0.8)))
            mean = z.unsqueeze(-1).expand(*z.shape, 3)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(2), obs=torch.ones(2, 2, 3))
            pyro.sample("y", dist.Bernoulli(z[..., 0].detach() * 0.5), obs=t(1, 0))
        pyro.factor("f", mean.sum((-1, -2)).sum(-1, keepdim=vectorize))

    def one_hots() -> None:
        with pyro.plate("n", 2):
            pyro.sample("z", dist.OneHotCategorical(logits=pyro.param("l", torch.zeros(2, 2))))

    elbo = Estimator_ELBO(3, vectorize_particles=vectorize)
    for _ in range(250):
        elbo.loss_and_grads(model, one_hots)
    assert count.number == 250 - 3  # the first, and one after each 99


def test_masked_out_placeholders_pass() -> None:
    def model(x: Tensor) -> None:
        pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(0.0, 1.0).mask(False), obs=x)

    losses = steps(Estimator_ELBO(), model, bit, *[torch.tensor(NAN)] * 3)
    assert all(torch.isfinite(torch.tensor(losses)))


def test_what_torch_derives_is_not_held_against_it() -> None:
    """In half precision a softmax's sum is often further from one than a simplex may be."""
    logits = 3 * torch.randn(1000, 10, generator=torch.Generator().manual_seed(0)).half()
    assert not constraints.simplex.check(dist.Categorical(logits=logits).probs).all()

    def model() -> None:
        pyro.sample("z", dist.Bernoulli(0.3))
        made = dist.Categorical(logits=logits)
        assert made.probs.shape == logits.shape
        pyro.sample("k", made.to_event(1), obs=torch.zeros(1000))

    elbo = Estimator_ELBO()
    for _ in range(3):
        elbo.loss_and_grads(model, bit_without)


def bit_without() -> None:
    pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.2))))


def test_programs_that_catch_errors_or_set_the_switch() -> None:
    def catching(x: Tensor) -> None:
        pyro.sample("z", dist.Bernoulli(0.3))
        try:
            fn = dist.Normal(0.0, x)
        except ValueError:
            fn = dist.Normal(0.0, 1e-3)
        pyro.sample("x", fn, obs=torch.tensor(0.0))

    def switching(x: Tensor) -> None:
        before = Distribution._validate_args
        Distribution.set_default_validate_args(False)
        fn = dist.Normal(0.0, x)
        Distribution.set_default_validate_args(before)
        pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", fn, obs=torch.tensor(0.0))

    numbers = [torch.tensor(1.0), torch.tensor(1.0), torch.tensor(-1.0)]
    assert steps(Estimator_ELBO(), catching, bit, *numbers)[-1] < -3
    steps(Estimator_ELBO(), switching, bit, *numbers[:2], *numbers[:2])
    assert Distribution._validate_args is True


def test_the_model_differentiates_in_the_run_that_torch_checks() -> None:
    def model(a: Tensor) -> None:
        x = torch.tensor(2.0, requires_grad=True)
        (slope,) = torch.autograd.grad(x**2, x)
        pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("f", dist.Unit(a * slope, validate_args=False), obs=torch.empty(0))

    with pytest.warns(UserWarning, match="NaN"):
        steps(
            Estimator_ELBO(), model, bit, torch.tensor(1.0), torch.tensor(1.0), torch.tensor(NAN)
        )


def test_latent_indices_are_in_the_support_of_the_model() -> None:
    def guide(p: Tensor) -> None:
        pyro.param("l", torch.tensor(0.0))
        pyro.sample("k", dist.Categorical(p))

    def model(p: Tensor) -> None:
        pyro.sample("k", dist.Categorical(torch.ones(3)))

    good, bad = t(0.3, 0.3, 0.4, 0.0), t(0.0, 0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="Scoring site 'k'.*within the support"):
        steps(Estimator_ELBO(), model, guide, good, good, bad)


def test_runs_without_validation_do_not_count() -> None:
    def model(x: Tensor) -> None:
        pyro.sample("z", dist.Bernoulli(0.3))
        pyro.factor("f", dist.Poisson(3.0).log_prob(x))

    elbo = Estimator_ELBO()
    with pyro.validation_enabled(False):
        elbo.loss(model, bit, torch.tensor(1.0))
    with pytest.raises(ValueError, match="within the support"):
        elbo.loss(model, bit, torch.tensor(0.5))


def test_what_is_at_no_site_is_looked_at_now_and_then() -> None:
    def model(x: Tensor) -> None:
        pyro.sample("z", dist.Bernoulli(0.3))
        pyro.factor("f", dist.Poisson(3.0).log_prob(x))

    elbo = Estimator_ELBO()
    steps(elbo, model, bit, torch.tensor(1.0))
    with pytest.raises(ValueError, match="within the support"):
        steps(elbo, model, bit, *[torch.tensor(0.5)] * 100)


def test_an_elbo_within_a_program_has_checks_of_its_own() -> None:
    inner = Estimator_ELBO()

    def model(x: Tensor) -> None:
        pyro.sample("z", dist.Bernoulli(0.3))
        with pyro.poutine.block():
            inner.loss(hidden, bit, x)

    good, bad = torch.tensor(1.0), torch.tensor(-1.0)
    elbo = Estimator_ELBO()
    steps(elbo, model, bit, good, good)
    inner = Estimator_ELBO()
    with pytest.raises(ValueError, match="Expected parameter scale"):
        steps(elbo, model, bit, bad)
    assert Distribution._validate_args is True


@pytest.mark.parametrize("at_site", [False, True])
def test_doubtful_draws_are_the_ones_that_torch_looks_at(at_site: bool) -> None:
    """As many errors, at the same steps, as where torch checks every run."""

    def guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("mu", torch.tensor(1.2)), 1.0))

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if at_site:
            pyro.sample("x", dist.Normal(0.0, z), obs=torch.tensor(1.0))
        else:
            score = dist.Normal(0.0, z).log_prob(torch.tensor(1.0))
            pyro.sample("f", dist.Unit(score, validate_args=False), obs=torch.empty(0))

    def refused(elbo: Estimator_ELBO | None) -> list[bool]:
        pyro.set_rng_seed(3)
        outcomes = []
        for _ in range(60):
            try:
                (elbo or Estimator_ELBO()).loss(model, guide)
                outcomes.append(False)
            except ValueError:
                outcomes.append(True)
        return outcomes

    expected = refused(None)
    assert 2 < sum(expected) < 58
    assert refused(Estimator_ELBO()) == expected


def test_a_distribution_that_the_program_keeps_is_checked_elsewhere() -> None:
    kept = {}

    def model(x: Tensor) -> None:
        pyro.sample("z", dist.Bernoulli(0.3))
        if len(x) not in kept:
            kept[len(x)] = dist.Poisson(torch.tensor(3.0)).expand([len(x)]).to_event(1)
        pyro.sample("x", kept[len(x)], obs=x)

    steps(Estimator_ELBO(), model, bit, torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="within the support"):
        kept[3].log_prob(torch.ones(3) * 0.5)


def test_a_switch_that_the_program_turned_stays() -> None:
    def model(x: Tensor) -> None:
        pyro.sample("z", dist.Bernoulli(0.3))
        if x < 0:
            pyro.enable_validation(False)

    with pyro.validation_enabled(True):
        steps(Estimator_ELBO(), model, bit, torch.tensor(1.0), torch.tensor(-1.0))
        assert Distribution._validate_args is False
    assert Distribution._validate_args is True


def test_a_subsample_is_the_same_in_the_run_that_torch_checks() -> None:
    drawn: list[Tensor] = []

    def model(x: Tensor) -> None:
        pyro.sample("z", dist.Bernoulli(0.3))
        with pyro.plate("n", 1000, subsample_size=2) as indices:
            drawn.append(indices)
            pyro.sample("x", dist.Normal(0.0, 1.0).mask(False), obs=x.expand(2))

    steps(Estimator_ELBO(), model, bit, torch.tensor(0.0))
    elbo = Estimator_ELBO()
    steps(elbo, model, bit, torch.tensor(0.0))
    drawn.clear()
    steps(elbo, model, bit, torch.tensor(NAN))
    assert len(drawn) == 2
    assert torch.equal(*drawn)


def test_a_captured_step_of_nan_is_told_by_its_own_draw() -> None:
    def guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("mu", torch.tensor(2.0)), 1.0))

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, z), obs=torch.tensor(1.0))

    pyro.set_rng_seed(0)
    svi = CapturedSVI(model, guide, pyro.optim.Adam({"lr": 1e-4}), Estimator_ELBO())
    outcomes, said = [], []
    for _ in range(300):
        try:
            outcomes.append(svi.step())
        except ValueError as error:
            outcomes.append(None)
            said.append(str(error))
    assert all("Expected parameter scale" in message for message in said)
    assert 1 <= outcomes.count(None) < 100
    assert all(loss is None or loss == loss for loss in outcomes)
