"""Classify digits from few labels by a semi-supervised auto-encoder.

    python examples/semi_supervised.py

The model is M2 of Kingma et al. 2014 (1406.5298): a digit and a style make an image. A label is an
observed digit. Without a label, either the guide draws the digit by a classifier, under a chosen
estimator, or the guide lacks it and the model sums it. Pyro's TraceEnum_ELBO runs the first
program, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from sklearn import datasets
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from tqdm import tqdm

import gradients
import style
from arguments import at_least, count, make_folder, natural, new_parser, positive
from pyro_gumbel.infer import Estimator_ELBO, config_gradient, recover

SUMMED = "digit summed"
PYRO = "TraceEnum_ELBO"
ALONE = "labels alone"
DIGITS, PIXELS = 10, 64
Images = tuple[Tensor, Tensor]  # pixels (N, 64), and one-hot digits (N, 10)


def load() -> tuple[Images, Images]:
    """Load 1,500 training and 297 held-out images; a pixel is on if it is at least half grey."""
    file = datasets.load_digits()  # sorted by writer
    order = torch.randperm(len(file.target), generator=torch.Generator().manual_seed(0))
    x = (torch.tensor(file.data) >= 8).float()[order]
    y = one_hot(torch.tensor(file.target), DIGITS).float()[order]
    return (x[:1500], y[:1500]), (x[1500:], y[1500:])


class Layers(nn.Module):
    """A network of two inputs, whose batch shapes broadcast."""

    def __init__(self, first: int, second: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(first, hidden), nn.Linear(second, hidden, bias=False)
        self.rest = nn.Sequential(nn.ReLU(), nn.Linear(hidden, outputs))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.rest(self.first(first) + self.second(second))


class M2(nn.Module):
    """The model and its guides; without labels ``y``, the digit is latent."""

    def __init__(self, latents: int, hidden: int, weight: float, *, summed: bool) -> None:
        super().__init__()
        self.latents, self.weight, self.summed = latents, weight, summed
        self.decoder = Layers(latents, DIGITS, hidden, PIXELS)
        self.encoder = Layers(PIXELS, DIGITS, hidden, 2 * latents)
        self.classifier = nn.Sequential(
            nn.Linear(PIXELS, hidden), nn.ReLU(), nn.Linear(hidden, DIGITS)
        )

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("m2", self)
        with pyro.plate("images", len(x)):
            uniform = dist.OneHotCategorical(logits=x.new_zeros(DIGITS))
            digit = pyro.sample("y", uniform, obs=y, infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latents), 1.0).to_event(1))
            pixels = dist.Bernoulli(logits=self.decoder(z, digit))
            pyro.sample("x", pixels.to_event(1), obs=x)
            if y is not None and not self.summed:  # train the guide's classifier by labels, too
                with poutine.scale(scale=self.weight):
                    pyro.sample("label", dist.OneHotCategorical(logits=self.classifier(x)), obs=y)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("m2", self)
        with pyro.plate("images", len(x)):
            if self.summed:
                y = x.new_zeros(DIGITS)  # the style of an image does not depend on the digit
            elif y is None:
                y = pyro.sample("y", dist.OneHotCategorical(logits=self.classifier(x)))
            loc, scale = self.encoder(x, y).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    def classify(self, x: Tensor) -> Tensor:
        """Return the most probable digits, by the classifier or by the sum's posterior."""
        if not self.summed:
            return self.classifier(x).argmax(-1)
        with torch.no_grad():
            probs = recover(self.model, self.guide, x, num_samples=20, marginals=True)["y"]
        return probs.mean(0).argmax(-1)


Step = Callable[[Tensor, Images], float]  # from unlabelled and labelled images


