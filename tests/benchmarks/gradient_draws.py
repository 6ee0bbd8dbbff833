"""Time and memory of ``gradient_draws`` on an auto-encoder with four latents of eight categories.

    python tests/benchmarks/gradient_draws.py

The first table compares ``gradient_draws`` with a loop of ``loss_and_grads`` that clears
gradients. The two run in turn, and times are CPU times, so other processes change them little. The
second table has the seconds of 1,000 draws of each of five estimators, the third the size of the
draws with and without projections.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _report import Report, make_parser
from pyro.infer.util import zero_grads
from torch import nn

from pyro_gumbel.diagnostics import gradient_draws
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

LATENTS, CATEGORIES, HIDDEN, PIXELS, BATCH = 4, 8, 256, 64, 100
ESTIMATORS = ("straight_through", "gumbel_straight_through", "reinmax", "reinmax_rao", "score")
FORMS: dict[str, dict[str, Any]] = {
    "all draws": {"site_draws": 0},
    "all draws, and by site": {},
    "projections": {"site_draws": 0, "project": 8},
}


def programs() -> tuple[Callable[..., Any], Callable[..., Any], torch.Tensor]:
    """Return model, guide and data of an untrained auto-encoder of 64 pixels."""
    size = LATENTS * CATEGORIES
    encoder = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, size))
    decoder = nn.Sequential(nn.Linear(size, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS))

    def model(x: torch.Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("images", len(x)):
            prior = dist.OneHotCategorical(logits=torch.zeros(LATENTS, CATEGORIES))
            z = pyro.sample("z", prior.to_event(1))
            pixels = dist.Bernoulli(logits=decoder(z.flatten(-2)))
            pyro.sample("x", pixels.to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("images", len(x)):
            logits = encoder(x).unflatten(-1, (LATENTS, CATEGORIES))
            pyro.sample("z", dist.OneHotCategorical(logits=logits).to_event(1))

    return model, guide, (torch.rand(BATCH, PIXELS) < 0.4).float()


def bare(model: Any, guide: Any, x: torch.Tensor, draws: int) -> float:
    """Return CPU seconds of a loop of ``loss_and_grads``."""
    elbo, configured = Estimator_ELBO(), config_gradient(guide, "reinmax")
    elbo.loss_and_grads(model, configured, x)
    leaves = list(pyro.get_param_store()._params.values())
    start = time.process_time()
    for _ in range(draws):
        zero_grads(leaves)
        elbo.loss_and_grads(model, configured, x)
    return time.process_time() - start


def drawn(model: Any, guide: Any, x: torch.Tensor, draws: int, **options: Any) -> float:
    """Return CPU seconds of ``gradient_draws``, including its set-up."""
    start = time.process_time()
    gradient_draws(
        model, guide, x, estimators={"r": "reinmax"}, num_draws=draws, num_chains=1,
        progress=False, **options,
    )  # fmt: skip
    return time.process_time() - start


def overhead(args: argparse.Namespace, *programs: Any) -> list[dict[str, Any]]:
    """Compare ``gradient_draws`` with a loop of ``loss_and_grads``."""
    seconds: dict[str, list[float]] = {"loss_and_grads": []} | {name: [] for name in FORMS}
    for _ in range(2 if args.smoke else 5):
        for name, options in FORMS.items():
            cost = bare(*programs, args.draws)
            seconds[name].append(drawn(*programs, args.draws, **options) / cost)
            seconds["loss_and_grads"].append(cost)
    cost = 1e3 * statistics.median(seconds.pop("loss_and_grads")) / args.draws
    return [
        {"what": name, "ms of loss_and_grads": cost, "ratio": statistics.median(found)}
        for name, found in seconds.items()
    ]


def five_estimators(args: argparse.Namespace, *programs: Any) -> list[dict[str, Any]]:
    """Measure the wall-clock seconds of five estimators' draws."""
    start = time.perf_counter()
    estimators = {name: name for name in ESTIMATORS}
    number = args.draws * 5
    gradient_draws(
        *programs, estimators=estimators, num_draws=number // 4, project=8, progress=False
    )
    taken = time.perf_counter() - start
    return [{"estimators": len(estimators), "draws of each": number, "seconds": taken}]


def sizes(args: argparse.Namespace, *programs: Any) -> list[dict[str, Any]]:
    """Measure the memory of the results."""
    return [
        {"what": name, "draws": number, "MB": _size(number, FORMS[name], *programs)}
        for name in ("all draws", "projections")
        for number in (args.draws // 4, args.draws)
    ]


def _size(number: int, options: dict[str, Any], *programs: Any) -> float:
    options = {**options, "num_draws": number, "num_chains": 1, "progress": False}
    return gradient_draws(*programs, estimators={"r": "reinmax"}, **options)["r"].nbytes / 2**20


def main() -> None:
    """Print the tables and write them to a file."""
    args = make_parser(__doc__.splitlines()[0]).parse_args()
    args.draws = 20 if args.smoke else 200
    torch.set_num_threads(1)
    pyro.set_rng_seed(args.seed)
    found = programs()
    report = Report("gradient_draws", args.out)
    report.table(f"{args.draws} draws against loss_and_grads", overhead(args, *found))
    report.table("draws of an auto-encoder's gradient", five_estimators(args, *found))
    report.table("size of the results", sizes(args, *found))
    report.finish()


if __name__ == "__main__":
    main()
