"""The score function without a baseline, draw by draw, to 1e-10."""

from __future__ import annotations

import pytest
import torch
from helpers.formulas import EXACT
from helpers.scored import CATEGORIES, SIZE, Program, elbo_of

from pyro_gumbel.estimators import Score


@pytest.mark.parametrize("num_particles", [1, 3])
def test_no_baseline(vectorize, num_particles):
    program = Program()
    draws = program.step(elbo_of(num_particles, vectorize), Score())
    assert draws.numel() == num_particles * SIZE * CATEGORIES
    draws = draws.reshape(num_particles, SIZE, CATEGORIES)
    torch.testing.assert_close(program.phi.grad, program.expect(draws, 0.0), **EXACT)
    # The model's parameter gets the plain mean.
    model_grad = -(draws * program.table).sum((-1, -2)).mean()
    torch.testing.assert_close(program.weight.grad, model_grad, **EXACT)
