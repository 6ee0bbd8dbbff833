"""Marks of the latent values that reached a result, smoothly or through a jump."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pytest
import torch
import torch.nn.functional as F
from pyro.ops.indexing import Vindex
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from pyro_gumbel.distributions import OneHot, RelaxedOneHot
from pyro_gumbel.distributions.families import log_mass
from pyro_gumbel.infer._dependence import Dependence, Mark

MU = torch.tensor([-1.0, 0.0, 2.0])
WEIGHT = torch.tensor([[1.0, -0.3], [0.2, 0.7], [-0.5, 1.1]], requires_grad=True)
SMOOTH, JUMP, NOT = Mark.SMOOTH, Mark.JUMP, None


class Cube(torch.autograd.Function):
    """Its forward runs without gradient mode, in several steps, and one in place."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        result = torch.empty_like(x)
        result.copy_(x * x)
        return result * x

    @staticmethod
    def backward(ctx, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * slope


class Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return MU[x.argmax(-1)]

    @staticmethod
    def backward(ctx, slope: Tensor) -> Tensor:
        return slope.unsqueeze(-1).expand(3)


class Untouched(torch.autograd.Function):
    """Its second argument gets no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        return x * y.sum()

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, None]:
        return slope, None


def seeded(module: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return module()


GRU = seeded(lambda: nn.GRU(3, 2))
LSTM = seeded(lambda: nn.LSTM(3, 2, bidirectional=True))
ATTENTION = seeded(lambda: nn.MultiheadAttention(4, 2))
NET = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)))


class Smooth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return (torch.relu(self.linear(x)) * 2).sum(-1)


class Hard(Smooth):
    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x)).sum(-1) * x.argmax(-1)


class Detached(Smooth):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.detach()).sum(-1)


def scripted(module: type[nn.Module]) -> nn.Module:
    return torch.jit.script(seeded(module))


def traced(module: type[nn.Module]) -> nn.Module:
    return torch.jit.trace(seeded(module), torch.ones(3))


def no_grad_block(z: Tensor) -> Tensor:
    with torch.no_grad():
        return z @ MU


def no_grad_into_function(z: Tensor) -> Tensor:
    with torch.no_grad():
        mean = z * 2
    return Untouched.apply(WEIGHT[:, 0], mean)


def inference_block(z: Tensor) -> Tensor:
    with torch.inference_mode():
        mean = z @ MU
    return mean.clone()


def written(z: Tensor) -> Tensor:
    buffer = torch.zeros(3)
    buffer[1] = z[0]
    return buffer.sum()


def written_by_view(z: Tensor) -> Tensor:
    buffer = torch.zeros(2, 3)
    buffer[0].add_(z)
    return buffer.sum()


def written_to_a_view(z: Tensor) -> Tensor:
    buffer = torch.zeros(3)
    part = buffer[:2]
    buffer.copy_(z)
    return part * 2


def written_in_data(z: Tensor) -> Tensor:
    buffer = torch.zeros(3)
    buffer.data[0] = z[0]
    return buffer * WEIGHT[:, 0]


def written_without_gradient(z: Tensor) -> Tensor:
    buffer = torch.zeros(3)
    with torch.no_grad():
        buffer.copy_(z)
    buffer[0] = WEIGHT[0, 0]
    return buffer


def written_by_index(z: Tensor) -> Tensor:
    return torch.zeros(3).scatter_(-1, z.argmax(-1, keepdim=True), 1.0)


def written_out(z: Tensor) -> Tensor:
    buffer = torch.zeros(3)
    torch.add(z, 1, out=buffer)
    return buffer


def clamped_in_place(z: Tensor) -> Tensor:
    """As torch's Gamma does: the tensor's numbers change, its gradient does not."""
    mean = z @ MU
    mean.detach().clamp_(min=-5)
    return mean


def leaf_anew(z: Tensor) -> Tensor:
    leaf = z.detach().requires_grad_()
    return leaf.view(3) * 2


def slope_without_graph(z: Tensor) -> Tensor:
    mean = (z @ WEIGHT).exp().sum()
    return torch.autograd.grad(mean, WEIGHT)[0].sum()


def slope_with_graph(z: Tensor) -> Tensor:
    mean = (z @ WEIGHT).exp().sum()
    return torch.autograd.grad(mean, WEIGHT, create_graph=True)[0].sum()


def backward(z: Tensor) -> Tensor:
    leaf = torch.ones((), requires_grad=True)
    (z.sum() * leaf).backward()
    return leaf.grad * 1


def counted(z: Tensor) -> Tensor:
    return torch.tensor(float(len((z > 0.5).nonzero())))


def masked_away(z: Tensor) -> Tensor:
    return torch.ones(z[z > 0.5].shape[0])


def branch(z: Tensor) -> Tensor:
    return torch.tensor(1.0) if z[0] > 0.5 else torch.tensor(-1.0)


def doubled(z: Tensor) -> Tensor:
    while z.norm() < 10:
        z = z * 2
    return z


@torch.jit.script
def scripted_branch(z: Tensor) -> Tensor:
    return torch.ones(2) if bool(z[0] > 0.5) else torch.zeros(2)


def python(read: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
    def program(z: Tensor) -> Tensor:
        read(z)
        return torch.ones(2) * 3

    return program


def straight_through(z: Tensor) -> Tensor:
    soft = (z * 2).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), 3).to(soft.dtype)
    return hard - soft.detach() + soft


def packed(z: Tensor) -> Tensor:
    """Of two sequences with two and three elements."""
    values = z.view(3, 1, 1).expand(3, 2, 3)
    sequences = nn.utils.rnn.pack_padded_sequence(values, torch.tensor([3, 2]))
    return nn.utils.rnn.pad_packed_sequence(GRU(sequences)[0])[0]


def gelu_network(z: Tensor) -> Tensor:
    return F.gelu(F.dropout(F.linear(z, WEIGHT.T), 0.5)).sum()


PROGRAMS: dict[str, tuple[Callable[[Tensor], Tensor], Mark | None]] = {
    # reached by operations with a gradient
    "product": (lambda z: z @ MU, SMOOTH),
    "einsum": (lambda z: torch.einsum("i,ij->j", z, WEIGHT), SMOOTH),
    "source of gather": (lambda z: z.gather(-1, torch.tensor([1])), SMOOTH),
    "Vindex source": (lambda z: Vindex(z)[torch.tensor([0, 2])], SMOOTH),
    "masked source": (lambda z: z[torch.tensor([True, False, True])], SMOOTH),
    "loop over elements": (lambda z: sum(x * m for x, m in zip(z, MU, strict=True)), SMOOTH),
    "branch of where": (lambda z: torch.where(MU > 0, z, 1.0), SMOOTH),
    "relu": (lambda z: (z - 0.5).relu().abs().clamp(max=3), SMOOTH),
    "largest": (lambda z: z.max(-1).values + z.amax() + z.sort().values[0], SMOOTH),
    "index_put": (lambda z: torch.zeros(3).index_put((torch.tensor([1]),), z[:1]), SMOOTH),
    "scatter source": (lambda z: torch.zeros(3).scatter(0, torch.tensor([2, 0, 1]), z), SMOOTH),
    "stack": (lambda z: torch.stack([z, MU]).unbind()[0], SMOOTH),
    "in place": (lambda z: torch.zeros(3).add_(z).mul_(2), SMOOTH),
    "setitem": (written, SMOOTH),
    "write through a view": (written_by_view, SMOOTH),
    "write seen by a view": (written_to_a_view, SMOOTH),
    "clamp of the data": (clamped_in_place, SMOOTH),
    "in place on the value": (lambda z: z.mul_(2).sum(), SMOOTH),
    "custom function": (lambda z: Cube.apply(z).sum(), SMOOTH),
    "checkpoint": (lambda z: checkpoint(NET, z, use_reentrant=False), SMOOTH),
    "reentrant checkpoint": (lambda z: checkpoint(NET, z, use_reentrant=True), SMOOTH),
    "network": (lambda z: NET(z), SMOOTH),
    "gelu and dropout": (gelu_network, SMOOTH),
    "GRU": (lambda z: GRU(z.view(1, 1, 3))[1], SMOOTH),
    "LSTM": (lambda z: LSTM(z.view(1, 1, 3))[1][1], SMOOTH),
    "attention": (
        lambda z: ATTENTION(*[F.pad(z, (0, 1)).expand(2, 4)] * 3, need_weights=True)[1],
        SMOOTH,
    ),
    "batch norm": (lambda z: nn.BatchNorm1d(3)(z.expand(4, 3) * MU[:, None].mean()), SMOOTH),
    "functional_call": (
        lambda z: functional_call(nn.Linear(3, 1), {"weight": z[None], "bias": MU[:1]}, MU),
        SMOOTH,
    ),
    "vmap": (lambda z: vmap(lambda row, x: row * x * 2)(WEIGHT, z), SMOOTH),
    "jvp": (lambda z: jvp(lambda x: (x**2).sum(), (z,), (MU,))[1], SMOOTH),
    "functional gradient": (lambda z: grad(lambda x: (x**2 * MU).sum())(z), SMOOTH),
    "gradient with graph": (slope_with_graph, SMOOTH),
    "sparse": (lambda z: torch.sparse.mm(torch.diag(z).to_sparse(), WEIGHT), SMOOTH),
    "sparse values": (
        lambda z: torch.sparse_coo_tensor(
            torch.tensor([[0, 1, 2]]), z, (4,), check_invariants=True
        ).to_dense(),
        SMOOTH,
    ),
    "embedding weight": (lambda z: F.embedding(torch.tensor([0]), z[:, None]), SMOOTH),
    "double precision": (lambda z: z.double() @ MU.double(), SMOOTH),
    "float": (lambda z: z.float() @ MU, SMOOTH),
    "complex": (lambda z: (torch.complex(z, MU) ** 2).real, SMOOTH),
    "packed sequence": (packed, SMOOTH),
    "data moved": (lambda z: z.clone().contiguous().view(3, 1).squeeze(-1)[None].T, SMOOTH),
    # reached through a jump
    "argmax": (lambda z: MU[z.argmax(-1)], JUMP),
    "argmax of two": (lambda z: z @ MU + WEIGHT[z.argmax(-1)].sum(), JUMP),
    "long": (lambda z: MU[(z * torch.arange(3.0)).sum().long()], JUMP),
    "Vindex": (lambda z: Vindex(WEIGHT)[z.argmax(-1), 0], JUMP),
    "embedding": (lambda z: F.embedding(z.long(), WEIGHT), JUMP),
    "gather index": (lambda z: MU.gather(-1, z.max(-1, keepdim=True).indices), JUMP),
    "comparison": (lambda z: (z[0] > 0.5) * WEIGHT, JUMP),
    "where": (lambda z: torch.where(z[0] > 0.5, WEIGHT, -WEIGHT), JUMP),
    "masked_fill": (lambda z: WEIGHT.masked_fill((z == 1)[:, None], 0.0), JUMP),
    "bool": (lambda z: WEIGHT * z.bool()[:, None], JUMP),
    "round": (lambda z: z.round(), JUMP),
    "floor division": (lambda z: z // 0.3, JUMP),
    "remainder": (lambda z: (3 * z) % 2, JUMP),
    "fake quantisation": (
        lambda z: torch.fake_quantize_per_tensor_affine(z, 0.1, 0, 0, 255),
        JUMP,
    ),
    "sign": (lambda z: torch.sign(z - 0.5), JUMP),
    "rounding division": (lambda z: torch.div(z, 0.3, rounding_mode="floor"), JUMP),
    "one_hot": (lambda z: F.one_hot(z.long(), 3) * 1.0, JUMP),
    "scatter": (written_by_index, JUMP),
    "bucketize": (lambda z: torch.bucketize(z, MU) * 1.0, JUMP),
    "topk": (lambda z: z.topk(1).indices * 1.0, JUMP),
    "tangent": (lambda z: jvp(lambda x: (x**2).sum(), (MU,), (z,))[1], JUMP),  # not told apart
    "detach": (lambda z: z.detach() @ MU, JUMP),
    "beside its detached self": (lambda z: torch.stack([z, z.detach()]), JUMP),
    "beside its detached self, last": (lambda z: torch.stack([z.detach(), z]), JUMP),
    "data": (lambda z: z.data * WEIGHT[:, 0], JUMP),
    "no_grad": (no_grad_block, JUMP),
    "no_grad into a function": (no_grad_into_function, JUMP),
    "inference_mode": (inference_block, JUMP),
    "write of data": (written_in_data, JUMP),
    "write without gradient": (written_without_gradient, JUMP),
    "out=": (written_out, JUMP),
    "new leaf": (leaf_anew, JUMP),
    "gradient without graph": (slope_without_graph, JUMP),
    "backward": (backward, JUMP),
    "new parameter": (lambda z: nn.Parameter(z) * 2, JUMP),
    "list of numbers": (lambda z: torch.tensor([z[0], z[1]]), JUMP),
    "numpy and back": (lambda z: torch.from_numpy(z.detach().numpy()), JUMP),
    "order of Python": (lambda z: sorted(z)[0] * 1, JUMP),
    "while": (doubled, JUMP),
    "scripted if": (lambda z: scripted_branch(z) * 1, JUMP),
    "custom lookup": (lambda z: Lookup.apply(z), JUMP),
    "straight-through by hand": (straight_through, JUMP),
    "own draw": (lambda z: torch.bernoulli(z), JUMP),
    "own normal draw": (lambda z: torch.normal(z, 1.0), JUMP),
    "argument without derivative": (
        lambda z: F.nll_loss(WEIGHT.T, torch.tensor([0, 1]), weight=z),
        JUMP,
    ),
    "vmapped lookup": (lambda z: vmap(lambda row: MU[row.argmax()])(z.expand(2, 3)), JUMP),
    "if": (branch, JUMP),
    "item": (python(lambda z: z.sum().item()), JUMP),
    "int": (python(lambda z: int(z[0])), JUMP),
    "float of Python": (python(lambda z: float(z[0])), JUMP),
    "bool of Python": (python(lambda z: bool(z[0])), JUMP),
    "tolist": (python(lambda z: z.tolist()), JUMP),
    "numpy": (python(lambda z: z.numpy()), JUMP),
    "asarray": (python(lambda z: np.asarray(z)), JUMP),
    "index of a list": (python(lambda z: [1, 2, 3][z.argmax()]), JUMP),
    "range": (python(lambda z: list(range(z.argmax()))), JUMP),
    "contains": (python(lambda z: 1.0 in z), JUMP),
    "equal": (python(lambda z: torch.equal(z, MU)), JUMP),
    "number of ones": (counted, JUMP),
    "shape of a selection": (masked_away, JUMP),
    "view after a read": (lambda z: MU[:1] if z.tolist() else MU, JUMP),
    "plate size": (python(lambda z: pyro.plate("n", z.argmax() + 1)), JUMP),
    # not reached
    "nothing": (lambda z: MU * 2, NOT),
    "shape": (lambda z: torch.ones(z.shape[0]) * len(z) * z.dim(), NOT),
    "like": (lambda z: torch.zeros_like(z) + z.new_ones(3) + torch.rand_like(z), NOT),
    "dtype": (lambda z: MU.to(z).type_as(z).expand_as(z) * MU.to(z.device), NOT),
    "broadcast": (lambda z: torch.broadcast_tensors(MU[:, None], z)[0] * 2, NOT),
    "other of two": (lambda z: torch.ones(2, 3) * MU, NOT),
    "print": (python(lambda z: f"{z} {z[0]:.2f} {z!r}"), NOT),
    "nan check": (python(lambda z: bool(z.isnan().any()) or bool(z.isfinite().all())), NOT),
    "copy": (python(lambda z: copy.deepcopy(z)), NOT),
}


def one_hot() -> Tensor:
    return torch.tensor([0.0, 1.0, 0.0])


@pytest.mark.parametrize("name", PROGRAMS)
def test_marks(name: str) -> None:
    program, expected = PROGRAMS[name]
    with Dependence() as dependence:
        z = dependence.follow("z", one_hot())
        result = program(z)
        marks = dependence.marks(result)
    assert marks == ({} if expected is None else {"z": expected})


def torchscript_marks(program: nn.Module, runs: int, with_gradient: bool) -> dict[str, Mark]:
    for _ in range(runs):
        program(one_hot().requires_grad_(with_gradient))
    with Dependence() as dependence:
        return dict(dependence.marks(program(dependence.follow("z", one_hot()))))


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("runs", [0, 1, 3])
@pytest.mark.parametrize("make", [scripted, traced])
@pytest.mark.parametrize("module", [Hard, Detached])
def test_jumps_in_torchscript(
    module: type[nn.Module], make: Callable, runs: int, with_gradient: bool
) -> None:
    """Before and after the executor has specialised its code."""
    assert torchscript_marks(make(module), runs, with_gradient) == {"z": JUMP}


@pytest.mark.parametrize("make", [scripted, traced])
def test_smooth_torchscript(make: Callable) -> None:
    """Code that the executor has specialised for gradients may count as a jump."""

    class Fresh(Smooth):
        def forward(self, x: Tensor) -> Tensor:
            return (torch.tanh(self.linear(x)) * 2).sum(-1)

    assert torchscript_marks(make(Fresh), 0, True) == {"z": SMOOTH}
    assert set(torchscript_marks(make(Fresh), 3, True)) == {"z"}


SCORES: dict[str, tuple[Callable[[Tensor], Tensor], Mark | None]] = {
    "Normal": (lambda y: dist.Normal(y, y.exp()).log_prob(MU[0]), SMOOTH),
    "Laplace": (lambda y: dist.Laplace(y, 1.0).log_prob(MU[0]), SMOOTH),
    "AsymmetricLaplace": (lambda y: dist.AsymmetricLaplace(y, 1.0, 2.0).log_prob(MU[0]), SMOOTH),
    "HalfNormal": (lambda y: dist.HalfNormal(y.exp()).log_prob(MU[2]), SMOOTH),
    "HalfCauchy": (lambda y: dist.HalfCauchy(y.exp()).log_prob(MU[2]), SMOOTH),
    "Uniform": (lambda y: dist.Uniform(y - 9, y + 9).log_prob(MU[2]), SMOOTH),
    "Uniform of the value": (lambda y: dist.Uniform(-9.0, 9.0).log_prob(y), SMOOTH),
    "HalfNormal of the value": (lambda y: dist.HalfNormal(1.0).log_prob(y.exp()), SMOOTH),
    "Delta": (lambda y: dist.Delta(y).log_prob(y), SMOOTH),
    "Poisson": (lambda y: dist.Poisson(y.exp()).log_prob(MU[2]), SMOOTH),
    "ZeroInflatedPoisson": (
        lambda y: dist.ZeroInflatedPoisson(y.exp(), gate=y.sigmoid()).log_prob(MU[2]),
        SMOOTH,
    ),
    "Bernoulli": (lambda y: dist.Bernoulli(logits=y).log_prob(torch.ones(())), SMOOTH),
    "Categorical": (lambda y: dist.Categorical(logits=y * MU).log_prob(torch.tensor(1)), SMOOTH),
    "OneHotCategorical": (
        lambda y: dist.OneHotCategorical(logits=y * MU).log_prob(one_hot()),
        SMOOTH,
    ),
    "Gamma": (lambda y: dist.Gamma(y.exp(), 1.0).rsample().log(), SMOOTH),
    "Beta": (lambda y: dist.Beta(y.exp(), 1.0).rsample(), SMOOTH),
    "StudentT": (lambda y: dist.StudentT(3.0, y).rsample(), SMOOTH),
    "MultivariateNormal": (
        lambda y: dist.MultivariateNormal(y * MU, y.exp() * torch.eye(3)).log_prob(MU),
        SMOOTH,
    ),
    "mixture": (
        lambda y: dist.MixtureSameFamily(
            dist.Categorical(logits=MU), dist.Normal(y * MU, 1.0)
        ).log_prob(MU[0]),
        SMOOTH,
    ),
    "spline": (
        lambda y: dist.TransformedDistribution(
            dist.Normal(torch.zeros(2), 1.0), [seeded(lambda: transforms.spline(2))]
        ).log_prob(y.expand(2)),
        SMOOTH,
    ),
    "Rejector": (lambda y: dist.VonMises(y, y.exp()).sample(), JUMP),
    "mask of the value": (lambda y: dist.Normal(y, 1.0).mask(y > 0).log_prob(MU[0]), JUMP),
    "mixture by a mask": (
        lambda y: dist.MaskedMixture(y > 0, dist.Normal(0.0, 1.0), dist.Normal(y, 1.0)).log_prob(
            MU[0]
        ),
        JUMP,
    ),
    "value of OneHotCategorical": (
        lambda y: dist.OneHotCategorical(logits=WEIGHT[:, 0]).log_prob(one_hot() * y),
        JUMP,
    ),
    "value of Categorical": (
        lambda y: dist.Categorical(logits=WEIGHT[:, 0]).log_prob(y.long()),
        JUMP,
    ),
    "multilinear mass": (
        lambda y: log_mass(dist.OneHotCategorical(logits=MU), one_hot() * y),
        SMOOTH,
    ),
    "mass of a bit": (lambda y: log_mass(dist.Bernoulli(0.3), y), SMOOTH),
    "own OneHot": (lambda y: OneHot(logits=MU).log_prob(one_hot() * y), SMOOTH),
    "own relaxed density": (
        lambda y: RelaxedOneHot(0.5, logits=MU * y).log_prob(torch.tensor([0.2, 0.3, 0.5])),
        SMOOTH,
    ),
    "KL": (
        lambda y: torch.distributions.kl_divergence(
            dist.Categorical(logits=y * MU), dist.Categorical(probs=torch.tensor([0.5, 0.2, 0.3]))
        ),
        SMOOTH,
    ),
    "KL of gammas": (
        lambda y: torch.distributions.kl_divergence(
            dist.Gamma(y.exp(), 1.0), dist.Gamma(2.0, 1.0)
        ),
        SMOOTH,
    ),
}


@pytest.mark.parametrize("name", SCORES)
def test_distributions(name: str) -> None:
    """Their own checks and case distinctions do not count as jumps of the program."""
    program, expected = SCORES[name]
    with Dependence() as dependence:
        y = dependence.follow("y", torch.tensor(1.0))
        result = program(y)
        after = MU * 2
        reached = dependence.marks(result).get("y", NOT)
        assert dependence.marks(after) == {}
    assert reached is not None
    assert (reached is JUMP) == (expected is JUMP)


class Thresholded(dist.Normal):
    """A user's family, whose score reads the value by a comparison of its own."""

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) * (self.loc > 0)


