"""Compare two gradients of one expectation: score function and pathwise.

    python examples/two_gradients.py

Both estimate d/dtheta E[z^2] = 2 a (a theta + b) for z ~ N(a theta + b, 1). Other panels show
gradient descent to theta = -b / a, a change of variables, and the KL divergence of two Gaussians
with full covariance against Monte Carlo.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from tqdm import tqdm

import style
from arguments import at_least, count, make_folder, natural, new_parser
from pyro_gumbel.estimators import Estimator, LeaveOneOut, Pathwise, Score
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

A, B = 1.5, 2.0
ESTIMATORS: dict[str, tuple[Estimator, int]] = {
    "score, no baseline": (Score(), 1),
    "score, leave-one-out of 4": (Score(LeaveOneOut()), 4),
    "pathwise": (Pathwise(sticking_the_landing=True), 1),
}


def gaussian(theta: Tensor) -> dist.Normal:
    return dist.Normal(A * theta + B, 1.0)


def guide(theta: Tensor) -> None:
    """Draw z for each element of theta."""
    with pyro.plate("draws", len(theta)):
        pyro.sample("z", gaussian(theta))


def model(theta: Tensor) -> None:
    """Subtract z^2; z has the guide's distribution, detached, so the ELBO is -E[z^2]."""
    with pyro.plate("draws", len(theta)):
        z = pyro.sample("z", gaussian(theta.detach()))
        pyro.factor("cost", -(z**2))


def gradients(theta: float, label: str, draws: int) -> Tensor:
    """Draw gradients of E[z^2] at theta, one for each element of a plate."""
    estimator, num_particles = ESTIMATORS[label]
    thetas = torch.full((draws,), theta, requires_grad=True)
    elbo = Estimator_ELBO(num_particles, vectorize_particles=True, max_plate_nesting=1)
    elbo.loss_and_grads(model, config_gradient(guide, estimator), thetas)
    return thetas.grad


def forest(axis: Any, thetas: list[float], draws: int) -> None:
    """Plot the mean and a 94 % interval of each estimator's draws."""
    print(f"gradient of E[z^2], {draws:,} draws\n{'theta':>7}{'exact':>9}   estimator")
    row, ticks = 0, []
    for theta in thetas:
        exact = 2 * A * (A * theta + B)
        for label, color in zip(ESTIMATORS, style.COLORS, strict=False):
            drawn = gradients(theta, label, draws)
            low, high = drawn.quantile(0.03).item(), drawn.quantile(0.97).item()
            mean, error = drawn.mean().item(), drawn.std().item() / draws**0.5
            axis.plot([low, high], [row, row], color=color, linewidth=2)
            axis.plot(mean, row, "o", color=color, label=label)
            z = (mean - exact) / error
            print(
                f"{theta:7.2f}{exact:9.2f}   {label:26} mean {mean:8.3f}  z {z:+5.2f}"
                f"  sd {drawn.std():7.3f}"
            )
            ticks.append(f"theta = {theta:.2f}" if row % 4 == 1 else "")
            row += 1
        axis.plot(
            [exact, exact], [row - 3.4, row - 0.6], **style.EXACT, label="exact, 2 a (a theta + b)"
        )
        row += 1
        ticks.append("")
    axis.set_yticks(range(row), ticks)
    axis.invert_yaxis()
    axis.set(title="gradients: mean, and 94 % of draws", xlabel="gradient of E[z²]")


def descent(axis: Any, steps: int, seeds: int, lr: float = 0.02) -> None:
    """Plot gradient descent with each estimator from the same start."""
    for label, color in zip(ESTIMATORS, style.COLORS, strict=False):
        estimator, num_particles = ESTIMATORS[label]
        elbo = Estimator_ELBO(num_particles, vectorize_particles=True, max_plate_nesting=1)
        configured = config_gradient(guide, estimator)
        theta = torch.full((seeds,), 2.0, requires_grad=True)  # the seeds are independent draws
        path = [theta.detach().clone()]
        for _ in tqdm(range(steps), desc=f"descent, {label}", mininterval=0.5):
            theta.grad = None
            elbo.loss_and_grads(model, configured, theta)
            with torch.no_grad():
                theta -= lr * theta.grad
            path.append(theta.detach().clone())
        paths = torch.stack(path)
        axis.plot(paths, color=color, linewidth=0.8, alpha=0.6)
        axis.plot([], [], color=color, label=label)
        last = paths[-100:]
        print(
            f"descent, {label:26} theta {last.mean():7.3f} (sd {last.std():.3f}); "
            f"-b/a = {-B / A:.3f}"
        )
    axis.axhline(-B / A, **style.EXACT)
    axis.set(title=f"descent, {seeds} seeds", xlabel="step", ylabel="theta")


