"""Guides that are modules: of ``pyro.module``, ``PyroModule`` and Pyro's autoguides."""

from __future__ import annotations

import copy
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.problems import worst_z
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiscreteParallel,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

from pyro_gumbel.estimators import (
    Enumerate,
    LeaveOneOut,
    MovingAverage,
    NeuralBaseline,
    Pathwise,
    Rebar,
    ReinMax,
    Score,
)
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

DATA = torch.tensor([[1.0, 0.2], [-0.3, 0.8], [0.5, -1.0]])


def model(x):
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.1, 0.2, 0.7])))
        means = z @ torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, -1.0]])
        pyro.sample("x", dist.Normal(means, 1.0).to_event(1), obs=x)


def exact_posterior(x):
    means = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, -1.0]])
    log_x = dist.Normal(means, 1.0).to_event(1).log_prob(x.unsqueeze(1))
    return (log_x + torch.tensor([0.1, 0.2, 0.7]).log()).softmax(-1)


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(2, 3)
        self.bias = PyroParam(torch.zeros(3))

    def forward(self, x):
        with pyro.plate("n", len(x)):
            pyro.sample("z", dist.OneHotCategorical(logits=self.encode(x) + self.bias))


class ModelModule(PyroModule):
    def forward(self, x):
        model(x)


def train(guide, num_steps=150, loss=None, **options):
    loss = loss or Estimator_ELBO(8, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss)
    for _ in range(num_steps):
        svi.step(DATA)


def test_pyro_module():
    """A network handed to ``pyro.module`` is trained: three points, three free rows."""
    encoder = nn.Linear(2, 3)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("n", len(x)):
            pyro.sample("z", dist.OneHotCategorical(logits=encoder(x)))

    train(config_gradient(guide, Score(LeaveOneOut())), 200)
    gap = (encoder(DATA).softmax(-1) - exact_posterior(DATA)).abs().max()
    assert gap < 0.05


@pytest.mark.parametrize("estimator", [ReinMax(), Score(LeaveOneOut()), Enumerate()], ids=repr)
def test_pyro_module_class(estimator):
    """The configured module trains the original's parameters, here by 50 particles a step.

    The cost is quadratic in the one-hot, so that ReinMax goes to the exact posterior too.
    """
    guide = Guide()
    particles = 1 if isinstance(estimator, Enumerate) else 50
    loss = Estimator_ELBO(particles, vectorize_particles=True)
    train(config_gradient(guide, estimator), 300, loss)
    with torch.no_grad():
        logits = guide.encode(DATA) + guide.bias
    assert (logits.softmax(-1) - exact_posterior(DATA)).abs().max() < 0.05


def test_configured_module_is_another_face_of_the_same():
    guide = Guide()
    before = copy.deepcopy(guide.state_dict())
    kind, keys = type(guide), set(guide.__dict__)
    configured = config_gradient(guide, {"z": ReinMax()})
    configured(DATA)
    # The original is as it was, and unconfigured.
    assert type(guide) is kind
    assert set(guide.__dict__) == keys
    for name, value in guide.state_dict().items():
        assert torch.equal(value, before[name])
    trace = pyro.poutine.trace(guide).get_trace(DATA)
    assert "gradient" not in trace.nodes["z"]["infer"]
    # The face is of its class and shares its parameters.
    assert isinstance(configured, Guide)
    assert isinstance(configured, PyroModule)
    shared = dict(configured.named_parameters())
    assert all(shared[name] is value for name, value in guide.named_parameters())
    trace = pyro.poutine.trace(configured).get_trace(DATA)
    assert trace.nodes["z"]["infer"]["gradient"] == configured.gradient_messenger.config["z"]


def test_configured_module_is_copied_and_pickled():
    guide = config_gradient(Guide(), {"z": ReinMax(1.3)})
    for again in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        trace = pyro.poutine.trace(again).get_trace(DATA)
        assert repr(trace.nodes["z"]["infer"]["gradient"]) == "ReinMax(1.3)"
        for name, value in again.state_dict().items():
            assert torch.equal(value, guide.state_dict()[name])
            assert value.data_ptr() != guide.state_dict()[name].data_ptr()


@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
def test_loss_as_a_module(local):
    """``Estimator_ELBO()(model, guide)`` under torch's own optimiser, both ways."""
    with pyro.settings.context(module_local_params=local):
        guide = Guide()
        configured = config_gradient(guide, Score(LeaveOneOut()))
        loss = Estimator_ELBO(8, vectorize_particles=True)(ModelModule(), configured)
        loss(DATA)
        optimiser = torch.optim.Adam(loss.parameters(), lr=0.1)
        for _ in range(200):
            optimiser.zero_grad()
            loss(DATA).backward()
            optimiser.step()
        assert len(list(pyro.get_param_store().keys())) == (0 if local else 3)
        with torch.no_grad():
            logits = guide.encode(DATA) + guide.bias
    assert (logits.softmax(-1) - exact_posterior(DATA)).abs().max() < 0.05


