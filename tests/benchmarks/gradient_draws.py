"""What drawing gradients costs over calling ``loss_and_grads``, on an 8 x 4 auto-encoder.

    python tests/benchmarks/gradient_draws.py

Printed are the seconds of 1,000 draws of each of five estimators, and the overhead of
``gradient_draws`` over a bare loop of ``loss_and_grads`` that clears gradients, the two in turns
and both in seconds of the processor, which other programs do not lengthen; and the size of the
draws with and without projections.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.util import zero_grads
from torch import nn

from pyro_gumbel.diagnostics import gradient_draws
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

LATENTS, CATEGORIES, HIDDEN, PIXELS, BATCH = 4, 8, 256, 64, 100
ESTIMATORS = ("straight_through", "gumbel_straight_through", "reinmax", "reinmax_rao", "score")
ROUNDS, DRAWS = 5, 200


def programs() -> tuple[Callable[..., Any], Callable[..., Any], torch.Tensor]:
    """An auto-encoder of 64 pixels, untrained."""
    size = LATENTS * CATEGORIES
    encoder = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, size))
    decoder = nn.Sequential(nn.Linear(size, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS))

    def model(x: torch.Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("images", len(x)):
            prior = dist.OneHotCategorical(logits=torch.zeros(LATENTS, CATEGORIES))
            z = pyro.sample("z", prior.to_event(1))
            pixels = dist.Bernoulli(logits=decoder(z.flatten(-2)))
            pyro.sample("x", pixels.to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("images", len(x)):
            logits = encoder(x).unflatten(-1, (LATENTS, CATEGORIES))
            pyro.sample("z", dist.OneHotCategorical(logits=logits).to_event(1))

    return model, guide, (torch.rand(BATCH, PIXELS) < 0.4).float()


def bare(model: Any, guide: Any, x: torch.Tensor) -> float:
    """Processor seconds of the gradients alone."""
    elbo, configured = Estimator_ELBO(), config_gradient(guide, "reinmax")
    elbo.loss_and_grads(model, configured, x)
    leaves = list(pyro.get_param_store()._params.values())
    start = time.process_time()
    for _ in range(DRAWS):
        zero_grads(leaves)
        elbo.loss_and_grads(model, configured, x)
    return time.process_time() - start


def drawn(model: Any, guide: Any, x: torch.Tensor, **options: Any) -> float:
    """Processor seconds of as many draws, setting up included."""
    start = time.process_time()
    gradient_draws(
        model, guide, x, estimators={"r": "reinmax"}, num_draws=DRAWS, num_chains=1,
        progress=False, **options,
    )  # fmt: skip
    return time.process_time() - start


def main() -> None:
    """Print the figures."""
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    model, guide, x = programs()
    forms: dict[str, dict[str, Any]] = {
        "all draws": {"site_draws": 0},
        "all draws, and by site": {},
        "projections": {"site_draws": 0, "project": 8},
    }
    ratios: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(ROUNDS):
        for name, options in forms.items():
            price = bare(model, guide, x)
            ratios[name].append(drawn(model, guide, x, **options) / price)
    print(f"{DRAWS} draws against bare loss_and_grads, median of {ROUNDS} rounds")
    for name, found in ratios.items():
        print(f"  {name:26}{statistics.median(found):6.2f}x")

    start = time.perf_counter()
    estimators = {name: name for name in ESTIMATORS}
    gradient_draws(
        model, guide, x, estimators=estimators, num_draws=250, project=8, progress=False
    )
    print(f"1,000 draws by each of {len(estimators)}: {time.perf_counter() - start:.0f} s")

    print("size of the results")
    for name in ("all draws", "projections"):
        sizes = []
        for number in (50, 200):
            draws = gradient_draws(
                model, guide, x, estimators={"r": "reinmax"}, num_draws=number, num_chains=1,
                progress=False, **forms[name],
            )["r"]  # fmt: skip
            sizes.append(f"{number} draws {draws.nbytes / 2**20:.1f} MB")
        print(f"  {name:26}{', '.join(sizes)}")


if __name__ == "__main__":
    main()
