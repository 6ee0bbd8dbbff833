"""AutoAmortized against exact posteriors; its estimators and errors."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.guide_programs import LOCS, WEIGHTS, X, column, log_joint, mixed, mixture
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import init_to_value
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_gumbel import estimators
from pyro_gumbel.distributions import OneHot
from pyro_gumbel.estimators import ReinMax, Score
from pyro_gumbel.guides import AutoAmortized
from pyro_gumbel.infer import Estimator_ELBO, config_gradient, estimator_names


def exact_guide(model: Any = mixture, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """The posterior's logits are linear in the datum: a head on x itself can be exact."""
    guide = AutoAmortized(model, column, **options)
    guide.setup(X.to(dtype))
    linear = guide.heads["z"].linear
    with torch.no_grad():
        linear.weight.copy_(LOCS[:, None])
        linear.bias.copy_(WEIGHTS.log() - LOCS**2 / 2)
    return guide


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorized"])
def test_exact_posterior_gives_the_evidence_in_every_draw(
    vectorize: bool, dtype: torch.dtype
) -> None:
    x = X.to(dtype)
    guide = exact_guide(dtype=dtype)
    posterior = guide.posterior(x)["z"]
    torch.testing.assert_close(posterior.probs, log_joint(x).softmax(-1))
    elbo = Estimator_ELBO(num_particles=3, vectorize_particles=vectorize)
    loss = elbo.loss(mixture, guide, x)
    assert loss == pytest.approx(-log_joint(x).logsumexp(-1).sum().item(), rel=1e-5)


# At the posterior each draw gives the evidence, so the score function, like a sum, has no noise
# there, and training comes to rest. ReinMax has: with these particles, a standard deviation of up
# to 0.008 in a probability, over ten seeds.
AT_REST = 1e-4


FIVE_DEVIATIONS_OF_REINMAX = 0.04


@pytest.mark.parametrize(
    ("gradient", "distance"),
    [("enumerate", AT_REST), ("score", AT_REST), ("reinmax", FIVE_DEVIATIONS_OF_REINMAX)],
)
def test_training_finds_the_posterior(gradient: str, distance: float) -> None:
    guide = AutoAmortized(
        mixture, nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 8)), gradient=gradient
    )
    elbo = Estimator_ELBO(64, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(mixture, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99}), elbo)
    for _ in range(400):
        svi.step(X)
    probs = guide.posterior(X)["z"].probs
    torch.testing.assert_close(probs, log_joint(X).softmax(-1), rtol=0, atol=distance)


def coupled_bits(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        first = pyro.sample("first", dist.Bernoulli(torch.tensor(0.4)))
        second = pyro.sample("second", dist.Bernoulli(torch.tensor(0.5)))
        pyro.sample("x", dist.Normal(3 * (first - second), 1.0), obs=x)


def test_autoregressive_guide_follows_dependent_latents() -> None:
    x = torch.full((3,), 0.2)
    states = torch.cartesian_prod(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
    prior = dist.Bernoulli(torch.tensor([0.4, 0.5])).log_prob(states).sum(-1)
    joint = prior + dist.Normal(3 * (states[:, 0] - states[:, 1]), 1.0).log_prob(torch.tensor(0.2))
    evidence = 3 * joint.logsumexp(0).item()
    reached = {}
    for autoregressive in (False, True):
        pyro.clear_param_store()
        guide = AutoAmortized(
            coupled_bits,
            lambda x: torch.ones(len(x), 1),
            gradient="enumerate",
            autoregressive=autoregressive,
        )
        elbo = Estimator_ELBO(max_plate_nesting=1)
        svi = SVI(coupled_bits, guide, pyro.optim.Adam({"lr": 0.1}), elbo)
        for _ in range(300):
            svi.step(x)
        reached[autoregressive] = -svi.evaluate_loss(x)
    assert reached[True] == pytest.approx(evidence, abs=0.01)
    # Of two equal modes a product finds one.
    assert reached[False] < evidence - 1


def test_global_latents_have_parameters_of_their_own() -> None:
    """A normal mean with a normal prior: conjugate, so that the bound can be reached."""
    x = torch.tensor([1.0, 2.0, 4.0])

    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1e-3), obs=x)

    guide = AutoAmortized(
        model, column, init_loc_fn=init_to_value(values={"mean": torch.tensor(3.0)})
    )
    guide.setup(x)
    assert guide.heads["mean"].raw.shape == (2,)
    torch.testing.assert_close(
        guide.heads["mean"].raw,
        torch.tensor([3.0, 0.2]).log().where(torch.tensor([False, True]), torch.tensor(3.0)),
    )
    linear = guide.heads["z"].linear
    with torch.no_grad():  # z is x, almost exactly
        linear.weight.copy_(torch.tensor([[1.0], [0.0]]))
        linear.bias.copy_(torch.tensor([0.0, 1e-3]).log().nan_to_num(neginf=0.0))
    svi = SVI(
        model,
        poutine.block(guide, hide_fn=lambda msg: msg["type"] == "param" and "$z" in msg["name"]),
        pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.995}),
        Estimator_ELBO(16, vectorize_particles=True),
    )
    for _ in range(500):
        svi.step(x)
    fn = guide.posterior(x)["mean"]
    precision = 1 / 4 + 3
    assert fn.mean.item() == pytest.approx(x.sum().item() / precision, abs=0.03)
    assert fn.stddev.item() == pytest.approx(precision**-0.5, rel=0.05)


