"""One categorical VAE three times: twice with Pyro's straight-through classes, once with ours.

    python examples/pyro_comparison.py
    python examples/pyro_comparison.py --data DIR --epochs 20

Each program is trained the same way. Printed are the loss as the program itself reports it, and
the negative ELBO of the discrete model on held-out images, for all three by one evaluator that
draws hard samples from the guide and scores them by their exact mass.
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
    """Thirty latents of ten categories, a uniform prior, one hidden layer on either side."""

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
        # In float32 Pyro's samples do not always pass their own check of the support.
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
    """Pyro's straight-through guide under the model's own prior."""
    return (
        lambda x: vae.model(x, vae.discrete),
        lambda x: vae.guide(x, vae.straight_through),
        Trace_ELBO(),
    )


def pyro_guide_and_prior(vae: VAE) -> tuple[Any, ...]:
    """Pyro's straight-through guide, with the prior of the model relaxed as well."""
    return (
        lambda x: vae.model(x, vae.straight_through),
        lambda x: vae.guide(x, vae.straight_through),
        Trace_ELBO(),
    )


def ours(vae: VAE) -> tuple[Any, ...]:
    """Discrete model and discrete guide, with the gradient chosen by the loss's side."""
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
    """Train one program; return its last epoch's loss an image and its held-out -ELBO."""
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
    """Nats an image when every pixel is coded by its training mean and no latent is used."""
    mean = images.train.mean(0).clamp(1e-3, 1 - 1e-3)
    return -dist.Bernoulli(probs=mean).log_prob(images.test).sum(-1).mean().item()


def main(argv: list[str] | None = None) -> None:
    """Train the three programs and print the table."""
    parser = new_parser(__doc__)
    parser.add_argument("--data", metavar="DIR", help="IDX files (default: scikit-learn's digits)")
    parser.add_argument("--epochs", type=count, default=100, help="of each program")
    parser.add_argument("--batch-size", type=count, default=100, help="images a step")
    parser.add_argument("--lr", type=positive, default=1e-3, help="step size of Adam")
    parser.add_argument("--temperature", type=positive, default=0.5, help="of Pyro's classes")
    parser.add_argument("--num-samples", type=count, default=10, help="hard draws, held-out ELBO")
    parser.add_argument("--seed", type=natural, default=0, help="of each program")
    parser.add_argument("--smoke", action="store_true", help="two epochs of a few images")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        images = load_images(args.data, binarize="threshold")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.smoke:
        args.epochs, images = 2, images.head(200, 100)

    print(f"{images.name}, pixels on from one half, {LATENTS} latents of {CATEGORIES} categories")
    print(f"{args.epochs} epochs, Adam {args.lr:g}, nats an image\n")
    print(f"{'program':40}{'loss as reported':>18}{'held-out -ELBO':>16}")
    for name, program in PROGRAMS.items():
        reported, held_out = train(program, images, args)
        print(f"{name:40}{reported:18.6g}{held_out:16.1f}", flush=True)
    print(f"{'no latent, every pixel at its mean':40}{'':18}{mean_image_loss(images):16.1f}")


if __name__ == "__main__":
    main()
