"""Draws, masses and estimators of subclasses of known families."""

from __future__ import annotations

import functools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer import Trace_ELBO
from torch.distributions import constraints, kl_divergence, register_kl

import pyro_gumbel.estimators as E  # noqa: N812
from pyro_gumbel.diagnostics import exact_gradient
from pyro_gumbel.distributions import OneHot, RelaxedBernoulli, RelaxedOneHot
from pyro_gumbel.distributions.families import (
    base_noise,
    is_bit,
    is_categorical,
    is_normal,
    is_one_hot,
    sample_detached,
    unwrap,
)
from pyro_gumbel.guides import AutoDiscrete
from pyro_gumbel.infer import Estimator_ELBO, ImportanceWeighted_ELBO, config_gradient
from pyro_gumbel.infer._costs import _divergence

COPIES = 20_000
DOUBLE = torch.float64
START = torch.tensor([0.3, -0.2, 0.4], dtype=DOUBLE)
PRIOR = torch.tensor([0.2, 0.5, 0.3], dtype=DOUBLE)
LEVELS = torch.tensor([0.3, -0.8, 1.1], dtype=DOUBLE)


class OddCategorical(dist.Categorical):
    """Draws and scores by the squares of its probabilities."""

    def mass(self):
        return (2 * self.logits).log_softmax(-1)

    def sample(self, sample_shape=()):
        return torch.distributions.Categorical(logits=self.mass()).sample(sample_shape)

    def log_prob(self, value):
        law, index = torch.broadcast_tensors(self.mass(), value.long().unsqueeze(-1))
        return law.gather(-1, index[..., :1]).squeeze(-1)


class OddOneHot(dist.OneHotCategorical):
    def mass(self):
        return (2 * self.logits).log_softmax(-1)

    def sample(self, sample_shape=()):
        return torch.distributions.OneHotCategorical(logits=self.mass()).sample(sample_shape)

    def log_prob(self, value):
        return (value * self.mass()).sum(-1)


class OddBit(dist.Bernoulli):
    def mass(self):
        return 2 * self.logits

    def sample(self, sample_shape=()):
        return torch.distributions.Bernoulli(logits=self.mass()).sample(sample_shape)

    def log_prob(self, value):
        return value * self.mass() - torch.nn.functional.softplus(self.mass())


class OddNormal(dist.Normal):
    """A normal distribution folded at its mean."""

    def rsample(self, sample_shape=()):
        noise = torch.randn(self._extended_shape(sample_shape), dtype=self.loc.dtype)
        return self.loc + self.scale * noise.abs()

    sample = torch.no_grad()(rsample)

    def log_prob(self, value):
        return super().log_prob(value) + math.log(2)


PLAIN = {"index": dist.Categorical, "one_hot": dist.OneHotCategorical, "bit": dist.Bernoulli}
ODD = {"index": OddCategorical, "one_hot": OddOneHot, "bit": OddBit}
IS_FAMILY = {
    dist.Categorical: is_categorical,
    dist.OneHotCategorical: is_one_hot,
    dist.Bernoulli: is_bit,
    dist.Normal: is_normal,
    OneHot: is_one_hot,
    RelaxedOneHot: is_one_hot,
    RelaxedBernoulli: is_bit,
}
kinds = pytest.mark.parametrize("kind", PLAIN)
families = pytest.mark.parametrize("family", IS_FAMILY, ids=lambda f: f.__name__)


def build(family, shape=()):
    """An object of a family or of a descendant."""
    numbers = torch.linspace(-1.0, 1.0, 3).expand(*shape, 3)
    if issubclass(family, dist.Normal):
        return family(numbers, 1.0)
    if issubclass(family, (RelaxedOneHot, RelaxedBernoulli)):
        return family(0.5, logits=numbers, straight_through=True)
    return family(logits=numbers)


def override(family, name):
    """A subclass that overrides one method of the distribution by its parent's."""

    class Odd(family):
        pass

    def inherited(self):
        return getattr(super(Odd, self), name)

    is_property = name in ("support", "probs", "logits", "param_shape")
    member = inherited if is_property else lambda self, *args, **kw: inherited(self)(*args, **kw)
    setattr(Odd, name, property(member) if is_property else member)
    return Odd


