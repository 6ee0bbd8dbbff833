"""What a recording says of programs that read values, and what it does without asking for any."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental import proxy_tensor

from pyro_gumbel.infer.capture.recording import record
from pyro_gumbel.infer.not_recordable import NotRecordable

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
        lambda x: torch.nn.functional.one_hot(x.long()),
    ],
)
def test_readers_are_refused(read):
    with pytest.raises(NotRecordable, match="turns a tensor into"):
        record(lambda x: [read(x) + x.sum()], [X])


def test_one_hot_is_recorded_where_classes_are_given():
    labels = torch.tensor([[0, 3], [2, 1]])

    def function(x):
        return [torch.nn.functional.one_hot(x, 4), torch.nn.functional.one_hot(x, num_classes=5)]

    returned, recording = record(function, [labels])
    for got, classes in zip(returned, (4, 5), strict=True):
        torch.testing.assert_close(got, torch.nn.functional.one_hot(labels, classes))
    other = labels.flip(0)
    torch.testing.assert_close(recording([other]), function(other))


def test_recording_makes_no_fake_tensors(monkeypatch):
    made = []
    init = FakeTensorMode.__init__

    def counting(self, *args, **kwargs):
        made.append(self)
        init(self, *args, **kwargs)

    monkeypatch.setattr(FakeTensorMode, "__init__", counting)
    describe = proxy_tensor.extract_val
    record(lambda x: [x.exp().sum()], [X])
    assert not made
    assert proxy_tensor.extract_val is describe


def test_recording_does_with_another_torch(monkeypatch):
    if not hasattr(proxy_tensor, "extract_val"):
        pytest.skip("this torch describes results in another way")
    describe = proxy_tensor.extract_val
    monkeypatch.setattr(proxy_tensor, "set_meta", _set_meta_with(describe))
    monkeypatch.delattr(proxy_tensor, "extract_val")
    _, recording = record(lambda x: [x.exp() + 1], [X])
    torch.testing.assert_close(recording([X]), [X.exp() + 1])


def _set_meta_with(describe):
    """What notes a node's result, by a function of its own."""

    def set_meta(proxy, value):
        proxy.node.meta["val"] = describe(value)
        return proxy

    return set_meta
