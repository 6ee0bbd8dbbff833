"""Save a training run as data, and resume it."""

from __future__ import annotations

import io
import os
import pickle
import reprlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from torch import Tensor, nn

from pyro_gumbel.estimators._module import STORE_PREFIX, StatefulModule
from pyro_gumbel.estimators.registry import NamedEstimators
from pyro_gumbel.infer._processes import gather, num_processes, rank
from pyro_gumbel.infer._state import (
    constraint_data,
    constraint_of,
    generator_states,
    held_objects,
    set_generator_states,
)
from pyro_gumbel.infer.captured_svi import CapturedSVI
from pyro_gumbel.infer.distributed import DistributedSVI

__all__ = ["load_checkpoint", "save_checkpoint"]

_FORMAT = "pyro_gumbel checkpoint"
_VERSION = 1
_NOT_DATA = (pickle.PickleError, AttributeError, TypeError)


def save_checkpoint(path: str | os.PathLike[str], svi: SVI, **more: Any) -> None:
    """Save all that the next steps of an ``SVI`` depend on.

    * The parameter store with its constraints, and the optimiser with learning rate schedulers.
    * Modules, estimators and baselines that the model, the guide or the loss holds: as the object
      itself or that of a method, in a closure, or as a global that a function names. Their
      buffers, schedules and moving averages are included.
    * The generators of torch (CPU and CUDA), NumPy and Python.

    The file holds data and no code: ``torch.load(path, weights_only=True)`` reads it. It is
    complete at any time, since a new one is written beside it and then takes its place.

    For :class:`~pyro_gumbel.infer.DistributedSVI` every process calls this function, since each
    has its own generators. The first process writes.

    Args:
        path: The file. An existing one is replaced.
        svi: An ``SVI``, :class:`~pyro_gumbel.infer.CapturedSVI` or
            :class:`~pyro_gumbel.infer.DistributedSVI`.
        **more: Other data to keep, such as the step: numbers, strings, tensors, and lists, tuples
            and dicts of them. Of an object with ``state_dict`` its state is kept.

    Raises:
        TypeError: If ``svi`` has another type, or a value is not data.
        ValueError: If a trained parameter's module cannot be found, or a constraint is a class
            outside of torch and Pyro.
        OSError: If the file cannot be written. The old file is then unchanged.

    Example:
        >>> import tempfile
        >>> from pyro_gumbel.infer import Estimator_ELBO
        >>> def model():
        ...     pyro.sample("z", dist.Bernoulli(0.3))
        >>> def guide():
        ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.0))))
        >>> def start():
        ...     pyro.clear_param_store()
        ...     return SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Estimator_ELBO())
        >>> path, svi = Path(tempfile.mkdtemp()) / "run.pt", start()
        >>> save_checkpoint(path, svi, step=0)
        >>> following = svi.step()
        >>> svi = start()  # as a new process would
        >>> load_checkpoint(path, svi), svi.step() == following
        ({'step': 0}, True)
    """
    path = Path(path)
    modules = _modules("save_checkpoint", svi)
    names, ties = _names(modules)
    _check_found(svi, names, ties)
    stored = pyro.get_param_store().get_state()
    own: dict[str, Any] = {"generators": _encode_generators(generator_states()), "streams": None}
    if isinstance(svi, DistributedSVI) and svi.streams is not None:
        own["streams"] = [_encode_generators(svi.streams[0]), svi.streams[1]]
    is_split = isinstance(svi, DistributedSVI)
    state = {
        "format": _FORMAT,
        "version": _VERSION,
        "params": {n: p.detach() for n, p in stored["params"].items() if n not in ties},
        "constraints": {n: constraint_data(c) for n, c in stored["constraints"].items()},
        "modules": {place: module.state_dict() for place, module in modules.items()},
        "ties": ties,
        "optimizer": _optimizer_state(svi, names),
        "processes": gather(own) if is_split else [own],
        "more": {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in more.items()},
    }
    failure: Exception | None = None
    try:
        if rank() == 0 or not is_split:
            _write(path, state)
    except Exception as error:  # raised in every process
        failure = error
    failure = gather(failure)[0] if is_split else failure
    if failure is not None:
        raise failure