def test_minibatches_of_any_size() -> None:
    guide = exact_guide()
    elbo = Estimator_ELBO(max_plate_nesting=1)
    for x in (X[:2].double(), X.double(), X[:1].double()):
        expected = -log_joint(x).logsumexp(-1).sum().item()
        assert elbo.loss(mixture, guide, x) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorized"])
def test_enumerated_values_reach_later_heads(vectorize: bool) -> None:
    guide = AutoAmortized(
        coupled_bits, column, autoregressive=True, gradient={"first": "enumerate"}
    )
    elbo = Estimator_ELBO(2, vectorize_particles=vectorize, max_plate_nesting=1)
    assert torch.isfinite(elbo.loss_and_grads(coupled_bits, guide, X))
    assert guide.heads["second"].linear.weight.grad[:, -1].abs() > 0


@pytest.mark.parametrize("name", estimator_names())
def test_every_estimator_serves_the_sites_it_can(name: str) -> None:
    chosen = getattr(estimators, _class_of(name), None)
    sites = ["z", "b"]
    if chosen is not None:
        fns = {"z": OneHot(WEIGHTS), "b": dist.Bernoulli(torch.tensor(0.3))}
        sites = [site for site in sites if chosen().supports(fns[site])]
    guide = AutoAmortized(mixed, column, gradient=dict.fromkeys(sites, name))
    elbo = Estimator_ELBO(4, vectorize_particles=True, max_plate_nesting=1)
    loss = elbo.loss_and_grads(mixed, guide, X)
    assert torch.isfinite(loss)
    for site in ("z", "b"):
        assert guide.heads[site].linear.weight.grad.isfinite().all()
        assert guide.heads[site].linear.weight.grad.abs().sum() > 0


def _class_of(name: str) -> str:
    names = {exported.lower(): exported for exported in estimators.__all__}
    return names.get(name.replace("_", ""), name)


def infer_of(guide: Any) -> dict[str, Any]:
    trace = poutine.trace(guide).get_trace(X)
    return {name: trace.nodes[name]["infer"].get("gradient") for name in ("z", "b")}


def test_gradient_is_written_at_the_sites() -> None:
    chosen = ReinMax()
    assert infer_of(AutoAmortized(mixed, column)) == {"z": None, "b": None}
    assert infer_of(AutoAmortized(mixed, column, gradient=chosen)) == {"z": chosen, "b": chosen}
    guide = AutoAmortized(mixed, column, gradient={"z": chosen})
    assert infer_of(guide) == {"z": chosen, "b": None}
    # The outermost configuration wins.
    assert infer_of(config_gradient(guide, {"z": "score"})) == {"z": "score", "b": None}
    assert infer_of(guide) == {"z": chosen, "b": None}


def test_configured_guide_shares_its_parameters() -> None:
    guide = AutoAmortized(mixed, column)
    configured = config_gradient(guide, "reinmax")
    configured.setup(X)
    assert guide.heads is configured.heads
    assert list(guide.state_dict()) == list(configured.state_dict())
    before = guide.heads["z"].linear.weight.clone()
    svi = SVI(mixed, configured, pyro.optim.Adam({"lr": 0.1}), Estimator_ELBO())
    svi.step(X)
    assert not torch.equal(before, guide.heads["z"].linear.weight)


def test_learnable_estimators_are_found() -> None:
    baseline = estimators.NeuralBaseline(
        nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 1)), "x"
    )
    guide = AutoAmortized(mixed, column, gradient={"z": Score(baseline), "b": "reinmax"})
    guide.setup(X)
    module = Estimator_ELBO()(PyroModule(), guide)
    parameters = {id(parameter) for parameter in module.parameters()}
    assert {id(parameter) for parameter in baseline.parameters()} <= parameters
    svi = SVI(mixed, guide, pyro.optim.Adam({"lr": 0.1}), Estimator_ELBO())
    before = [parameter.clone() for parameter in baseline.parameters()]
    svi.step(X)
    assert all(
        not torch.equal(old, new) for old, new in zip(before, baseline.parameters(), strict=True)
    )


