"""Time the training of an auto-encoder in one process and in two.

    python tests/benchmarks/processes.py

Each process has one thread and the same number of images in a step. Runs of one and of two
processes alternate. Ratios are medians of the rounds' ratios of images a second: of the clock, and
of CPU time, which counts neither other programs nor waiting.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import pyro
import torch
import torch.distributed
from _report import Report, make_parser
from _vaes import VAE

from pyro_gumbel.infer import DistributedSVI, Estimator_ELBO, config_gradient


def work(args: argparse.Namespace) -> None:
    """Train in one of several processes; the first prints seconds per step."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{args.store}", rank=args.rank, world_size=args.processes
    )
    vae = VAE(torch.device("cpu"))
    x = (torch.rand(args.batch, 784) < 0.3).float()
    elbo = Estimator_ELBO(vectorize_particles=True, max_plate_nesting=1)
    guide = config_gradient(vae.guide, "gumbel_straight_through")
    svi = DistributedSVI(vae.model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    for _ in range(3):
        svi.step(x)
    start, start_cpu = time.perf_counter(), time.process_time()
    for _ in range(args.steps):
        svi.step(x)
    seconds = (time.perf_counter() - start) / args.steps
    cpu = (time.process_time() - start_cpu) / args.steps
    if args.rank == 0:
        print(json.dumps({"seconds": seconds, "cpu": cpu}))
    torch.distributed.destroy_process_group()


def run(args: argparse.Namespace, processes: int) -> dict[str, float]:
    """Start the processes; return seconds per step, of the clock and of one process's CPU."""
    with tempfile.TemporaryDirectory() as folder:
        options = [f"--processes={processes}", f"--store={folder}/store", f"--batch={args.batch}"]
        command = [sys.executable, __file__, *options, f"--steps={args.steps}"]
        started = [
            subprocess.Popen(
                [*command, f"--rank={rank}"],
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(processes)
        ]
        printed = [process.communicate()[0] for process in started]
    return json.loads(printed[0])


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=200, help="images a step, of each process")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank >= 0:
        work(args)
        return
    if args.smoke:
        args.steps, args.rounds = 2, 1
    rounds = [{count: run(args, count) for count in (1, 2)} for _ in range(args.rounds)]
    report = Report("processes", args.out)
    rows: list[dict[str, Any]] = []
    for count in (1, 2):
        row: dict[str, Any] = {"processes": count}
        for key in ("seconds", "cpu"):
            seconds = statistics.median(each[count][key] for each in rounds)
            ratios = [count * each[1][key] / each[count][key] for each in rounds]
            row[f"images/s by {key}"] = count * args.batch / seconds
            row[f"ratio by {key}"] = statistics.median(ratios)
        rows.append(row)
    report.table(f"gumbel straight-through, 784-512-256-[30 x 10], {args.batch} images each", rows)
    report.finish()


if __name__ == "__main__":
    main()