def change_of_variables(axis: Any, draws: int) -> None:
    """Plot the density of y = sinh(x), x normal, by autograd's derivative of the inverse."""
    y = torch.linspace(-6, 6, 400, dtype=torch.float64, requires_grad=True)
    x = torch.asinh(y)
    (jacobian,) = torch.autograd.grad(x.sum(), y)
    density = dist.Normal(0.0, 1.0).log_prob(x).exp() * jacobian.abs()
    axis.hist(
        torch.randn(draws).sinh(),
        bins=80,
        range=(-6, 6),
        density=True,
        color=style.COLORS[4],
        label="draws",
    )
    axis.plot(y.detach(), density.detach(), color="black", label="f(T⁻¹(y)) |dT⁻¹/dy|")
    axis.set(title="change of variables, y = sinh(x)", xlabel="y", ylabel="density")
    full = torch.linspace(-4000, 4000, 8_000_001, dtype=torch.float64)
    mass = torch.trapezoid(
        dist.Normal(0.0, 1.0).log_prob(torch.asinh(full)).exp() / (1 + full**2).sqrt(), full
    )
    print(f"change of variables: the density integrates to {mass:.6f}")


def gaussian_kl(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    """Return 0.5 [log |S2| / |S1| - d + tr(S2^-1 S1) + (m2 - m1)' S2^-1 (m2 - m1)]."""
    difference = mean2 - mean1
    inverse = torch.linalg.inv(cov2)
    logdets = torch.logdet(cov2) - torch.logdet(cov1)
    return 0.5 * (
        logdets - len(mean1) + (inverse @ cov1).trace() + difference @ inverse @ difference
    )


def kl_against_monte_carlo(axis: Any, draws: int) -> None:
    """Plot Monte Carlo estimates of the KL divergence by the number of draws."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    cov1, cov2 = factors @ factors.mT + 0.5 * torch.eye(3)
    mean1, mean2 = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    exact = gaussian_kl(mean1, cov1, mean2, cov2).item()
    p, q = dist.MultivariateNormal(mean1, cov1), dist.MultivariateNormal(mean2, cov2)
    sizes = [4**k for k in range(2, 20) if 4**k <= draws]
    for size in sizes:
        x = p.sample((size,))
        ratio = p.log_prob(x) - q.log_prob(x)
        mean, error = ratio.mean().item(), ratio.std().item() / size**0.5
        axis.errorbar(
            size, mean, 2 * error, fmt="o", color=style.COLORS[5], label="Monte Carlo ± 2 s.e."
        )
    axis.axhline(exact, **style.EXACT, label="closed form")
    axis.set(title="KL of two Gaussians in R³", xlabel="draws", ylabel="nats", xscale="log")
    z = (mean - exact) / error
    print(
        f"KL: closed form {exact:.4f}, torch {torch.distributions.kl_divergence(p, q):.4f}, "
        f"{size:,} draws {mean:.4f} (z {z:+.2f})"
    )


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--draws", type=at_least(16), default=100_000, help="draws of each gradient")
    add("--steps", type=count, default=300, help="steps of gradient descent")
    add("--seeds", type=count, default=8, help="seeds of gradient descent")
    add("--seed", type=natural, default=0, help="seed of all draws")
    add("--out", type=Path, default=Path("out/two_gradients"), metavar="DIR", help="output folder")
    add("--smoke", action="store_true", help="a quick run with few draws")
    args = parser.parse_args(argv)
    make_folder(parser, args.out)
    torch.set_num_threads(1)
    pyro.set_rng_seed(args.seed)
    if args.smoke:
        args.draws, args.steps, args.seeds = 500, 5, 2
    figure, axes = style.panels(1, 4, (3.4, 3.4))
    forest(axes[0, 0], [-2.0, -B / A, 0.0, 1.0], args.draws)
    descent(axes[0, 1], args.steps, args.seeds)
    change_of_variables(axes[0, 2], args.draws)
    kl_against_monte_carlo(axes[0, 3], args.draws)
    style.legend_outside(figure, axes[0])
    print("\nwritten:", style.write(figure, args.out / "two_gradients.png"))


if __name__ == "__main__":
    main()
