"""Estimators that move all elements of a plate at once, and terms outside of it."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_gumbel.estimators import Estimator, LocalExpectation, SumAndSample, UnorderedSet
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

SIZE = 6
MOVERS: dict[str, Callable[[], Estimator]] = {
    "local_expectation": LocalExpectation,
    "sum_and_sample": lambda: SumAndSample(1),
    "unordered_set": lambda: UnorderedSet(2),
}
# Of six elements of three categories, hardly any random values change these.
OUTSIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda z: z[..., 0].sum(),
    "one element": lambda z: z[5, 1],
    "all third": lambda z: z[..., 2].prod(),
    "first is the second alone": lambda z: (z[..., 1] * torch.arange(SIZE)).sum() == 0,
    "index": lambda z: torch.eye(3)[z[4].argmax(), 0],
    "Python": lambda z: torch.tensor(1.0 if all(z[..., 2].tolist()) else 0.0),
    "branch": lambda z: torch.ones(()) if bool((z[..., 0] == 1).all()) else torch.zeros(()),
    "buffer": lambda z: torch.zeros(SIZE, 3).copy_(z).sum(0)[0],
    "no_grad": lambda z: torch.no_grad()(lambda: z[..., 2].prod())(),
    "one pattern": lambda z: (z.argmax(-1) == torch.arange(SIZE) % 3).all(),
    "one pattern by Python": lambda z: torch.ones(()) * (z.argmax(-1).tolist() == [0, 2] * 3),
}
NOT_OUTSIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": lambda z: torch.ones(()),
    "shape": lambda z: torch.ones(len(z)).sum() / z.shape[-1],
    "like": lambda z: torch.ones_like(z).sum(),
    "broadcast": lambda z: torch.broadcast_tensors(torch.ones(1, 1), z)[0].sum(),
}


def guide() -> None:
    logits = pyro.param("logits", torch.zeros(SIZE, 3), event_dim=1)
    with pyro.plate("n", SIZE):
        pyro.sample("z", dist.OneHotCategorical(logits=logits))


def outside(read: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    def model() -> None:
        with pyro.plate("n", SIZE):
            z = pyro.sample("z", dist.OneHotCategorical(torch.ones(3)))
            pyro.sample("inside", dist.Normal(z @ torch.arange(3.0), 1.0), obs=torch.ones(SIZE))
        pyro.sample("x", dist.Normal(read(z) * 1.0, 1.0), obs=torch.tensor(0.3))

    return model


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("make", MOVERS.values(), ids=MOVERS)
def test_a_term_outside_is_refused(make: Callable[[], Estimator], name: str) -> None:
    configured = config_gradient(guide, make())
    match = r"At site 'z', .*the plate 'n' at once, and site 'x' outside that plate depends"
    with pytest.raises(ValueError, match=match):
        Estimator_ELBO().loss_and_grads(outside(OUTSIDE[name]), configured)


@pytest.mark.parametrize("name", NOT_OUTSIDE)
@pytest.mark.parametrize("make", MOVERS.values(), ids=MOVERS)
def test_a_term_that_does_not_depend_is_served(make: Callable[[], Estimator], name: str) -> None:
    configured = config_gradient(guide, make())
    loss = Estimator_ELBO().loss_and_grads(outside(NOT_OUTSIDE[name]), configured)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("make", MOVERS.values(), ids=MOVERS)
def test_a_later_site_of_the_guide_is_refused(make: Callable[[], Estimator]) -> None:
    def later() -> None:
        logits = pyro.param("logits", torch.zeros(SIZE, 3), event_dim=1)
        with pyro.plate("n", SIZE):
            z = pyro.sample("z", dist.OneHotCategorical(logits=logits))
        pyro.sample("u", dist.Normal(z[..., 2].prod(), 1.0), infer={"gradient": "score"})

    def model() -> None:
        with pyro.plate("n", SIZE):
            pyro.sample("z", dist.OneHotCategorical(torch.ones(3)))
        pyro.sample("u", dist.Normal(0.0, 1.0))

    configured = config_gradient(later, {"z": make()})
    with pytest.raises(ValueError, match="site 'u' outside that plate depends"):
        Estimator_ELBO().loss_and_grads(model, configured)


@pytest.mark.parametrize("make", MOVERS.values(), ids=MOVERS)
def test_an_outer_plate_does_not_hide_it(make: Callable[[], Estimator]) -> None:
    """The site is in two plates, and the term in the outer one alone."""

    def nested() -> None:
        logits = pyro.param("logits", torch.zeros(2, SIZE, 3), event_dim=1)
        with pyro.plate("outer", 2, dim=-2), pyro.plate("n", SIZE, dim=-1):
            pyro.sample("z", dist.OneHotCategorical(logits=logits))

    def model() -> None:
        outer = pyro.plate("outer", 2, dim=-2)
        with outer, pyro.plate("n", SIZE, dim=-1):
            z = pyro.sample("z", dist.OneHotCategorical(torch.ones(3)))
        with outer:
            mean = z[..., 2].prod(-1, keepdim=True)
            pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.ones(2, 1))

    with pytest.raises(ValueError, match="plate 'n' at once, and site 'x' outside"):
        Estimator_ELBO().loss_and_grads(model, config_gradient(nested, make()))
