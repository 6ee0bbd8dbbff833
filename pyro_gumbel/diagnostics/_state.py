"""Parameters, seeds, copies of estimators: what a measurement uses, and has to put back."""

from __future__ import annotations

import copy
import fnmatch
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer.elbo import ELBO
from pyro.infer.util import torch_item
from pyro.ops.jit import CompiledFunction
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor, UntypedStorage, nn
from torch.distributions import constraints, transform_to

from pyro_gumbel._validate import is_integer
from pyro_gumbel.estimators import Call, Estimator
from pyro_gumbel.infer import Estimator_ELBO, config_gradient
from pyro_gumbel.infer._checks import PARTICLE_PLATE
from pyro_gumbel.infer._costs import site_frames
from pyro_gumbel.infer._operations import Undo
from pyro_gumbel.infer._operations import leaves as nested
from pyro_gumbel.infer._state import preserved_rng
from pyro_gumbel.infer.config import configure_module

__all__ = [
    "EvaluationCounter",
    "Keeper",
    "Params",
    "Replica",
    "Step",
    "check_complete",
    "find_parameters",
    "preserved",
    "read_gradients",
    "seed_everything",
    "seed_torch",
    "seeds",
]

_TRIALS = 3  # runs, since some runs may not reach every parameter

Params = Mapping[str, Any] | Iterable[str] | str | None


def seeds(seed: int, number: int) -> list[int]:
    """Spread one seed into several, for streams that do not overlap."""
    if not is_integer(seed):
        raise TypeError(f"seed must be an integer such as seed=0; got {seed!r}.")
    if seed < 0:
        raise ValueError(f"seed must not be negative; got {seed}.")
    return [int(word) for word in np.random.SeedSequence(int(seed)).generate_state(number)]


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, those of all devices."""
    pyro.set_rng_seed(seed % 2**32)


def seed_torch(seed: int) -> None:
    """Seed torch's generators in use; ``torch.manual_seed`` takes a millisecond without CUDA."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


class Keeper(Undo):
    """Remembers parameters, and memory that programs write to inside it, and puts them back.

    As a context it undoes the writes of a run, and remembers the parameters that are in no store.
    It sees the operations of its own thread only.
    """

    def __init__(self) -> None:
        super().__init__()
        self._leaves: dict[int, tuple[Tensor, Tensor, Tensor, Tensor | None]] = {}
        self._written: dict[Any, tuple[UntypedStorage, UntypedStorage]] = {}

    def remember(self, leaves: Iterable[Tensor]) -> None:
        """Remember leaves with their gradients, and clear these."""
        for leaf in leaves:
            if id(leaf) not in self._leaves:
                self._leaves[id(leaf)] = (leaf, leaf.data, leaf.data.clone(), leaf.grad)
                leaf.grad = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [value for value in nested((args, kwargs)) if isinstance(value, Tensor)]
        self.remember(tensor for tensor in tensors if tensor.is_leaf and tensor.requires_grad)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def __exit__(self, *error: Any) -> None:
        self._written = {**self._copies, **self._written}
        super().__exit__(*error)

    @torch.no_grad()
    def restore(self) -> None:
        for leaf, storage, value, gradient in self._leaves.values():
            if not torch.equal(storage, value):
                storage.copy_(value)
            leaf.data, leaf.grad = storage, gradient
        for memory, contents in self._written.values():
            memory.copy_(contents)


@contextmanager
def preserved() -> Iterator[Keeper]:
    """Restore parameters, their gradients, buffers and random number generators on exit.

    Parameters that a program makes inside are removed from Pyro's store. The keeper restores other
    tensors only if it has seen them: first run the programs inside it.
    """
    store, keep = pyro.get_param_store(), Keeper()
    keep.remember(leaf for _, leaf in store.named_parameters())
    with ExitStack() as stack:
        # A scope cuts the links from values to unconstrained ones; reading the values ties them.
        stack.callback(lambda: list(store.values()))
        stack.enter_context(preserved_rng())
        stack.enter_context(store.scope(store.get_state()))
        stack.callback(keep.restore)
        yield keep


