"""Exact gradients of programs on random minibatches, whose elements may read one another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_gumbel.diagnostics import check_unbiased, exact_gradient
from pyro_gumbel.estimators import Enumerate

SIZE, BATCH = 5, 3
X = torch.tensor([-3.0, -2.5, 0.5, 1.0, 4.0])
Logits = Callable[[Tensor, Tensor], Tensor]
Means = Callable[[Tensor, Tensor, Tensor], Tensor]


def normed(x: Tensor) -> Tensor:
    """As BatchNorm in training does it."""
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def batch_norm(x: Tensor) -> Tensor:
    return nn.BatchNorm1d(1, affine=False).to(x.dtype)(x[:, None]).squeeze(-1)


def nothing(x: Tensor, w: Tensor) -> Tensor:
    return torch.zeros((), dtype=x.dtype)


@dataclass(frozen=True)
class Programs:
    """A bit for each datum; the term outside the plate and the likelihood may read the batch.

    ``reference`` is ``logits`` for the closed form, where the program calls a module.
    """

    logits: Logits
    means: Means = lambda z, x, w: 2 * z - 1
    outside: Logits = nothing
    reference: Logits | None = None
    w: float = 1.2
    size: int = SIZE
    batch: int = BATCH

    def model(self, x: Tensor) -> None:
        w = pyro.param("w")
        with pyro.plate("d", self.size, subsample_size=self.batch) as i:
            z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.3)))
            pyro.sample("x", dist.Normal(self.means(z, x[i], w), 1.0), obs=x[i])
        pyro.factor("f", self.outside(x[i], w))

    def guide(self, x: Tensor) -> None:
        w = pyro.param("w", x.new_tensor(self.w))
        with pyro.plate("d", self.size, subsample_size=self.batch) as i:
            pyro.sample("z", dist.Bernoulli(logits=self.logits(x[i], w)))

    def got(self, x: Tensor) -> tuple[float, float]:
        exact = exact_gradient(self.model, self.guide, x)
        return exact.attrs["loss"], float(exact["w"])

    def brute_force(self, x: Tensor) -> tuple[float, float]:
        """The mean over all minibatches in all orders, of sums over all values of their bits."""
        w = torch.tensor(self.w, dtype=torch.float64, requires_grad=True)
        x = x.double()
        bits = [torch.arange(2.0, dtype=torch.float64)] * self.batch
        z = torch.cartesian_prod(*bits).reshape(-1, self.batch)
        orders = list(itertools.permutations(range(self.size), self.batch))
        total = torch.zeros((), dtype=torch.float64)
        for order in orders:
            x_i = x[list(order)]
            logits = (self.reference or self.logits)(x_i, w)
            log_q = dist.Bernoulli(logits=logits).log_prob(z)
            log_p = dist.Bernoulli(x.new_tensor(0.3)).log_prob(z)
            means = torch.stack([self.means(row, x_i, w) for row in z])
            log_p = log_p + dist.Normal(means, 1.0).log_prob(x_i)
            bound = self.size / self.batch * (log_p - log_q).sum(-1) + self.outside(x_i, w)
            total = total - (log_q.sum(-1).exp() * bound).sum() / len(orders)
        return total.item(), torch.autograd.grad(total, w)[0].item()


def attention(x: Tensor, w: Tensor) -> Tensor:
    return w * (torch.outer(x, x) / 4).softmax(-1) @ x


def by_position(x: Tensor, w: Tensor) -> Tensor:
    return w * x * torch.arange(len(x), dtype=x.dtype)


READ_ONE_ANOTHER: dict[str, Programs] = {
    "batch norm": Programs(lambda x, w: w * batch_norm(x), reference=lambda x, w: w * normed(x)),
    "batch norm times zero": Programs(
        lambda x, w: w * batch_norm(x), reference=lambda x, w: w * normed(x), w=0.0
    ),
    "centring": Programs(lambda x, w: w * (x - x.mean())),
    "above the mean": Programs(lambda x, w: w * (x > x.mean())),
    "largest": Programs(lambda x, w: w * x.amax()),
    "rank": Programs(lambda x, w: w * x.argsort().argsort()),
    "attention": Programs(attention),
    "position": Programs(by_position, size=4, batch=2),
    "neighbour": Programs(lambda x, w: w * x.roll(1), size=4, batch=2),
    "likelihood": Programs(lambda x, w: w * x, lambda z, x, w: z + w * (x - x.mean())),
    "values of the others": Programs(lambda x, w: w * x, lambda z, x, w: w * z - z.mean()),
    "square outside": Programs(lambda x, w: w * x, outside=lambda x, w: -w * x.sum() ** 2 / 50),
    "pairs outside": Programs(lambda x, w: w * x, outside=lambda x, w: w * x.prod() / 9),
}
APART: dict[str, Programs] = {
    "elementwise": Programs(lambda x, w: (w * x).tanh()),
    "sum outside": Programs(lambda x, w: w * x, outside=lambda x, w: -w * (2 * x**2).sum()),
    "single": Programs(lambda x, w: w * (x - x.mean()), batch=1),
    "whole": Programs(lambda x, w: w * (x - x.mean()), batch=SIZE),
}
PROGRAMS = READ_ONE_ANOTHER | APART


@pytest.mark.parametrize("name", PROGRAMS)
def test_all_minibatches(name: str) -> None:
    programs = PROGRAMS[name]
    x = X.double()[: programs.size]
    assert programs.got(x) == pytest.approx(programs.brute_force(x), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", ["batch norm", "position", "elementwise", "sum outside"])
def test_single_precision(name: str) -> None:
    programs = PROGRAMS[name]
    x = X[: programs.size]
    assert programs.got(x) == pytest.approx(programs.brute_force(x), rel=2e-4)


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("name", ["batch norm", "rank", "position", "square outside"])
def test_other_sizes_of_plates(name: str, size: int) -> None:
    few = PROGRAMS[name]
    programs = Programs(
        few.logits, few.means, few.outside, few.reference, w=few.w, size=size, batch=2
    )
    x = X.double()[:size]
    assert programs.got(x) == pytest.approx(programs.brute_force(x), rel=1e-9)


def larger(name: str, size: int, batch: int) -> tuple[Programs, Tensor]:
    few = PROGRAMS[name]
    programs = Programs(
        few.logits, few.means, few.outside, few.reference, w=few.w, size=size, batch=batch
    )
    return programs, torch.linspace(-2, 2, size, dtype=torch.float64).sin() * 2


@pytest.mark.parametrize("name", sorted(set(READ_ONE_ANOTHER) - {"values of the others"}))
def test_too_many_minibatches_are_refused(name: str) -> None:
    programs, x = larger(name, 40, 10)
    match = (
        r"(?s)exact_gradient: .* of plate 'd' .*: there are [0-9,]+ minibatches.*"
        r"max_states=1,000.*\.eval\(\).*gradient_draws"
    )
    with pytest.raises(ValueError, match=match):
        exact_gradient(programs.model, programs.guide, x, max_states=1_000)


@pytest.mark.parametrize("name", ["elementwise", "sum outside"])
def test_many_minibatches_of_elements_apart(name: str) -> None:
    """They stand for all data, whose terms are sums over elements."""
    programs, x = larger(name, 40, 10)
    whole = Programs(
        programs.logits,
        programs.means,
        lambda x, w: programs.outside(x, w) / 4,
        size=40,
        batch=40,
    )
    got = programs.got(x)
    pyro.clear_param_store()
    assert got == pytest.approx(whole.got(x), rel=1e-9)


def test_a_module_in_eval_mode_reads_no_other_elements() -> None:
    norm = nn.BatchNorm1d(1).double().eval()
    programs, x = larger("elementwise", 40, 10)
    in_eval = Programs(lambda x, w: w * norm(x[:, None]).squeeze(-1), size=40, batch=10)
    exact = exact_gradient(in_eval.model, in_eval.guide, x)
    assert math.isfinite(float(exact["w"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["batch norm", "position", "square outside"])
def test_unbiased_estimators_agree(name: str) -> None:
    programs = PROGRAMS[name]
    x = X[: programs.size]
    check_unbiased(programs.model, programs.guide, x, estimator=Enumerate(), num_draws=1_000)


def test_two_plates_of_minibatches() -> None:
    """The elements of the one read one another, those of the other do not."""
    x, y = X.double()[:4], torch.linspace(-1, 1, 12, dtype=torch.float64)

    def model(size: int | None) -> None:
        w = pyro.param("w")
        with pyro.plate("few", 4, subsample_size=2, dim=-1) as i:
            z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.3)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])
        with pyro.plate("many", 12, subsample_size=size, dim=-1) as j:
            v = pyro.sample("v", dist.Bernoulli(x.new_tensor(0.6)))
            pyro.sample("y", dist.Normal(w * v, 1.0), obs=y[j])

    def guide(size: int | None) -> None:
        w = pyro.param("w", x.new_tensor(1.2))
        with pyro.plate("few", 4, subsample_size=2, dim=-1) as i:
            pyro.sample("z", dist.Bernoulli(logits=w * (x[i] - x[i].mean())))
        with pyro.plate("many", 12, subsample_size=size, dim=-1) as j:
            pyro.sample("v", dist.Bernoulli(logits=w * y[j]))

    parts, whole = exact_gradient(model, guide, 3), exact_gradient(model, guide, None)
    assert float(parts["w"]) == pytest.approx(float(whole["w"]), rel=1e-9)
    assert parts.attrs["loss"] == pytest.approx(whole.attrs["loss"], rel=1e-9)
