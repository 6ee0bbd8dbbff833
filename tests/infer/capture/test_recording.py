"""Recordings play what was recorded, on what the inputs and held tensors are now."""

from __future__ import annotations

import pytest
import torch

from pyro_gumbel.infer.capture.recording import record
from pyro_gumbel.infer.not_recordable import NotRecordable


def both(function, *inputs):
    """Record on some inputs and hold two plays, on others, against the function itself."""
    first, recording = record(function, inputs)
    torch.testing.assert_close(first, function(*inputs))
    for scale in (2.0, -3.0):
        others = [tensor * scale for tensor in inputs]
        torch.testing.assert_close(recording(others), function(*others))
    return recording


def test_gradients():
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def function(x):
        loss = (x @ weight).relu().sum() * torch.tensor(0.3)
        return [loss.detach(), torch.autograd.grad(loss, [weight])[0]]

    recording = both(function, torch.randn(4, 3, dtype=torch.float64))
    with torch.no_grad():
        weight.mul_(2.0)  # held by reference: seen
    x = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(recording([x]), function(x))


def test_literals_that_are_changed_in_place_are_made_anew():
    def function(x):
        direct, by_view = torch.zeros(2, 3), torch.zeros(2, 3)
        direct.add_(x)
        by_view[0].add_(x[0])
        by_view.view(6)[5:].add_(1.0)
        like = torch.zeros_like(x)
        like.t().add_(1.0)
        return [direct, by_view * 2, like + x]

    both(function, torch.ones(2, 3))


def test_what_is_returned_is_the_callers():
    _, recording = record(lambda x: [x.sum(), torch.tensor(0.5).exp().expand(3)], [torch.ones(2)])
    returned = recording([torch.ones(2)])[1]
    returned.as_strided((1,), (1,)).fill_(7.0)
    torch.testing.assert_close(recording([torch.ones(2)])[1], torch.tensor(0.5).exp().expand(3))


def operations(recording, inputs):
    """Name the operations of one play."""
    with torch.profiler.profile() as profiled:
        recording(inputs)
    return [event.name for event in profiled.events() if event.name.startswith("aten::")]


# Torch 2.11 says so of every profile, though this one has a single cycle.
@pytest.mark.filterwarnings("ignore:.*Profiler clears events at the end of each cycle:UserWarning")
def test_what_is_computed_twice_is_computed_once():
    def function(x):
        return [x.exp() + x.detach().exp(), (x.exp() * 2).sum(0)]

    recording = both(function, torch.tensor([0.1, 0.3]))
    assert operations(recording, [torch.ones(2)]).count("aten::exp") == 1


def test_same_operation_on_what_has_changed_is_another():
    held = torch.zeros(3)

    def function(x):
        base = x * 2
        whole, part, untouched = base.exp(), base[1:].sin(), held.cos()
        base[0].add_(1.0)
        base.view(3, 1)[2:].mul_(3.0)
        held.add_(0.0)
        return [whole + base.exp(), part + base[1:].sin(), untouched + held.cos()]

    both(function, torch.tensor([0.1, 0.3, 0.2]))


def test_results_that_are_equal_are_not_shared():
    """Who gets them may change one in place."""
    _, recording = record(lambda x: [x.exp(), x.exp()], [torch.ones(2)])
    one, other = recording([torch.ones(2)])
    one.zero_()
    torch.testing.assert_close(other, torch.ones(2).exp())


def test_equal_draws_are_two_draws():
    def function(x):
        return torch.rand(3) + x, torch.rand(3) + x

    _, recording = record(function, [torch.zeros(3)])
    one, other = recording([torch.zeros(3)])
    assert not torch.equal(one, other)


def test_draws_are_new_and_of_the_same_stream():
    def function(x):
        unused = torch.rand(2)  # moves the stream on
        del unused
        return x + torch.rand(3)

    _, recording = record(function, [torch.zeros(3)])
    torch.manual_seed(4)
    expected = [function(torch.zeros(3)) for _ in range(3)]
    torch.manual_seed(4)
    for value in expected:
        assert torch.equal(recording([torch.zeros(3)]), value)


@pytest.mark.parametrize("by_view", [False, True])
def test_held_tensors_that_are_changed_are_found(by_view):
    counter, other = torch.zeros(3), torch.ones(3)

    def function(x):
        (counter[1:] if by_view else counter).add_(1.0)
        return x + counter + other

    _, recording = record(function, [torch.zeros(3)])
    assert [id(tensor) for tensor in recording.mutated] == [id(counter)]
    before = counter.clone()
    recording([torch.zeros(3)])
    assert counter[1] == before[1] + 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * float(x.sum()),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
    ],
    ids=["number", "branch", "mask", "nonzero"],
)
def test_what_depends_on_values_is_refused(function):
    with pytest.raises(NotRecordable):
        record(function, [torch.ones(3)])


def test_the_value_of_a_held_tensor_is_refused_too():
    scale = torch.tensor(2.0)
    with pytest.raises(NotRecordable, match="turns a tensor into a number"):
        record(lambda x: x * scale.item(), [torch.ones(3)])
