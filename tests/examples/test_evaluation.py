"""The held-out bounds of the examples against enumeration."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from evaluation import held_out_bounds

PRIOR = torch.tensor([0.1, 0.2, 0.7])
LIKELIHOOD = torch.tensor([0.9, 0.5, 0.2])  # P(x = 1 | z)


def three_state_model(x: torch.Tensor) -> None:
    with pyro.plate("images", len(x)):
        z = pyro.sample("z", dist.OneHotCategorical(probs=PRIOR))
        pyro.sample("x", dist.Bernoulli(probs=z @ LIKELIHOOD), obs=x)


def log_joint(x: torch.Tensor) -> torch.Tensor:
    likelihood = torch.where(x[:, None] == 1, LIKELIHOOD, 1 - LIKELIHOOD)
    return (PRIOR * likelihood).log()  # (N, 3)


def test_bounds_are_the_evidence_under_the_true_posterior() -> None:
    x = torch.tensor([1.0, 0.0, 1.0, 1.0])

    def posterior(x: torch.Tensor) -> None:
        with pyro.plate("images", len(x)):
            pyro.sample("z", dist.OneHotCategorical(logits=log_joint(x)))

    bounds = held_out_bounds(three_state_model, posterior, x, num_samples=7, batch_size=3)
    evidence = log_joint(x).logsumexp(-1).mean().item()
    assert bounds.elbo == pytest.approx(evidence, rel=1e-6)
    assert bounds.importance_weighted == pytest.approx(evidence, rel=1e-6)


def test_elbo_agrees_with_enumeration_under_another_guide() -> None:
    x = torch.ones(4000)
    q = torch.tensor([0.5, 0.3, 0.2])

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("images", len(x)):
            pyro.sample("z", dist.OneHotCategorical(probs=q))

    bounds = held_out_bounds(three_state_model, guide, x, num_samples=10)
    log_weight = log_joint(x[:1])[0] - q.log()
    exact = (q * log_weight).sum().item()
    # 40,000 draws; each image's mean is one of 4,000 independent ones.
    assert abs(bounds.elbo - exact) < 5 * bounds.elbo_se
    variance = (q * (log_weight - exact) ** 2).sum().item()
    assert bounds.elbo_se == pytest.approx(math.sqrt(variance / 40_000), rel=0.1)
    evidence = log_joint(x[:1]).logsumexp(-1).item()
    assert exact < bounds.importance_weighted < evidence + 0.01


def test_evaluation_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("images", len(x)):
            pyro.sample("z", dist.OneHotCategorical(probs=PRIOR))

    results = [held_out_bounds(three_state_model, guide, torch.ones(5), 3) for _ in range(2)]
    assert results[0] == results[1]
    assert torch.equal(before, torch.get_rng_state())
