"""Train a variational auto-encoder with discrete latents by a gradient estimator.

    python examples/vae.py --gradient reinmax
    python examples/vae.py --data DIR --latents 30 --categories 10 --gradient score:4
    python examples/vae.py --compare reinmax,straight_through,score:4 --seeds 3
    torchrun --nproc-per-node 2 examples/vae.py --gradient reinmax

``NAME:K`` is the estimator NAME with K particles. See examples/README.md.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from torch import nn
from tqdm import tqdm

import checkpoint
import gradients
import parallel
from arguments import make_folder
from evaluation import held_out_bounds
from image_data import Images, load_images
from pyro_gumbel.infer import (
    DistributedSVI,
    Estimator_ELBO,
    config_gradient,
    save_checkpoint,
)
from report import report
from vae_options import make_parser, settings_of


def latent_distribution(kind: str, features: torch.Tensor) -> dist.TorchDistribution:
    """Return an image's latent distribution from features ``(..., latents, width)``."""
    if kind == "onehot":
        return dist.OneHotCategorical(logits=features).to_event(1)
    if kind == "bernoulli":
        return dist.Bernoulli(logits=features.squeeze(-1)).to_event(1)
    loc, log_scale = features.unbind(-1)
    return dist.Normal(loc, log_scale.exp()).to_event(1)


