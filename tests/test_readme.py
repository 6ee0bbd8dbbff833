"""The README's program runs, and its tables, commands and links match the package."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from pyro_gumbel import distributions, estimators
from pyro_gumbel.estimators import Baseline, Estimator
from vae_options import make_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README, "examples/README.md": (ROOT / "examples/README.md").read_text()}


def first_column(heading: str) -> list[str]:
    """Read the class names in the first column of the table that follows a heading."""
    section = README.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [name for cell in rows for name in re.findall(r"`(\w+)", cell)]


PROGRAMS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """Run the quickstart, and return its variables. The programs after it continue it."""
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(PROGRAMS[0], "README.md", "exec"), names)
    assert printed.getvalue().startswith("tensor(")
    return names | {"fitted": names["pyro"].param("centres_loc").detach()}


def test_the_first_programs_are_short() -> None:
    for program in PROGRAMS[:2]:
        assert len([line for line in program.splitlines() if line.strip()]) <= 25


def test_quickstart_finds_the_clusters(names: dict[str, Any]) -> None:
    centres = torch.stack([names["data"][:100].mean(), names["data"][100:].mean()])
    # The prior's pull is 1 / (100 * 25 + 1) of the way; the rest is the optimiser's noise, of a
    # size that the learning rate of 0.02 sets.
    assert (names["fitted"] - centres).abs().max() < 0.2


def test_later_programs(
    names: dict[str, Any], capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch
) -> None:
    """A sum finds the clusters, too, and a run is saved."""
    exec(compile(PROGRAMS[1], "README.md", "exec"), names)
    assert capsys.readouterr().out.startswith("tensor(")
    draws = names["draws"]
    shapes = {name: tuple(value.shape) for name, value in draws.items()}
    assert shapes == {"weights": (20, 2), "centres": (20, 2), "z": (20, 200)}
    # One datum in 160 is nearer to the other centre, at half the distance of 5.
    shares = draws["z"].float().mean(0).round().reshape(2, 100).mean(1)
    assert shares.min() < 0.05
    assert shares.max() > 0.95
    monkeypatch.chdir(tmp_path)
    for program in PROGRAMS[2:]:
        exec(compile(program, "README.md", "exec"), names)
    assert torch.load(tmp_path / "run.pt")["more"] == {"step": 20}


def test_every_distribution_has_a_row() -> None:
    classes = {
        name for name in distributions.__all__ if isinstance(getattr(distributions, name), type)
    }
    assert set(first_column("Distributions")) == classes


def test_every_estimator_has_a_row() -> None:
    classes = {
        name
        for name in estimators.__all__
        if issubclass(getattr(estimators, name), Estimator) and name != "Estimator"
    }
    assert set(first_column("Estimators")) == classes


def test_bias_column_matches_the_classes() -> None:
    rows = re.findall(r"^\| `(\w+)[^|]*\| (yes|no|exact)\b", README, flags=re.MULTILINE)
    said = {name: answer != "no" for name, answer in rows}
    assert len(said) == len(first_column("Estimators"))
    assert said == {name: getattr(estimators, name).unbiased for name in said}


def test_baselines_are_named() -> None:
    for name in estimators.__all__:
        kind = getattr(estimators, name)
        assert not issubclass(kind, Baseline) or kind is Baseline or f"`{name}" in README


@pytest.mark.parametrize("page", PAGES)
def test_pictures_and_links_exist(page: str) -> None:
    folder = (ROOT / page).parent
    targets = re.findall(r"\]\(([^)#:]+)\)", PAGES[page])
    assert targets
    for target in targets:
        assert (folder / target).exists(), target


def test_pictures_are_small() -> None:
    pictures = list((ROOT / "examples/figures").glob("*"))
    assert pictures
    for picture in pictures:
        assert picture.stat().st_size < 200_000, picture.name


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page: str) -> None:
    text = PAGES[page].replace("\\\n", " ")
    commands = re.findall(r"python (examples/vae\.py[^\n`]*)", text)
    assert commands
    for command in commands:
        make_parser("").parse_args(shlex.split(command)[1:])


def test_make_verbs_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for verb in re.findall(r"make ([a-z][a-z-]*)", "".join(PAGES.values())):
        assert re.search(rf"^{verb}:", makefile, flags=re.MULTILINE), verb


def test_versions_agree() -> None:
    """The README, the Makefile and the package require the same versions."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    required = dict(re.split(r"\[.*\]>=|>=", name) for name in dependencies if ">=" in name)
    assert f"torch>={required['torch']}'" in (ROOT / "Makefile").read_text()
    assert f"requires torch {required['torch']} or newer" in README.replace("\n", " ")
    assert f"Pyro {required['pyro-ppl']}" in README
