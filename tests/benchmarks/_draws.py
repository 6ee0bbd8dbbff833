"""Time and memory of draws, against torch and other packages."""

from __future__ import annotations

import argparse
import functools
import importlib
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F  # noqa: N812
from _timing import Step, as_graph, ratios, side_by_side
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pyro_gumbel.distributions import RelaxedOneHot, draw_one_hot
from pyro_gumbel.estimators import (
    GappedStraightThrough,
    GumbelRao,
    GumbelSoftmax,
    GumbelStraightThrough,
    ReinMax,
    StraightThrough,
)

SHAPES = [(256, 30, 10), (1024, 64, 8), (64, 1, 50_000)]
Draw = Callable[[Tensor], Tensor]


def reinmax_package() -> Draw:
    reinmax = importlib.import_module("reinmax").reinmax
    return lambda logits: reinmax(logits, 1.0)[0]


def relaxit_package() -> Draw:
    module = importlib.import_module("relaxit.distributions")
    gumbel_softmax = module.DecoupledStraightThroughGumbelSoftmax
    one = torch.tensor(1.0)
    return lambda logits: gumbel_softmax(one, one, logits=logits).rsample()


def storchastic_package() -> Draw:
    straight_through = importlib.import_module("storch.method").GumbelSoftmax

    def draw(logits: Tensor) -> Tensor:
        method = straight_through("z", straight_through=True)
        one_hot = torch.distributions.OneHotCategorical(logits=logits, validate_args=False)
        return method(one_hot)._tensor

    return draw


PEERS = {
    "reinmax": reinmax_package,
    "relaxit": relaxit_package,
    "storchastic": storchastic_package,
}


def installed_peers() -> dict[str, Draw]:
    """Return the draws of installed packages; print the names of missing ones."""
    found = {}
    for name, load in PEERS.items():
        try:
            found[name] = load()
        except ImportError as error:
            print(f"skipped: {name} ({error})")
    return found


def draws(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    base = "F.gumbel_softmax(hard=True)"
    ours: dict[str, Draw] = {
        "GumbelStraightThrough": GumbelStraightThrough(0.5).draw_one_hot,
        "RelaxedOneHot": lambda logits: RelaxedOneHot(
            0.5, logits=logits, straight_through=True, validate_args=False
        ).rsample(),
        "StraightThrough": StraightThrough().draw_one_hot,
        "GumbelSoftmax": GumbelSoftmax(0.5).draw_one_hot,
        "GappedStraightThrough": GappedStraightThrough(0.5).draw_one_hot,
        "ReinMax": ReinMax().draw_one_hot,
    }
    every = {base: lambda logits: F.gumbel_softmax(logits, 0.5, hard=True), **ours}
    every |= installed_peers()
    table = []
    for shape in SHAPES:
        logits = torch.randn(shape, device=device, requires_grad=True)
        weight = torch.randn(shape, device=device)
        builds = {
            name: (lambda draw=draw, z=logits, w=weight: _and_backward(draw, z, w))
            for name, draw in every.items()
        }
        reach = {"GumbelStraightThrough": 0.6, "RelaxedOneHot": 0.6, "StraightThrough": 0.6}
        rows = [(name, base, reach.get(name)) for name in every if name != base]
        table += _of_shape(args, device, shape, builds, rows)
    return table


def exact_draws(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Time exact draws from new logits, and a copy, which moves as much memory as a draw.

    On a GPU both are also timed as CUDA graphs, without Python's launch time.
    """
    base, copy = "OneHotCategorical.sample", "copy of the logits"
    table = []
    for shape in SHAPES:
        logits = torch.randn(shape, device=device)
        builds: dict[str, Callable[[], Step]] = {
            base: lambda z=logits: (
                lambda: dist.OneHotCategorical(logits=z, validate_args=False).sample()
            ),
            "draw_one_hot": lambda z=logits: lambda: draw_one_hot(z),
            copy: lambda z=logits: functools.partial(torch.empty_like(z).copy_, z),
        }
        rows: list[tuple[str, str, float | None]] = [("draw_one_hot", base, 0.2)]
        if device.type == "cpu":
            rows.append(("draw_one_hot", copy, None))
        else:
            for name in ("draw_one_hot", copy):
                builds[f"{name}, graph"] = lambda build=builds[name]: as_graph(build())
            floor = 1.6 if shape == SHAPES[-1] else None
            rows.append(("draw_one_hot, graph", f"{copy}, graph", floor))
        table += _of_shape(args, device, shape, builds, rows)
    return table


def _of_shape(
    args: argparse.Namespace,
    device: torch.device,
    shape: tuple[int, ...],
    builds: dict[str, Callable[[], Step]],
    rows: list[tuple[str, str, float | None]],
) -> list[dict[str, Any]]:
    rounds = 2 if args.smoke else args.rounds
    inner = 20 if device.type == "cuda" else 1  # else the clock would time the wait for the device
    seconds = side_by_side(builds, rounds=rounds, inner=inner, rebuilds=1, device=device)
    return [{"shape": str(list(shape)), **row} for row in ratios(seconds, rows)]


def _and_backward(draw: Draw, logits: Tensor, weight: Tensor) -> Step:
    def step() -> None:
        logits.grad = None
        draw(logits).backward(weight)

    return step


def memory_of_gumbel_rao(num_samples: int = 100) -> list[dict[str, Any]]:
    """Compare a draw's peak memory, with gradient, with that of a graph of all samples."""
    table = []
    for shape in [(256, 30, 10), (64, 1, 1000)]:
        logits = torch.randn(shape, requires_grad=True)
        weight = torch.randn(shape)
        ours = GumbelRao(0.5, num_samples=num_samples).draw_one_hot
        ours_peak = peak(_and_backward(ours, logits, weight))
        held = peak(_and_backward(lambda z: _hold_all(z, 0.5, num_samples), logits, weight))
        table.append(
            {
                "shape": str(list(shape)),
                "MiB": ours_peak,
                "holding all samples": held,
                "ratio": ours_peak / held,
                "reach": 0.2,
                "met": "yes" if ours_peak / held <= 0.2 else "NO",
            }
        )
    return table


def _hold_all(logits: Tensor, temperature: float, num_samples: int) -> Tensor:
    """Draw conditional Gumbels for all samples at once and differentiate their softmaxes."""
    hard = draw_one_hot(logits)
    noise = torch.empty((num_samples, *logits.shape)).exponential_()
    top = (noise * hard).sum(-1, keepdim=True)
    total = logits.exp().sum(-1, keepdim=True)
    at_draw = total.log() - top.log()
    others = -(noise / logits.exp() + top / total).log()
    shift = (torch.where(hard > 0, at_draw, others) - logits).detach()
    soft = ((logits + shift) / temperature).softmax(-1).mean(0)
    return hard + soft - soft.detach()


def peak(step: Step) -> float:
    """Return the peak memory that a step allocates, in MiB."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    in_use = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            in_use += event.nbytes()
            peak = max(peak, in_use)
    return peak / 2**20
