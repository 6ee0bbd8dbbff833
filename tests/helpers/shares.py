"""Programs whose steps are split among processes, or run by one on the union of the shares.

python tests/helpers/shares.py FOLDER RANK
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_gumbel.estimators import (
    DisARM,
    Exponential,
    GumbelStraightThrough,
    LeaveOneOut,
    MovingAverage,
    NeuralBaseline,
    Relax,
    Score,
)
from pyro_gumbel.infer import (
    DistributedSVI,
    Estimator_ELBO,
    ImportanceWeighted_ELBO,
    config_gradient,
    load_checkpoint,
    save_checkpoint,
)

STEPS = 3
FULL = 30
SHARES = (slice(0, 4), slice(4, 11))  # of each batch; no other dimension has these sizes
UNION = slice(0, 11)
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(STEPS, UNION.stop, 5, generator=GENERATOR, dtype=torch.float64)
INDICES = torch.stack([torch.randperm(FULL, generator=GENERATOR)[:11] for _ in range(STEPS)])
PRIOR = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)


OTHERS = ("rand", "normal", "uniform", "exponential", "bernoulli", "multinomial")


class InjectedNoise(TorchDispatchMode):
    """Draws the union's random numbers and returns the share's rows of them."""

    def __init__(self, rows: slice) -> None:
        super().__init__()
        self.rows = rows
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in ("rand", "randn"):
            return self.draw(name, list(args[0]), kwargs["dtype"])
        if name in ("rand_like", "randn_like"):
            dtype = kwargs.get("dtype") or args[0].dtype
            return self.draw(name.removesuffix("_like"), list(args[0].shape), dtype)
        if name == "normal_":
            return args[0].copy_(self.draw("randn", list(args[0].shape), args[0].dtype))
        assert name in ("randint", "randperm") or not any(word in name for word in OTHERS), name
        return func(*args, **kwargs)

    def draw(self, name, shape, dtype):
        size = self.rows.stop - self.rows.start
        dims = [dim for dim, length in enumerate(shape) if length == size]
        for dim in dims:
            shape[dim] = UNION.stop
        self.count += 1
        generator = torch.Generator().manual_seed(self.count)
        found = getattr(torch, name)(shape, generator=generator, dtype=dtype)
        for dim in dims:
            found = found.narrow(dim, self.rows.start, size)
        return found


class Program(nn.Module):
    """Latents in the data plate and outside of it, which the data depend on."""

    def __init__(self, kind="one_hot", outer="bernoulli", subsample=False, norm=False):
        super().__init__()
        torch.manual_seed(5)
        self.kind, self.outer, self.subsample = kind, outer, subsample
        self.encoder = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        if norm:
            self.encoder.append(nn.BatchNorm1d(3, affine=False).double()).eval()
        self.decoder = nn.Linear(3, 5).double()

    def plate(self, x, rows):
        if self.subsample:
            return pyro.plate("data", FULL, subsample=rows)
        return pyro.plate("data", len(x))

    def latent(self, logits):
        if self.kind == "bits":
            return dist.Bernoulli(logits=logits).to_event(1)
        if self.kind == "bit":
            return dist.Bernoulli(logits=logits[..., 0])
        return dist.OneHotCategorical(logits=logits)

    def model(self, x, rows):
        pyro.module("decoder", self.decoder)
        shift = 0.0
        if self.outer == "bernoulli":
            shift = pyro.sample("g", dist.Bernoulli(PRIOR[0]))
        if self.outer == "normal":
            shift = pyro.sample("g", dist.Normal(PRIOR[0], 1.0))
        with pyro.plate("parts", 2):
            means = pyro.sample("means", dist.Normal(PRIOR[0], 1.0)) if self.outer else PRIOR[:2]
        with self.plate(x, rows):
            z = pyro.sample("z", self.latent(PRIOR.log()))
            mean = self.decoder(z.unsqueeze(-1).expand(*z.shape, 3) if self.kind == "bit" else z)
            mean = (
                mean + torch.as_tensor(shift)[..., None] + means.sum(-1, keepdim=True)[..., None]
            )
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(self, x, rows):
        pyro.module("encoder", self.encoder)
        logit = pyro.param("logit", torch.tensor(0.3, dtype=torch.float64))
        logits = self.encoder(x)
        if self.outer == "bernoulli":
            pyro.sample("g", dist.Bernoulli(logits=logit))
        if self.outer == "normal":
            pyro.sample("g", dist.Normal(logit, 1.0))
        if self.outer:
            with pyro.plate("parts", 2):
                loc = pyro.param("loc", torch.tensor([0.1, -0.3], dtype=torch.float64))
                pyro.sample("means", dist.Normal(loc, 1.0))
        with self.plate(x, rows):
            pyro.sample("z", self.latent(logits))


def one(config, elbo=None, **options):
    """A case: how to make programs, estimators and loss."""

    def make():
        torch.manual_seed(6)
        chosen = config()
        chosen = chosen if isinstance(chosen, dict) else {"z": chosen}
        return Program(**options), chosen, (elbo or Estimator_ELBO)

    return make


def average():
    return Score(MovingAverage())


def network():
    return Score(NeuralBaseline(nn.Linear(5, 1).double(), "x"))


def vectorized():
    return Estimator_ELBO(2, vectorize_particles=True)


def looped():
    return Estimator_ELBO(2)


def closed_form():
    return Estimator_ELBO(analytic_kl=True)


def importance():
    return ImportanceWeighted_ELBO(3, vectorize_particles=True)


CASES = {
    "enumerate": one(lambda: "enumerate"),
    "reinmax": one(lambda: "reinmax"),
    "schedule": one(lambda: GumbelStraightThrough(Exponential(1.0, 0.3, 0.1))),
    "moving average": one(average),
    "network": one(network, outer=None),
    "leave one out": one(lambda: Score(LeaveOneOut()), vectorized),
    "rebar": one(lambda: "rebar", looped),
    "relax": one(lambda: Relax(nn.Linear(3, 1).double())),
    "muprop": one(lambda: "muprop"),
    "double control variate": one(lambda: "double_control_variate"),
    "local expectation": one(lambda: "local_expectation"),
    "disarm": one(DisARM, kind="bit"),
    "rodeo": one(lambda: "rodeo", kind="bits"),
    "relaxed": one(lambda: "gumbel_softmax"),
    "closed form": one(lambda: "reinmax", closed_form, subsample=True),
    "subsample": one(average, subsample=True),
    "subsample and rebar": one(lambda: "rebar", vectorized, subsample=True),
    "importance": one(lambda: Score(), importance, outer=None),
    "importance of subsamples": one(lambda: Score(), importance, outer=None, subsample=True),
    "outside: average": one(lambda: {"g": average(), "z": average()}),
    "outside: network": one(
        lambda: {"g": Score(NeuralBaseline(nn.Linear(3, 1).double(), lambda *_: PRIOR))}
    ),
    "outside: straight through": one(lambda: {"g": "reinmax", "z": "reinmax"}),
    "outside: muprop": one(lambda: {"g": "muprop", "z": "reinmax"}),
    "outside: double control variate": one(lambda: {"g": "double_control_variate"}),
    "outside: disarm": one(lambda: {"g": "disarm", "z": "rebar"}, subsample=True),
    "outside: enumerate": one(lambda: {"g": "enumerate", "z": average()}, looped),
    "outside: normal": one(lambda: {"g": "pathwise", "z": "reinmax"}, vectorized, outer="normal"),
}


def train(case, rows, svi_class=DistributedSVI):
    """Losses, parameters and states of estimators after some steps on rows of the batches."""
    pyro.clear_param_store()
    programs, config, elbo = CASES[case]()
    guide = config_gradient(programs.guide, config)
    svi = svi_class(programs.model, guide, pyro.optim.SGD({"lr": 1e-3}), elbo())
    svi.evaluate_loss(X[0, rows], INDICES[0, rows])  # the preflight has noise of its own
    with InjectedNoise(rows):
        losses = [svi.step(x[rows], i[rows]) for x, i in zip(X, INDICES, strict=True)]
        losses.append(svi.evaluate_loss(X[0, rows], INDICES[0, rows]))
    store = {n: p.detach().clone() for n, p in pyro.get_param_store().named_parameters()}
    states = [e.state_dict() for e in guide.gradient_messenger.estimators()]
    return {"losses": losses, "store": store, "states": states}


# What only processes that draw by themselves show


def split(model, guide, elbo=None, **options):
    pyro.clear_param_store()
    elbo = elbo or Estimator_ELBO()
    return DistributedSVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo, **options)


def draws(rank):
    """The values of sites in three steps, and what the global generator gives afterwards."""
    pyro.set_rng_seed(3)  # in both processes
    met = []

    def model(x):
        with pyro.plate("parts", 2):
            pyro.sample("g", dist.Bernoulli(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))

    def guide(x):
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("parts", 2):
            g = pyro.sample("g", dist.Bernoulli(logits=loc))
        with pyro.plate("data", len(x)):
            met.append((g, pyro.sample("z", dist.Bernoulli(logits=loc))))

    svi = split(model, guide)
    for _ in range(3):
        svi.step(torch.zeros((20, 30)[rank]))
    outside, inside = zip(*met[-3:], strict=True)
    return torch.stack(outside), torch.stack(inside)[:, :20], torch.rand(3)


def sometimes(rank, size=None):
    """A parameter that all meet in two steps, one process in two more, and none afterwards."""
    now = 0

    def model(x):
        loc = pyro.param("loc", torch.zeros(()))
        if now < 2 or (rank == 0 and now < 4):
            data = len(x) if now < 2 else 3  # of the first process
            loc = loc + pyro.param("shift", torch.zeros(())) * (torch.arange(len(x)) < data)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    svi = split(model, lambda x: None)
    for step in range(6):
        now = step
        svi.step(torch.ones(size or 3 + rank))
    return [pyro.param(name).detach() for name in ("loc", "shift")]


def minibatches(rank):
    """The rows of data that a process draws itself."""
    data, met = torch.arange(100.0), []

    def model(x):
        with pyro.plate("data", 100, subsample_size=5) as rows:
            met.append(rows)
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0), obs=x[rows])

    svi = split(model, lambda x: None)
    losses = [svi.step(data) for _ in range(2)]
    return torch.stack(met[-2:]), losses, pyro.param("loc").detach()


def shared_minibatches(rank):
    """A subsampled plate beside the split one is the same in all processes."""
    met = []

    def model(x):
        with pyro.plate("words", 100, subsample_size=5) as rows:
            met.append(rows)
            pyro.sample("w", dist.Normal(0.0, 1.0), obs=rows.float())
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0), obs=x)

    split(model, lambda x: None, plate="data").step(torch.zeros(4 + rank))
    return met[-1]


class Late(nn.Module):
    """Parameters that start differently in each process, one of them in the third step."""

    def __init__(self, rank):
        super().__init__()
        torch.manual_seed(rank)
        self.encoder = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.steps = 0

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.3, 0.7])))
            mean = z @ pyro.param("means", lambda: torch.randn(2))
            if self.steps > 2:
                mean = mean + pyro.param("late", lambda: torch.randn(()))
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x[:, 0])

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.OneHotCategorical(logits=self.encoder(x)))


def late(rank):
    program = Late(rank)
    guide = config_gradient(program.guide, {"z": Relax(nn.Linear(2, 1))})
    svi = split(program.model, guide)
    for step in range(5):
        program.steps = step
        svi.step(torch.randn(4 + rank, 2))
    store = {name: value.detach() for name, value in pyro.get_param_store().items()}
    return {**store, **program.state_dict()}


def met(rank):
    """The losses where a random parameter is met, and its value."""
    values = []

    def model(x):
        value = pyro.param("late", lambda: torch.randn(())) if values else torch.zeros(())
        values.append(value.item())
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(value + pyro.param("loc", torch.zeros(())), 1.0), obs=x)

    svi = split(model, lambda x: None)
    svi.evaluate_loss(torch.ones(3 + rank))
    return svi.evaluate_loss(torch.ones(3 + rank)), svi.step(torch.ones(3 + rank)), values[-1]


def resumed(rank, folder):
    """A run that is saved and loaded, and one that is not."""

    def start():
        torch.manual_seed(rank)
        program = Late(rank)
        program.steps = 3
        guide = config_gradient(program.guide, {"z": Score(MovingAverage())})
        return split(program.model, guide), program

    def steps(svi):
        return [svi.step(torch.randn(4 + rank, 2)) for _ in range(3)]

    pyro.set_rng_seed(rank)
    svi, _ = start()
    steps(svi)
    save_checkpoint(folder / "run.pt", svi, step=3)
    expected = steps(svi), pyro.param("late").item()
    pyro.set_rng_seed(7)
    svi, _ = start()
    more = load_checkpoint(folder / "run.pt", svi)
    return expected, (steps(svi), pyro.param("late").item()), more


def refusals(rank):
    """The errors of programs that cannot be split; both processes raise them."""
    loc = torch.tensor(0.2)

    def plain(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc", loc), 1.0), obs=x)

    def guided(x):
        pyro.sample("g", dist.Bernoulli(logits=pyro.param("logit", loc)))

    def outside(x):
        pyro.sample("g", dist.Bernoulli(loc))
        plain(x)

    def summed(x):
        pyro.sample("s", dist.Bernoulli(loc), infer={"enumerate": "parallel"})
        plain(x)

    def two_plates(x):
        with pyro.plate("rows", 4):
            pyro.sample("r", dist.Normal(loc, 1.0), obs=torch.zeros(4))
        plain(x)

    def sequential(x):
        for i in pyro.plate("data", 10, subsample_size=2):
            pyro.sample(f"x{i}", dist.Normal(pyro.param("loc", loc), 1.0), obs=x[0])

    def unplated(x):
        pyro.sample("x", dist.Normal(pyro.param("loc", loc), 1.0).expand([4]).to_event(1), obs=x)

    def other_values(x):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=x.sum())
        plain(x)

    def of_each_datum(x):
        with pyro.plate("data", len(x)):
            locs = pyro.param("locs", lambda: torch.zeros(len(x), 1), event_dim=1)
            pyro.sample("x", dist.Normal(locs[:, 0], 1.0), obs=x)

    def other_parameters(x):
        pyro.param(f"loc{rank}", loc)
        plain(x)

    def nothing(x):
        pass

    importance = ImportanceWeighted_ELBO(2)
    cases = {
        "differentiated": (outside, config_gradient(guided, {"g": "rebar"}), None, {}),
        "importance": (outside, guided, importance, {}),
        "summed": (summed, nothing, Estimator_ELBO(max_plate_nesting=1), {}),
        "two plates": (two_plates, nothing, None, {}),
        "sequential": (sequential, nothing, None, {}),
        "no plate": (unplated, nothing, None, {}),
        "another name": (plain, nothing, None, {"plate": "images"}),
        "other values": (other_values, nothing, None, {}),
        "of each datum": (of_each_datum, nothing, None, {}),
        "other parameters": (other_parameters, nothing, None, {}),
    }
    found = {}
    for name, (model, guide, elbo, options) in cases.items():
        svi = split(model, guide, elbo, **options)
        try:
            svi.step(torch.arange(4.0) + rank)
        except ValueError as error:
            found[name] = str(error)
    svi = split(two_plates, nothing, plate="data")  # which the error advises
    svi.step(torch.zeros(4))
    return found


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    found: dict = {case: train(case, SHARES[rank]) for case in CASES}
    for other in (draws, sometimes, met, minibatches, shared_minibatches, late, refusals):
        found[other.__name__] = other(rank)
    found["resumed"] = resumed(rank, folder)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
