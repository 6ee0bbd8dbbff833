"""Profile a step of a categorical VAE, eager and captured.

python tests/gpu/profile_step.py --device cuda --out out/gpu
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import pyro
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from _vaes import Step, ours

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def profiled(step: Step, count: int, device: torch.device) -> dict[str, Any]:
    """Return times and counts of one step, from ``count`` of them."""
    on_gpu = device.type == "cuda"
    for _ in range(6):  # captured steps are recorded here
        step()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(count):
        step()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        for _ in range(count):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    events = profiler.key_averages()
    found: dict[str, Any] = {"ms": 1e3 * seconds / count}
    found["operations"] = sum(e.count for e in events if e.key.startswith("aten::")) / count
    if not on_gpu:
        largest = sorted(events, key=lambda e: -e.self_cpu_time_total)[:10]
        found["largest"] = {e.key: e.self_cpu_time_total / count / 1e3 for e in largest}
        return found
    kernels = [e for e in events if e.device_type is DeviceType.CUDA]
    busy = sum(e.self_device_time_total for e in kernels) / count / 1e3
    largest = sorted(kernels, key=lambda e: -e.self_device_time_total)[:10]
    return found | {
        "ms_busy": busy,
        "idle": 1 - busy / found["ms"],
        "kernels": sum(e.count for e in kernels) / count,
        "launches": {e.key: e.count / count for e in events if e.key in LAUNCHES},
        "waits": {e.key: e.count / count for e in events if e.key.startswith(WAITS)},
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "largest": {e.key[:80]: e.self_device_time_total / count / 1e3 for e in largest},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), metavar="DIR")
    parser.add_argument("--smoke", action="store_true", help="a few steps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    device = torch.device(args.device)
    x = (torch.rand(100, 784, device=device) < 0.3).float()
    optimizer = "pyro fused"
    steps = {
        "eager": ours(x, validate=False, optimizer=optimizer),
        "captured": ours(x, validate=False, optimizer=optimizer, captured=True),
    }
    count = 2 if args.smoke else 50
    found = {name: profiled(step, count, device) for name, step in steps.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "profile.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
