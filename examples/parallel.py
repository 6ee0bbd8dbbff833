"""Several processes, one training run: torchrun starts them, each takes a share of every batch.

    torchrun --nproc-per-node 2 examples/vae.py --gradient reinmax

Without torchrun every function here leaves things as they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
import torch.distributed as dist
from pyro.infer import SVI
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pyro_gumbel.estimators import MovingAverage
from pyro_gumbel.infer import Estimator_ELBO


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process, where GPUs are used."""
    if device.type != "cuda":
        return device
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Let the processes that torchrun started find one another."""
    if world_size() == 1:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def check_batches(num_images: int, batch_size: int) -> None:
    """Refuse batches, the last one included, that leave a process without an image."""
    smallest = min(batch_size, num_images % batch_size or batch_size)
    if smallest < world_size():
        raise ValueError(
            f"--batch-size {batch_size}: {num_images} images make a batch of {smallest}, and "
            f"{world_size()} processes share each; choose another batch size"
        )


def share(batch: torch.Tensor) -> torch.Tensor:
    """Take this process's images of a batch."""
    return batch[rank() :: world_size()] if world_size() > 1 else batch


@contextmanager
def same_everywhere(seed: int, epoch: int) -> Iterator[None]:
    """Draw the same numbers in every process (the order of the images), in a stream apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1_000_003 * seed + epoch)
        yield


def seed_share(seed: int, epoch: int) -> None:
    """Give each process a stream of its own for the latents of its share."""
    if world_size() > 1:
        pyro.set_rng_seed((1_000_003 * seed + epoch) * world_size() + rank())


def same_averages(everything: nn.Module, num_images: int) -> None:
    """Make moving averages of costs those of all processes' images, ``num_images`` of them here.

    An average is linear in the costs: the processes' averages, weighted by their images, are what
    one process with all the images would hold.
    """
    total = torch.tensor(float(num_images))
    averages = [module for module in everything.modules() if isinstance(module, MovingAverage)]
    for average in averages:
        state = average.get_extra_state()
        for site, mean in state["sums"].items():
            parts = torch.stack([mean * num_images, total.to(mean)])
            dist.all_reduce(parts)
            state["sums"][site] = parts[0] / parts[1]
        average.set_extra_state(state)


class _Loss(nn.Module):
    """The ELBO's loss as a module that has every parameter: what is distributed."""

    def __init__(
        self, elbo: Estimator_ELBO, model: Any, guide: Any, everything: nn.Module
    ) -> None:
        super().__init__()
        self.everything = everything
        self.programs = (model, guide)
        self.elbo = elbo

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.elbo.differentiable_loss(*self.programs, batch)


def make_svi(
    elbo: Estimator_ELBO, model: Any, guide: Any, optimizer: Any, everything: nn.Module
) -> SVI:
    """Make an ``SVI`` whose losses and gradients are those of all processes' images together.

    ``everything`` holds the modules whose parameters are trained, the estimator's included.
    """
    if world_size() == 1:
        return SVI(model, guide, optimizer, loss=elbo)
    module = _Loss(elbo, model, guide, everything)
    if any(parameter.requires_grad for parameter in module.parameters()):
        module = DistributedDataParallel(module)

    def loss_and_grads(model: Any, guide: Any, batch: torch.Tensor) -> torch.Tensor:
        # DistributedDataParallel averages gradients, and the loss is a sum over images.
        loss = module(batch) * world_size()
        loss.backward()
        same_averages(everything, len(batch))
        total = loss.detach() / world_size()
        dist.all_reduce(total)
        return total

    return SVI(model, guide, optimizer, loss=elbo.loss, loss_and_grads=loss_and_grads)
