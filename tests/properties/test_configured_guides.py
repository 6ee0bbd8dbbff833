"""A configured guide copies, pickles, binds and introspects as the guide in it does."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import io
import multiprocessing
import pickle
import weakref

import pyro
import pyro.distributions as dist
import pyro.infer.autoguide as autoguide
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pyro_gumbel.estimators import (
    Exponential,
    GumbelStraightThrough,
    MovingAverage,
    NeuralBaseline,
    Rebar,
    ReinMax,
    Score,
)
from pyro_gumbel.guides import AutoAmortized, AutoDiscrete
from pyro_gumbel.infer import Estimator_ELBO, ImportanceWeighted_ELBO, config_gradient

X = torch.tensor([[1.0, 0.2], [-0.3, 0.8], [0.5, -1.0], [0.1, 0.1]])
LOGITS = torch.tensor([0.3, -0.2, 0.1])


def model(x, *, scale=1.0):
    with pyro.plate("n", len(x)):
        pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.5, 0.3, 0.2])))


def plain(x, *, scale=1.0):
    """Draw one category for each datum."""
    logits = pyro.param("logits", LOGITS.clone) * scale
    with pyro.plate("n", len(x)):
        return pyro.sample("z", dist.OneHotCategorical(logits=logits))


@config_gradient(config=GumbelStraightThrough(Exponential(1.0, 0.1, 0.1)))
def decorated(x, *, scale=1.0):
    return plain(x, scale=scale)


@config_gradient(config={"z": "rebar"})
@config_gradient(config="score")
def decorated_twice(x, *, scale=1.0):
    return plain(x, scale=scale)


class Net(nn.Module):
    """Holds a model and three ways to guide it."""

    def __init__(self):
        super().__init__()
        self.e = nn.Linear(2, 3)

    def model(self, x, *, scale=1.0):
        model(x)

    def guide(self, x, *, scale=1.0):
        """Encode."""
        with pyro.plate("n", len(x)):
            return pyro.sample("z", dist.OneHotCategorical(logits=self.e(x) * scale))

    @config_gradient(config={"z": ReinMax(1.3)})
    def decorated(self, x, *, scale=1.0):
        """Encode."""
        return self.guide(x, scale=scale)

    @config_gradient(config={"z": ReinMax(1.3)})
    @poutine.scale(scale=0.5)
    def scaled(self, x, *, scale=1.0):
        return self.guide(x, scale=scale)

    @staticmethod
    @config_gradient(config={"z": ReinMax(1.3)})
    def static(x, *, scale=1.0):
        return plain(x, scale=scale)

    @classmethod
    @config_gradient(config={"z": ReinMax(1.3)})
    def of_class(cls, x, *, scale=1.0):
        return plain(x, scale=scale)


class PyroNet(PyroModule):
    """Encodes by a parameter that is made at the first call."""

    def forward(self, x, *, scale=1.0):
        if not hasattr(self, "lazy"):
            self.lazy = PyroParam(torch.zeros(3))
        with pyro.plate("n", len(x)):
            return pyro.sample("z", dist.OneHotCategorical(logits=self.lazy * scale))


class Callable:
    """A guide that is an object of a user's class, with attributes."""

    def __init__(self):
        self.e = nn.Linear(2, 3)

    def __call__(self, x, *, scale=1.0):
        with pyro.plate("n", len(x)):
            return pyro.sample("z", dist.OneHotCategorical(logits=self.e(x) * scale))


def shifted(shift, x, *, scale=1.0):
    return plain(x + shift, scale=scale)


GUIDES = {
    "function": lambda: plain,
    "decorated function": lambda: decorated,
    "function decorated twice": lambda: decorated_twice,
    "bound method": lambda: Net().guide,
    "decorated method": lambda: Net().decorated,
    "decorated handler": lambda: Net().scaled,
    "static method": lambda: Net.static,
    "class method": lambda: Net.of_class,
    "partial": lambda: functools.partial(shifted, 0.5),
    "partial of a method": lambda: functools.partial(Net().guide, scale=0.5),
    "object": Callable,
    "module": lambda: nn.ModuleList([PyroNet()])[0],
    "handler": lambda: poutine.scale(plain, scale=0.5),
    "handler of a method": lambda: poutine.mask(Net().guide, mask=torch.tensor(True)),
    "configured": lambda: config_gradient(plain, "rebar"),
    "configured module": lambda: config_gradient(PyroNet(), "rebar"),
}


