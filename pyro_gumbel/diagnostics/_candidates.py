"""Which estimators are worth a trial at which sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample

from pyro_gumbel.distributions.families import unwrap
from pyro_gumbel.estimators import Call, Estimator, LeaveOneOut, MovingAverage, Pathwise, Score
from pyro_gumbel.estimators.registry import CLASSES

__all__ = ["Candidate", "candidates_for", "latent_distributions", "swap"]


@dataclass(frozen=True)
class Candidate:
    """An estimator for each site, and the particles that they need."""

    label: str
    config: dict[str, Estimator]
    num_particles: int

    @property
    def exact(self) -> bool:
        """Whether every site is summed out."""
        return all(estimator.enumerates for estimator in self.config.values())

    @property
    def unbiased(self) -> bool:
        """Whether every estimator says that it is."""
        return all(estimator.unbiased for estimator in self.config.values())

    @property
    def has_history(self) -> bool:
        """Whether a baseline is an average over the steps before."""
        return any(
            isinstance(getattr(estimator, "baseline", None), MovingAverage)
            for estimator in self.config.values()
        )

    @property
    def key(self) -> str:
        """Equal for candidates that do the same."""
        return f"{self.num_particles} {self.config!r}"


@torch.no_grad()
def latent_distributions(call: Call) -> dict[str, Any]:
    """The distribution of each latent site of the guide.

    Raises:
        ValueError: If there is none.
    """
    trace = poutine.trace(call.guide).get_trace(*call.args, **call.kwargs)
    sites = {
        name: unwrap(site["fn"])
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    }
    if not sites:
        raise ValueError("recommend: the guide has no latent site, so there is nothing to choose.")
    return sites


def candidates_for(
    sites: Mapping[str, Any], estimators: Mapping[str, Any] | None, num_particles: int | None
) -> list[Candidate]:
    """Make a candidate of each estimator: it serves the sites that it can, a default the others.

    Raises:
        TypeError: If ``estimators`` is no dict of estimators.
        ValueError: If none of them can serve any site.
    """
    named = _estimators() if estimators is None else _check(estimators)
    found: dict[str, Candidate] = {}
    for label, (estimator, particles) in named.items():
        if not any(estimator.supports(fn) for fn in sites.values()):
            continue
        config = {
            name: estimator if estimator.supports(fn) else _default(fn)
            for name, fn in sites.items()
        }
        needed = max([particles, *(choice.min_particles for choice in config.values())])
        if num_particles is not None:
            if num_particles < max(choice.min_particles for choice in config.values()):
                continue
            needed = num_particles
        candidate = Candidate(label, config, needed)
        found.setdefault(candidate.key, candidate)
    if not found:
        raise ValueError(f"recommend: no candidate of {list(named)} can serve a site.")
    return list(found.values())


def _estimators() -> dict[str, tuple[Estimator, int]]:
    named: dict[str, tuple[Estimator, int]] = {name: (kind(), 1) for name, kind in CLASSES.items()}
    named["sticking_the_landing"] = (Pathwise(sticking_the_landing=True), 1)
    named["moving_average"] = (Score(MovingAverage()), 1)
    named["leave_one_out_2"] = (Score(LeaveOneOut()), 2)
    named["leave_one_out_4"] = (Score(LeaveOneOut()), 4)
    return named


def _check(estimators: Mapping[str, Any]) -> dict[str, tuple[Estimator, int]]:
    if not isinstance(estimators, Mapping):
        raise TypeError(
            "recommend: candidates must be a dict of labels, such as candidates={'reinmax': "
            f"ReinMax()}}; got {estimators!r}."
        )
    for label, estimator in estimators.items():
        if not isinstance(estimator, Estimator):
            raise TypeError(
                f"recommend: candidates[{label!r}] must be an estimator such as ReinMax(); got "
                f"{estimator!r}."
            )
    return {label: (own, own.min_particles) for label, own in estimators.items()}


def _default(fn: Any) -> Estimator:
    return Pathwise() if fn.has_rsample else Score(MovingAverage())


def swap(candidate: Candidate, site: str, other: Candidate) -> Candidate:
    """Take the estimator of one site from another candidate."""
    config = {**candidate.config, site: other.config[site]}
    return Candidate(
        f"{candidate.label}, {site}: {other.label}",
        config,
        max(candidate.num_particles, other.config[site].min_particles),
    )
