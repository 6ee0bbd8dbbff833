"""Draws and their gradients under vmap, grad and the compiler."""

from __future__ import annotations

import pytest
import torch
from helpers.formulas import (
    EXACT,
    gapped_jacobian,
    reinmax_jacobian,
    softmax_jacobian,
    straight_through_jacobian,
)

from pyro_gumbel.estimators import (
    GappedStraightThrough,
    GumbelRao,
    GumbelSoftmax,
    GumbelStraightThrough,
    ReinMax,
    ReinMaxRao,
    StraightThrough,
)

KNOWN = {  # what the Jacobian is, given logits and draw
    "straight_through": (
        StraightThrough(1.3),
        lambda phi, d: straight_through_jacobian(phi, d, 1.3),
    ),
    "reinmax": (ReinMax(1.3), lambda phi, d: reinmax_jacobian(phi, d, 1.3)),
    "gapped": (GappedStraightThrough(0.5), lambda phi, d: gapped_jacobian(phi, d, 0.5, 1.0)),
    "gumbel_softmax": (GumbelSoftmax(0.5), lambda phi, soft: softmax_jacobian(soft) / 0.5),
}
NOISY = {
    "gumbel_straight_through": GumbelStraightThrough(0.5),
    "gumbel_rao": GumbelRao(0.5, num_samples=2),
    "gumbel_rao_matrices": GumbelRao(0.5, num_samples=7),
    "reinmax_rao": ReinMaxRao(0.5, num_samples=2),
}
EVERY = {name: estimator for name, (estimator, _) in KNOWN.items()} | NOISY


def gradient_and_draw(estimator, weight):
    def cost(logits):
        value = estimator.draw_one_hot(logits)
        return (value * weight).sum(), value

    return torch.func.grad(cost, has_aux=True)


def example():
    logits = 2 * torch.randn(40, 3, 4, dtype=torch.float64)
    return logits, torch.randn(3, 4, dtype=torch.float64)


@pytest.mark.parametrize("name", KNOWN)
def test_gradients_by_row_follow_the_formula(name):
    estimator, jacobian = KNOWN[name]
    logits, weight = example()
    by_row = torch.func.vmap(gradient_and_draw(estimator, weight), randomness="different")
    gradient, value = by_row(logits)
    expected = (jacobian(logits, value) @ weight.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(gradient, expected, **EXACT)
    assert len(value.reshape(40, -1).unique(dim=0)) > 10


@pytest.mark.parametrize("name", NOISY)
def test_gradients_by_row_are_of_the_rows_own_draws(name):
    """Rows of certain logits have no gradient, for any noise of the other rows."""
    logits, weight = example()
    logits[::2, :, 0] += 200.0
    by_row = torch.func.vmap(gradient_and_draw(NOISY[name], weight), randomness="different")
    gradient, value = by_row(logits)
    assert (value[::2, :, 0] == 1).all()
    assert gradient[::2].abs().max() < 1e-12
    assert (gradient[1::2].abs().sum((-1, -2)) > 0).all()
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(40, 3).double(), **EXACT)


@pytest.mark.parametrize("name", EVERY)
def test_compiled_draws(name):
    logits, weight = example()
    logits.requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(EVERY[name].draw_one_hot, backend="aot_eager", fullgraph=True)
    outcomes = []
    for draw in (compiled, compiled):
        value = draw(logits)
        (gradient,) = torch.autograd.grad((value * weight).sum(), logits)
        outcomes.append((value.detach(), gradient))
        torch.testing.assert_close(value.sum(-1), torch.ones(40, 3).double(), **EXACT)
        torch.testing.assert_close(gradient.sum(-1), torch.zeros(40, 3).double(), **EXACT)
    assert not torch.equal(outcomes[0][0], outcomes[1][0])


@pytest.mark.parametrize("name", KNOWN)
def test_compiled_gradients_follow_the_formula(name):
    estimator, jacobian = KNOWN[name]
    logits, weight = example()
    logits.requires_grad_()
    torch._dynamo.reset()
    value = torch.compile(estimator.draw_one_hot, backend="aot_eager", fullgraph=True)(logits)
    (gradient,) = torch.autograd.grad((value * weight).sum(), logits)
    expected = (jacobian(logits.detach(), value.detach()) @ weight.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(gradient, expected, **EXACT)