def stateful():
    return GumbelStraightThrough(Exponential(1.0, 0.1, 0.1))


def unpickled(thing):
    return pickle.loads(pickle.dumps(thing))


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": unpickled, "torch.save": saved}


# Pyro's handlers around a method of a class cannot be pickled, configured or not.
COPIED = [
    pytest.param(kind, make, id=f"{kind}-{name}")
    for kind in GUIDES
    for name, make in COPIES.items()
    if (kind, name) not in {("decorated handler", "pickle"), ("decorated handler", "torch.save")}
]


def chosen(guide, name="z"):
    """The estimator that a run finds at a site."""
    trace = poutine.trace(guide).get_trace(X)
    return trace.nodes[name]["infer"]["gradient"]


def train(guide, num_steps=2):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Estimator_ELBO())
    return [svi.step(X) for _ in range(num_steps)]


@pytest.mark.parametrize(("kind", "make_copy"), COPIED)
def test_a_copy_is_configured_and_has_state_of_its_own(kind, make_copy):
    configured = config_gradient(GUIDES[kind](), stateful())
    train(configured, 1)
    again = make_copy(configured)
    original, own = chosen(configured), chosen(again)
    assert own is not original
    assert (original.temperature.step_count, own.temperature.step_count) == (1, 1)
    train(again, 2)
    assert (original.temperature.step_count, own.temperature.step_count) == (1, 3)


@pytest.mark.parametrize(("kind", "make_copy"), COPIED)
def test_a_copy_draws_what_the_original_draws(kind, make_copy):
    configured = config_gradient(GUIDES[kind](), ReinMax())
    configured(X)
    again = make_copy(configured)
    pyro.set_rng_seed(1)
    first = configured(X, scale=2.0)
    pyro.set_rng_seed(1)
    assert torch.equal(again(X, scale=2.0), first)


@pytest.mark.parametrize("kind", GUIDES)
def test_a_shallow_copy_shares_guide_and_estimators(kind):
    configured = config_gradient(GUIDES[kind](), stateful())
    configured(X)
    again = copy.copy(configured)
    assert again is not configured
    assert chosen(again) is chosen(configured)


def test_an_attribute_set_on_a_shallow_copy_of_a_module_stays_there():
    configured = config_gradient(PyroNet(), stateful())
    again = copy.copy(configured)
    again.note = "mine"
    assert not hasattr(configured, "note")
    assert isinstance(again, PyroNet)


@pytest.mark.parametrize("make_elbo", [Estimator_ELBO, lambda: ImportanceWeighted_ELBO(2)])
@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("name", ["guide", "decorated"])
def test_a_copy_of_a_module_trains_the_copy(name, make_copy, make_elbo):
    """The module holds a loss with a configured method of its own."""
    net = Net()
    net.loss = make_elbo()(net.model, config_gradient(getattr(net, name), "reinmax"))
    net.loss(X)
    twin = make_copy(net)
    twin.loss(X).backward()
    assert net.e.weight.grad is None
    assert twin.e.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_a_loss_module_is_copied_with_the_estimators_of_a_decorated_method(make_copy):
    """Those that the copy holds are those that its guide uses."""
    net = Net()
    loss = Estimator_ELBO()(net.model, net.decorated)
    loss(X)
    twin = make_copy(loss)
    twin(X)
    assert set(twin.state_dict()) == set(loss.state_dict())
    assert chosen(twin.guide) is not chosen(loss.guide)
    assert chosen(twin.guide) in list(twin.estimators)


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_a_copy_of_a_configured_guide_is_the_one_of_its_modules_copy(make_copy):
    """The copying may begin at the guide: module and guide refer to one another."""
    net = Net()
    net.configured = config_gradient(net.guide, stateful())
    twin = make_copy(net.configured)
    assert twin.guide.__self__ is not net
    assert twin.guide.__self__.configured is twin
    twin(X)


