"""The pathwise gradient, draw by draw, to 1e-10."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.formulas import EXACT
from helpers.scored import DOUBLE, SIZE, elbo_of

from pyro_gumbel.estimators import Pathwise
from pyro_gumbel.infer import config_gradient


@pytest.mark.parametrize("landing", [False, True])
def test_pathwise(vectorize, landing):
    """Test log q with and without its score."""
    loc = torch.tensor([0.3, -1.0], dtype=DOUBLE).requires_grad_()
    log_scale = torch.tensor([0.1, -0.5], dtype=DOUBLE).requires_grad_()
    seen = []

    def model():
        with pyro.plate("n", SIZE):
            z = pyro.sample("z", dist.Normal(torch.ones(SIZE, dtype=DOUBLE), 2.0))
            seen.append(z.detach())
            pyro.factor("x", z.sin())

    def guide():
        with pyro.plate("n", SIZE):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    elbo = elbo_of(3, vectorize)
    guide_ = config_gradient(guide, Pathwise(sticking_the_landing=landing))
    elbo.loss_and_grads(model, guide_)
    draws = seen[-1] if vectorize else torch.stack(seen)
    scale = log_scale.detach().exp()
    noise = (draws - loc.detach()) / scale
    # d/dz of log p(x, z); that of -log q is noise / scale, and its score part cancels in part.
    slope = draws.cos() - (draws - 1) / 4
    if landing:
        slope = slope + noise / scale
        expected = {"loc": slope, "log_scale": slope * noise * scale}
    else:
        expected = {"loc": slope, "log_scale": slope * noise * scale + 1}
    torch.testing.assert_close(loc.grad, -expected["loc"].mean(0), **EXACT)
    torch.testing.assert_close(log_scale.grad, -expected["log_scale"].mean(0), **EXACT)
