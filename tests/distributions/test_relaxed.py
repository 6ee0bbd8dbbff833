"""The Concrete distribution on the simplex and in log space."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from helpers.laws import DTYPES
from torch.distributions import biject_to

from pyro_gumbel.distributions import ExpRelaxedOneHot, RelaxedOneHot, draw_one_hot

FLOAT64 = {"dtype": torch.float64}
LOGITS = {
    "normal": lambda *shape: torch.randn(shape),
    "extreme": lambda *shape: 1e4 * (2 * torch.randint(0, 2, shape) - 1.0),
    "offset": lambda *shape: torch.full(shape, 1e4),
}


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("num_categories", [2, 3])
@pytest.mark.parametrize("cls", [RelaxedOneHot, ExpRelaxedOneHot])
def test_density_integrates_to_one(cls, num_categories, temperature):
    logits = torch.tensor([0.5, -1.0, 0.2], **FLOAT64)[:num_categories]
    d = cls(temperature, logits=logits)
    # Trapezoidal rule in the coordinates u_c - u_C, where the density is smooth with light tails.
    reach, steps = 40 / temperature + 5, 1201
    axis = torch.linspace(-reach, reach, steps, **FLOAT64)
    step = (axis[1] - axis[0]).item()
    grid = torch.cartesian_prod(*[axis] * (num_categories - 1)).view(-1, num_categories - 1)
    u = torch.nn.functional.pad(grid, (0, 1)).log_softmax(-1)
    # On the simplex dy = prod(y) dx.
    log_density = d.log_prob(u.exp()) + u.sum(-1) if cls is RelaxedOneHot else d.log_prob(u)
    total = log_density.exp().sum().item() * step ** (num_categories - 1)
    assert total == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_against_torch(temperature):
    logits = torch.randn(4, 5, **FLOAT64)
    value = torch.randn(4, 5, **FLOAT64).softmax(-1)
    given = torch.tensor(temperature, **FLOAT64)
    torchs = torch.distributions.RelaxedOneHotCategorical(given, logits=logits)
    ours = RelaxedOneHot(temperature, logits=logits)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(ours.log_prob(value), torchs.log_prob(value), **close)
    torchs_exp = torchs.base_dist
    ours_exp = ExpRelaxedOneHot(temperature, logits=logits)
    u = value.log()
    torch.testing.assert_close(ours_exp.log_prob(u), torchs_exp.log_prob(u), **close)


@pytest.mark.parametrize("temperature", [0.05, 0.7, 30.0])
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_law_of_two_categories(temperature, dtype):
    logits = torch.tensor([1.0, -0.5], dtype=dtype)
    u = ExpRelaxedOneHot(temperature, logits=logits).sample((20_000,)).double()
    log_odds = temperature * (u[:, 0] - u[:, 1])
    law = scipy.stats.logistic(loc=1.5)
    keep = log_odds.isfinite()
    assert keep.all()
    # A value near log 1 is rounded most coarsely; jitter of its rounding error breaks the ties.
    spread = temperature * torch.finfo(dtype).eps * u.abs().amax(-1)
    log_odds = log_odds + (torch.rand_like(log_odds) - 0.5) * spread
    assert scipy.stats.kstest(log_odds.numpy(), law.cdf).pvalue > 2e-5


def test_both_spaces_have_one_law():
    logits = torch.randn(3, 4, **FLOAT64)
    torch.manual_seed(1)
    y = RelaxedOneHot(0.4, logits=logits).sample()
    torch.manual_seed(1)
    u = ExpRelaxedOneHot(0.4, logits=logits).sample()
    torch.testing.assert_close(u.exp(), y)
    on_simplex = RelaxedOneHot(0.4, logits=logits).log_prob(y)
    in_logs = ExpRelaxedOneHot(0.4, logits=logits).log_prob(u)
    torch.testing.assert_close(on_simplex + u.sum(-1), in_logs)


@pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS)
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("num_categories", [2, 10, 1000, 50_000])
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("cls", [RelaxedOneHot, ExpRelaxedOneHot])
def test_own_samples_score_finite_with_finite_gradients(
    cls, dtype, num_categories, temperature, logits
):
    logits = logits(2, num_categories).to(dtype).requires_grad_()
    given = torch.tensor(temperature, dtype=dtype, requires_grad=True)
    d = cls(given, logits=logits)
    sample = d.rsample()
    detached = sample.detach().requires_grad_()
    score, at_detached = d.log_prob(sample), d.log_prob(detached)
    assert score.isfinite().all()
    gradients = torch.autograd.grad(score.sum(), (logits, given), retain_graph=True)
    gradients += torch.autograd.grad(at_detached.sum(), (detached, logits, given))
    for gradient in gradients:
        assert gradient.isfinite().all()


@pytest.mark.parametrize("temperature", [0.01, 0.5, 100.0])
@pytest.mark.parametrize("cls", [RelaxedOneHot, ExpRelaxedOneHot])
def test_float16_scores_where_the_score_fits(cls, temperature):
    logits = torch.randn(16, 100).half().requires_grad_()
    given = torch.tensor(temperature).half().requires_grad_()
    d = cls(given, logits=logits)
    sample = d.rsample()
    score = d.log_prob(sample)
    assert score.isfinite().all()
    for gradient in torch.autograd.grad(score.float().sum(), (logits, given)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_coordinates_that_underflow_are_read_as_the_smallest_normal(dtype):
    tiny = torch.finfo(dtype).tiny
    d = RelaxedOneHot(0.1, logits=torch.zeros(3, dtype=dtype))
    at_zero = torch.tensor([1.0, 0.0, 0.0], dtype=dtype, requires_grad=True)
    at_tiny = torch.tensor([1.0, tiny, tiny], dtype=dtype)
    score = d.log_prob(at_zero)
    assert score == d.log_prob(at_tiny)
    gradient = torch.autograd.grad(score, at_zero)[0]
    assert gradient[1] == gradient[2] == 0
    near = torch.tensor([1.0, tiny, 2 * tiny], dtype=dtype, requires_grad=True)
    steep = RelaxedOneHot(100.0, logits=torch.zeros(3, dtype=dtype))
    assert torch.autograd.grad(steep.log_prob(near), near)[0].isfinite().all()


def test_derivatives():
    logits = torch.randn(2, 3, **FLOAT64, requires_grad=True)
    temperature = torch.tensor([0.6, 1.7], **FLOAT64, requires_grad=True)
    u = torch.randn(2, 3, **FLOAT64).log_softmax(-1).requires_grad_()

    def density(cls):
        return lambda v, phi, t: cls(t, logits=phi, validate_args=False).log_prob(v)

    def draw(cls):
        def seeded(phi, t):
            torch.manual_seed(3)
            return cls(t, logits=phi).rsample((2,))

        return seeded

    assert torch.autograd.gradcheck(density(ExpRelaxedOneHot), (u, logits, temperature))
    y = u.exp().detach().requires_grad_()
    assert torch.autograd.gradcheck(density(RelaxedOneHot), (y, logits, temperature))
    assert torch.autograd.gradgradcheck(density(RelaxedOneHot), (y, logits, temperature))
    for cls in (RelaxedOneHot, ExpRelaxedOneHot):
        assert torch.autograd.gradcheck(draw(cls), (logits, temperature))


@pytest.mark.parametrize("given", ["probs", "logits"])
@pytest.mark.parametrize("cls", [RelaxedOneHot, ExpRelaxedOneHot])
def test_impossible_categories_do_not_exist(cls, given):
    probs = torch.tensor([0.3, 0.0, 0.7, 0.0], **FLOAT64)
    parameter = (probs if given == "probs" else probs.log()).requires_grad_()
    d = cls(0.5, **{given: parameter})
    inside = cls(0.5, **{given: parameter[[0, 2]]})
    value = d.rsample((5,))
    absent = 0.0 if cls is RelaxedOneHot else -math.inf
    assert (value[:, [1, 3]] == absent).all()
    score = d.log_prob(value)
    torch.testing.assert_close(score, inside.log_prob(value[:, [0, 2]]))
    gradient = torch.autograd.grad(score.sum() + value[:, 0].sum(), parameter)[0]
    assert gradient.isfinite().all()
    everywhere = torch.full((4,), 0.25, **FLOAT64)
    everywhere = everywhere if cls is RelaxedOneHot else everywhere.log()
    assert d.log_prob(everywhere) == -math.inf


def test_one_possible_category_is_a_constant():
    d = RelaxedOneHot(0.5, probs=torch.tensor([0.0, 1.0]))
    assert d.rsample().tolist() == [0, 1]
    assert d.log_prob(d.rsample()) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_categories", [2, 10, 50_000])
@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("cls", [RelaxedOneHot, ExpRelaxedOneHot])
def test_support_holds_own_samples_and_rejects_others(cls, temperature, num_categories, dtype):
    d = cls(temperature, logits=torch.randn(num_categories).to(dtype))
    value = d.sample((8,))
    assert d.support.check(value).all()
    surplus = {RelaxedOneHot: 0.2 * draw_one_hot(torch.zeros_like(value)), ExpRelaxedOneHot: 0.5}
    wrong = value + surplus[cls]
    assert not d.support.check(wrong).any()
    assert not d.support.check(torch.full_like(value, math.nan)).any()


def test_support_is_the_simplex():
    support = RelaxedOneHot(0.5, logits=torch.zeros(3)).support
    assert support == torch.distributions.constraints.simplex
    assert isinstance(support, type(torch.distributions.constraints.simplex))
    bijection = biject_to(support)
    x = torch.randn(5, 2)
    torch.testing.assert_close(bijection.inv(bijection(x)), x, rtol=1e-3, atol=1e-4)


def test_log_simplex_bijection():
    bijection = biject_to(ExpRelaxedOneHot(0.5, logits=torch.zeros(3)).support)
    x = torch.randn(5, 2, **FLOAT64)
    u = bijection(x)
    assert bijection.codomain.check(u).all()
    assert u.shape == bijection.forward_shape(x.shape)
    assert x.shape == bijection.inverse_shape(u.shape)
    torch.testing.assert_close(bijection.inv(u), x)
    assert (bijection.log_abs_det_jacobian(x, u) == 0).all()


TEMPERATURES = [
    ((), (5, 3), (5,)),
    ((5,), (5, 3), (5,)),
    ((5, 1), (5, 3), (5,)),
    ((3,), (3, 3), (3,)),
    ((1,), (5, 3), (5,)),
    ((4, 1), (4, 5, 3), (4, 5)),
    ((5,), (4, 5, 3), (4, 5)),
    ((4, 5, 1), (4, 5, 3), (4, 5)),
    ((7,), (3,), (7,)),
    ((2, 5, 1), (5, 3), (2, 5)),
]


@pytest.mark.parametrize(("temperature", "logits", "batch"), TEMPERATURES)
@pytest.mark.parametrize("cls", [RelaxedOneHot, ExpRelaxedOneHot])
def test_temperature_is_one_a_row(cls, temperature, logits, batch):
    t, phi = 0.5 + torch.rand(temperature), torch.randn(logits)
    d = cls(t, logits=phi)
    assert d.batch_shape == batch
    value = d.sample((2,))
    assert value.shape == (2, *batch, logits[-1])
    shapes = cls.infer_shapes(temperature=t.shape, logits=phi.shape)
    assert shapes == (d.batch_shape, d.event_shape)
    # Element by element with a scalar temperature.
    rows = (t.squeeze(-1) if t.dim() > len(batch) else t).expand(batch)
    phi = phi.expand(*batch, -1).reshape(-1, logits[-1])
    flat = value.reshape(2, -1, logits[-1])
    one_by_one = [
        cls(rows.reshape(-1)[i].item(), logits=phi[i]).log_prob(flat[:, i])
        for i in range(len(phi))
    ]
    expected = torch.stack(one_by_one, -1).reshape(2, *batch)
    torch.testing.assert_close(d.log_prob(value), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_straight_through_is_hard_ahead_and_soft_back(dtype, temperature):
    logits = torch.randn(3, 4).to(dtype).requires_grad_()
    weight = torch.randn(3, 4).to(dtype)
    torch.manual_seed(5)
    hard = RelaxedOneHot(temperature, logits=logits, straight_through=True).rsample()
    torch.manual_seed(5)
    soft = RelaxedOneHot(temperature, logits=logits).rsample()
    torch.manual_seed(5)
    drawn, relaxed = RelaxedOneHot(temperature, logits=logits).rsample_pair()
    assert ((hard == 0) | (hard == 1)).all()
    assert (hard.sum(-1) == 1).all()
    assert torch.equal(hard, drawn)
    assert torch.equal(soft, relaxed)
    assert not drawn.requires_grad
    by_hard = torch.autograd.grad((hard * weight).sum(), logits)[0]
    by_soft = torch.autograd.grad((soft * weight).sum(), logits)[0]
    assert torch.equal(by_hard, by_soft)


def test_straight_through_scores_the_mass():
    probs = torch.tensor([0.2, 0.3, 0.5])
    d = RelaxedOneHot(0.1, probs=probs, straight_through=True)
    torch.testing.assert_close(d.log_prob(torch.eye(3)).exp(), probs)
    torch.testing.assert_close(d.mean, probs)
    torch.testing.assert_close(d.variance, probs * (1 - probs))
    torch.testing.assert_close(d.entropy(), -(probs * probs.log()).sum())
    assert d.mode.tolist() == [0, 0, 1]
    assert torch.equal(d.enumerate_support(), torch.eye(3))
    assert d.has_enumerate_support
    assert d.support is torch.distributions.constraints.one_hot


@pytest.mark.parametrize("straight_through", [False, True])
def test_sample_and_rsample_agree(straight_through):
    d = RelaxedOneHot(0.5, logits=torch.randn(6, 3), straight_through=straight_through)
    torch.manual_seed(2)
    sample = d.sample()
    torch.manual_seed(2)
    assert torch.equal(sample, d.rsample())
    assert (sample.amax(-1) == 1).all().item() == straight_through


@pytest.mark.parametrize("straight_through", [False, True])
def test_score_survives_clone_detach_index_and_stack(straight_through):
    d = RelaxedOneHot(0.5, logits=torch.randn(6, 3), straight_through=straight_through)
    x = d.rsample()
    score = d.log_prob(x)
    for copy in (x.clone(), x.detach(), x[:], torch.stack([x])[0], x * 1):
        assert torch.equal(d.log_prob(copy), score)


@pytest.mark.parametrize("name", ["mean", "variance", "mode", "entropy", "enumerate_support"])
def test_no_closed_form(name):
    for d in (
        RelaxedOneHot(0.5, logits=torch.zeros(3)),
        ExpRelaxedOneHot(0.5, logits=torch.zeros(3)),
    ):
        with pytest.raises(NotImplementedError):
            _ = getattr(d, name)()