def test_loss_module_holds_the_estimators():
    network = nn.Linear(2, 1)
    estimator = Score(NeuralBaseline(network, "x"))
    loss = Estimator_ELBO()(ModelModule(), config_gradient(Guide(), {"z": estimator}))
    names = dict(loss.named_parameters())
    assert any(value is network.weight for value in names.values())
    loss(DATA).backward()
    assert network.weight.grad.abs().sum() > 0


def test_loss_module_resumes_bit_for_bit():
    """Default estimators included: their moving average is in the module's state."""

    def make():
        pyro.clear_param_store()
        torch.manual_seed(1)
        loss = Estimator_ELBO()(ModelModule(), Guide())
        return loss, torch.optim.Adam(loss.parameters(), lr=0.1)

    def run(loss, optimiser, seeds):
        out = []
        for seed in seeds:
            pyro.set_rng_seed(seed)
            optimiser.zero_grad()
            value = loss(DATA)
            value.backward()
            out.append(value.item())
            optimiser.step()
        return out, [parameter.detach().clone() for parameter in loss.parameters()]

    loss, optimiser = make()
    run(loss, optimiser, range(5))
    buffer = io.BytesIO()
    torch.save({"loss": loss.state_dict(), "optim": optimiser.state_dict()}, buffer)
    straight = run(loss, optimiser, range(5, 10))
    loss, optimiser = make()
    buffer.seek(0)
    state = torch.load(buffer)
    loss.load_state_dict(state["loss"])
    optimiser.load_state_dict(state["optim"])
    resumed = run(loss, optimiser, range(5, 10))
    assert resumed[0] == straight[0]
    assert all(torch.equal(a, b) for a, b in zip(resumed[1], straight[1], strict=True))


@pytest.mark.parametrize("place", ["dict", "name in a dict", "callable", "infer", "default"])
def test_a_loss_module_has_the_parameters_of_estimators(place):
    rebar = Rebar()

    class Configured(Guide):
        def forward(self, x):
            with poutine.infer_config(config_fn=lambda site: {"gradient": rebar}):
                super().forward(x)

    guide = {
        "dict": lambda: config_gradient(Guide(), {"z": rebar}),
        "name in a dict": lambda: config_gradient(Guide(), {"z": "rebar"}),
        "callable": lambda: config_gradient(Guide(), lambda site: rebar),
        "infer": Configured,
        "default": Guide,
    }[place]()
    loss = Estimator_ELBO(default="rebar" if place == "default" else "auto")(ModelModule(), guide)
    loss(DATA)
    names = [name.rpartition(".")[2] for name, _ in loss.named_parameters()]
    assert names.count("log_temperature") == 1
    optimiser = torch.optim.Adam(loss.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in loss.state_dict().items() if "log_" in name}
    for _ in range(3):
        optimiser.zero_grad()
        loss(DATA).backward()
        optimiser.step()
    assert all(not torch.equal(loss.state_dict()[name], value) for name, value in before.items())


def test_neural_baseline_is_trained_by_the_users_optimiser():
    """SVI sees its parameters; the squared error falls."""
    network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    before = [parameter.detach().clone() for parameter in network.parameters()]
    estimator = Score(NeuralBaseline(network, "x"))
    train(config_gradient(Guide(), {"z": estimator}), 5)
    assert all(not torch.equal(a, b) for a, b in zip(network.parameters(), before, strict=True))
    names = set(pyro.get_param_store().keys())
    assert {name for name in names if name.startswith("gradient$z")} != set()
    # A second run of the store's parameters: the optimiser knows each once.
    optimiser = pyro.optim.Adam({"lr": 0.1})
    svi = SVI(model, config_gradient(Guide(), {"z": estimator}), optimiser, Estimator_ELBO())
    for _ in range(3):
        svi.step(DATA)
    assert len(optimiser.optim_objs) == 3 + 4


def test_bayesian_module_as_model():
    """``PyroSample`` sites of a module are latent sites like others."""

    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.weight = PyroSample(dist.Normal(0.0, 1.0))

        def forward(self, x):
            weight = self.weight
            flip = pyro.sample("flip", dist.Bernoulli(0.3))
            with pyro.plate("n", len(x)):
                pyro.sample("y", dist.Normal(weight * x[:, 0] * (1 - 2 * flip), 1.0), obs=x[:, 1])

    def guide(x):
        pyro.sample("weight", dist.Normal(pyro.param("loc", torch.tensor(0.2)), 0.5))
        pyro.sample("flip", dist.Bernoulli(logits=pyro.param("odds", torch.tensor(0.1))))

    Estimator_ELBO(3).loss_and_grads(Regression(), guide, DATA)
    store = pyro.get_param_store()._params
    assert store["loc"].grad.abs() > 0
    assert store["odds"].grad.abs() > 0


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
