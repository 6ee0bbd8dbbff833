"""Time steps, draws and memory against plain PyTorch, Pyro and other packages.

    python tests/benchmarks/speed.py

Implementations run in one process, in turn. A ratio is the median of the rounds' ratios. Times are
CPU times of this process, or wall-clock times on a GPU.
"""

from __future__ import annotations

import argparse
from typing import Any

import pyro
import torch
from _draws import draws, exact_draws, memory_of_gumbel_rao
from _report import Report, make_parser
from _small import sites_in_a_plate, small_program
from _timing import keep_memory, ratios, side_by_side
from _vaes import (
    SMALL,
    hand_written,
    hand_written_leave_one_out,
    leave_one_out,
    ours,
    pyro_trace_elbo,
)


def steps(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Time a step of a categorical VAE, 784-512-256-[30 x 10] and mirrored, batch 100."""
    x = (torch.rand(100, 784, device=device) < 0.3).float()
    hand, theirs, ours_torch = "by hand, torch Adam", "Pyro, SVI, checks", "ours, torch Adam"
    on_gpu = device.type == "cuda"
    builds = {
        hand: lambda: hand_written(x),
        "by hand, fused Adam": lambda: hand_written(x, fused=True),
        ours_torch: lambda: ours(x, validate=False),
        f"{ours_torch}, checks": lambda: ours(x, validate=True),
        "ours, fused Adam": lambda: ours(x, validate=False, optimizer="fused"),
        "ours, fused Adam, checks": lambda: ours(x, validate=True, optimizer="fused"),
        "ours, SVI": lambda: ours(x, validate=False, optimizer="pyro"),
        "ours, SVI, checks": lambda: ours(x, validate=True, optimizer="pyro"),
        "ours, SVI fused, checks": lambda: ours(x, validate=True, optimizer="pyro fused"),
        "ours, captured": lambda: ours(x, validate=False, optimizer="pyro", captured=True),
        "ours, captured, fused Adam": lambda: ours(
            x, validate=False, optimizer="pyro fused", captured=True
        ),
        "Pyro, SVI": lambda: pyro_trace_elbo(x, validate=False),
        "ours, captured, checks": lambda: ours(x, validate=True, optimizer="pyro", captured=True),
        theirs: lambda: pyro_trace_elbo(x, validate=True),
        "Pyro, torch Adam, checks": lambda: pyro_trace_elbo(x, validate=True, optimizer="torch"),
    }
    rows = [
        (ours_torch, hand, 1.10),
        (f"{ours_torch}, checks", hand, 1.25),
        ("ours, SVI", hand, None),
        ("ours, SVI, checks", hand, None),
        ("ours, fused Adam", hand, None),
        ("ours, fused Adam", "by hand, fused Adam", None),
        ("ours, fused Adam, checks", "by hand, fused Adam", None),
        ("ours, SVI, checks", theirs, 0.7),
        ("ours, SVI fused, checks", theirs, None),
        ("ours, fused Adam, checks", theirs, None),
        (f"{ours_torch}, checks", "Pyro, torch Adam, checks", None),
        ("ours, captured, checks", theirs, None),
        (hand, theirs, None),
        ("Pyro, SVI", hand, None),
        ("ours, captured", hand, 0.4 if on_gpu else 0.95),
        ("ours, captured, fused Adam", hand, 0.9),
        ("ours, captured, fused Adam", "by hand, fused Adam", None),
        ("ours, captured", "Pyro, SVI", 0.15 if on_gpu else None),
    ]
    if args.compile:
        name = "ours, captured, compiled"
        builds[name] = lambda: ours(
            x, validate=False, optimizer="pyro", captured=True, compile=True
        )
        rows.append((name, hand, None))
    rebuilds = 1 if args.smoke or args.compile else 3
    rounds = 2 if args.smoke else args.rounds
    seconds = side_by_side(builds, rounds=rounds, rebuilds=rebuilds, device=device)
    return ratios(seconds, rows)


def small_steps(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Time a step with one hidden layer of 200 units, where the networks are cheaper."""
    x = (torch.rand(100, 784, device=device) < 0.3).float()
    hand, theirs = "by hand, torch Adam", "Pyro, SVI, checks"
    options: dict[str, Any] = {"hidden": SMALL}
    checked = options | {"validate": True}
    builds = {
        hand: lambda: hand_written(x, **options),
        "ours, torch Adam, checks": lambda: ours(x, **checked),
        "ours, fused Adam, checks": lambda: ours(x, **checked, optimizer="fused"),
        "ours, SVI, checks": lambda: ours(x, **checked, optimizer="pyro"),
        "ours, SVI fused, checks": lambda: ours(x, **checked, optimizer="pyro fused"),
        "ours, captured, checks": lambda: ours(x, **checked, optimizer="pyro", captured=True),
        theirs: lambda: pyro_trace_elbo(x, **checked),
    }
    rows: list[tuple[str, str, float | None]] = [("ours, torch Adam, checks", hand, None)]
    rows += [(name, theirs, None) for name in builds if name != theirs]
    rounds = 2 if args.smoke else args.rounds
    seconds = side_by_side(builds, rounds=rounds, rebuilds=1 if args.smoke else 3, device=device)
    return ratios(seconds, rows)


def leave_one_out_steps(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Time a step of the score function with four particles."""
    x = (torch.rand(100, 784, device=device) < 0.3).float()
    hand = "by hand, leave one out"
    builds = {
        hand: lambda: hand_written_leave_one_out(x, 4),
        "ours": lambda: ours(x, validate=False, estimator=leave_one_out(), particles=4),
        "ours, checks": lambda: ours(x, validate=True, estimator=leave_one_out(), particles=4),
    }
    rounds = 2 if args.smoke else args.rounds
    seconds = side_by_side(builds, rounds=rounds, rebuilds=1 if args.smoke else 3, device=device)
    return ratios(seconds, [("ours", hand, 1.15), ("ours, checks", hand, None)])


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.epilog = "ratio: what / against; reach: the target ratio; met: ratio <= reach"
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="also time compiled captured steps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    pyro.enable_validation(False)
    report = Report("speed", args.out)
    report.table("one step of a VAE, Gumbel straight-through", steps(args, device))
    report.table("the same, one hidden layer of 200", small_steps(args, device))
    report.table("one step, score function, 4 particles", leave_one_out_steps(args, device))
    report.table("one Bernoulli site, 10 data", small_program(args, device))
    report.table("seconds per element, 10 to 1,000 in a plate", sites_in_a_plate(args, device))
    report.table("draws, forward and backward", draws(args, device))
    report.table("exact one-hot draws", exact_draws(args, device))
    if device.type == "cpu":
        report.table("GumbelRao(num_samples=100), peak MiB", memory_of_gumbel_rao())
    report.finish()


if __name__ == "__main__":
    main()
