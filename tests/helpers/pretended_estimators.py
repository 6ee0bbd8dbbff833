"""Programs on the pretended device, and the cases of every estimator there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from helpers.pretended_device import DEVICE, Case, take_steps
from pyro_gumbel import estimators
from pyro_gumbel.estimators import Estimator, LeaveOneOut, MovingAverage, Relax, Score
from pyro_gumbel.estimators.registry import CLASSES
from pyro_gumbel.infer import Estimator_ELBO

N, VARIABLES, CATEGORIES, FEATURES = 6, 2, 3, 5

FAMILIES: dict[str, Callable[[Tensor], Any]] = {
    "one_hot": lambda logits: dist.OneHotCategorical(logits=logits),
    "bernoulli": lambda logits: dist.Bernoulli(logits=logits[..., 0]),
    "categorical": lambda logits: dist.Categorical(logits=logits),
    "poisson": lambda logits: dist.Poisson(logits[..., 0].exp()),
    "geometric": lambda logits: dist.Geometric(logits=logits[..., 0]),
    "normal": lambda logits: dist.Normal(logits[..., 0], logits[..., 1].exp()),
}
PROBS: dict[str, Callable[[Tensor], Any]] = {
    "one_hot_probs": lambda logits: dist.OneHotCategorical(probs=logits.softmax(-1)),
    "bernoulli_probs": lambda logits: dist.Bernoulli(probs=logits[..., 0].sigmoid()),
}


class Programs(nn.Module):
    """A chain of sites of a family in a plate of six.

    Args:
        family: A key of ``FAMILIES`` or ``PROBS``.
        choice: The estimator of each site.
        dtype: The dtype of data and networks.
        joined: Whether a site has two variables, which ``to_event`` joins.
        chained: Whether there is a second site, given the first.
    """

    def __init__(
        self,
        family: str,
        choice: Any,
        *,
        dtype: torch.dtype = torch.float32,
        joined: bool = False,
        chained: bool = False,
    ) -> None:
        super().__init__()
        self.family, self.choice, self.joined = family, choice, joined
        size = VARIABLES if joined else 1
        self.inner = (VARIABLES,) if joined else ()
        made = {"device": DEVICE, "dtype": dtype}
        self.encoder = nn.Linear(FEATURES, size * CATEGORIES, **made)
        self.second = nn.Linear(size, size * CATEGORIES, **made) if chained else None
        self.decoder = nn.Linear(size, FEATURES, **made)
        self.table = nn.Parameter(torch.randn(CATEGORIES, **made))
        self.prior = torch.zeros(size * CATEGORIES, **made)
        self.x = torch.randn(N, FEATURES, **made)
        self.scale = torch.ones(FEATURES, **made)

    def law(self, logits: Tensor) -> Any:
        logits = logits.unflatten(-1, (*self.inner, CATEGORIES))
        fn = (FAMILIES | PROBS)[self.family](logits)
        return fn.to_event(1) if self.joined else fn

    def read(self, z: Tensor) -> Tensor:
        """A number for each variable, a multiple of the parameter ``table``."""
        if self.family == "categorical":
            numbers = self.table[z]
        elif self.family.startswith("one_hot"):
            numbers = (z * self.table).sum(-1)
        else:
            numbers = z * self.table.sum()
        return numbers if self.joined else numbers.unsqueeze(-1)

    def model(self) -> None:
        with pyro.plate("data", N):
            z = self.read(pyro.sample("z", self.law(self.prior)))
            if self.second is not None:
                z = z + self.read(pyro.sample("y", self.law(self.prior + z.sum(-1, keepdim=True))))
            fn = dist.Normal(self.decoder(z), self.scale).to_event(1)
            pyro.sample("x", fn, obs=self.x)

    def guide(self) -> None:
        infer = {"gradient": self.choice}
        with pyro.plate("data", N):
            z = pyro.sample("z", self.law(self.encoder(self.x)), infer=infer)
            if self.second is not None:
                pyro.sample("y", self.law(self.second(self.read(z))), infer=infer)

    def take_steps(self, elbo: ELBO) -> None:
        step = partial(elbo.differentiable_loss, self.model, self.guide)
        learnable = isinstance(self.choice, nn.Module)
        take_steps(step, lambda: [self, self.choice] if learnable else [self])
        if learnable:
            wide = torch.promote_types(torch.float32, self.x.dtype)
            found = {parameter.dtype for parameter in self.choice.parameters()}
            if found - {wide}:
                raise AssertionError(f"the estimator's parameters are {found}, not {wide}")


def critic() -> nn.Module:
    """A critic made before its site is known: on the CPU, in float32."""
    return nn.Linear(CATEGORIES, 1)


MAKERS: dict[str, Callable[[], Estimator]] = {
    **CLASSES,
    "relax": lambda: Relax(critic()),
    "score": lambda: Score(MovingAverage()),
}


def families_of(name: str, *, joined: bool) -> list[str]:
    """The families that an estimator supports, each of ``FAMILIES`` in its first form."""
    estimator = MAKERS[name]()
    sizes = (VARIABLES, CATEGORIES) if joined else (CATEGORIES,)
    found = []
    for family, law in FAMILIES.items():
        fn = law(torch.zeros(N, *sizes, device=DEVICE))
        if name == "relax" and family != "one_hot":
            continue  # a critic reads values of one size
        if estimator.supports(fn) and estimator.why_unsupported(fn, int(joined)) is None:
            found.append(family)
    return found


def bound(particles: int = 1, kind: type[ELBO] = Estimator_ELBO, **options: Any) -> ELBO:
    """A bound whose particles are vectorised if there are several."""
    vectorised = particles > 1
    return kind(particles, vectorize_particles=vectorised, max_plate_nesting=1, **options)


def looped() -> dict[str, Case]:
    """Every estimator at every family, one variable an element."""

    def case(name: str, family: str) -> None:
        Programs(family, MAKERS[name]()).take_steps(bound())

    return {
        f"{name}/{family}": partial(case, name, family)
        for name in MAKERS
        for family in families_of(name, joined=False)
    }


def vectorised() -> dict[str, Case]:
    """Every estimator at every family, two variables an element where it supports them."""

    def case(name: str, family: str, joined: bool) -> None:
        Programs(family, MAKERS[name](), joined=joined, chained=True).take_steps(bound(2))

    cases: dict[str, Case] = {}
    for name in MAKERS:
        joined = bool(families_of(name, joined=True)) and name != "relax"
        for family in families_of(name, joined=joined):
            cases[f"{name}/{family}"] = partial(case, name, family, joined)
    return cases


def dtypes() -> dict[str, Case]:
    """Every estimator in half and double precision, at probabilities where it can."""

    def case(name: str, family: str, dtype: torch.dtype) -> None:
        Programs(family, MAKERS[name](), dtype=dtype).take_steps(bound())

    cases: dict[str, Case] = {}
    for name in MAKERS:
        family = families_of(name, joined=False)[0]
        family = f"{family}_probs" if f"{family}_probs" in PROBS else family
        for dtype in (torch.bfloat16, torch.float64):
            cases[f"{name}/{dtype}"] = partial(case, name, family, dtype)
    return cases


def takes_schedule(kind: type[Estimator]) -> bool:
    """Return whether an estimator has a temperature that may be a schedule."""
    if "temperature" not in inspect.signature(kind).parameters:
        return False
    try:
        kind(temperature=estimators.Linear(1.0, 0.5, 10))
    except TypeError:
        return False
    return True


def choices() -> dict[str, Case]:
    """Every schedule, every baseline, and every learnable estimator by its name."""
    schedules = {
        "Exponential": estimators.Exponential(1.0, 0.5, 0.1),
        "Linear": estimators.Linear(1.0, 0.5, 10),
    }
    baselines = {
        "LeaveOneOut": LeaveOneOut(),
        "MovingAverage": MovingAverage(),
        "NeuralBaseline": estimators.NeuralBaseline(
            nn.Linear(1, 1), lambda: torch.ones(N, 1, device=DEVICE)
        ),
    }
    made: dict[str, Any] = {
        f"{kind.__name__}/{name}": partial(kind, schedule)
        for kind in CLASSES.values()
        for name, schedule in schedules.items()
        if takes_schedule(kind)
    }
    made["GumbelRao/few_draws"] = lambda: estimators.GumbelRao(0.5, num_samples=2)
    made |= {name: partial(Score, baseline) for name, baseline in baselines.items()}
    for name, kind in CLASSES.items():
        if any(parameter.requires_grad for parameter in kind().parameters()):
            made[f"{name}/by_name"] = partial(str, name)

    def case(make: Callable[[], Any]) -> None:
        choice = make()
        family = "bernoulli" if choice == "rodeo" else "one_hot"
        programs = Programs(family, choice)
        programs.take_steps(bound(2))
        if isinstance(choice, str) and not any(
            name.startswith("gradient$") for name in pyro.get_param_store()
        ):
            raise AssertionError("the store has no parameter of the estimator")

    return {name: partial(case, make) for name, make in made.items()}


class Stubborn(Estimator):
    """A score function with a tensor of its own on the CPU."""

    unbiased, sites = True, "any"

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.ones(N)

    def supports(self, fn: Any) -> bool:
        return True

    def surrogate(self, site: Any) -> Tensor:
        return site.cost[0] * site.log_prob * self.weights


class Reading(Stubborn):
    """A score function that reads a number of the device in each step."""

    def surrogate(self, site: Any) -> Tensor:
        return site.cost[0] * site.log_prob * float(site.cost.mean())


class Copying(Stubborn):
    """A score function that copies costs to the CPU in each step."""

    def surrogate(self, site: Any) -> Tensor:
        site.cost.cpu()
        return site.cost[0] * site.log_prob


class Listing(Stubborn):
    """A score function that indexes by a list."""

    def surrogate(self, site: Any) -> Tensor:
        return site.cost[[0]][0] * site.log_prob


def planted() -> dict[str, Case]:
    """Faults that must be seen."""
    kinds = (Stubborn, Reading, Copying, Listing)
    return {
        kind.__name__: partial(Programs("one_hot", kind()).take_steps, bound()) for kind in kinds
    }
