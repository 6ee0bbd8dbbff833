"""Fit a Gaussian mixture with latent assignments by automatic guides.

    python examples/mixture.py

The first fit samples the mixture's parameters from priors. The model marks the assignments, so
that they are summed out, AutoNormal is the guide of the rest, and recover assigns the data. In the
other fits the parameters are learnt, and the guide has an assignment for each datum: AutoAmortized
by an encoder, AutoDiscrete by parameters for each datum. All should find the same mixture.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal, init_to_mean
from torch import Tensor, nn
from torch.distributions import constraints
from tqdm import tqdm

import style
from arguments import at_least, count, make_folder, natural, new_parser, positive
from pyro_gumbel.estimators import Enumerate, GumbelStraightThrough, LeaveOneOut, ReinMax, Score
from pyro_gumbel.guides import AutoAmortized, AutoDiscrete
from pyro_gumbel.infer import Estimator_ELBO, recover

TRUE_LOCS = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
TRUE_WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
SCALE = 0.8


def simulate(size: int) -> tuple[Tensor, Tensor]:
    """Draw data and their true components."""
    component = torch.multinomial(TRUE_WEIGHTS, size, replacement=True)
    return TRUE_LOCS[component] + SCALE * torch.randn(size, 2), component


def parameters(start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the model's parameters: locations, weights and a common scale."""
    locs = pyro.param("locs", start)
    weights = pyro.param("weights", torch.full((3,), 1 / 3), constraint=constraints.simplex)
    return locs, weights, pyro.param("scale", torch.tensor(1.5), constraint=constraints.positive)


