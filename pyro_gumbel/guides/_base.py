"""What guides that write themselves share: setup, plates, estimators, medians and quantiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from typing import Any, cast

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide.guides import AutoGuide
from pyro.infer.autoguide.initialization import init_to_median
from pyro.nn import PyroModule
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_gumbel.guides._latents import Latent, observed_sites, prototype, read_latent
from pyro_gumbel.guides._plates import read_plates
from pyro_gumbel.guides._point_estimates import PointEstimateMessenger, quantile
from pyro_gumbel.guides._stored import adopt_stored
from pyro_gumbel.infer._checks import latent_sites
from pyro_gumbel.infer.config import Config, GradientMessenger

__all__ = ["ParameterHead", "StructuredGuide"]


class StructuredGuide(AutoGuide):
    """A guide with one head a latent site, set up from a first run of the model.

    As with Pyro's autoguides, parameters that the parameter store has under the guide's names are
    taken over; ``pyro.clear_param_store()`` starts afresh.

    Args:
        model: The model.
        gradient: Config of ``config_gradient``, or ``"auto"`` for whatever ``Estimator_ELBO``
            takes by default.
        create_plates: As for Pyro's autoguides; left out, the model itself is asked.
        init_loc_fn: Where continuous global latents start from.
        init_scale: Their standard deviation at the start, relative to the prior's where the guide
            is of the prior's family, else in unconstrained space.
    """

    _stored: tuple[str, ...] = ("heads",)  # modules whose parameters are named after this guide
    _is_copy = False  # a copy keeps its values, whatever becomes of those in the store
    _has_all_elements = False  # those that the model leaves out of a subsample, too
    _asked_whole = False

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        gradient: Config = "auto",
        create_plates: Callable[..., Any] | None = None,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
    ) -> None:
        if not callable(model):
            raise TypeError(f"{type(self).__name__}: model must be callable; got {model!r}.")
        if not init_scale > 0:
            raise ValueError(
                f"{type(self).__name__}: init_scale must be positive; got {init_scale!r}."
            )
        super().__init__(model, create_plates=create_plates)
        self.gradient = gradient
        self.init_loc_fn = init_loc_fn
        self.init_scale = init_scale
        self._messenger = GradientMessenger(gradient)
        # So that state_dict has the state of schedules and baselines.
        self.estimators = nn.ModuleList(self._messenger.estimators())
        self.heads = nn.ModuleDict()
        self.latents: dict[str, Latent] = {}
        self._keys: dict[str, str] = {}

    @property
    def gradient_messenger(self) -> GradientMessenger:
        """Where ``Estimator_ELBO`` finds estimators with parameters of their own."""
        return self._messenger

    @property
    def model(self) -> Callable[..., Any]:
        """The model; to be assigned again after unpickling, which drops it."""
        if self._model is None:
            raise ValueError(
                f"This {type(self).__name__} was unpickled, which drops its model: write "
                "guide.model = model."
            )
        return self._model[0]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model":  # a tuple hides it: its parameters are not the guide's
            name, value = "_model", (value,)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        for parameter in self.parameters():
            # Pyro leaves a weak reference there, which cannot be pickled; it puts another when
            # the parameter is next used.
            parameter.__dict__.pop("unconstrained", None)
        return {**self.__dict__, "_model": None, "master": None, "_is_copy": True}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copy = self.__class__.__new__(self.__class__)
        memo[id(self)] = copy
        copy.__setstate__(deepcopy(self.__getstate__(), memo))
        copy._model = deepcopy(self._model, memo)
        return copy

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Look at the model and make the heads; the first call of the guide does so by itself.

        A new guide needs it before ``load_state_dict``, or before its parameters are listed.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        for name, module in self._modules.items():
            if name in self._stored and not (self._is_copy or isinstance(module, PyroModule)):
                adopt_stored(f"{self._pyro_name}.{name}", module)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        trace = prototype(self.model, self.init_loc_fn, args, kwargs)
        chosen = self._choose_sites(trace)
        self._check_gradient(trace, chosen)
        self.latents = {name: self._read(site) for name, site in chosen.items()}
        self._prototype_frames = {
            frame.name: frame for site in chosen.values() for frame in site["cond_indep_stack"]
        }
        self._make_heads(args, kwargs)
        self.prototype_trace = _restrict(trace, chosen)
        if self.master is not None:
            self.master()._check_prototype(self.prototype_trace)

    def _make_heads(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with poutine.block(), poutine.trace(param_only=True) as seen:
            self._create_plates(*args, **kwargs)
            inputs = self._inputs(args, kwargs)
        self._check_inputs(inputs, seen.trace)
        for latent in self.latents.values():
            self._keys[latent.name] = self._key(latent.name)
            self.heads[self._keys[latent.name]] = self._make_head(latent, inputs)

    def _choose_sites(self, trace: Trace) -> dict[str, Any]:
        """Choose the latent sites to guide."""
        return latent_sites(trace)

    def _read(self, site: Any) -> Latent:
        return read_latent(site, self.init_scale)

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute, once a call, what the heads read."""
        return None

    def _check_inputs(self, inputs: Any, params: Trace) -> None:
        """Look at what ``_inputs`` returned in the first run, and at the parameters it used."""

    def _make_head(self, latent: Latent, inputs: Any) -> nn.Module:
        """Make the module that holds or computes the numbers of a site's guide."""
        return ParameterHead(latent)

    def _key(self, name: str) -> str:
        """Name the site's module: a ModuleDict allows no dots and no names of its methods."""
        key = name.replace(".", "_")
        while key in self.heads or hasattr(self.heads, key):
            key += "_"
        return key

    def _check_gradient(self, trace: Trace, chosen: dict[str, Any]) -> None:
        if not isinstance(self.gradient, dict):
            return
        observed = observed_sites(trace)
        for name in self.gradient:
            if name in observed:
                raise ValueError(
                    f"{type(self).__name__}: gradient names site {name!r}, which is observed in "
                    "the model: only latent sites have a gradient estimator. The guide's sites "
                    f"are {list(chosen)}."
                )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if self.prototype_trace is None and any(
            key.startswith(f"{prefix}heads.") for key in state_dict
        ):
            raise RuntimeError(
                f"This {type(self).__name__} has not seen its model yet, so that it has no heads "
                "to load: write guide.setup(*args) with the model's arguments before "
                "guide.load_state_dict(...)."
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, pyro.plate]:
        if self.master is not None:
            return super()._create_plates(*args, **kwargs)
        plates = self.create_plates(*args, **kwargs) if self.create_plates is not None else []
        plates = [plates] if isinstance(plates, pyro.plate) else plates
        made = {plate.name: plate for plate in plates}
        missing = [name for name in self._prototype_frames if name not in made]
        for name, shape in read_plates(self.model, missing, args, kwargs).items():
            made[name] = (shape.whole() if self._asked_whole else shape).make()
        self.plates = made
        return made

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site.

        Returns:
            The values by site.
        """
        self.setup(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        # "auto" leaves the choice to the ELBO, whose default may be something else.
        with nullcontext() if self.gradient == "auto" else self._messenger:
            inputs = self._inputs(args, kwargs)
            values: dict[str, Tensor] = {}
            for latent in self.latents.values():
                with ExitStack() as stack:
                    for name in latent.plates.values():
                        stack.enter_context(plates[name])
                    fn = latent.build(self._numbers(latent, inputs, values))
                    values[latent.name] = pyro.sample(latent.name, fn)
        return values

    def _head(self, latent: Latent) -> Any:
        return self.heads[self._keys[latent.name]]

    def _numbers(self, latent: Latent, inputs: Any, values: dict[str, Tensor]) -> Tensor:
        """Find the numbers of a site's guide, given the values of the sites before it.

        Here they are a parameter, of which the plates' present elements are read.
        """
        raw = self._head(latent).raw
        for dim, name in latent.plates.items():
            size = raw.shape[dim - latent.event_dim]
            if size != self.plates[name].size:
                raise ValueError(
                    f"The plate {name!r} had {size} elements when the guide was set up and has "
                    f"{self.plates[name].size} now; site {latent.name!r} has parameters for each "
                    "element. Give the model the same data each time and subsample inside it, "
                    "pyro.plate(name, size, subsample_size=...), or use AutoAmortized."
                )
        return cast(Tensor, pyro.subsample(raw, event_dim=latent.event_dim))

    @contextmanager
    def _whole_plates(self) -> Iterator[None]:
        """Let a call give all elements of the plates that the model subsamples, if it can."""
        self._asked_whole = self._has_all_elements
        try:
            yield
        finally:
            self._asked_whole = False

    @torch.no_grad()
    def posterior(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the guide's distribution of each site, for the same arguments as the model.

        Where a site's guide depends on other sites' values, these are drawn.
        """
        with poutine.block(), self._whole_plates():
            trace = poutine.trace(self).get_trace(*args, **kwargs)
        return {name: trace.nodes[name]["fn"] for name in self.latents}

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return a central value of each site: the mode where it is discrete, else the median.

        The mean stands for the median of families that have none in closed form (Beta, Gamma,
        Dirichlet). Where a site's guide depends on other sites, it is given their central values.
        """
        with poutine.block(), PointEstimateMessenger(), self._whole_plates():
            return self(*args, **kwargs)

    @torch.no_grad()
    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return quantiles of each site whose values are ordered, ``(len(quantiles),) + shape``.

        One-hot vectors have no order and are left out, and so are sites of vectors with a joint
        constraint (Dirichlet); Beta and Gamma are asked by 1,000 draws.
        """
        with poutine.block(), PointEstimateMessenger(), self._whole_plates():
            trace = poutine.trace(self).get_trace(*args, **kwargs)
        levels = torch.as_tensor(quantiles)
        found = {name: quantile(trace.nodes[name]["fn"], levels) for name in self.latents}
        return {name: value for name, value in found.items() if value is not None}


class ParameterHead(nn.Module):
    """The numbers of a site's guide as a parameter of their own."""

    def __init__(self, latent: Latent) -> None:
        super().__init__()
        start = latent.start
        shape = list(start.shape)
        for dim, size in latent.sizes.items():
            shape[dim - latent.event_dim] = size
        if list(start.shape) != shape:  # the first run saw a part of the plates only
            dims = [dim - latent.event_dim for dim in latent.sizes]
            start = start.mean(dims, keepdim=True).expand(shape)
        self.raw = nn.Parameter(start.clone())


def _restrict(trace: Trace, chosen: dict[str, Any]) -> Trace:
    kept = Trace()
    for name, site in chosen.items():
        kept.add_node(name, **{key: value for key, value in site.items() if key != "name"})
    return kept
