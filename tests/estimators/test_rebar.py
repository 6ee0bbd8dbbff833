"""REBAR and RELAX: the published formula at the values drawn, and their distributions."""

from __future__ import annotations

import pytest
import torch
from helpers.coupled_draws import BitSite, OneHotSite, step
from helpers.coupled_laws import categories, dtypes
from scipy import stats
from torch import nn

from pyro_gumbel.estimators import (
    Rebar,
    Relax,
)

DOUBLE = torch.float64
both_sites = pytest.mark.parametrize("site_type", [BitSite, OneHotSite])


def relaxation_jacobians(program, values, temperature):
    """Derivatives of both relaxed values in free logits, ``(..., event, logits)``.

    The noise is eliminated: the free value is a softmax of the perturbed logits; in the
    conditional one the drawn coordinate stands still and another, ``-log(E / p + E_i)``, moves
    by ``1 - exp(score - top)`` with its log-probability.
    """
    hard, free, given = values
    if isinstance(program, BitSite) and not isinstance(program, OneHotSite):
        v = 1 - (torch.minimum(given, 1 - given) / torch.maximum(given, 1 - given)) ** temperature
        theta = program.phi.detach().sigmoid()
        # In the two scores: d log theta = 1 - theta, d log (1 - theta) = -theta.
        move = torch.where(hard > 0, theta * v, (1 - theta) * v)
        return (
            torch.diag_embed(free * (1 - free) / temperature),
            torch.diag_embed(given * (1 - given) / temperature * move),
        )
    pi = program.phi.detach().softmax(-1)
    top = (given * hard).sum(-1, keepdim=True)
    v = 1 - (given / top) ** temperature
    eye = torch.eye(4, dtype=DOUBLE)
    normalise = eye - pi.unsqueeze(-2)  # d log p_j / d phi_k

    def softmax_jacobian(y):
        return (torch.diag_embed(y) - y.unsqueeze(-1) * y.unsqueeze(-2)) / temperature

    return softmax_jacobian(free) @ normalise, softmax_jacobian(given) @ (
        v.unsqueeze(-1) * normalise
    )


def rebar(program, values, scale, temperature, critic=None):
    """``(f(b) - c(z~)) score + grad c(z) - grad c(z~)``."""

    def control(y):
        total = scale * program.cost(y)
        return total if critic is None else total + critic(y).squeeze(-1)

    def slope(y):
        y = y.clone().requires_grad_()
        return torch.autograd.grad(control(y).sum(), y)[0]

    hard, free, given = values
    through_free, through_given = (
        (slope(y).unsqueeze(-2) @ jacobian).squeeze(-2)
        for y, jacobian in zip(
            (free, given), relaxation_jacobians(program, values, temperature), strict=True
        )
    )
    advantage = (program.cost(hard) - control(given)).unsqueeze(-1)
    return (advantage * program.score(hard) + through_free - through_given).detach()


@both_sites
@pytest.mark.parametrize("learn", [False, True])
def test_rebar(site_type, learn, vectorize):
    estimator = Rebar(0.8, learn=learn).double()
    with torch.no_grad():
        estimator.scale.fill_(0.6)
    gradient, program, values = step(site_type, estimator, vectorize)
    temperature = estimator.log_temperature.detach().exp()
    expected = rebar(program, values, 0.6, temperature)
    torch.testing.assert_close(gradient, expected.mean(0), rtol=1e-8, atol=1e-8)


@both_sites
def test_relax(site_type, vectorize):
    torch.manual_seed(0)
    width = 3 if site_type is BitSite else 4
    critic = nn.Sequential(nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    estimator = Relax(critic, temperature=1.3, learn=False).double()
    gradient, program, values = step(site_type, estimator, vectorize)
    temperature = estimator.log_temperature.detach().exp()
    expected = rebar(program, values, 1.0, temperature, critic)
    torch.testing.assert_close(gradient, expected.mean(0), rtol=1e-8, atol=1e-8)


@dtypes
def test_relaxed_pair_of_rebar_has_one_law(dtype):
    """The conditional relaxation has the marginal distribution of the unconditional one."""
    _, free, given = categories(Rebar(0.7), dtype)
    for category in range(4):
        test = stats.ks_2samp(free[:, category].numpy(), given[:, category].numpy())
        assert test.pvalue > 2e-5


@dtypes
def test_conditional_relaxation_agrees_with_its_category(dtype):
    hard, free, given = categories(Rebar(0.7), dtype)
    assert (free.argmax(-1) == hard.argmax(-1)).all()
    assert (given.argmax(-1) == hard.argmax(-1)).all()
    mixed = (free - given).abs().amax(-1) > 1e-3
    assert mixed.float().mean() > 0.9