def test_an_average_over_steps_keeps_to_itself():
    """``AveragedModel`` copies the module and updates the copy's parameters."""
    net = Net()
    net.configured = config_gradient(net.guide, ReinMax())
    net.loss = Estimator_ELBO()(net.model, net.configured)
    averaged = AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimiser = torch.optim.SGD(net.parameters(), lr=1.0)
    starts = net.e.weight.detach().clone()
    averaged.update_parameters(net)
    for _ in range(3):
        optimiser.zero_grad()
        net.loss(X).backward()
        optimiser.step()
    twin = averaged.module
    assert torch.equal(twin.e.weight, starts)
    averaged.update_parameters(net)
    torch.testing.assert_close(twin.e.weight, (starts + net.e.weight) / 2)
    pyro.set_rng_seed(0)
    ours = twin.configured(X)
    pyro.set_rng_seed(0)
    assert torch.equal(ours, twin.guide(X))


def _run_elsewhere(configured, queue):
    train(configured, 2)
    queue.put(chosen(configured).temperature.step_count)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["function", "decorated function", "bound method", "module"])
def test_a_process_gets_a_copy(kind):
    context = multiprocessing.get_context("spawn")
    configured = config_gradient(GUIDES[kind](), stateful())
    train(configured, 1)
    queue = context.SimpleQueue()
    process = context.Process(target=_run_elsewhere, args=(configured, queue))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert (queue.get(), chosen(configured).temperature.step_count) == (3, 1)


# Modules


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_a_copy_of_a_configured_module_is_independent(make_copy):
    configured = config_gradient(PyroNet(), Score(NeuralBaseline(nn.Linear(2, 1), "x")))
    configured(X)
    again = make_copy(configured)
    assert type(again).__mro__[1:] == type(configured).__mro__[1:]
    assert again.lazy is not configured.lazy
    again.lazy.data.fill_(5.0)
    own, original = chosen(again), chosen(configured)
    own.baseline.module.weight.data.fill_(7.0)
    assert configured.lazy.abs().sum() == 0
    assert original.baseline.module.weight.abs().max() < 1


def test_attributes_made_by_a_call_are_those_of_the_original():
    net = PyroNet()
    configured = config_gradient(net, "reinmax")
    configured(X)
    assert net.lazy is configured.lazy
    assert set(configured.state_dict()) == set(net.state_dict())
    assert [*configured.parameters()] == [*net.parameters()]
    configured.double()
    assert net.lazy.dtype == torch.float64
    assert net.training
    configured.eval()
    assert not net.training


def latents(x=None):
    loc = pyro.sample("loc", dist.Normal(0.5, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.3, 0.5))
    with pyro.plate("n", 4):
        pyro.sample("obs", dist.Normal(loc, scale), obs=X[:, 0])


def discrete(x=None):
    with pyro.plate("n", 4):
        z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("obs", dist.Normal(z, 1.0), obs=X[:, 0])


def whole(program):
    return poutine.reparam(program, config={"loc": LocScaleReparam(0.5)})


AUTOGUIDES = {
    "AutoNormal": lambda: autoguide.AutoNormal(latents),
    "AutoDelta": lambda: autoguide.AutoDelta(latents),
    "AutoDiagonalNormal": lambda: autoguide.AutoDiagonalNormal(latents),
    "AutoMultivariateNormal": lambda: autoguide.AutoMultivariateNormal(latents),
    "AutoLowRankMultivariateNormal": lambda: autoguide.AutoLowRankMultivariateNormal(latents),
    "AutoLaplaceApproximation": lambda: autoguide.AutoLaplaceApproximation(latents),
    "AutoIAFNormal": lambda: autoguide.AutoIAFNormal(latents),
    "AutoStructured": lambda: autoguide.AutoStructured(latents),
    "AutoGaussian": lambda: autoguide.AutoGaussian(latents),
    "AutoGuideList": lambda: guide_list(),
    "AutoDiscreteParallel": lambda: autoguide.AutoDiscreteParallel(discrete),
    "AutoNormalMessenger": lambda: autoguide.AutoNormalMessenger(latents),
    "AutoHierarchicalNormalMessenger": lambda: autoguide.AutoHierarchicalNormalMessenger(latents),
    "AutoRegressiveMessenger": lambda: autoguide.AutoRegressiveMessenger(latents),
    "AutoDiscrete": lambda: AutoDiscrete(discrete_of),
    "AutoDiscrete with a gradient": lambda: AutoDiscrete(discrete_of, gradient="rebar"),
    "AutoAmortized": lambda: AutoAmortized(discrete_of, nn.Linear(2, 4)),
}


def discrete_of(x):
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("obs", dist.Normal(z, 1.0), obs=x[:, 0])


