"""Measure how seconds and memory of a step grow with sites, particles, batch and categories.

    python tests/benchmarks/growth.py

An exponent of 1 is linear growth. It is fitted to the largest sizes, where fixed costs matter
least. Bytes are the peak of what a step allocates. Sites are independent one-hot variables in a
plate.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from _draws import peak
from _report import Report, make_parser
from _timing import Step, keep_memory, now
from torch import nn

from pyro_gumbel.infer import Estimator_ELBO, config_gradient

ESTIMATORS = ("reinmax", "score", "rebar", "local_expectation")
AXES = {
    "sites": (1, 2, 4, 8, 16, 32, 64),
    "particles": (1, 2, 4, 8, 16, 32, 64),
    "batch": (10, 30, 100, 300, 1_000, 3_000, 10_000),
    "categories": (2, 10, 50, 300, 2_000, 10_000, 50_000),
}
BASE = {"sites": 1, "particles": 1, "batch": 100, "categories": 10}
FITTED = 3  # sizes of a fit
ENOUGH = 3.0  # seconds of measurement after which no step is repeated
# These evaluate several values of each site, so that cost is quadratic in sites.
LARGEST = {"local_expectation": {"categories": 300, "sites": 16}, "rebar": {"sites": 16}}
SMOKE = {"sites": 4, "particles": 4, "batch": 100, "categories": 50}


class Programs(nn.Module):
    """Sites in a plate, whose values add up to the mean of a datum."""

    def __init__(self, sites: int, batch: int, categories: int) -> None:
        super().__init__()
        self.logits = nn.ParameterList(torch.randn(batch, categories) for _ in range(sites))
        self.weights = nn.Parameter(torch.randn(sites, categories))
        self.register_buffer("prior", torch.zeros(categories))
        self.register_buffer("x", torch.randn(batch))

    def model(self) -> None:
        with pyro.plate("data", len(self.x)):
            mean = torch.zeros_like(self.x)
            for number, weight in enumerate(self.weights):
                z = pyro.sample(f"z_{number}", dist.OneHotCategorical(logits=self.prior))
                mean = mean + (z * weight).sum(-1)
            pyro.sample("x", dist.Normal(mean, 1.0), obs=self.x)

    def guide(self) -> None:
        with pyro.plate("data", len(self.x)):
            for number, logits in enumerate(self.logits):
                pyro.sample(f"z_{number}", dist.OneHotCategorical(logits=logits))


def make_step(estimator: str, device: torch.device, sizes: dict[str, int]) -> Step:
    """Return a step without an optimiser: the loss and its gradients."""
    sites, particles, batch, categories = (sizes[axis] for axis in AXES)
    programs = Programs(sites, batch, categories).to(device)
    guide = config_gradient(programs.guide, estimator)
    elbo = Estimator_ELBO(particles, vectorize_particles=particles > 1, max_plate_nesting=1)

    def step() -> None:
        programs.zero_grad()
        elbo.loss_and_grads(programs.model, guide)

    return step


def seconds_of(step: Step, device: torch.device, rounds: int) -> float:
    """Return the median seconds of a step, after two for the preflight."""
    for _ in range(2):
        step()
    found: list[float] = []
    while len(found) < rounds and sum(found) < ENOUGH:
        start = now(device)
        step()
        found.append(now(device) - start)
    return statistics.median(found)


def bytes_of(step: Step, device: torch.device) -> float:
    """Return the largest number of bytes that a step holds at once, beyond those before it."""
    if device.type == "cpu":
        return 2**20 * peak(step)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def exponent(sizes: list[int], values: list[float]) -> float:
    """Return the slope of logarithms over the largest sizes."""
    slope, _ = np.polyfit(np.log(sizes[-FITTED:]), np.log(values[-FITTED:]), 1)
    return float(slope)


def measure(args: argparse.Namespace, axis: str, estimator: str) -> dict[str, Any]:
    """Measure steps along an axis; the other sizes are those of ``BASE``."""
    device = torch.device(args.device)
    sizes = [size for size in AXES[axis] if size <= args.limits.get(axis, size)]
    sizes = [size for size in sizes if size <= LARGEST.get(estimator, {}).get(axis, size)]
    seconds, sizes_in_bytes = [], []
    for size in sizes:
        step = make_step(estimator, device, BASE | {axis: size})
        seconds.append(seconds_of(step, device, args.rounds))
        sizes_in_bytes.append(bytes_of(step, device))
    return {
        "axis": axis,
        "estimator": estimator,
        "sizes": sizes,
        "seconds": seconds,
        "bytes": sizes_in_bytes,
        "exponent of seconds": exponent(sizes, seconds),
        "exponent of bytes": exponent(sizes, sizes_in_bytes),
    }


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """Return the figures at the largest size, and the exponents."""
    least, largest = row["sizes"][0], row["sizes"][-1]
    names = ("exponent of seconds", "exponent of bytes")
    return {
        "estimator": row["estimator"],
        "sizes": f"{least}-{largest}",
        "ms at the largest": 1e3 * row["seconds"][-1],
        "MiB at the largest": row["bytes"][-1] / 2**20,
        **{name: row[name] for name in names},
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw seconds and bytes against each size, with the exponents."""
    figure, axes = plt.subplots(2, len(AXES), figsize=(14, 6.5), sharex="col", sharey="row")
    sizes = {row["axis"]: row["sizes"] for row in rows if row["estimator"] == ESTIMATORS[0]}
    markers = dict(zip(ESTIMATORS, "osv^", strict=True))
    for column, axis in enumerate(AXES):
        for row, quantity in enumerate(("seconds", "bytes")):
            ax = axes[row][column]
            for found in rows:
                if found["axis"] == axis:
                    name, slope = found["estimator"], found[f"exponent of {quantity}"]
                    ax.plot(
                        found["sizes"],
                        found[quantity],
                        marker=markers[name],
                        markersize=4,
                        label=f"{name}: {slope:.2f}",
                    )
            ax.set(xscale="log", yscale="log")
            ax.set_xticks(sizes[axis], [f"{size:,}" for size in sizes[axis]], rotation=45)
            ax.minorticks_off()
            ax.legend(fontsize=8, title="exponent", title_fontsize=8, loc="upper left")
            ax.grid(alpha=0.3)
        axes[1][column].set_xlabel(axis)
    for row, label in enumerate(("seconds of a step", "bytes, peak of a step")):
        axes[row][0].set_ylabel(label)
        axes[row][0].set_ylim(top=300 * axes[row][0].get_ylim()[1])  # for the legends
    others = "one site, one particle, batch 100, 10 categories"
    figure.suptitle(f"Growth of a step along each axis; the others are {others}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    args.limits = (
        {"sites": 4, "particles": 4, "batch": 100, "categories": 50} if args.smoke else {}
    )
    args.rounds = 1 if args.smoke else args.rounds
    torch.set_num_threads(1)
    keep_memory()
    torch.manual_seed(args.seed)
    pyro.enable_validation(False)
    report = Report("growth", args.out)
    rows: list[dict[str, Any]] = []
    for axis in AXES:
        found = [measure(args, axis, estimator) for estimator in ESTIMATORS]
        rows += found
        report.tables["measurements"] = rows
        report.table(f"growth with {axis}", [summary(one) for one in found])
    plot(rows, args.out / "growth.png")
    report.finish()
    print(f"and {args.out / 'growth.png'}")


if __name__ == "__main__":
    main()