def test_a_comparison_in_a_users_family_is_a_jump() -> None:
    with Dependence() as dependence:
        y = dependence.follow("y", torch.tensor(1.0))
        assert dependence.marks(Thresholded(y, 1.0).log_prob(MU[0])) == {"y": JUMP}


def test_values_are_followed_apart() -> None:
    with Dependence() as dependence:
        z = dependence.follow("z", one_hot())
        b = dependence.follow("b", torch.tensor(1.0))
        c = dependence.follow("c", torch.tensor(2))
        assert dependence.marks(z @ MU) == {"z": SMOOTH}
        assert dependence.marks(z * b) == {"z": SMOOTH, "b": SMOOTH}
        assert dependence.marks(z * (b > 0)) == {"z": SMOOTH, "b": JUMP}
        assert dependence.marks(MU[c]) == {"c": JUMP}
        assert dependence.marks(torch.broadcast_tensors(z[:, None], b)[1]) == {"b": SMOOTH}


def test_a_drawn_value_starts_anew_and_a_reparameterised_one_carries_on() -> None:
    with Dependence() as dependence:
        z = dependence.follow("z", one_hot())
        drawn = dependence.follow("drawn", dist.Normal(z @ MU, 1.0).sample())
        moved = dependence.follow("moved", dist.Normal(z @ MU, 1.0).rsample())
        assert dependence.marks(drawn * 2) == {"drawn": SMOOTH}
        assert dependence.marks(moved * 2) == {"z": SMOOTH, "moved": SMOOTH}


