"""The auto-encoder trains in two processes as in one."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import parallel
import vae

ROOT = Path(__file__).parents[2]
FLAGS = ["--gradient", "enumerate", "--latents", "1", "--categories", "3", "--hidden", "8"]
SHORT = [*FLAGS, "--smoke", "--num-samples", "5", "--batch-size", "50"]


def options(folder: Path) -> list[str]:
    return [*SHORT, "--checkpoint", str(folder / "run.pt"), "--out", str(folder / "out")]


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def test_two_processes_train_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By exact gradients, without draws; uneven shares, and one process that reports."""
    one, two = tmp_path / "one", tmp_path / "two"
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    command = [sys.executable, "-m", *torchrun, "examples/vae.py", *options(two)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out -ELBO") == 1
    vae.main(options(one))
    assert capsys.readouterr().out.count("held-out -ELBO") == 1
    weights, found = (checkpoint.read_weights(folder / "run.pt") for folder in (one, two))
    assert weights.keys() == found.keys()
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    epochs, found_epochs = (checkpoint.read(folder / "run.pt")["epochs"] for folder in (one, two))
    for mine, theirs in zip(epochs, found_epochs, strict=True):
        assert theirs["train_loss"] == pytest.approx(mine["train_loss"], rel=1e-4)


def test_a_batch_smaller_than_the_number_of_processes_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match="the smallest batch of 1500 images has 1 for 2 processes"
    ):
        parallel.check_batches(1500, 1499)
    parallel.check_batches(1500, 1500)
    parallel.check_batches(1500, 100)


def test_shares_of_a_batch(monkeypatch) -> None:
    batch = torch.rand(5, 3)
    assert parallel.world_size() == 1
    assert parallel.share(batch) is batch
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        shares.append(parallel.share(batch))
    assert [len(share) for share in shares] == [3, 2]
    assert {tuple(row) for row in torch.cat(shares).tolist()} == set(map(tuple, batch.tolist()))
