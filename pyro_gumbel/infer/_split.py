"""Split a step among processes: what each draws, counts and learns."""

# mypy: disable-error-code="override"
# The tensors of a site are computed at their first use.

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NoReturn

import pyro
import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyro_gumbel.estimators import Call, Estimator, MovingAverage
from pyro_gumbel.infer._checks import PARTICLE_PLATE
from pyro_gumbel.infer._costs import Costs, Frames, Term, site_frames
from pyro_gumbel.infer._processes import gather, num_processes, of_first, rank, sum_over_processes
from pyro_gumbel.infer._run import Run
from pyro_gumbel.infer._site_view import Passes, SiteView
from pyro_gumbel.infer._state import (
    adopt_stored,
    generator_states,
    held_objects,
    preserved_rng,
    set_generator_states,
    set_torch_generators,
    torch_generators,
)
from pyro_gumbel.infer.elbo import Estimator_ELBO, ParticleELBO

__all__ = ["OtherValues", "SplitStep"]


class OtherValues(Exception):
    """New parameters of a step had different values in different processes."""


class SplitStep(Messenger):
    """Splits the steps of an SVI among processes.

    It is a handler around both programs. It scales a subsampled plate as if all minibatches were
    one.

    Attributes:
        streams: The states of the process's own generators, and of the shared ones.
        traced: The trace of the step's parameters.
    """

    def __init__(self, elbo: ParticleELBO, plates: tuple[str, ...]) -> None:
        super().__init__()
        self.streams: Any = None
        self.traced: Any = None
        self._elbo = elbo
        self._plates = plates
        self._has_begun = False
        self._found: set[str] = set()  # plates that are split
        self._lengths: set[int] = set()  # first dimensions of the arguments
        self._factors: dict[str, float] = {}
        self._params: dict[str, Tensor] = {}  # that all processes have
        self._estimators: set[Estimator] = set()
        self._buffers: list[Tensor] = []  # of the programs' modules
        self._sizes: dict[str, int] = {}  # number of values of each site

    def begin(self, call: Call) -> bool:
        """Return whether there are several processes. If so, agree before the first step."""
        if num_processes() == 1:
            return False
        if not self._has_begun:
            self._has_begun = True
            self._agree_on_all(call)
        if self.streams is None:
            seed = of_first(int(torch.randint(2**31, ())))
            with preserved_rng():
                pyro.set_rng_seed(seed)
                shared = torch_generators()
                pyro.set_rng_seed(seed + 1 + rank())
                self.streams = generator_states(), shared
        return True

    def _agree_on_all(self, call: Call) -> None:
        estimators = self._elbo.find_estimators(call)
        for site, estimator in estimators.items():
            adopt_stored(site, estimator)
        programs = {"model": call.model, "guide": call.guide, "loss": self._elbo}
        modules = held_objects(programs | estimators, (nn.Module,))
        self._params = dict(pyro.get_param_store().named_parameters())
        own = dict(self._params)
        for path, module in modules.items():
            own |= {f"{path}.{name}": value for name, value in module.named_parameters()}
            own |= {f"{path}.{name}": value for name, value in module.named_buffers()}
        self._agree(own)
        averages = _averages(estimators)
        states = of_first([average.get_extra_state() for average in averages])
        for average, state in zip(averages, states, strict=True):
            average.set_extra_state(state)
        self._estimators = set(estimators.values())
        buffers = [buffer for module in modules.values() for buffer in module.buffers()]
        self._buffers = [buffer for buffer in buffers if buffer.is_floating_point()]

    def _agree(self, own: Mapping[str, Tensor]) -> bool:
        """Copy the first process's values, and return whether any process had others.

        Raises:
            ValueError: If processes do not have the same parameters.
        """
        shapes = gather({name: tuple(value.shape) for name, value in own.items()})
        for number, other in enumerate(shapes):
            if differing := sorted(dict(other.items() ^ shapes[0].items())):
                raise ValueError(
                    f"DistributedSVI: the processes 0 and {number} have different parameters or "
                    f"shapes: {differing}. Let every process use the same parameters in a step, "
                    "and do not give a parameter the size of a process's share of the data."
                )
        values = of_first([own[name].detach().cpu() for name in sorted(own)])
        changed = False
        for name, value in zip(sorted(own), values, strict=True):
            changed = changed or not torch.equal(own[name].detach().cpu(), value)
            own[name].data.copy_(value)
        return any(gather(changed))

    @contextmanager
    def step(self, call: Call) -> Iterator[None]:
        """Run a step's programs by the streams. A failed step leaves the streams unchanged."""
        leaves = pytree.tree_leaves((call.args, dict(call.kwargs)))
        self._lengths = {len(x) for x in leaves if isinstance(x, Tensor) and x.dim()}
        self._factors.clear()
        self._found.clear()
        self.traced = None
        own, shared = self.streams
        with preserved_rng():
            set_generator_states(own)
            try:
                with self:
                    yield
                self.streams = generator_states(), self.streams[1]
            except BaseException:
                self.streams = own, shared
                raise

    # What the engine asks for

    @contextmanager
    def drawing(self, msg: Message) -> Iterator[None]:
        """Draw by the shared stream outside of the split plate."""
        if self._frame(msg["cond_indep_stack"]) is not None:
            yield
            return
        own, shared = self.streams
        before = torch_generators()
        set_torch_generators(shared)
        yield
        self.streams = own, torch_generators()
        set_torch_generators(before)

    def _frame(self, frames: Iterable[CondIndepStackFrame]) -> CondIndepStackFrame | None:
        """Return the frame of the split plate, if it is among ``frames``."""
        found = [frame for frame in frames if self._is_split(frame)]
        self._found.update(frame.name for frame in found)
        if len(found) > 1 or (len(self._found) > 1 and not self._plates):
            raise ValueError(
                f"DistributedSVI: the plates {sorted(self._found)} are subsampled or have the "
                "size of an argument. Name the one that the processes split, "
                f"DistributedSVI(..., plate={found[0].name!r})."
            )
        if found and not found[0].vectorized:
            raise ValueError(
                f"DistributedSVI cannot split the sequential plate {found[0].name!r}. Write "
                "with pyro.plate(...) as index: instead of for index in pyro.plate(...):."
            )
        return found[0] if found else None

    def _is_split(self, frame: CondIndepStackFrame) -> bool:
        if self._plates or frame.name == PARTICLE_PLATE:
            return frame.name in self._plates
        subsampled = frame.full_size is not None and frame.full_size != frame.size
        return subsampled or (frame.vectorized and frame.size in self._lengths)

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            if self._plates and msg["name"] not in self._plates and msg["value"] is None:
                with self.drawing(msg):
                    msg["value"] = msg["fn"]()
            return
        frame = self._frame(msg["cond_indep_stack"])
        if frame is None or frame.full_size in (None, frame.size):
            return
        if frame.name not in self._factors:
            (total,) = sum_over_processes([torch.tensor(float(frame.size))])
            self._factors[frame.name] = frame.size / total.item()
        factor = self._factors[frame.name]
        msg["scale"] = msg["scale"] * factor
        scaled: Any = frame._replace(full_size=frame.full_size * factor)
        msg["cond_indep_stack"] = tuple(
            scaled if other is frame else other for other in msg["cond_indep_stack"]
        )

    def _pyro_post_param(self, msg: Message) -> None:
        frame, event_dim = self._frame(msg["cond_indep_stack"]), msg["kwargs"].get("event_dim")
        if frame is None or event_dim is None or frame.full_size not in (None, frame.size):
            return
        shape, dim = msg["value"].shape, frame.dim - event_dim
        if len(shape) >= -dim and shape[dim] > 1:
            raise ValueError(
                f"DistributedSVI: the parameter {msg['name']!r} has a value for each of the "
                f"{frame.size} data of a share. Give it the size N of the whole data, in "
                f"pyro.plate({frame.name!r}, N, subsample=rows), or compute it from the data."
            )

    def is_inside(self, frames: Frames) -> bool:
        return self._frame(frames) is not None

    def share(self, passes: Passes) -> Passes:
        """Count terms outside of the split plate once, and agree on new parameters."""
        if not self._found:
            raise ValueError(
                f"DistributedSVI: expected a plate {' or '.join(self._plates) or 'to split'}, got "
                "none. A plate is split if it is subsampled or has the size of an argument's "
                f"first dimension, {sorted(self._lengths)}. Put the data into pyro.plate(name, "
                "len(x)), or name the plate, DistributedSVI(..., plate='data')."
            )
        self._plates = self._plates or tuple(self._found)
        for run in (run for group in passes.groups for run in group):
            self._check(run)
            run._own_kl = {name: self.weighed(term) for name, term in run._own_kl.items()}
            run.costs = _SplitCosts(run.costs, self)
        self._check_agreement(passes.groups[0][0], passes.estimators)
        self._sizes = {
            name: sum(group[0].value(name).numel() for group in passes.having(name))
            for name in passes.estimators
        }
        return _SplitPasses(passes.groups, self)

    def weighed(self, term: Term) -> Term:
        if self.is_inside(term.frames):
            return term
        return dataclasses.replace(term, value=term.value / num_processes())

    def _check(self, run: Run) -> None:
        for term in run.terms:
            if self.is_inside(term.frames):
                continue
            if term.site not in run.guide and term.site not in run.observed and term.of_model:
                _refuse(term.site, "is summed over all data. Sample it in the guide")
            if not isinstance(self._elbo, Estimator_ELBO):
                name = type(self._elbo).__name__
                _refuse(term.site, f"is in the weights of {name}. Use Estimator_ELBO")

    def _check_agreement(self, run: Run, estimators: Mapping[str, Estimator]) -> None:
        """Agree on new parameters, and compare the terms outside of the plate."""
        met = self._met()
        new = {name: value for name, value in met.items() if name not in self._params}
        own = dict(new)
        for name, estimator in estimators.items():
            if estimator not in self._estimators:
                own |= {f"{name}: {n}": value for n, value in estimator.named_parameters()}
        outside: dict[str, float] = {}
        for term in run.terms if is_validation_enabled() else ():
            if not self.is_inside(term.frames):
                value = term.value.detach().double().sum().item()
                outside[term.site] = outside.get(term.site, 0.0) + value
        table = torch.zeros(num_processes(), 2, dtype=torch.float64)
        table[rank()] = torch.tensor([bool(own), sum(outside.values())])
        is_new, total = sum_over_processes([table])[0].unbind(1)
        if is_new.any():
            self._params |= new
            self._estimators |= set(estimators.values())
            if self._agree(own):
                raise OtherValues
        if (total - total[0]).abs().max() > 1e-4 * (1 + total[0].abs()):
            found = gather(outside)
            site = max(outside, key=lambda name: max(abs(x[name] - found[0][name]) for x in found))
            values = [round(each[site], 4) for each in found]
            _refuse(site, f"differs between processes, {values}. Put it into the plate")

    def _met(self) -> dict[str, Tensor]:
        """Return the parameters that the step has used so far."""
        nodes = self.traced.trace.nodes
        return {n: nodes[n]["value"].unconstrained() for n in self.traced.trace.param_nodes}

    def reduce(self, loss: Tensor, estimators: Mapping[str, Estimator]) -> Tensor:
        """Sum loss and gradients, average costs, and copy the first process's buffers."""
        met = self._met()
        self._params |= met
        names = sorted(self._params)
        found = [self._params[name].grad if name in met else None for name in names]
        averages = [
            (average, site)
            for average in _averages(estimators)
            for site in sorted(average.get_extra_state()["sums"].keys() & self._sizes.keys())
        ]
        sizes = [self._sizes[site] for _, site in averages]
        means = [average.get_extra_state()["sums"][site] for average, site in averages]
        totals = [mean * size for mean, size in zip(means, sizes, strict=True)]
        numbers = [loss, *(grad is not None for grad in found), *sizes, *totals]
        small = [torch.as_tensor(x).detach().to(loss.device, torch.float64) for x in numbers]
        params = [self._params[name] for name in names]
        grads = [
            torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)
        ]
        buffers = [b if rank() == 0 else torch.zeros_like(b) for b in self._buffers]
        sums, *large = sum_over_processes([torch.stack(small), *grads, *buffers])
        for name, count, grad in zip(names, sums[1:], large, strict=False):
            if count > 0:
                self._params[name].grad = grad
                if name not in met:
                    pyro.param(name)  # another process met it
        for buffer, value in zip(self._buffers, large[len(names) :], strict=True):
            buffer.copy_(value)
        sizes, totals = sums[1 + len(names) :].view(2, -1)
        for (average, site), mean in zip(averages, totals / sizes, strict=True):
            state = average.get_extra_state()
            state["sums"][site] = torch.full_like(state["sums"][site], mean.item())
            average.set_extra_state(state)
        return sums[0].to(loss.dtype)


