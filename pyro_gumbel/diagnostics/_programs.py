"""One run of guide and model at given values: the terms of the ELBO, each with its plates."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyro
from pyro import poutine
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_gumbel.distributions.families import event_dims, log_mass, unwrap, wrap_score
from pyro_gumbel.estimators import Call

__all__ = ["Evaluation", "Given", "Term", "evaluate", "plates_of"]

_ROWS = "diagnostic_rows"


@dataclass(frozen=True)
class Term:
    """A term of the ELBO, scaled and masked, of its site's batch shape, and its plates."""

    name: str
    value: Tensor
    plates: frozenset[CondIndepStackFrame]


@dataclass(frozen=True)
class Evaluation:
    """The result of one run.

    Attributes:
        terms: ``log p`` and ``-log q`` of every site.
        log_probs: For each latent site of the guide the log-probability of its value, neither
            scaled nor masked: the law that values are drawn from.
        sites: The guide's latent sites.
    """

    terms: list[Term]
    log_probs: dict[str, Tensor]
    sites: dict[str, Any]


class Given(Messenger):
    """Sets the values of latent sites of the guide, and the minibatch of plates."""

    def __init__(self, values: Mapping[str, Tensor], subsamples: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.subsamples = subsamples

    def _pyro_sample(self, msg: Message) -> None:
        name = str(msg["name"])
        given = self.subsamples if site_is_subsample(msg) else self.values
        if msg["value"] is None and name in given:
            msg["value"] = given[name]


def evaluate(
    call: Call,
    values: Mapping[str, Tensor],
    subsamples: Mapping[str, Tensor],
    rows: tuple[int, int] | None = None,
) -> Evaluation:
    """Run the guide at ``values``, and the model on the guide's.

    Args:
        call: The programs.
        values: Values of latent sites of the guide; the others are drawn.
        subsamples: Indices for plates that draw a minibatch, in both programs.
        rows: Number of rows and the dimension, left of all plates, of a plate around both.

    Raises:
        ValueError: If one of the model's latent sites is missing from the guide.
    """
    with ExitStack() as stack:
        stack.enter_context(Given({}, subsamples))
        guide, model = call.guide, call.model
        if rows is not None:
            plate = pyro.plate(_ROWS, rows[0], dim=rows[1])
            guide, model = plate(guide), plate(model)
        with Given(values, {}):
            guide_trace = poutine.trace(guide).get_trace(*call.args, **call.kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*call.args, **call.kwargs)
    _check_latents(model_trace, guide_trace)
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    sites = {name: site for name, site in _samples(guide_trace).items() if not site["is_observed"]}
    terms = [_term(name, site, -1) for name, site in _samples(guide_trace).items()]
    terms += [_term(name, site, 1) for name, site in _samples(model_trace).items()]
    return Evaluation(terms, {name: _law(site) for name, site in sites.items()}, sites)


def _check_latents(model: Trace, guide: Trace) -> None:
    for name, site in model.nodes.items():
        latent = site["type"] == "sample" and not site["is_observed"]
        if latent and not site_is_subsample(site) and name not in guide:
            raise ValueError(
                f"The model's latent site {name!r} is missing from the guide, whose sites are "
                f"{list(guide.stochastic_nodes)}. Sample it in the guide, or observe it in the "
                "model."
            )


def plates_of(site: Any) -> frozenset[CondIndepStackFrame]:
    """The vectorised plates of a site, without that of the rows."""
    return frozenset(
        frame for frame in site["cond_indep_stack"] if frame.vectorized and frame.name != _ROWS
    )


def _samples(trace: Trace) -> dict[str, Any]:
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }


def _term(name: str, site: Any, sign: int) -> Term:
    value = site["log_prob"]
    if not site["is_observed"]:  # torch has clamped the logits that it derives from probabilities
        score = wrap_score(site["fn"], log_mass(unwrap(site["fn"]), site["value"]))
        value = scale_and_mask(score, site["scale"], site["mask"])
    return Term(name, sign * value, plates_of(site))


def _law(site: Any) -> Tensor:
    """Score a value by the distribution without its masks: a mask changes the score alone."""
    fn = site["fn"]
    return sum_rightmost(log_mass(unwrap(fn), site["value"]), event_dims(fn))
