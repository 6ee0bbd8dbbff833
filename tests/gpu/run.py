"""Run all that needs a GPU, part by part, and write the figures to one file.

    python tests/gpu/run.py --out out/gpu

Each part is a process with its own time limit, so that a failure does not cost the others. The
file ``gpu.json`` is written after each part. It needs neither an installed package nor a network.
Without a GPU, or with ``--smoke``, the parts run at a small size.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).parents[2]
CASES = (
    *("looped", "vectorised", "dtypes", "choices", "bounds", "guides"),
    *("handlers", "laws", "divergences"),
)


class Part(NamedTuple):
    """A part of the run.

    Attributes:
        limit: Seconds after which it is stopped.
        command: Its arguments after ``python``.
        figures: Reads its figures from its output and its folder.
        environment: Variables to add to the environment.
    """

    limit: int
    command: list[str]
    figures: Callable[[str], Any]
    environment: dict[str, str] = {}


def parts(out: Path, device: str, smoke: bool) -> dict[str, Part]:
    """Return the parts in their order, eight minutes at most."""
    small = ["--smoke"] if smoke else []
    marked = [
        str(path) for path in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.cuda" in read(path)
    ]
    pytest = ["-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "-W", "default"]
    report, vae = out / "tests.xml", out / "vae"
    rounds = [] if smoke else ["--rounds", "8"]
    return {
        "tests": Part(
            100, [*pytest, f"--junitxml={report}", *marked], lambda _: read_tests(report)
        ),
        "cases": Part(
            60,
            ["-m", "helpers.pretended_device", *CASES],
            read_cases,
            {"STEP_DEVICE": device},
        ),
        "vae": Part(
            60,
            ["examples/vae.py", "--device", device, "--gradient", "reinmax", *small]
            + ["--out", str(vae)],
            lambda text: {"files": files(vae), "printed": text.splitlines()[-12:]},
        ),
        "speed": Part(
            180,
            ["tests/benchmarks/speed.py", "--device", device, "--out", str(out), *rounds, *small],
            lambda _: json.loads(read(out / "speed.json")),
        ),
        "profile": Part(
            60,
            ["tests/gpu/profile_step.py", "--device", device, "--out", str(out), *small],
            lambda _: json.loads(read(out / "profile.json")),
        ),
    }


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def files(folder: Path) -> dict[str, int]:
    """Return the sizes of a folder's files in bytes."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*"))}


def read_tests(report: Path) -> dict[str, Any]:
    """Return counts of tests, and the messages of those that failed."""
    suite = next(ElementTree.parse(report).iter("testsuite"))
    failed = {
        f"{case.get('classname')}.{case.get('name')}": (problem.get("message") or "")[:500]
        for case in suite.iter("testcase")
        for problem in case
        if problem.tag in ("failure", "error")
    }
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    return counts | {"failed": failed}


def read_cases(text: str) -> dict[str, Any]:
    """Return counts of cases, and the errors of those that failed."""
    found = json.loads(text.splitlines()[-1])
    errors = {
        f"{group}/{name}": error
        for group, cases in found.items()
        for name, error in cases.items()
        if error is not None
    }
    return {"cases": sum(map(len, found.values())), "failed": errors}


def run(part: Part, log: Path) -> dict[str, Any]:
    """Run a part within its time limit; return its status, seconds and figures."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | part.environment | {"PYTHONPATH": os.pathsep.join(paths)}
    environment |= {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *part.command],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(part.limit)
            status = "ok" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and the processes that it started
            process.wait()
            status = f"stopped after {part.limit} s"
    outcome: dict[str, Any] = {"status": status, "seconds": time.perf_counter() - start}
    try:
        outcome["figures"] = part.figures(read(log))
    except (OSError, ValueError, LookupError, StopIteration, ElementTree.ParseError) as error:
        outcome["figures"] = None
        outcome["status"] += f"; no figures ({type(error).__name__}: {error})"
    return outcome


def machine(device: str) -> dict[str, Any]:
    """Return what the figures depend on."""
    found = {"python": sys.version.split()[0], "torch": torch.__version__, "cpus": os.cpu_count()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "memory": properties.total_memory}
        found |= {"cuda": torch.version.cuda}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), metavar="DIR")
    parser.add_argument("--parts", help="some parts, such as cases,speed")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        print("torch finds no GPU: running at smoke size on the CPU", flush=True)
    chosen = parts(out, device, args.smoke or device == "cpu")
    if device == "cpu":  # which other programs may share
        chosen = {name: part._replace(limit=5 * part.limit) for name, part in chosen.items()}
    if args.parts:
        chosen = {name: chosen[name] for name in args.parts.split(",")}
    results: dict[str, Any] = {"machine": machine(device), "device": device, "parts": {}}
    for name, part in chosen.items():
        outcome = results["parts"][name] = run(part, out / f"{name}.log")
        (out / "gpu.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        print(f"{name}: {outcome['status']}, {outcome['seconds']:.0f} s", flush=True)
        if outcome["status"] != "ok":
            print(f"the end of {out / f'{name}.log'}:")
            print("\n".join(read(out / f"{name}.log").splitlines()[-15:]), flush=True)
    print(f"written to {out / 'gpu.json'}")
    sys.exit(any(outcome["status"] != "ok" for outcome in results["parts"].values()))


if __name__ == "__main__":
    main()
