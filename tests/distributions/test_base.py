"""All distributions: shapes, copies, transforms, compilation, Pyro's wrappers."""

from __future__ import annotations

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.laws import DTYPES
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

import pyro_gumbel.distributions as package
from pyro_gumbel.distributions import (
    ExpRelaxedOneHot,
    Gumbel,
    OneHot,
    RelaxedBernoulli,
    RelaxedOneHot,
    TruncatedGumbel,
)

# Each makes a distribution of a parameter of shape (..., 3) and a positive number.
TABLE = {
    "Gumbel": lambda x, t: Gumbel(x, t),
    "TruncatedGumbel": lambda x, t: TruncatedGumbel(x, 0.5, t),
    "OneHot": lambda x, t: OneHot(logits=x),
    "OneHot probs": lambda x, t: OneHot(probs=x.sigmoid()),
    "RelaxedOneHot": lambda x, t: RelaxedOneHot(t, logits=x),
    "RelaxedOneHot hard": lambda x, t: RelaxedOneHot(t, logits=x, straight_through=True),
    "ExpRelaxedOneHot": lambda x, t: ExpRelaxedOneHot(t, logits=x),
    "RelaxedBernoulli": lambda x, t: RelaxedBernoulli(t, logits=x),
    "RelaxedBernoulli hard": lambda x, t: RelaxedBernoulli(t, logits=x, straight_through=True),
}
every = pytest.mark.parametrize("make", TABLE.values(), ids=TABLE)


def parameters(dtype=torch.float32, requires_grad=True):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(4, 3, generator=generator).to(dtype)
    return x.requires_grad_(requires_grad), torch.tensor(0.7, dtype=dtype)


def test_every_class_is_in_the_table():
    classes = {name for name in package.__all__ if isinstance(getattr(package, name), type)}
    assert classes == {name.split()[0] for name in TABLE}


@every
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_and_dtypes(make, dtype):
    x, t = parameters(dtype)
    d = make(x, t)
    assert d.batch_shape + d.event_shape == (4, 3)
    for value in (d.sample((5,)), d((5,)), d.expand((2, *d.batch_shape))()):
        assert value.dtype == dtype
        score = d.log_prob(value)
        assert score.dtype == dtype
        assert score.shape == value.shape[: value.dim() - d.event_dim]
        assert score.isfinite().all()
    assert d.support.check(d.sample((5,))).all()
    assert not d.sample().requires_grad
    assert repr(d).startswith(type(d).__name__)


@every
def test_expand(make):
    d = make(*parameters())
    value = d.sample()
    expanded = d.expand((5, *d.batch_shape))
    assert type(expanded) is type(d)
    assert expanded.batch_shape == (5, *d.batch_shape)
    assert expanded.sample((2,)).shape == (2, 5, 4, 3)
    draws = d.expand((50, *d.batch_shape)).sample()
    assert (draws != draws[0]).any()  # independent draws, not copies
    torch.testing.assert_close(
        expanded.log_prob(value), d.log_prob(value).expand(expanded.batch_shape)
    )
    with pytest.raises(ValueError, match="does not expand to"):
        d.expand((7,))


@every
def test_expand_recomputes_nothing(make):
    d = make(*parameters())
    d.log_prob(d.sample())
    expanded = d.expand((5, *d.batch_shape))
    shared = {name: value for name, value in vars(d).items() if name != "_batch_shape"}
    for name, value in shared.items():
        assert vars(expanded)[name] is value


@every
def test_has_rsample_survives_expansion(make):
    d = make(*parameters())
    pathwise = d.has_rsample
    d.has_rsample_(False)
    expanded = d.expand((5, *d.batch_shape))
    assert not expanded.has_rsample
    assert not expanded().requires_grad
    assert make(*parameters()).has_rsample == pathwise


@every
def test_wrappers(make):
    d = make(*parameters())
    event = d.to_event(1)
    assert event.event_dim == d.event_dim + 1
    value = event.sample((2,))
    torch.testing.assert_close(event.log_prob(value), d.log_prob(value).sum(-1))
    mask = torch.zeros(d.batch_shape, dtype=torch.bool)
    mask[0] = True
    score = d.mask(mask).log_prob(value)
    assert (score[:, 1:] == 0).all()
    torch.testing.assert_close(score[:, 0], d.log_prob(value)[:, 0])
    assert d.mask(False).log_prob(value).sum() == 0
    assert d.mask(mask).to_event(1).expand((6, *event.batch_shape)).sample().shape == (6, 4, 3)


@every
def test_infer_shapes(make):
    d = make(*parameters())
    given = {"loc": (4, 3), "upper": (), "scale": (), "temperature": (), "logits": (4, 3)}
    given = {name: torch.Size(given[name]) for name in d.arg_constraints if name in given}
    assert type(d).infer_shapes(**given) == (d.batch_shape, d.event_shape)


LEAVES = {name: make for name, make in TABLE.items() if name != "OneHot probs"}


@pytest.mark.parametrize("make", LEAVES.values(), ids=LEAVES)
def test_copies(make):
    d = make(*parameters())
    value = d.sample()
    score = d.log_prob(value)
    for twin in (copy.deepcopy(d), pickle.loads(pickle.dumps(d)), copy.copy(d)):
        assert torch.equal(twin.log_prob(value), score)
        assert twin.batch_shape == d.batch_shape
        assert twin.log_prob(value).requires_grad


@every
def test_first_use_without_gradient_costs_none_later(make):
    x, t = parameters()
    d = make(x, t)
    with torch.no_grad():
        value = d.sample()
        d.log_prob(value)
    assert torch.autograd.grad(d.log_prob(value).sum(), x)[0].isfinite().all()
    fresh = make(x, t)
    with torch.inference_mode():
        fresh.log_prob(fresh.sample())
    assert torch.autograd.grad(fresh.log_prob(value).sum(), x)[0].isfinite().all()