def make_step(name: str, seed: int, args: argparse.Namespace) -> tuple[M2, Step]:
    """Make a new model and a training step, reproducible by the seed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    m2 = M2(args.latents, args.hidden, args.weight, summed=name == SUMMED)
    if name == ALONE:
        adam = torch.optim.Adam(m2.classifier.parameters(), args.lr)

        def supervised(x: Tensor, labelled: Images) -> float:
            adam.zero_grad()
            loss = cross_entropy(m2.classifier(labelled[0]), labelled[1])
            loss.backward()
            adam.step()
            return loss.item()

        return m2, supervised
    if name == PYRO:
        guide, elbo = config_enumerate(m2.guide), TraceEnum_ELBO(max_plate_nesting=1)
    else:
        estimator, particles = gradients.parse("auto" if name == SUMMED else name)
        elbo = Estimator_ELBO(particles, vectorize_particles=True, max_plate_nesting=1)
        guide = config_gradient(
            m2.guide, lambda site: estimator if site["name"] == "y" else "pathwise"
        )
    svi = SVI(m2.model, guide, pyro.optim.ClippedAdam({"lr": args.lr}), elbo)
    return m2, lambda x, labelled: svi.step(x) + svi.step(*labelled)


def fit(
    name: str, labels: int, seed: int, data: Images, test: Images, args: argparse.Namespace
) -> dict[str, Any]:
    """Train with some labels; return the model, its held-out accuracy and the losses."""
    m2, step = make_step(name, seed, args)
    (x, y), losses = data, []
    for _ in range(args.epochs):
        for index in (torch.randperm(len(x) - labels) + labels).split(args.batch_size):
            known = torch.randint(labels, (args.batch_size // 2,))
            losses.append(step(x[index], (x[known], y[known])))
    right = m2.classify(test[0]) == test[1].argmax(-1)
    return {"m2": m2, "accuracy": right.float().mean().item(), "losses": losses}


def analogies(axis: Any, m2: M2, x: Tensor) -> None:
    """Draw images, and the ten digits decoded in the style of each."""
    styles = poutine.trace(m2.guide).get_trace(x).nodes["z"]["fn"].mean
    decoded = m2.decoder(styles[:, None], torch.eye(DIGITS)).sigmoid()
    rows = torch.cat([x[:, None], torch.full_like(x[:, None], 0), decoded], 1)
    cells = nn.functional.pad(rows.unflatten(-1, (8, 8)), (1, 1, 1, 1))
    canvas = cells.transpose(1, 2).flatten(2).flatten(0, 1).detach()
    axis.imshow(canvas.numpy(), cmap="gray_r")
    axis.set(title="held-out images, and all digits in their style")
    axis.set_axis_off()


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    add = parser.add_argument
    some, form = "enumerate,reinmax,score:4", f"{gradients.FORM},..."
    add("--gradients", type=gradients.several, default=some, metavar=form, help=gradients.HELP)
    add("--latents", type=count, default=10, help="dimensions of the style")
    add("--hidden", type=count, default=128, help="width of the networks")
    add("--weight", type=positive, default=20.0, help="weight of the classifier's labels")
    add("--epochs", type=count, default=15, help="epochs of each fit")
    add("--batch-size", type=at_least(2), default=100, help="unlabelled images per step")
    add("--lr", type=positive, default=3e-3, help="learning rate of Adam")
    add("--seeds", type=count, default=2, help="fits of each program and number of labels")
    add("--seed", type=natural, default=0, help="seed of the first fit")
    add("--out", type=Path, default=Path("out/semi_supervised"), metavar="DIR", help="folder")
    add("--smoke", action="store_true", help="a quick run with few images")
    args = parser.parse_args(argv)
    make_folder(parser, args.out)
    torch.set_num_threads(1)
    pyro.enable_validation(args.smoke)
    data, test = load()
    numbers = [20, 100, 500]
    if args.smoke:
        data, args.epochs, args.seeds, numbers = (data[0][:200], data[1][:200]), 1, 1, [20, 100]
    few = data[0][:2], data[1][:2]
    gradients.try_all(
        parser, args.gradients, lambda name: make_step(name, 0, args)[1](few[0], few)
    )
    names = [ALONE, SUMMED, *args.gradients, PYRO]
    runs = {
        name: [
            [fit(name, n, args.seed + i, data, test, args) for i in range(args.seeds)]
            for n in numbers
        ]
        for name in tqdm(names, desc="programs")
    }
    figure, axes = style.panels(1, 2, (4.6, 3.6))
    colors = style.colors(names[2:-1]) | {ALONE: "0.6", SUMMED: "black", PYRO: "0.3"}
    print(f"\n{'held-out accuracy, labels':26}" + "".join(f"{n:>8}" for n in numbers))
    for name, row in runs.items():
        means = [sum(run["accuracy"] for run in cell) / len(cell) for cell in row]
        print(f"{name:26}" + "".join(f"{mean:>8.3f}" for mean in means))
        line = ":" if name == PYRO else "-"
        axes[0, 0].semilogx(numbers, means, f"o{line}", color=colors[name], label=name)
    if "enumerate" in runs:
        ours, pyros = (torch.tensor(runs[name][0][0]["losses"]) for name in ("enumerate", PYRO))
        worst = ((ours - pyros) / pyros).abs()[:10].max()
        print(f"\nlargest relative difference from Pyro's loss in 10 steps: {worst:.1e}")
    axes[0, 0].set(title="297 held-out images", xlabel="labels", ylabel="accuracy")
    axes[0, 0].set_xticks(numbers, numbers)
    axes[0, 0].set_xticks([], minor=True)
    analogies(axes[0, 1], runs[SUMMED][-1][0]["m2"], test[0][:8])
    style.legend_outside(figure, axes[0], columns=3)
    print("\nwritten:", style.write(figure, args.out / "semi_supervised.png"))


if __name__ == "__main__":
    main()
