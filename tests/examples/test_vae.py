"""The auto-encoder trains, resumes, and raises errors about bad options."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint
import image_data
import pyro_comparison
import vae
from evaluation import held_out_bounds
from pyro_gumbel.infer import estimator_names
from vae_options import make_parser

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


# Training


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


# The tensors in a checkpoint of version 0.1.0.
LAYERS_0_1 = {
    "encoder.0.weight": (16, 64),
    "encoder.0.bias": (16,),
    "encoder.2.weight": (12, 16),
    "encoder.2.bias": (12,),
    "decoder.0.weight": (16, 12),
    "decoder.0.bias": (16,),
    "decoder.2.weight": (64, 16),
    "decoder.2.bias": (64,),
}
ESTIMATORS_0_1 = {
    "rebar": {"log_temperature": torch.tensor(-0.7), "scale": torch.tensor(0.9)},
    "score": {
        "baseline._extra_state": {
            "sums": {"z": torch.tensor(-14.2)},
            "weights": {"z": torch.tensor(0.34)},
        }
    },
}
SETTINGS_0_1 = {
    "binarize": "threshold",
    "latent": "onehot",
    "latents": 3,
    "categories": 4,
    "hidden": [16],
    "temperature": None,
    "num_particles": 1,
    "analytic_kl": False,
    "seed": 0,
    "batch_size": 100,
    "lr": 0.003,
    "optimizer": "adam",
    "images": "digits, 120 images of 64 pixels",
    "processes": 1,
}


def checkpoint_0_1(gradient: str) -> dict[str, Any]:
    layers = {name: torch.randn(shape) / 10 for name, shape in LAYERS_0_1.items()}
    optimizer = {}
    trained = {name.replace(".", "$$$", 1): value for name, value in layers.items()}
    for name, value in ESTIMATORS_0_1[gradient].items():
        if isinstance(value, torch.Tensor):
            trained[f"gradient$z$$${name}"] = value
    for name, value in trained.items():
        one = torch.optim.Adam([value.clone().requires_grad_()], lr=0.003)
        one.param_groups[0]["params"][0].grad = torch.ones_like(value)
        one.step()
        optimizer[name] = one.state_dict()
    return {
        "format": "pyro_gumbel examples, checkpoint 1",
        "settings": {**SETTINGS_0_1, "gradient": gradient},
        "epochs": [{"train_loss": 44.0, "held_out_loss": 42.0, "seconds": 2.2}],
        "module": {
            **{f"0.{name}": value for name, value in layers.items()},
            "0.prior": torch.zeros(3, 4),
            **{f"1.{name}": value for name, value in ESTIMATORS_0_1[gradient].items()},
        },
        "optimizer": optimizer,
        "generator": torch.get_rng_state(),
        "cuda_generators": [],
    }


@pytest.mark.parametrize("gradient", ESTIMATORS_0_1)
def test_checkpoint_of_version_0_1_resumes(tmp_path: Path, gradient: str) -> None:
    state = checkpoint_0_1(gradient)
    torch.save(state, tmp_path / "run.pt")
    saving = ["--checkpoint", str(tmp_path / "run.pt")]
    fitted, epochs = run(*saving, "--epochs", "1", gradient=gradient)
    assert epochs == state["epochs"]
    for name in LAYERS_0_1:
        assert torch.equal(fitted.state_dict()[name], state["module"][f"0.{name}"])
    _, epochs = run(*saving, "--epochs", "2", gradient=gradient)
    assert epochs[1]["train_loss"] < epochs[0]["train_loss"] + 10
    resumed = torch.load(tmp_path / "run.pt", weights_only=True)
    assert resumed["format"] == "pyro_gumbel checkpoint"  # the new one
    assert resumed["optimizer"].keys() == state["optimizer"].keys()
    optimizer = resumed["optimizer"]["encoder$$$0.weight"]["optimizer"]
    assert optimizer["state"][0]["step"] == 3  # two batches


def not_a_checkpoint(path: Path) -> None:
    path.write_bytes(b"\x89PNG nothing of the kind")


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_bytes(path: Path) -> None:
    path.write_bytes(b"")


def somebody_elses(path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {}}, path)


def of_another_program(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    torch.save(state | {"more": {"step": 3}}, path)


def a_tensor(path: Path) -> None:
    torch.save(torch.zeros(3), path)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (not_a_checkpoint, "is not a complete checkpoint"),
        (cut_short, "is not a complete checkpoint"),
        (no_bytes, "is not a complete checkpoint"),
        (somebody_elses, "was not written by save_checkpoint"),
        (a_tensor, "was not written by save_checkpoint"),
        (of_another_program, "was not written by this example"),
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
    with pytest.raises(checkpoint.CheckpointError, match="latents 3 saved, 5 now"):
        run(*saving, "--latents", "5")
    with pytest.raises(checkpoint.CheckpointError, match="gradient 'reinmax' saved, 'score' now"):
        run(*saving, gradient="score")


def test_folder_as_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match="is a folder; give a file, such as .*pt"):
        run("--epochs", "1", "--checkpoint", str(tmp_path))


def test_checkpoint_with_more_epochs_than_asked_for(tmp_path: Path) -> None:
    saving = ["--checkpoint", str(tmp_path / "run.pt")]
    run(*saving, "--epochs", "2")
    match = "has 2 epochs, more than --epochs 1; write --epochs 2 or more"
    with pytest.raises(checkpoint.CheckpointError, match=match):
        run(*saving, "--epochs", "1")


# The commands


def test_vae_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare = ["--compare", "reinmax,score:2", "--seeds", "2", "--device", "cpu"]
    vae.main([*TINY, "--out", str(tmp_path / "out"), *compare])
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.startswith(("rein", "sco"))]
    assert [row[0] for row in rows] == ["reinmax", "score:2"]
    for name in ("reconstructions.png", "samples.png", "training.png", "history.nc"):
        assert name in printed
        assert (tmp_path / "out" / name).stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--data", "nowhere"], "nowhere is not a folder"),
        (["--gradient", "reinmx"], "unknown estimator name"),
        (["--compare", "reinmax,reinmx"], "Did you mean 'reinmax'"),
        (["--compare", "reinmax,reinmax"], "'reinmax,reinmax' lists an estimator twice"),
        (["--gradient", "pathwise"], "does not support a OneHotCategorical"),
        (["--latent", "bernoulli", "--gradient", "reinmax_rao"], "does not support"),
        (["--compare", "reinmax,score", "--checkpoint", "x.pt"], "--checkpoint is for one run"),
        (["--gradient", "reinmax", "--temperature", "0"], "temperature must be positive"),
        (["--batch-size", "0"], "--batch-size: expected a whole number of at least 1, got '0'"),
        (["--hidden", "8,x"], "--hidden: expected a whole number of at least 1, got 'x'"),
        (["--lr", "-1"], "--lr: expected a number above 0, got '-1'"),
        (["--out", f"{__file__}/pictures"], "--out: cannot write to the folder"),
        (["--checkpoint", f"{__file__}/x.pt"], "--checkpoint: cannot write to"),
        (["--gradient", "score", "--temperature", "0.3"], "--temperature: score would ignore it"),
        (["--gradient", "reinmax@1", "--temperature", "0.3"], "reinmax@1 would ignore it"),
        (["--compare", "reinmax,score", "--gradient", "rebar"], "not allowed with argument"),
        (["--lr", "much"], "--lr: expected a number above 0, got 'much'"),
    ],
)
def test_bad_flags(capsys, flags: list[str], match: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        vae.main([*TINY, *flags])
    assert stopped.value.code == 2
    assert match in capsys.readouterr().err


def test_temperature_goes_to_those_of_several_that_have_one(tmp_path: Path, capsys) -> None:
    some = ["--compare", "reinmax,score", "--temperature", "0.3", "--epochs", "1"]
    vae.main([*TINY, *some, "--out", str(tmp_path)])
    assert "written:" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_gpu(capsys) -> None:
    with pytest.raises(SystemExit):
        vae.main([*TINY, "--device", "cuda"])
    assert "write --device cpu" in capsys.readouterr().err


@pytest.mark.cuda
def test_vae_on_the_gpu(tmp_path: Path) -> None:
    vae.main([*TINY, "--device", "cuda", "--out", str(tmp_path)])
    assert (tmp_path / "samples.png").exists()


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
