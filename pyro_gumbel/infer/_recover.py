"""Draw or decode the sites that a model sums over, or compute their probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pyro.poutine as poutine
import torch
from opt_einsum import get_symbol  # type: ignore[import-untyped]
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.einsum.adjoint import require_backward
from pyro.ops.rings import MapRing, SampleRing
from pyro.poutine import Trace
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_gumbel._validate import check_programs, integer
from pyro_gumbel.distributions.families import unwrap
from pyro_gumbel.estimators import Call, Estimator, Pathwise, Score
from pyro_gumbel.infer._checks import PARTICLE_PLATE, latent_sites
from pyro_gumbel.infer._costs import score_of, site_frames
from pyro_gumbel.infer._dependence import Dependence
from pyro_gumbel.infer._dimensions import GuideDims
from pyro_gumbel.infer._execution import preflight
from pyro_gumbel.infer._run import DeeperPlates, run_programs
from pyro_gumbel.infer._sampling import Layout, Memory, Sampler, SharedSubsample
from pyro_gumbel.infer._state import sole_step
from pyro_gumbel.infer._summed import SummedTerms, is_summed

__all__ = ["Recovered", "recover"]


class Recovered(dict[str, Tensor]):
    """Joint draws of one chain, by the name of the site."""


def recover(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1,
    decode: bool = False,
    marginals: bool = False,
    parallel: bool = False,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Recover the sites that :class:`~pyro_gumbel.infer.Estimator_ELBO` sums over.

    Given the guide's values, the summed sites have an exact posterior: along a chain, draws come
    from forward filtering and backward sampling. *Unbiased*: draws are independent, and exact
    given the guide's values. *Cost*: one run of guide and model to count plates, and one for each
    draw. If ``parallel``, one run makes all draws.

    The draws fit Pyro's ``Predictive(model, draws)`` and
    ``pyro_gumbel.diagnostics.to_arviz(..., posterior=draws)``.

    Args:
        model: The model, with sites marked ``infer={"enumerate": "parallel"}``.
        guide: The guide, without these sites.
        *args: Arguments of both.
        num_samples: Number of draws.
        decode: Return the jointly most probable values of the summed sites, given each draw of the
            guide, instead of draws.
        marginals: Return each summed site's posterior probabilities, given each draw of the guide.
            They have a gradient. The probability of the site's ``k``-th value, in the order of
            ``enumerate_support``, is at ``[..., k]``.
        parallel: Evaluate all draws at once, in a plate left of the programs' own, as
            ``vectorize_particles`` does. The programs must broadcast over it.
        **kwargs: Keyword arguments of both.

    Returns:
        Tensors by name, for the guide's sites that are not auxiliary and for the summed sites.
        Values have the shape ``(num_samples,) + shape of the site``. Marginals have
        ``(num_samples,) + plates + (K,)``.

    Raises:
        ValueError: If both ``decode`` and ``marginals`` are set, if the model has no summed site,
            if a plate draws a minibatch, if factors of one sum have different scales (as when a
            summed site is outside of a subsampled plate), if the data have probability zero, or if
            draws differ in sites or shapes. The errors of the losses are raised, too.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        ...     pyro.sample("x", dist.Normal(4 * z, 1.0), obs=x)
        >>> recover(model, lambda x: None, torch.tensor(3.9), decode=True)
        {'z': tensor([1.])}
        >>> with torch.no_grad():
        ...     recover(model, lambda x: None, torch.tensor(2.0), marginals=True)
        {'z': tensor([[0.5000, 0.5000]])}
    """
    check_programs(model, guide)
    integer("recover: num_samples", num_samples, 1)
    if decode and marginals:
        raise ValueError("recover: give decode=True or marginals=True, not both.")
    call = Call(model, guide, args, kwargs)
    draws: list[dict[str, Tensor]] = []
    with sole_step(), torch.set_grad_enabled(marginals and torch.is_grad_enabled()):
        _, nesting = preflight(call, _choose)
        layout = Layout(nesting, repetitions=num_samples if parallel else 1, vectorized=parallel)
        while len(draws) * layout.repetitions < num_samples:
            try:
                dependence = None if draws else Dependence(restore=False)  # checks the scopes
                draws.append(
                    _recover(call, layout, dependence, decode=decode, marginals=marginals)
                )
            except DeeperPlates as error:
                layout = replace(layout, plate_nesting=error.nesting)
    return Recovered({name: _join(name, draws) for name in {n: 0 for d in draws for n in d}})