def load_checkpoint(path: str | os.PathLike[str], svi: SVI | None = None) -> dict[str, Any]:
    """Restore what :func:`save_checkpoint` saved, so that steps continue bit for bit.

    Make the programs and the ``SVI`` as for the first start, then call this function. A guide that
    makes its parameters at its first call, such as Pyro's autoguides, must be called once before.
    Tensors go to the kind of device that they were on if there is one, else to the CPU; those of
    modules go to the module's. Parameters that the file does not have stay.

    For :class:`~pyro_gumbel.infer.DistributedSVI` every process calls this function. With another
    number of processes than saved, each draws from a new stream.

    Args:
        path: The file.
        svi: An ``SVI`` of the same programs and the same kind of optimiser. Without one only
            ``more`` is read.

    Returns:
        The values ``more`` that were saved.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If ``svi`` has another type.
        ValueError: If the file is not a complete checkpoint, is of a later version, or does not
            fit ``svi``. The file is left as it is.
    """
    path = Path(path)
    state = _read(path)
    if svi is None:
        return state["more"]
    modules = _load_modules(path, svi, state["modules"])
    _load_store(state, modules)
    _load_optimizer(path, svi, state["optimizer"], _names(modules)[0])
    own = state["processes"][0]
    if isinstance(svi, CapturedSVI):
        svi.reset()  # recordings know the tensors of before, some by their ids
    if isinstance(svi, DistributedSVI) and len(state["processes"]) == num_processes():
        own = state["processes"][rank()]
        if own["streams"] is not None:
            svi.streams = _decode_generators(own["streams"][0]), own["streams"][1]
    set_generator_states(_decode_generators(own["generators"]))
    return state["more"]


# Modules


def _held(svi: SVI, *kinds: type) -> dict[str, Any]:
    loss = getattr(svi, "elbo", getattr(svi.loss, "__self__", svi.loss))
    programs = {"model": svi.model, "guide": svi.guide, "loss": loss}
    return held_objects(programs | {"loss_and_grads": svi.loss_and_grads}, kinds)


def _modules(caller: str, svi: Any) -> dict[str, nn.Module]:
    if not isinstance(svi, SVI):
        raise TypeError(
            f"{caller}: expected an SVI, got {type(svi).__name__}. In a loop of your own write "
            "torch.save({'loss': loss.state_dict(), 'optimizer': optimizer.state_dict()}, path) "
            "with loss = Estimator_ELBO()(model, guide)."
        )
    return _held(svi, nn.Module)


def _names(modules: Mapping[str, nn.Module]) -> tuple[dict[Tensor, str], dict[str, list[str]]]:
    """Name each parameter, and find those of the store that are modules' by path and name."""
    places: dict[Tensor, list[str]] = {
        parameter: [path, name]
        for path, module in reversed([*modules.items()])
        for name, parameter in module.named_parameters()
    }
    names = {parameter: ":".join(place) for parameter, place in places.items()}
    stored = dict(pyro.get_param_store().named_parameters())
    names |= {parameter: name for name, parameter in stored.items()}
    ties = {name: places[value] for name, value in stored.items() if value in places}
    return names, ties


def _check_found(svi: SVI, names: Mapping[Tensor, str], ties: Mapping[str, Any]) -> None:
    for name in sorted(names.get(parameter, "") for parameter in svi.optim.optim_objs):
        if "$$$" in name and name not in ties and not name.startswith(STORE_PREFIX):
            raise ValueError(
                f"save_checkpoint: the parameter {name!r} belongs to a module that is neither an "
                "object of the model or the guide, nor a variable of their functions. Make it an "
                "attribute of the object whose methods are the programs."
            )


def _load_modules(path: Path, svi: SVI, saved: Mapping[str, Any]) -> dict[str, nn.Module]:
    missing = saved.keys() - _modules("load_checkpoint", svi).keys()
    for place, holder in _held(svi, NamedEstimators).items():
        for name in [name for name in missing if name.startswith(f"{place}.")]:
            holder[name.removeprefix(f"{place}.")]  # makes it
    modules = _held(svi, nn.Module)
    if modules.keys() != saved.keys():
        raise ValueError(
            f"The checkpoint {path} does not fit: it has the modules {sorted(saved)}, and model, "
            f"guide and loss hold {sorted(modules)}. Make the same programs as when it was saved."
        )
    for place, module in modules.items():
        for part_name, part in module.named_modules():
            if isinstance(part, StatefulModule):
                _adopt_kind(part, saved[place], f"{part_name}." if part_name else "")
        try:
            module.load_state_dict(saved[place])
        except RuntimeError as error:
            reason = " ".join(str(error).split()).rstrip(". ")
            raise ValueError(
                f"The checkpoint {path} does not fit {place}: {reason}. A module that makes its "
                "parameters at its first call, such as an autoguide, must be called once before "
                "load_checkpoint."
            ) from error
    return modules


