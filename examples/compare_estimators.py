"""Bias, noise and cost of gradient estimators on an auto-encoder with an exact gradient.

    python examples/compare_estimators.py
    python examples/compare_estimators.py --estimators reinmax,straight_through,score:4
    python examples/compare_estimators.py --checkpoint FILE --num-draws 500

Four latents of eight categories have 4,096 states, few enough for the exact gradient. ReinMax
trains the model. At some epochs every estimator draws the gradient of the encoder many times, at
the same parameters. With --checkpoint the model is one that vae.py trained. See
examples/README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
import xarray as xr
from pyro.infer import SVI
from tqdm import tqdm

import checkpoint
import gradients
from arguments import at_least, count, make_folder, natural, new_parser
from compare_report import show, write_draws, write_tables
from image_data import Images, load_images
from pyro_gumbel.diagnostics import compare_gradients, exact_gradient, gradient_draws
from pyro_gumbel.infer import Estimator_ELBO, config_gradient
from vae import VAE, find_device
from vae_options import make_parser

_FEWEST = 16
ESTIMATORS = {  # the default for each kind of latent
    "onehot": "straight_through,gumbel_straight_through,gumbel_rao@0.5,reinmax,reinmax_rao@1.0,"
    "disarm_tree,score:4",
    "bernoulli": "straight_through,gumbel_straight_through,gumbel_rao@0.5,reinmax,disarm,score:4",
    "normal": "pathwise,score:4",
}
# Training options, which --checkpoint excludes.
TRAINING = {"epochs": [1, 5, 10, 20], "latents": 4, "categories": 8, "hidden": 128}


def make_vae(args: argparse.Namespace, images: Images) -> VAE:
    """Make an untrained model from this example's options."""
    command = ["--latents", str(args.latents), "--categories", str(args.categories)]
    settings = make_parser("").parse_args([*command, "--hidden", str(args.hidden)])
    return VAE(settings, images.num_pixels).to(images.train.device)


def load_vae(path: Path, images: Images) -> VAE:
    """Read a model that ``vae.py --checkpoint`` saved.

    Raises:
        CheckpointError: If the file is not such a checkpoint, or its images have another size.
    """
    state = checkpoint.read(path)
    vae = VAE(argparse.Namespace(**state["settings"]), images.num_pixels)
    try:
        vae.load_state_dict(checkpoint.read_weights(path))
    except RuntimeError as error:
        raise checkpoint.CheckpointError(
            f"{path} was trained on {state['settings']['images']}, not on images of "
            f"{images.num_pixels}; give its --data"
        ) from error
    return vae.to(images.train.device)


def choices(names: list[str]) -> dict[str, Any]:
    """Parse estimators; pair each with an ELBO of its number of particles."""
    parsed = {name: gradients.parse(name) for name in names}
    return {
        name: ({"z": estimator}, elbo(particles))
        for name, (estimator, particles) in parsed.items()
    }


def attempt(vae: VAE, images: Images, name: str) -> None:
    """Evaluate the loss once with an estimator.

    Raises:
        ValueError: If the estimator does not support the latents.
    """
    config, objective = choices([name])[name]
    objective.loss(vae.model, config_gradient(vae.guide, config), images.train[:2])


def elbo(num_particles: int) -> Estimator_ELBO:
    return Estimator_ELBO(num_particles, vectorize_particles=True, max_plate_nesting=1)


def measure(
    vae: VAE, x: torch.Tensor, args: argparse.Namespace
) -> tuple[pd.DataFrame, xr.Dataset | None]:
    """Compare the encoder's gradients with the exact one, or with many draws of ``score:8``."""
    try:
        exact = exact_gradient(vae.model, vae.guide, x, params="encoder*", max_states=20_000)
    except ValueError as error:
        print(f"no exact gradient: {error}")
        exact = None
    draws = gradient_draws(
        vae.model,
        vae.guide,
        x,
        estimators=choices(args.estimators),
        num_draws=args.num_draws // 4,
        params="encoder*",
        project=8,
        seed=args.seed,
    )
    reference = exact
    if reference is None:
        reference = gradient_draws(
            vae.model,
            vae.guide,
            x,
            estimators=choices(["score:8"]),
            num_draws=args.num_draws,
            params="encoder*",
            project=8,
            seed=args.seed + 1,
        )["score:8"]
    return compare_gradients(draws, reference), exact


