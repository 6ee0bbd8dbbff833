"""Tensors that captured programs write to, hold, read and replace."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.captured import X, make, observe, refused, same, steps_of

from pyro_gumbel.infer import CapturedSVI


def written_by_unbind(a, x):
    rows, _ = torch.zeros(2, 5).unbind(0)
    return a * rows.add_(x)


def written_as_out(a, x):
    total = torch.zeros(5)
    torch.add(total, x, out=total)
    return a * total


def written_in_a_list(a, x):
    total = torch.zeros(5)
    torch._foreach_add_([total[1:], total[:1]], [x[1:], x[:1]])
    return a * total


@pytest.mark.parametrize("mean", [written_by_unbind, written_as_out, written_in_a_list])
def test_scratch_tensors_are_made_anew(mean):
    def scenario(svi_class):
        def model(x):
            observe(mean(pyro.param("a", torch.ones(5)), x), x + 1)

        svi = make(svi_class, model)
        return [svi.step(x) for x in X[:10]]

    same(scenario)


@pytest.mark.parametrize("how", ["out", "chunk", "argument"])
def test_what_a_step_counts_is_counted_once(how):
    def scenario(svi_class):
        count = torch.zeros(2)

        def model(x, given):
            with torch.no_grad():
                if how == "out":
                    torch.add(count, 1.0, out=count)
                elif how == "chunk":
                    count.chunk(2)[0].add_(1.0)
                    torch._foreach_add_([count[1:]], 1.0)
                else:
                    given.add_(1.0)
            observe(pyro.param("a", torch.zeros(5)), x)

        svi = make(svi_class, model, check_every=3)
        for x in X[:10]:
            svi.step(x, count)
        return count

    assert torch.equal(same(scenario), torch.full((2,), 10.0))


def test_arguments_that_were_one_tensor_when_recorded():
    def scenario(svi_class):
        def model(x, y):
            observe(pyro.param("a", torch.zeros(5)) * x, y)

        svi = make(svi_class, model)
        pairs = [(x, x) for x in X[:4]] + [(x, 2 * x + 1) for x in X[4:30]]
        return [svi.step(*pair) for pair in pairs]

    same(scenario)


def test_an_argument_that_the_program_holds_too():
    data = X[0]

    def scenario(svi_class):
        def model(x):
            observe(pyro.param("a", torch.zeros(5)) * data, x)

        svi = make(svi_class, model)
        return [svi.step(x) for x in (data, data, data, *X[1:20])]

    same(scenario)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("convert", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_sparse_arguments(convert):
    def scenario(svi_class):
        def model(x):
            observe((x @ pyro.param("a", torch.ones(5, 1)))[:, 0], X[0])

        svi = make(svi_class, model)
        return [svi.step(convert(torch.diag(x))) for x in X[:6]]

    same(scenario)


class Recurrent(torch.nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.net = kind(1, 5, **options)

    def model(self, x):
        pyro.module("net", self.net)
        observe(self.net(x.reshape(-1, 1, 1))[0][-1, 0, :5], x)


@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_recurrent_networks(kind, options):
    def scenario(svi_class):
        pyro.set_rng_seed(1)
        svi = make(svi_class, Recurrent(kind, **options).model, check_every=3)
        return [svi.step(x) for x in X[:8]]

    same(scenario)


# Compiling turns torch's validation off.
@pytest.mark.filterwarnings("ignore")
def test_compiled_modules():
    def scenario(svi_class):
        pyro.set_rng_seed(1)
        net = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Tanh())
        compiled = torch.compile(net, backend="aot_eager")

        def model(x):
            pyro.module("net", net)
            observe(compiled(x), x)

        svi = make(svi_class, model, check_every=3)
        return [svi.step(x) for x in X[:8]]

    with pyro.validation_enabled(False):
        same(scenario)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.tolist()[0],
        lambda x: float(x.numpy()[0]),
        lambda x: torch.tensor([x[0], x[1]])[0],
    ],
    ids=["tolist", "numpy", "tensor"],
)
def test_numbers_read_without_an_operation_are_refused(read):
    def scenario(svi_class):
        def model(x):
            observe(pyro.param("a", torch.zeros(5)) * read(x), x)

        svi = make(svi_class, model)
        [svi.step(X[0]) for _ in range(3)]

    refused(scenario, "turns a tensor into numbers")


def test_buffers_that_are_replaced_are_refused_and_restored():
    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(5))
            self.norm = torch.nn.BatchNorm1d(1)

        def forward(self, x):
            self.norm(x.unsqueeze(-1))
            self.mean = 0.9 * self.mean + 0.1 * x
            return x

    mean = Mean()

    def scenario(svi_class):
        def model(x):
            observe(mean(x) * pyro.param("a", torch.zeros(5)), x)

        svi = make(svi_class, model)
        [svi.step(x) for x in X[:3]]

    refused(scenario, r"in place of the buffers \['mean'\]; write to them")
    torch.testing.assert_close(mean.mean, 0.1 * X[0])
    assert mean.norm.num_batches_tracked == 1


def test_small_terms_count_in_a_comparison():
    """The gradient of one parameter is wrong, and small beside that of another."""
    state = {"weight": 1.0}

    def model(x):
        observe(pyro.param("a", torch.zeros(5)), 1e4 * x)
        b = pyro.param("b", torch.tensor(3.0))
        pyro.sample("y", dist.Normal(b * state["weight"], 1.0), obs=x[0])

    svi = make(CapturedSVI, model, check_every=1)
    for x in X[:4]:
        svi.step(x)
    state["weight"] = 0.5
    with pytest.raises(RuntimeError, match="has changed since it was recorded"):
        svi.step(X[0])


def test_validation_of_the_step_that_is_recorded():
    def model(x):
        observe(pyro.param("a", torch.zeros(5)), x)

    svi = make(CapturedSVI, model)
    svi.step(X[0])
    before = pyro.param("a").detach().clone()
    with pytest.raises(ValueError, match="within the support"):
        svi.step(X[1] * float("nan"))
    assert torch.equal(pyro.param("a"), before)
    svi.step(X[1])
    (step,) = steps_of(svi)
    assert step.recording is not None
