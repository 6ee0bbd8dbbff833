"""The kernels that draw on a GPU: run on one, or by Triton's interpreter (`make test-triton`)."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from helpers.laws import chi_square_p, count_z

from pyro_gumbel.distributions import draw_one_hot, one_hot
from pyro_gumbel.infer._recording import record

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)

from pyro_gumbel.distributions import _triton  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
ONCE = torch.Size()
TINY_P = 2e-5
INF = math.inf


def draw(logits, sample_shape=ONCE):
    drawn = _triton.one_hot_draw(logits.to(DEVICE), torch.Size(sample_shape))
    assert drawn.dtype == logits.dtype
    assert drawn.shape == (*sample_shape, *logits.shape)
    assert ((drawn == 0) | (drawn == 1)).all()
    assert (drawn.sum(-1, dtype=torch.float64) == 1).all()
    return drawn.cpu()


@pytest.mark.parametrize("shape", [(1,), (7, 1), (5, 3), (2, 3, 17), (3, 64), (1025,), (2, 4100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_row_is_one_hot(shape, dtype):
    draw(torch.randn(shape).to(dtype))


@pytest.mark.parametrize("offset", [0.0, 2.0**23, -(2.0**23)])
def test_law_of_short_rows(offset):
    probs = torch.tensor([[0.02, 0.28, 0.7], [0.5, 0.25, 0.25]])
    logits = (probs.double().log() + offset).float()
    counts = draw(logits, (20_000,)).sum(0)
    for row in range(2):
        # What float32 leaves of the probabilities beside the offset is what is to be drawn.
        law = (logits[row].double() - logits[row].max()).softmax(-1)
        assert chi_square_p(counts[row], law) > TINY_P


@pytest.mark.parametrize("offset", [0.0, 2.0**23])
def test_law_of_long_rows_across_their_chunks(offset):
    places = [3, 4095, 4096, 8191, 8999]
    weights = torch.tensor([0.2, 0.3, 3.0, 1.5, 2.5])
    logits = torch.full((9000,), -INF)
    logits[places] = weights.log() + offset
    drawn = draw(logits, (400,))
    assert drawn[:, places].sum() == 400
    law = (logits[places].double() - logits.max()).softmax(-1)
    assert chi_square_p(drawn[:, places].sum(0), law) > TINY_P


def test_many_equal_categories():
    """Small noise decides among many categories."""
    drawn = draw(torch.zeros(5000), (400,))
    place = drawn.argmax(-1)
    assert abs(count_z(int((place < 1250).sum()), 400, 0.25)) < 5
    assert abs(count_z(int((place >= 4096).sum()), 400, 904 / 5000)) < 5
    assert len(place.unique()) > 350  # 384 expected; a coarse lattice repeats itself


def test_no_weight_is_no_draw():
    logits = torch.tensor([-INF, 0.0, -INF, -1.0, -INF]).expand(500, 5)
    assert draw(logits)[:, [0, 2, 4]].sum() == 0


def test_rows_and_copies_have_noise_of_their_own():
    drawn = draw(torch.zeros(40, 16), (30,)).argmax(-1).double()
    columns = torch.corrcoef(torch.cat([drawn, drawn[:, 1:] - drawn[:, :-1]], 1).T)
    assert columns[:40, :40].fill_diagonal_(0).abs().max() < 5 / math.sqrt(30)
    assert (drawn.std(0) > 0).all()


def test_not_contiguous():
    logits = torch.full((4, 6), -INF)
    logits[torch.arange(4), torch.arange(4)] = 0.0
    drawn = _triton.one_hot_draw(logits.to(DEVICE).T, ONCE).cpu()
    assert torch.equal(drawn[:4], torch.eye(4))


def test_the_seed_rules():
    logits = torch.randn(50, 20)
    torch.manual_seed(3)
    one = draw(logits)
    torch.manual_seed(3)
    assert torch.equal(draw(logits), one)
    assert not torch.equal(draw(logits), one)


def test_nothing_and_too_much_are_left_to_others():
    assert _triton.one_hot_draw(torch.zeros(0, 3, device=DEVICE), ONCE) is None
    assert _triton.one_hot_draw(torch.zeros(3, device=DEVICE), torch.Size([0])) is None
    many = torch.zeros(1, device=DEVICE).expand(2**31)
    assert _triton.one_hot_draw(many, ONCE) is None


def test_recordings_draw_anew():
    logits = torch.randn(40, 10, device=DEVICE)
    _, recording = record(lambda x: [_triton.one_hot_draw(x, ONCE) * 2], [logits])
    torch.manual_seed(5)
    (replayed,), _ = recording([logits])
    torch.manual_seed(5)
    assert torch.equal(replayed, _triton.one_hot_draw(logits, ONCE) * 2)
    (other,), _ = recording([logits])
    assert not torch.equal(other, replayed)


@pytest.mark.parametrize(("kernel", "sizes"), [("rows", {"ROWS": 64, "WIDTH": 16}), ("chunk", {})])
def test_kernels_compile_for_gpus(kernel, sizes, tmp_path):
    """This needs no GPU. The interpreter accepts more than the compiler does."""
    program = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pyro_gumbel.distributions import _triton

def cubin(kernel, of, constants):
    types = {{name: "i32" for name in kernel.arg_names}} | of
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]

for dtype in ("*fp32", "*bf16"):
    tensors = {{"logits": dtype, "draw": dtype, "seed": "*i64"}}
    if {kernel!r} == "rows":
        assert cubin(_triton._draw_rows, tensors, {sizes})
    else:
        assert cubin(_triton._draw_chunk, tensors | {{"best": "*fp32"}}, {{"CHUNK": 4096}})
        places = {{"best": "*fp32", "draw": dtype}}
        assert cubin(_triton._place_one, places, {{"CHUNK": 4096, "WIDTH": 16}})
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@pytest.fixture
def fresh_kernel():
    one_hot._fused_kernel.cache_clear()
    yield
    one_hot._fused_kernel.cache_clear()


@pytest.mark.usefixtures("fresh_kernel")
def test_what_does_not_compile_is_told_once_and_done_without(monkeypatch):
    def fail(device):
        raise OSError("no C compiler")

    monkeypatch.setattr(_triton, "try_out", fail)
    with pytest.warns(UserWarning, match="cannot compile for cpu.*OSError: no C compiler"):
        assert one_hot._fused_draw(torch.zeros(3), ONCE) is None
    assert one_hot._fused_draw(torch.zeros(3), ONCE) is None


@pytest.mark.usefixtures("fresh_kernel")
def test_trying_out_takes_no_random_number():
    state = torch.get_rng_state()
    assert one_hot._fused_kernel(torch.device(DEVICE)) is _triton.one_hot_draw
    assert torch.equal(torch.get_rng_state(), state)


def test_double_precision_is_drawn_unfused():
    assert one_hot._fused_draw(torch.zeros(3, dtype=torch.float64, device=DEVICE), ONCE) is None


@pytest.mark.cuda
def test_large_draws_on_a_gpu_are_fused(monkeypatch):
    logits = torch.randn(1 << 10, 1 << 6, device="cuda")
    torch.manual_seed(7)
    fused = _triton.one_hot_draw(logits, ONCE)
    torch.manual_seed(7)
    assert torch.equal(draw_one_hot(logits), fused)
