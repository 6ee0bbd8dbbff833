"""Automatic guides: mean-field for discrete latents, and amortised over a data plate."""

from pyro_gumbel.guides.amortized import AutoAmortized
from pyro_gumbel.guides.discrete import AutoDiscrete

__all__ = ["AutoAmortized", "AutoDiscrete"]
