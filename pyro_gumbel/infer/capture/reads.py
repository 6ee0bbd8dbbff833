"""Values that a program reads from tensors, which a recording could only repeat: refused."""

from __future__ import annotations

import linecache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_gumbel.infer.capture.modules import is_users
from pyro_gumbel.infer.not_recordable import NotRecordable

__all__ = ["RefuseReads", "RefuseValues", "users_line"]

_READERS = (
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__dlpack__,
    # These two end in an operation, but in torch.Tensor([x[0], x[1]]) they do not.
    Tensor.__float__,
    Tensor.__index__,
)
_MAKERS = (
    torch.tensor,
    torch.as_tensor,
    torch.asarray,
    torch.sparse_coo_tensor,
    Tensor.new,
    Tensor.new_tensor,
)
_SPLITTERS = (torch.tensor_split, Tensor.tensor_split)


class RefuseReads(TorchFunctionMode):
    """Refuses what hands the numbers of tensors to Python without an operation.

    Memory that is read behind torch's back is out of sight: ``untyped_storage()``, ``data_ptr()``
    and ``torch.utils.dlpack.to_dlpack``.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = (*args, *kwargs.values())
        if (
            func in _READERS
            or (func in _MAKERS and any(map(_holds_tensor, given)))
            or (func in _SPLITTERS and any(isinstance(other, Tensor) for other in given[1:]))
        ):
            raise NotRecordable(
                f"the program turns a tensor into numbers ({func.__name__}): a recorded step "
                "would repeat this step's outcome for ever. Of a constant, do it outside."
            )
        if func is torch.nn.functional.one_hot:
            return _one_hot(*args, **kwargs)
        return func(*args, **kwargs)


class RefuseValues(TorchDispatchMode):
    """Refuses operations whose outcome the recording could only repeat, not compute."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = torch.Tag.data_dependent_output in func.tags
        sizes = torch.Tag.dynamic_output_shape in func.tags
        if func is torch.ops.aten.index.Tensor:  # dynamic only where a mask selects
            sizes = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if reads or sizes:
            what = "turns a tensor into a number" if reads else "selects by a tensor's values"
            raise NotRecordable(
                f"the program {what} ({func}): a recorded step would repeat this step's outcome "
                "for ever."
            )
        return func(*args, **(kwargs or {}))


def users_line(error: BaseException) -> str | None:
    """The user's line that an error came from: the last one outside torch, Pyro and the like."""
    found = None
    trace = error.__traceback__
    while trace is not None:
        if is_users(trace.tb_frame.f_globals.get("__name__")):
            found = trace
        trace = trace.tb_next
    if found is None:
        return None
    file, line = found.tb_frame.f_code.co_filename, found.tb_lineno
    text = linecache.getline(file, line, found.tb_frame.f_globals).strip()
    return f"Line {line} of {file}" + (f": {text}" if text else "")


def _holds_tensor(data: Any) -> bool:
    return isinstance(data, (list, tuple)) and any(
        isinstance(part, Tensor) or _holds_tensor(part) for part in data
    )


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """``one_hot`` without its look at the smallest and the largest value."""
    if num_classes <= 0 or tensor.dtype != torch.int64:
        return torch.nn.functional.one_hot(tensor, num_classes)
    classes = torch.arange(num_classes, device=tensor.device)
    return (tensor.unsqueeze(-1) == classes).long()
