"""Programs that read a discrete value smoothly or through a jump, and their exact gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer.elbo import ELBO
from torch import Tensor

from pyro_gumbel.infer import config_gradient

GROUPS = 25  # independent replicates of the gradient
Read = Callable[[Tensor], Tensor]
MU = torch.tensor([-1.0, 0.2, 1.6])
TABLE = torch.tensor([1.5, -1.0, 0.3])
PRIOR = torch.tensor([0.2, 0.3, 0.5])
START = torch.tensor([0.3, 0.0, -0.4])


@dataclass(frozen=True)
class Family:
    """A family of the value ``z``; each reader makes one number of it."""

    fn: Callable[[Tensor], dist.TorchDistribution]
    prior: Callable[[], dist.TorchDistribution]
    start: Tensor
    values: Tensor
    smooth: Read
    jumps: dict[str, Read]


ONE_HOT = Family(
    fn=lambda logits: dist.OneHotCategorical(logits=logits),
    prior=lambda: dist.OneHotCategorical(probs=PRIOR),
    start=START,
    values=torch.eye(3),
    smooth=lambda z: z @ MU,
    jumps={
        "index": lambda z: TABLE[z.max(-1).indices],
        "comparison": lambda z: (z[..., 0] > 0.5) * 1.5,
        "argmax": lambda z: z.argmax(-1) - 0.5,
        "rounding": lambda z: (z @ MU).round(),
        "embedding": lambda z: F.embedding(z.argmax(-1), TABLE[:, None]).squeeze(-1),
        "both": lambda z: z @ MU + TABLE[z.argmax(-1)],
    },
)
BIT = Family(
    fn=lambda logits: dist.Bernoulli(logits=logits[..., 0]),
    prior=lambda: dist.Bernoulli(0.3),
    start=START[:1],
    values=torch.tensor([0.0, 1.0]),
    smooth=lambda z: 1.8 * z - 0.5,
    jumps={
        "index": lambda z: TABLE[z.long()],
        "comparison": lambda z: torch.where(z > 0.5, 1.5, -0.3),
        "argmax": lambda z: torch.stack([1 - z, z], -1).argmax(-1) * 1.5,
        "rounding": lambda z: 2 * z.round() - 1,
        "embedding": lambda z: F.embedding(z.int(), TABLE[:, None]).squeeze(-1),
        "both": lambda z: z + TABLE[z.long()],
    },
)
FAMILIES = {"one-hot": ONE_HOT, "bit": BIT}


@dataclass(frozen=True)
class Programs:
    """``z``, a bit ``y`` whose distribution may depend on it, and what is observed of both."""

    family: Family
    y_guide: Read
    y_model: Read
    means: tuple[Callable[[Tensor, Tensor], Tensor], ...]
    size: int = 800

    def model(self) -> None:
        with pyro.plate("groups", GROUPS, dim=-2), pyro.plate("data", self.size, dim=-1):
            z = pyro.sample("z", self.family.prior())
            y = pyro.sample("y", dist.Bernoulli(logits=self.y_model(z)))
            for number, mean in enumerate(self.means):
                pyro.sample(f"x{number}", dist.Normal(mean(z, y), 1.2), obs=torch.tensor(0.8))

    def guide(self) -> None:
        start = self.family.start.expand(GROUPS, 1, -1).clone()
        logits = pyro.param("logits", start, event_dim=1)
        with pyro.plate("groups", GROUPS, dim=-2), pyro.plate("data", self.size, dim=-1):
            z = pyro.sample("z", self.family.fn(logits))
            pyro.sample("y", dist.Bernoulli(logits=self.y_guide(z)), infer={"gradient": "score"})

    def exact(self) -> Tensor:
        """The gradient of the loss, per element."""
        logits = self.family.start.clone().requires_grad_()
        q, p = self.family.fn(logits), self.family.prior()
        loss = torch.zeros(())
        for z, y in itertools.product(self.family.values, torch.tensor([0.0, 1.0])):
            log_q = q.log_prob(z) + dist.Bernoulli(logits=self.y_guide(z)).log_prob(y)
            log_p = p.log_prob(z) + dist.Bernoulli(logits=self.y_model(z)).log_prob(y)
            for mean in self.means:
                log_p = log_p + dist.Normal(mean(z, y), 1.2).log_prob(torch.tensor(0.8))
            loss = loss + log_q.exp() * (log_q - log_p)
        return torch.autograd.grad(loss, logits)[0]

    def worst_z(self, elbo: ELBO, estimator: object) -> float:
        """The largest deviation of one step's gradient, in standard errors."""
        elbo.loss_and_grads(self.model, config_gradient(self.guide, {"z": estimator}))
        gradient = pyro.get_param_store()._params["logits"].grad.squeeze(1) / self.size
        error = gradient.std(0) / GROUPS**0.5
        return ((gradient.mean(0) - self.exact()).abs() / error).max().item()


def constant(z: Tensor) -> Tensor:
    return torch.full(z.shape[:-1] if z.shape[-1:] == (3,) else z.shape, 0.4)


def placed(family: Family, read: Read, place: str, size: int = 800) -> Programs:
    """Put a reader of ``z`` somewhere, beside smooth ones."""
    smooth = family.smooth
    y_guide = read if place == "guide" else constant
    y_model = read if place == "model" else constant
    means = {
        "one site": (lambda z, y: smooth(z) + read(z) + y,),
        "two sites": (lambda z, y: smooth(z) + y, lambda z, y: read(z) - y),
    }
    return Programs(
        family, y_guide, y_model, means.get(place, (lambda z, y: smooth(z) + y,)), size
    )


PLACES = {"one site": "x0", "two sites": "x1", "guide": "y", "model": "y"}  # and who reads