LAW = ["sample", "rsample", "log_prob", "enumerate_support", "support", "score_parts", "__call__"]


@families
@pytest.mark.parametrize("name", LAW)
def test_a_class_that_overrides_a_method_of_the_distribution_is_not_of_the_family(family, name):
    odd = override(family, name)
    assert IS_FAMILY[family](build(family))
    assert not any(is_family(build(odd)) for is_family in IS_FAMILY.values())
    assert base_noise(build(odd)) is None


@families
@pytest.mark.parametrize("name", ["sample", "rsample", "log_prob"])
def test_an_object_with_a_replaced_method_is_not_of_the_family(family, name):
    fn = build(family)
    setattr(fn, name, getattr(fn, name))
    assert not IS_FAMILY[family](fn)


@pytest.mark.parametrize("name", ["probs", "logits", "param_shape"])
@pytest.mark.parametrize("family", [dist.Categorical, dist.OneHotCategorical, dist.Bernoulli])
def test_a_class_that_overrides_the_parameters_is_not_of_the_family(family, name):
    read = getattr(build(family), name)
    odd = type("Odd", (family,), {name: property(lambda self: read, lambda self, value: None)})
    assert not any(is_family(build(odd)) for is_family in IS_FAMILY.values())


def test_a_class_made_of_another_distribution_is_not_of_the_family():
    class Odd(dist.OneHotCategorical):
        def __init__(self, logits):
            super().__init__(logits=logits)
            self._categorical = OddCategorical(logits=logits)

    assert not is_one_hot(Odd(START))
    assert not is_one_hot(Odd(START).to_event(0))


@families
@pytest.mark.parametrize("name", ["mean", "mode", "entropy", "variance", "__repr__", "note"])
def test_a_class_that_overrides_anything_else_is_of_the_family(family, name):
    own = type("Own", (family,), {name: property(lambda self: 0)})
    assert IS_FAMILY[family](build(own))
    assert base_noise(build(own)) is not None


@families
def test_wrapped_distributions_count_as_bare_ones(family):
    for kind, expected in ((family, True), (override(family, "sample"), False)):
        fn = build(kind, (4,))
        same = fn.expand(fn.batch_shape)
        for wrapped in (fn.to_event(1), fn.mask(True), fn.mask(False).to_event(1), same):
            assert IS_FAMILY[family](unwrap(wrapped)) is expected
        expanded = TorchDistributionMixin.expand(fn, (2, *fn.batch_shape))
        flat = unwrap(expanded)
        assert IS_FAMILY[family](flat) is expected
        assert flat.batch_shape == (2, *fn.batch_shape)
        joined = unwrap(TorchDistributionMixin.expand(fn.to_event(1), (2, *fn.batch_shape[:-1])))
        assert IS_FAMILY[family](joined) is expected


class FromFeatures(dist.OneHotCategorical):
    """The usual subclass: its own constructor, and the ``expand`` that this requires."""

    def __init__(self, features, weight):
        self.features = features
        super().__init__(logits=features @ weight)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(FromFeatures, _instance)
        new.features = self.features
        return super().expand(batch_shape, new)


class TorchExpanded(FromFeatures):
    """Expands by Pyro's ExpandedDistribution, whose batch shape is a plain tuple."""

    def expand(self, batch_shape, _instance=None):
        return TorchDistributionMixin.expand(self, batch_shape)


