"""What cannot be summed is refused with the site, the cause and what to write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_gumbel.infer import Estimator_ELBO, recover

SUM = {"enumerate": "parallel"}
Program = Callable[[Tensor], Any]
X = torch.tensor([0.3, -1.2, 2.1, 0.4, 1.7, -0.6])
TABLE = torch.linspace(-1, 1, 18).reshape(3, 6)
THREE = torch.tensor([0.2, 0.5, 0.3])


def no_guide(x: Tensor) -> None: ...


def rows_by_index(x: Tensor) -> None:
    z = pyro.sample("z", dist.Categorical(THREE), infer=SUM)
    with pyro.plate("data", 6):
        pyro.sample("x", dist.Normal(TABLE[z], 1.0), obs=x)


def gathered(x: Tensor) -> None:
    with pyro.plate("data", 6):
        z = pyro.sample("z", dist.Categorical(THREE), infer=SUM)
        loc = TABLE.T.gather(-1, z.unsqueeze(-1)).squeeze(-1)
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def stacked(x: Tensor) -> None:
    y, z = (pyro.sample(name, dist.Categorical(THREE), infer=SUM) for name in "yz")
    pyro.sample("x", dist.Normal(torch.stack([y, z], -1).sum(-1) + 0.0, 1.0), obs=x[0])


def branching(x: Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(0.3), infer=SUM)
    pyro.sample("x", dist.Normal(1.0 if z else 0.0, 1.0), obs=x[0])


def numbers(x: Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(0.3), infer=SUM)
    pyro.sample("x", dist.Normal(z.item(), 1.0), obs=x[0])


def listed(x: Tensor) -> None:
    z = pyro.sample("z", dist.Categorical(THREE), infer=SUM)
    pyro.sample("x", dist.Normal([0.0, 1.0, 2.0][z], 1.0), obs=x[0])


def many(x: Tensor) -> None:
    for i in range(65):
        z = pyro.sample(f"z{i}", dist.Bernoulli(0.3), infer=SUM)
        pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[0])


def crossed(x: Tensor) -> None:
    rows, columns = pyro.plate("rows", 2, dim=-1), pyro.plate("columns", 3, dim=-2)
    with rows:
        y = pyro.sample("y", dist.Bernoulli(0.3), infer=SUM)
    with columns:
        z = pyro.sample("z", dist.Bernoulli(0.3), infer=SUM)
    with rows, columns:
        pyro.sample("x", dist.Normal(y + z, 1.0), obs=x.reshape(3, 2))


def outside(x: Tensor) -> None:
    with pyro.plate("data", 6):
        z = pyro.sample("z", dist.Bernoulli(0.3), infer=SUM)
    pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[0])


def partly_labelled(x: Tensor) -> None:
    with pyro.plate("data", 6):
        z = pyro.sample(
            "z", dist.Bernoulli(0.3), obs=x.sign() / 2 + 0.5, obs_mask=x > 0, infer=SUM
        )
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


BROADCAST = r"(?s)every value of 'z' at .*Vindex\(loc\)"
REFUSED: dict[Program, tuple[type[Exception], str]] = {
    rows_by_index: (ValueError, r"'x': its log_prob has shape \(3, 1, 6\).*\['z'\].*Vindex"),
    gathered: (RuntimeError, BROADCAST),
    stacked: (RuntimeError, r"(?s)every value of 'y' at -1 and every value of 'z' at -2.*Vindex"),
    branching: (RuntimeError, BROADCAST),
    numbers: (RuntimeError, BROADCAST),
    listed: (TypeError, BROADCAST),
    many: (ValueError, r"'z64' need another dimension, after 64.*pyro\.markov"),
    crossed: (ValueError, r"'y', with the sites .*plates \['columns', 'rows'\].*a loop \(for i"),
    outside: (ValueError, r"(?s)site \"x\".*\['z'\] are summed.*z\.sum\(-1\).*in the guide"),
    partly_labelled: (ValueError, r"'z_unobserved' is missing.*config_enumerate\(model\), since"),
}


@pytest.mark.parametrize("model", REFUSED, ids=lambda model: model.__name__)
def test_the_error_names_site_cause_and_way_out(model: Program) -> None:
    kind, message = REFUSED[model]
    with pytest.raises(kind, match=message):
        Estimator_ELBO().loss(model, no_guide, X)
    with pytest.raises(kind, match=message):
        recover(model, no_guide, X)