def train(
    vae: VAE, images: Images, args: argparse.Namespace
) -> tuple[dict[int, pd.DataFrame], xr.Dataset | None]:
    """Train by ReinMax, and measure after each of ``args.epochs``."""
    svi = SVI(
        vae.model,
        config_gradient(vae.guide, {"z": "reinmax"}),
        pyro.optim.Adam({"lr": 1e-3}),
        elbo(1),
    )
    tables, exact = {}, None
    for epoch in tqdm(range(1, max(args.epochs) + 1), desc="training", unit="epoch"):
        for batch in images.batches(100):
            svi.step(batch)
        if epoch in args.epochs:
            tables[epoch], exact = measure(vae, images.train[: args.images], args)
            show(tables[epoch], f"after epoch {epoch}")
    return tables, exact


def write(
    vae: VAE,
    x: torch.Tensor,
    tables: dict[Any, pd.DataFrame],
    exact: xr.Dataset | None,
    args: argparse.Namespace,
) -> list[Path]:
    """Write tables, figures and a file of draws; return their paths."""
    written = write_tables(tables, args.out)
    biases = [name for name, _ in vae.encoder.named_parameters() if name.endswith("bias")]
    name = f"encoder$$${biases[-1]}"  # its gradient sums those of all images' logits
    draws = gradient_draws(
        vae.model,
        vae.guide,
        x,
        estimators=choices(args.estimators),
        num_draws=max(args.num_draws // 8, 20),
        params=[name],
        dims={name: ["logit"]},
        seed=args.seed,
    )
    if exact is not None:
        exact = exact[[name]].rename({f"{name}_dim_0": "logit"})
    return written + write_draws(draws, exact, args.out)


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--data", metavar="DIR", help="IDX files such as MNIST's (default: scikit-learn's digits)")
    add("--checkpoint", type=Path, metavar="FILE", help="a model that vae.py trained")
    form = f"{gradients.FORM},..."
    names = f"{gradients.HELP} (default: a choice for the kind of latent)"
    add("--estimators", type=gradients.several, metavar=form, help=names)
    add("--num-draws", type=at_least(_FEWEST), default=1000, help="draws of each estimator")
    add("--images", type=count, default=100, help="number of images in the gradient")
    unless_given: dict[str, Any] = {"default": argparse.SUPPRESS}  # TRAINING has the defaults
    add(
        "--epochs",
        type=epochs,
        metavar="A,B,C",
        help="epochs after which to measure (default: 1,5,10,20)",
        **unless_given,
    )
    add("--latents", type=count, help="number of latents (default: 4)", **unless_given)
    add("--categories", type=count, help="categories per latent (default: 8)", **unless_given)
    add(
        "--hidden",
        type=count,
        help="width of encoder's and decoder's hidden layer (default: 128)",
        **unless_given,
    )
    add("--seed", type=natural, default=0, help="seed of training and of all draws")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU, if any")
    add("--out", type=Path, default=Path("out/estimators"), metavar="DIR", help="output folder")
    add("--smoke", action="store_true", help="a quick run with few draws and images")
    args = parser.parse_args(argv)
    given = [f"--{name}" for name in TRAINING if name in args]
    if args.checkpoint and given:
        parser.error(f"--checkpoint: the model is already trained; leave out {', '.join(given)}")
    return parser, argparse.Namespace(**TRAINING | vars(args))


def epochs(text: str) -> list[int]:
    return sorted(count(epoch) for epoch in text.split(","))


def main(argv: list[str] | None = None) -> None:
    """Measure, print the tables, write figures and draws."""
    parser, args = parse(argv)
    make_folder(parser, args.out)
    torch.set_num_threads(1)
    try:
        images = load_images(args.data, "threshold").to(find_device(args.device))
        trained = load_vae(args.checkpoint, images) if args.checkpoint else None
    except (OSError, ValueError) as error:
        parser.error(str(error))
    kind = trained.kind if trained else "onehot"
    args.estimators = args.estimators or gradients.several(ESTIMATORS[kind])
    if args.smoke:
        args.num_draws, args.images, args.epochs = 40, 10, [1, 2]
        args.latents, args.hidden, images = 3, 16, images.head(200, 50)
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    gradients.try_all(
        parser,
        args.estimators,
        lambda name: attempt(trained or make_vae(args, images), images, name),
    )
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    if trained is None:
        vae = make_vae(args, images)
        tables, exact = train(vae, images, args)
    else:
        vae = trained
        table, exact = measure(vae, images.train[: args.images], args)
        show(table, f"at {args.checkpoint}")
        tables = {0: table}
    paths = write(vae, images.train[: args.images], tables, exact, args)
    print("\nwritten:", *paths, sep="\n  ")


if __name__ == "__main__":
    main()
