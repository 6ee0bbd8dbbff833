"""AutoAmortized against exact posteriors; subsampling, plates, estimators, state, errors."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import init_to_value
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_gumbel import estimators
from pyro_gumbel.distributions import OneHot
from pyro_gumbel.estimators import Exponential, GumbelStraightThrough, ReinMax, Score
from pyro_gumbel.guides import AutoAmortized
from pyro_gumbel.infer import Estimator_ELBO, config_gradient, estimator_names

WEIGHTS = torch.tensor([0.2, 0.5, 0.3])
LOCS = torch.tensor([-2.0, 0.3, 1.5])
X = torch.tensor([-1.7, -0.2, 0.4, 2.5, 0.9])


def mixture(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.OneHotCategorical(WEIGHTS.to(x)))
        pyro.sample("x", dist.Normal(z @ LOCS.to(x), 1.0), obs=x)


def log_joint(x: Tensor) -> Tensor:
    return WEIGHTS.to(x).log() + dist.Normal(LOCS.to(x), 1.0).log_prob(x[:, None])


def column(x: Tensor) -> Tensor:
    return x[:, None]


def exact_guide(model: Any = mixture, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """The posterior's logits are linear in the datum: a head on x itself can be exact."""
    guide = AutoAmortized(model, column, **options)
    guide.setup(X.to(dtype))
    linear = guide.heads["z"].linear
    with torch.no_grad():
        linear.weight.copy_(LOCS[:, None])
        linear.bias.copy_(WEIGHTS.log() - LOCS**2 / 2)
    return guide


# Exactness


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


# Subsampling

TOTAL = 12
CLASSES = torch.arange(TOTAL) % 4
MATCH = 0.97  # a datum is its latent class, or else any other at 0.01


def likelihood(z: Tensor) -> Any:
    return dist.Categorical(MATCH * z + (1 - MATCH) / 3 * (1 - z))


def from_argument(x: Tensor) -> None:
    with pyro.plate("data", TOTAL, subsample_size=len(x)):
        z = pyro.sample("z", OneHot(torch.ones(4)))
        pyro.sample("x", likelihood(z), obs=x)


def from_indices(x: Tensor, indices: Tensor) -> None:
    with pyro.plate("data", TOTAL, subsample=indices) as chosen:
        z = pyro.sample("z", OneHot(torch.ones(4)))
        pyro.sample("x", likelihood(z), obs=CLASSES[chosen])


def inside(x: Tensor, size: int) -> None:
    with pyro.plate("data", TOTAL, subsample_size=size):
        batch = pyro.subsample(x, event_dim=0)
        z = pyro.sample("z", OneHot(torch.ones(4)))
        pyro.sample("x", likelihood(z), obs=batch)


def all_rows(x: Tensor, *_: Any) -> Tensor:
    return nn.functional.one_hot(x, 4).float()


def present_rows(x: Tensor, *_: Any) -> Tensor:
    return all_rows(pyro.subsample(x, event_dim=0))


def some_of(x: Tensor, size: int) -> tuple[Tensor]:
    return (x[torch.randperm(TOTAL)[:size]],)


