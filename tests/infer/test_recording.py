"""A recording computes what was recorded, on what its inputs and held tensors are now."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributions as td
import torch.nn.functional as F  # noqa: N812
from torch import nn

from pyro_gumbel.infer._recording import NotRecordable, record


def play(recording, *inputs):
    returned, conditions = recording(inputs)
    assert all(conditions)
    return returned


def both(function, *inputs, scales=(2.0, -3.0)):
    """Record on some inputs and compare two replays, on others, with the function itself."""
    first, recording = record(function, inputs)
    torch.testing.assert_close(first, function(*inputs))
    for scale in scales:
        others = [tensor * scale for tensor in inputs]
        expected = tuple(function(*others))
        torch.testing.assert_close(play(recording, *others), expected)
    return recording


def operations(recording, *inputs):
    """Name the operations of one replay."""
    with torch.profiler.profile() as profiled:
        recording(inputs)
    return [event.name for event in profiled.events() if event.name.startswith("aten::")]


def test_gradients():
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def function(x):
        loss = (x @ weight).relu().sum() * torch.tensor(0.3)
        return [loss.detach(), torch.autograd.grad(loss, [weight])[0]]

    recording = both(function, torch.randn(4, 3, dtype=torch.float64))
    with torch.no_grad():
        weight.mul_(2.0)  # held by reference: seen
    x = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(play(recording, x), tuple(function(x)))


def test_literals_that_are_changed_in_place_are_made_anew():
    def function(x):
        direct, by_view = torch.zeros(2, 3), torch.zeros(2, 3)
        direct.add_(x)
        by_view[0].add_(x[0])
        by_view.view(6)[5:].add_(1.0)
        like = torch.zeros_like(x)
        like.t().add_(1.0)
        literal = torch.tensor([[1.0, 2.0, 3.0]])
        literal.mul_(x[:1])
        return [direct, by_view * 2, like + x, literal + 1]

    both(function, torch.ones(2, 3))


def test_results_belong_to_the_caller():
    function = lambda x: [x.exp(), x.exp(), torch.tensor(0.5).exp().expand(3)]  # noqa: E731
    _, recording = record(function, [torch.ones(2)])
    one, other, constant = play(recording, torch.ones(2))
    one.zero_()
    constant.as_strided((1,), (1,)).fill_(7.0)
    torch.testing.assert_close(other, torch.ones(2).exp())
    torch.testing.assert_close(play(recording, torch.ones(2)), tuple(function(torch.ones(2))))


@pytest.mark.filterwarnings("ignore:.*Profiler clears events at the end:UserWarning")
def test_constants_are_computed_once_and_unused_results_never():
    recording = both(lambda x: [torch.tensor(0.3).log() + x.exp() * 2, x.sin()][:1], X)
    names = operations(recording, X)
    assert names.count("aten::exp") == 1
    assert not {"aten::log", "aten::sin"} & set(names)


@pytest.mark.filterwarnings("ignore:.*Profiler clears events at the end:UserWarning")
def test_equal_operations_are_computed_once():
    weight = torch.ones(2, requires_grad=True)

    def function(x):
        loss = (weight * x).exp().sum() + (weight * x).exp().sum() + (weight * x).cos().sum()
        draws = torch.zeros(2).uniform_() + torch.zeros(2).uniform_()
        return [loss.detach(), torch.autograd.grad(loss, weight)[0], draws]

    _, recording = record(function, [X])
    names = operations(recording, X)
    assert names.count("aten::exp") == 1
    assert names.count("aten::uniform_") == 2
    (loss, gradient, _), _ = recording([X * 2])
    torch.testing.assert_close((loss, gradient), tuple(function(X * 2)[:2]))


def test_operations_on_what_has_changed():
    held = torch.zeros(3)

    def function(x):
        base = x * 2
        whole, part, untouched = base.exp(), base[1:].sin(), held.cos()
        base[0].add_(1.0)
        base.view(3, 1)[2:].mul_(3.0)
        held.add_(0.0)
        return [whole + base.exp(), part + base[1:].sin(), untouched + held.cos()]

    both(function, torch.tensor([0.1, 0.3, 0.2]))


def test_inputs_that_overlap():
    memory = torch.tensor([1.0, 2.0, 3.0])

    def function(x, y):
        before = x.exp()
        y.add_(1.0)  # also x
        return [before, x.exp()]

    recording = record(function, [memory[:2], memory[1:]])[1]
    x, y = torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4])
    torch.testing.assert_close(play(recording, x, y), (x.exp(), x.exp()))  # apart
    memory = torch.tensor([0.1, 0.2, 0.3])
    after = torch.tensor([0.1, 1.2]).exp()
    torch.testing.assert_close(play(recording, memory[:2], memory[1:])[1], after)


def test_equal_draws_are_two_draws():
    def function(x):
        return torch.rand(3) + x, torch.rand(3) + x

    _, recording = record(function, [torch.zeros(3)])
    one, other = play(recording, torch.zeros(3))
    assert not torch.equal(one, other)


def test_draws_are_those_of_the_same_stream():
    def function(x):
        unused = torch.rand(2)  # moves the stream on
        del unused
        return [x + torch.rand(3), F.dropout(x, 0.5)]

    _, recording = record(function, [torch.ones(3)])
    torch.manual_seed(4)
    expected = [tuple(function(torch.ones(3))) for _ in range(3)]
    torch.manual_seed(4)
    for values in expected:
        torch.testing.assert_close(play(recording, torch.ones(3)), values, rtol=0, atol=0)


@pytest.mark.parametrize("by_view", [False, True])
def test_tensors_that_are_written_to_are_listed(by_view):
    counter, other = torch.zeros(3), torch.ones(3)

    def function(x, y):
        (counter[1:] if by_view else counter).add_(1.0)
        y.mul_(2.0)
        return [x + counter + other]

    _, recording = record(function, [torch.zeros(3), torch.ones(3)])
    assert [id(tensor) for tensor in recording.written] == [id(counter)]
    assert recording.written_inputs == [1]
    before = counter.clone()
    play(recording, torch.zeros(3), torch.ones(3))
    assert counter[1] == before[1] + 1


def test_running_statistics_are_written_to():
    norm = nn.BatchNorm1d(3)
    _, recording = record(lambda x: [norm(x)], [torch.randn(4, 3)])
    written = {id(tensor) for tensor in recording.written}
    assert written == {id(buffer) for buffer in norm.buffers()}


def test_an_error_restores_what_was_written_to():
    counter = torch.zeros(3)

    def function(x):
        counter.add_(1.0)
        x.add_(1.0)
        raise KeyError("of the function")

    x = torch.zeros(3)
    with pytest.raises(KeyError, match="of the function"):
        record(function, [x])
    assert not counter.any()
    assert not x.any()


RECURRENT = [
    lambda: nn.LSTM(4, 5),
    lambda: nn.LSTM(4, 5, num_layers=2, bidirectional=True),
    lambda: nn.LSTM(4, 5, proj_size=2, batch_first=True),
    lambda: nn.LSTM(4, 5, num_layers=2, dropout=0.5, bias=False),
    lambda: nn.GRU(4, 5, num_layers=2, bidirectional=True),
    lambda: nn.RNN(4, 5),
]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning")
@pytest.mark.parametrize("make", RECURRENT)
def test_recurrent_networks_and_their_gradients(make):
    network = make()
    parameters = list(network.parameters())

    def function(x):
        loss = network(x)[0].square().sum()
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    x = torch.randn(3, 2, 4)
    _, recording = record(function, [x])
    for _ in range(2):
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(1.1)
        x = torch.randn(3, 2, 4)
        torch.manual_seed(0)
        replayed = play(recording, x)
        torch.manual_seed(0)
        torch.testing.assert_close(replayed, tuple(function(x)))


def test_marks_of_a_profiler_are_left_out():
    def function(x):
        with torch.profiler.record_function("square"):
            return [x.square()]

    both(function, torch.ones(2))


# Reading values


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * float(x.sum()),
        lambda x: x * x.sum().item(),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x + torch.rand(3, generator=torch.Generator()),
        lambda x: x + torch.empty(3).uniform_(generator=torch.Generator()),
        lambda x: x * HELD.item(),
        lambda x: x + seeded(),
        lambda x: torch.zeros(3)[x.long()[0]].add_(x[0]),
    ],
)
def test_what_depends_on_values_is_refused(function):
    with pytest.raises(NotRecordable):
        record(function, [torch.ones(3)])


def seeded():
    state = torch.get_rng_state()
    first = torch.rand(3)
    torch.set_rng_state(state)
    return first + torch.rand(3)


HELD = torch.tensor(2.0)
X = torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.new_tensor([x[0], x[1]]),
        lambda x: x.new([x[0], x[1]]),
        lambda x: torch.Tensor([x[0], x[1]]),
        lambda x: torch.DoubleTensor([x[0], x[1]]),
        lambda x: torch.LongTensor([x[0].long()]),
        lambda x: torch.asarray([x[0], x[1]]),
        lambda x: torch.tensor(data=[x[0], x[1]]),
        lambda x: torch.from_dlpack(x),
        lambda x: torch.from_numpy(np.from_dlpack(x)),
        lambda x: torch.tensor_split(x, x[:1].long())[0],
        lambda x: x.tensor_split(x[:1].long())[0],
        lambda x: F.one_hot(x.long()),
        lambda x: torch.tensor(x.tolist()),
        lambda x: torch.tensor(x.numpy()),
    ],
)
def test_readers_are_refused(read):
    with pytest.raises(NotRecordable, match="turns a tensor into"):
        record(lambda x: [read(x) + x.sum()], [X])


def test_one_hot_is_recorded_where_classes_are_given():
    labels = torch.tensor([[0, 3], [2, 1]])

    def function(x):
        return [F.one_hot(x, 4), F.one_hot(x, num_classes=5)]

    _, recording = record(function, [labels])
    other = labels.flip(0)
    torch.testing.assert_close(play(recording, other), tuple(function(other)))
    _, conditions = recording([labels + 1])  # torch would refuse that
    assert not all(conditions)
    with pytest.raises(RuntimeError, match="smaller than num_classes"):
        record(function, [labels + 1])


@pytest.mark.parametrize(
    "at",
    [
        lambda x, i: x[i],
        lambda x, i: x[i,],
        lambda x, i: x[..., i],
        lambda x, i: x[:, i],
        lambda x, i: x[:, i, 1:],
        lambda x, i: x[..., i, :],
        lambda x, i: x[1:, ..., i, :],
        lambda x, i: x[:, 0][..., i],
        lambda x, i: x[[0, 1]],
        lambda x, i: x[i - 1],
    ],
)
def test_indices_that_are_single_numbers(at):
    x = torch.randn(2, 2, 2, requires_grad=True)

    def function(i):
        chosen = at(x, i)
        return [chosen.detach(), torch.autograd.grad(chosen.exp().sum(), x)[0]]

    _, recording = record(function, [torch.tensor(0)])
    for number in (0, 1):
        index = torch.tensor(number)
        torch.testing.assert_close(play(recording, index), tuple(function(index)))


CHECKED = {
    "argument": (lambda x: td.Normal(0.0, x, validate_args=True).scale, 1.0, -1.0),
    "value": (lambda x: td.Poisson(2.0, validate_args=True).log_prob(x), 1.0, 0.5),
    "matrix": (
        lambda x: (
            td.MultivariateNormal(torch.zeros(2), torch.eye(2) * x, validate_args=True).scale_tril
        ),
        2.0,
        -2.0,
    ),
    "of its own": (lambda x: td.Geometric(probs=x, validate_args=True).probs, 0.3, 0.0),
    "reversed": (lambda x: td.Wishart(x, torch.eye(2), validate_args=False).df, 3.0, 0.5),
}


def fails(recording, x):
    try:
        return not all(recording([x])[1])
    except RuntimeError:  # of a decomposition that follows the check
        return True


@pytest.mark.parametrize(("function", "good", "bad"), CHECKED.values(), ids=CHECKED)
def test_checks_of_distributions_are_recorded(function, good, bad):
    _, recording = record(lambda x: [function(x)], [torch.tensor(good)])
    assert recording.has_checks
    assert all(recording([torch.tensor(good)])[1])
    assert fails(recording, torch.tensor(bad))
    with pytest.raises((ValueError, RuntimeError)):
        record(lambda x: [function(x)], [torch.tensor(bad)])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: td.Normal(0.0, 1.0, validate_args=False).log_prob(x),
        lambda x: td.Normal(0.0, 1.0, validate_args=True).scale * x,  # of constants
    ],
)
def test_no_checks_where_there_is_nothing_to_check(function):
    _, recording = record(lambda x: [function(x)], [torch.zeros(())])
    assert not recording.has_checks


def test_a_check_is_computed_once():
    def function(x):
        return [td.Normal(x, 1.0, validate_args=True).log_prob(x) for _ in range(3)]

    _, recording = record(function, [torch.zeros(())])
    assert len(recording([torch.zeros(())])[1]) == 1