@torch.no_grad()
def find_parameters(call: Call, keep: Keeper, params: Params = None) -> dict[str, Tensor]:
    """Run guide and model and list the unconstrained leaves of their parameters by name.

    ``params`` has names or shell patterns to which the list is cut; or values to give to
    parameters, in their constrained space.
    """
    sites: dict[str, Any] = {}
    for _ in range(_TRIALS):
        with keep, poutine.trace(param_only=True) as capture:
            guide = poutine.trace(call.guide).get_trace(*call.args, **call.kwargs)
            poutine.replay(call.model, trace=guide)(*call.args, **call.kwargs)
        found = capture.trace.nodes.items()
        sites |= {name: site for name, site in found if site["type"] == "param"}
    values = {name: site["value"] for name, site in sites.items()}
    leaves = {name: getattr(v, "unconstrained", lambda v=v: v)() for name, v in values.items()}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    keep.remember(leaves.values())
    if not leaves:
        raise ValueError(
            "Neither the guide nor the model has a parameter: write pyro.param(...) or "
            "pyro.module(...) in them, or make them PyroModules."
        )
    store = pyro.get_param_store()
    if isinstance(params, Mapping):
        known = store.get_state()["constraints"]
        for name, value in params.items():
            _check_known(name, [name] if name in leaves else [], leaves)
            constraint = known.get(name) or sites[name]["kwargs"].get("constraint")
            _set_value(name, leaves[name], value, constraint or constraints.real)
    elif params is not None:
        return _select({**leaves, **dict(store.named_parameters()), **leaves}, params)
    return leaves


def _set_value(name: str, leaf: Tensor, value: Any, constraint: Any) -> None:
    try:
        value = torch.as_tensor(value, dtype=leaf.dtype, device=leaf.device)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"params: the value for {name!r} must be a tensor or number; got {value!r}."
        ) from error
    if not constraint.check(value).all():
        raise ValueError(
            f"params: the value for {name!r} must satisfy {constraint!r}, the parameter's "
            f"constraint; got {value.detach().cpu().numpy()}."
        )
    transform = transform_to(constraint)
    unconstrained = transform.inv(value)
    if unconstrained.shape != leaf.shape:
        raise ValueError(
            f"params: the value for {name!r} has shape {tuple(value.shape)}; the parameter has "
            f"{tuple(transform(leaf).shape)}."
        )
    # A tensor of its own: the caller's storage is put back afterwards, untouched.
    leaf.data = unconstrained.clone()


def _select(leaves: dict[str, Tensor], params: Any) -> dict[str, Tensor]:
    patterns = [params] if isinstance(params, str) else params
    patterns = list(patterns) if isinstance(patterns, Iterable) else [None]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(
            "params must be names of parameters, such as params=['logits'], or a dict of their "
            f"values; got {params!r}."
        )
    if not patterns:
        raise ValueError(f"params is empty; the parameters are {list(leaves)}.")
    chosen: list[str] = []
    for pattern in patterns:
        found = [pattern] if pattern in leaves else fnmatch.filter(leaves, pattern)
        _check_known(pattern, found, leaves)
        chosen += found
    return {name: leaf for name, leaf in leaves.items() if name in chosen}


def _check_known(name: str, found: list[str], leaves: dict[str, Tensor]) -> None:
    if not found:
        raise ValueError(f"params: no parameter is called {name!r}; there are {list(leaves)}.")


def check_complete(leaves: dict[str, Tensor], params: Params) -> None:
    """Raise an error if a gradient reached a parameter that the trial runs did not use."""
    if params is not None and not isinstance(params, Mapping):
        return
    recorded = {id(leaf) for leaf in leaves.values()}
    for name, leaf in pyro.get_param_store().named_parameters():
        own = not name.startswith("gradient$")  # those belong to an estimator
        if own and leaf.grad is not None and id(leaf) not in recorded:
            raise ValueError(
                f"Parameter {name!r} was met in some runs only. Call the guide until it is in "
                f"Pyro's parameter store, and name all: params={[*leaves, name]}."
            )


def read_gradients(leaves: dict[str, Tensor]) -> list[Tensor]:
    """Take the gradients off the leaves; one that was not reached is zero."""
    gradients = []
    for leaf in leaves.values():
        gradients.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
        leaf.grad = None
    return gradients


class Step(NamedTuple):
    """The record of a gradient: the loss, its seconds, and evaluations of the model."""

    loss: float
    seconds: float
    evaluations: int


