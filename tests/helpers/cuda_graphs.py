"""A stand-in for CUDA graphs that runs on a CPU."""

from __future__ import annotations

import contextlib
from unittest.mock import patch

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Graph:
    """Keeps operations with the tensors that they were given and gave, as a CUDA graph does."""

    def __init__(self):
        self.launched = []

    def replay(self):
        for func, args, kwargs, result in self.launched:
            new = pytree.tree_leaves(func(*args, **kwargs))
            for old, value in zip(pytree.tree_leaves(result), new, strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != value.data_ptr():
                    old.copy_(value)


class Capture(TorchDispatchMode):
    """Hands operations to a graph; what they changed and drew is put back, as if not run."""

    def __init__(self, graph, watched):
        super().__init__()
        self.graph, self.watched = graph, watched

    def __enter__(self):
        self.kept = [tensor.detach().clone() for tensor in self.watched]
        self.generator = torch.get_rng_state()
        return super().__enter__()

    def __exit__(self, *args):
        super().__exit__(*args)
        torch.set_rng_state(self.generator)
        with torch.no_grad():
            for tensor, value in zip(self.watched, self.kept, strict=True):
                tensor.copy_(value)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.graph.launched.append((func, args, kwargs or {}, result))
        return result


class Stream:
    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


@contextlib.contextmanager
def cuda_graphs_on_the_cpu():
    """Put the stand-in in CUDA's place; the list is of what captures must not change."""
    tensors: list[torch.Tensor] = []
    stand_ins = {
        "CUDAGraph": Graph,
        "graph": lambda graph, capture_error_mode: Capture(graph, tensors),
        "Stream": Stream,
        "current_stream": Stream,
        "stream": contextlib.nullcontext,
        "device": contextlib.nullcontext,
    }
    with patch.multiple(torch.cuda, **stand_ins):
        yield tensors