def _choose(msg: Message) -> Estimator:
    return Pathwise() if getattr(msg["fn"], "has_rsample", False) else Score()


def _join(name: str, draws: list[dict[str, Tensor]]) -> Tensor:
    shapes = {tuple(draw[name].shape[1:]) if name in draw else None for draw in draws}
    if len(shapes) > 1:
        raise ValueError(
            f"recover: draws of site {name!r} differ in shape, or some lack it: "
            f"{sorted(shapes, key=str)}. Call recover with num_samples=1 for each."
        )
    return torch.cat([draw[name] for draw in draws])


class _Whole(SharedSubsample):
    """Refuses plates that draw a minibatch, because the result does not hold its indices."""

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg) and msg["value"] is None:
            size, drawn = (getattr(msg["fn"], name) for name in ("size", "subsample_size"))
            if drawn is not None and drawn < size:
                raise ValueError(
                    f"recover: plate {msg['name']!r} draws {drawn} of {size} data, and the result "
                    "would not show which. Choose them by pyro.plate(..., subsample=indices), or "
                    "run the programs on all data."
                )
        super()._pyro_sample(msg)


def _recover(
    call: Call, layout: Layout, dependence: Dependence | None, *, decode: bool, marginals: bool
) -> dict[str, Tensor]:
    """Run the programs once, and return the sites with the draws first."""
    sampler = Sampler(layout, _choose, Memory(), exact=True, verify=True, dependence=dependence)
    with poutine.block(), dependence or nullcontext():
        model_trace, guide_trace = run_programs(call, sampler, _Whole())
        posterior = _Posterior(model_trace, layout, sampler, decode=decode)
    if not sampler.summed:
        raise ValueError(
            "recover: the model has no summed site. Mark a discrete site that the guide lacks by "
            "infer={'enumerate': 'parallel'}."
        )
    found = {
        name: _by_draw(site["value"], site, layout, site["fn"].event_dim)
        for name, site in latent_sites(guide_trace).items()
        if not site["infer"].get("is_auxiliary")
    }
    summed = posterior.probs() if marginals else posterior.values()
    for name, value in summed.items():
        site = posterior.sites[name]
        found[name] = _by_draw(value, site, layout, 1 if marginals else site["fn"].event_dim)
    return found


def _by_draw(value: Tensor, site: Any, layout: Layout, event_dim: int) -> Tensor:
    """Put the draws first, then the dimensions of the site's own plates and events."""
    rows = layout.split(value, event_dim)[0]
    own = [frame.dim for frame in site_frames(site) if frame.name != PARTICLE_PLATE]
    most = 1 - min(own, default=0) + event_dim
    while layout.vectorized and rows.dim() > most and rows.shape[1] == 1:
        rows = rows.squeeze(1)
    return rows


def _plate_symbols(trace: Trace) -> dict[str, str]:
    """Return a symbol for each plate, inner plates first.

    Pyro's backward sampling expects the plates of draws in the order of their symbols.
    """
    nesting: dict[str, int] = {}  # the smallest number of plates around a site in this plate
    for site in trace.nodes.values():
        frames = site_frames(site) if site["type"] == "sample" else ()
        for frame in frames:
            nesting[frame.name] = min(len(frames), nesting.get(frame.name, len(frames)))
    names = sorted(nesting, key=nesting.__getitem__, reverse=True)
    return {name: get_symbol(2 * index) for index, name in enumerate(names)}


