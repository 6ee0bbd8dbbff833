"""Ways to run a program under this package's losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import Independent

from helpers.differences.draws import Step, gradient_step
from helpers.differences.references import Quantity
from helpers.user_programs import Program, Setup
from pyro_gumbel.estimators import (
    ARMS,
    DisARM,
    DisARMTree,
    DoubleControlVariate,
    Enumerate,
    Estimator,
    Exponential,
    GappedStraightThrough,
    GumbelRao,
    GumbelSoftmax,
    GumbelStraightThrough,
    LeaveOneOut,
    LocalExpectation,
    MovingAverage,
    MuProp,
    Pathwise,
    Rebar,
    ReinMax,
    ReinMaxRao,
    Rodeo,
    Score,
    StraightThrough,
    SumAndSample,
    UnorderedSet,
)
from pyro_gumbel.infer import (
    CapturedSVI,
    Estimator_ELBO,
    ImportanceWeighted_ELBO,
    config_gradient,
)

ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "ARMS": ARMS,
    "DisARM": DisARM,
    "DisARMTree": DisARMTree,
    "DoubleControlVariate": DoubleControlVariate,
    "Enumerate": Enumerate,
    "GappedStraightThrough": lambda: GappedStraightThrough(0.7),
    "GumbelRao": lambda: GumbelRao(0.7, num_samples=2),
    "GumbelSoftmax": lambda: GumbelSoftmax(0.7),
    "GumbelStraightThrough": lambda: GumbelStraightThrough(Exponential(1.0, 0.5, 0.1)),
    "LocalExpectation": LocalExpectation,
    "MuProp": MuProp,
    "Rebar": lambda: Rebar(0.6),
    "ReinMax": ReinMax,
    "ReinMaxRao": lambda: ReinMaxRao(0.7, num_samples=2),
    "Rodeo": Rodeo,
    "Score": Score,
    "Score(LeaveOneOut)": lambda: Score(LeaveOneOut()),
    "Score(MovingAverage)": lambda: Score(MovingAverage()),
    "StickingTheLanding": lambda: Pathwise(sticking_the_landing=True),
    "StraightThrough": StraightThrough,
    "SumAndSample": lambda: SumAndSample(1),
    "UnorderedSet": lambda: UnorderedSet(2),
}
# Upstream of other sites these run branches of their own.
BRANCHING = ("DisARM", "DisARMTree", "ARMS")


@dataclass(frozen=True)
class Objective:
    """A loss with its options, and the estimators of the sites.

    Attributes:
        name: Shown in the table; ``name/looped`` for particles that are run one by one.
        make: Makes a step for programs that have just been made.
        quantity: What it estimates, and by how many particles.
        gradient: Whether its gradient is unbiased, so that more than its loss is compared.
    """

    name: str
    make: Callable[[Setup], Step]
    quantity: Quantity = Quantity()
    gradient: bool = True


def objectives(program: Program, setup: Setup) -> Iterator[Objective]:
    """List the objectives that can be asked of a program."""
    yield from _with_defaults()
    if not any(fn.has_rsample for fn in setup.latents.values()):
        yield _objective("default_score", default="score", **ROWS)
    for name, make in ESTIMATORS.items():
        config = {site: make for site, fn in setup.latents.items() if sensible(make(), fn)}
        if config:
            yield from _with_estimators(name, config, biased=not make().unbiased)
    yield from _with_branches_first(setup)
    yield from _with_a_history()
    if program.importance:
        yield from _importance_weighted(setup)


def wanted(program: Program, setup: Setup) -> list[Objective]:
    """Those that the programs' structure allows."""
    found = [o for o in objectives(program, setup) if program.asks(o.name)]
    return found if program.vectorized else [o for o in found if "looped" in o.name]


def sensible(estimator: Estimator, fn: Any) -> bool:
    """Leave reparameterised sites to their gradient: their scores would drown all else."""
    return serves(estimator, fn) and not (isinstance(estimator, Score) and fn.has_rsample)


def serves(estimator: Estimator, fn: Any) -> bool:
    """Say whether an estimator supports a site's family."""
    while isinstance(fn, (Independent, dist.MaskedDistribution)):
        fn = fn.base_dist
    return estimator.supports(fn)


ROWS = {"num_particles": 2, "vectorize_particles": True}
RUNS = {"num_particles": 2}


def _quantity(options: dict[str, Any], *, importance: bool = False) -> Quantity:
    vectorized = options.get("vectorize_particles", False)
    return Quantity(options.get("num_particles", 1), vectorized, importance)


def _objective(name: str, config: Any = None, **options: Any) -> Objective:
    """An objective of ``Estimator_ELBO``; the configuration is made anew for each run."""

    def make(setup: Setup) -> Step:
        elbo = Estimator_ELBO(**options)
        guide = _configured(setup.guide, config)
        return gradient_step(lambda: elbo.loss_and_grads(setup.model, guide))

    return Objective(name, make, _quantity(options))


def _configured(guide: Any, config: Any) -> Any:
    if config is None:
        return guide
    return config_gradient(guide, {site: make() for site, make in config.items()})


