"""The examples run as the README writes them, and their helpers do what they say."""

from __future__ import annotations

import gzip
import math
import struct
import subprocess
import sys
from pathlib import Path

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr

import checkpoint
import gradients
import history
import image_data
import pyro_comparison
import vae
from evaluation import held_out_bounds
from pyro_gumbel.infer import estimator_names
from vae_options import make_parser

ROOT = Path(__file__).parents[1]
TINY = ["--smoke", "--latents", "3", "--categories", "4", "--hidden", "16", "--num-samples", "5"]
QUICK = ["--epochs", "12", "--lr", "0.01"]
NAMES = [
    "auto",
    "disarm_tree",
    "double_control_variate",
    "enumerate",
    "gapped_straight_through",
    "gumbel_rao",
    "gumbel_softmax",
    "gumbel_straight_through",
    "local_expectation",
    "muprop",
    "rebar",
    "reinmax",
    "reinmax_rao",
    "score",
    "score:3",
    "straight_through",
    "sum_and_sample",
    "unordered_set",
]
OF_ONE_LATENT = ("enumerate", "sum_and_sample", "unordered_set")
NAMES_FOR_BITS = ["arms", "disarm", "rodeo"]


# Images


def idx_bytes(images: np.ndarray) -> bytes:
    return b"\x00\x00\x08\x03" + struct.pack(">3I", *images.shape) + images.tobytes()


def write_folder(folder: Path, *, packed: bool = False) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    written = {}
    for name, number in ((image_data.TRAIN_FILE, 25), (image_data.TEST_FILE, 12)):
        written[name] = generator.integers(0, 256, (number, 4, 5), dtype=np.uint8)
        raw = idx_bytes(written[name])
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
        else:
            (folder / name).write_bytes(raw)
    return written


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_idx_folder(tmp_path: Path, packed: bool) -> None:
    written = write_folder(tmp_path, packed=packed)
    images = image_data.load_images(str(tmp_path), "none")
    assert images.shape == (4, 5)
    expected = torch.tensor(written[image_data.TEST_FILE].reshape(12, 20)) / 255
    torch.testing.assert_close(images.test, expected, rtol=0, atol=0)
    assert images.train.shape == (25, 20)


def test_digits_are_split_without_overlap_or_loss() -> None:
    images = image_data.load_images(None, "none")
    assert (len(images.train), len(images.test), images.shape) == (1500, 297, (8, 8))
    total = (images.train.sum() + images.test.sum()).item() * 16
    assert total == 561718  # the sum of all pixels of the file


def test_threshold_is_one_half() -> None:
    grey = image_data.load_images(None, "none")
    bits = image_data.load_images(None, "threshold")
    assert torch.equal(bits.train, (grey.train * 16 >= 8).float())


def test_stochastic_pixels_are_new_each_epoch_and_the_same_when_held_out() -> None:
    images = image_data.load_images(None, "stochastic")
    first, second = (torch.cat(images.batches(1500)) for _ in range(2))
    assert set(first.unique().tolist()) == {0.0, 1.0}
    # Pixels that are surely on or off stay; sorted sums would agree only by accident.
    assert not torch.equal(first.sum(-1).sort().values, second.sum(-1).sort().values)
    assert torch.equal(images.test, image_data.load_images(None, "stochastic").test)


def test_batches_hold_every_image_once() -> None:
    images = image_data.load_images(None, "none").head(250, 10)
    batches = images.batches(100)
    assert [len(batch) for batch in batches] == [100, 100, 50]
    torch.testing.assert_close(torch.cat(batches).sum(0), images.train.sum(0))
    assert not torch.equal(batches[0], images.batches(100)[0])


def empty(folder: Path) -> None:
    pass


def missing_test(folder: Path) -> None:
    write_folder(folder)
    (folder / image_data.TEST_FILE).unlink()


def truncated(folder: Path) -> None:
    write_folder(folder)
    path = folder / image_data.TRAIN_FILE
    path.write_bytes(path.read_bytes()[:-7])


