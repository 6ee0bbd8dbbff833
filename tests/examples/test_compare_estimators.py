"""The comparison of estimators runs by the commands of the examples' README."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

import compare_estimators
import compare_report
import gradients
import style
import vae
from pyro_gumbel._arviz import group

ROOT = Path(__file__).parents[2]
README = (ROOT / "examples/README.md").read_text()


def test_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = tmp_path / "of_another_run.txt"
    other.write_text("not written by this one")
    names = "reinmax,straight_through,gumbel_softmax@0.5,score:2"
    compare_estimators.main(["--smoke", "--estimators", names, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "after epoch 1" in printed
    assert "after epoch 2" in printed
    table = pd.read_csv(tmp_path / "table.csv")
    assert len(table) == 2 * 4
    written = printed.partition("written:\n")[2].split()
    assert sorted(written) == sorted(map(str, set(tmp_path.iterdir()) - {other}))
    assert np.isfinite(table[["relative_bias", "relative_std", "seconds"]]).all(axis=None)
    for picture in ("forest", "efficiency", "epochs"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 5000
    data = az.from_netcdf(str(tmp_path / "gradients.nc"))
    draws = group(data, "gradients")["encoder$$$2.bias"]
    assert draws.dims == ("chain", "draw", "estimator", "logit")
    assert list(draws.coords["estimator"].values) == names.split(",")
    exact = group(data, "constant_data")["encoder$$$2.bias.gradient"].values
    unbiased = draws.sel(estimator="score:2")
    error = unbiased.std(("chain", "draw")) / np.sqrt(unbiased[..., 0].size) + 1e-6
    assert float((abs(unbiased.mean(("chain", "draw")) - exact) / error).max()) < 5


def test_trained_model_without_exact_gradient(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "vae.pt"
    size = ["--latents", "12", "--categories", "4", "--hidden", "16", "--num-samples", "5"]
    vae.main(["--smoke", *size, "--checkpoint", str(file), "--out", str(tmp_path / "vae")])
    options = ["--num-draws", "40", "--images", "5", "--estimators", "reinmax,score:2"]
    compare_estimators.main(
        [*options, "--checkpoint", str(file), "--out", str(tmp_path / "compared")]
    )
    assert "no exact gradient: exact_gradient: 16,777,216 joint states" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "compared/table.csv")
    assert table.bias.notna().all()


@pytest.mark.parametrize("latent", ["bernoulli", "normal"])
def test_estimators_fit_the_latents_where_none_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, latent: str
) -> None:
    file = tmp_path / "vae.pt"
    size = ["--latent", latent, "--latents", "3", "--hidden", "8", "--num-samples", "5"]
    estimator = ["--gradient", "score:2", "--checkpoint", str(file)]
    vae.main(["--smoke", *size, *estimator, "--out", str(tmp_path / "vae")])
    options = ["--num-draws", "40", "--images", "5", "--checkpoint", str(file)]
    compare_estimators.main([*options, "--out", str(tmp_path / "compared")])
    table = pd.read_csv(tmp_path / "compared/table.csv")
    names = gradients.several(compare_estimators.ESTIMATORS[latent])
    assert sorted(table.estimator) == sorted(names)


def test_what_noise_explains_is_hollow() -> None:
    column = {"relative_bias": [0.3, 0.1], "bias_z": [9.0, 2.0], "relative_std": [1.0, 1.0]}
    table = pd.DataFrame(column, index=["reinmax", "score"])
    figure = compare_report.plot_epochs({1: table, 2: table.assign(bias_z=9.0)})
    bias = figure.axes[0]
    hollow = [line for line in bias.lines if line.get_markerfacecolor() == "white"]
    drawn = {line.get_color(): np.isfinite(line.get_ydata()).tolist() for line in hollow}
    colors = style.colors(["reinmax", "score"])
    assert drawn[colors["reinmax"]] == [False, False]
    assert drawn[colors["score"]] == [True, False]
    plt.close(figure)


def test_checkpoint_of_other_images(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "vae.pt"
    size = ["--latents", "2", "--categories", "2", "--hidden", "4", "--num-samples", "5"]
    vae.main(["--smoke", *size, "--checkpoint", str(file), "--out", str(tmp_path / "vae")])
    state = torch.load(file)
    weights = state["modules"]["model.self"]
    weights["encoder.0.weight"] = weights["encoder.0.weight"][:, :9]
    torch.save(state, file)
    with pytest.raises(SystemExit):
        compare_estimators.main(["--checkpoint", str(file), "--out", str(tmp_path)])
    assert "not on images of 64; give its --data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--estimators", "reinmx"], "Did you mean 'reinmax'"),
        (["--data", "nowhere"], "--data expects a folder of IDX files; nowhere is not a folder"),
        (["--checkpoint", "nowhere.pt"], "checkpoint nowhere.pt does not exist"),
        (["--checkpoint", __file__], "is not a complete checkpoint"),
        (["--estimators", "reinmax,pathwise"], "does not support a OneHotCategorical"),
        (["--estimators", "disarm"], "does not support a OneHotCategorical"),
        (["--num-draws", "3"], "--num-draws: expected a whole number of at least 16, got '3'"),
        (["--seed", "-1"], "expected a whole number from 0 to 2^32, got '-1'"),
        (["--out", f"{__file__}/pictures"], "--out: cannot write to the folder"),
        (["--checkpoint", "x.pt", "--latents", "4", "--epochs", "1"], "leave out --epochs, --lat"),
        (["--checkpoint", str(ROOT)], "is a folder; give a file"),
        (["--epochs", "1,0"], "expected a whole number of at least 1, got '0'"),
    ],
)
def test_errors(
    options: list[str], match: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        compare_estimators.main(["--out", str(tmp_path), *options])
    assert match in capsys.readouterr().err


def test_commands_of_the_readme_parse() -> None:
    commands = re.findall(r"python examples/compare_estimators\.py([^\n`]*)", README)
    assert commands
    for command in commands:
        _, args = compare_estimators.parse(shlex.split(command))
        compare_estimators.choices(args.estimators or [])
