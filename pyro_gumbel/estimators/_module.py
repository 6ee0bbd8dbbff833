"""The base module of estimators, baselines and schedules."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import pyro
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_UNNAMED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

STORE_PREFIX = "gradient$"  # of the names of estimators' parameters in the parameter store

# The time when each tensor of the store was first seen. Loading an estimator's state records all
# tensors in the store at that time. An estimator's own tensors have time 0.
_noticed = WeakTensorKeyDictionary()
_clock = itertools.count(1)


def note_stored() -> int:
    """Record the tensors that the store has for estimators, and return the time."""
    now = next(_clock)
    for name, stored in pyro.get_param_store().named_parameters():
        if name.startswith(STORE_PREFIX):
            _noticed.setdefault(stored, now)
    return now


def note_own(parameter: Tensor) -> None:
    """Record a tensor that an estimator puts into the store."""
    _noticed[parameter] = 0


def is_newer(stored: Tensor, module: nn.Module) -> bool:
    """Return whether a tensor entered the store after the module's values were loaded."""
    loads = [part.loaded_at for part in module.modules() if isinstance(part, StatefulModule)]
    return _noticed.get(stored, math.inf) > max(loads, default=0)


class StatefulModule(nn.Module):
    """A module whose ``repr`` is the constructor call that makes it, and that can be pickled."""

    loaded_at = 0  # when a state was last loaded, by the clock above
    has_met_site = False  # whether its parameters have a site's device and dtype; copies do not

    def __init__(self) -> None:  # torch's own takes any arguments
        super().__init__()

    def __repr__(self) -> str:
        parts = []
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            if name == "self" or parameter.kind in _UNNAMED:
                continue
            value = repr(getattr(self, name))
            keyword = parameter.kind is inspect.Parameter.KEYWORD_ONLY
            parts.append(f"{name}={value}" if keyword else value)
        return f"{type(self).__name__}({', '.join(parts)})"

    def __getstate__(self) -> Any:
        for parameter in self.parameters():
            # Pyro's weak reference cannot be pickled. Pyro makes a new one at the next use.
            parameter.__dict__.pop("unconstrained", None)
        return {name: value for name, value in vars(self).items() if name != "has_met_site"}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.loaded_at = note_stored()
