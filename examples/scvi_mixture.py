"""Find cell types in log-counts of RNA by a mixture, trained by scvi-tools.

    pip install pyro_gumbel[scvi]
    python examples/scvi_mixture.py
    python examples/scvi_mixture.py --gradient reinmax

scvi-tools trains Pyro programs by its PyroTrainingPlan, which takes any loss. The type of a cell
is a discrete latent: the model sums it, or a guide draws it under a gradient estimator.
"""

from __future__ import annotations

import argparse
from itertools import permutations
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import scvi
import torch
from anndata import AnnData
from pyro import poutine
from pyro.infer import ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.nn import PyroModule
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.data.fields import LayerField
from scvi.model.base import BaseModelClass, PyroSviTrainMixin
from scvi.module.base import PyroBaseModuleClass
from torch import Tensor, nn

from arguments import count, natural, new_parser, positive
from pyro_gumbel.guides import AutoAmortized
from pyro_gumbel.infer import Estimator_ELBO, recover

TYPES, MARKERS = 3, 10


def make_cells(seed: int) -> AnnData:
    """Make log-counts of 400 cells by scvi-tools; each type expresses ten genes of its own."""
    np.random.seed(seed)
    cells = scvi.data.synthetic_iid(n_genes=TYPES * MARKERS, n_labels=TYPES)
    labels = cells.obs["labels"].cat.codes.to_numpy()
    for label in range(TYPES):
        rows, first = labels == label, MARKERS * label
        cells.X[rows, first : first + MARKERS] += np.random.poisson(20.0, (rows.sum(), MARKERS))
    cells.X = np.log1p(cells.X)
    return cells


class Mixture(PyroModule):
    """A mixture of normal distributions of the genes' log-counts."""

    def __init__(self, num_genes: int, *, summed: bool) -> None:
        super().__init__()
        self.num_genes, self.summed, self.n_obs = num_genes, summed, None  # n_obs: by scvi-tools

    def forward(self, x: Tensor) -> None:
        zero = x.new_zeros(())
        weights = pyro.sample("weights", dist.Dirichlet((zero + 1).expand(TYPES)))
        means = dist.Normal(zero, 3.0).expand([TYPES, self.num_genes])
        locs = pyro.sample("locs", means.to_event(2))
        scales = pyro.sample(
            "scales", dist.LogNormal(zero, 1.0).expand([self.num_genes]).to_event(1)
        )
        infer = {"enumerate": "parallel"} if self.summed else {}
        with pyro.plate("cells", self.n_obs or len(x), subsample_size=len(x)):
            label = pyro.sample("label", dist.OneHotCategorical(weights), infer=infer)
            loc = (label.unsqueeze(-2) @ locs).squeeze(-2)  # of the label's row
            pyro.sample("x", dist.Normal(loc, scales).to_event(1), obs=x)


class MixtureModule(PyroBaseModuleClass):
    """The model and its guide, in which the label is summed or drawn."""

    def __init__(self, cells: Tensor, gradient: str | None) -> None:
        super().__init__()
        num_genes = cells.shape[1]
        self._model = Mixture(num_genes, summed=gradient is None)
        start = init_to_value(values={"locs": distant_rows(cells)})
        if gradient is None:
            hidden = poutine.block(self._model, hide=["label"])
            self._guide: Any = AutoNormal(hidden, init_loc_fn=start, init_scale=0.05)
        else:
            encoder = nn.Sequential(nn.Linear(num_genes, 32), nn.ReLU())
            self._guide = AutoAmortized(
                self._model, encoder, gradient={"label": gradient}, init_loc_fn=start
            )

    @property
    def model(self) -> Any:
        return self._model

    @property
    def guide(self) -> Any:
        return self._guide

    @staticmethod
    def _get_fn_args_from_batch(batch: dict[str, Tensor]) -> tuple[tuple[Tensor], dict]:
        return (batch[REGISTRY_KEYS.X_KEY],), {}


def distant_rows(cells: Tensor) -> Tensor:
    """Return cells that are far from one another, as the first means of the types."""
    chosen = [int((cells - cells.mean(0)).norm(dim=1).argmax())]
    while len(chosen) < TYPES:
        distances = torch.cdist(cells, cells[chosen]).amin(1)
        chosen.append(int(distances.argmax()))
    return cells[chosen]