def guide_list():
    both = autoguide.AutoGuideList(latents)
    both.append(autoguide.AutoNormal(poutine.block(latents, hide=["loc"])))
    both.append(autoguide.AutoDelta(poutine.block(latents, hide=["scale"])))
    return both


@pytest.mark.parametrize("name", AUTOGUIDES)
def test_a_configured_autoguide_is_copied_with_everything_in_it(name):
    estimator = Score(MovingAverage())
    guide = AUTOGUIDES[name]()
    configured = config_gradient(guide, lambda site: estimator)
    with torch.no_grad():  # Pyro's flows keep the last values, which cannot be copied with a graph
        configured(X)
    # What the first call made is there under both names.
    assert len([*guide.parameters()]) == len([*configured.parameters()]) > 0
    twin = copy.deepcopy(configured)
    assert isinstance(twin, type(guide))
    starts = [parameter.detach().clone() for parameter in configured.parameters()]
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    for parameter, start in zip(configured.parameters(), starts, strict=True):
        assert torch.equal(parameter, start)
    twin(X)


def test_configuring_an_autoguide_leaves_the_choice_of_its_class():
    guide = autoguide.AutoGaussian(latents)
    config_gradient(guide, "score")
    assert type(autoguide.AutoGaussian(latents)) is type(guide)


@pytest.mark.parametrize("make", [AutoDiscrete, autoguide.AutoDiscreteParallel])
def test_a_copied_autoguide_has_estimators_of_its_own(make):
    model = discrete_of if make is AutoDiscrete else discrete
    configured = config_gradient(make(model), Rebar())
    configured(X)
    twin = copy.deepcopy(configured)
    assert isinstance(chosen(twin), Rebar)
    assert chosen(twin) is not chosen(configured)
    assert chosen(copy.deepcopy(twin)) is not chosen(twin)


# Identity, names and signatures


def signature(guide):
    """Pyro's handlers have none."""
    try:
        return inspect.signature(guide)
    except ValueError:
        return None


@pytest.mark.parametrize("kind", sorted(set(GUIDES) - {"module", "configured module"}))
def test_a_configured_guide_looks_like_its_guide(kind):
    guide = GUIDES[kind]()
    configured = config_gradient(guide, "reinmax")
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert (
            getattr(configured, name, None) == getattr(guide, name, None) or name == "__module__"
        )
    assert signature(configured) == signature(guide)
    assert configured.__wrapped__ is guide
    assert callable(configured)


def test_attributes_of_the_guide_are_those_of_the_configured_one():
    guide = Callable()
    configured = config_gradient(guide, "reinmax")
    assert configured.e is guide.e
    guide.late = 3
    assert configured.late == 3
    with pytest.raises(AttributeError, match="nothing"):
        configured.nothing  # noqa: B018


@pytest.mark.parametrize("kind", GUIDES)
def test_a_configured_guide_is_equal_to_itself_alone(kind):
    guide, estimator = GUIDES[kind](), ReinMax()
    first, second = config_gradient(guide, estimator), config_gradient(guide, estimator)
    assert first == first
    assert first != second
    assert len({first, second}) == 2
    reference = weakref.ref(first)
    assert reference() is first
    del first
    gc.collect()
    assert reference() is None


def test_a_configured_method_is_equal_on_the_same_object_alone():
    net, other = Net(), Net()
    assert net.decorated == net.decorated
    assert hash(net.decorated) == hash(net.decorated)
    assert net.decorated != other.decorated
    assert net.decorated != Net.decorated


# Methods


@pytest.mark.parametrize("name", ["decorated", "scaled", "static", "of_class"])
def test_a_decorated_method_is_configured_on_every_object(name):
    for net in (Net(), Net()):
        assert repr(chosen(getattr(net, name))) == "ReinMax(1.3)"


def test_a_decorated_method_has_the_signature_of_the_method():
    net = Net()
    for name in ("decorated", "static", "of_class"):
        assert str(inspect.signature(getattr(net, name))) == "(x, *, scale=1.0)"
    assert str(inspect.signature(Net.decorated)) == "(self, x, *, scale=1.0)"


def test_a_decorated_method_finds_its_object():
    net, other = Net(), Net()
    Estimator_ELBO().loss_and_grads(net.model, net.decorated, X)
    assert net.e.weight.grad.abs().sum() > 0
    assert other.e.weight.grad is None
    assert net.decorated.__doc__ == "Encode."