SERVING_ONE_HOT = [
    E.Score(E.LeaveOneOut()), E.StraightThrough(), E.GumbelSoftmax(), E.GumbelStraightThrough(),
    E.GappedStraightThrough(), E.GumbelRao(), E.ReinMax(), E.ReinMaxRao(), E.DisARMTree(),
    E.DoubleControlVariate(), E.MuProp(), E.Rebar(), E.LocalExpectation(), E.SumAndSample(1),
    E.UnorderedSet(2), E.Enumerate(),
]  # fmt: skip
SERVING_BIT = [
    E.Score(E.LeaveOneOut()), E.StraightThrough(), E.GumbelSoftmax(), E.GumbelStraightThrough(),
    E.GumbelRao(), E.ReinMax(), E.DisARM(), E.ARMS(), E.DoubleControlVariate(), E.Rodeo(),
    E.MuProp(), E.Rebar(), E.LocalExpectation(), E.Enumerate(),
]  # fmt: skip
SERVING_INDEX = [
    E.Score(E.LeaveOneOut()), E.DisARMTree(), E.LocalExpectation(), E.SumAndSample(1),
    E.UnorderedSet(2), E.Enumerate(),
]  # fmt: skip
SERVING = {"one_hot": SERVING_ONE_HOT, "bit": SERVING_BIT, "index": SERVING_INDEX}