def labels_instead(folder: Path) -> None:
    write_folder(folder)
    (folder / image_data.TRAIN_FILE).write_bytes(b"\x00\x00\x08\x01" + bytes(30))


def broken_gzip(folder: Path) -> None:
    write_folder(folder, packed=True)
    path = folder / f"{image_data.TRAIN_FILE}.gz"
    path.write_bytes(path.read_bytes()[:-20])


def two_sizes(folder: Path) -> None:
    write_folder(folder)
    (folder / image_data.TEST_FILE).write_bytes(idx_bytes(np.zeros((3, 4, 4), np.uint8)))


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (empty, FileNotFoundError, "holds no train-images-idx3-ubyte"),
        (missing_test, FileNotFoundError, "holds no t10k-images-idx3-ubyte"),
        (truncated, ValueError, "is 500 bytes, but holds 493"),
        (labels_instead, ValueError, "is no IDX file of images"),
        (broken_gzip, ValueError, "is no whole gzip file"),
        (two_sizes, ValueError, "both have to be of one data set"),
    ],
)
def test_bad_folder(tmp_path: Path, spoil, error: type[Exception], match: str) -> None:
    spoil(tmp_path)
    with pytest.raises(error, match=match):
        image_data.load_images(str(tmp_path), "none")


def test_no_folder_and_no_such_binarization(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        image_data.load_images(str(tmp_path / "nowhere"), "none")
    with pytest.raises(ValueError, match="binarize is one of threshold, stochastic, none"):
        image_data.load_images(None, "round")


# The evaluator, against enumeration

PRIOR = torch.tensor([0.1, 0.2, 0.7])
LIKELIHOOD = torch.tensor([0.9, 0.5, 0.2])  # P(x = 1 | z)


def three_state_model(x: torch.Tensor) -> None:
    with pyro.plate("images", len(x)):
        z = pyro.sample("z", dist.OneHotCategorical(probs=PRIOR))
        pyro.sample("x", dist.Bernoulli(probs=z @ LIKELIHOOD), obs=x)


def log_joint(x: torch.Tensor) -> torch.Tensor:
    likelihood = torch.where(x[:, None] == 1, LIKELIHOOD, 1 - LIKELIHOOD)
    return (PRIOR * likelihood).log()  # (N, 3)


def test_bounds_are_the_evidence_under_the_true_posterior() -> None:
    x = torch.tensor([1.0, 0.0, 1.0, 1.0])

    def posterior(x: torch.Tensor) -> None:
        with pyro.plate("images", len(x)):
            pyro.sample("z", dist.OneHotCategorical(logits=log_joint(x)))

    bounds = held_out_bounds(three_state_model, posterior, x, num_samples=7, batch_size=3)
    evidence = log_joint(x).logsumexp(-1).mean().item()
    assert bounds.elbo == pytest.approx(evidence, rel=1e-6)
    assert bounds.importance_weighted == pytest.approx(evidence, rel=1e-6)


def test_elbo_agrees_with_enumeration_under_another_guide() -> None:
    x = torch.ones(4000)
    q = torch.tensor([0.5, 0.3, 0.2])

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("images", len(x)):
            pyro.sample("z", dist.OneHotCategorical(probs=q))

    bounds = held_out_bounds(three_state_model, guide, x, num_samples=10)
    log_weight = log_joint(x[:1])[0] - q.log()
    exact = (q * log_weight).sum().item()
    # 40,000 draws; each image's mean is one of 4,000 independent ones.
    assert abs(bounds.elbo - exact) < 5 * bounds.elbo_se
    variance = (q * (log_weight - exact) ** 2).sum().item()
    assert bounds.elbo_se == pytest.approx(math.sqrt(variance / 40_000), rel=0.1)
    evidence = log_joint(x[:1]).logsumexp(-1).item()
    assert exact < bounds.importance_weighted < evidence + 0.01


def test_evaluation_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("images", len(x)):
            pyro.sample("z", dist.OneHotCategorical(probs=PRIOR))

    results = [held_out_bounds(three_state_model, guide, torch.ones(5), 3) for _ in range(2)]
    assert results[0] == results[1]
    assert torch.equal(before, torch.get_rng_state())


# Estimators on the command line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("reinmax", ("ReinMax(1.0)", 2)),
        ("score:4", ("Score(LeaveOneOut())", 4)),
        ("score:1", ("Score(MovingAverage(0.9))", 1)),
        ("auto", ("Score(LeaveOneOut())", 2)),
        ("reinmax@1.3", ("ReinMax(1.3)", 2)),
        ("reinmax@.5", ("ReinMax(0.5)", 2)),
        ("reinmax@5e-1", ("ReinMax(0.5)", 2)),
        ("gumbel_rao@0.5:3", ("GumbelRao(0.5, num_samples=10)", 3)),
    ],
)
def test_parse(text: str, expected: tuple[str, int]) -> None:
    choice, num_particles = gradients.parse(text, num_particles=2)
    assert (repr(choice), num_particles) == expected


