"""A run under ``Undo`` leaves tensors unchanged."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pyro
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_gumbel.infer._dependence import Dependence
from pyro_gumbel.infer._operations import Undo

X = torch.linspace(-1.0, 2.0, 12).reshape(4, 3)


class Averaged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        self.mean[0] += 1
        self.count += 1
        torch.add(self.count, 1, out=self.count)
        return x - self.mean


def spectral() -> nn.Module:
    module = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2))
    module.parametrizations.weight[0]._u.copy_(torch.tensor([1.0, 0.0]))  # far from converged
    return module


def old_spectral() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.spectral_norm(nn.Linear(3, 2))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(3),
    "cumulative BatchNorm1d": lambda: nn.BatchNorm1d(3, momentum=None),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(4, track_running_stats=True),
    "moving averages by hand": Averaged,
    "PyroModule": lambda: PyroModule[nn.BatchNorm1d](3),
    "spectral_norm": spectral,
    "old spectral_norm": old_spectral,
    "scripted BatchNorm1d": lambda: torch.jit.script(nn.BatchNorm1d(3)),
    "scripted averages": lambda: torch.jit.script(Averaged()),
    "network with BatchNorm1d": lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
}


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("with_gradient", [False, True])
def test_buffers_are_put_back(name: str, with_gradient: bool) -> None:
    module = MODULES[name]()
    before = state(module)
    with Undo():
        module(X.clone().requires_grad_(with_gradient))
        module(X + 1)
        inside = state(module)
    after = state(module)
    assert any(not torch.equal(before[key], inside[key]) for key in before)
    for key in before:
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=0)
    assert not any(buffer.requires_grad for buffer in module.buffers())
    x = X.clone().requires_grad_()
    module(x).sum().backward()  # and the module works as before
    assert x.grad is not None


def test_results_of_the_run_stay() -> None:
    with Undo():
        total = torch.tensor(0.0)
        total += X.sum()
        values = torch.zeros(3)
        values[1] = 2.0
        view = values[1:]
        view.mul_(3)
    assert total == X.sum()
    assert values.tolist() == [0.0, 6.0, 0.0]


def test_buffers_are_put_back_after_an_error() -> None:
    buffer = torch.zeros(3)

    def fail() -> None:
        buffer.add_(1)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), Undo():
        fail()
    assert buffer.tolist() == [0.0, 0.0, 0.0]


def test_one_inside_another() -> None:
    buffer = torch.zeros(2)
    with Undo():
        buffer.add_(1)
        with Undo():
            buffer.add_(1)
        assert buffer.tolist() == [1.0, 1.0]
    assert buffer.tolist() == [0.0, 0.0]


def test_a_value_that_was_followed_leaves_no_gradient_in_a_buffer() -> None:
    buffer, base = torch.zeros(3), torch.zeros(2, 3)
    with Dependence() as dependence:
        z = dependence.follow("z", torch.tensor([0.0, 1.0, 0.0]))
        buffer.mul_(0.9).add_(z)
        base[0].add_(z)
        assert dependence.marks(buffer) == {"z": 1}
        assert dependence.marks(base) == {"z": 1}
    for tensor in (buffer, base):
        assert not tensor.requires_grad
        assert not tensor.any()


def test_parameters_trained_inside_are_put_back() -> None:
    layer = nn.Linear(3, 1)
    before = state(layer)
    with Undo():
        optimiser = torch.optim.SGD(layer.parameters(), 0.1)
        layer(X).sum().backward()
        optimiser.step()
    for key, value in state(layer).items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_pyro_parameters_made_inside_stay() -> None:
    with Undo():
        pyro.param("w", torch.tensor(2.0)).data.add_(1)
    assert pyro.param("w") == 3.0
