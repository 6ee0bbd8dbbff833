"""Guides whose values come from a handler, such as ``poutine.replay``, and not from a draw."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from pyro_gumbel.estimators import ReinMax, Score
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

PROBS = torch.tensor([[0.2, 0.8], [0.6, 0.4], [0.5, 0.5]])


def model() -> None:
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.OneHotCategorical(PROBS).to_event(1))
        y = pyro.sample("y", dist.Normal(0.0, 2.0))
        mean = z[..., 0].sum(-1) + y
        pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.tensor([1.0, 2.0, 0.0, 1.0]))


def guide() -> None:
    logits = pyro.param("logits", PROBS.log().flip(-1))
    loc = pyro.param("loc", torch.tensor(0.3))
    with pyro.plate("data", 4):
        pyro.sample("z", dist.OneHotCategorical(logits=logits).to_event(1))
        pyro.sample("y", dist.Normal(loc, 1.0))


def gradients(elbo, program) -> dict[str, torch.Tensor]:
    parameters = dict(pyro.get_param_store().named_parameters())
    for parameter in parameters.values():
        parameter.grad = None
    loss = elbo.loss_and_grads(model, program)
    return {"loss": torch.as_tensor(loss), **{k: v.grad for k, v in parameters.items()}}


@pytest.mark.parametrize("graph", [True, False])
def test_a_replayed_guide_has_pyros_gradient(graph: bool) -> None:
    pyro.set_rng_seed(0)
    with torch.set_grad_enabled(graph):
        trace = poutine.trace(guide).get_trace()
    replayed = config_gradient(poutine.replay(guide, trace=trace), {"z": Score()})
    expected = gradients(Trace_ELBO(retain_graph=True), replayed)
    found = gradients(Estimator_ELBO(), replayed)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_an_estimator_that_must_draw_is_refused() -> None:
    trace = poutine.trace(guide).get_trace()
    replayed = config_gradient(poutine.replay(guide, trace=trace), {"z": ReinMax()})
    message = r"'z', ReinMax\(1.0\) must draw the value, and a handler of the guide"
    with pytest.raises(ValueError, match=message):
        Estimator_ELBO().loss_and_grads(model, replayed)