class VAE(nn.Module):
    """A VAE with latents z under a uniform or standard normal prior, and an image x."""

    def __init__(self, args: argparse.Namespace, num_pixels: int) -> None:
        super().__init__()
        width = {"onehot": args.categories, "bernoulli": 1, "normal": 2}[args.latent]
        size = args.latents * (args.categories if args.latent == "onehot" else 1)
        self.kind = args.latent
        self.encoder = mlp(num_pixels, *args.hidden, args.latents * width)
        self.decoder = mlp(size, *reversed(args.hidden), num_pixels)
        self.register_buffer("prior", torch.zeros(args.latents, width))
        self.grey = args.binarize == "none"

    def model(self, x: torch.Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", latent_distribution(self.kind, self.prior))
            # Grey values are expectations of binary pixels, outside Bernoulli's support.
            pixels = dist.Bernoulli(
                logits=self.decode(z), validate_args=False if self.grey else None
            )
            pyro.sample("x", pixels.to_event(1), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("images", len(x)):
            features = self.encoder(x).unflatten(-1, self.prior.shape)
            pyro.sample("z", latent_distribution(self.kind, features))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(z.flatten(-2) if self.kind == "onehot" else z)

    @torch.no_grad()
    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        features = self.encoder(x).unflatten(-1, self.prior.shape)
        return self.decode(latent_distribution(self.kind, features).sample()).sigmoid()

    @torch.no_grad()
    def new_images(self, number: int) -> torch.Tensor:
        return self.decode(latent_distribution(self.kind, self.prior).sample((number,))).sigmoid()


def mlp(*sizes: int) -> nn.Sequential:
    """Return linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for size_in, size_out in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(size_in, size_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def make_svi(args: argparse.Namespace, gradient: str, images: Images) -> tuple[VAE, Any, SVI]:
    """Make a new VAE, the estimator of its latents, and the SVI."""
    pyro.clear_param_store()
    vae = VAE(args, images.num_pixels).to(images.train.device)
    estimator, num_particles = gradients.parse(
        gradient, args.num_particles, args.temperature, reparameterized=args.latent == "normal"
    )
    elbo = Estimator_ELBO(
        num_particles,
        vectorize_particles=True,
        max_plate_nesting=1,
        analytic_kl=args.analytic_kl,
    )
    guide = config_gradient(vae.guide, {"z": estimator})
    optimizer = {"adam": pyro.optim.Adam, "radam": pyro.optim.RAdam}[args.optimizer]
    optim = optimizer({"lr": args.lr})
    return vae, estimator, DistributedSVI(vae.model, guide, optim, elbo, plate="images")


def train(
    args: argparse.Namespace, gradient: str, seed: int, images: Images
) -> tuple[VAE, list[dict[str, float]]]:
    """Fit one VAE by SVI; return it with the losses of each epoch, in nats per image."""
    pyro.set_rng_seed(seed)
    vae, estimator, svi = make_svi(args, gradient, images)
    epochs: list[dict[str, float]] = []
    everything = nn.ModuleList([vae, estimator])
    settings = settings_of(args, gradient, seed, images)
    if args.checkpoint and args.checkpoint.exists():
        epochs = checkpoint.load(args.checkpoint, svi, everything, settings)
        if len(epochs) > args.epochs:
            raise checkpoint.CheckpointError(
                f"the checkpoint {args.checkpoint} has {len(epochs)} epochs, more than --epochs "
                f"{args.epochs}; write --epochs {len(epochs)} or more"
            )
    num_batches = -(-len(images.train) // args.batch_size)
    bar = tqdm(
        total=num_batches * args.epochs,
        initial=num_batches * len(epochs),
        desc=f"{gradient}, seed {seed}",
        mininterval=0.5,
        disable=parallel.rank() > 0,
    )
    while len(epochs) < args.epochs:
        start, total, seen = time.perf_counter(), 0.0, 0
        with torch.random.fork_rng(devices=[]):  # the same order in every process
            torch.manual_seed(1_000_003 * seed + len(epochs))
            batches = images.batches(args.batch_size)
        for number, batch in enumerate(batches):
            total, seen = total + svi.step(parallel.share(batch)), seen + len(batch)
            if number % 20 == 0:
                bar.set_postfix(elbo=f"{-total / seen:.2f}", refresh=False)
            bar.update()
        seconds = time.perf_counter() - start
        bounds = held_out_bounds(vae.model, vae.guide, images.test, num_samples=4)
        epochs.append(
            {"train_loss": total / seen, "held_out_loss": -bounds.elbo, "seconds": seconds}
        )
        if args.checkpoint:
            save_checkpoint(args.checkpoint, svi, settings=settings, epochs=epochs)
    bar.close()
    return vae, epochs


def find_device(name: str) -> torch.device:
    """Return the device: with ``"auto"``, the GPU if there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device; write --device cpu")
    on_gpu = name != "cpu" and torch.cuda.is_available()
    return parallel.local_device(torch.device("cuda" if on_gpu else "cpu"))


def main(argv: list[str] | None = None) -> None:
    """Train with one or several estimators; print the bounds and plot the figures."""
    parser = make_parser(__doc__.splitlines()[0])
    args = parser.parse_args(argv)
    make_folder(parser, args.out)
    if args.checkpoint:
        make_folder(parser, args.checkpoint.parent, "--checkpoint")
    torch.set_num_threads(1)  # layers this small are slower on more threads
    names = args.compare or [args.gradient]
    seeds = range(args.seed, args.seed + args.seeds)
    if args.checkpoint and len(names) * len(seeds) > 1:
        parser.error(
            "--checkpoint is for one run; give one --gradient, without --compare or --seeds"
        )
    if args.temperature is not None and not any(map(gradients.takes_temperature, names)):
        parser.error(
            f"--temperature: {', '.join(names)} would ignore it, without a temperature or with "
            "@T; leave it out"
        )
    try:
        device = find_device(args.device)
        images = load_images(args.data, args.binarize).to(device)
        if args.smoke:
            args.epochs, images = min(args.epochs, 2), images.head(200, 50)
        parallel.check_batches(len(images.train), args.batch_size)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    with parallel.processes(device):
        one = images.train[:1]
        gradients.try_all(
            parser, names, lambda name: make_svi(args, name, images)[2].evaluate_loss(one)
        )
        try:
            train_all(args, names, seeds, images)
        except checkpoint.CheckpointError as error:
            parser.error(str(error))


def train_all(args: argparse.Namespace, names: list[str], seeds: range, images: Images) -> None:
    """Train with each estimator and seed, and report."""
    trained: dict[str, dict[int, VAE]] = {name: {} for name in names}
    runs: dict[str, dict[int, list[dict[str, float]]]] = {name: {} for name in names}
    for name in names:
        for seed in seeds:
            trained[name][seed], runs[name][seed] = train(args, name, seed, images)
    if parallel.rank() == 0:
        report(args, images, trained, runs)


if __name__ == "__main__":
    main()