def gradient(
    model, guide, estimator, *, vectorize=True, elbo=Estimator_ELBO, particles=2, **options
):
    """Return the loss and the gradient of ``logits``, both per copy."""
    pyro.clear_param_store()
    bound = elbo(particles, vectorize_particles=vectorize, max_plate_nesting=1, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = bound.loss_and_grads(model, config_gradient(guide, estimator))
    return float(loss) / COPIES, pyro.get_param_store()._params["logits"].grad / COPIES


def value_term(kind, value):
    return (
        LEVELS[value.long()]
        if kind == "index"
        else value * LEVELS[1]
        if kind == "bit"
        else (value @ LEVELS)
    )


def programs(kind, q, p):
    """Return programs with a latent in a plate of copies that share the guide's logits."""
    prior = PRIOR[0].logit() if kind == "bit" else PRIOR.log()
    start = START[0] if kind == "bit" else START

    def model():
        with pyro.plate("copies", COPIES):
            z = pyro.sample("z", p(logits=prior))
            pyro.factor("x", value_term(kind, z) ** 2)

    def guide():
        logits = pyro.param("logits", start.clone())
        with pyro.plate("copies", COPIES):
            pyro.sample("z", q(logits=logits))

    return model, guide


def exact(kind, q, p):
    """Return loss, gradient and standard deviation of the loss, for one copy."""
    start = (START[0] if kind == "bit" else START).clone().requires_grad_()
    prior = PRIOR[0].logit() if kind == "bit" else PRIOR.log()
    values = q(logits=start).enumerate_support()
    log_q, log_p = q(logits=start).log_prob(values), p(logits=prior).log_prob(values)
    cost = log_q - log_p - value_term(kind, values) ** 2
    loss = (log_q.exp() * cost).sum()
    deviation = (log_q.exp() * (cost - loss) ** 2).sum().sqrt()
    return loss.item(), torch.autograd.grad(loss, start)[0], deviation.item()


def check(found, expected, *, spread=3.0):
    """Compare means over copies. ``spread`` bounds the standard deviation of a gradient."""
    (loss, grad), (exact_loss, exact_grad, deviation) = found, expected
    assert abs(loss - exact_loss) < 5 * deviation / math.sqrt(COPIES) + 1e-9
    assert (grad - exact_grad).abs().max() < 5 * spread / math.sqrt(COPIES)


@pytest.mark.parametrize("kind", ["index", "one_hot", "bit"])
@pytest.mark.parametrize("side", ["guide", "model", "both"])
@pytest.mark.parametrize("choice", ["auto", "enumerate"])
def test_overriding_classes_are_drawn_and_scored_by_their_own_methods(kind, side, choice):
    q = PLAIN[kind] if side == "model" else ODD[kind]
    p = PLAIN[kind] if side == "guide" else ODD[kind]
    model, guide = programs(kind, q, p)
    found = gradient(model, guide, choice)
    check(found, exact(kind, q, p))
    check(gradient(model, guide, choice, analytic_kl=True), exact(kind, q, p))


@pytest.mark.parametrize("kind", ["one_hot", "bit", "index"])
def test_overriding_classes_are_refused_by_name_with_the_way_to_opt_in(kind):
    model, guide = programs(kind, ODD[kind], PLAIN[kind])
    refused = [e for e in SERVING[kind] if not isinstance(e, (E.Score, E.Enumerate))]
    for estimator in refused:
        with pytest.raises(ValueError, match="'z'.*overrides log_prob, sample.*super") as error:
            gradient(model, guide, estimator)
        assert ODD[kind].__name__ in str(error.value)
        assert "Supported estimators: enumerate, score" in str(error.value)


@pytest.mark.parametrize("estimator", SERVING_ONE_HOT, ids=repr)
@pytest.mark.parametrize("subclass", [FromFeatures, TorchExpanded], ids=lambda c: c.__name__)
def test_an_own_constructor_changes_nothing(estimator, subclass):
    """The same random numbers give the same gradient as the ancestor's."""
    features = torch.tensor([[1.0, 0.5], [-0.3, 0.8]])
    locs = torch.tensor([0.3, -0.8, 1.1])

    def model():
        with pyro.plate("n", 2):
            z = pyro.sample("z", dist.OneHotCategorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(z @ locs, 1.0), obs=torch.tensor([0.2, 0.9]))

    def guide(make):
        weight = pyro.param("weight", torch.tensor([[0.2, 0.1, -0.4], [0.5, -0.3, 0.2]]))
        with pyro.plate("n", 2):
            pyro.sample("z", make(features, weight))

    grads = []
    for make in (subclass, lambda x, w: dist.OneHotCategorical(logits=x @ w)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        elbo = Estimator_ELBO(3, vectorize_particles=True)
        configured = config_gradient(lambda make=make: guide(make), estimator)
        elbo.loss_and_grads(model, configured)
        grads.append(pyro.get_param_store()._params["weight"].grad)
    assert grads[1].abs().sum() > 0
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.slow
@pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorised"])
@pytest.mark.parametrize(
    ("kind", "estimator"),
    [(kind, estimator) for kind, serving in SERVING.items() for estimator in serving],
    ids=str,
)
def test_every_estimator_scores_an_overriding_class_in_the_model(kind, estimator, vectorize):
    model, guide = programs(kind, PLAIN[kind], ODD[kind])
    expected = exact(kind, PLAIN[kind], ODD[kind])
    for options in ({}, {"analytic_kl": True}):
        found = gradient(model, guide, estimator, vectorize=vectorize, **options)
        if estimator.unbiased:
            check(found, expected)
        else:
            check((found[0], expected[1]), expected)


KIND = {
    dist.Categorical: "index",
    dist.OneHotCategorical: "one_hot",
    OneHot: "one_hot",
    RelaxedOneHot: "one_hot",
    dist.Bernoulli: "bit",
    RelaxedBernoulli: "bit",
}


@pytest.mark.slow
@pytest.mark.parametrize("family", KIND, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", LAW)
@pytest.mark.parametrize("side", ["guide", "model", "both"])
@pytest.mark.parametrize("choice", ["score", "enumerate"])
def test_every_override_is_called_and_changes_nothing(family, name, side, choice):
    """Each override calls the parent's method, so the distribution is the same."""
    kind = KIND[family]
    odd = override(family, name)
    if family in (RelaxedOneHot, RelaxedBernoulli):
        odd = functools.partial(odd, 0.5, straight_through=True)
    model, guide = programs(
        kind, PLAIN[kind] if side == "model" else odd, PLAIN[kind] if side == "guide" else odd
    )
    expected = exact(kind, PLAIN[kind], PLAIN[kind])
    for options in ({}, {"analytic_kl": True}, {"vectorize": False}):
        check(gradient(model, guide, choice, **options), expected)


@kinds
@pytest.mark.parametrize("side", ["guide", "model"])
def test_bounds_of_overriding_classes(kind, side):
    """The bound of two importance samples equals the sum over the values of both."""
    q = PLAIN[kind] if side == "model" else ODD[kind]
    p = PLAIN[kind] if side == "guide" else ODD[kind]
    model, guide = programs(kind, q, p)
    loss, _ = gradient(model, guide, "score", elbo=ImportanceWeighted_ELBO)
    start = START[0] if kind == "bit" else START
    prior = PRIOR[0].logit() if kind == "bit" else PRIOR.log()
    values = q(logits=start).enumerate_support()
    log_q, log_p = q(logits=start).log_prob(values), p(logits=prior).log_prob(values)
    log_w = log_p + value_term(kind, values) ** 2 - log_q
    pair = torch.logaddexp(log_w[:, None], log_w) - math.log(2)
    weight = (log_q[:, None] + log_q).exp()
    expected = -(weight * pair).sum()
    deviation = (weight * (pair + expected) ** 2).sum().sqrt()
    assert abs(loss - expected) < 5 * deviation / math.sqrt(COPIES)


@kinds
@pytest.mark.parametrize("choice", ["score", "enumerate"])
def test_overriding_classes_that_cannot_be_expanded(kind, choice):
    """Pyro's ExpandedDistribution repeats their draws. Its batch shape is a plain tuple."""
    members = {"expand": TorchDistributionMixin.expand}
    fixed = type("Fixed", (ODD[kind],), members)
    model, guide = programs(kind, fixed, fixed)
    expected = exact(kind, ODD[kind], ODD[kind])
    for vectorize in (False, True):
        check(gradient(model, guide, choice, vectorize=vectorize), expected)


@kinds
def test_exact_gradient_of_overriding_classes(kind):
    model, guide = programs(kind, ODD[kind], ODD[kind])
    found = exact_gradient(model, guide)["logits"].values / COPIES
    torch.testing.assert_close(torch.as_tensor(found), exact(kind, ODD[kind], ODD[kind])[1])


@kinds
def test_autoguide_of_an_overriding_class_starts_at_the_prior(kind):
    prior = PRIOR[0].logit() if kind == "bit" else PRIOR.log()

    def model():
        with pyro.plate("n", 3):
            pyro.sample("z", ODD[kind](logits=prior))

    for gradient in ("enumerate", "score"):
        pyro.clear_param_store()
        guide = AutoDiscrete(model, gradient=gradient)
        assert Estimator_ELBO(max_plate_nesting=1).loss(model, guide) == pytest.approx(0, abs=1e-6)


class Forbidding(dist.Categorical):
    """Lists the values that it allows, the last first."""

    def enumerate_support(self, expand=True):
        return super().enumerate_support(expand)[[2, 0]]

    def log_prob(self, value):
        allowed = self.logits + torch.tensor([0.0, -math.inf, 0.0], dtype=DOUBLE)
        law, index = torch.broadcast_tensors(allowed.log_softmax(-1), value.unsqueeze(-1))
        return law.gather(-1, index[..., :1]).squeeze(-1)


def test_enumeration_lists_the_values_of_the_class_itself():
    model, guide = programs("index", Forbidding, dist.Categorical)
    loss, grad = gradient(model, guide, "enumerate")
    expected = exact("index", Forbidding, dist.Categorical)
    assert loss == pytest.approx(expected[0], abs=1e-9)
    torch.testing.assert_close(grad, expected[1])


def test_draws_are_those_of_the_class_itself():
    class Last(dist.Categorical):
        def sample(self, sample_shape=()):
            return torch.full(self._extended_shape(sample_shape), 2)

    class Called(dist.OneHotCategorical):
        def __call__(self, sample_shape=()):
            return torch.eye(3)[1].expand(self._extended_shape(sample_shape))

    assert sample_detached(Last(torch.ones(4, 3))).tolist() == [2, 2, 2, 2]
    assert (sample_detached(Called(torch.ones(4, 3))).argmax(-1) == 1).all()
    model, guide = programs("index", Last, dist.Categorical)
    loss, _ = gradient(model, guide, "score")
    expected = START.log_softmax(-1)[2] - PRIOR.log()[2] - LEVELS[2] ** 2
    assert loss == pytest.approx(expected.item(), abs=1e-9)


@pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorised"])
@pytest.mark.parametrize("estimator", [E.DisARM(), E.ARMS(3), E.LocalExpectation()], ids=repr)
def test_an_overriding_pathwise_class_beside_coupled_bits(estimator, vectorize):
    """Both programs have the same folded normal, so it adds zero to the loss."""
    start = START[0].clone().requires_grad_()

    def model():
        with pyro.plate("copies", COPIES):
            z = pyro.sample("z", dist.Bernoulli(PRIOR[0]))
            y = pyro.sample("y", OddNormal(z, 1.0))
            pyro.factor("x", y)

    def guide():
        logits = pyro.param("logits", START[0].clone())
        with pyro.plate("copies", COPIES):
            z = pyro.sample("z", dist.Bernoulli(logits=logits))
            pyro.sample("y", OddNormal(z, 1.0))

    found = gradient(model, guide, {"z": estimator}, vectorize=vectorize)
    q = dist.Bernoulli(logits=start)
    mean = math.sqrt(2 / math.pi)
    loss = kl_divergence(q, dist.Bernoulli(PRIOR[0])) - q.probs - mean
    check(found, (loss.item(), torch.autograd.grad(loss, start)[0], 2.0))


def test_closed_forms_are_not_inherited():
    plain = dist.OneHotCategorical(logits=START)
    for odd in (OddOneHot(logits=START), type("Odd", (OneHot,), {"sample": None})(logits=START)):
        for q, p in ((odd, plain), (plain, odd), (odd, odd)):
            with pytest.raises(NotImplementedError):
                _divergence(q.to_event(0), p)
    for law in (dist.Normal(0.0, 1.0), dist.Gamma(1.0, 1.0), dist.LogNormal(0.0, 1.0)):
        odd = type("Odd", (type(law),), {"log_prob": lambda self, value: value})
        make = odd(1.0, 1.0)
        for q, p in ((make, law), (law, make)):
            for wrap in (lambda fn: fn, lambda fn: fn.expand([2]).to_event(1)):
                with pytest.raises(NotImplementedError):
                    _divergence(wrap(q), wrap(p))
    strange = type("Odd", (OneHot,), {"log_prob": lambda self, value: value.sum(-1)})
    with pytest.raises(
        NotImplementedError, match="Odd overrides the distribution of its parent class"
    ):
        kl_divergence(strange(logits=START), plain)


def test_closed_form_registered_for_the_class_itself_is_used():
    class Own(dist.OneHotCategorical):
        def log_prob(self, value):
            return super().log_prob(value)

    register_kl(Own, Own)(lambda q, p: torch.tensor(3.0))
    assert _divergence(Own(logits=START), Own(logits=START)) == 3.0


class Truncated(dist.Categorical):
    """Has another support than its ancestor."""

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self):
        return constraints.integer_interval(0, 1)

    def sample(self, sample_shape=()):
        return torch.distributions.Categorical(logits=self.logits[..., :2]).sample(sample_shape)

    def log_prob(self, value):
        law = self.logits[..., :2].log_softmax(-1)
        law, index = torch.broadcast_tensors(law, value.unsqueeze(-1))
        return law.gather(-1, index[..., :1]).squeeze(-1)

    def enumerate_support(self, expand=True):
        return super().enumerate_support(expand)[:2]


@pytest.mark.parametrize("choice", ["score", "enumerate"])
def test_another_support(choice):
    model, guide = programs("index", Truncated, dist.Categorical)
    check(gradient(model, guide, choice), exact("index", Truncated, dist.Categorical))


@pytest.mark.parametrize("kind", ["index", "one_hot", "bit"])
def test_loss_is_that_of_pyro(kind):
    model, guide = programs(kind, ODD[kind], ODD[kind])
    ours, _ = gradient(model, guide, "score")
    theirs = Trace_ELBO().loss(model, guide) / COPIES
    deviation = exact(kind, ODD[kind], ODD[kind])[2]
    assert abs(ours - theirs) < 7 * deviation / math.sqrt(COPIES)