class Replica:
    """One independent copy of an estimator, with the state that the original had.

    ``choice`` is a config, an ``ELBO``, or a pair of the two; options of particles are for a
    config alone.
    """

    def __init__(
        self, choice: Any, call: Call, num_particles: int = 1, vectorize_particles: bool = False
    ) -> None:
        if isinstance(choice, ELBO):
            choice = (None, choice)
        elif not isinstance(choice, tuple):
            elbo = Estimator_ELBO(num_particles, vectorize_particles=vectorize_particles)
            choice = (choice, elbo)
        if len(choice) != 2 or not isinstance(choice[1], ELBO):
            raise TypeError(
                "estimators: a pair must be (config, ELBO), such as (ReinMax(), "
                f"Estimator_ELBO(num_particles=4)); got {choice!r}."
            )
        config, elbo = choice
        # A copy of all that it holds, except the programs and what is compiled of them.
        compiled = [value for value in vars(elbo).values() if isinstance(value, CompiledFunction)]
        shared = [call.model, call.guide, *compiled]
        self.elbo = copy.deepcopy(elbo, {id(value): value for value in shared})
        self.call = call
        self.counter = EvaluationCounter()
        counted = self.counter.count(call)
        self.model = counted.model
        guide = counted.guide if config is None else config_gradient(counted.guide, config)
        # The outermost configuration sees what the inner ones chose, and puts copies in its place.
        self.guide = config_gradient(guide, self._replace)
        self.on_site: Callable[[str], None] | None = None
        self.sites: dict[str, None] = {}
        self._copies: dict[int, tuple[Estimator, Estimator]] = {}

    def step(self) -> Step:
        """Estimate the gradient once, into ``.grad``."""
        before, start = self.counter.total, time.perf_counter()
        with torch.enable_grad():
            loss = self.elbo.loss_and_grads(
                self.model, self.guide, *self.call.args, **self.call.kwargs
            )
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        loss = loss[0] if isinstance(loss, tuple) else loss  # as of reweighted wake-sleep
        return Step(torch_item(loss), seconds, self.counter.total - before)

    def save(self) -> Callable[[], None]:
        """Remember the estimators' state; return what puts it back."""
        held = [own for _, own in self._copies.values()]
        held += [value for value in nested(vars(self.elbo)) if isinstance(value, Estimator)]
        states = [(estimator, copy.deepcopy(estimator.state_dict())) for estimator in held]

        def restore() -> None:
            for estimator, state in states:
                estimator.load_state_dict(copy.deepcopy(state))

        return restore

    def _replace(self, msg: Any) -> Any:
        self.sites[msg["name"]] = None
        if self.on_site is not None:
            self.on_site(msg["name"])
        chosen = (msg["infer"] or {}).get("gradient")
        if not isinstance(chosen, Estimator):
            return chosen
        if id(chosen) not in self._copies:
            # The original is kept beside its copy, so that its id stays its own.
            self._copies[id(chosen)] = (chosen, copy.deepcopy(chosen))
        return self._copies[id(chosen)][1]


class EvaluationCounter(Messenger):
    """Counts evaluations of a model, whether they are runs of their own or parts of one run.

    A run counts with the number of elements, left of the model's own plates, of the site that has
    the most: particles and enumerated values are such elements.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def count(self, call: Call) -> Call:
        """Return the programs; runs of the model, or of a guide that runs it, are counted."""
        if isinstance(call.guide, GuideMessenger):
            return replace(call, guide=configure_module(call.guide, self))
        if isinstance(call.model, nn.Module):  # estimators look at its signature and parameters
            return replace(call, model=configure_module(call.model, self))
        counted = functools.partial(self.run, call.model)
        return replace(call, model=functools.update_wrapper(counted, call.model))

    def run(self, program: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the model once, and count."""
        self._elements = 1
        with self:
            result = program(*args, **kwargs)
        self.total += self._elements
        return result

    def _pyro_post_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            return
        fn: Any = msg["fn"]
        batch = list(fn.batch_shape)
        for frame in site_frames(msg):
            inside = frame.dim is not None and len(batch) >= -frame.dim
            if frame.name != PARTICLE_PLATE and inside:
                batch[frame.dim] = 1
        self._elements = max(self._elements, math.prod(batch))
