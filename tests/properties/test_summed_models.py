"""Sums over marked sites of the model are exact, and estimates beside them unbiased."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.ops.indexing import Vindex
from torch import Tensor

from pyro_gumbel.guides import AutoDiscrete
from pyro_gumbel.infer import Estimator_ELBO, ImportanceWeighted_ELBO, recover

SUM = {"enumerate": "parallel"}
X = torch.tensor([0.3, -1.2, 2.1, 0.4, 1.7, -0.6], dtype=torch.float64)


pytestmark = pytest.mark.usefixtures("in_float64")


def nothing(*args: Any) -> None:
    """A guide without sites."""


def step(elbo, model, guide, *args) -> tuple[Tensor, dict[str, Tensor]]:
    for parameter in pyro.get_param_store()._params.values():
        parameter.grad = None
    loss = torch.as_tensor(elbo.loss_and_grads(model, guide, *args))
    parameters = pyro.get_param_store()._params
    return loss, {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


# Chains


def chain(x: Tensor) -> None:
    initial = pyro.param("initial", torch.tensor([0.2, -0.4, 0.9]))
    transition = pyro.param("transition", torch.tensor([[1.0, 0, -1], [0.3, 2, 0], [0, 0.5, 1]]))
    locs = pyro.param("locs", torch.tensor([-1.0, 0.0, 2.0]))
    z = None
    for t in pyro.markov(range(len(x))):
        logits = initial if z is None else Vindex(transition)[..., z, :]
        z = pyro.sample(f"z_{t}", dist.Categorical(logits=logits), infer=SUM)
        pyro.sample(f"x_{t}", dist.Normal(Vindex(locs)[..., z], 0.8), obs=x[t])


def forward(x: Tensor) -> Tensor:
    """The evidence of ``chain`` by the forward recursion."""
    initial, transition, locs = (pyro.param(name) for name in ("initial", "transition", "locs"))
    emission = dist.Normal(locs, 0.8).log_prob(x.unsqueeze(-1))
    alpha = initial.log_softmax(-1) + emission[0]
    for t in range(1, len(x)):
        step = alpha.unsqueeze(-1) + transition.log_softmax(-1)
        alpha = step.logsumexp(-2) + emission[t]
    return alpha.logsumexp(-1)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("length", [1, 2, 40])
def test_a_chain_has_the_forward_recursions_loss_and_gradient(length: int, validate: bool) -> None:
    x = torch.linspace(-1.5, 2.5, length)
    with pyro.validation_enabled(validate):
        loss, found = step(Estimator_ELBO(), chain, nothing, x)
    evidence = forward(x)
    torch.testing.assert_close(-loss, evidence.detach(), rtol=1e-10, atol=1e-10)
    parameters = pyro.get_param_store()._params
    expected = torch.autograd.grad(
        -evidence, [parameters[n] for n in found], allow_unused=True, materialize_grads=True
    )
    for grad, wanted in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-8, atol=1e-10)


def test_a_long_chain_uses_few_dimensions() -> None:
    x = torch.linspace(-2, 2, 300)
    loss = Estimator_ELBO(max_plate_nesting=0).loss(chain, nothing, x)
    assert loss == pytest.approx(-forward(x).item(), rel=1e-10)


def ragged(x: Tensor, lengths: Tensor) -> None:
    """Chains of different lengths in a plate, by a mask."""
    transition = pyro.param("transition", torch.tensor([[0.7, 0.3], [0.2, 0.8]]))
    locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
    with pyro.plate("sequences", len(x)):
        z = torch.zeros((), dtype=torch.long)
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Categorical(Vindex(transition)[z]), infer=SUM)
                pyro.sample(f"x_{t}", dist.Normal(Vindex(locs)[z], 1.0), obs=x[:, t])


def test_masked_steps_of_ragged_chains_count_for_nothing() -> None:
    x, lengths = X.reshape(2, 3), torch.tensor([3, 1])
    loss, _ = step(Estimator_ELBO(), ragged, nothing, x, lengths)
    alone = [Estimator_ELBO().loss(ragged, nothing, x[i : i + 1, :n], lengths[i : i + 1])
             for i, n in enumerate(lengths)]  # fmt: skip
    assert loss.item() == pytest.approx(sum(alone), rel=1e-10)
    expected, _ = step(TraceEnum_ELBO(max_plate_nesting=1), ragged, nothing, x, lengths)
    torch.testing.assert_close(loss, expected)


# Sums beside estimators


def switches(x: Tensor) -> None:
    """A mixture with a Bernoulli switch for each datum; both shift the mean."""
    weights = pyro.param("weights", torch.tensor([0.3, -0.2, 0.5]))
    locs = pyro.param("locs", torch.tensor([-1.0, 0.0, 2.0]))
    shift = pyro.param("shift", torch.tensor(0.7))
    with pyro.plate("data", 12, subsample=torch.arange(len(x))), poutine.scale(scale=0.8):
        on = pyro.sample("on", dist.Bernoulli(0.3))
        z = pyro.sample("z", dist.Categorical(logits=weights), infer=SUM)
        with poutine.mask(mask=x > -1):
            pyro.sample("x", dist.Normal(Vindex(locs)[z] + shift * on, 1.0), obs=x)


def guide_of_switches(x: Tensor) -> None:
    logits = pyro.param("logits", torch.linspace(-0.5, 0.8, 12))
    with pyro.plate("data", 12, subsample=torch.arange(len(x))) as index, poutine.scale(scale=0.8):
        pyro.sample("on", dist.Bernoulli(logits=logits[index]))


@pytest.mark.parametrize("options", [{}, {"vectorize_particles": True}, {"analytic_kl": True}])
def test_enumerate_in_the_guide_beside_a_sum_is_exact(options: dict[str, Any]) -> None:
    marked = config_enumerate(guide_of_switches, default="parallel")
    expected, grads = step(TraceEnum_ELBO(max_plate_nesting=1), switches, marked, X)
    elbo = Estimator_ELBO(default="enumerate", **options)
    for guide in (guide_of_switches, marked):
        loss, found = step(elbo, switches, guide, X)
        torch.testing.assert_close(loss, expected)
        assert found.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(found[name], grad)


def drawn(elbo, draws: int) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = {}
    for _ in range(draws):
        loss, grads = step(elbo, switches, guide_of_switches, X)
        for name, value in {"loss": loss, **grads}.items():
            rows.setdefault(name, []).append(value)
    return {name: torch.stack(values) for name, values in rows.items()}


def worst_z(samples: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    worst = 0.0
    for name, value in exact.items():
        drawn = samples[name]
        error = drawn.std(0) / len(drawn) ** 0.5
        varies = error > 1e-12
        torch.testing.assert_close(drawn.mean(0)[~varies], value[~varies])
        z = ((drawn.mean(0) - value)[varies] / error[varies]).abs()
        worst = max([worst, *z.tolist()])
    return worst


@pytest.fixture(scope="module")
def exact_switches() -> dict[str, Tensor]:
    pyro.clear_param_store()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    marked = config_enumerate(guide_of_switches, default="parallel")
    loss, grads = step(TraceEnum_ELBO(max_plate_nesting=1), switches, marked, X)
    torch.set_default_dtype(default)
    return {"loss": loss, **grads}


DRAWS = 250
CHOICES = [
    ("disarm", 2, True),
    ("disarm", 1, False),
    ("score", 3, True),
    ("local_expectation", 1, False),
    ("rebar", 1, True),
]


@pytest.mark.parametrize(("name", "particles", "vectorized"), CHOICES)
def test_estimators_beside_a_sum_are_unbiased(
    name: str, particles: int, vectorized: bool, exact_switches: dict[str, Tensor]
) -> None:
    pyro.set_rng_seed(0)
    elbo = Estimator_ELBO(particles, default=name, vectorize_particles=vectorized)
    samples = drawn(elbo, DRAWS)
    assert worst_z(samples, exact_switches) < 5
    for name, value in exact_switches.items():
        error = samples[name].std(0) / DRAWS**0.5
        assert (error <= 0.05 * (value.norm() + 1)).all()


def test_a_planted_error_beside_a_sum_is_seen(
    monkeypatch: pytest.MonkeyPatch, exact_switches: dict[str, Tensor]
) -> None:
    from pyro_gumbel.infer import _costs

    right = _costs.Costs.downstream

    def wrong(self, frames, like, **options):
        """Leave a tenth of the cost out."""
        return 0.9 * right(self, frames, like, **options)

    monkeypatch.setattr(_costs.Costs, "downstream", wrong)
    pyro.set_rng_seed(0)
    elbo = Estimator_ELBO(2, default="disarm", vectorize_particles=True)
    assert worst_z(drawn(elbo, DRAWS), exact_switches) > 5


def with_assignments(x: Tensor) -> None:
    """The guide of the switches, with the assignments drawn from their exact conditional."""
    logits = pyro.param("logits", torch.linspace(-0.5, 0.8, 12))
    weights, locs, shift = (pyro.param(name).detach() for name in ("weights", "locs", "shift"))
    with pyro.plate("data", 12, subsample=torch.arange(len(x))) as index, poutine.scale(scale=0.8):
        on = pyro.sample("on", dist.Bernoulli(logits=logits[index]))
        fit = dist.Normal(locs + shift * on.unsqueeze(-1), 1.0).log_prob(x.unsqueeze(-1))
        fit = fit.masked_fill(x.unsqueeze(-1) <= -1, 0.0)
        pyro.sample("z", dist.Categorical(logits=weights.log_softmax(-1) + fit))


def test_a_sum_has_less_variance_than_draws_from_the_exact_conditional() -> None:
    pyro.set_rng_seed(1)
    step(Estimator_ELBO(default="enumerate"), switches, guide_of_switches, X)
    variances = []
    for guide in (guide_of_switches, with_assignments):
        steps = [step(Estimator_ELBO(default="score"), switches, guide, X) for _ in range(60)]
        variances.append(torch.stack([grads["locs"] for _, grads in steps]).var(0).sum())
    assert 1.2 * variances[0] < variances[1]


# Continuous sites and bounds


def mixture(x: Tensor) -> None:
    locs = pyro.sample("locs", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    weight = pyro.sample("weight", dist.Beta(2.0, 3.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(weight), infer=SUM)
        loc = torch.where(z > 0, locs[..., 1:], locs[..., :1]) if z.dim() > 1 else None
        loc = locs[..., 0] + (locs[..., 1] - locs[..., 0]) * z if loc is None else loc
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


@pytest.mark.parametrize("make", [AutoNormal, AutoDelta])
@pytest.mark.parametrize("bound", [Estimator_ELBO, ImportanceWeighted_ELBO])
def test_an_autoguide_of_the_other_sites(make: Any, bound: Any) -> None:
    guide = make(poutine.block(mixture, hide=["z"]))
    pyro.set_rng_seed(2)
    guide(X)
    pyro.set_rng_seed(3)
    expected, grads = step(TraceEnum_ELBO(max_plate_nesting=1), mixture, guide, X)
    pyro.set_rng_seed(3)
    loss, found = step(bound(1, max_plate_nesting=1), mixture, guide, X)
    torch.testing.assert_close(loss, expected)
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad)


def vectors(x: Tensor) -> None:
    """A class and a vector for each datum."""
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Bernoulli(0.3), infer=SUM)
        z = pyro.sample("z", dist.Normal(torch.tensor([0.5, -1.0]), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1) + 2 * y, 1.0), obs=x)


def guide_of_vectors(x: Tensor) -> None:
    locs = pyro.param("locs", torch.linspace(-1, 1, 12).reshape(6, 2))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(locs[: len(x)], 1.0).to_event(1))


@pytest.mark.parametrize("size", [1, 6])
def test_the_dimensions_of_a_vector_are_not_those_of_a_sum(size: int) -> None:
    results = []
    for bound in (TraceEnum_ELBO, Estimator_ELBO):
        pyro.set_rng_seed(8)
        results.append(step(bound(max_plate_nesting=1), vectors, guide_of_vectors, X[:size]))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1]["locs"], results[1][1]["locs"])
    found = recover(vectors, guide_of_vectors, X[:size], num_samples=2, marginals=True)
    z, probs = found["z"].sum(-1, keepdim=True), torch.tensor([0.7, 0.3])
    fit = dist.Normal(z + torch.tensor([0.0, 2.0]), 1.0).log_prob(X[:size, None])
    torch.testing.assert_close(found["y"], (probs.log() + fit).softmax(-1))


def test_the_importance_weighted_bound_of_sums_alone_is_the_evidence() -> None:
    x = torch.linspace(-1, 2, 5)
    loss = ImportanceWeighted_ELBO(3, vectorize_particles=True).loss(chain, nothing, x)
    assert loss == pytest.approx(-forward(x).item(), rel=1e-10)


def test_our_guides_leave_marked_sites_out() -> None:
    guide = AutoDiscrete(switches)
    assert list(guide(X)) == ["on"]
    loss, _ = step(Estimator_ELBO(default="enumerate"), switches, guide, X)
    assert torch.isfinite(loss)


def test_impossible_states_have_finite_gradients() -> None:
    def model(x: Tensor) -> None:
        probs = pyro.param("probs", torch.tensor([[1.0, 0.0], [0.4, 0.6]]))
        z = torch.zeros((), dtype=torch.long)
        for t in pyro.markov(range(len(x))):  # the state 1 is never reached from 0
            z = pyro.sample(f"z_{t}", dist.Categorical(Vindex(probs)[z]), infer=SUM)
            pyro.sample(f"x_{t}", dist.Normal(z + 0.0, 1.0), obs=x[t])

    loss, grads = step(Estimator_ELBO(), model, nothing, X)
    assert loss.item() == pytest.approx(-dist.Normal(0.0, 1.0).log_prob(X).sum().item())
    assert torch.isfinite(grads["probs"]).all()


def impossible_datum(x: Tensor) -> None:
    """No state can have the first datum."""
    weights = pyro.param("weights", torch.tensor([0.3, -0.2]))
    lows = pyro.param("lows", torch.tensor([-1.0, -0.2]))
    with pyro.plate("data", 2):
        z = pyro.sample("z", dist.Categorical(logits=weights), infer=SUM)
        pyro.sample("x", dist.Uniform(lows[z], lows[z] + 1 + z), obs=x)


def impossible_step(x: Tensor) -> None:
    probs = pyro.param("probs", torch.tensor([[0.3, 0.7], [0.5, 0.5]]))
    lows = pyro.param("lows", torch.tensor([-1.0, -0.2]))
    z = torch.tensor(0)
    for t in pyro.markov(range(2)):
        z = pyro.sample(f"z{t}", dist.Categorical(Vindex(probs)[z]), infer=SUM)
        pyro.sample(f"x{t}", dist.Uniform(lows[z], lows[z] + 1), obs=x[t])


@pytest.mark.parametrize("bound", [Estimator_ELBO, ImportanceWeighted_ELBO])
@pytest.mark.parametrize("model", [impossible_datum, impossible_step])
def test_impossible_data_have_an_infinite_loss_and_finite_gradients(
    model: Any, bound: Any
) -> None:
    x = torch.tensor([5.0, 0.3])
    with pyro.validation_enabled(False):
        elbo = bound(1, max_plate_nesting=1)
        assert elbo.loss(model, nothing, x) == float("inf")
        loss, found = step(elbo, model, nothing, x)
        differentiable = elbo.differentiable_loss(model, nothing, x)
        _, expected = step(TraceEnum_ELBO(max_plate_nesting=1), model, nothing, x)
    assert loss == differentiable == float("inf")
    grads = torch.autograd.grad(differentiable, [*pyro.get_param_store()._params.values()])
    for (name, grad), other in zip(found.items(), grads, strict=True):
        assert torch.equal(grad, other)
        torch.testing.assert_close(grad, expected[name])
    learns = any(grad.abs().max() > 0.1 for grad in found.values())
    assert learns == (model is impossible_datum)  # from the other datum


def test_sums_of_nothing_change_nothing() -> None:
    def plain(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            on = pyro.sample("on", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(on, 1.0), obs=x)

    def marked(x: Tensor) -> None:
        config_enumerate(plain, default="parallel")(x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("on", dist.Bernoulli(logits=pyro.param("q", torch.tensor(0.4))))

    results = []
    for model in (plain, marked):  # the guide has the marked site
        pyro.set_rng_seed(4)
        results.append(step(Estimator_ELBO(default="disarm"), model, guide, X))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1]["q"], results[1][1]["q"])


def test_minibatches_average_to_the_full_loss() -> None:
    def model(size: int) -> None:
        locs = pyro.param("locs", torch.tensor([-1.0, 2.0]))
        with pyro.plate("data", 4, subsample_size=size) as index:
            z = pyro.sample("z", dist.Bernoulli(0.3), infer=SUM)
            pyro.sample("x", dist.Normal(locs[z.long()], 1.0), obs=X[index])

    full = Estimator_ELBO().loss(model, nothing, 4)
    pyro.set_rng_seed(5)
    elbo = Estimator_ELBO()
    losses = torch.tensor([elbo.loss(model, nothing, 2) for _ in range(400)])
    assert abs(losses.mean() - full) < 5 * losses.std() / 20


# Refusals


def scaled_in_parts(x: Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(0.3), infer=SUM)
    with pyro.plate("data", 12, subsample=torch.arange(len(x))):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def sequential(x: Tensor) -> None:
    pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "sequential"})


def sampled(x: Tensor) -> None:
    pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel", "num_samples": 3})


def endless(x: Tensor) -> None:
    pyro.sample("z", dist.Poisson(3.0), infer=SUM)


def indexed(x: Tensor) -> None:
    rows = pyro.sample("a", dist.Bernoulli(0.3), infer=SUM)
    z = pyro.sample("z", dist.Bernoulli(0.3), infer=SUM)
    pyro.sample("x", dist.Normal(torch.zeros(4, 1, 1) + rows + z, 1.0), obs=torch.tensor(0.0))


def misaligned(x: Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(0.3), infer=SUM)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0), obs=x)


def unmarked(x: Tensor) -> None:
    pyro.sample("z", dist.Bernoulli(0.3))


REFUSED = {
    scaled_in_parts: r"'z' and 'x'.*different scales.*Give them one scale",
    sequential: r"'z'.*'sequential'.*only 'parallel' is supported",
    sampled: r"'z'.*num_samples.*= 3.*summed exactly",
    endless: r"'z'.*Poisson cannot list its values. Sample it in the guide",
    indexed: r"'x'.*neither a plate's nor that of \['a', 'z'\].*Vindex",
    misaligned: r"'x': its log_prob has shape \(2, 1, 6\).*Vindex",
    unmarked: r"'z' is missing from the guide.*'enumerate': 'parallel'",
}


@pytest.mark.parametrize("model", REFUSED, ids=lambda model: model.__name__)
def test_what_cannot_be_summed_is_refused_by_name(model: Any) -> None:
    pyro.enable_validation(model is not indexed)
    with pytest.raises(ValueError, match=REFUSED[model]):
        Estimator_ELBO().loss(model, nothing, X)


def test_enumeration_of_a_guides_plate_inside_a_sum_is_refused() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3), infer=SUM)
        with pyro.plate("data", len(x)):
            on = pyro.sample("on", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(on + z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("on", dist.Bernoulli(0.4))

    with pytest.raises(ValueError, match="enumerated site 'on' inside it"):
        Estimator_ELBO(default="enumerate").loss(model, guide, X)


def test_recovery_is_given_the_guides_draw() -> None:
    pyro.set_rng_seed(7)
    found = recover(switches, guide_of_switches, X, num_samples=3, marginals=True)
    assert found["on"].shape == (3, 6)
    assert found["z"].shape == (3, 6, 3)
    weights, locs, shift = (pyro.param(name) for name in ("weights", "locs", "shift"))
    fit = dist.Normal(locs + shift * found["on"].unsqueeze(-1), 1.0).log_prob(X.unsqueeze(-1))
    seen = (X > -1).unsqueeze(-1)
    expected = (weights.log_softmax(-1) + fit.masked_fill(~seen, 0.0)).softmax(-1)
    torch.testing.assert_close(found["z"], expected)
    assert recover(switches, guide_of_switches, X, num_samples=2)["z"].shape == (2, 6)


def test_pyros_own_losses_are_unchanged() -> None:
    """The allocator of dimensions belongs to the process, and is left as it was."""
    x = X[:3]
    expected = TraceEnum_ELBO(max_plate_nesting=0).loss(chain, nothing, x)

    def guide(x: Tensor) -> None:
        with poutine.block():
            Estimator_ELBO().loss(chain, nothing, x)

    inside = TraceEnum_ELBO(max_plate_nesting=0).loss(chain, guide, x)
    assert inside == pytest.approx(expected)
    assert Trace_ELBO().loss(unmarked, unmarked, x) == pytest.approx(0.0)


def test_finding_the_nesting_moves_neither_generators_nor_statistics() -> None:
    norm = torch.nn.BatchNorm1d(2)

    def model() -> None:
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])), infer=SUM)
            pyro.sample("x", dist.Normal(m[z], 1.0), obs=torch.tensor([0.2, -0.5, 1.0]))

    def guide() -> None:
        loc = norm(pyro.param("loc", torch.tensor([[0.1, 0.2], [0.5, -0.3]]))).mean(0)
        pyro.sample("m", dist.Normal(loc, 1.0).to_event(1))

    losses = []
    for options in ({}, {"max_plate_nesting": 1}):
        pyro.clear_param_store()
        norm.reset_running_stats()
        pyro.set_rng_seed(0)
        losses.append(Estimator_ELBO(**options).loss_and_grads(model, guide))
        assert norm.num_batches_tracked == 1
    assert losses[0] == losses[1]
