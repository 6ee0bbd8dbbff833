"""Base class of the automatic guides: set-up, plates, estimators, medians and quantiles."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
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
from pyro_gumbel.infer._checks import guided_sites
from pyro_gumbel.infer.config import Config, GradientMessenger

__all__ = ["StructuredGuide"]


class StructuredGuide(AutoGuide):
    """A guide with one head per latent site; ``AutoDiscrete`` documents the arguments."""

    # Overrides private methods of Pyro's AutoGuide. If Pyro renames _model, _setup_prototype,
    # _create_plates, _prototype_frames or _check_prototype, this class fails inside AutoGuideList.
    _stored: tuple[str, ...] = ("heads",)  # modules that the store names after this guide
    _is_copy = False  # a copy keeps its values and ignores those in the store
    _has_all_elements = False  # whether there are parameters for elements outside a subsample
    _ignores_subsamples = False

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
        # In it Estimator_ELBO finds estimators with parameters.
        self.gradient_messenger = GradientMessenger(gradient)
        # Registered, so that state_dict has the state of schedules and baselines.
        self.estimators = nn.ModuleList(self.gradient_messenger.estimators())
        self.heads = nn.ModuleDict()
        self.latents: dict[str, Latent] = {}
        self._keys: dict[str, str] = {}

    @property
    def model(self) -> Callable[..., Any]:
        """The model. Pickling drops it, so assign it again after unpickling."""
        if self._model is None:
            raise ValueError(
                f"This {type(self).__name__} was unpickled, and pickling drops its model; write "
                "guide.model = model."
            )
        return self._model[0]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model":  # in a tuple, so that its parameters are not registered
            name, value = "_model", (value,)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        for parameter in self.parameters():
            # Pyro's weak reference cannot be pickled. Pyro makes a new one at the next use.
            parameter.__dict__.pop("unconstrained", None)
        return {**self.__dict__, "_model": None, "master": None, "_is_copy": True}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copy = self.__class__.__new__(self.__class__)
        memo[id(self)] = copy
        copy.__setstate__(deepcopy(self.__getstate__(), memo))
        copy._model = deepcopy(self._model, memo)
        return copy

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Run the model once and make the heads, as the first call of the guide does.

        Call this before ``load_state_dict``, and before listing the parameters, of a new guide.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        for name, module in self._modules.items():
            if name in self._stored and not (self._is_copy or isinstance(module, PyroModule)):
                _adopt_stored(f"{self._pyro_name}.{name}", module)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        trace = prototype(self.model, self.init_loc_fn, args, kwargs)
        chosen = self._choose_sites(trace)
        self._check_gradient(trace, chosen)
        self.latents = {name: self._read(site) for name, site in chosen.items()}
        self._prototype_frames = {
            frame.name: frame for site in chosen.values() for frame in site["cond_indep_stack"]
        }
        self._make_heads(args, kwargs)
        for name in set(trace.nodes) - set(chosen):
            trace.remove_node(name)
        self.prototype_trace = trace
        if self.master is not None:
            self.master()._check_prototype(self.prototype_trace)

    def _make_heads(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with poutine.block(), poutine.trace(param_only=True) as seen:
            self._create_plates(*args, **kwargs)
            inputs = self._inputs(args, kwargs)
        self._check_inputs(inputs, seen.trace)
        for name, latent in self.latents.items():
            self._keys[name] = self._key(name)
            self.heads[self._keys[name]] = self._make_head(latent, inputs)

    def _choose_sites(self, trace: Trace) -> dict[str, Any]:
        """Return the latent sites of this guide."""
        return guided_sites(trace)

    def _read(self, site: Any) -> Latent:
        return read_latent(site, self.init_scale)

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute the inputs of the heads, once per call."""
        return None

    def _check_inputs(self, inputs: Any, params: Trace) -> None:
        """Check the inputs of the first run and the parameters that made them."""

    def _make_head(self, latent: Latent, inputs: Any) -> nn.Module:
        """Make the module of the unconstrained parameters of a site's guide."""
        return _parameter_head(latent)

    def _key(self, name: str) -> str:
        """Return a key for ``heads``; a ModuleDict forbids dots and names of its methods."""
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
                    f"{type(self).__name__}: gradient has an estimator for site {name!r}, which "
                    "is observed in the model; only latent sites have estimators. The guide's "
                    f"sites are {list(chosen)}."
                )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if self.prototype_trace is None and any(
            key.startswith(f"{prefix}heads.") for key in state_dict
        ):
            raise RuntimeError(
                f"This {type(self).__name__} is not set up, so it has no heads to load. Call "
                "guide.setup(*args) with the model's arguments before guide.load_state_dict(...)."
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, pyro.plate]:
        if self.master is not None:
            return super()._create_plates(*args, **kwargs)
        plates = self.create_plates(*args, **kwargs) if self.create_plates is not None else []
        plates = [plates] if isinstance(plates, pyro.plate) else plates
        self.plates = {plate.name: plate for plate in plates}
        missing = [name for name in self._prototype_frames if name not in self.plates]
        for name, options in read_plates(self.model, missing, args, kwargs).items():
            if self._ignores_subsamples:
                options |= {"subsample_size": None, "subsample": None}
            self.plates[name] = pyro.plate(name, **options)
        return self.plates

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site; return the values by site."""
        self.setup(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        # With "auto" the ELBO's default applies, so no estimators are attached.
        with nullcontext() if self.gradient == "auto" else self.gradient_messenger:
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
        """Return a site's unconstrained parameters, given the values of the sites before it."""
        raw = self._head(latent).raw
        for dim, name in latent.plates.items():
            size = raw.shape[dim - latent.event_dim]
            if size != self.plates[name].size:
                raise ValueError(
                    f"The plate {name!r} had {size} elements when the guide was set up and has "
                    f"{self.plates[name].size} now, but site {latent.name!r} has parameters for "
                    "each element. Call the model with the same data each time and subsample "
                    "inside it, pyro.plate(name, size, subsample_size=...), or use AutoAmortized."
                )
        return cast(Tensor, pyro.subsample(raw, event_dim=latent.event_dim))

    @torch.no_grad()
    def _run(
        self, args: Any, kwargs: Any, handler: AbstractContextManager[Any]
    ) -> dict[str, dict[str, Any]]:
        """Run the guide apart from other programs, for all elements if it has them all."""
        self._ignores_subsamples = self._has_all_elements
        try:
            with poutine.block(), handler:
                trace = poutine.trace(self).get_trace(*args, **kwargs)
        finally:
            self._ignores_subsamples = False
        return {name: trace.nodes[name] for name in self.latents}

    def posterior(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the guide's distribution of each site, for the arguments of the model.

        If a site's distribution depends on other sites, their values are drawn.
        """
        sites = self._run(args, kwargs, nullcontext())
        return {name: site["fn"] for name, site in sites.items()}

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the mode of each discrete site and the median of each continuous one.

        Families without a closed-form median (Beta, Gamma, Dirichlet) return the mean. If a site's
        distribution depends on other sites, it is conditioned on their central values.
        """
        sites = self._run(args, kwargs, PointEstimateMessenger())
        return {name: site["value"] for name, site in sites.items()}

    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return quantiles of each site with ordered values, ``(len(quantiles),) + shape``.

        The result omits sites of vectors without an order (one-hot, Dirichlet). Quantiles of Beta
        and Gamma are estimated by 1,000 draws.
        """
        sites = self._run(args, kwargs, PointEstimateMessenger())
        levels = torch.as_tensor(quantiles)
        found = {name: quantile(site["fn"], levels) for name, site in sites.items()}
        return {name: value for name, value in found.items() if value is not None}


def _parameter_head(latent: Latent) -> nn.ParameterDict:
    """Return the unconstrained parameters of a site's guide, one for each element."""
    start, shape = latent.start, list(latent.start.shape)
    for dim, size in latent.sizes.items():
        shape[dim - latent.event_dim] = size
    if list(start.shape) != shape:  # the first run had a subsample of the plates
        dims = [dim - latent.event_dim for dim in latent.sizes]
        start = start.mean(dims, keepdim=True).expand(shape)
    return nn.ParameterDict({"raw": nn.Parameter(start.clone())})


@torch.no_grad()
def _adopt_stored(prefix: str, module: nn.Module) -> None:
    """Replace a module's parameters by those that the store has under its names.

    The optimiser trains the parameters in the store, so others would silently not be trained.
    ``prefix`` is the module's name in ``pyro.module``.
    """
    store = pyro.get_param_store()
    unconstrained = dict(store.named_parameters())
    for path, parameter in list(module.named_parameters()):
        name = f"{prefix}$$${path}"
        stored = unconstrained.get(name)
        if stored is None or stored is parameter:
            continue
        if stored.shape != parameter.shape:
            raise ValueError(
                f"The parameter store has {name!r} with shape {tuple(stored.shape)}; this guide "
                f"needs shape {tuple(parameter.shape)}. Call pyro.clear_param_store() before "
                "making a new guide."
            )
        if isinstance(stored, nn.Parameter):
            owner, _, leaf = path.rpartition(".")
            setattr(module.get_submodule(owner), leaf, stored)
        else:
            parameter.copy_(stored)
            del store[name]  # the module's parameter replaces it when the guide runs