def _averages(estimators: Mapping[str, Estimator]) -> list[MovingAverage]:
    parts = dict.fromkeys(part for e in estimators.values() for part in e.modules())
    return [part for part in parts if isinstance(part, MovingAverage)]


def _refuse(site: str, reason: str) -> NoReturn:
    raise ValueError(
        f"DistributedSVI: site {site!r}, outside of the split plate, {reason}, or train in one "
        "process."
    )


class _SplitCosts(Costs):
    """The terms of one process. Terms outside of the split plate are in every process."""

    def __init__(self, costs: Costs, split: SplitStep) -> None:
        super().__init__(costs.terms, costs.enumerated, costs.layout)
        self._is_inside = split.is_inside
        self._weighed = Costs(
            [split.weighed(t) for t in costs.terms], costs.enumerated, costs.layout
        )

    def totals(self) -> Tensor:
        return self._weighed.totals()

    def downstream(self, frames: Frames, *args: Any, **kwargs: Any) -> Tensor:
        # The cost of a site outside is summed over processes.
        if self._is_inside(frames):
            return super().downstream(frames, *args, **kwargs)
        return self._weighed.downstream(frames, *args, **kwargs)


class _SplitPasses(Passes):
    """The passes of one process, in which sites outside of the plate read all costs."""

    def __init__(self, groups: list[list[Run]], split: SplitStep) -> None:
        super().__init__(groups)
        frames = {n: site_frames(r.guide[n]) for (r, *_) in groups for n in r.estimators}
        self._outside = {name for name in frames if not split.is_inside(frames[name])}

    def weigh(self, name: str, surrogate: Tensor) -> Tensor:
        return surrogate / num_processes() if name in self._outside else surrogate

    def site(self, name: str, call: Call) -> SiteView:
        kind = _SharedSite if name in self._outside else SiteView
        return kind(self, name, call)


class _SharedSite(SiteView):
    """A site outside of the split plate, with the costs of all processes."""

    @cached_property
    def cost(self) -> Tensor:
        return sum_over_processes([super().cost])[0]

    def value_gradients(self) -> Tensor:
        return sum_over_processes([super().value_gradients()])[0]

    @property
    def live_cost(self) -> Tensor:
        return self._refuse()

    @property
    def totals(self) -> Tensor:
        return self._refuse()

    def _refuse(self) -> NoReturn:
        estimator = self._passes.estimators[self.name]
        _refuse(
            self.name,
            f"has {estimator!r}, which differentiates the cost of all data. Use Score() or a "
            "straight-through estimator, such as ReinMax()",
        )
