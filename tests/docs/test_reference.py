"""Every public name has a page in the manual, made from its docstring."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import pyro_gumbel
from pyro_gumbel import diagnostics, distributions, estimators, guides, infer

DOCS = Path(__file__).parents[2] / "docs"
MODULES = [diagnostics, distributions, estimators, guides, infer]
NAMES = [(module, name) for module in MODULES for name in module.__all__]
IDS = [f"{module.__name__}.{name}" for module, name in NAMES]


def first_words(thing: object) -> str:
    """The start of a docstring, before any markup."""
    sentence = (inspect.getdoc(thing) or "").partition("\n\n")[0].replace("\n", " ")
    return sentence.partition(":")[0].partition("`")[0].strip()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sphinx", reason="`make docs` installs it")
    pytest.importorskip("myst_nb", reason="`make docs` installs it")
    source = tmp_path_factory.mktemp("manual") / "docs"
    shutil.copytree(DOCS, source, ignore=shutil.ignore_patterns("api"))  # pages of earlier builds
    text = source.with_name("text")
    options = ["-q", "-b", "text", "-D", "nb_execution_mode=off", "-d", text / ".state"]
    subprocess.run([sys.executable, "-m", "sphinx", *options, source, text], check=True)
    return text / "api"


def test_all_modules_are_compared() -> None:
    names = {module.__name__.rpartition(".")[2] for module in MODULES}
    assert {"__version__", *names} == set(pyro_gumbel.__all__)


@pytest.mark.parametrize(("module", "name"), NAMES, ids=IDS)
def test_public_names_have_docstrings(module: ModuleType, name: str) -> None:
    assert first_words(getattr(module, name))


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name"), NAMES, ids=IDS)
def test_public_names_have_pages(module: ModuleType, name: str, pages: Path) -> None:
    page = (pages / f"{module.__name__}.{name}.txt").read_text()
    assert f"{module.__name__}.{name}" in page
    words = first_words(getattr(module, name))
    assert "".join(words.split()) in "".join(page.split())  # a line may break at a hyphen
