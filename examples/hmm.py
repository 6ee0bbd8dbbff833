"""Fit hidden Markov models of handwriting, with a style for each image.

    python examples/hmm.py

Each of scikit-learn's digits is read as a sequence of eight columns. The states of the columns are
marked infer={"enumerate": "parallel"} and summed along pyro.markov. The style is marked, too. With
a guide that lacks it, the loss is the exact evidence. With a guide that draws it from an encoder,
the loss is a bound, and a chosen estimator estimates its gradient.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.ops.indexing import Vindex
from sklearn import datasets
from torch import Tensor, nn
from torch.nn.functional import one_hot
from tqdm import tqdm

import gradients
import style
from arguments import at_least, count, make_folder, natural, new_parser, positive
from pyro_gumbel.infer import Estimator_ELBO, recover

SUM = {"enumerate": "parallel"}
SUMMED = "style summed"  # the label of the fit without a guide
Fit = dict[str, Any]  # a model and its measurements
Images = tuple[Tensor, Tensor]  # sequences (N, columns, pixels), and their digits


def load() -> tuple[Images, Images]:
    """Load 1,500 training and 297 held-out images; a pixel is on if it is at least half grey."""
    file = datasets.load_digits()  # sorted by writer
    order = torch.randperm(len(file.target), generator=torch.Generator().manual_seed(0))
    x = (torch.tensor(file.images) >= 8).float().mT[order]
    digits = torch.tensor(file.target)[order]
    return (x[:1500], digits[:1500]), (x[1500:], digits[1500:])


class StyleHMM(nn.Module):
    """A hidden Markov model whose style chooses the transitions and shifts the emissions.

    A network computes a column's pixels from the style, the state and the column before.
    """

    def __init__(self, styles: int, states: int, pixels: int, hidden: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(styles))
        self.initial = nn.Parameter(torch.randn(styles, states))
        self.transition = nn.Parameter(torch.randn(styles, states, states))
        self.style = nn.Parameter(torch.randn(styles, hidden))
        self.state = nn.Parameter(torch.randn(states, hidden))
        self.before = nn.Linear(pixels, hidden)
        self.pixels = nn.Sequential(nn.ReLU(), nn.Linear(hidden, pixels))

    def forward(self, x: Tensor) -> None:
        pyro.module("hmm", self)
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        with pyro.plate("images", len(x)):
            own = pyro.sample("style", dist.OneHotCategorical(logits=self.weights), infer=SUM)
            logits = own @ self.initial
            transition = torch.einsum("...k,kij->...ij", own, self.transition)
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", dist.Categorical(logits=logits), infer=SUM)
                features = own @ self.style + self.state[z] + self.before(before[:, t])
                column = dist.Bernoulli(logits=self.pixels(features)).to_event(1)
                pyro.sample(f"x_{t}", column, obs=x[:, t])
                logits = Vindex(transition)[..., z, :]


def make_guide(styles: int, pixels: int, hidden: int) -> Callable[[Tensor], None]:
    """Make a guide that draws the style from an encoder of the image."""
    encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, styles))

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("images", len(x)):
            pyro.sample("style", dist.OneHotCategorical(logits=encoder(x.flatten(1))))

    return guide


def no_guide(x: Tensor) -> None:
    """A guide without sites, which leaves all marked sites to the sum."""


def make_svi(
    name: str, x: Tensor, seed: int, args: argparse.Namespace
) -> tuple[StyleHMM, Callable[[Tensor], None], SVI]:
    """Make a new model, its guide and the SVI, reproducible by the seed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model = StyleHMM(args.styles, args.states, x.shape[2], args.hidden)
    guide: Callable[[Tensor], None] = no_guide
    estimator, particles = gradients.parse("auto")
    if name != SUMMED:
        guide = make_guide(args.styles, x[0].numel(), 2 * args.hidden)
        estimator, particles = gradients.parse(name)
    elbo = Estimator_ELBO(
        particles, default=estimator, vectorize_particles=True, max_plate_nesting=1
    )
    decay = 0.1 ** (1 / (args.epochs * -(-len(x) // args.batch_size)))
    optimizer = pyro.optim.ClippedAdam({"lr": args.lr, "lrd": decay})
    return model, guide, SVI(model, guide, optimizer, elbo)


def bound(model: StyleHMM, guide: Callable[[Tensor], None], x: Tensor) -> float:
    """Return the ELBO per image without sampling noise: the evidence, for ``no_guide``."""
    elbo = Estimator_ELBO(default="enumerate", max_plate_nesting=1)
    return -elbo.loss(model, guide, x) / len(x)


def train(name: str, seed: int, data: Images, test: Images, args: argparse.Namespace) -> Fit:
    """Fit a model; return it with held-out measurements."""
    (x, digits), (test_x, test_digits) = data, test
    model, guide, svi = make_svi(name, x, seed, args)
    history, seconds = [], 0.0
    for _ in tqdm(range(args.epochs), desc=f"{name}, seed {seed}", mininterval=0.5):
        start = time.process_time()
        for index in torch.randperm(len(x)).split(args.batch_size):
            svi.step(x[index])
        seconds += time.process_time() - start
        history.append(bound(model, guide, test_x))
    counts = one_hot(styles(model, x), args.styles).T @ one_hot(digits)
    names = counts.argmax(-1)  # the most frequent digit of each style's training images
    return {
        "model": model,
        "names": names,
        "history": history,
        "bound": history[-1],
        "evidence": bound(model, no_guide, test_x),
        "purity": (names[styles(model, test_x)] == test_digits).float().mean().item(),
        "milliseconds": 1000 * seconds / (args.epochs * -(-len(x) // args.batch_size)),
    }


def styles(model: StyleHMM, x: Tensor) -> Tensor:
    """Return each image's most probable style, by its exact posterior."""
    with torch.no_grad():
        return recover(model, no_guide, x, marginals=True)["style"][0].argmax(-1)


def decode(model: StyleHMM, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return each image's most probable style, and the most probable states given this style."""
    best = styles(model, x)

    def guide(x: Tensor) -> None:
        with pyro.plate("images", len(x)):
            value = one_hot(best, len(model.weights)).float()
            pyro.sample("style", dist.Delta(value, event_dim=1))

    found = recover(model, guide, x, decode=True)
    return best, torch.stack([found[f"z_{t}"][0] for t in range(x.shape[1])], -1)


def handwriting(axis: Any, result: Fit, x: Tensor, each: int = 9) -> None:
    """Draw images by style, each above the states of its columns."""
    best, z = decode(result["model"], x)
    common = torch.bincount(best).argsort(descending=True)[:8].tolist()
    common.sort(key=lambda own: result["names"][own])
    palette = np.array([mpl.colors.to_rgb(color) for color in style.COLORS])
    canvas = np.ones((13 * len(common) - 2, 10 * each - 2, 3))
    for row, own in enumerate(common):
        for column, index in enumerate((best == own).nonzero()[:each, 0].tolist()):
            cell = canvas[13 * row : 13 * row + 11, 10 * column : 10 * column + 8]
            cell[:8] = 1 - 0.85 * x[index].mT.numpy()[..., None]
            cell[9:] = palette[z[index].numpy() % len(palette)]
        axis.text(-2, 13 * row + 4, f"mostly {result['names'][own]}", ha="right", va="center")
    axis.imshow(canvas, interpolation="nearest")
    axis.set_title("decoded styles (rows) and states (colours)")
    axis.set_axis_off()


def curves(axis: Any, results: dict[str, list[Fit]]) -> None:
    """Plot held-out bounds by epoch, a line for each seed."""
    own = style.colors(name for name in results if name != SUMMED)
    for name, runs in results.items():
        look = {"color": own[name]} if name in own else style.EXACT
        for run in runs:
            axis.plot(range(1, len(run["history"]) + 1), run["history"], **look, label=name)
    last = [run["bound"] for runs in results.values() for run in runs]
    axis.set_ylim(min(last) - 4, max(last) + 0.5)
    axis.set(title="held-out images", xlabel="epoch", ylabel="bound, nats per image")
    style.whole_numbers(axis)


def report(results: dict[str, list[Fit]]) -> None:
    """Print means over seeds of the held-out measurements."""
    columns = {"bound": 3, "evidence": 3, "purity": 3, "milliseconds": 1}
    print(f"\n{'':14}" + "".join(f"{column:>14}" for column in columns))
    for name, runs in results.items():
        means = {column: sum(run[column] for run in runs) / len(runs) for column in columns}
        print(f"{name:14}" + "".join(f"{means[c]:>14.{places}f}" for c, places in columns.items()))


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    add = parser.add_argument
    some, form = "enumerate,reinmax,disarm_tree,score:4", f"{gradients.FORM},..."
    add("--gradients", type=gradients.several, default=some, metavar=form, help=gradients.HELP)
    add("--styles", type=at_least(2), default=20, help="number of styles")
    add("--states", type=at_least(2), default=8, help="number of states of a column")
    add("--hidden", type=count, default=32, help="width of the networks")
    add("--epochs", type=count, default=25, help="epochs of each fit")
    add("--batch-size", type=count, default=100, help="images per step")
    add("--lr", type=positive, default=0.03, help="initial learning rate")
    add("--seeds", type=count, default=2, help="fits of each estimator")
    add("--seed", type=natural, default=0, help="seed of the first fit")
    add("--out", type=Path, default=Path("out/hmm"), metavar="DIR", help="output folder")
    add("--smoke", action="store_true", help="a quick run with few images")
    args = parser.parse_args(argv)
    make_folder(parser, args.out)
    torch.set_num_threads(1)
    pyro.enable_validation(args.smoke)
    data, test = load()
    if args.smoke:
        args.styles, args.epochs, args.seeds = 3, 2, 1
        data, test = ((x[:60], digits[:60]) for x, digits in (data, test))
    few = data[0][:2]
    gradients.try_all(
        parser, args.gradients, lambda name: make_svi(name, few, 0, args)[2].evaluate_loss(few)
    )
    results = {
        name: [train(name, args.seed + i, data, test, args) for i in range(args.seeds)]
        for name in (SUMMED, *args.gradients)
    }
    report(results)
    best = max((run for runs in results.values() for run in runs), key=lambda run: run["evidence"])
    figure, axes = style.panels(1, 2, (4.6, 4.4))
    curves(axes[0, 0], results)
    handwriting(axes[0, 1], best, test[0])
    style.legend_outside(figure, axes[0], columns=5)
    print("\nwritten:", style.write(figure, args.out / "hmm.png"))


if __name__ == "__main__":
    main()
