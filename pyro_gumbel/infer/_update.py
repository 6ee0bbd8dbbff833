"""The optimiser's part of a recorded step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor

from pyro_gumbel.infer._cuda_graph import GraphedFunction

__all__ = ["GraphedUpdate", "Updater"]

_CALLS = (PyroOptim.__call__, PyroLRScheduler.__call__)
# ASGD is not among them: its multi-tensor form rounds to float32.
_MULTI_TENSOR = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.SGD,
)


class Updater:
    """Hands gradients to a Pyro optimiser and leaves zeros in ``.grad``, as ``SVI`` does.

    ``SVI`` makes zeros anew at each step and adds the gradients to them. Here the gradients take
    the place of zeros that nobody has written to. What somebody has, the user or another ``SVI``,
    counts as it does there.
    """

    def __init__(self) -> None:
        self._zeros: dict[Tensor, tuple[Tensor, int]] = {}
        self._joint: dict[Any, torch.optim.Optimizer] = {}

    def clear(self) -> None:
        """Let go of the parameters."""
        self._zeros.clear()
        self._joint.clear()

    def __call__(
        self,
        optim: PyroOptim,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
    ) -> None:
        """Take a step of the optimiser; gradients beyond the parameters' are left alone."""
        for parameter, gradient in zip(parameters, gradients, strict=False):
            left = parameter.grad
            if gradient is None and left is not None:
                # A copy, for optimisers write to gradients by .data, which no version counts.
                parameter.grad = left.clone()
            elif left is None or gradient is None or self.is_resting(parameter):
                parameter.grad = gradient
            else:
                parameter.grad = left + gradient
        self._step(optim, parameters)
        self.lay_down(parameters)

    def _step(self, optim: PyroOptim, parameters: Sequence[Tensor]) -> None:
        """Call ``optim``, with one torch optimiser for all parameters of the same options.

        Pyro makes one torch optimiser for each parameter. Theirs are the options and the state;
        torch's multi-tensor step of them all gives the same numbers up to rounding.
        """
        groups: dict[Any, list[Tensor]] = {}
        for parameter in parameters:
            groups.setdefault(_joint_options(optim, parameter), []).append(parameter)
        if None in groups:
            optim(groups.pop(None))
        for (kind, options), group in groups.items():
            joint = self._joint.get((kind, *group))
            if joint is None:
                joint = self._joint[kind, *group] = kind(group, lr=1.0)
            joint.param_groups[0].update(options)
            for parameter in group:
                state = _torchs(optim, parameter).state
                if parameter in state:
                    joint.state[parameter] = state[parameter]
                if optim.grad_clip[parameter] is not None:
                    optim.grad_clip[parameter](parameter)
            joint.step()

    def is_resting(self, parameter: Tensor) -> bool:
        """Return whether ``.grad`` is as it was left."""
        zeros, version = self._zeros.get(parameter, (None, 0))
        gradient = parameter.grad
        return gradient is None or (gradient is zeros and gradient._version == version)

    def lay_down(self, parameters: Iterable[Tensor]) -> None:
        """Leave zeros where there is a gradient."""
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is not None:
                zeros, version = self._zeros.get(parameter, (gradient, -1))
                same = zeros.shape == gradient.shape and zeros.dtype == gradient.dtype
                if zeros._version != version or not same or zeros.device != gradient.device:
                    zeros = torch.zeros_like(gradient)
                    self._zeros[parameter] = (zeros, zeros._version)
                parameter.grad = zeros


class GraphedUpdate:
    """A step of an optimiser, with the gradients of a CUDA graph, as another one.

    Args:
        updater: Takes the step.
        optim: The optimiser.
        parameters: The parameters.
        gradients: Their gradients.
    """

    def __init__(
        self,
        updater: Updater,
        optim: PyroOptim,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
    ) -> None:
        self._optim, self._gradients = optim, gradients
        self._replay = GraphedFunction(
            lambda _: updater(optim, parameters, gradients), [], parameters[0].device
        )
        self._settings = _settings(optim)

    @staticmethod
    def fits(updater: Updater, optim: PyroOptim, parameters: Sequence[Tensor]) -> bool:
        """Return whether the optimiser is made for CUDA graphs, and no gradient is added."""
        groups = [group for o in _optimizers(optim) for group in o.param_groups]
        resting = all(map(updater.is_resting, parameters))
        return resting and all(group.get("capturable") for group in groups)

    def is_current(self, optim: PyroOptim, gradients: Sequence[Tensor | None]) -> bool:
        """Return whether the optimiser has the numbers and tensors that the graph goes on with."""
        same = optim is self._optim and gradients is self._gradients
        return same and _settings(optim) == self._settings

    def __call__(self) -> None:
        self._replay([])


def _joint_options(optim: PyroOptim, parameter: Tensor) -> Any:
    """Return the class of a parameter's torch optimiser and its options in a multi-tensor step.

    Returns ``None`` where such a step may differ, or is not known to be the same.
    """
    if type(optim).__call__ not in _CALLS or parameter not in optim.optim_objs:
        return None
    optimizer = _torchs(optim, parameter)
    options = dict(optimizer.param_groups[0])
    params, kind = options.pop("params"), type(optimizer)
    foreach, fused = options.get("foreach", False), options.get("fused", False)
    is_stateless = kind is torch.optim.SGD and not options["momentum"]
    if (
        kind not in _MULTI_TENSOR
        or foreach is False
        or options.get("differentiable")
        or any(isinstance(value, (Tensor, list)) for value in options.values())
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or len(params) + len(optimizer.param_groups) != 2
        or not (is_stateless or parameter in optimizer.state)
    ):
        return None
    if foreach is None and not fused and parameter.is_cpu:  # on a GPU torch chooses foreach
        tensors = [parameter] if parameter.grad is None else [parameter, parameter.grad]
        is_plain = all(x.is_contiguous() and x.is_floating_point() for x in tensors)
        options["fused" if fused is None and is_plain else "foreach"] = True
    return kind, tuple(options.items())


def _torchs(optim: PyroOptim, parameter: Tensor) -> Any:
    """Return the torch optimiser of a parameter, out of its learning rate scheduler."""
    found = optim.optim_objs[parameter]
    return getattr(found, "optimizer", found)


def _settings(optim: PyroOptim) -> list[Any]:
    values: list[Any] = []
    for optimizer in _optimizers(optim):
        for group in optimizer.param_groups:
            values += [value for name, value in group.items() if name != "params"]
        for state in optimizer.state.values():
            values += state.values()
    return [id(value) if isinstance(value, Tensor) else value for value in values]


def _optimizers(optim: PyroOptim) -> list[Any]:
    """Torch's optimisers, out of their learning rate schedulers."""
    return [getattr(o, "optimizer", o) for o in optim.optim_objs.values()]
