"""What a recording could not repeat: found while a step is recorded, which is undone then."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from pyro_gumbel.infer.capture.estimator_state import EstimatorState
from pyro_gumbel.infer.not_recordable import NotRecordable

__all__ = ["check_hooks", "laid_out", "undone_on_failure", "warn_of_other_leaves"]


def laid_out(
    parameters: Iterable[Tensor], gradients: Iterable[Tensor | None]
) -> list[Tensor | None]:
    """Lay gradients out as their parameters, as optimisers expect, and each in its own memory."""
    taken: set[int] = set()
    found: list[Tensor | None] = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            if gradient.layout != torch.strided:
                raise NotRecordable(
                    "a gradient is sparse; write sparse=False, nn.Embedding(..., sparse=False)."
                )
            memory = gradient.untyped_storage().data_ptr()
            if memory in taken or gradient.stride() != parameter.stride():
                gradient = torch.empty_like(parameter).copy_(gradient)
            taken.add(memory)
        found.append(gradient)
    return found


def check_hooks(leaves: Iterable[Tensor]) -> None:
    """Refuse hooks that a replay would not run."""
    if any(getattr(leaf, "_post_accumulate_grad_hooks", None) for leaf in leaves):
        raise NotRecordable(
            "a parameter has a hook that runs after its gradient was added, and gradients of a "
            "recording are not added; use register_hook."
        )


def warn_of_other_leaves(surrogate: Tensor, others: Iterable[Tensor]) -> None:
    """Tell of a tensor that would get a gradient from an eager step and is not Pyro's."""
    # While a step is recorded, arguments are views of those given.
    sources = [other if other._base is None else other._base for other in others]
    wanted = {get_gradient_edge(source).node: source for source in sources if source.requires_grad}
    seen: set[Any] = set()
    waiting = [surrogate.grad_fn] if wanted else []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in wanted:
            warnings.warn(
                f"CapturedSVI: a tensor of shape {tuple(wanted[node].shape)} takes part with a "
                "gradient and is no parameter of Pyro's; recorded steps leave its .grad alone. "
                "To train it, show it to pyro.param or its module to pyro.module; else detach it "
                "or set requires_grad_(False).",
                stacklevel=2,
            )
            return
        waiting.extend(following for following, _ in node.next_functions)


def _python_generators() -> tuple[Any, ...]:
    name, words, *rest = np.random.get_state()
    return random.getstate(), (name, bytes(words), *rest)  # type: ignore[arg-type]


@contextmanager
def undone_on_failure(state: EstimatorState, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Refuse what changes out of a recording's sight, and put back what a refused step changed."""
    kept, numbers, places = state.tensors(), state.numbers(), state.places()
    generators, python = pyro.util.get_rng_state(), _python_generators()
    buffers = [(m, name, b) for m in modules for name, b in m._buffers.items() if b is not None]
    values = [buffer.clone() for _, _, buffer in buffers]
    try:
        yield
        if _python_generators() != python:
            raise NotRecordable(
                "the program draws from Python's or NumPy's generator; draw with torch."
            )
        if state.numbers() != numbers or state.places() != places:
            raise NotRecordable(
                "an estimator counts or keeps numbers in get_extra_state; keep tensors."
            )
        replaced = [name for m, name, buffer in buffers if m._buffers.get(name) is not buffer]
        if replaced:
            raise NotRecordable(
                f"the program puts other tensors in place of the buffers {replaced}; write to "
                "them, buffer.copy_(...)."
            )
    except BaseException:
        state.put(kept)
        pyro.util.set_rng_state(generators)
        with torch.no_grad():
            for (module, name, buffer), value in zip(buffers, values, strict=True):
                module._buffers[name] = buffer.copy_(value)
        raise
