"""Programs that change numbers of their own: to count is refused, to note is not."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

from pyro_gumbel.infer import CapturedSVI, Estimator_ELBO

TOTAL = 0


def make(model, svi_class=CapturedSVI):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    optim = pyro.optim.Adam({"lr": 0.05, "fused": True})
    return svi_class(model, lambda x: None, optim, Estimator_ELBO(max_plate_nesting=1))


def observe(x, scale=1.0):
    mean = pyro.param("mean", torch.zeros(()))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, scale), obs=x)


class Called:
    """A program that is an object, and counts in an attribute of the class's."""

    n = 0

    def __call__(self, x):
        self.n += 1
        observe(x, 1.0 + self.n // 100)

    def method(self, x):
        self(x)


class Network(nn.Module):
    """A module that warms up, by a share that grows slowly."""

    def __init__(self):
        super().__init__()
        self.part = nn.Identity()
        self.steps = 0

    def forward(self, x):
        self.steps += 1
        observe(x, 1.0 + min(1.0, self.steps / 50_000))


def by_closure():
    left = 9.0

    def model(x):
        nonlocal left
        left -= 1
        observe(x, 1.0 + max(left, 1.0))

    return model


def by_global(x):
    global TOTAL
    TOTAL += 1
    observe(x, [1.0, 1.1, 1.2, 1.3, 1.4, 1.5][TOTAL])


@pytest.mark.parametrize(
    ("program", "name"),
    [
        (lambda: Called(), "attribute 'n' of Called"),
        (lambda: Called().method, "attribute 'n' of Called"),
        (lambda: Network(), "attribute 'steps' of Network"),
        (by_closure, "variable 'left'"),
        (lambda: by_global, "variable 'TOTAL'"),
    ],
)
def test_a_program_that_goes_by_its_count_is_refused(program, name):
    svi = make(program())
    x = torch.ones(3)
    svi.step(x)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"{name}.*torch\.tensor\(beta\)"):
            svi.step(x)


def test_what_a_refused_run_counted_is_undone():
    program = Called()
    svi = make(program)
    svi.step(torch.ones(3))
    before = program.n
    with pytest.raises(RuntimeError, match="attribute 'n'"):
        svi.step(torch.ones(3))
    assert program.n == before


@pytest.mark.parametrize("start", [0, 7])
def test_a_program_that_merely_counts_is_recorded(start):
    calls = start

    def model(x):
        nonlocal calls
        calls += 1
        observe(x)

    losses = []
    for svi_class in (SVI, CapturedSVI):
        svi = make(model, svi_class)
        losses.append([svi.step(torch.ones(3)) for _ in range(20)])
    assert losses[1] == pytest.approx(losses[0])
    (step,) = svi._steps.values()
    assert step.replays == 18
    assert calls < start + 25  # what recording tried is not counted


class Noting:
    """Notes the size of the batch, and a share that is no number."""

    size = 0
    share = float("nan")

    def __call__(self, x):
        self.size = len(x)
        self.share = float("nan")
        observe(x)


def test_a_program_that_notes_is_recorded():
    batches = [torch.ones(3), torch.zeros(2)] * 6
    losses = []
    for svi_class in (SVI, CapturedSVI):
        svi = make(Noting(), svi_class)
        losses.append([svi.step(x) for x in batches])
    assert losses[1] == pytest.approx(losses[0])
    assert [step.replays for step in svi._steps.values()] == [4, 4]
