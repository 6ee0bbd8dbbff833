"""Sums over marked sites of the model where shapes, masks and scales could mislead."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex
from pyro.optim import Adam
from torch import Tensor

from pyro_gumbel.diagnostics import exact_gradient, guide_khat
from pyro_gumbel.infer import CapturedSVI, Estimator_ELBO, ImportanceWeighted_ELBO, recover

SUM = {"enumerate": "parallel"}
Program = Callable[..., Any]


def no_guide() -> None: ...


def loss_and_grads(elbo: Any, model: Program, guide: Program) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    loss = elbo.differentiable_loss(model, guide)
    names = sorted(pyro.get_param_store().keys())
    params = [pyro.param(name).unconstrained() for name in names]
    return loss, list(torch.autograd.grad(loss, params))


def assert_as_pyro(model: Program, guide: Program, *, nesting: int) -> None:
    pyro.clear_param_store()
    with torch.random.fork_rng():
        expected, grads = loss_and_grads(TraceEnum_ELBO(max_plate_nesting=nesting), model, guide)
        loss, ours = loss_and_grads(Estimator_ELBO(max_plate_nesting=nesting), model, guide)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours, grads)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("depends", [True, False])
@pytest.mark.parametrize("nesting", [0, 1])
def test_sites_of_events(size: int, depends: bool, nesting: int) -> None:
    """The dimensions that ``to_event`` joined are not those of summed values."""

    def model() -> None:
        logits = pyro.param("logits", torch.tensor([0.3, -0.2, 0.5]))
        z = pyro.sample("z", dist.Categorical(logits=logits), infer=SUM)
        shift = torch.tensor([0.0, 3.0, -1.0])[z]
        loc = (shift if depends else torch.zeros(())).unsqueeze(-1)
        w = pyro.sample("w", dist.Normal(loc.expand(*loc.shape[:-1], size), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(w.sum(-1) + shift, 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        loc = pyro.param("loc", torch.full((size,), 0.2))
        pyro.sample("w", dist.Normal(loc, 1.0).to_event(1))

    assert_as_pyro(model, guide, nesting=nesting)


@pytest.mark.parametrize("validate", [True, False])
def test_a_value_used_outside_of_its_chain(validate: bool) -> None:
    def model() -> None:
        z = torch.tensor(0)
        for t in pyro.markov(range(2)):
            probs = torch.tensor([[0.2, 0.8], [0.6, 0.4]])[z]
            z = pyro.sample(f"z{t}", dist.Categorical(probs), infer=SUM)
        pyro.sample("x", dist.Normal(z.float(), 1.0), obs=torch.tensor(1.0))

    with (
        pyro.validation_enabled(validate),
        pytest.raises(ValueError, match=r"'x': its log_prob has shape .*pyro\.markov"),
    ):
        Estimator_ELBO(max_plate_nesting=0).loss(model, no_guide)


LOC = torch.tensor([0.0, 1.5, 4.0])
PRIOR = torch.tensor([0.2, 0.3, 0.5])
DATA = torch.tensor([0.0, 1.0, 2.0, 3.0])


def log_joint(x: Tensor) -> Tensor:
    return PRIOR.log() + dist.Normal(LOC, 1.0).log_prob(x.unsqueeze(-1))


@pytest.mark.parametrize("subsample", [None, torch.tensor([0, 2, 4, 6])])
def test_a_scale_that_is_a_tensor(subsample: Tensor | None) -> None:
    def model() -> None:
        logits = pyro.param("logits", torch.tensor([0.3, -0.2, 0.5]))
        plate = pyro.plate("data", 4 if subsample is None else 8, subsample=subsample)
        with pyro.poutine.scale(scale=torch.tensor(0.3)), plate:
            z = pyro.sample("z", dist.Categorical(logits=logits), infer=SUM)
            pyro.sample("x", dist.Normal(LOC[z], 1.0), obs=DATA)

    assert_as_pyro(model, no_guide, nesting=1)


LEARNT = torch.tensor(1.0, requires_grad=True)  # equal to the other scale, but its gradient is not


@pytest.mark.parametrize("scale", [torch.tensor(0.3), torch.linspace(0.1, 1.0, 4), LEARNT])
def test_scales_that_cannot_leave_the_logarithm(scale: Tensor) -> None:
    def model() -> None:
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Categorical(PRIOR), infer=SUM)
            with pyro.poutine.scale(scale=scale):
                pyro.sample("x", dist.Normal(LOC[z], 1.0), obs=DATA)

    with pytest.raises(ValueError, match="different scales|scale of shape"):
        Estimator_ELBO().differentiable_loss(model, no_guide)


SEEN = torch.tensor([True, True, False, False])
HALF = pyro.poutine.mask(mask=SEEN)


@pytest.mark.parametrize("where", ["site", "distribution", "both"])
def test_masked_sites_have_pyros_loss_and_its_posterior(where: str) -> None:
    """A mask around a summed site leaves its probabilities; one of the distribution drops them."""

    def model() -> None:
        logits = pyro.param("logits", PRIOR.log())
        with pyro.plate("data", 4), contextlib.ExitStack() as whole:
            if where == "both":
                whole.enter_context(HALF)
            with HALF if where == "site" else contextlib.nullcontext():
                prior = dist.Categorical(logits=logits)
                prior = prior.mask(SEEN) if where == "distribution" else prior
                z = pyro.sample("z", prior, infer=SUM)
            pyro.sample("x", dist.Normal(LOC[z], 1.0), obs=DATA)

    assert_as_pyro(model, no_guide, nesting=1)
    probs = log_joint(DATA).softmax(-1)
    if where == "both":
        probs = torch.where(SEEN.unsqueeze(-1), probs, PRIOR)
    if where == "distribution":
        probs = torch.where(SEEN.unsqueeze(-1), probs, (log_joint(DATA) - PRIOR.log()).softmax(-1))
    torch.testing.assert_close(recover(model, no_guide, marginals=True)["z"][0], probs)
    n = 300
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = recover(model, no_guide, num_samples=n)["z"]
    found = torch.nn.functional.one_hot(draws, 3).float().mean(0)
    assert ((found - probs) / (probs * (1 - probs) / n + 1e-4).sqrt()).abs().max() < 5


def test_decoding_ignores_what_is_past_a_sequences_end() -> None:
    # From state 1 the certain next step would be worth more than the better start at 0.
    step = torch.tensor([[0.5, 0.5], [0.0, 1.0]])

    def model() -> None:
        z = pyro.sample("z0", dist.Categorical(torch.tensor([0.6, 0.4])), infer=SUM)
        with pyro.poutine.mask(mask=torch.tensor(False)):
            pyro.sample("z1", dist.Categorical(Vindex(step)[z]), infer=SUM)

    assert recover(model, no_guide, decode=True)["z0"].item() == 0


@pytest.mark.parametrize("size", [1, 3])
def test_recovered_values_have_their_plates_shape(size: int) -> None:
    """Also with one category, one element of a plate, and values that are vectors."""

    def model() -> None:
        y = pyro.sample("y", dist.Bernoulli(0.5), infer=SUM)
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.OneHotCategorical(PRIOR), infer=SUM)
            one = pyro.sample("one", dist.Categorical(torch.ones(1)), infer=SUM)
            loc = (z * LOC).sum(-1) + one
            pyro.sample("x", dist.Normal(loc + y, 1.0), obs=DATA[:size])

    for decode in (False, True):
        found = recover(model, no_guide, num_samples=2, decode=decode)
        shapes = {name: tuple(value.shape) for name, value in found.items()}
        assert shapes == {"y": (2,), "z": (2, size, 3), "one": (2, size)}
        assert found["z"].sum(-1).eq(1).all()
    probs = recover(model, no_guide, marginals=True)
    shapes = {name: tuple(value.shape) for name, value in probs.items()}
    assert shapes == {"y": (1, 2), "z": (1, size, 3), "one": (1, size, 1)}


def test_recovering_sites_of_one_value() -> None:
    def model() -> None:
        pyro.sample("one", dist.Categorical(torch.ones(1)), infer=SUM)

    assert recover(model, no_guide)["one"].tolist() == [0]
    assert recover(model, no_guide, marginals=True)["one"].tolist() == [[1.0]]


def test_a_mask_of_summed_values() -> None:
    """The score of the data has the values' dimension from its mask alone."""

    def model() -> None:
        logits = pyro.param("logits", torch.tensor([0.3, -0.2, 0.5]))
        with pyro.plate("data", 4, dim=-2):
            z = pyro.sample("z", dist.Categorical(logits=logits), infer=SUM)
            with (
                pyro.plate("components", 3, dim=-1) as component,
                pyro.poutine.mask(mask=z == component),
            ):
                pyro.sample("x", dist.Normal(LOC, 1.0), obs=DATA.unsqueeze(-1))

    assert_as_pyro(model, no_guide, nesting=2)


