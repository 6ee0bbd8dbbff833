"""The base of estimators, baselines and schedules: a module to rebuild, pickle and load."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import pyro
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["STORE_PREFIX", "StatefulModule", "is_newer", "note_own", "note_stored"]

_UNNAMED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

STORE_PREFIX = "gradient$"  # of the names that estimators' parameters have in the parameter store

# When each tensor of the store was first noticed: a load of an estimator notices all that are
# there, an estimator's own are as old as can be, and others are unknown until then.
_noticed = WeakTensorKeyDictionary()
_clock = itertools.count(1)


def note_stored() -> int:
    """Notice the tensors that the store has for estimators, and return the time."""
    now = next(_clock)
    for name, stored in pyro.get_param_store()._params.items():
        if name.startswith(STORE_PREFIX):
            _noticed.setdefault(stored, now)
    return now


def note_own(parameter: Tensor) -> None:
    """Notice a tensor that an estimator itself puts into the store."""
    _noticed[parameter] = 0


def is_newer(stored: Tensor, module: nn.Module) -> bool:
    """Return whether a tensor came into the store after the values that a module has."""
    loads = [part.loaded_at for part in module.modules() if isinstance(part, StatefulModule)]
    return _noticed.get(stored, math.inf) > max(loads, default=0)


class StatefulModule(nn.Module):
    """A module whose ``repr`` is the constructor call that makes it.

    It pickles after Pyro has trained it, and knows whether a state was loaded into it.

    Attributes:
        loaded_at: When a state was last loaded, by a clock of this process; 0 if never.
        has_met_site: Whether its parameters are on the device, and of the dtype, of a site. A copy
            may go elsewhere, and has to meet its own.
    """

    loaded_at = 0
    has_met_site = False

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
            # Pyro leaves a weak reference there, which cannot be pickled; it puts another when
            # the parameter is next used.
            parameter.__dict__.pop("unconstrained", None)
        return {name: value for name, value in vars(self).items() if name != "has_met_site"}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.loaded_at = note_stored()
