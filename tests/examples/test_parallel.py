"""Two processes train as one does on their images together."""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import two_processes
from helpers.two_processes import EXACT, gradients

import parallel
import vae

ROOT = Path(__file__).parents[2]
FLAGS = [*EXACT, "--smoke", "--num-samples", "5", "--optimizer", "adam", "--batch-size", "50"]


def options(folder: Path) -> list[str]:
    return [*FLAGS, "--checkpoint", str(folder / "run.pt"), "--out", str(folder / "out")]


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the gradients and the checkpoint of two processes."""
    folder = tmp_path_factory.mktemp("processes")
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    program = [str(Path(two_processes.__file__)), str(folder), *options(folder)]
    command = [sys.executable, "-m", *torchrun, *program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out -ELBO") == 1  # one process reports
    return folder


def found_by_each(folder: Path, estimator: str) -> list[tuple[float, torch.Tensor, dict]]:
    return [torch.load(folder / f"{rank}.pt")[estimator] for rank in range(2)]


def test_gradients_are_those_of_one_process(of_two_processes: Path) -> None:
    """Exact gradients (no draws)."""
    loss, expected, _ = gradients("enumerate", two_processes.images())
    for found_loss, found, _ in found_by_each(of_two_processes, "enumerate"):
        assert found_loss == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.norm() > 1


def test_moving_averages_are_of_the_images_of_all_processes(of_two_processes: Path) -> None:
    """A first step leaves a tenth of its mean cost, which is minus the loss per image."""
    for loss, _, state in found_by_each(of_two_processes, "score"):
        (average,) = state["baseline._extra_state"]["sums"].values()
        assert float(average) == pytest.approx(-0.1 * loss / 31, rel=1e-5)


def test_two_processes_train_as_one(
    of_two_processes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae.main(options(tmp_path))
    assert capsys.readouterr().out.count("held-out -ELBO") == 1
    one, two = (torch.load(folder / "run.pt") for folder in (tmp_path, of_two_processes))
    assert one["module"].keys() == two["module"].keys()
    for name, value in one["module"].items():
        torch.testing.assert_close(two["module"][name], value, rtol=1e-3, atol=1e-4)
    for mine, theirs in zip(one["epochs"], two["epochs"], strict=True):
        assert theirs["train_loss"] == pytest.approx(mine["train_loss"], rel=1e-4)


def test_processes_draw_latents_of_their_own_and_images_in_one_order(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    latents, orders = [], []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        for epoch in range(2):
            parallel.seed_share(7, epoch)
            latents.append(torch.rand(50))
            with parallel.same_everywhere(7, epoch):
                orders.append(torch.randperm(50))
    for one, other in itertools.combinations(latents, 2):
        assert not torch.equal(one, other)
    assert torch.equal(orders[0], orders[2])
    assert torch.equal(orders[1], orders[3])


def test_a_batch_smaller_than_the_number_of_processes_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match="the smallest batch of 1500 images has 1 for 2 processes"
    ):
        parallel.check_batches(1500, 1499)
    parallel.check_batches(1500, 1500)
    parallel.check_batches(1500, 100)


def test_without_torchrun_nothing_changes() -> None:
    batch = torch.rand(5, 3)
    assert parallel.world_size() == 1
    assert parallel.share(batch) is batch
    state = torch.get_rng_state()
    parallel.seed_share(0, 0)
    with parallel.same_everywhere(0, 0):
        first = torch.rand(3)
    with parallel.same_everywhere(0, 1):
        assert not torch.equal(first, torch.rand(3))
    assert torch.equal(state, torch.get_rng_state())