def some_indices(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    indices = torch.randperm(TOTAL)[:size]
    return x[indices], indices


def everything(x: Tensor, size: int) -> tuple[Tensor, int]:
    return x, size


SUBSAMPLED = {
    "argument": (from_argument, all_rows, some_of),
    "indices": (from_indices, all_rows, some_indices),
    "inside": (inside, all_rows, everything),
    "both inside": (inside, present_rows, everything),
}


@pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorized"])
@pytest.mark.parametrize("first", [TOTAL, 5], ids=["set up on all", "set up on a part"])
@pytest.mark.parametrize("way", SUBSAMPLED)
def test_subsampling(way: str, first: int, vectorize: bool) -> None:
    """Every row meets its own datum, and the bound is scaled to all data."""
    model, encoder, arguments = SUBSAMPLED[way]
    guide = AutoAmortized(model, encoder)
    guide.setup(*arguments(CLASSES, first))
    with torch.no_grad():  # the guide is sure of the datum's class
        guide.heads["z"].linear.weight.copy_(200 * torch.eye(4))
    elbo = Estimator_ELBO(2, vectorize_particles=vectorize, max_plate_nesting=1)
    expected = -TOTAL * (torch.tensor(0.25).log() + torch.tensor(MATCH).log()).item()
    for size in (5, TOTAL, 3):
        loss = elbo.loss(model, guide, *arguments(CLASSES, size))
        assert loss == pytest.approx(expected, rel=1e-5)


def test_minibatches_of_any_size() -> None:
    guide = exact_guide()
    elbo = Estimator_ELBO(max_plate_nesting=1)
    for x in (X[:2].double(), X.double(), X[:1].double()):
        expected = -log_joint(x).logsumexp(-1).sum().item()
        assert elbo.loss(mixture, guide, x) == pytest.approx(expected, rel=1e-6)


def test_create_plates_is_asked_first() -> None:
    calls = []

    def create_plates(x: Tensor) -> pyro.plate:
        calls.append(len(x))
        return pyro.plate("data", len(x), dim=-1)

    guide = AutoAmortized(mixture, column, create_plates=create_plates)
    assert guide(X)["z"].shape == (5, 3)
    assert calls


# Plates


def topics(counts: Tensor) -> None:
    """Documents to the left of words, and a plate of topics that has nothing to do with either."""
    documents, words = counts.shape
    with pyro.plate("topics", 2):
        pyro.sample("weight", dist.Gamma(2.0, 1.0))
    with pyro.plate("documents", documents, dim=-2):
        length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
        with pyro.plate("words", words, dim=-1):
            topic = pyro.sample("topic", dist.Categorical(torch.ones(3)))
            pyro.sample("counts", dist.Poisson(length * (1 + topic)), obs=counts)


@pytest.mark.parametrize("autoregressive", [False, True])
@pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorized"])
def test_nested_plates(vectorize: bool, autoregressive: bool) -> None:
    counts = torch.tensor([[1.0, 2.0, 0.0, 4.0], [0.0, 1.0, 1.0, 3.0], [5.0, 2.0, 1.0, 0.0]])
    guide = AutoAmortized(topics, nn.Linear(4, 6), autoregressive=autoregressive)
    values = guide(counts)
    assert {name: tuple(value.shape) for name, value in values.items()} == {
        "weight": (2,),
        "length": (3, 1),
        "topic": (3, 4),
    }
    assert guide.heads["topic"].linear.weight.shape == (12, 7 if autoregressive else 6)
    elbo = Estimator_ELBO(3, vectorize_particles=vectorize)
    for batch in (counts, counts[:2]):
        assert torch.isfinite(elbo.loss_and_grads(topics, guide, batch))


def test_rows_of_a_nested_site_belong_to_their_datum() -> None:
    counts = torch.rand(3, 4).round()
    guide = AutoAmortized(topics, lambda counts: torch.eye(3)[: len(counts)])
    guide.setup(counts)
    raw = torch.randn(3, 4, 3)  # documents, words, topics
    with torch.no_grad():
        guide.heads["topic"].linear.weight.copy_(raw.flatten(1).T)
        guide.heads["topic"].linear.bias.zero_()
    probs = guide.posterior(counts)["topic"].probs
    torch.testing.assert_close(probs, raw.softmax(-1))


@pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorized"])
def test_enumerated_values_reach_later_heads(vectorize: bool) -> None:
    guide = AutoAmortized(
        coupled_bits, column, autoregressive=True, gradient={"first": "enumerate"}
    )
    elbo = Estimator_ELBO(2, vectorize_particles=vectorize, max_plate_nesting=1)
    assert torch.isfinite(elbo.loss_and_grads(coupled_bits, guide, X))
    assert guide.heads["second"].linear.weight.grad[:, -1].abs() > 0


# Estimators


def mixed(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.OneHotCategorical(WEIGHTS))
        b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.3)))
        pyro.sample("x", dist.Normal(z @ LOCS + b, 1.0), obs=x)


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


# Medians, quantiles