@every
@pytest.mark.parametrize("randomness", ["different", "same"])
def test_vmap(make, randomness):
    x, t = parameters(requires_grad=False)

    def draw_and_score(x):
        d = make(x, t)
        value = d()
        return value, d.log_prob(value)

    values, scores = torch.func.vmap(draw_and_score, randomness=randomness)(x)
    assert values.shape == (4, 3)
    torch.testing.assert_close(scores, make(x, t).log_prob(values))


@every
def test_vmap_of_gradients(make):
    x, t = parameters(requires_grad=False)
    value = make(x, t).sample()

    def score(x, value):
        return make(x, t).log_prob(value).sum()

    by_row = torch.func.vmap(torch.func.grad(score))(x, value)
    x = x.requires_grad_()
    expected = torch.autograd.grad(make(x, t).log_prob(value).sum(), x)[0]
    torch.testing.assert_close(by_row, expected)


@every
def test_distribution_made_outside_a_transform(make):
    x, t = parameters()
    d = make(x, t)
    value = d.sample()
    torch.func.grad(lambda v: d.log_prob(v).sum())(value)
    torch.func.vmap(d.log_prob)(value.expand(2, *value.shape))
    assert torch.autograd.grad(d.log_prob(value).sum(), x)[0].isfinite().all()


PATHWISE = {name: make for name, make in TABLE.items() if not name.startswith("OneHot")}


@pytest.mark.parametrize("make", PATHWISE.values(), ids=PATHWISE)
def test_vmap_of_pathwise_gradients(make):
    x, t = parameters(requires_grad=False)

    def draw(x):
        return (make(x, t).rsample() * torch.tensor([1.0, -2.0, 3.0])).sum()

    gradient = torch.func.vmap(torch.func.grad(draw), randomness="different")(x)
    assert gradient.isfinite().all()
    assert (gradient != 0).any()


@every
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(make, backend):
    x, t = parameters()

    def draw_and_score(x, t):
        d = make(x, t)
        value = d()
        return value, d.log_prob(value)

    torch._dynamo.reset()
    values, scores = torch.compile(draw_and_score, backend=backend, fullgraph=True)(x, t)
    torch.testing.assert_close(scores, make(x, t).log_prob(values))
    assert torch.autograd.grad(scores.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("straight_through", [False, True])
def test_score_is_the_same_when_compiled(straight_through):
    d = RelaxedOneHot(0.5, logits=torch.randn(6, 3), straight_through=straight_through)
    value = d.rsample()
    torch._dynamo.reset()
    compiled = torch.compile(lambda v: d.log_prob(v), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(value), d.log_prob(value))


@every
def test_plates(make):
    x, t = parameters()

    def model():
        dim = -2 if make(x, t).event_dim == 0 else -1
        with pyro.plate("rows", 4, dim=dim), poutine.mask(mask=True):
            return pyro.sample("z", make(x, t))

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["z"]
    assert site["value"].shape == (4, 3)
    assert site["log_prob"].shape == site["fn"].batch_shape
    with pyro.plate("particles", 6, dim=-3):
        assert model().shape[0] == 6


def test_straight_through_guide_trains_towards_a_skewed_prior():
    prior = torch.tensor([0.1, 0.2, 0.7])

    def model():
        pyro.sample("z", OneHot(probs=prior))

    def guide():
        logits = pyro.param("logits", torch.zeros(3))
        pyro.sample("z", RelaxedOneHot(1.0, logits=logits, straight_through=True))

    elbo = Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    for _ in range(200):
        svi.step()
    learned = pyro.param("logits").softmax(-1)
    assert (learned * (learned / prior).log()).sum().item() < 0.05
    assert (prior * (prior * 3).log()).sum().item() > 0.2  # where it started


SCALARS = {
    "Gumbel": lambda: Gumbel(0, 1),
    "TruncatedGumbel": lambda: TruncatedGumbel(0, 1, 2),
    "RelaxedBernoulli": lambda: RelaxedBernoulli(0.5, probs=0.25),
    "RelaxedBernoulli int": lambda: RelaxedBernoulli(1, logits=0, straight_through=True),
    "RelaxedOneHot": lambda: RelaxedOneHot(1, logits=[0, 1, 2]),
    "ExpRelaxedOneHot": lambda: ExpRelaxedOneHot(1, probs=[1, 1, 2]),
    "OneHot": lambda: OneHot(probs=[1, 1, 2]),
}


@pytest.mark.parametrize("make", SCALARS.values(), ids=SCALARS)
def test_numbers_are_accepted(make):
    d = make()
    assert d.batch_shape == ()
    assert d.sample().dtype == torch.get_default_dtype()
    assert d.log_prob(d.sample((3,))).shape == (3,)


@every
def test_temperature_may_be_learned(make):
    x, _ = parameters()
    t = torch.tensor(0.7, requires_grad=True)
    d = make(x, t)
    total = d.log_prob(d()).sum()
    (gradient,) = torch.autograd.grad(total, t, allow_unused=True, materialize_grads=True)
    assert gradient.isfinite()


def test_relaxation_in_a_model_of_pyro():
    temperature = torch.tensor(0.5)

    def model():
        with pyro.plate("data", 5):
            z = pyro.sample("z", RelaxedOneHot(temperature, logits=torch.zeros(3)))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=torch.ones(5))

    trace = poutine.trace(model).get_trace()
    assert math.isfinite(trace.log_prob_sum().item())
