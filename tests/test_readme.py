"""The README's program runs, and its tables, commands and links match the package.

So do the tables of the manual's overview, which has one row for each name.
"""

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


OVERVIEW = (ROOT / "docs/guide/overview.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def rows(page: str, heading: str) -> list[tuple[list[str], str]]:
    """Read the names in the first cell, and the second cell, of each row below a heading."""
    section = page.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    cells = [line.split("|")[1:3] for line in section.splitlines() if re.match(r"\| \[?`", line)]
    return [(re.findall(r"`(\w+)", first), second.strip()) for first, second in cells]


def first_column(page: str, heading: str) -> list[str]:
    return [name for names, _ in rows(page, heading) for name in names]


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """Run the quickstart, and return its variables."""
    names: dict[str, Any] = {}
    (quickstart,) = PROGRAMS
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(quickstart, "README.md", "exec"), names)
    assert printed.getvalue().startswith("tensor(")
    return names | {"fitted": names["pyro"].param("centres_loc").detach()}


def test_quickstart_is_short() -> None:
    assert len([line for line in PROGRAMS[0].splitlines() if line.strip()]) <= 25


def test_quickstart_finds_the_clusters(names: dict[str, Any]) -> None:
    centres = torch.stack([names["data"][:100].mean(), names["data"][100:].mean()])
    # The prior's pull is 1 / (100 * 25 + 1) of the way; the rest is the optimiser's noise, of a
    # size that the learning rate of 0.02 sets.
    assert (names["fitted"] - centres).abs().max() < 0.2


def test_every_distribution_has_a_row() -> None:
    classes = {
        name for name in distributions.__all__ if isinstance(getattr(distributions, name), type)
    }
    assert set(first_column(OVERVIEW, "Distributions")) == classes


def is_kind(name: str, kind: type) -> bool:
    return issubclass(getattr(estimators, name), kind) and name != kind.__name__


@pytest.mark.parametrize("page", [README, OVERVIEW], ids=["README", "overview"])
def test_every_estimator_has_a_row(page: str) -> None:
    listed = [name for name in first_column(page, "Estimators") if not is_kind(name, Baseline)]
    assert sorted(listed) == sorted(n for n in estimators.__all__ if is_kind(n, Estimator))


@pytest.mark.parametrize("page", [README, OVERVIEW], ids=["README", "overview"])
def test_bias_column_matches_the_classes(page: str) -> None:
    claims = {
        name: re.match("yes|no|exact", claim)
        for names, claim in rows(page, "Estimators")
        for name in names
        if not is_kind(name, Baseline)
    }
    answers = {name: answer is not None and answer[0] != "no" for name, answer in claims.items()}
    assert answers == {name: getattr(estimators, name).unbiased for name in claims}


def test_every_baseline_has_a_row() -> None:
    listed = {name for name in first_column(OVERVIEW, "Estimators") if is_kind(name, Baseline)}
    assert listed == {name for name in estimators.__all__ if is_kind(name, Baseline)}


@pytest.mark.parametrize("page", PAGES)
def test_pictures_and_links_exist(page: str) -> None:
    folder = (ROOT / page).parent
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", PAGES[page])
    assert targets
    for target in targets:
        assert (folder / target).exists(), target


def test_pictures_are_small() -> None:
    pictures = list((ROOT / "examples/figures").glob("*"))
    assert pictures
    for picture in pictures:
        assert picture.stat().st_size < 200_000, picture.name


def test_commands_parse() -> None:
    text = "".join(PAGES.values()).replace("\\\n", " ")
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
