"""Train a categorical VAE with Pyro's straight-through classes and with pyro_gumbel.

    python examples/pyro_comparison.py
    python examples/pyro_comparison.py --data DIR --epochs 20

Two programs use Pyro's class: in the guide, and in guide and model. The third uses ReinMax. All
are trained in the same way. The table shows the loss that each program reports, and the negative
ELBO of the discrete model on held-out images. One evaluator computes the latter for all three: it
draws hard samples from the guide and scores them by their exact probability mass.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn
from tqdm import tqdm

from arguments import count, natural, new_parser, positive
from evaluation import held_out_bounds
from image_data import Images, load_images
from pyro_gumbel.estimators import ReinMax
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

LATENTS, CATEGORIES, HIDDEN = 30, 10, 200


class VAE(nn.Module):
    """A VAE with one hidden layer in encoder and decoder, and a uniform prior."""

    def __init__(self, num_pixels: int, temperature: float) -> None:
        super().__init__()
        size = LATENTS * CATEGORIES
        self.encoder = nn.Sequential(
            nn.Linear(num_pixels, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, size)
        )
        self.decoder = nn.Sequential(
            nn.Linear(size, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, num_pixels)
        )
        self.temperature = torch.tensor(temperature)

    def discrete(self, logits: torch.Tensor) -> dist.TorchDistribution:
        return dist.OneHotCategorical(logits=logits)

    def straight_through(self, logits: torch.Tensor) -> dist.TorchDistribution:
        # In float32 some of Pyro's samples fail its own check of the support.
        return dist.RelaxedOneHotCategoricalStraightThrough(
            self.temperature, logits=logits, validate_args=False
        )

    def model(self, x: torch.Tensor, family: Callable[..., Any]) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("images", len(x)):
            prior = family(torch.zeros(LATENTS, CATEGORIES)).to_event(1)
            z = pyro.sample("z", prior)
            logits = self.decoder(z.flatten(-2))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x: torch.Tensor, family: Callable[..., Any]) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("images", len(x)):
            logits = self.encoder(x).unflatten(-1, (LATENTS, CATEGORIES))
            pyro.sample("z", family(logits).to_event(1))


def pyro_guide(vae: VAE) -> tuple[Any, ...]:
    """Return model, guide and loss with Pyro's straight-through class in the guide."""
    return (
        lambda x: vae.model(x, vae.discrete),
        lambda x: vae.guide(x, vae.straight_through),
        Trace_ELBO(),
    )


def pyro_guide_and_prior(vae: VAE) -> tuple[Any, ...]:
    """Return model, guide and loss with Pyro's straight-through class in both programs."""
    return (
        lambda x: vae.model(x, vae.straight_through),
        lambda x: vae.guide(x, vae.straight_through),
        Trace_ELBO(),
    )


def ours(vae: VAE) -> tuple[Any, ...]:
    """Return a discrete model, a discrete guide with ReinMax, and the loss."""
    return (
        lambda x: vae.model(x, vae.discrete),
        config_gradient(lambda x: vae.guide(x, vae.discrete), {"z": ReinMax()}),
        Estimator_ELBO(),
    )


PROGRAMS = {
    "Pyro, straight-through guide": pyro_guide,
    "Pyro, straight-through guide and prior": pyro_guide_and_prior,
    "pyro_gumbel, ReinMax": ours,
}


def train(program: Callable[..., Any], images: Images, args: argparse.Namespace) -> list[float]:
    """Train one program; return its last reported loss and held-out -ELBO, per image."""
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    vae = VAE(images.num_pixels, args.temperature)
    model, guide, loss = program(vae)
    svi = SVI(model, guide, Adam({"lr": args.lr}), loss)
    reported = float("nan")
    for _ in tqdm(range(args.epochs), unit="epoch", leave=False):
        total = sum(svi.step(batch) for batch in images.batches(args.batch_size))
        reported = total / len(images.train)
    bounds = held_out_bounds(
        lambda x: vae.model(x, vae.discrete),
        lambda x: vae.guide(x, vae.discrete),
        images.test,
        num_samples=args.num_samples,
    )
    return [reported, -bounds.elbo]


def mean_image_loss(images: Images) -> float:
    """Return the loss per image of Bernoulli pixels with their training means."""
    mean = images.train.mean(0).clamp(1e-3, 1 - 1e-3)
    return -dist.Bernoulli(probs=mean).log_prob(images.test).sum(-1).mean().item()


def main(argv: list[str] | None = None) -> None:
    """Train the three programs and print the table."""
    parser = new_parser(__doc__)
    parser.add_argument("--data", metavar="DIR", help="IDX files (default: scikit-learn's digits)")
    add = parser.add_argument
    add("--epochs", type=count, default=100, help="epochs of each program")
    add("--batch-size", type=count, default=100, help="images per step")
    add("--lr", type=positive, default=1e-3, help="learning rate of Adam")
    add("--temperature", type=positive, default=0.5, help="temperature of Pyro's classes")
    add("--num-samples", type=count, default=10, help="hard draws for the held-out ELBO")
    add("--seed", type=natural, default=0, help="seed of each program")
    add("--smoke", action="store_true", help="a quick run with few images and epochs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        images = load_images(args.data, binarize="threshold")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.smoke:
        args.epochs, images = 2, images.head(200, 100)

    print(f"{images.name}, thresholded at one half; {LATENTS} latents of {CATEGORIES} categories")
    print(f"{args.epochs} epochs, Adam {args.lr:g}, nats per image\n")
    print(f"{'program':40}{'reported loss':>18}{'held-out -ELBO':>16}")
    for name, program in PROGRAMS.items():
        reported, held_out = train(program, images, args)
        print(f"{name:40}{reported:18.6g}{held_out:16.1f}", flush=True)
    print(f"{'no latents, every pixel at its mean':40}{'':18}{mean_image_loss(images):16.1f}")


if __name__ == "__main__":
    main()
