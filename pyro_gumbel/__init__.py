"""Gradient estimators for discrete latent variables in Pyro, chosen site by site.

* :mod:`pyro_gumbel.distributions`: Gumbel, one-hot and relaxed distributions.
* :mod:`pyro_gumbel.estimators`: estimators of the gradient at a latent site.
* :mod:`pyro_gumbel.infer`: the choice of an estimator for each site, and the objectives.
* :mod:`pyro_gumbel.guides`: guides for discrete latents that are made from the model.
* :mod:`pyro_gumbel.diagnostics`: bias, variance and cost of estimators on a model of your own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pyro_gumbel import distributions, estimators, infer

if TYPE_CHECKING:
    from pyro_gumbel import diagnostics, guides

__all__ = ["__version__", "diagnostics", "distributions", "estimators", "guides", "infer"]

__version__ = "0.1.0"

_LOADED_WHEN_USED = ("diagnostics", "guides")


def __getattr__(name: str) -> Any:
    if name in _LOADED_WHEN_USED:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