class MixtureModel(PyroSviTrainMixin, BaseModelClass):
    """The mixture as a model of scvi-tools."""

    def __init__(self, cells: AnnData, gradient: str | None = None) -> None:
        pyro.clear_param_store()
        super().__init__(cells)
        self.x = torch.tensor(np.asarray(cells.X), dtype=torch.float32)
        self.module = MixtureModule(self.x, gradient)
        self.init_params_ = self._get_init_params(locals())

    @classmethod
    def setup_anndata(cls, cells: AnnData, **options: Any) -> None:
        arguments = cls._get_setup_method_args(**locals())
        fields = [LayerField(REGISTRY_KEYS.X_KEY, None, is_count_data=False)]
        manager = AnnDataManager(fields=fields, setup_method_args=arguments)
        manager.register_fields(cells, **options)
        cls.register_manager(manager)

    def fit(self, loss: ELBO, *, epochs: int, lr: float, seed: int) -> None:
        """Train by scvi-tools on minibatches of 128 cells."""
        pyro.set_rng_seed(seed)
        steps = epochs * -(-len(self.x) // 128)
        optim = pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.01 ** (1 / steps)})
        self.train(
            max_epochs=epochs,
            train_size=1.0,
            accelerator="cpu",
            plan_kwargs={"loss_fn": loss, "optim": optim},
            enable_progress_bar=False,
            enable_checkpointing=False,
            logger=None,
        )

    def evidence(self, loss: ELBO) -> float:
        """Return the bound on the log-evidence of a cell, in nats, by any loss."""
        pyro.set_rng_seed(0)
        return -loss.loss(self.module.model, self.module.guide, self.x) / len(self.x)

    @torch.no_grad()
    def labels(self) -> np.ndarray:
        """Return the most probable type of each cell."""
        model, guide = self.module.model, self.module.guide
        if not model.summed:
            return guide.median(self.x)["label"].argmax(-1).numpy()
        found = recover(model, guide, self.x, num_samples=20, marginals=True)
        return found["label"].mean(0).argmax(-1).numpy()


def share_right(found: np.ndarray, cells: AnnData) -> float:
    """Return the share of cells whose type is right, under the best names of the types."""
    true = cells.obs["labels"].cat.codes.to_numpy()
    return max(float((np.array(names)[found] == true).mean()) for names in permutations(range(3)))


def run(args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Train by each loss; return each one's evidence of a cell and share of right types."""
    cells = make_cells(args.seed)
    MixtureModel.setup_anndata(cells)
    losses: dict[str, ELBO] = {"Estimator_ELBO": Estimator_ELBO()}
    if args.gradient is None:
        losses["Pyro's TraceEnum_ELBO"] = TraceEnum_ELBO(max_plate_nesting=1)
    results = {}
    for name, loss in losses.items():
        model = MixtureModel(cells, args.gradient)
        model.fit(loss, epochs=args.epochs, lr=args.lr, seed=args.seed)
        many = Estimator_ELBO(args.num_samples, vectorize_particles=True, max_plate_nesting=1)
        results[name] = model.evidence(many), share_right(model.labels(), cells)
    return results


def main(argv: list[str] | None = None) -> None:
    """Train, and print the evidence and the share of right labels."""
    parser = new_parser(__doc__)
    parser.add_argument("--gradient", help="draw the label under this estimator; else sum it")
    parser.add_argument("--epochs", type=count, default=200, help="passes over the cells")
    parser.add_argument("--lr", type=positive, default=0.02, help="learning rate of Adam")
    parser.add_argument("--num-samples", type=count, default=100, help="draws for the evidence")
    parser.add_argument("--seed", type=natural, default=0, help="seed of data and training")
    parser.add_argument("--smoke", action="store_true", help="two epochs")
    args = parser.parse_args(argv)
    if args.smoke:
        args.epochs, args.num_samples = 2, 2
    for name, (evidence, right) in run(args).items():
        print(f"{name}: evidence {evidence:.3f} nats a cell, {right:.1%} of the types right")


if __name__ == "__main__":
    main()