def test_temperature_goes_to_those_that_have_one() -> None:
    assert repr(gradients.parse("reinmax_rao", 1, 0.7)[0]) == "ReinMaxRao(0.7, num_samples=10)"
    assert repr(gradients.parse("score", 2, 0.7)[0]) == "Score(LeaveOneOut())"


def test_auto_is_pathwise_where_it_can_be() -> None:
    assert repr(gradients.parse("auto", reparameterized=True)[0]).startswith("Pathwise")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("reinmx", "names no estimator.*Did you mean 'reinmax'"),
        ("score@0.5", "score has no temperature"),
        ("reinmax:0", "at least 1"),
        ("ReinMax()", "write NAME, NAME@TEMPERATURE or NAME:K"),
        ("reinmax@1.3.2", "write NAME, NAME@TEMPERATURE or NAME:K"),
        ("reinmax@-1", "temperature must be positive"),
    ],
)
def test_parse_refuses(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        gradients.parse(text)


# Histories


def test_history_is_read_by_arviz(tmp_path: Path) -> None:
    epochs = {
        name: {
            seed: [{"train_loss": 10.0 * seed + i + shift} for i in range(4)] for seed in (3, 5)
        }
        for name, shift in (("a", 0.0), ("b", 0.5))
    }
    written = history.to_dataset(epochs, images="digits")
    assert float(written.train_loss.sel(chain=1, draw=2, gradient="b")) == 51.5
    assert written.seed.values.tolist() == [3, 5]
    history.save(written, tmp_path / "history.nc")
    history.save(written, tmp_path / "history.nc")  # over an older one
    assert "training" in az.from_netcdf(tmp_path / "history.nc")
    read = xr.load_dataset(tmp_path / "history.nc", group="training")
    np.testing.assert_array_equal(read.train_loss, written.train_loss)
    assert read.attrs["images"] == "digits"
    summary = az.summary(read, kind="diagnostics")
    assert list(summary.index) == ["train_loss[a]", "train_loss[b]"]
    az.plot_trace(read)
    plt.close("all")


# The auto-encoder


def run(*flags: str, gradient: str = "reinmax", seed: int = 0):
    args = make_parser("").parse_args([*TINY, *flags])
    images = image_data.load_images(args.data, args.binarize).head(120, 20)
    return vae.train(args, gradient, seed, images)


def parameters(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_every_name_is_tried() -> None:
    names = {gradient.partition(":")[0] for gradient in (*NAMES, *NAMES_FOR_BITS, "pathwise")}
    assert names == set(estimator_names())


@pytest.mark.parametrize("gradient", NAMES)
def test_every_name_trains(gradient: str) -> None:
    latents = ["--latents", "1"] if gradient in OF_ONE_LATENT else []
    fitted, epochs = run(*QUICK, *latents, gradient=gradient)
    losses = [epoch["held_out_loss"] for epoch in epochs]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 3
    assert torch.isfinite(parameters(fitted)).all()


@pytest.mark.parametrize(
    ("latent", "gradient"),
    [
        *(("bernoulli", name) for name in (*NAMES_FOR_BITS, "reinmax", "score:2")),
        ("normal", "pathwise"),
    ],
)
@pytest.mark.parametrize("kl", [[], ["--analytic-kl"]], ids=["sampled-kl", "analytic-kl"])
def test_other_latents_train(latent: str, gradient: str, kl: list[str]) -> None:
    _, epochs = run("--latent", latent, *QUICK, *kl, gradient=gradient)
    assert epochs[-1]["held_out_loss"] < epochs[0]["held_out_loss"] - 3


@pytest.mark.parametrize("binarize", ["threshold", "stochastic", "none"])
def test_targets(binarize: str) -> None:
    _, epochs = run("--binarize", binarize, "--epochs", "3")
    assert all(math.isfinite(epoch["train_loss"]) for epoch in epochs)


def test_same_seed_same_run() -> None:
    (one, first), (two, second) = run("--epochs", "2"), run("--epochs", "2")
    assert torch.equal(parameters(one), parameters(two))
    assert first[-1]["train_loss"] == second[-1]["train_loss"]
    assert not torch.equal(parameters(one), parameters(run("--epochs", "2", seed=1)[0]))


# Checkpoints


@pytest.mark.parametrize("optimizer", ["adam", "radam"])
@pytest.mark.parametrize(
    "gradient", ["reinmax", "score", "score:3", "gumbel_straight_through@0.7"]
)
def test_interrupted_run_equals_uninterrupted(
    tmp_path: Path, gradient: str, optimizer: str
) -> None:
    flags = ["--optimizer", optimizer, "--binarize", "stochastic"]
    whole, expected = run(*flags, "--epochs", "4", gradient=gradient)
    saving = [*flags, "--checkpoint", str(tmp_path / "run.pt")]
    run(*saving, "--epochs", "2", gradient=gradient)
    torch.rand(7)  # whatever happens in between
    resumed, epochs = run(*saving, "--epochs", "4", gradient=gradient)
    assert torch.equal(parameters(whole), parameters(resumed))
    for key in ("train_loss", "held_out_loss"):
        assert [e[key] for e in epochs] == [e[key] for e in expected]


def test_estimator_with_a_network_resumes(tmp_path: Path) -> None:
    flags = ["--latent", "bernoulli"]
    whole, _ = run(*flags, "--epochs", "4", gradient="rodeo")
    saving = [*flags, "--checkpoint", str(tmp_path / "run.pt")]
    run(*saving, "--epochs", "2", gradient="rodeo")
    resumed, _ = run(*saving, "--epochs", "4", gradient="rodeo")
    assert torch.equal(parameters(whole), parameters(resumed))


def test_finished_run_is_only_read(tmp_path: Path) -> None:
    saving = ["--epochs", "2", "--checkpoint", str(tmp_path / "run.pt")]
    first, _ = run(*saving)
    second, epochs = run(*saving)
    assert len(epochs) == 2
    assert torch.equal(parameters(first), parameters(second))


def not_a_checkpoint(path: Path) -> None:
    path.write_bytes(b"\x89PNG nothing of the kind")


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_bytes(path: Path) -> None:
    path.write_bytes(b"")


def somebody_elses(path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {}}, path)


def a_tensor(path: Path) -> None:
    torch.save(torch.zeros(3), path)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (not_a_checkpoint, "is no whole checkpoint"),
        (cut_short, "is no whole checkpoint"),
        (no_bytes, "is no whole checkpoint"),
        (somebody_elses, "was not written by this example"),
        (a_tensor, "was not written by this example"),
    ],
)
def test_bad_checkpoint(tmp_path: Path, spoil, match: str) -> None:
    path = tmp_path / "run.pt"
    run("--epochs", "1", "--checkpoint", str(path))
    spoil(path)
    with pytest.raises(checkpoint.CheckpointError, match=match):
        run("--epochs", "2", "--checkpoint", str(path))