def test_following_keeps_the_tensor() -> None:
    """Transforms find a value's inverse by the tensor itself, and programs write in place."""
    flow = transforms.planar(2).requires_grad_(False)
    with Dependence() as dependence:
        fn = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0), [flow])
        drawn = fn.sample()
        y = dependence.follow("y", drawn)
        assert y is drawn
        assert torch.isfinite(fn.log_prob(y))
        y.clamp_(min=0.0)
        assert dependence.marks(y * 2) == {"y": SMOOTH}


def test_a_program_may_see_values_without_gradient() -> None:
    """An operation that refuses tensors with a gradient works as it does without following."""
    with Dependence() as dependence:
        z = dependence.follow("z", one_hot())
        assert z.numpy().tolist() == [0.0, 1.0, 0.0]
        assert copy.deepcopy(z).tolist() == [0.0, 1.0, 0.0]
        assert float(z[1]) == 1.0


def test_errors_of_the_program_are_its_own() -> None:
    with Dependence() as dependence:
        z = dependence.follow("z", one_hot())
        with pytest.raises(RuntimeError, match="size of tensor a"):
            z + torch.ones(2)


def test_a_draw_that_is_stored_is_left_as_it_was() -> None:
    stored = one_hot()
    with Dependence() as dependence:
        assert dependence.follow("z", stored).requires_grad
    assert not stored.requires_grad
    assert stored.is_leaf