def _adopt_kind(module: nn.Module, saved: Mapping[str, Any], prefix: str) -> None:
    """Give an estimator's tensors the dtype and device that its site gave them."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if f"{prefix}{name}" in saved:
            tensor.data = tensor.data.to(saved[f"{prefix}{name}"])


# The parameter store


def _load_store(state: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> None:
    store = pyro.get_param_store()
    present = dict(store.named_parameters())
    params: dict[str, Tensor] = {}
    for name, value in state["params"].items():
        old = present.get(name, value)
        fits = (old.shape, old.dtype) == (value.shape, value.dtype)
        params[name] = old if fits else value
        params[name].data.copy_(value)
        params[name].requires_grad_()
    for name, (place, parameter) in state["ties"].items():
        params[name] = modules[place].get_parameter(parameter)
    for name, value in params.items():
        if present.get(name, value) is not value:
            del store[name]
    constraints = {name: constraint_of(data) for name, data in state["constraints"].items()}
    store.set_state({"params": params, "constraints": constraints})


# The optimiser


def _optimizer_state(svi: SVI, names: Mapping[Tensor, str]) -> dict[str, Any]:
    states = {}
    for parameter, optimizer in svi.optim.optim_objs.items():
        inner = getattr(optimizer, "optimizer", optimizer)
        if parameter in names:  # else it has left the store
            states[names[parameter]] = {
                "kinds": [type(optimizer).__name__, type(inner).__name__],
                "scheduler": None if optimizer is inner else optimizer.state_dict(),
                "optimizer": inner.state_dict(),
                # The next step takes zeros for a gradient, and None for none.
                "has_grad": parameter.grad is not None,
            }
    return states


def _load_optimizer(
    path: Path, svi: SVI, saved: Mapping[str, Any], names: Mapping[Tensor, str]
) -> None:
    parameters = {name: parameter for parameter, name in names.items()}
    for name, state in saved.items():
        parameter = parameters[name]
        parameter.grad = None
        if parameter not in svi.optim.optim_objs:
            svi.optim([parameter])  # makes its optimiser; without a gradient there is no step
        optimizer = svi.optim.optim_objs[parameter]
        inner = getattr(optimizer, "optimizer", optimizer)
        kinds = [type(optimizer).__name__, type(inner).__name__]
        if kinds != state["kinds"]:
            raise ValueError(
                f"The checkpoint {path} has the optimiser {state['kinds'][0]} of "
                f"{state['kinds'][1]}, and the optimiser here is {kinds[0]} of {kinds[1]}."
            )
        if optimizer is not inner:
            optimizer.load_state_dict(state["scheduler"])
        inner.load_state_dict(state["optimizer"])
        if state["has_grad"]:
            parameter.grad = torch.zeros_like(parameter)


# Generators


def _encode_generators(states: tuple[dict[str, Any], list[Tensor]]) -> dict[str, Any]:
    own, cuda = states
    name, words, *rest = own["numpy"]
    return {**own, "numpy": [name, words.tolist(), *rest], "cuda": cuda}


def _decode_generators(state: Mapping[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    own = {**state, "numpy": tuple(state["numpy"])}
    return own, own.pop("cuda")[: torch.cuda.device_count()]


# The file


def _write(path: Path, state: dict[str, Any]) -> None:
    """Replace a file by one with ``state``, at once."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        torch.load(partial, map_location="cpu", weights_only=True, mmap=True)
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, _NOT_DATA):
            for name, value in {**state["more"], **state["modules"]}.items():
                _check_data(name, value)
        raise
    if os.name == "posix":  # keeps the new name if the power fails
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def _check_data(name: str, value: Any) -> None:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except _NOT_DATA as error:
        raise TypeError(
            f"save_checkpoint: {name} holds an object that is not data, got "
            f"{reprlib.repr(value)}. Give numbers, strings, tensors, and lists, tuples and dicts "
            "of them; for an array write torch.as_tensor(array)."
        ) from error


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"The checkpoint {path} does not exist.")
    if path.is_dir():
        file = path / "run.pt"
        raise ValueError(f"The checkpoint {path} is a folder; give a file, such as {file}.")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch.load does not compare the checksums
                raise zipfile.BadZipFile("a checksum differs")
        # weights_only: a file must not execute code.
        state = torch.load(path, map_location=_on_own_kind, weights_only=True)
    except Exception as error:
        if isinstance(error, PermissionError):
            raise
        raise ValueError(
            f"{path} is not a complete checkpoint ({type(error).__name__}). Give another file, or "
            "remove it to start anew."
        ) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"{path} was not written by save_checkpoint; give another file.")
    if state["version"] > _VERSION:
        raise ValueError(
            f"The checkpoint {path} has version {state['version']} of the format, and this "
            f"version of pyro_gumbel reads {_VERSION}. Install a later one."
        )
    return state


def _on_own_kind(storage: Any, place: str) -> Any:
    """Put what was on a GPU on the current one, if there is one."""
    return storage.cuda() if place.startswith("cuda") and torch.cuda.is_available() else storage
