"""State, copies and stored parameters of automatic guides."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.guide_programs import LOCS, WEIGHTS, X, column, mixed, mixture
from pyro.infer import SVI
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_gumbel import estimators
from pyro_gumbel.estimators import Exponential, GumbelStraightThrough, Score
from pyro_gumbel.guides import AutoAmortized, AutoDiscrete
from pyro_gumbel.infer import Estimator_ELBO


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


def test_site_names_of_any_kind() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for name in ("a.b", "a_b", "values", "type"):
                pyro.sample(name, dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    guide = AutoAmortized(model, column)
    assert list(guide(X)) == ["a.b", "a_b", "values", "type"]
    assert len(guide.heads) == 4


class MixtureModule(PyroModule):
    def forward(self, x: Tensor) -> None:
        mixture(x)


def test_a_model_that_is_a_module_is_copied_and_assigned() -> None:
    guide = AutoDiscrete(MixtureModule())
    guide(X)
    twin = copy.deepcopy(guide)
    assert isinstance(twin.model, MixtureModule)
    assert twin.model is not guide.model
    both = copy.deepcopy([guide.model, guide])
    assert both[1].model is both[0]
    read = pickle.loads(pickle.dumps(guide))
    read.model = model = MixtureModule()
    assert read.model is model
    assert "model" not in dict(read.named_modules())
    for other in (twin, both[1], read):
        assert torch.equal(other.posterior(X)["z"].probs, guide.posterior(X)["z"].probs)


DATA = torch.tensor([0.3, -1.0, 2.5, 1.0])


def stored_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(z * 2, 1.0), obs=x)


def discrete():
    return AutoDiscrete(stored_model, gradient="enumerate")


def of_a_function():
    return AutoAmortized(stored_model, lambda x: torch.stack([x, x**2], -1), gradient="enumerate")


def of_a_network():
    network = nn.Sequential(nn.Unflatten(0, (4, 1)), nn.Linear(1, 8), nn.Tanh())
    return AutoAmortized(stored_model, network, gradient="enumerate")


GUIDES = pytest.mark.parametrize("make", [discrete, of_a_function, of_a_network])


def fit(guide, steps=30):
    svi = SVI(stored_model, guide, pyro.optim.Adam({"lr": 0.05}), Estimator_ELBO())
    for _ in range(steps):
        svi.step(DATA)
    return probs(guide)


def probs(guide):
    return guide.posterior(DATA)["z"].probs.detach().clone()


@GUIDES
def test_loaded_store(make, tmp_path):
    trained = fit(make())
    pyro.get_param_store().save(str(tmp_path / "store"))
    pyro.clear_param_store()
    pyro.get_param_store().load(str(tmp_path / "store"))
    guide = make()
    torch.testing.assert_close(probs(guide), trained)
    assert not torch.allclose(fit(guide), trained)  # and it goes on from there


@GUIDES
def test_store_loaded_under_a_guide_at_work(make, tmp_path):
    guide = make()
    trained = fit(guide)
    pyro.get_param_store().save(str(tmp_path / "store"))
    fit(guide)
    pyro.clear_param_store()
    pyro.get_param_store().load(str(tmp_path / "store"))
    torch.testing.assert_close(probs(guide), trained)


@GUIDES
def test_second_guide_of_one_session_is_trained(make):
    """As when a cell of a notebook is run again: it goes on where the first one stopped."""
    first = make()
    trained = fit(first)
    second = make()
    torch.testing.assert_close(probs(second), trained)
    assert not torch.allclose(fit(second), trained)
    torch.testing.assert_close(probs(first), probs(second))


@GUIDES
def test_copy_keeps_its_values(make):
    guide = make()
    trained = fit(guide)
    kept = copy.deepcopy(guide)
    fit(guide)
    torch.testing.assert_close(probs(kept), trained)


def test_guide_of_another_shape_raises():
    fit(discrete(), 1)
    with pytest.raises(
        ValueError, match=r"'AutoDiscrete.heads\$\$\$z.raw' with shape .*clear_param"
    ):
        AutoDiscrete(stored_model)(DATA[:2])
