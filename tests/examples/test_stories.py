"""Each story runs at smoke size and writes its figures."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch

import compare_estimators
import grammar
import gumbel_max
import hmm
import mixture
import policy_gradient
import pyro_comparison
import semi_supervised
import sequence_gan
import style
import topic_model
import two_gradients
import vae

STORIES = {
    gumbel_max: ("gumbel_max.png", "concrete.png"),
    hmm: ("hmm.png",),
    mixture: ("mixture.png",),
    policy_gradient: ("policy_gradient.png",),
    semi_supervised: ("semi_supervised.png",),
    sequence_gan: ("training.png",),
    topic_model: ("topic_model.png",),
    two_gradients: ("two_gradients.png",),
}
MORE = {
    hmm: ["--gradients", "reinmax"],
    semi_supervised: ["--gradients", "enumerate"],
    sequence_gan: ["--gradients", "reinmax,score:2"],
    topic_model: ["--gradients", "reinmax"],
}


def printed_by(story, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    story.main(["--smoke", "--seed", "3", "--out", str(folder), *MORE.get(story, [])])
    # Durations do not depend on the seed.
    return re.sub(r"\s+\d+\.\d$", "", capsys.readouterr().out, flags=re.MULTILINE)


@pytest.mark.parametrize("story", STORIES, ids=lambda module: module.__name__)
def test_story_runs(story, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = printed_by(story, tmp_path, capsys)
    assert "written:" in printed
    assert "nan" not in printed.replace("nan ", "")  # a word of the texts, too
    for name in STORIES[story]:
        assert (tmp_path / name).stat().st_size > 5000
    if story in (gumbel_max, hmm, mixture, semi_supervised, sequence_gan):
        assert printed_by(story, tmp_path, capsys) == printed  # the seed decides


@pytest.mark.parametrize("story", MORE, ids=lambda module: module.__name__)
def test_unknown_estimators_are_reported(story, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        story.main(["--smoke", "--gradients", "score:2,reinmx"])
    assert "Did you mean 'reinmax'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("story", "second"),
    [
        (hmm, "pathwise"),  # it enumerates a few values
        (semi_supervised, "pathwise"),
        *itertools.product([sequence_gan, topic_model], ["pathwise", "enumerate"]),
    ],
)
def test_unsupported_estimators_are_reported_before_the_first_run(
    story, second: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        story.main(["--smoke", "--gradients", f"score:2,{second}", "--out", str(tmp_path)])
    printed = capsys.readouterr().err
    assert re.search("does not support|sums over all 6\\^12 sequences", printed)
    assert "score:2" not in printed.partition("error:")[0]  # no bar of a run


@pytest.mark.parametrize("gradient", ["double_control_variate", "muprop", "disarm_tree"])
def test_the_game_takes_estimators_that_run_the_model_again(gradient: str, tmp_path: Path) -> None:
    options = ["--steps", "2", "--batch-size", "8", "--hidden", "8", "--data-size", "50"]
    sequence_gan.main(["--gradients", gradient, *options, "--out", str(tmp_path)])
    assert (tmp_path / "training.png").exists()


def test_the_game_refuses_relaxed_costs_for_scores_without_a_gradient(tmp_path: Path) -> None:
    options = ["--steps", "2", "--batch-size", "8", "--hidden", "8", "--data-size", "50"]
    with pytest.raises(ValueError, match="Rebar.*needs the cost's gradient"):
        sequence_gan.main(["--gradients", "rebar", *options, "--out", str(tmp_path)])


@pytest.mark.parametrize("story", STORIES, ids=lambda module: module.__name__)
def test_unwritable_folders_are_reported(story, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        story.main(["--out", f"{__file__}/pictures"])
    assert "--out: cannot write to the folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("story", "option", "least"),
    [
        (gumbel_max, "--grid", 2),
        (gumbel_max, "--words", 2),
        (hmm, "--states", 2),
        (hmm, "--styles", 2),
        (semi_supervised, "--batch-size", 2),
        (mixture, "--size", 3),
        (policy_gradient, "--draws", 2),
        (policy_gradient, "--episodes", 4),
        (topic_model, "--limit", 2),
        (two_gradients, "--draws", 16),
    ],
)
def test_numbers_too_small_are_reported(
    story, option: str, least: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        story.main([option, str(least - 1)])
    expected = f"argument {option}: expected a whole number of at least {least}, got '{least - 1}'"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("story", "options"),
    [
        (gumbel_max, ["--draws", "1", "--word-draws", "1", "--words", "2", "--grid", "2"]),
        (mixture, ["--size", "3", "--steps", "1"]),
        (
            policy_gradient,
            [
                "--draws",
                "2",
                "--episodes",
                "4",
                "--steps",
                "1",
                "--cart-steps",
                "1",
                "--seeds",
                "1",
            ],
        ),
        (two_gradients, ["--draws", "16", "--steps", "1", "--seeds", "1"]),
    ],
)
def test_the_smallest_numbers_do(story, options: list[str], tmp_path: Path) -> None:
    story.main([*options, "--out", str(tmp_path)])
    assert (tmp_path / STORIES[story][0]).exists()


def test_texts_too_long_and_vocabularies_too_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = list(itertools.islice(topic_model.docstrings(), 2000))
    monkeypatch.setattr(topic_model, "docstrings", lambda: iter(texts))
    options = ["--smoke", "--gradients", "score", "--out", str(tmp_path)]
    topic_model.main([*options, "--words", "5"])
    with pytest.raises(SystemExit):
        topic_model.main([*options, "--min-length", "100000"])
    assert "--min-length: 0 docstrings have 100000 words or more" in capsys.readouterr().err


def test_an_estimator_has_one_colour() -> None:
    few, more = style.colors(["score:4", "reinmax"]), style.colors(["x", "reinmax@0.5", "score"])
    assert few["reinmax"] == more["reinmax@0.5"]
    assert few["score:4"] == more["score"]
    assert len(set(style.colors(["score:2", "score:4", "y", *style.ESTIMATORS[:3]]).values())) == 6


@pytest.mark.parametrize("module", [*STORIES, compare_estimators, pyro_comparison, vae])
def test_help_shows_defaults(module, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        module.main(["--help"])
    printed = capsys.readouterr().out
    assert "(default: 0)" in printed  # the seed's
    assert "None" not in printed
    assert "False" not in printed


def test_files_are_short() -> None:
    folder = Path(gumbel_max.__file__).parent
    names = [module.__name__ for module in (*STORIES, grammar, style)]
    assert all(len((folder / f"{name}.py").read_text().splitlines()) <= 250 for name in names)


def test_chi_square_pools_rare_words() -> None:
    probs = torch.tensor([0.5, 0.3, 0.2])
    statistic, freedom = gumbel_max.chi_square(torch.tensor([55.0, 25.0, 20.0]), probs)
    assert (statistic, freedom) == (pytest.approx(25 / 50 + 25 / 30), 2)
    many = torch.full((1000,), 1e-3)
    statistic, freedom = gumbel_max.chi_square(torch.ones(1000), many, num_bins=10)
    assert (statistic, freedom) == (pytest.approx(0, abs=1e-9), 9)


def test_accuracy_does_not_depend_on_names() -> None:
    component = torch.tensor([0, 0, 1, 2, 2, 1])
    assert mixture.accuracy(torch.tensor([2, 2, 0, 1, 1, 0]), component) == 1
    assert mixture.accuracy(torch.tensor([2, 2, 0, 1, 1, 1]), component) == pytest.approx(5 / 6)


@pytest.mark.slow
def test_automatic_guides_reach_the_enumerated_fit() -> None:
    args = mixture.argparse.Namespace(seed=0, steps=600, lr=0.03)
    mixture.pyro.set_rng_seed(0)
    x, component = mixture.simulate(600)
    fits = {name: mixture.fit(name, x, component, args) for name in mixture.FITS}
    exact = fits["AutoAmortized, enumeration"]["accuracy"][-1]
    assert exact > 0.95
    for fit in fits.values():
        assert fit["accuracy"][-1] > exact - 0.01
    summed = fits[mixture.SUMMED]
    assert (
        summed["assigned"] == fits["AutoAmortized, enumeration"]["assigned"]
    ).float().mean() > 0.97
    assert summed["evidence"] > fits["AutoAmortized, enumeration"]["evidence"] - 0.01


def test_a_summed_assignment_is_weighed_exactly() -> None:
    """The probabilities of the example are those of the densities at the guide's draw."""
    x, _ = mixture.simulate(20)
    start = x[:3].clone()
    model = mixture.make_model(start, "summed")
    guide = mixture.make_guide("summed", model, None)
    options = {"num_samples": 4, "marginals": True, "parallel": True}
    with torch.no_grad():
        found = mixture.recover(model, guide, x, **options)
    locs, scale = found["locs"].unsqueeze(-3), found["scale"].reshape(4, 1, 1, 1)
    fit = mixture.dist.Normal(locs, scale).to_event(1).log_prob(x.unsqueeze(-2))
    expected = (found["weights"].log().unsqueeze(-2) + fit).softmax(-1)
    torch.testing.assert_close(found["z"], expected)
