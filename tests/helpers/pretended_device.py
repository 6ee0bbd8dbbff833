"""Steps on a device that only Python knows: tensors without numbers, and a real device's rules.

    python -m helpers.pretended_device looped guides

prints the outcome of each case of these groups as JSON: null, or the error. The device is
registered for the whole process, so tests run this in a process of their own. With
``STEP_DEVICE=cuda`` the same cases run on a GPU.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyro
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

PRETENDED = "pretended"
DEVICE = os.environ.get("STEP_DEVICE", PRETENDED)  # or a real one, such as "cuda"

Case = Callable[[], None]


class NoCopies(TorchDispatchMode):
    """Refuses copies between the device and the CPU, which wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            target = torch.device(kwargs.get("device") or args[0].device)
            if target.type != args[0].device.type:
                raise RuntimeError(f"copy from {args[0].device.type} to {target.type}")
        return func(*args, **kwargs)


def blank(old: Tensor) -> Tensor:
    """A tensor like another, without the number that a constant has even here."""
    return torch.empty(old.shape, dtype=old.dtype, device=old.device)


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Convert parameters as ``nn.Module`` does, which cannot change tensors without numbers."""
    for module in self.modules():
        for key, old in module._parameters.items():
            if old is not None:
                module._parameters[key] = nn.Parameter(fn(blank(old)), old.requires_grad)
        for key, old in module._buffers.items():
            if old is not None:
                module._buffers[key] = fn(blank(old))
    return self


@contextmanager
def pretended_device() -> Iterator[None]:
    """Make every tensor in this block one without numbers, unless the device is a real one."""
    if DEVICE != PRETENDED:
        yield
        return
    backend_registration._setup_privateuseone_for_python_backend(DEVICE)
    one_thread = torch.autograd.set_multithreading_enabled(False)
    with one_thread, FakeTensorMode(), patch.object(nn.Module, "_apply", _apply):
        yield


@contextmanager
def first_step() -> Iterator[None]:
    """Allow the comparison of numbers in the first step of two programs."""
    if DEVICE == PRETENDED:
        with patch.object(torch, "allclose", lambda *args, **options: True):
            yield
    else:
        yield


@contextmanager
def no_waiting() -> Iterator[None]:
    """Refuse what waits for the device."""
    if DEVICE != "cuda":
        with NoCopies():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def take_steps(step: Callable[[], Tensor], modules: Callable[[], list[nn.Module]]) -> None:
    """Take steps; afterwards every parameter must have a gradient on the device.

    The first step of two programs may compare numbers once. Later steps may read none.
    """
    with first_step():
        step().backward()
    with no_waiting():
        loss = step()
        loss.backward()
    if loss.device.type != DEVICE:
        raise AssertionError(f"the loss is on {loss.device}")
    parameters = {
        f"{type(module).__name__}.{name}": parameter
        for module in modules()
        for name, parameter in module.named_parameters()
    }
    parameters |= dict(pyro.get_param_store().named_parameters())
    for name, parameter in parameters.items():
        if parameter.device.type != DEVICE:
            raise AssertionError(f"{name} is on {parameter.device}")
        if parameter.requires_grad and parameter.grad is None:
            raise AssertionError(f"{name} has no gradient")


def outcome(case: Case) -> str | None:
    """Run a case; return its error, if any."""
    pyro.clear_param_store()
    try:
        case()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "pyro_gumbel/" in f.filename or "helpers" in f.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        return f"{type(error).__name__} at {where}: {str(error).strip()[:80]}"
    return None


def main(groups: list[str]) -> None:
    from helpers import pretended_cases, pretended_estimators

    made = vars(pretended_cases) | vars(pretended_estimators)
    pyro.enable_validation(False)
    found = {}
    with pretended_device():
        for group in groups:
            cases: dict[str, Case] = made[group]()
            found[group] = {name: outcome(case) for name, case in cases.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