def no_plate(x: Tensor) -> None:
    z = pyro.sample("z", dist.OneHotCategorical(WEIGHTS))
    pyro.sample("x", dist.Normal(z @ LOCS, 1.0).expand([len(x)]).to_event(1), obs=x)


def all_observed(x: Tensor) -> None:
    pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(WEIGHTS), obs=torch.zeros(len(x)))
        pyro.sample("x", dist.Normal(LOCS[z.long()], 1.0), obs=x)


def two_plates(x: Tensor) -> None:
    for name in ("left", "right"):
        with pyro.plate(name, len(x)):
            z = pyro.sample(f"z_{name}", dist.OneHotCategorical(WEIGHTS))
            pyro.sample(f"x_{name}", dist.Normal(z @ LOCS, 1.0), obs=x)


def loop(x: Tensor) -> None:
    for i in pyro.plate("data", len(x)):
        z = pyro.sample(f"z_{i}", dist.OneHotCategorical(WEIGHTS))
        pyro.sample(f"x_{i}", dist.Normal(z @ LOCS, 1.0), obs=x[i])


def masked(x: Tensor) -> None:
    with pyro.plate("data", len(x)), poutine.mask(mask=x > 0):
        z = pyro.sample("z", dist.OneHotCategorical(WEIGHTS))
        pyro.sample("x", dist.Normal(z @ LOCS, 1.0), obs=x)


def inner_loop(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        for i in pyro.plate("inner", 2):
            pyro.sample(f"z_{i}", dist.OneHotCategorical(WEIGHTS))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def inner_subsample(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2), pyro.plate("inner", 4, subsample_size=2, dim=-1):
        pyro.sample("z", dist.OneHotCategorical(WEIGHTS))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(len(x), 2))


@pytest.mark.parametrize(
    ("model", "encoder", "options", "error", "match"),
    [
        (no_plate, column, {}, ValueError, r"no plate over its data.*with pyro.plate\('data'"),
        (all_observed, column, {}, ValueError, r"no latent site. Its sites \['x', 'z'\] are obs"),
        (
            two_plates,
            column,
            {},
            ValueError,
            r"\['left', 'right'\] has latent and observed sites. Choose",
        ),
        (loop, column, {}, ValueError, "no plate over its data"),
        (loop, column, {"plate": "data"}, ValueError, "'data' is sequential"),
        (mixture, column, {"plate": "dta"}, ValueError, "no plate 'dta' around a site.*'data'"),
        (masked, column, {}, ValueError, "'z' is masked in the model"),
        (inner_loop, column, {}, ValueError, "'z_0' is in the sequential plate 'inner'"),
        (inner_subsample, column, {"plate": "data"}, ValueError, "'inner' is subsampled"),
        (
            mixture,
            lambda x: torch.ones(4, 7),
            {},
            ValueError,
            r"shape \(4, 7\), .*plate 'data': .*N = 5",
        ),
        (mixture, lambda x: x, {}, ValueError, r"returned shape \(5,\), which does not match"),
        (
            mixture,
            lambda x: (x, x),
            {},
            TypeError,
            r"one Tensor of shape \(N, features\); got tuple",
        ),
        (mixture, 3, {}, TypeError, "encoder must be a module or a function"),
        (None, column, {}, TypeError, "model must be callable"),
        (mixture, column, {"init_scale": 0.0}, ValueError, "init_scale must be positive"),
        (mixture, column, {"gradient": {"x": "reinmax"}}, ValueError, "'x', which is observed"),
        (mixture, column, {"gradient": {"zz": "reinmax"}}, ValueError, "no latent site 'zz'"),
        (mixture, column, {"gradient": "reinmx"}, ValueError, "Did you mean 'reinmax'"),
    ],
)
def test_errors(
    model: Any, encoder: Any, options: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        AutoAmortized(model, encoder, **options)(X)


def test_a_named_plate_decides() -> None:
    guide = AutoAmortized(two_plates, column, plate="left")
    guide.setup(X)
    assert hasattr(guide.heads["z_left"], "linear")
    assert hasattr(guide.heads["z_right"], "raw")
    with pytest.raises(ValueError, match="'right' had 5 elements .* and has 3 now"):
        guide(X[:3])


def test_functions_that_hide_parameters_warn() -> None:
    hidden = nn.Linear(1, 2)
    with pytest.warns(UserWarning, match="optimiser will not train them"):
        AutoAmortized(mixture, lambda x: hidden(x[:, None]))(X)

    def registered(x: Tensor) -> Tensor:
        return pyro.module("encoder", hidden)(x[:, None])

    AutoAmortized(mixture, registered)(X)
