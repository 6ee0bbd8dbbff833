"""Two processes train as one does on their images together."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import image_data
import parallel
import vae
from vae_options import make_parser

ROOT = Path(__file__).parents[1]
EXACT = ["--gradient", "enumerate", "--latents", "1", "--categories", "3", "--hidden", "8"]
FLAGS = [*EXACT, "--smoke", "--num-samples", "5", "--optimizer", "adam", "--batch-size", "50"]


def gradients(estimator: str, batch: torch.Tensor) -> tuple[float, torch.Tensor, dict]:
    """Loss, gradient and the estimator's state from fixed initial parameters, without a step."""
    args = make_parser("").parse_args([*EXACT, "--num-particles", "1"])
    images = image_data.load_images(None, "threshold")
    pyro.set_rng_seed(3)
    fitted, chosen, svi = vae.make_svi(args, estimator, images)
    loss = svi.loss_and_grads(fitted.model, svi.guide, batch)
    parameters = [p for p in nn.ModuleList([fitted, chosen]).parameters() if p.grad is not None]
    gradient = torch.cat([p.grad.flatten() for p in parameters])
    return float(loss), gradient, chosen.state_dict()


ESTIMATORS = ("enumerate", "score")


def worker(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    environment = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, str(value))
        with parallel.processes(torch.device("cpu")):
            batch = parallel.share(image_data.load_images(None, "threshold").train[:31])
            found = {estimator: gradients(estimator, batch) for estimator in ESTIMATORS}
            torch.save(found, Path(folder) / f"{rank}.pt")
            dist.barrier()


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes finds on 31 images: 16 in one and 15 in the other."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(worker, (str(folder), free_port()), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_gradients_are_those_of_one_process(of_two_processes: list[dict]) -> None:
    """Exact gradients (no draws)."""
    images = image_data.load_images(None, "threshold")
    loss, expected, _ = gradients("enumerate", images.train[:31])
    for process in of_two_processes:
        found_loss, found, _ = process["enumerate"]
        assert found_loss == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.norm() > 1


def test_moving_averages_are_of_the_images_of_all_processes(of_two_processes: list[dict]) -> None:
    """A first step leaves a tenth of its mean cost, which is minus the loss per image."""
    for process in of_two_processes:
        loss, _, state = process["score"]
        (average,) = state["baseline._extra_state"]["sums"].values()
        assert float(average) == pytest.approx(-0.1 * loss / 31, rel=1e-5)


def options(folder: Path) -> list[str]:
    return [*FLAGS, "--checkpoint", str(folder / "run.pt"), "--out", str(folder / "out")]


def test_two_processes_train_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vae.main(options(tmp_path / "one"))
    assert capsys.readouterr().out.count("held-out -ELBO") == 1
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    command = [sys.executable, "-m", *torchrun, str(free_port()), "examples/vae.py"]
    done = subprocess.run(
        command + options(tmp_path / "two"), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out -ELBO") == 1  # one process reports
    one, two = (torch.load(tmp_path / folder / "run.pt") for folder in ("one", "two"))
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
