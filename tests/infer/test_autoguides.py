"""Pyro's autoguides under ``config_gradient``, by their own losses and gradients."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.problems import worst_z
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiscreteParallel,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
)

from pyro_gumbel.estimators import (
    Enumerate,
    LeaveOneOut,
    MovingAverage,
    Pathwise,
    Score,
)
from pyro_gumbel.infer import Estimator_ELBO, config_gradient


def mixture():
    """A continuous and a positive site."""
    loc = pyro.sample("loc", dist.Normal(0.5, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.3, 0.5))
    with pyro.plate("n", 4):
        pyro.sample("x", dist.Normal(loc, scale), obs=torch.tensor([0.3, 1.0, -0.5, 2.0]))


@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal, AutoDelta])
@pytest.mark.parametrize("analytic_kl", [False, True])
def test_autoguide_losses_are_pyros(make, analytic_kl):
    """40 losses of 1,000 particles each way; a Jacobian forgotten would show."""
    guide = make(mixture)
    guide()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.7)
    options = {"num_particles": 1000, "vectorize_particles": True, "max_plate_nesting": 1}
    theirs = Trace_ELBO(**options)
    ours = Estimator_ELBO(analytic_kl=analytic_kl, **options)
    configured = config_gradient(guide, "auto")
    losses = torch.tensor(
        [[theirs.loss(mixture, guide), ours.loss(mixture, configured)] for _ in range(40)],
        dtype=torch.float64,
    )
    assert worst_z((losses[:, 0] - losses[:, 1])[:, None], torch.zeros(1)) < 5
    assert losses.std(0).max() < 0.2


@pytest.mark.parametrize("landing", [False, True])
def test_autoguide_gradients_with_sticking_the_landing(landing):
    """100 gradients of 1,000 particles against Pyro's; the Delta's Jacobian keeps its gradient."""
    guide = AutoNormal(mixture)
    guide()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3)

    def draw(elbo, guide_):
        found = []
        for _ in range(100):
            elbo.loss_and_grads(mixture, guide_)
            found.append(torch.cat([p.grad.flatten() for p in guide.parameters()]).double())
            guide.zero_grad()
        return torch.stack(found)

    options = {"num_particles": 1000, "vectorize_particles": True, "max_plate_nesting": 1}
    theirs = draw(Trace_ELBO(**options), guide)
    configured = config_gradient(guide, Pathwise(sticking_the_landing=landing))
    ours = draw(Estimator_ELBO(**options), configured)
    error = ((theirs.var(0) + ours.var(0)) / 100).sqrt()
    assert ((theirs.mean(0) - ours.mean(0)).abs() / error).max() < 5
    assert error.norm() < 0.02 * theirs.mean(0).norm()


def test_sticking_the_landing_is_noiseless_at_the_posterior():
    """Every draw's gradient is zero there; without it the scale's is not."""
    options = {"dtype": torch.float64}
    params = [torch.tensor(0.5, **options), torch.tensor(0.2, **options)]

    def program(loc, log_scale):
        pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    noise = {}
    for landing in (False, True):
        leaves = [value.clone().requires_grad_() for value in params]
        estimator = Pathwise(sticking_the_landing=landing)
        elbo = Estimator_ELBO(default=estimator)
        elbo.loss_and_grads(lambda: program(*params), lambda leaves=leaves: program(*leaves))
        noise[landing] = max(leaf.grad.abs().item() for leaf in leaves)
    assert noise[True] < 1e-12
    assert noise[False] > 1e-3


def test_autoguide_for_discrete_sites():
    """Pyro marks its sites for enumeration; a configured estimator overrules the mark."""

    def discrete():
        z = pyro.sample(
            "z", dist.Categorical(torch.tensor([0.2, 0.8])), infer={"enumerate": "parallel"}
        )
        pyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=torch.tensor(0.7))

    for estimator in (Enumerate(), Score(MovingAverage())):
        pyro.clear_param_store()
        guide = AutoDiscreteParallel(discrete)
        configured = config_gradient(guide, estimator)
        svi = SVI(discrete, configured, pyro.optim.Adam({"lr": 0.1}), Estimator_ELBO(1))
        for _ in range(200):
            svi.step()
        log_x = dist.Normal(torch.tensor([0.0, 2.0]), 1.0).log_prob(torch.tensor(0.7))
        posterior = (log_x + torch.tensor([0.2, 0.8]).log()).softmax(-1)
        found = next(iter(guide.parameters())).detach().softmax(-1)
        assert (found - posterior).abs().max() < 0.05


def test_autoguide_list_beside_a_discrete_site():
    def both():
        z = pyro.sample("z", dist.Bernoulli(0.3))
        y = pyro.sample("y", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(y + z, 1.0), obs=torch.tensor(0.7))

    guide = AutoGuideList(both)
    guide.append(AutoNormal(pyro.poutine.block(both, hide=["z"])))
    guide.append(lambda: {"z": pyro.sample("z", dist.Bernoulli(torch.tensor(0.4)))})
    configured = config_gradient(guide, {"z": Score(LeaveOneOut())})
    loss = Estimator_ELBO(4, vectorize_particles=True).loss_and_grads(both, configured)
    assert torch.isfinite(loss)
    assert all(parameter.grad.abs() > 0 for parameter in guide.parameters())