STEP = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.6, 0.3], [0.3, 0.1, 0.6]])


def after_the_chain() -> None:
    z = torch.tensor(0)
    for t in pyro.markov(range(3)):
        z = pyro.sample(f"z{t}", dist.Categorical(Vindex(STEP)[z]), infer=SUM)
    y = pyro.sample("y", dist.Categorical(PRIOR), infer=SUM)  # has the dimension of z2
    pyro.sample("x", dist.Normal(LOC[z] + LOC[y], 1.0), obs=torch.tensor(1.0))


def before_the_history() -> None:
    z = [torch.tensor(0)]
    for t in pyro.markov(range(4)):
        z.append(pyro.sample(f"z{t}", dist.Categorical(Vindex(STEP)[z[-1]]), infer=SUM))
        loc = LOC[z[max(0, t - 1)]] + LOC[z[-1]]  # z[t - 1] is z(t - 2)
        pyro.sample(f"x{t}", dist.Normal(loc, 1.0), obs=torch.tensor(1.0))


@torch.inference_mode()
def in_inference_mode(model: Program, guide: Program) -> None:
    Estimator_ELBO(max_plate_nesting=0).loss(model, guide)


FIRST_RUNS: dict[str, Program] = {
    "differentiable_loss": Estimator_ELBO(max_plate_nesting=0).differentiable_loss,
    "loss": Estimator_ELBO().loss,
    "inference mode": in_inference_mode,
    "evaluate_loss": lambda *programs: SVI(
        *programs, pyro.optim.Adam({}), Estimator_ELBO()
    ).evaluate_loss(),
    "importance weighted": ImportanceWeighted_ELBO(2).loss,
    "importance weighted, step": ImportanceWeighted_ELBO(2).loss_and_grads,
    "recover": recover,
    "decode": lambda *programs: recover(*programs, decode=True),
}


