"""An automatic amortised guide from a model and an encoder."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_gumbel.guides._base import StructuredGuide
from pyro_gumbel.guides._latents import Latent, read_latent
from pyro_gumbel.guides._plates import find_data_plate
from pyro_gumbel.infer.config import Config

__all__ = ["AutoAmortized"]


class AutoAmortized(StructuredGuide):
    r"""A guide whose parameters for each datum are computed by an encoder.

    .. math::
        q(\beta, z) = \prod_g q(\beta_g; \phi_g)
                      \prod_i \prod_s q(z_{si}; h_s(\mathrm{encoder}(x)_i))

    The first run of the model finds its latent sites. Each site :math:`z_s` inside the data plate
    gets a head :math:`h_s`: a linear layer from the encoder's features to the parameters of the
    site's guide, whose bias starts at the prior's parameters. One-hot, Bernoulli, Categorical,
    Normal, LogNormal, Beta, Dirichlet, Gamma, Poisson and Geometric sites have a guide of their
    own family. Other continuous sites have a normal distribution that ``biject_to`` transforms to
    their support. Latents outside the plate have variational parameters, of the same families.
    Given the features, sites are independent. If ``autoregressive``, a site also depends on the
    earlier sites of the plate.

    The guide reads the model's plates in every call, so minibatches may differ in size. The model
    chooses a minibatch by ``pyro.plate("data", total, subsample_size=len(x))`` or by
    ``subsample=indices``, or draws one. If it draws one, the encoder may return rows for all data,
    or call ``pyro.subsample`` itself. To read the plates, the guide runs the model up to its first
    site in the data plate. This part of the model runs twice per step.

    Shapes: ``encoder(*args, **kwargs)`` is ``(N, features)``, with one row per element of the
    plate or of its subsample. If a site is in further plates inside the data plate, one row gives
    the parameters of all its elements. ``state_dict`` also contains the encoder.

    Args:
        model: The model.
        encoder: A module or a function of the model's arguments.
        gradient: As for :class:`AutoDiscrete`.
        plate: Name of the data plate. Needed if several plates are possible.
        autoregressive: Whether heads read the values of earlier sites in the plate.
        **options: ``create_plates``, ``init_loc_fn`` and ``init_scale``, as for
            :class:`AutoDiscrete`, for continuous global latents.

    Raises:
        TypeError: If the encoder is not callable, or does not return a tensor.
        ValueError: In the first run, if the model has no data plate, the plate has no latent site,
            the encoder's output does not match the plate, or a site has no head.

    References:
        Auto-Encoding Variational Bayes (Kingma, Welling, 2014), https://arxiv.org/abs/1312.6114

    Example:
        >>> decoder = torch.nn.Linear(10, 64)
        >>> def model(x):
        ...     pyro.module("decoder", decoder)
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.OneHotCategorical(torch.ones(10)))
        ...         pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)
        >>> encoder = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU())
        >>> guide = AutoAmortized(model, encoder, gradient="reinmax")
        >>> guide(torch.zeros(5, 64))["z"].shape
        torch.Size([5, 10])
    """

    _stored = ("heads", "encoder")

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Callable[..., Tensor],
        *,
        gradient: Config = "auto",
        plate: str | None = None,
        autoregressive: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, gradient=gradient, **options)
        if not callable(encoder):
            raise TypeError(
                "AutoAmortized: encoder must be a module or a function of the model's arguments; "
                f"got {encoder!r}."
            )
        self.encoder = encoder
        self.plate = plate
        self.autoregressive = autoregressive
        self._data_plate = ""
        self._nesting = 0  # dimensions that the plates of local sites take

    def _choose_sites(self, trace: Trace) -> dict[str, Any]:
        self._data_plate = find_data_plate(trace, self.plate)
        return super()._choose_sites(trace)

    def _read(self, site: Any) -> Latent:
        local = self._data_plate in {frame.name for frame in site["cond_indep_stack"]}
        latent = read_latent(site, None if local else self.init_scale)
        if local:
            self._nesting = max(self._nesting, len(latent.batch))
            self._check_inner_plates(latent)
        return latent

    def _check_inner_plates(self, latent: Latent) -> None:
        for dim, name in latent.plates.items():
            if name != self._data_plate and latent.sizes[dim] != latent.batch[dim]:
                raise ValueError(
                    f"Site {latent.name!r} is in the plate {name!r} inside the data plate "
                    f"{self._data_plate!r}, and {name!r} is subsampled. A head computes "
                    f"parameters for all elements of {name!r}; subsample only the data plate."
                )

    def _is_local(self, latent: Latent) -> bool:
        return self._data_plate in latent.plates.values()

    @property
    def _dim(self) -> int:
        return self.plates[self._data_plate].dim

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run the encoder; return features ``(...) + (N, features)`` of the subsample."""
        plate = self.plates[self._data_plate]
        with plate as indices:  # so that the encoder can call pyro.subsample
            features = self.encoder(*args, **kwargs)
        if not isinstance(features, Tensor):
            raise TypeError(
                "AutoAmortized: encoder must return one Tensor of shape (N, features); got "
                f"{type(features).__name__}. Concatenate its outputs, or wrap it in a function."
            )
        rows = features.shape[-2] if features.dim() > 1 else None
        if rows == plate.subsample_size:
            return features
        if rows == plate.size:
            return features.index_select(-2, indices.to(features.device))
        size, subsample_size = plate.size, plate.subsample_size
        expected = f"{size}" if size == subsample_size else f"{subsample_size} (or all {size})"
        raise ValueError(
            f"AutoAmortized: encoder returned shape {tuple(features.shape)}, which does not match "
            f"the plate {plate.name!r}: expected (N, features) with N = {expected} rows, one per "
            "datum. Keep the data dimension first and flatten the others into features, "
            "x.flatten(1). If another plate is over the data, give its name, plate='...'."
        )

    def _check_inputs(self, inputs: Tensor, params: Trace) -> None:
        if inputs.requires_grad and not (isinstance(self.encoder, nn.Module) or params.nodes):
            warnings.warn(
                "AutoAmortized: encoder is a function with unregistered parameters, so the "
                "optimiser will not train them. Pass the nn.Module itself, or call "
                "pyro.module('encoder', module) inside the function.",
                stacklevel=2,
            )

    def _make_head(self, latent: Latent, inputs: Any) -> nn.Module:
        if not self._is_local(latent):
            return super()._make_head(latent, inputs)
        num_inputs = inputs.shape[-1]
        num_inputs += sum(self._num_features(other) for other in self._sources(latent))
        start = latent.start.mean(self._dim - latent.event_dim)
        bias = start.flatten().to(inputs)
        linear = nn.Linear(num_inputs, len(bias), device=bias.device, dtype=bias.dtype)
        with torch.no_grad():
            linear.bias.copy_(bias)
        return nn.ModuleDict({"linear": linear})

    def _sources(self, latent: Latent) -> list[Latent]:
        """Return the sites whose values the head of a site reads."""
        before = itertools.takewhile(lambda other: other is not latent, self.latents.values())
        return [other for other in before if self.autoregressive and self._is_local(other)]

    def _num_features(self, latent: Latent) -> int:
        """Return the number of features of a site's value per datum."""
        elements = latent.batch.numel() // latent.batch[self._dim] * latent.event_batch.numel()
        return elements * latent.head.num_features

    def _numbers(self, latent: Latent, inputs: Any, values: dict[str, Tensor]) -> Tensor:
        if not self._is_local(latent):
            return super()._numbers(latent, inputs, values)
        sources = self._sources(latent)
        read = [inputs, *(self._rows(one, values[one.name]).to(inputs) for one in sources)]
        batch = torch.broadcast_shapes(*(numbers.shape[:-1] for numbers in read))
        read = [numbers.expand(*batch, numbers.shape[-1]) for numbers in read]
        return self._columns(latent, self._head(latent).linear(torch.cat(read, -1)))

    def _rows(self, latent: Latent, value: Tensor) -> Tensor:
        """Reshape features of a value ``(...) + batch + (n,)`` to ``(...) + (N, rest * n)``."""
        numbers = latent.features(value)
        missing = self._nesting + 1 - numbers.dim()
        numbers = numbers.reshape((1,) * missing + numbers.shape)
        # An enumerated value has ones in place of plates.
        sizes = list(numbers.shape)
        for dim, name in latent.plates.items():
            sizes[dim - 1] = self.plates[name].subsample_size
        left = numbers.dim() - 1 - self._nesting
        return numbers.expand(sizes).movedim(self._dim - 1, left).flatten(left + 1)

    def _columns(self, latent: Latent, raw: Tensor) -> Tensor:
        """Reshape a head's output to ``(...) + batch + event_batch + (size,)``."""
        left = raw.dim() - 2
        batch = [1] * (self._nesting - len(latent.batch)) + list(latent.batch)
        del batch[self._dim]
        raw = raw.unflatten(-1, (*batch, *latent.event_batch, latent.head.size))
        raw = raw.movedim(left, self._dim - latent.event_dim)
        while raw.dim() > len(latent.batch) + latent.event_dim and raw.shape[0] == 1:
            raw = raw.squeeze(0)  # a dimension of plates of other sites
        return raw
