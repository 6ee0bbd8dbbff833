"""Train a GAN on discrete strings, and measure its generator exactly.

    python examples/sequence_gan.py
    python examples/sequence_gan.py --gradients gumbel_straight_through@0.5 --steps 5000

The generator, an LSTM that draws one-hot tokens, is a Pyro guide. The reward for a string v is the
discriminator's log D(v) / (1 - D(v)). The language is an arithmetic grammar with known
probabilities, and the LSTM's probability of every string is computed, so the measurements do not
depend on samples.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from torch import Tensor, nn
from torch.nn.functional import softplus
from tqdm import tqdm

import gradients
import grammar
import style
from arguments import count, make_folder, natural, new_parser, positive
from pyro_gumbel.estimators import Enumerate
from pyro_gumbel.infer import Estimator_ELBO, GradientWarning, config_gradient


class Generator(nn.Module):
    """An autoregressive LSTM that draws one-hot tokens; END is followed by END."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        symbols = len(grammar.ALPHABET)
        self.cell = nn.LSTMCell(symbols, hidden)
        self.out = nn.Linear(hidden, symbols)
        self.register_buffer("after_end", -1e4 * (1 - torch.eye(symbols)[grammar.END]))

    def start(self, batch: tuple[int, ...]) -> tuple[Tensor, ...]:
        zeros = self.out.weight.new_zeros
        return (
            zeros(*batch, self.out.out_features),
            zeros(*batch, self.out.in_features),
            zeros(*batch, self.out.in_features),
        )

    def step(self, token: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read a token; return the logits of the next one and the new state."""
        batch = token.shape[:-1]
        h, c = (state.expand(*batch, -1).flatten(0, -2) for state in (h, c))
        h, c = self.cell(token.flatten(0, -2), (h, c))
        ended = token[..., grammar.END :].detach()
        logits = self.out(h).unflatten(0, batch) + ended * self.after_end
        return logits, h.unflatten(0, batch), c.unflatten(0, batch)

    def log_prob(self, tokens: Tensor) -> Tensor:
        """Compute the log-probability of strings ``(N, LENGTH, symbols)``."""
        token, h, c = self.start((len(tokens),))
        total = torch.zeros(len(tokens))
        for target in tokens.unbind(-2):
            logits, h, c = self.step(token, h, c)
            total = total + (target * logits.log_softmax(-1)).sum(-1)
            token = target
        return total


class Game:
    """Generator and discriminator, and the generator's objective as guide and model."""

    def __init__(self, hidden: int, batch: int) -> None:
        size = grammar.LENGTH * len(grammar.ALPHABET)
        self.generator = Generator(hidden)
        self.discriminator = nn.Sequential(
            nn.Linear(size, 256),
            nn.LeakyReLU(0.2),
            nn.Linear(256, 256),
            nn.LeakyReLU(0.2),
            nn.Linear(256, 1),
        )
        self.batch = batch

    def string(self, fixed: bool) -> Tensor:
        """Draw tokens from the generator, with its parameters detached if ``fixed``."""
        token, h, c = self.generator.start((self.batch,))
        tokens = []
        for t in range(grammar.LENGTH):
            self.generator.requires_grad_(not fixed)
            logits, h, c = self.generator.step(token, h, c)
            self.generator.requires_grad_()
            token = pyro.sample(f"v_{t}", dist.OneHotCategorical(logits=logits))
            tokens.append(token)
        return torch.stack(torch.broadcast_tensors(*tokens), -2)

    def guide(self) -> Tensor:
        """Draw strings."""
        pyro.module("generator", self.generator)
        with pyro.plate("strings", self.batch):
            return self.string(fixed=False)

    def model(self) -> None:
        """Add the discriminator's reward.

        Tokens have the guide's distribution with fixed parameters, so that both scores and their
        gradients in the tokens cancel: the ELBO is the expected reward.
        """
        with pyro.plate("strings", self.batch):
            pyro.factor("reward", self.judge(self.string(fixed=True)))

    def judge(self, tokens: Tensor) -> Tensor:
        """Return log D / (1 - D), the discriminator's logit."""
        return self.discriminator(tokens.flatten(-2)).squeeze(-1)

    def discriminator_loss(self, real: Tensor, penalty: float) -> Tensor:
        """Return -log D(x) - log(1 - D(G)) with a gradient penalty at real strings."""
        with torch.no_grad():
            fake = self.guide()
        real = real.requires_grad_()
        on_real, on_fake = self.judge(real), self.judge(fake)
        (grad,) = torch.autograd.grad(on_real.sum(), real, create_graph=True)
        loss = softplus(-on_real).mean() + softplus(on_fake).mean()
        return loss + 0.5 * penalty * grad.square().sum((-2, -1)).mean()


@torch.no_grad()
def measure(game: Game, tokens: Tensor, truth: Tensor) -> tuple[float, float]:
    """Return the generator's probability of a valid string and its total variation."""
    probs = game.generator.log_prob(tokens).exp()
    valid = probs.sum().item()
    return valid, 0.5 * ((probs - truth).abs().sum().item() + 1 - valid)


def make_svi(args: argparse.Namespace, gradient: str) -> tuple[Game, SVI]:
    """Make a new game and the generator's SVI with one estimator."""
    pyro.clear_param_store()
    estimator, num_particles = gradients.parse(gradient)
    if isinstance(estimator, Enumerate):
        number = f"{len(grammar.ALPHABET)}^{grammar.LENGTH}"
        raise ValueError(
            f"{gradient!r} sums over all {number} sequences; choose another estimator"
        )
    game = Game(args.hidden, max(args.batch_size // num_particles, 1))
    elbo = Estimator_ELBO(num_particles, vectorize_particles=True, max_plate_nesting=1)
    optimizer = pyro.optim.ClippedAdam(
        {"lr": args.lr, "betas": (0.5, 0.99), "clip_norm": 10.0, "lrd": 0.1 ** (1 / args.steps)}
    )
    return game, SVI(game.model, config_gradient(game.guide, estimator), optimizer, elbo)


def train(args: argparse.Namespace, gradient: str, seed: int) -> list[dict[str, float]]:
    """Train both networks; return the measurements."""
    pyro.set_rng_seed(seed)
    strings, truth = grammar.all_strings()
    tokens = grammar.encode(strings)
    data = tokens[torch.multinomial(truth, args.data_size, replacement=True)]
    game, svi = make_svi(args, gradient)
    critic = torch.optim.Adam(game.discriminator.parameters(), args.critic_lr, betas=(0.5, 0.99))

    history, start = [], time.perf_counter()
    bar = tqdm(range(1, args.steps + 1), desc=f"{gradient}, seed {seed}", mininterval=1)
    for step in bar:
        for _ in range(args.critic_steps):
            real = data[torch.randint(len(data), (args.batch_size,))]
            critic.zero_grad()
            game.discriminator_loss(real, args.penalty).backward()
            critic.step()
        svi.step()
        if step % args.measure_every == 0 or step == args.steps:
            valid, variation = measure(game, tokens, truth)
            seconds = time.perf_counter() - start
            row = {"step": step, "valid": valid, "variation": variation, "seconds": seconds}
            history.append(row)
            bar.set_postfix(valid=f"{valid:.3f}", variation=f"{variation:.3f}", refresh=False)
        if step % max(args.steps // 5, 1) == 0:
            with torch.no_grad():
                bar.write(f"  {step:6d}: " + "  ".join(grammar.decode(game.guide())[:8]))
    return history


def picture(runs: dict[str, list[list[dict[str, float]]]], path: Path) -> Path:
    """Plot the probability of an invalid string and the total variation by step."""
    figure, axes = style.panels(1, 2, (4.6, 3.2))
    colors = style.colors(runs)
    for number, (gradient, histories) in enumerate(runs.items()):
        for seed, history in enumerate(histories):
            look: Any = {
                "color": colors[gradient],
                "linewidth": max(2.5 - 0.7 * number, 0.7),  # so that coinciding curves show
                "label": gradient if seed == 0 else None,
            }
            steps = [row["step"] for row in history]
            axes[0, 0].plot(steps, [1 - row["valid"] for row in history], **look)
            axes[0, 1].plot(steps, [row["variation"] for row in history], **look)
    axes[0, 0].set(ylabel="probability of an invalid string")
    axes[0, 1].set(ylabel="total variation from the truth")
    axes[0, 1].axhline(0.35, **style.EXACT, label="all mass on the string x")
    for axis in axes[0]:
        axis.set(xlabel="generator steps", yscale="log")
    style.legend_outside(figure, axes[0])
    return style.write(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    add = parser.add_argument
    some, form = "gumbel_straight_through,reinmax,score:4", f"{gradients.FORM},..."
    add("--gradients", type=gradients.several, default=some, metavar=form, help=gradients.HELP)
    add("--steps", type=count, default=3000, help="steps of the generator")
    add("--critic-steps", type=count, default=1, help="discriminator steps per generator step")
    add("--batch-size", type=count, default=256, help="strings per step, over all particles")
    add("--data-size", type=count, default=5000, help="strings in the training set")
    add("--hidden", type=count, default=64, help="LSTM units")
    add("--lr", type=positive, default=1e-3, help="initial learning rate of the generator")
    add("--critic-lr", type=positive, default=1e-3, help="learning rate of the discriminator")
    add("--penalty", type=float, default=1.0, help="weight of the gradient penalty")
    add("--measure-every", type=count, default=50, help="steps between measurements")
    add("--seed", type=natural, default=0, help="seed of the first run")
    add("--seeds", type=count, default=1, help="number of seeds, starting at --seed")
    add("--out", type=Path, default=Path("out/sequence_gan"), metavar="DIR", help="output folder")
    add("--smoke", action="store_true", help="a quick run with few steps")
    args = parser.parse_args(argv)
    make_folder(parser, args.out)
    torch.set_num_threads(1)  # layers this small are slower on more threads
    # The end of a string switches symbols off without a gradient, in both programs alike.
    warnings.filterwarnings("ignore", category=GradientWarning)
    pyro.enable_validation(args.smoke)  # off, since it takes a quarter of a step
    if args.smoke:
        args.steps, args.batch_size, args.data_size, args.measure_every = 4, 16, 100, 2
    gradients.try_all(parser, args.gradients, lambda name: make_svi(args, name)[1].evaluate_loss())
    runs = {
        gradient: [train(args, gradient, args.seed + i) for i in range(args.seeds)]
        for gradient in args.gradients
    }
    print(f"\n{'gradient':28}{'valid':>10}{'variation':>12}{'minutes':>10}")
    for gradient, histories in runs.items():
        for history in histories:
            last = history[-1]
            minutes = f"{last['seconds'] / 60:.1f}"
            print(f"{gradient:28}{last['valid']:>10.3f}{last['variation']:>12.3f}{minutes:>10}")
    print("\nwritten:", picture(runs, args.out / "training.png"))


if __name__ == "__main__":
    main()
