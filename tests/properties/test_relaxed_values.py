"""Estimators that run the model on relaxed values need a model that reads them with a gradient."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_gumbel.estimators import (
    DisARMTree,
    Estimator,
    GumbelSoftmax,
    MuProp,
    Rebar,
    ReinMax,
    Relax,
    StraightThrough,
)
from pyro_gumbel.infer import Estimator_ELBO, GradientWarning, config_gradient

TABLE = torch.tensor([-1.0, 0.5, 2.0])


def guide() -> None:
    pyro.sample("z", dist.OneHotCategorical(logits=pyro.param("logits", torch.zeros(3))))


def reader(read: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    def model() -> None:
        z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
        scale = pyro.param("scale", torch.tensor(1.0))
        pyro.sample("x", dist.Normal(read(z) * scale, 1.0), obs=torch.tensor(0.3))

    return model


class Critic(nn.Module):
    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(3, outputs)

    def forward(self, value: Tensor) -> Tensor:
        return self.linear(value)


LOOKUPS = {
    "argmax": lambda z: TABLE[z.argmax(-1)],
    "threshold": lambda z: torch.where(z[..., 0] > 0.5, 1.0, -1.0),
    "long": lambda z: TABLE[(z * torch.arange(3.0)).sum(-1).long()],
}


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
@pytest.mark.parametrize("estimator", [Rebar(), Relax(Critic())], ids=["rebar", "relax"])
@pytest.mark.parametrize("read", LOOKUPS.values(), ids=LOOKUPS)
def test_an_index_lookup_is_refused_by_name(
    read: Callable[[Tensor], Tensor], estimator: Estimator, vectorize: bool
) -> None:
    elbo = Estimator_ELBO(num_particles=2, vectorize_particles=vectorize)
    with pytest.raises(ValueError, match="(?s)'z'.*needs the cost's gradient.*'x'.*DisARMTree"):
        elbo.loss_and_grads(reader(read), config_gradient(guide, estimator))


@pytest.mark.parametrize("estimator", [ReinMax(), GumbelSoftmax(0.5), StraightThrough()], ids=repr)
def test_a_biased_estimator_warns_of_an_index_lookup(
    estimator: Estimator,
) -> None:
    elbo = Estimator_ELBO(num_particles=2, vectorize_particles=True)
    model = reader(LOOKUPS["argmax"])
    with pytest.warns(GradientWarning, match="'z'.*needs the cost's gradient.*'x'.*is not learnt"):
        elbo.loss_and_grads(model, config_gradient(guide, estimator))


def test_the_probe_leaves_the_generator_and_the_gradient_alone() -> None:
    """With and without validation, and so with and without the probe, a step is the same."""
    results = []
    for validate in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(7)
        elbo = Estimator_ELBO(num_particles=3, vectorize_particles=True)
        with pyro.validation_enabled(validate):
            elbo.loss_and_grads(reader(lambda z: z @ TABLE), config_gradient(guide, ReinMax()))
        params = pyro.get_param_store()._params
        results.append(torch.cat([param.grad.flatten() for param in params.values()]))
        results.append(torch.rand(2))
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=0)
    torch.testing.assert_close(results[1], results[3], rtol=0, atol=0)


@pytest.mark.parametrize("estimator", [Rebar(), Relax(Critic()), MuProp()], ids=repr)
def test_a_product_is_accepted(estimator: Estimator) -> None:
    model = reader(lambda z: z @ TABLE)
    elbo = Estimator_ELBO(num_particles=3, vectorize_particles=True)
    loss = elbo.loss_and_grads(model, config_gradient(guide, estimator))
    assert torch.isfinite(loss)


def test_the_advice_of_the_message_works() -> None:
    model = reader(lambda z: TABLE[z.argmax(-1)])
    elbo = Estimator_ELBO(num_particles=3, vectorize_particles=True)
    loss = elbo.loss_and_grads(model, config_gradient(guide, DisARMTree()))
    assert torch.isfinite(loss)


def test_a_critic_of_the_wrong_shape_is_refused() -> None:
    model = reader(lambda z: z @ TABLE)
    elbo = Estimator_ELBO(num_particles=2, vectorize_particles=True)
    with pytest.raises(
        ValueError, match=r"'z'.*critic returned shape \(2, 4\).*\(2,\) or \(2, 1\)"
    ):
        elbo.loss_and_grads(model, config_gradient(guide, Relax(Critic(outputs=4))))


def test_a_critic_must_be_a_module() -> None:
    with pytest.raises(TypeError, match="critic must be a torch.nn.Module"):
        Relax(lambda value: value.sum(-1))  # type: ignore[arg-type]


SHIFT = torch.tensor([[2.0, -1.0, 0.0], [0.0, 1.5, -0.5], [-1.0, 0.0, 1.0]])


def of_two(*, model_reads: Callable[[Tensor], Tensor], guide_reads: Callable[[Tensor], Tensor]):
    """A second latent whose distribution depends on the first, in the model or in the guide."""

    def model() -> None:
        z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
        y = pyro.sample("y", dist.OneHotCategorical(logits=model_reads(z)))
        pyro.sample("x", dist.Normal((y * TABLE).sum(-1), 1.0), obs=torch.tensor(0.3))

    def both() -> None:
        z = pyro.sample("z", dist.OneHotCategorical(logits=pyro.param("l", torch.zeros(3))))
        pyro.sample("y", dist.OneHotCategorical(logits=guide_reads(z) + pyro.param("m", SHIFT[0])))

    return model, both


def by_index(z: Tensor) -> Tensor:
    return SHIFT[z.argmax(-1)]


def by_product(z: Tensor) -> Tensor:
    return z @ SHIFT


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
@pytest.mark.parametrize("other", ["enumerate", "score", "disarm_tree"])
@pytest.mark.parametrize("where", ["model_reads", "guide_reads"])
def test_an_index_lookup_by_another_latent(where: str, other: str, vectorize: bool) -> None:
    elbo = Estimator_ELBO(2, vectorize_particles=vectorize, max_plate_nesting=0)
    config = {"z": Rebar(), "y": other}
    readers = {"model_reads": by_product, "guide_reads": by_product}
    model, both = of_two(**readers)
    elbo.loss_and_grads(model, config_gradient(both, config))  # nothing is wrong
    model, both = of_two(**{**readers, where: by_index})
    with pytest.raises(ValueError, match="(?s)'z'.*needs the cost's gradient.*'y'.*DisARMTree"):
        elbo.loss_and_grads(model, config_gradient(both, config))
    with pytest.warns(GradientWarning, match="'z'.*needs the cost's gradient.*'y'.*is not learnt"):
        elbo.loss_and_grads(model, config_gradient(both, {**config, "z": ReinMax()}))


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
@pytest.mark.parametrize("outer", ["rebar", "muprop", "gumbel_softmax"])
@pytest.mark.parametrize("inner", ["local_expectation", "sum_and_sample", "unordered_set"])
def test_probes_take_relaxed_values_of_other_sites(
    outer: str, inner: str, vectorize: bool
) -> None:
    def model() -> None:
        g = pyro.sample("g", dist.Bernoulli(0.3))
        with pyro.plate("n", 2):
            z = pyro.sample("z", dist.OneHotCategorical(torch.ones(4)))
            mean = (z * torch.arange(4.0)).sum(-1) + g
            pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.zeros(2))

    def nested() -> None:
        pyro.sample("g", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.2))))
        logits = pyro.param("b", torch.zeros(2, 4), event_dim=1)
        with pyro.plate("n", 2):
            pyro.sample("z", dist.OneHotCategorical(logits=logits))

    elbo = Estimator_ELBO(2, vectorize_particles=vectorize, max_plate_nesting=1)
    loss = elbo.loss_and_grads(model, config_gradient(nested, {"g": outer, "z": inner}))
    assert torch.isfinite(loss)
