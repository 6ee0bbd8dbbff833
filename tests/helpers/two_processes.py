"""A program for two processes of torchrun: gradients on shares of a batch, then training.

torchrun --nproc-per-node 2 tests/helpers/two_processes.py FOLDER [options of vae.py]
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyro
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import image_data
import parallel
import vae
from vae_options import make_parser

EXACT = ["--gradient", "enumerate", "--latents", "1", "--categories", "3", "--hidden", "8"]
ESTIMATORS = ("enumerate", "score")


def images() -> torch.Tensor:
    """31 images: 16 for one process and 15 for the other."""
    return image_data.load_images(None, "threshold").train[:31]


def gradients(estimator: str, batch: torch.Tensor) -> tuple[float, torch.Tensor, dict]:
    """Loss, gradient and the estimator's state from fixed initial parameters, without a step."""
    args = make_parser("").parse_args([*EXACT, "--num-particles", "1"])
    pyro.set_rng_seed(3)
    all_images = image_data.load_images(None, "threshold")
    fitted, chosen, svi = vae.make_svi(args, estimator, all_images)
    loss = svi.loss_and_grads(fitted.model, svi.guide, batch)
    parameters = [p for p in nn.ModuleList([fitted, chosen]).parameters() if p.grad is not None]
    gradient = torch.cat([p.grad.flatten() for p in parameters])
    return float(loss), gradient, chosen.state_dict()


def main(folder: Path, options: list[str]) -> None:
    torch.set_num_threads(1)
    with parallel.processes(torch.device("cpu")):
        batch = parallel.share(images())
        found = {estimator: gradients(estimator, batch) for estimator in ESTIMATORS}
        torch.save(found, folder / f"{parallel.rank()}.pt")
        vae.main(options)  # in the same group: a second one may meet keys of the first and hang


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