class _Posterior:
    """The exact posterior of the summed sites of a run.

    Args:
        trace: The model's trace.
        layout: The paths of the run.
        sampler: The sampler of the run.
        decode: Maximise instead of drawing.

    Attributes:
        sites: The summed sites.
    """

    def __init__(self, trace: Trace, layout: Layout, sampler: Sampler, *, decode: bool) -> None:
        self.sites = {name: trace.nodes[name] for name in sampler.summed}
        self._trace = trace
        self._ring = MapRing if decode else SampleRing
        dims = GuideDims(_plate_symbols(trace))
        self._terms = SummedTerms(trace, layout, sampler.summed, sampler.dependence, dims)
        for site in trace.nodes.values():
            if site["type"] == "sample" and not site_is_subsample(site):
                raw = score_of(site)
                if decode and is_summed(site):  # steps past a sequence's end should not count
                    raw = scale_and_mask(raw, mask=site["mask"])
                self._terms.takes(site, raw, layout.total_nesting)
        self._symbols = {name: s["infer"]["_enumerate_symbol"] for name, s in self.sites.items()}
        # Each site's own factor. A site of one value has no dimension to sum, and is left out.
        self._own = {
            factor.name: factor
            for factor in self._terms.factors
            if self._symbols.get(factor.name, " ") in factor.dims
        }

    def values(self) -> dict[str, Tensor]:
        """Return joint values, ``plates + event``."""
        sizes: dict[str, int] = {}
        for factor in self._terms.factors:
            factor.value = _sorted(factor.value)
            sizes.update(zip(factor.dims, factor.value.shape, strict=True))
            # Pyro's backward sampling needs only plates of several elements.
            factor.frames = {dim: f for dim, f in factor.frames.items() if dim in factor.dims}
        for factor in self._own.values():
            require_backward(factor.value)
        for total in self._totals(self._ring(dim_to_size=sizes)):
            total._pyro_backward()  # type: ignore[attr-defined]
        return {name: self._value(name) for name in self.sites}

    def _totals(self, ring: Any = None) -> Iterator[Tensor]:
        for name, _, _, total in self._terms.sums(ring):
            if torch.isneginf(total).any():
                raise ValueError(
                    "recover: the data have probability zero given the guide's draw, whatever the "
                    f"values of the summed site {name!r} and of the sites summed with it."
                )
            yield total

    def _value(self, name: str) -> Tensor:
        fn = unwrap(self.sites[name]["fn"])
        index = torch.zeros((), dtype=torch.long)
        if name in self._own:
            drawn: Any = self._own[name].value._pyro_backward_result  # type: ignore[attr-defined]
            index = drawn[drawn._pyro_sample_dims.index(self._symbols[name])]
            index._pyro_dims = drawn._pyro_dims[1:]
            index = packed.unpack(index, self._trace.symbol_to_dim)
        support = fn.enumerate_support(expand=False).reshape(-1, *fn.event_shape)
        return support[index.to(support.device).expand(self._plates(name))]

    def probs(self) -> dict[str, Tensor]:
        """Return marginal probabilities, ``plates + (K,)``, with gradient.

        A probability is the derivative of the log evidence by the value's log-probability.
        """
        create_graph = torch.is_grad_enabled()
        found = {
            name: torch.ones(*self._plates(name), 1, device=site["value"].device)
            for name, site in self.sites.items()
        }
        if not self._own:
            return found
        with torch.enable_grad():
            shifts = []
            for factor in self._own.values():
                dims = factor.dims
                shifts.append(torch.zeros_like(factor.value, requires_grad=True))
                factor.value = factor.value + shifts[-1]
                factor.value._pyro_dims = dims  # type: ignore[attr-defined]
            totals = [total.sum() for total in self._totals()]
            grads = torch.autograd.grad(totals, shifts, create_graph=create_graph)
        for (name, factor), grad in zip(self._own.items(), grads, strict=True):
            found[name] = self._marginal(name, factor.dims, grad)
        return found

    def _marginal(self, name: str, dims: str, joint: Tensor) -> Tensor:
        """Sum packed probabilities over other summed sites, and put the site's values last."""
        own, plates = self._symbols[name], self._plates(name)
        others = [i for i, dim in enumerate(dims) if dim != own and dim in self._symbols.values()]
        probs = joint.sum(others) if others else joint
        probs._pyro_dims = "".join(dim for i, dim in enumerate(dims) if i not in others)  # type: ignore[attr-defined]
        probs = packed.unpack(probs, self._trace.symbol_to_dim)
        probs = probs.movedim(self.sites[name]["infer"]["_enumerate_dim"], -1)
        return probs.reshape(*probs.shape[-1 - len(plates) :]).expand(*plates, -1)

    def _plates(self, name: str) -> list[int]:
        """Return the sizes of a site's plates."""
        site = self.sites[name]
        dims = {frame.dim for frame in site_frames(site)}
        return [
            site["fn"].batch_shape[dim] if dim in dims else 1
            for dim in range(min(dims, default=0), 0)
        ]


def _sorted(value: Any) -> Any:
    """Put packed dimensions in the order of their symbols."""
    dims = "".join(sorted(value._pyro_dims))
    result = value.permute([value._pyro_dims.index(dim) for dim in dims])
    result._pyro_dims = dims
    return result
