"""Train policies as Pyro guides by REINFORCE, and compare its gradient with the exact one.

    python examples/policy_gradient.py

The tasks, in control.py, are a small random Markov decision process, where every expectation can
be computed, and a cart with a pole. The guide draws actions; the model adds rewards.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from torch import nn
from tqdm import tqdm

import style
from arguments import at_least, count, make_folder, natural, new_parser
from control import CartPole, Decisions
from pyro_gumbel.estimators import LeaveOneOut, MovingAverage, NeuralBaseline, Score
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

PARTICLES = 4  # of leave-one-out; the others use as many times more episodes


def baselines(size: int) -> dict[str, Callable[[], tuple[Score, int]]]:
    """Return constructors of a score estimator and its number of particles, by label.

    ``size`` is the size of a state.
    """

    def neural() -> tuple[Score, int]:
        network = nn.Sequential(nn.Linear(size, 32), nn.Tanh(), nn.Linear(32, 1))
        return Score(NeuralBaseline(network, "state")), 1

    return {
        "no baseline": lambda: (Score(), 1),
        "moving average": lambda: (Score(MovingAverage()), 1),
        "neural, of the first state": neural,
        f"leave-one-out of {PARTICLES}": lambda: (Score(LeaveOneOut()), PARTICLES),
    }


def make_elbo(particles: int) -> Estimator_ELBO:
    return Estimator_ELBO(particles, vectorize_particles=True, max_plate_nesting=1)


def check_gradient(axis: Any, args: argparse.Namespace) -> None:
    """Compare draws of the gradient with the exact one, at a policy that is not uniform."""
    task = Decisions()
    with torch.no_grad():
        task.logits.copy_(
            torch.randn(task.logits.shape, generator=torch.Generator().manual_seed(1))
        )
    (exact,) = torch.autograd.grad(task.value(task.logits), task.logits)
    print(f"{'baseline':28}{'worst z':>9}{'variance':>11}")
    warm_up = min(100, args.draws)  # steps in which baselines learn, without measurement
    for number, (label, make) in enumerate(baselines(len(task.start)).items()):
        score, particles = make()
        elbo, guide = make_elbo(particles), config_gradient(task.guide, score)
        draws = []
        episodes = args.episodes // particles
        for step in tqdm(range(args.draws + warm_up), desc=label, mininterval=0.5):
            task.logits.grad = None
            elbo.loss_and_grads(task.model, guide, task.first_states(episodes))
            for parameter in score.parameters():  # train the baseline
                parameter.data -= 1e-4 * parameter.grad
                parameter.grad = None
            if step >= warm_up:
                draws.append(-task.logits.grad.flatten() / episodes)
        drawn = torch.stack(draws)
        error = drawn.std(0) / len(drawn) ** 0.5
        z = ((drawn.mean(0) - exact.flatten()) / error).abs().max().item()
        print(f"{label:28}{z:>9.2f}{drawn.var(0).sum():>11.5f}")
        at = torch.arange(exact.numel()) + 0.18 * (number - 1.5)
        axis.errorbar(
            at,
            drawn.mean(0),
            drawn.std(0),
            fmt=style.MARKERS[number],
            markersize=3,
            color=style.COLORS[number],
            label=label,
            elinewidth=1,
        )
    axis.plot(exact.flatten(), "k_", markersize=12, label="exact")
    axis.set(
        title="decision process: mean ± sd of gradients",
        xlabel="parameter",
        ylabel="gradient of the reward",
    )


def learn(
    axis: Any,
    make_task: Callable[[], Any],
    size: int,
    steps: int,
    lr: float,
    args: argparse.Namespace,
    title: str,
) -> None:
    """Train with each baseline, and plot the mean and range of rewards over seeds."""
    for color, (label, make) in zip(style.COLORS, baselines(size).items(), strict=False):
        curves = []
        for seed in range(args.seed, args.seed + args.seeds):
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            task, (score, particles) = make_task(), make()
            guide = config_gradient(task.guide, score)
            episodes = args.episodes // particles
            svi = SVI(task.model, guide, pyro.optim.Adam({"lr": lr}), make_elbo(particles))
            bar = tqdm(range(steps), desc=f"{title}, {label}, seed {seed}", mininterval=0.5)
            curves.append([-float(svi.step(task.first_states(episodes))) / episodes for _ in bar])
        rewards = torch.tensor(curves).unfold(1, min(10, steps), 1).mean(-1)
        axis.plot(rewards.mean(0), color=color, label=label)
        axis.fill_between(
            range(rewards.shape[1]),
            rewards.amin(0),
            rewards.amax(0),
            color=color,
            alpha=0.15,
            linewidth=0,
        )
        last = rewards[:, -1]
        print(
            f"{title}: {label:28} last rewards {last.mean():7.3f}, "
            f"seeds {last.min():.3f} to {last.max():.3f}"
        )
    axis.set(
        title=f"{title}: reward per episode", xlabel="step (mean of 10)", ylabel="sum of rewards"
    )


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    add = parser.add_argument
    episodes = "episodes per step, over all particles"
    add("--draws", type=at_least(2), default=1500, help="draws of the gradient")
    add("--episodes", type=at_least(PARTICLES), default=64, help=episodes)
    add("--steps", type=count, default=150, help="training steps, decision process")
    add("--cart-steps", type=count, default=150, help="training steps, cart and pole")
    add("--seeds", type=count, default=3, help="number of seeds, starting at --seed")
    add("--seed", type=natural, default=0, help="seed of gradients and first run")
    out = Path("out/policy_gradient")
    add("--out", type=Path, default=out, metavar="DIR", help="output folder")
    add("--smoke", action="store_true", help="a quick run with few steps")
    args = parser.parse_args(argv)
    make_folder(parser, args.out)
    torch.set_num_threads(1)
    pyro.enable_validation(args.smoke)  # off, since it is slow in steps this small
    pyro.set_rng_seed(args.seed)
    horizon = 60
    if args.smoke:
        args.draws, args.episodes, args.steps, args.cart_steps, args.seeds, horizon = (
            5,
            8,
            3,
            3,
            2,
            4,
        )
    figure, axes = style.panels(1, 3, (4.4, 3.3))
    check_gradient(axes[0, 0], args)
    decisions = Decisions()
    learn(axes[0, 1], Decisions, len(decisions.start), args.steps, 0.1, args, "decision process")
    axes[0, 1].axhline(decisions.best_value(), **style.EXACT, label="best policy")
    print(f"decision process: expected reward of the best policy {decisions.best_value():.3f}")
    learn(axes[0, 2], lambda: CartPole(horizon), 4, args.cart_steps, 0.02, args, "cart and pole")
    axes[0, 2].axhline(horizon, **style.EXACT)
    style.legend_outside(figure, axes[0], columns=3)
    print("\nwritten:", style.write(figure, args.out / "policy_gradient.png"))


if __name__ == "__main__":
    main()
