"""The score function and its baselines, draw by draw: gradients as published, to 1e-10."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.formulas import EXACT
from torch import nn

from pyro_gumbel.estimators import LeaveOneOut, MovingAverage, NeuralBaseline, Pathwise, Score
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

DOUBLE = torch.float64
SIZE, CATEGORIES = 2, 3


class Program:
    """One plate of one-hot sites; remembers what the model was run on."""

    def __init__(self):
        self.prior = torch.tensor([0.1, 0.2, 0.7], dtype=DOUBLE).log()
        self.table = torch.randn(SIZE, CATEGORIES, dtype=DOUBLE)
        self.weight = torch.tensor(0.8, dtype=DOUBLE).requires_grad_()
        self.phi = torch.randn(SIZE, CATEGORIES, dtype=DOUBLE).requires_grad_()
        self.seen = []

    def model(self, x=None):
        with pyro.plate("n", SIZE):
            prior = self.prior.expand(SIZE, CATEGORIES)
            z = pyro.sample("z", dist.OneHotCategorical(logits=prior))
            self.seen.append(z.detach())
            pyro.factor("x", self.weight * (z * self.table).sum(-1))

    def guide(self, x=None):
        with pyro.plate("n", SIZE):
            pyro.sample("z", dist.OneHotCategorical(logits=self.phi))

    def step(self, elbo, estimator, *args):
        """Take a step; return the draws ``(R, SIZE, C)``."""
        self.seen.clear()
        elbo.loss_and_grads(self.model, config_gradient(self.guide, estimator), *args)
        return self.seen[-1] if elbo.vectorize_particles else torch.stack(self.seen)

    def costs(self, draws):
        """Log p - log q of each plate element, ``(R, SIZE)``."""
        log_q = self.phi.detach().log_softmax(-1)
        likelihood = self.weight.detach() * (draws * self.table).sum(-1)
        return likelihood + (draws * (self.prior - log_q)).sum(-1)

    def scores(self, draws):
        """The gradient of ``log q`` in the logits, ``(R, SIZE, C)``."""
        return draws - self.phi.detach().softmax(-1)

    def expect(self, draws, baseline):
        """What the published formula makes of these draws."""
        centred = self.costs(draws) - baseline
        return -(centred.unsqueeze(-1) * self.scores(draws)).mean(0)


def elbo_of(num_particles, vectorize):
    return Estimator_ELBO(
        num_particles=num_particles, vectorize_particles=vectorize, max_plate_nesting=1
    )


@pytest.fixture(params=[False, True], ids=["looped", "vectorised"])
def vectorize(request):
    return request.param


@pytest.mark.parametrize("num_particles", [1, 3])
def test_no_baseline(vectorize, num_particles):
    program = Program()
    draws = program.step(elbo_of(num_particles, vectorize), Score())
    assert draws.numel() == num_particles * SIZE * CATEGORIES
    draws = draws.reshape(num_particles, SIZE, CATEGORIES)
    torch.testing.assert_close(program.phi.grad, program.expect(draws, 0.0), **EXACT)
    # The model's parameter gets the plain mean.
    model_grad = -(draws * program.table).sum((-1, -2)).mean()
    torch.testing.assert_close(program.weight.grad, model_grad, **EXACT)


@pytest.mark.parametrize("num_particles", [2, 5])
def test_leave_one_out(vectorize, num_particles):
    """Element by element: 1 / (R - 1) sum_r (f_r - mean f) score_r."""
    program = Program()
    draws = program.step(elbo_of(num_particles, vectorize), Score(LeaveOneOut()))
    costs = program.costs(draws)
    centred = (costs - costs.mean(0)).unsqueeze(-1)
    expected = -(centred * program.scores(draws)).sum(0) / (num_particles - 1)
    torch.testing.assert_close(program.phi.grad, expected, **EXACT)


def test_moving_average(vectorize):
    """The mean of past steps, the last weighing most; nothing before the first."""
    program, baseline = Program(), MovingAverage(decay=0.7)
    past = []
    for step in range(4):
        program.phi.grad = None
        draws = program.step(elbo_of(3, vectorize), Score(baseline))
        weights = [0.7 ** (step - 1 - s) for s in range(step)]
        total = sum(w * m for w, m in zip(weights, past, strict=True))
        expected = total / sum(weights) if past else 0.0
        torch.testing.assert_close(program.phi.grad, program.expect(draws, expected), **EXACT)
        past.append(program.costs(draws).mean())


def test_neural_baseline(vectorize):
    """Subtracts a prediction from the input; is itself trained by squared error."""
    program = Program()
    module = nn.Linear(4, 1).double()
    x = torch.randn(SIZE, 4, dtype=DOUBLE)
    draws = program.step(elbo_of(3, vectorize), Score(NeuralBaseline(module, "x")), x)
    prediction = module(x).squeeze(-1)
    expected = program.expect(draws, prediction.detach())
    torch.testing.assert_close(program.phi.grad, expected, **EXACT)
    loss = ((program.costs(draws) - prediction) ** 2).sum(-1).mean()
    for parameter in module.parameters():
        (grad,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        torch.testing.assert_close(parameter.grad, grad, **EXACT)


@pytest.mark.parametrize(
    "read",
    ["x", lambda x: x, lambda *args, **kwargs: args[0]],
    ids=["by_name", "by_callable", "by_position"],
)
def test_neural_baseline_reads_its_input(read):
    program = Program()
    module = nn.Linear(4, 1).double()
    x = torch.randn(SIZE, 4, dtype=DOUBLE)
    draws = program.step(elbo_of(2, vectorize=True), Score(NeuralBaseline(module, read)), x)
    expected = program.expect(draws, module(x).squeeze(-1).detach())
    torch.testing.assert_close(program.phi.grad, expected, **EXACT)


@pytest.mark.parametrize("landing", [False, True])
def test_pathwise(vectorize, landing):
    """Log q with or without the gradient through its parameters alone."""
    loc = torch.tensor([0.3, -1.0], dtype=DOUBLE).requires_grad_()
    log_scale = torch.tensor([0.1, -0.5], dtype=DOUBLE).requires_grad_()
    seen = []

    def model():
        with pyro.plate("n", SIZE):
            z = pyro.sample("z", dist.Normal(torch.ones(SIZE, dtype=DOUBLE), 2.0))
            seen.append(z.detach())
            pyro.factor("x", z.sin())

    def guide():
        with pyro.plate("n", SIZE):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    elbo = elbo_of(3, vectorize)
    guide_ = config_gradient(guide, Pathwise(sticking_the_landing=landing))
    elbo.loss_and_grads(model, guide_)
    draws = seen[-1] if vectorize else torch.stack(seen)
    scale = log_scale.detach().exp()
    noise = (draws - loc.detach()) / scale
    # d/dz of log p(x, z); that of -log q is noise / scale, and its score part cancels in part.
    slope = draws.cos() - (draws - 1) / 4
    if landing:
        slope = slope + noise / scale
        expected = {"loc": slope, "log_scale": slope * noise * scale}
    else:
        expected = {"loc": slope, "log_scale": slope * noise * scale + 1}
    torch.testing.assert_close(loc.grad, -expected["loc"].mean(0), **EXACT)
    torch.testing.assert_close(log_scale.grad, -expected["log_scale"].mean(0), **EXACT)