def test_checkpoint_of_another_run(tmp_path: Path) -> None:
    saving = ["--epochs", "1", "--checkpoint", str(tmp_path / "run.pt")]
    run(*saving, "--latents", "3")
    with pytest.raises(checkpoint.CheckpointError, match="latents 3 there, 5 here"):
        run(*saving, "--latents", "5")
    with pytest.raises(checkpoint.CheckpointError, match="gradient 'reinmax' there, 'score' here"):
        run(*saving, gradient="score")


def test_checkpoint_with_more_epochs_than_asked_for(tmp_path: Path) -> None:
    saving = ["--checkpoint", str(tmp_path / "run.pt")]
    run(*saving, "--epochs", "2")
    match = "has 2 epochs behind it, and --epochs asks for 1: write --epochs 2 or more"
    with pytest.raises(checkpoint.CheckpointError, match=match):
        run(*saving, "--epochs", "1")


# The commands


def test_vae_command(tmp_path: Path) -> None:
    command = [sys.executable, "examples/vae.py", *TINY, "--out", str(tmp_path / "out")]
    compare = ["--compare", "reinmax,score:2", "--seeds", "2", "--device", "cpu"]
    done = subprocess.run(
        [*command, *compare], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("rein", "sco"))]
    assert [row[0] for row in rows] == ["reinmax", "score:2"]
    for name in ("reconstructions.png", "samples.png", "training.png", "history.nc"):
        assert name in done.stdout
        assert (tmp_path / "out" / name).stat().st_size > 1000


