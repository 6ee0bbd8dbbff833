"""Gradient estimators for discrete latent variables in Pyro, chosen site by site.

* :mod:`pyro_gumbel.distributions`: what is drawn (Gumbel, one-hot and relaxed distributions).
* :mod:`pyro_gumbel.estimators`: how a gradient passes a site that has none of its own.
* :mod:`pyro_gumbel.infer`: which site gets which estimator, and the ELBO that asks them.
* :mod:`pyro_gumbel.guides`: guides that write themselves for discrete latents.
* :mod:`pyro_gumbel.diagnostics`: what an estimator costs and buys on your own model.
"""

from __future__ import annotations

from pyro_gumbel import diagnostics, distributions, estimators, guides, infer

__all__ = ["__version__", "diagnostics", "distributions", "estimators", "guides", "infer"]

__version__ = "0.1.0"