def _with_defaults() -> Iterator[Objective]:
    yield _objective("looped", **RUNS)
    yield _objective("vectorized", **ROWS)
    yield _objective("analytic_kl", analytic_kl=True, **ROWS)
    yield _objective("analytic_kl/looped", analytic_kl=True)
    yield Objective("nesting_given", _nesting_given, _quantity(ROWS))
    yield Objective("differentiable_loss", _differentiable, _quantity(ROWS))
    yield Objective("as_module/looped", _as_module)
    yield Objective("captured", lambda setup: _captured(setup, ROWS), _quantity(ROWS))
    yield Objective("captured/looped", lambda setup: _captured(setup, RUNS), _quantity(RUNS))


def _with_estimators(name: str, config: Any, *, biased: bool) -> Iterator[Objective]:
    yield replace(_objective(name, config, **ROWS), gradient=not biased)
    yield replace(_objective(f"{name}/looped", config, **RUNS), gradient=not biased)


def _with_branches_first(setup: Setup) -> Iterator[Objective]:
    """The first site that can branches; the sites below it take what they take by default."""
    for name in BRANCHING:
        make = ESTIMATORS[name]
        served = [site for site, fn in setup.latents.items() if serves(make(), fn)]
        if served and len(setup.latents) > 1:
            config = {served[0]: make}
            yield _objective(f"first:{name}", config, **ROWS)
            yield _objective(f"first:{name}/looped", config)


def _with_a_history() -> Iterator[Objective]:
    """Losses that were used otherwise before, or are in between."""
    yield Objective("options_changed", _options_changed, Quantity(4, vectorized=True))
    yield Objective("options_changed/looped", _fewer_particles)
    yield Objective("two_pairs/looped", _two_pairs)
    yield Objective("evaluated_between", _evaluated_between, _quantity(ROWS))


def _importance_weighted(setup: Setup) -> Iterator[Objective]:
    pathwise = all(fn.has_rsample for fn in setup.latents.values())
    for count in (1, 2, 3) if pathwise else (2, 3):
        yield _importance(f"iw{count}", count, vectorize_particles=True)
        yield _importance(f"iw{count}/looped", count)
    doubly = {"doubly_reparameterized": True}
    yield _importance("iw3_doubly", 3, vectorize_particles=True, **doubly)
    yield _importance("iw3_doubly/looped", 3, **doubly)


def _importance(name: str, count: int, **options: Any) -> Objective:
    def make(setup: Setup) -> Step:
        elbo = ImportanceWeighted_ELBO(count, **options)
        return gradient_step(lambda: elbo.loss_and_grads(setup.model, setup.guide))

    return Objective(name, make, _quantity({"num_particles": count, **options}, importance=True))


def _nesting_given(setup: Setup) -> Step:
    elbo = Estimator_ELBO(max_plate_nesting=setup.nesting, **ROWS)
    return gradient_step(lambda: elbo.loss_and_grads(setup.model, setup.guide))


def _differentiable(setup: Setup) -> Step:
    elbo = Estimator_ELBO(**ROWS)

    def compute() -> torch.Tensor:
        loss = elbo.differentiable_loss(setup.model, setup.guide)
        loss.backward()
        return loss.detach()

    return gradient_step(compute)


def _as_module(setup: Setup) -> Step:
    module = Estimator_ELBO()(setup.model, setup.guide)

    def compute() -> torch.Tensor:
        loss = module()
        loss.backward()
        return loss.detach()

    return gradient_step(compute)


class _Recorder(torch.optim.Optimizer):
    """An optimiser that keeps gradients and moves nothing."""

    seen: dict[torch.Tensor, torch.Tensor] = {}

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for value in group["params"]:
                if value.grad is not None:
                    self.seen[value] = value.grad.clone()


def _captured(setup: Setup, options: dict[str, Any]) -> Step:
    optim = pyro.optim.PyroOptim(_Recorder, {})
    svi = CapturedSVI(setup.model, setup.guide, optim, Estimator_ELBO(**options))

    def step() -> tuple[float, dict[str, torch.Tensor]]:
        _Recorder.seen.clear()
        loss = svi.step()
        found = {
            name: _Recorder.seen.get(value, torch.zeros_like(value))
            for name, value in pyro.get_param_store()._params.items()
        }
        return loss, found

    return step


def _options_changed(setup: Setup) -> Step:
    elbo = Estimator_ELBO(**ROWS)
    elbo.loss(setup.model, setup.guide)
    elbo.num_particles = 4
    return gradient_step(lambda: elbo.loss_and_grads(setup.model, setup.guide))


def _fewer_particles(setup: Setup) -> Step:
    elbo = Estimator_ELBO(3)
    elbo.loss(setup.model, setup.guide)
    elbo.num_particles = 1
    return gradient_step(lambda: elbo.loss_and_grads(setup.model, setup.guide))


def _two_pairs(setup: Setup) -> Step:
    """Another pair of programs with sites of the same names and other shapes shares the loss."""
    elbo = Estimator_ELBO(1)

    def other() -> None:
        with pyro.plate("other", 2, dim=-3):
            for name in setup.latents:
                pyro.sample(name, dist.Bernoulli(0.3))

    def compute() -> Any:
        loss = elbo.loss_and_grads(setup.model, setup.guide)
        elbo.loss(other, other)
        return loss

    return gradient_step(compute)


def _evaluated_between(setup: Setup) -> Step:
    elbo = Estimator_ELBO(**ROWS)

    def compute() -> Any:
        loss = elbo.loss_and_grads(setup.model, setup.guide)
        elbo.loss(setup.model, setup.guide)
        return loss

    return gradient_step(compute)
