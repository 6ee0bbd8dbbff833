"""Small discrete programs that chance puts together, with their exact losses by summation."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

SIZE = 2  # elements of each plate
PLATES = {"": (), "a": ("a",), "b": ("b",), "ab": ("a", "b")}
_DIMS = {"a": -1, "b": -2}
_NESTING = 2
CATEGORIES = 3


@dataclass(frozen=True)
class RandomSite:
    """One latent site.

    Attributes:
        name: Its name.
        family: ``"bit"``, ``"one_hot"`` or ``"category"``.
        plates: A key of ``PLATES``.
        guide_parents: Sites that its guide depends on, each in no more plates than itself.
        model_parents: Sites that its prior depends on.
        by_index: Whether its children read a one-hot or a bit by an index, too.
    """

    name: str
    family: str
    plates: str
    guide_parents: tuple[str, ...]
    model_parents: tuple[str, ...]
    by_index: bool

    @property
    def categories(self) -> int:
        return 2 if self.family == "bit" else CATEGORIES

    @property
    def elements(self) -> int:
        return SIZE ** len(PLATES[self.plates])


@dataclass
class RandomProgram:
    """A model and a guide over the sites; numbers come from a seed.

    Attributes:
        sites: The latents, in order.
        scaled: Whether plate ``a`` has a scale.
        masked: Whether plate ``b`` has a mask.
        gathers: Whether a factor outside of the plates depends on every site.
        seed: Of the weights.
        copies: Independent replicates in a plate left of all others.
    """

    sites: tuple[RandomSite, ...]
    scaled: bool
    masked: bool
    gathers: bool
    seed: int
    copies: int = 1
    _weights: dict[str, Tensor] = field(default_factory=dict)

    def states(self) -> int:
        return math.prod(site.categories**site.elements for site in self.sites)

    def weights(self, key: str, *shape: int) -> Tensor:
        if key not in self._weights:
            generator = torch.Generator().manual_seed(self.seed * 1009 + len(self._weights))
            self._weights[key] = 0.8 * torch.randn(shape, generator=generator)
        return self._weights[key]

    def feature(self, site: RandomSite, key: str, value: Tensor) -> Tensor:
        """A number for each value."""
        table = self.weights(f"{key} of {site.name}", site.categories)
        if site.family == "category":
            return table[value.long()]
        if site.family == "bit":
            smooth = table[0] + (table[1] - table[0]) * value
            return smooth + table[(value > 0.5).long()] if site.by_index else smooth
        smooth = value @ table
        return smooth + table[value.argmax(-1)] if site.by_index else smooth

    def logits(self, site: RandomSite, key: str, start: Tensor, values: dict[str, Tensor]) -> Any:
        """A vector of logits that the parents push."""
        parents = site.guide_parents if key == "q" else site.model_parents
        by_name = {other.name: other for other in self.sites}
        total = start
        for parent in parents:
            push = self.feature(by_name[parent], f"{key} {site.name}", values[parent])
            push = self._gather(push, by_name[parent].plates, site.plates)
            tilt = self.weights(f"{key} tilt {site.name} {parent}", site.categories)
            total = total + push.unsqueeze(-1) * tilt
        return total

    def _gather(self, value: Tensor, plates: str, into: str) -> Tensor:
        for plate in set(PLATES[plates]) - set(PLATES[into]):
            if value.dim() >= -_DIMS[plate]:
                value = value.sum(_DIMS[plate], keepdim=True)
        return value

    def _sample(self, site: RandomSite, logits: Tensor) -> Tensor:
        if site.family == "bit":
            return pyro.sample(site.name, dist.Bernoulli(logits=logits[..., 1] - logits[..., 0]))
        family = dist.Categorical if site.family == "category" else dist.OneHotCategorical
        return pyro.sample(site.name, family(logits=logits))

    def _within(self, plates: str, made: dict[str, Any], stack: ExitStack) -> None:
        for plate in PLATES[plates]:
            stack.enter_context(made[plate])
        if self.scaled and "a" in plates:
            stack.enter_context(poutine.scale(scale=0.7))
        if self.masked and "b" in plates:
            mask = torch.tensor([True, False]).unsqueeze(-1)
            stack.enter_context(poutine.mask(mask=mask))

    def guide(self) -> None:
        values: dict[str, Tensor] = {}
        made = {plate: pyro.plate(plate, SIZE, dim=dim) for plate, dim in _DIMS.items()}
        with pyro.plate("copies", self.copies, dim=-_NESTING - 1):
            for site in self.sites:
                start = pyro.param(f"{site.name}_", self.weights(f"{site.name}_", site.categories))
                with ExitStack() as stack:
                    self._within(site.plates, made, stack)
                    logits = self.logits(site, "q", start, values)
                    values[site.name] = self._sample(site, logits)

    def model(self) -> None:
        values: dict[str, Tensor] = {}
        made = {plate: pyro.plate(plate, SIZE, dim=dim) for plate, dim in _DIMS.items()}
        strength = pyro.param("strength", torch.tensor(0.8))
        with pyro.plate("copies", self.copies, dim=-_NESTING - 1):
            for site in self.sites:
                start = self.weights(f"prior {site.name}", site.categories)
                with ExitStack() as stack:
                    self._within(site.plates, made, stack)
                    logits = self.logits(site, "p", start, values)
                    values[site.name] = self._sample(site, logits)
                    loc = strength * self.feature(site, "x", values[site.name])
                    x = torch.tensor(0.6).expand(self.copies, SIZE, SIZE)
                    x = self._shrunk(x, site.plates)
                    pyro.sample(f"x_{site.name}", dist.Normal(loc, 0.9), obs=x)
            if self.gathers:
                parts = [
                    self._gather(self.feature(site, "sum", values[site.name]), site.plates, "")
                    for site in self.sites
                ]
                pyro.factor("total", -0.2 * sum(parts) ** 2)

    def _shrunk(self, x: Tensor, plates: str) -> Tensor:
        """An observation of one element in dimensions that are no plates of the site."""
        for plate, dim in _DIMS.items():
            if plate not in plates:
                x = x.narrow(dim, 0, 1)
        return x

    def exact(self) -> tuple[float, dict[str, Tensor]]:
        """Sum over all joint states: the loss of one replicate and its gradient."""
        one = replace(self, copies=1)
        grid = torch.cartesian_prod(
            *[torch.arange(site.categories) for site in self.sites for _ in range(site.elements)]
        ).reshape(self.states(), -1)
        values, column = {}, 0
        for site in self.sites:
            part = grid[:, column : column + site.elements]
            column += site.elements
            shape = [SIZE if plate in site.plates else 1 for plate in ("b", "a")]
            index = part.reshape(-1, 1, *shape)
            value = torch.eye(CATEGORIES)[index] if site.family == "one_hot" else index
            values[site.name] = value if site.family == "category" else value.float()
        with pyro.plate("states", self.states(), dim=-_NESTING - 2):
            guide = poutine.trace(poutine.condition(one.guide, data=values)).get_trace()
            model = poutine.trace(poutine.condition(one.model, data=values)).get_trace()
        guide.compute_log_prob()
        model.compute_log_prob()
        log_q = sum(_by_state(guide.nodes[n]["fn"].log_prob(v)) for n, v in values.items())
        terms = [(site, -1.0) for site in _scored(guide)] + [
            (site, 1.0) for site in _scored(model)
        ]
        reward = sum(sign * _by_state(site["log_prob"]) for site, sign in terms)
        loss = -(log_q.exp() * reward).sum()
        names = sorted(pyro.get_param_store().keys())
        parameters = [pyro.param(name).unconstrained() for name in names]
        gradients = torch.autograd.grad(loss, parameters)
        return loss.item(), dict(zip(names, gradients, strict=True))


def _by_state(log_prob: Tensor) -> Tensor:
    """Sum over all but the plate of states, which is the leftmost."""
    return log_prob.flatten(1).sum(-1)


def _scored(trace: Any) -> list[Any]:
    nodes = trace.nodes.values()
    return [site for site in nodes if site["type"] == "sample" and not site_is_subsample(site)]
