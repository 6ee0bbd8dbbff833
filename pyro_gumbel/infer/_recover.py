"""Draw, decode or weigh the sites that a model sums over, given draws of the guide."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer.discrete import infer_discrete
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_gumbel._validate import check_programs, integer
from pyro_gumbel.distributions.families import masks, unwrap
from pyro_gumbel.infer._checks import latent_sites
from pyro_gumbel.infer._costs import score_of
from pyro_gumbel.infer._run import plate_nesting
from pyro_gumbel.infer._sampling import Layout, SharedSubsample
from pyro_gumbel.infer._state import preserved_rng, sole_step
from pyro_gumbel.infer._summed import SummedTerms, SumMessenger

__all__ = ["recover"]


def recover(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1,
    decode: bool = False,
    marginals: bool = False,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Recover the sites that :class:`~pyro_gumbel.infer.Estimator_ELBO` sums over.

    Each draw runs the guide once. Given the guide's values, the model's summed sites then have an
    exact posterior: along a chain, draws come from forward filtering and backward sampling.

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
        **kwargs: Keyword arguments of both.

    Returns:
        The guide's sites and the summed sites by name, ``(num_samples,) + shape of a value``; of
        marginals ``(num_samples,) + plates + (K,)``.

    Raises:
        ValueError: If both ``decode`` and ``marginals`` are set, if the model has no summed site,
            or if the logarithm of a sum cannot be scaled, as with a summed site outside of a
            subsampled plate.

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
    with sole_step(), torch.set_grad_enabled(marginals and torch.is_grad_enabled()):
        draws = [
            _recover_once(model, guide, args, kwargs, decode=decode, marginals=marginals)
            for _ in range(num_samples)
        ]
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


def _recover_once(
    model: Any, guide: Any, args: Any, kwargs: Any, *, decode: bool, marginals: bool
) -> dict[str, Tensor]:
    with poutine.block(), SharedSubsample():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        given = {name: site["value"] for name, site in latent_sites(guide_trace).items()}

        def run(layout: Layout, *, draws: bool) -> tuple[Trace, dict[str, int]]:
            sums = SumMessenger(guide_trace, layout, {}, draws=draws)
            replayed = poutine.replay(sums(model), trace=guide_trace)
            return poutine.trace(replayed).get_trace(*args, **kwargs), sums.dims

        with preserved_rng():
            plain = run(Layout(), draws=True)[0]
            nesting = plate_nesting(plain)
            trace, dims = run(Layout(nesting), draws=False)
        if not dims:
            raise ValueError(
                "recover: the model has no summed site. Mark a discrete site that the guide lacks "
                "by infer={'enumerate': 'parallel'}."
            )
        terms = _sums(trace, Layout(nesting), dims)
        list(terms.terms())  # checks the scales
        sites = {name: plain.nodes[name] for name in dims}
        if marginals:
            probs = terms.marginals()
            return {**given, **{name: _fit_probs(probs, site) for name, site in sites.items()}}
        indices = _Indices(dims, masked=decode)
        conditioned = indices(poutine.condition(model, data=given))
        temperature = 0 if decode else 1
        inferred = infer_discrete(
            conditioned, -1 - nesting, temperature, strict_enumeration_warning=False
        )
        found = poutine.trace(inferred).get_trace(*args, **kwargs)
    for name, site in sites.items():
        value = indices.look_up(name, found.nodes[name]["value"])
        shape = site["value"].shape
        given[name] = value[(0,) * (value.dim() - len(shape))].expand(shape)
    return given


def _fit_probs(probs: dict[str, Tensor], site: Any) -> Tensor:
    """Give a site's probabilities the shape ``plates + (K,)``."""
    plates = site["fn"].batch_shape
    if site["name"] not in probs:  # of a site with one value, over which there is nothing to sum
        return torch.ones(*plates, 1)
    found = probs[site["name"]]
    return found.reshape(*plates, found.shape[-1])


class _Indices(Messenger):
    """Lets handlers outside see the index of a summed site's value, as Pyro's recovery needs it.

    Args:
        names: The summed sites.
        masked: Leave masks on them. A sum has all probabilities of each of its sites. But the most
            probable values of a sequence should not depend on those past its end.
    """

    def __init__(self, names: Iterable[str], *, masked: bool) -> None:
        super().__init__()
        self._masked = masked
        self._supports = dict.fromkeys(names, torch.empty(0))

    def look_up(self, name: str, index: Tensor) -> Tensor:
        return self._supports[name][index]

    def _pyro_sample(self, msg: Message) -> None:
        name = cast(str, msg["name"])
        if name not in self._supports:
            return
        fn = cast(Any, msg["fn"])
        bare = unwrap(fn)
        support = bare.enumerate_support(expand=False)
        indices = dist.Categorical(logits=bare.log_prob(support).movedim(0, -1))
        self._supports[name] = support.reshape(-1, *bare.event_shape)
        if self._masked:
            for mask in masks(fn):
                indices = indices.mask(mask)
        else:
            msg["mask"] = None
        msg["fn"] = indices

    def _pyro_post_sample(self, msg: Message) -> None:
        name = cast(str, msg["name"])
        if name in self._supports:
            msg["value"] = self.look_up(name, cast(Tensor, msg["value"]))


def _sums(trace: Trace, layout: Layout, dims: dict[str, int]) -> SummedTerms:
    terms = SummedTerms(trace, layout, dims)
    for site in trace.nodes.values():
        if site["type"] == "sample" and not poutine.util.site_is_subsample(site):
            terms.takes(site, score_of(site), layout.total_nesting)
    return terms
