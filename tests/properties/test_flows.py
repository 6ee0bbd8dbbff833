"""Guides with normalising flows, with and without an inverse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from torch import Tensor

from pyro_gumbel.estimators import DisARM, LeaveOneOut, Pathwise, Score
from pyro_gumbel.infer import Estimator_ELBO, ImportanceWeighted_ELBO, config_gradient

WITHOUT_INVERSE: dict[str, Callable[[int], Any]] = {
    "planar": T.planar,
    "radial": T.radial,
    "sylvester": T.sylvester,
    "polynomial": T.polynomial,
    "neural_autoregressive": T.neural_autoregressive,
    "block_autoregressive": T.block_autoregressive,
}
LOSSES = {
    "elbo": (Estimator_ELBO, Trace_ELBO),
    "iwae": (ImportanceWeighted_ELBO, RenyiELBO),
}


def model(x: Tensor | float = 1.0) -> None:
    z = pyro.sample("z", dist.Normal(torch.tensor([0.3, -0.2]), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z.sum(-1), 0.7), obs=torch.as_tensor(x))


def guide_of(flow: Any) -> Callable[[], None]:
    def guide() -> None:
        pyro.module("flow", flow)
        base = dist.Normal(pyro.param("loc", torch.tensor([0.1, -0.4])), torch.ones(2))
        pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    return guide


def step(
    elbo: Any, guide: Callable[[], None], model: Callable[[], None] = model, seed: int = 3
) -> list[Tensor]:
    """The loss and the gradients of one step from a known seed."""
    pyro.set_rng_seed(seed)
    loss = torch.as_tensor(elbo.loss_and_grads(model, guide))
    params = list(pyro.get_param_store()._params.values())
    grads = [param.grad.clone() for param in params if param.grad is not None]
    for param in params:
        param.grad = None
    return [loss, *grads]


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("flow", WITHOUT_INVERSE)
def test_flows_without_an_inverse_step_as_pyro_does(
    flow: str, loss: str, vectorize: bool, num_particles: int
) -> None:
    guide = guide_of(WITHOUT_INVERSE[flow](2))
    ours, pyros = (
        step(
            kind(num_particles=num_particles, vectorize_particles=vectorize, max_plate_nesting=0),
            guide,
        )
        for kind in LOSSES[loss]
    )
    assert len(ours) > 2
    torch.testing.assert_close(ours, pyros, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_flow_of_an_autoguide_steps_as_pyro_s(
    loss: str, vectorize: bool, num_particles: int
) -> None:
    guide = AutoNormalizingFlow(model, T.planar)
    guide()
    ours, pyros = (
        step(
            kind(num_particles=num_particles, vectorize_particles=vectorize, max_plate_nesting=0),
            guide,
        )
        for kind in LOSSES[loss]
    )
    assert len(ours) > 2
    torch.testing.assert_close(ours, pyros, rtol=1e-5, atol=1e-6)


def sticking(guide: Any) -> Any:
    return config_gradient(guide, Pathwise(sticking_the_landing=True))


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
@pytest.mark.parametrize("flow", WITHOUT_INVERSE)
def test_flows_without_an_inverse_are_refused_where_values_are_scored_by_themselves(
    flow: str, vectorize: bool
) -> None:
    guide = guide_of(WITHOUT_INVERSE[flow](2))
    options = {"vectorize_particles": vectorize, "max_plate_nesting": 0}
    doubly = ImportanceWeighted_ELBO(2, doubly_reparameterized=True, **options)
    with pytest.raises(ValueError, match=r"'z'.*no inverse.*doubly_reparameterized=False"):
        doubly.loss_and_grads(model, guide)
    with pytest.raises(ValueError, match=r"'z'.*no inverse.*Write Pathwise\(\)"):
        Estimator_ELBO(2, **options).loss_and_grads(model, sticking(guide))
    assert math.isfinite(Estimator_ELBO(2, **options).loss(model, sticking(guide)))


CLOSED_FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "normal": dist.Normal,
    "lognormal": dist.LogNormal,
}


def transformed(form: str, cache_size: int, compose: bool) -> Callable[[Tensor, Tensor], Any]:
    """The closed form as a transformed standard normal, drawn from the same noise."""

    def make(loc: Tensor, scale: Tensor) -> Any:
        transforms: list[Any] = [T.AffineTransform(loc, scale, cache_size=cache_size)]
        if form == "lognormal":
            transforms.append(T.ExpTransform(cache_size=cache_size))
        if compose:
            transforms = [T.ComposeTransform(transforms, cache_size=cache_size)]
        return dist.TransformedDistribution(dist.Normal(torch.zeros(5), 1.0), transforms)

    return make


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
@pytest.mark.parametrize("compose", [False, True], ids=["list", "composed"])
@pytest.mark.parametrize("cache_size", [0, 1])
@pytest.mark.parametrize("form", CLOSED_FORMS)
@pytest.mark.parametrize("way", ["doubly", "sticking", "plain"])
def test_transforms_have_the_gradient_of_the_closed_form(
    way: str, form: str, cache_size: int, compose: bool, vectorize: bool
) -> None:
    torch.set_default_dtype(torch.float64)

    def scaled_model() -> None:
        with pyro.plate("n", 5), poutine.scale(scale=0.3):
            z = pyro.sample("z", CLOSED_FORMS[form](torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.7), obs=torch.ones(5))

    def scaled_guide(make: Callable[[Tensor, Tensor], Any]) -> Callable[[], None]:
        def guide() -> None:
            loc, scale = pyro.param("loc", torch.tensor(-0.5)), pyro.param("s", torch.tensor(0.7))
            with pyro.plate("n", 5), poutine.scale(scale=0.3):
                pyro.sample("z", make(loc, scale))

        return sticking(guide) if way == "sticking" else guide

    options = {"vectorize_particles": vectorize, "max_plate_nesting": 1}
    loss: Any = Estimator_ELBO(3, **options)
    if way == "doubly":
        loss = ImportanceWeighted_ELBO(3, doubly_reparameterized=True, **options)
    flow = transformed(form, cache_size, compose)
    found = step(loss, scaled_guide(flow), scaled_model)
    expected = step(loss, scaled_guide(CLOSED_FORMS[form]), scaled_model)
    assert len(found) == 3
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


WITH_INVERSE: dict[str, Callable[[int], Any]] = {
    "affine_autoregressive": T.affine_autoregressive,
    "affine_coupling": T.affine_coupling,
    "spline_coupling": T.spline_coupling,
    "householder": T.householder,
    "matrix_exponential": T.matrix_exponential,
}


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
@pytest.mark.parametrize("way", ["doubly", "sticking"])
@pytest.mark.parametrize("flow", WITH_INVERSE)
def test_flows_with_an_inverse_have_the_mean_of_the_plain_gradient(
    flow: str, way: str, vectorize: bool
) -> None:
    repeats, batches = 300, 20
    flow_of_two = WITH_INVERSE[flow](2)

    def repeated_model() -> None:
        with pyro.plate("n", repeats):
            model(torch.ones(repeats))

    def repeated_guide() -> None:
        with pyro.plate("n", repeats):
            guide_of(flow_of_two)()

    options = {"vectorize_particles": vectorize, "max_plate_nesting": 1}
    plain: Any = Estimator_ELBO(3, **options)
    special: Any = plain
    if way == "doubly":
        plain = ImportanceWeighted_ELBO(3, **options)
        special = ImportanceWeighted_ELBO(3, doubly_reparameterized=True, **options)
    chosen = sticking(repeated_guide) if way == "sticking" else repeated_guide
    results = []
    for loss, guide in ((plain, repeated_guide), (special, chosen)):
        draws = []
        for seed in range(batches):
            _, *grads = step(loss, guide, repeated_model, seed)
            draws.append(torch.cat([grad.flatten() for grad in grads]))
        results.append(torch.stack(draws) / repeats)
    gap = results[1] - results[0]  # of the same noise
    error = gap.std(0) / math.sqrt(batches)
    assert error.max() < 0.1 * results[0].mean(0).norm()
    assert (gap.mean(0).abs() < 5 * error + 1e-6).all()


def between_bits(flow: Any, n: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """A flow whose base depends on a bit, and on whose value another bit depends."""

    def bit_model() -> None:
        with pyro.plate("n", n):
            b = pyro.sample("b", dist.Bernoulli(0.3))
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            c = pyro.sample("c", dist.Bernoulli(0.6))
            pyro.sample("x", dist.Normal(z.sum(-1) + 2 * b - c, 0.7), obs=torch.ones(n))

    def bit_guide() -> None:
        pyro.module("flow", flow)
        logits = pyro.param("logits", torch.tensor([0.4, -0.2]))
        with pyro.plate("n", n):
            b = pyro.sample("b", dist.Bernoulli(logits=logits[0]))
            base = dist.Normal(b.unsqueeze(-1) * torch.tensor([0.5, -0.3]), 1.0).to_event(1)
            z = pyro.sample("z", dist.TransformedDistribution(base, [flow]))
            pyro.sample("c", dist.Bernoulli(logits=logits[1] + z[..., 0]))

    return bit_model, bit_guide


@pytest.mark.parametrize(
    ("vectorize", "coupled"), [(True, ["b"]), (False, ["b"]), (False, ["c"]), (False, ["b", "c"])]
)
def test_branches_of_coupled_bits_around_a_flow(vectorize: bool, coupled: list[str]) -> None:
    """The mean gradient is that of the score function."""
    n, batches = 900, 24
    bit_model, bit_guide = between_bits(T.planar(2), n)
    results = []
    for names in (coupled, []):
        loss = Estimator_ELBO(2, vectorize_particles=vectorize, max_plate_nesting=1)
        config = {name: DisARM() if name in names else Score(LeaveOneOut()) for name in "bc"}
        configured = config_gradient(bit_guide, config)
        draws = []
        for seed in range(batches):
            _, *grads = step(loss, configured, bit_model, seed)
            draws.append(torch.cat([grad.flatten() for grad in grads]) / n)
        results.append(torch.stack(draws))
    gap = results[0].mean(0) - results[1].mean(0)
    error = ((results[0].var(0) + results[1].var(0)) / batches).sqrt()
    assert error.max() < 0.1 * results[1].mean(0).norm()
    assert (gap.abs() < 5 * error + 1e-6).all()


def test_a_value_shared_by_rows_names_the_flow_and_the_way_out() -> None:
    """A branch of the later bit has the flow's value in rows of its own."""
    bit_model, bit_guide = between_bits(T.planar(2), 3)
    configured = config_gradient(bit_guide, {"c": DisARM(), "b": Score(LeaveOneOut())})
    loss = Estimator_ELBO(2, vectorize_particles=True, max_plate_nesting=1)

    def steps() -> None:
        for _ in range(2):  # the first finds the branches, the next has them as rows
            loss.loss_and_grads(bit_model, configured)

    with pytest.raises(ValueError, match=r"'z'.*Planar has no inverse.*vectorize_particles=False"):
        steps()