@pytest.mark.parametrize("first", FIRST_RUNS)
@pytest.mark.parametrize("model", [after_the_chain, before_the_history])
def test_a_value_whose_dimension_stands_for_another(model: Program, first: str) -> None:
    pyro.clear_param_store()
    with pytest.raises(ValueError, match=r"uses the value of site 'z\d' outside of"):
        FIRST_RUNS[first](model, no_guide)


def test_reading_a_value_is_not_using_it() -> None:
    def model() -> None:
        z = torch.tensor(0)
        for t in pyro.markov(range(3)):
            z = pyro.sample(f"z{t}", dist.Categorical(Vindex(STEP)[z]), infer=SUM)
            assert (z >= 0).all()
            pyro.sample(f"x{t}", dist.Normal(LOC[z], 1.0), obs=torch.tensor(1.0))
        pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0), obs=DATA[2])

    assert_as_pyro(model, no_guide, nesting=0)


def test_a_value_given_by_a_handler_of_the_model() -> None:
    def model() -> None:
        logits = pyro.param("logits", torch.tensor([0.3, -0.2, 0.5]))
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Categorical(logits=logits), infer=SUM)
            pyro.sample("x", dist.Normal(LOC[z], 1.0), obs=DATA)

    trace = pyro.poutine.trace(model).get_trace()
    loss = Estimator_ELBO().loss(pyro.poutine.replay(model, trace=trace), no_guide)
    assert loss == pytest.approx(-trace.log_prob_sum().item())