def test_a_decorated_method_of_a_pyro_module():
    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.bias = PyroParam(torch.zeros(3))

        @config_gradient(config="reinmax")
        def forward(self, x):
            with pyro.plate("n", len(x)):
                pyro.sample("z", dist.OneHotCategorical(logits=self.bias))

    guide = Guide()
    train(guide, 3)
    assert isinstance(chosen(guide), ReinMax)
    assert guide.bias.abs().sum() > 0
    twin = copy.deepcopy(guide)
    assert isinstance(chosen(twin), ReinMax)


def test_a_guide_that_binds_to_nothing_is_not_bound():
    """As a class attribute a partial or a bound method takes no object, configured or not."""
    net = Net()

    class Holder:
        partial = config_gradient(functools.partial(shifted, 0.5), "reinmax")
        method = config_gradient(net.guide, "reinmax")

    assert isinstance(chosen(Holder().partial), ReinMax)
    assert isinstance(chosen(Holder().method), ReinMax)


def test_the_neural_baseline_reads_the_arguments_of_a_configured_method():
    estimator = Score(NeuralBaseline(nn.Linear(2, 1), "x"))
    for guide in (Net().guide, Net().decorated, plain):
        Estimator_ELBO().loss_and_grads(
            lambda *args: model(*args), config_gradient(guide, estimator), X
        )
    assert estimator.baseline.module.weight.grad.abs().sum() > 0


# Holders


def test_a_module_that_holds_a_configured_method_keeps_its_parameters_and_state():
    """The configuration changes how to train, not what a checkpoint holds."""
    net, bare = Net(), Net()
    net.configured = config_gradient(net.guide, stateful())
    assert set(net.state_dict()) == set(bare.state_dict())
    bare.load_state_dict(net.state_dict())
    assert [*net.parameters()] == [net.e.weight, net.e.bias]
    net.double()
    assert net.configured(X.double()).dtype == torch.float64


def test_a_loss_module_has_parameters_and_state_of_guide_and_estimators():
    net = Net()
    net.loss = Estimator_ELBO()(net.model, config_gradient(net.guide, {"z": "rebar"}))
    names = {name.rpartition(".")[2] for name, _ in net.loss.named_parameters()}
    assert {"log_temperature", "scale"} <= names
    twin = Net()
    twin.loss = Estimator_ELBO()(twin.model, config_gradient(twin.guide, {"z": "rebar"}))
    net.loss.estimators[0].scale.data.fill_(3.0)
    twin.load_state_dict(net.state_dict())
    assert chosen(twin.loss.guide).scale.item() == 3.0
    assert chosen(net.loss.guide).scale.item() == 3.0


def test_two_guides_may_share_an_estimator():
    estimator = stateful()
    first, second = config_gradient(plain, estimator), config_gradient(Net().guide, estimator)
    train(first, 2)
    train(second, 1)
    assert chosen(first) is chosen(second) is estimator
    assert estimator.temperature.step_count == 3
    both = copy.deepcopy([first, second])
    assert chosen(both[0]) is chosen(both[1]) is not estimator


def test_handlers_go_around_and_inside():
    outside = poutine.scale(config_gradient(plain, ReinMax()), scale=0.5)
    inside = config_gradient(poutine.scale(plain, scale=0.5), ReinMax())
    for guide in (outside, inside):
        site = poutine.trace(guide).get_trace(X).nodes["z"]
        assert (site["scale"], repr(site["infer"]["gradient"])) == (0.5, "ReinMax(1.0)")
        train(guide, 1)
    blocked = poutine.trace(poutine.block(config_gradient(plain, ReinMax()))).get_trace(X)
    assert "z" not in blocked.nodes


def test_a_class_is_not_a_guide():
    match = (
        r"config_gradient: expected a guide, got the class PyroNet; "
        r".*config_gradient\(PyroNet\(...\), config\)"
    )
    with pytest.raises(TypeError, match=match):
        config_gradient(PyroNet, "reinmax")
    with pytest.raises(TypeError, match=match):
        config_gradient(config="reinmax")(PyroNet)


def test_the_repr_has_guide_and_config():
    assert repr(config_gradient(plain, "reinmax")).startswith("config_gradient(<function plain")
    assert repr(config_gradient(plain, {"z": ReinMax()})).endswith(", {'z': ReinMax(1.0)})")
