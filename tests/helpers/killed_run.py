"""Train a program that is killed in a step and in a save, and resume it.

python tests/helpers/killed_run.py FOLDER
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI

from pyro_gumbel.infer import Estimator_ELBO, config_gradient, load_checkpoint, save_checkpoint

STEPS = 8


def train(path: Path, kill: str) -> None:
    """Load the file if it exists, train to the last step, and save after each step."""
    step = 0

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z * pyro.param("loc", torch.zeros(())), 1.0), obs=x)

    def guide(x):
        if (kill, step) == ("step", 3):
            os.kill(os.getpid(), signal.SIGKILL)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.zeros(()))))

    pyro.set_rng_seed(0)
    config = config_gradient(guide, {"z": "rebar"})
    svi = SVI(model, config, pyro.optim.Adam({"lr": 0.1}), Estimator_ELBO())
    if path.exists():
        step = load_checkpoint(path, svi)["step"]
    fsync = os.fsync

    def fsync_or_die(number):
        if (kill, step) == ("save", 6):
            os.ftruncate(number, 500)  # the rest has not reached the disk
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(number)

    os.fsync = fsync_or_die
    while step < STEPS:
        step += 1
        svi.step(torch.rand(5))
        save_checkpoint(path, svi, step=step)


def start(path: Path, kill: str) -> None:
    """Train in another process, and check that it was killed or succeeded."""
    child = os.fork()
    if child == 0:
        train(path, kill)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if kill:
        assert os.WTERMSIG(status) == signal.SIGKILL
        print("killed")
    else:
        assert status == 0


def is_same(one, other) -> bool:
    """Compare the contents of two files, bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(is_same, one, other))
    return one == other


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    stopped, whole = folder / "stopped.pt", folder / "whole.pt"
    for kill in ("step", "save", ""):
        start(stopped, kill)
    start(whole, "")
    one, other = (torch.load(path, weights_only=True) for path in (stopped, whole))
    assert one["more"] == other["more"] == {"step": STEPS}
    assert is_same(one, other)
    print("same")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