def test_reads_of_python_are_noted() -> None:
    """A program that reads any tensor may take another course with other data."""
    with Dependence() as dependence:
        dependence.follow("z", one_hot())
        dist.Normal(MU, 1.0).log_prob(MU)
        packed(MU)
        nn.BatchNorm1d(3, momentum=None)(MU.expand(2, 3))
        assert not dependence.reads_values
        after = MU * 2
        assert not bool(MU[0] > 0)
        assert dependence.reads_values
        assert dependence.marks(after * 2) == {}


def test_one_inside_another() -> None:
    with Dependence() as outer:
        z = outer.follow("z", one_hot())
        with Dependence() as inner:
            b = inner.follow("b", torch.tensor(1.0))
            both = (z @ MU) * b
            assert inner.marks(both) == {"b": SMOOTH}
        assert outer.marks(both) == {"z": SMOOTH}
        assert outer.marks(both > 0) == {"z": JUMP}


def test_nothing_is_kept_alive() -> None:
    with Dependence() as dependence:
        z = dependence.follow("z", one_hot())
        between = z * 2
        seen = weakref.ref(between)
        del between
        gc.collect()
        assert seen() is None
        result = z @ MU
    seen = [weakref.ref(tensor) for tensor in (z, result)]
    del z, result
    gc.collect()
    assert [reference() for reference in seen] == [None, None]


def test_no_gradient_mode() -> None:
    """What is reached is seen in any case; what is smooth, by gradients alone."""
    with torch.no_grad(), Dependence() as dependence:
        z = dependence.follow("z", one_hot())
        assert set(dependence.marks(z @ MU)) == {"z"}
        assert dependence.marks(MU * 2) == {}


@pytest.mark.parametrize("module", [Smooth, Hard])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.slow
def test_compiled_modules_run_as_they_are_written(module: type[nn.Module], warm: bool) -> None:
    from torch._dynamo.utils import counters

    compiled = torch.compile(seeded(module), backend="eager")
    if warm:
        compiled(one_hot().requires_grad_())
    counters.clear()
    with Dependence() as dependence:
        z = dependence.follow("z", one_hot())
        marks = dependence.marks(compiled(z))
    assert marks == {"z": SMOOTH if module is Smooth else JUMP}
    assert not counters["stats"]


def test_the_compiler_is_not_imported() -> None:
    """It takes seconds; here it may have been imported by another test."""
    loaded = "torch._dynamo" in sys.modules
    with Dependence() as dependence:
        dependence.marks(dependence.follow("z", one_hot()) @ MU)
    assert ("torch._dynamo" in sys.modules) == loaded
