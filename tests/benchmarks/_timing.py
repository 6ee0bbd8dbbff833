"""Time several implementations in turn."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Step = Callable[[], Any]
Build = Callable[[], Step]


def keep_memory() -> None:
    """Make the C library keep freed memory.

    Otherwise returning memory to the system and the placement of arrays change the time of a step
    by about a sixth, at random.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    trim, map_large = -1, -3
    libc.mallopt(trim, 1 << 30)
    libc.mallopt(map_large, 32 << 20)


def now(device: torch.device) -> float:
    """Return seconds: of this process's CPU time, or of the wall clock on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def as_graph(step: Step) -> Step:
    """Record a step as a CUDA graph; return its replay."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # warm-up of libraries and compilers
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def side_by_side(
    builds: dict[str, Build],
    *,
    rounds: int,
    inner: int = 1,
    rebuilds: int = 3,
    device: torch.device | None = None,
) -> dict[str, list[float]]:
    """Run the steps in turn for ``rounds`` rounds, in ``rebuilds`` new set-ups.

    Returns:
        Seconds per run by name.
    """
    device = device or torch.device("cpu")
    seconds: dict[str, list[float]] = {name: [] for name in builds}
    for rebuild in range(rebuilds):
        names = list(builds)
        names = names[rebuild % len(names) :] + names[: rebuild % len(names)]  # another order
        steps = {name: builds[name]() for name in names}
        for step in steps.values():
            for _ in range(4):  # captured steps are recorded here
                step()
        for _ in range(rounds):
            for name, step in steps.items():
                start = now(device)
                for _ in range(inner):
                    step()
                seconds[name].append((now(device) - start) / inner)
    return seconds


def ratios(
    seconds: dict[str, list[float]], rows: list[tuple[str, str, float | None]]
) -> list[dict[str, Any]]:
    """Return median and quartiles of each round's ratio, for rows ``(what, against, reach)``."""
    table = []
    for what, against, reach in rows:
        ratio = [a / b for a, b in zip(seconds[what], seconds[against], strict=True)]
        low, median, high = statistics.quantiles(ratio, n=4)
        table.append(
            {
                "what": what,
                "against": against,
                "ms": 1e3 * statistics.median(seconds[what]),
                "ratio": median,
                "quartiles": f"{low:.3g}-{high:.3g}",
                "reach": reach,
                "met": "-" if reach is None else "yes" if median <= reach else "NO",
            }
        )
    return table
