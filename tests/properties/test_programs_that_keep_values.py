"""Programs that keep latent values from step to step, in buffers and in lists."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_gumbel.infer import Estimator_ELBO, ImportanceWeighted_ELBO, config_gradient

TABLE = torch.tensor([-1.0, 0.5, 2.0])


class Program(nn.Module):
    """The likelihood reads a moving average of the values, which has no gradient of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.3, 0.0, -0.2]))
        self.register_buffer("mean", torch.zeros(3))
        self.kept: list[Tensor] = []

    def model(self) -> None:
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.OneHotCategorical(torch.ones(3)))
            self.kept.append(z)
            self.mean.mul_(0.9).add_(0.1 * z.reshape(-1, 3).mean(0))
            mean = z @ TABLE + self.mean.sum()
            pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.zeros(4))

    def guide(self) -> None:
        pyro.module("program", self)
        with pyro.plate("data", 4):
            pyro.sample("z", dist.OneHotCategorical(logits=self.logits))


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize(
    ("bound", "estimator"),
    [
        (Estimator_ELBO, "score"),
        (Estimator_ELBO, "disarm_tree"),
        (Estimator_ELBO, "sum_and_sample"),
        (Estimator_ELBO, "unordered_set"),
        (ImportanceWeighted_ELBO, "score"),
    ],
)
def test_values_without_gradient_stay_so(bound: type, estimator: str, vectorize: bool) -> None:
    program = Program()
    elbo = bound(2, vectorize_particles=vectorize, max_plate_nesting=1)
    guide = config_gradient(program.guide, estimator)
    for _ in range(3):
        elbo.loss_and_grads(program.model, guide)
        assert not program.mean.requires_grad
        assert not any(z.requires_grad for z in program.kept)
        assert [z.numpy().shape[-1] for z in program.kept] == [3] * len(program.kept)
    assert program.mean.sum() > 0
    assert torch.isfinite(program.logits.grad).all()
