"""Train a discrete auto-encoder by a plain PyTorch loop, without Pyro's SVI and parameter store.

    python examples/torch_loop.py
    python examples/torch_loop.py --accumulate 4 --autocast --compile inductor

The loss is a module that holds the parameters of model, guide and estimators. AdamW, clipping,
accumulation, bfloat16 and torch.compile are PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from tqdm import tqdm

from arguments import count, natural, new_parser, positive
from image_data import load_images
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

LATENTS, CATEGORIES, PIXELS = 10, 10, 64


class Network(nn.Module):
    """Two layers."""  # in a class of its own, since Module.compile skips nn.Sequential

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(*sizes[:2]), nn.Linear(*sizes[1:])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class Model(nn.Module):
    """Ten one-hot latents under a uniform prior, and binary pixels given them."""

    def __init__(self, hidden: int = 256) -> None:
        super().__init__()
        self.decoder = Network(LATENTS * CATEGORIES, hidden, PIXELS)
        self.register_buffer("prior", torch.zeros(LATENTS, CATEGORIES))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(logits=self.prior).to_event(1))
            pixels = self.decoder(z.flatten(-2)).float()  # networks may run in bfloat16
            pyro.sample("x", dist.Bernoulli(logits=pixels).to_event(1), obs=x)


class Guide(nn.Module):
    """The latents of an image, computed by an encoder."""

    def __init__(self, hidden: int = 256) -> None:
        super().__init__()
        self.encoder = Network(PIXELS, hidden, LATENTS * CATEGORIES)

    def forward(self, x: Tensor) -> None:
        logits = self.encoder(x).float().unflatten(-1, (LATENTS, CATEGORIES))
        with pyro.plate("images", len(x)):
            pyro.sample("z", dist.OneHotCategorical(logits=logits).to_event(1))


def make_loss(gradient: str, particles: int = 1) -> nn.Module:
    """Return the negative ELBO as a module, with the parameters of all its parts."""
    elbo = Estimator_ELBO(particles, vectorize_particles=particles > 1, max_plate_nesting=1)
    return elbo(Model(), config_gradient(Guide(), {"z": gradient}))


def take_step(
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: Sequence[Tensor],
    *,
    autocast: bool = False,
    max_norm: float = 10.0,
) -> float:
    """Take a step on a batch in parts, whose gradients add up; return the loss of an image."""
    size, total = sum(map(len, parts)), 0.0
    optimizer.zero_grad()
    for part in parts:
        with torch.autocast(part.device.type, torch.bfloat16, enabled=autocast):
            value = loss(part) / size
        value.backward()
        total += value.item()
    nn.utils.clip_grad_norm_(loss.parameters(), max_norm)
    optimizer.step()
    return total


@torch.no_grad()
def held_out_loss(loss: nn.Module, x: Tensor) -> float:
    """Return the loss of a held-out image; evaluation changes no estimator."""
    loss.eval()
    value = float(loss(x)) / len(x)
    loss.train()
    return value


def main(argv: list[str] | None = None) -> list[float]:
    """Train, and print and return the held-out loss after each epoch."""
    parser = new_parser(__doc__)
    parser.add_argument("--gradient", default="reinmax", help="name of the latents' estimator")
    parser.add_argument("--particles", type=count, default=1, help="number of particles")
    parser.add_argument("--epochs", type=count, default=50, help="passes over the images")
    parser.add_argument("--batch-size", type=count, default=100, help="images per step")
    parser.add_argument("--accumulate", type=count, default=1, help="parts of a batch")
    parser.add_argument("--lr", type=positive, default=3e-3, help="learning rate of AdamW")
    parser.add_argument("--autocast", action="store_true", help="run networks in bfloat16")
    parser.add_argument("--compile", metavar="BACKEND", help="compile networks: inductor, ...")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--smoke", action="store_true", help="two epochs of 200 images")
    args = parser.parse_args(argv)
    pyro.set_rng_seed(args.seed)
    images = load_images(None, "threshold").to(torch.device(args.device))
    if args.smoke:
        args.epochs, images = 2, images.head(200, 50)
    loss = make_loss(args.gradient, args.particles).to(args.device)
    if args.compile:
        loss.model.decoder.compile(backend=args.compile)
        loss.guide.encoder.compile(backend=args.compile)
    optimizer = torch.optim.AdamW(loss.parameters(), lr=args.lr)
    losses: list[float] = []
    bar = tqdm(range(args.epochs), desc=args.gradient, mininterval=0.5)
    for _ in bar:
        for batch in images.batches(args.batch_size):
            take_step(loss, optimizer, batch.chunk(args.accumulate), autocast=args.autocast)
        losses.append(held_out_loss(loss, images.test))
        bar.set_postfix(held_out=f"{losses[-1]:.2f}", refresh=False)
    print(f"{args.gradient}: held-out loss {losses[-1]:.2f} nats an image")
    return losses


if __name__ == "__main__":
    main()
