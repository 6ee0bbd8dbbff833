"""The plain PyTorch loop: accumulation, clipping, bfloat16 and compiled networks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import torch_loop


def certain_loss(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A loss whose guide nearly always draws the first category of each latent."""
    torch.manual_seed(0)
    loss = torch_loop.make_loss("straight_through").to(dtype)
    loss.guide.encoder.second.weight.data *= 0.01
    loss.guide.encoder.second.bias.data[:: torch_loop.CATEGORIES] = 40.0
    return loss


def images(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    pixels = torch.rand(24, torch_loop.PIXELS, generator=torch.Generator().manual_seed(1))
    return (pixels < 0.4).to(dtype)


def weights_after_a_step(parts: int, **options: float) -> torch.Tensor:
    loss = certain_loss()
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    torch_loop.take_step(loss, optimizer, images().chunk(parts), **options)
    return nn.utils.parameters_to_vector(loss.parameters()).detach()


def test_a_batch_in_parts_takes_the_same_step():
    torch.testing.assert_close(weights_after_a_step(4), weights_after_a_step(1))


def test_gradients_are_clipped():
    start = nn.utils.parameters_to_vector(certain_loss().parameters()).detach()
    moved = weights_after_a_step(1, max_norm=0.01) - start
    assert moved.norm() == pytest.approx(0.1 * 0.01, rel=1e-2)


def test_autocast_runs_networks_in_bfloat16_and_masses_in_float32():
    losses, dtypes = [], []
    for enabled in (False, True):
        loss = certain_loss()
        for network in (loss.model.decoder, loss.guide.encoder):
            network.register_forward_hook(lambda *args: dtypes.append(args[2].dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(loss(images()))
    assert set(dtypes[:2]) == {torch.float32}
    assert set(dtypes[2:]) == {torch.bfloat16}
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0.0)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's compiler
@pytest.mark.parametrize("gradient", ["reinmax", "rebar"])
def test_every_option_together(gradient, capsys):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    torch._dynamo.register_backend(backend, name=f"counted_{gradient}")
    options = ["--accumulate", "2", "--autocast", "--compile", f"counted_{gradient}"]
    losses = torch_loop.main(["--smoke", "--gradient", gradient, *options])
    assert len(graphs) >= 2  # encoder and decoder
    assert losses[1] < losses[0] < torch_loop.PIXELS * math.log(2)
    assert "nats an image" in capsys.readouterr().out


def test_the_optimiser_has_the_estimators_parameters():
    loss = torch_loop.make_loss("rebar")
    loss(images()).backward()
    names = {name for name, parameter in loss.named_parameters() if parameter.grad is not None}
    assert any(name.endswith("log_temperature") for name in names)