def test_median_and_quantiles_of_a_beta() -> None:
    """Which keeps its parameters in a distribution of another family."""

    def model(x: Tensor) -> None:
        share = pyro.sample("share", dist.Beta(2.0, 3.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(share))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    guide = AutoAmortized(model, lambda x: x, gradient="score")
    x = torch.randn(5, 2)
    guide(x)
    assert 0 < guide.median(x)["share"] < 1
    low, high = guide.quantiles([0.1, 0.9], x)["share"]
    assert 0 < low < high < 1


def test_median_and_quantiles() -> None:
    def model(x: Tensor) -> None:
        pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.OneHotCategorical(WEIGHTS))
            pyro.sample("b", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("k", dist.Categorical(WEIGHTS))
            pyro.sample("n", dist.LogNormal(1.0, 2.0))
            pyro.sample("u", dist.Uniform(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    guide = AutoAmortized(model, lambda x: torch.zeros(len(x), 1))
    state = torch.get_rng_state()
    median = guide.median(X)
    assert torch.equal(median["z"], torch.tensor([0.0, 1.0, 0.0]).expand(5, 3))
    assert torch.equal(median["b"], torch.zeros(5))
    assert torch.equal(median["k"], torch.ones(5, dtype=torch.long))
    torch.testing.assert_close(median["n"], torch.full((5,), 1.0).exp())
    assert median["u"].shape == (5, 2)
    quantiles = guide.quantiles([0.25, 0.5, 0.75], X)
    assert set(quantiles) == {"rate", "b", "k", "n", "u"}
    torch.testing.assert_close(quantiles["n"][1], median["n"])
    normal = torch.distributions.Normal(1.0, 2.0)
    torch.testing.assert_close(
        quantiles["n"][:, 0], normal.icdf(torch.tensor([0.25, 0.5, 0.75])).exp()
    )
    assert quantiles["b"][:, 0].tolist() == [0.0, 0.0, 1.0]
    assert quantiles["k"][:, 0].tolist() == [1, 1, 2]
    assert quantiles["u"].shape == (3, 5, 2)
    torch.testing.assert_close(quantiles["u"][1], median["u"])
    assert (quantiles["rate"].diff() > 0).all()
    assert torch.get_rng_state().shape == state.shape


# State


def trained(encoder: Any, steps: int = 3) -> Any:
    gradient = {
        "z": GumbelStraightThrough(Exponential(1.0, 0.5, 0.01)),
        "b": Score(estimators.MovingAverage()),
    }
    guide = AutoAmortized(mixed, encoder, gradient=gradient)
    svi = SVI(mixed, guide, pyro.optim.Adam({"lr": 0.1}), Estimator_ELBO())
    for _ in range(steps):
        svi.step(X)
    return guide


class Encoder(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](1, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[:, None]).relu()


@pytest.mark.parametrize(
    "encoder", [Encoder, lambda: nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 4))]
)
def test_state_dict_holds_encoder_heads_and_estimators(encoder: Any) -> None:
    first = trained(encoder())
    before = first.posterior(X)["z"].probs
    assert sum("linear" in key for key in first.state_dict() if key.startswith("heads")) == 4
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    pyro.clear_param_store()
    second = trained(encoder(), steps=0)
    second.setup(X)
    assert not torch.equal(second.posterior(X)["z"].probs, before)
    second.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    assert torch.equal(second.posterior(X)["z"].probs, before)
    assert second.gradient["z"].temperature.step_count == 3
    assert [p.shape for p in second.parameters()] == [p.shape for p in first.parameters()]


def test_encoder_is_trained() -> None:
    encoder = Encoder()
    before = [parameter.clone() for parameter in encoder.parameters()]
    trained(encoder)
    assert all(
        not torch.equal(old, new) for old, new in zip(before, encoder.parameters(), strict=True)
    )


def test_state_before_setup_is_refused() -> None:
    state = trained(Encoder()).state_dict()
    pyro.clear_param_store()
    with pytest.raises(RuntimeError, match=r"guide.setup\(\*args\).*before guide.load_state_dict"):
        AutoAmortized(mixed, Encoder()).load_state_dict(state)


def test_copies_and_pickles() -> None:
    guide = trained(Encoder())
    expected = guide.posterior(X)["z"].probs
    twin = copy.deepcopy(guide)
    assert torch.equal(twin.posterior(X)["z"].probs, expected)
    assert twin.heads is not guide.heads
    read = pickle.loads(pickle.dumps(guide))
    with pytest.raises(ValueError, match="was unpickled, and pickling drops its model"):
        read(X)
    read.model = mixed
    assert torch.equal(read.posterior(X)["z"].probs, expected)
    assert torch.equal(guide.posterior(X)["z"].probs, expected)


@pytest.mark.cuda
def test_on_the_gpu() -> None:
    def model(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), device=x.device), 1.0))
        with pyro.plate("data", len(x), device=x.device):
            z = pyro.sample("z", dist.OneHotCategorical(WEIGHTS.to(x.device)))
            pyro.sample("x", dist.Normal(z @ LOCS.to(x.device), scale), obs=x)

    guide = AutoAmortized(model, Encoder().cuda(), gradient={"z": "reinmax"}, autoregressive=True)
    elbo = Estimator_ELBO(2, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo)
    losses = [float(svi.step(X.cuda())) for _ in range(5)]
    assert all(torch.tensor(losses).isfinite())
    assert all(parameter.is_cuda for parameter in guide.parameters())


# Errors


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


def test_a_factor_is_data() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(WEIGHTS))
            pyro.factor("likelihood", dist.Normal(z @ LOCS, 1.0).log_prob(x))

    assert AutoAmortized(model, column)(X)["z"].shape == (5, 3)


def test_a_named_plate_decides() -> None:
    guide = AutoAmortized(two_plates, column, plate="left")
    guide.setup(X)
    assert hasattr(guide.heads["z_left"], "linear")
    assert hasattr(guide.heads["z_right"], "raw")
    with pytest.raises(ValueError, match="'right' had 5 elements .* and has 3 now"):
        guide(X[:3])


def test_structure_has_to_stay() -> None:
    def model(x: Tensor) -> None:
        if len(x) > 3:
            mixture(x)

    guide = AutoAmortized(model, column)
    guide(X)
    with pytest.raises(
        ValueError, match=r"had the plates \['data'\] when the guide was set up.*are missing"
    ):
        guide(X[:2])


def test_functions_that_hide_parameters_warn() -> None:
    hidden = nn.Linear(1, 2)
    with pytest.warns(UserWarning, match="optimiser will not train them"):
        AutoAmortized(mixture, lambda x: hidden(x[:, None]))(X)

    def registered(x: Tensor) -> Tensor:
        return pyro.module("encoder", hidden)(x[:, None])

    AutoAmortized(mixture, registered)(X)


def test_site_names_of_any_kind() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for name in ("a.b", "a_b", "values", "type"):
                pyro.sample(name, dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    guide = AutoAmortized(model, column)
    assert list(guide(X)) == ["a.b", "a_b", "values", "type"]
    assert len(guide.heads) == 4