def priors(start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sample them instead."""
    locs = pyro.sample("locs", dist.Normal(start, 2.0).to_event(2))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    return locs, weights, pyro.sample("scale", dist.LogNormal(0.4, 0.5))


def make_model(start: Tensor, kind: str) -> Callable[[Tensor], None]:
    """Make a model; that of kind "summed" has priors and sums over the assignments."""
    chosen, infer = (priors, {"enumerate": "parallel"}) if kind == "summed" else (parameters, {})

    def model(x: Tensor) -> None:
        locs, weights, scale = chosen(start)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(weights), infer=infer)
            loc = (z.unsqueeze(-2) @ locs).squeeze(-2)
            pyro.sample("x", dist.Normal(loc, scale.unsqueeze(-1)).to_event(1), obs=x)

    return model


def make_encoder() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 32), nn.Tanh())


# Name: (guide, estimator, number of particles).
SUMMED = "AutoNormal, assignments summed"
FITS: dict[str, tuple[str, Any, int]] = {
    SUMMED: ("summed", None, 1),
    "AutoAmortized, enumeration": ("amortized", Enumerate(), 1),
    "AutoAmortized, ReinMax": ("amortized", ReinMax(), 1),
    "AutoAmortized, Gumbel straight-through": ("amortized", GumbelStraightThrough(0.5), 1),
    "AutoAmortized, score, 4 particles": ("amortized", Score(LeaveOneOut()), 4),
    "AutoDiscrete, ReinMax": ("discrete", ReinMax(), 1),
    "AutoDiscrete, score, 4 particles": ("discrete", Score(LeaveOneOut()), 4),
}


def make_guide(kind: str, model: Callable[[Tensor], None], estimator: Any) -> Any:
    if kind == "summed":
        return AutoNormal(poutine.block(model, hide=["z"]), init_loc_fn=init_to_mean)
    if kind == "amortized":
        return AutoAmortized(model, make_encoder(), gradient=estimator)
    return AutoDiscrete(model, gradient=estimator)


def fit(name: str, x: Tensor, component: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Fit by SVI; return accuracies, log evidence, locations and assignments."""
    kind, estimator, particles = FITS[name]
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    model = make_model(x[torch.randperm(len(x))[:3]].clone(), kind)
    guide = make_guide(kind, model, estimator)
    elbo = Estimator_ELBO(particles, vectorize_particles=True, max_plate_nesting=1)

    def options(parameter: str) -> dict[str, float]:
        # Parameters of one datum get the gradient of one datum, the encoder's that of all.
        own = kind == "discrete" and "heads" in parameter
        return {"lr": 10 * args.lr if own else args.lr, "lrd": 0.05 ** (1 / args.steps)}

    @torch.no_grad()
    def assign(draws: int = 1) -> Tensor:
        """Return each datum's most probable component."""
        if kind != "summed":
            return guide.posterior(x)["z"].probs.argmax(-1)
        options = {"num_samples": draws, "marginals": True, "parallel": True}
        return recover(model, guide, x, **options)["z"].mean(0).argmax(-1)

    svi = SVI(model, guide, pyro.optim.ClippedAdam(options), elbo)
    accuracies = []
    for _ in tqdm(range(args.steps), desc=name, mininterval=0.5):
        svi.step(x)
        accuracies.append(accuracy(assign(), component))
    fitted = guide.median(x) if kind == "summed" else pyro.get_param_store()
    locs, weights, scale = (fitted[key].detach() for key in ("locs", "weights", "scale"))
    log_joint = weights.log() + dist.Normal(locs, scale).to_event(1).log_prob(x[:, None])
    return {
        "accuracy": accuracies,
        "evidence": log_joint.logsumexp(-1).mean().item(),
        "locs": locs,
        "assigned": assign(100),
    }


def accuracy(assigned: Tensor, component: Tensor) -> float:
    """Return the share assigned to the true component, maximised over permutations."""
    return max(
        (torch.tensor(names)[assigned] == component).float().mean().item()
        for names in itertools.permutations(range(3))
    )


def best_accuracy(x: Tensor, component: Tensor) -> float:
    """Return the accuracy of the true parameters, below one as components overlap."""
    log_prob = dist.Normal(TRUE_LOCS, SCALE).to_event(1).log_prob(x[:, None])
    return accuracy((TRUE_WEIGHTS.log() + log_prob).argmax(-1), component)


def look(name: str) -> dict[str, Any]:
    """Return a line style: the estimator's colour, dotted for parameters of each datum."""
    kind, estimator, _ = FITS[name]
    colors = style.colors(["reinmax", "gumbel_straight_through", "score"]).values()
    own = dict(zip((ReinMax, GumbelStraightThrough, Score), colors, strict=True))
    return {
        "color": own.get(type(estimator), "0.6" if kind == "summed" else "black"),
        "linestyle": ":" if kind == "discrete" else "-",
        "linewidth": 1.5 if type(estimator) in own else 4,  # wide, as other lines cover it
    }


def picture(x: Tensor, results: dict[str, dict[str, Any]], best: float, path: Path) -> Path:
    figure, axes = style.panels(1, 3, (4.2, 3.4))
    shown = (SUMMED, "AutoAmortized, ReinMax")
    for axis, name in zip(axes[0], shown, strict=False):
        result = results[name]
        order = result["locs"][:, 0].argsort().argsort()  # one colour for each component
        for k in range(3):
            own = x[order[result["assigned"]] == k]
            axis.plot(
                own[:, 0],
                own[:, 1],
                style.MARKERS[k],
                markersize=3,
                color=style.COLORS[(2, 4, 5)[k]],  # colours that no estimator has
                alpha=0.5,
                label=f"assigned to component {k + 1}",
            )
        axis.plot(
            result["locs"][:, 0],
            result["locs"][:, 1],
            "k+",
            markersize=14,
            label="location",
        )
        axis.set(title=name, xlabel="x, first coordinate", ylabel="second coordinate")
    axis = axes[0, 2]
    for name, result in results.items():
        axis.plot(result["accuracy"], label=name, **look(name))
    axis.axhline(best, **style.EXACT, label="true parameters")
    axis.set(
        title="share assigned to the true component",
        xlabel="step",
        ylabel="accuracy",
        ylim=(0.3, 1),
    )
    style.legend_outside(figure, axes[0], columns=3)
    return style.write(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--size", type=at_least(3), default=600, help="number of data")
    add("--steps", type=count, default=600, help="steps of each fit")
    add("--lr", type=positive, default=0.03, help="initial learning rate")
    add("--seed", type=natural, default=0, help="seed of the data and of each fit")
    add("--out", type=Path, default=Path("out/mixture"), metavar="DIR", help="output folder")
    add("--smoke", action="store_true", help="a quick run with few steps")
    args = parser.parse_args(argv)
    make_folder(parser, args.out)
    torch.set_num_threads(1)
    pyro.enable_validation(args.smoke)
    if args.smoke:
        args.size, args.steps = 60, 3
    pyro.set_rng_seed(args.seed)
    x, component = simulate(args.size)
    best = best_accuracy(x, component)
    results = {name: fit(name, x, component, args) for name in FITS}
    print(f"\n{'guide and estimator':42}{'accuracy':>10}{'log evidence/datum':>22}")
    for name, result in results.items():
        print(f"{name:42}{result['accuracy'][-1]:>10.3f}{result['evidence']:>22.4f}")
    print(f"{'true parameters':42}{best:>10.3f}")
    print("\nwritten:", picture(x, results, best, args.out / "mixture.png"))


if __name__ == "__main__":
    main()