def test_folder_of_images_from_the_command_line(tmp_path: Path, capsys) -> None:
    write_folder(tmp_path, packed=True)
    vae.main([*TINY, "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "12 held-out images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--data", "nowhere"], "no folder nowhere"),
        (["--gradient", "reinmx"], "names no estimator"),
        (["--compare", "reinmax,reinmx"], "Did you mean 'reinmax'"),
        (["--compare", "reinmax,reinmax"], "'reinmax,reinmax' has an estimator twice"),
        (["--gradient", "pathwise"], "cannot serve a OneHotCategorical"),
        (["--latent", "bernoulli", "--gradient", "reinmax_rao"], "cannot serve"),
        (["--compare", "reinmax,score", "--checkpoint", "x.pt"], "--checkpoint is for one run"),
        (["--gradient", "reinmax", "--temperature", "0"], "temperature must be positive"),
        (["--batch-size", "0"], "--batch-size: expected a whole number of at least 1, got '0'"),
        (["--hidden", "8,x"], "--hidden: expected a whole number of at least 1, got 'x'"),
        (["--lr", "-1"], "--lr: expected a number above 0, got '-1'"),
        (["--out", f"{__file__}/pictures"], "--out: no folder can be made at"),
        (["--checkpoint", f"{__file__}/x.pt"], "--checkpoint: no folder can be made at"),
        (["--lr", "much"], "--lr: expected a number above 0, got 'much'"),
    ],
)
def test_bad_flags(capsys, flags: list[str], match: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        vae.main([*TINY, *flags])
    assert stopped.value.code == 2
    assert match in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_gpu(capsys) -> None:
    with pytest.raises(SystemExit):
        vae.main([*TINY, "--device", "cuda"])
    assert "write --device cpu" in capsys.readouterr().err


@pytest.mark.cuda
def test_vae_on_the_gpu(tmp_path: Path) -> None:
    vae.main([*TINY, "--device", "cuda", "--out", str(tmp_path)])
    assert (tmp_path / "samples.png").exists()


def test_pyro_comparison_command(capsys) -> None:
    pyro_comparison.main(["--smoke"])
    printed = capsys.readouterr().out
    for name in pyro_comparison.PROGRAMS:
        assert name in printed


@pytest.mark.slow
def test_straight_through_is_near_the_best_on_digits() -> None:
    """The model has a plain one-hot prior, under which Pyro's own class learns nothing."""
    args = make_parser("").parse_args([])
    images = image_data.load_images(None, "threshold")
    losses = {}
    for name in ("straight_through", "reinmax", "gumbel_straight_through", "score:4"):
        fitted, _ = vae.train(args, name, 0, images)
        losses[name] = -held_out_bounds(fitted.model, fitted.guide, images.test).elbo
    assert losses["straight_through"] < min(losses.values()) + 3
    assert max(losses.values()) < pyro_comparison.mean_image_loss(images) - 3