def switched() -> None:
    shift = pyro.param("shift", torch.tensor(2.0))
    y = pyro.sample("y", dist.OneHotCategorical(PRIOR))
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.Categorical((y.unsqueeze(-2) @ STEP).squeeze(-2)), infer=SUM)
        w = pyro.sample("w", dist.Bernoulli(logits=LOC[z] - 2))
        pyro.sample("x", dist.Normal(shift * w + LOC[z], 1.0), obs=DATA)


def guide_of_switched() -> None:
    y = pyro.sample("y", dist.OneHotCategorical(logits=pyro.param("logits_y", PRIOR.clone())))
    logits = pyro.param("logits_w", torch.linspace(-0.5, 0.8, 4))
    with pyro.plate("data", 4):
        pyro.sample("w", dist.Bernoulli(logits=logits + (y * LOC).sum(-1)))


def test_the_exact_gradient_of_a_model_with_a_sum() -> None:
    pyro.clear_param_store()
    exact = exact_gradient(switched, guide_of_switched)
    assert exact.attrs["states"] == 6  # the plate's elements one by one
    marked = config_enumerate(guide_of_switched, default="parallel")
    loss, grads = loss_and_grads(TraceEnum_ELBO(max_plate_nesting=1), switched, marked)
    assert exact.attrs["loss"] == pytest.approx(loss.item())
    for name, grad in zip(sorted(pyro.get_param_store().keys()), grads, strict=True):
        torch.testing.assert_close(torch.as_tensor(exact[name].values), grad)


def test_khat_is_that_of_the_weights_with_the_sum() -> None:
    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Categorical(PRIOR), infer=SUM)
            pyro.sample("x", dist.Normal(loc + LOC[z], 1.0), obs=DATA)

    def mixture() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        parts = dist.Normal(loc + LOC, 1.0)
        with pyro.plate("data", 4):
            mixed = dist.MixtureSameFamily(dist.Categorical(PRIOR), parts)
            pyro.sample("x", mixed, obs=DATA)

    def guide() -> None:
        pyro.sample("loc", dist.Normal(0.2, 0.4))

    khats = [guide_khat(program, guide, num_samples=100) for program in (model, mixture)]
    assert khats[0] == pytest.approx(khats[1], abs=1e-4)


@pytest.mark.parametrize("scale", [0.3, torch.tensor(0.3)])
def test_a_captured_step_takes_scales(scale: Any) -> None:
    """A scale that is a tensor is compared without reading it into Python."""

    def model() -> None:
        logits = pyro.param("logits", torch.tensor([0.3, -0.2, 0.5]))
        with pyro.plate("data", 4), pyro.poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Categorical(logits=logits), infer=SUM)
            pyro.sample("x", dist.Normal(LOC[z], 1.0), obs=DATA)

    losses = []
    for kind in (SVI, CapturedSVI):
        pyro.clear_param_store()
        svi = kind(model, no_guide, Adam({"lr": 0.1}), Estimator_ELBO(max_plate_nesting=1))
        losses.append([float(svi.step()) for _ in range(4)])
    assert losses[0] == pytest.approx(losses[1])
    assert losses[0][0] > losses[0][-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("apart", [1.0, 6.0, 12.0])
def test_factors_whose_maxima_are_far_apart(dtype: torch.dtype, apart: float) -> None:
    """Two data contradict each other about the same summed value, by up to 288 nats."""
    locs = torch.tensor([-apart, 0.0, apart], dtype=dtype)

    def model() -> None:
        logits = pyro.param("logits", torch.tensor([0.3, -0.2, 0.5], dtype=dtype))
        z = pyro.sample("z", dist.Categorical(logits=logits), infer=SUM)
        shift = pyro.param("shift", torch.tensor(0.1, dtype=dtype))
        for name, x in (("x", -apart), ("y", apart)):
            pyro.sample(name, dist.Normal(locs[z] + shift, 1.0), obs=torch.tensor(x, dtype=dtype))

    loss, grads = loss_and_grads(Estimator_ELBO(max_plate_nesting=0), model, no_guide)
    logits, shift = (pyro.param(name) for name in ("logits", "shift"))
    fit = sum(dist.Normal(locs + shift, 1.0).log_prob(torch.tensor(x)) for x in (-apart, apart))
    expected = -(logits.log_softmax(-1) + fit).logsumexp(-1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads, [*torch.autograd.grad(expected, [logits, shift])])
