"""Find the data plate of a model, and read its plates in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample

from pyro_gumbel.distributions.families import sample_detached, unwrap
from pyro_gumbel.guides._latents import observed_sites
from pyro_gumbel.infer._checks import guided_sites

__all__ = ["find_data_plate", "read_plates"]


def find_data_plate(trace: Trace, plate: str | None) -> str:
    """Return the name of the data plate, whose elements are the rows of the encoder.

    This is ``plate`` if it is given. Otherwise it is the vectorised plate with observed and latent
    sites. If there are several, it is the plate that contains all sites of the others.
    """
    latent = guided_sites(trace)
    observed = observed_sites(trace)
    members = _members(trace, [*latent, *observed])
    if plate is not None:
        _check_named(plate, members, trace)
        candidates = [plate]
    else:
        candidates = [name for name, sites in members.items() if sites & set(observed)]
    if not candidates:
        raise ValueError(
            "AutoAmortized: the model has no plate over its data. Its plates are "
            f"{list(members)}, its observed sites {observed}. Write "
            "`with pyro.plate('data', len(x)):` around the latents and the observations of a "
            "datum, or give the plate's name, AutoAmortized(..., plate='data')."
        )
    with_latents = [name for name in candidates if members[name] & set(latent)]
    if not with_latents:
        inside = sorted(set.union(*(members[name] for name in candidates)) & set(observed))
        raise ValueError(
            f"AutoAmortized: the plate {candidates[0]!r} has no latent site. Its sites {inside} "
            f"are observed, and the latent sites {list(latent)} are outside. Remove obs=... from "
            "sites that should be latent, or use AutoDiscrete or AutoNormal for latents outside "
            "the plate."
        )
    widest = [
        name
        for name in with_latents
        if all(members[name] > members[other] for other in with_latents if other != name)
    ]
    if not widest:
        raise ValueError(
            f"AutoAmortized: each of the plates {with_latents} has latent and observed sites. "
            "Choose the plate of the encoder's rows, AutoAmortized(..., "
            f"plate={with_latents[0]!r})."
        )
    return widest[0]


def _members(trace: Trace, names: list[str]) -> dict[str, set[str]]:
    """List the sites of each vectorised plate."""
    members: dict[str, set[str]] = {}
    for name in names:
        for frame in trace.nodes[name]["cond_indep_stack"]:
            if frame.vectorized:
                members.setdefault(frame.name, set()).add(name)
    return members


def _check_named(plate: str, members: dict[str, Any], trace: Trace) -> None:
    if plate in members:
        return
    sequential = {
        frame.name
        for site in trace.nodes.values()
        for frame in site.get("cond_indep_stack", ())
        if not frame.vectorized
    }
    if plate in sequential:
        raise ValueError(
            f"AutoAmortized: the plate {plate!r} is sequential, and an encoder needs a vectorised "
            f"one. Write `with pyro.plate({plate!r}, ...)` in place of `for i in ...`."
        )
    raise ValueError(
        f"AutoAmortized: the model has no plate {plate!r} around a site; its plates are "
        f"{list(members)}."
    )


class _AllPlatesRead(Exception):
    """Raised to leave the model as soon as all plates are known."""


class _PlateReader(Messenger):
    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.missing = set(names)
        self.subsamples: dict[str, dict[str, Any]] = {}
        self.plates: dict[str, dict[str, Any]] = {}

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            drawn = {"subsample": msg["value"], "device": cast(Any, msg["fn"]).device}
            self.subsamples[cast(str, msg["name"])] = drawn
            return
        for frame in msg["cond_indep_stack"]:
            if frame.vectorized and frame.name in self.missing:
                self.missing.discard(frame.name)
                size = frame.full_size or frame.size
                plate = {"size": size, "subsample_size": frame.size, "dim": frame.dim}
                self.plates[frame.name] = plate | self.subsamples.get(frame.name, {})
        if not self.missing:
            raise _AllPlatesRead
        if msg["value"] is None:  # torch's one-hot draw reads values, which breaks recording
            msg["value"] = sample_detached(unwrap(cast(Any, msg["fn"])))


def read_plates(
    model: Callable[..., Any], names: Iterable[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Run the model until every named plate has a site, and return each plate's arguments.

    If the guide's plates differed from the model's, the ELBO would have a wrong scale.
    """
    reader = _PlateReader(names)
    if not reader.missing:
        return {}
    try:
        with torch.no_grad(), poutine.block(), reader:
            model(*args, **kwargs)
    except _AllPlatesRead:
        return reader.plates
    raise ValueError(
        f"The model had the plates {sorted(reader.missing)} when the guide was set up, and they "
        "are missing in this call. Automatic guides need a model with the same structure in each "
        "call."
    )
