"""Pages of the manual and the files around it fit the package."""

from __future__ import annotations

import re
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.tutorials import DOCS, code_cells, run
from pyro.infer import SVI
from pyro.optim import Adam

import pyro_gumbel
from pyro_gumbel.estimators import ReinMax
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

ROOT = DOCS.parent
PAGES = {path.stem: path for path in sorted(DOCS.glob("**/*.md"))}
GUIDES = {name: page for name, page in PAGES.items() if page.parent.name == "guide"}
FILES = [ROOT / "CONTRIBUTING.md", DOCS / "guide" / "architecture.md"]


def test_start_page_runs() -> None:
    (fragment,) = re.findall(
        r"^```\{code-block\} python\n(.*?)^```$", PAGES["index"].read_text(), re.M | re.S
    )

    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Bernoulli(0.3))
        z = pyro.sample("z", dist.OneHotCategorical(torch.ones(2) / 2))
        pyro.sample("x", dist.Normal(loc + w + z[..., 0], 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        pyro.sample("loc", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
        pyro.sample("w", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.0))))
        pyro.sample("z", dist.OneHotCategorical(logits=pyro.param("s", torch.zeros(2))))

    names = {"model": model, "guide": guide, "SVI": SVI, "Adam": Adam, "ReinMax": ReinMax}
    names |= {"config_gradient": config_gradient, "Estimator_ELBO": Estimator_ELBO}
    exec(fragment, names)
    names["svi"].step()
    assert set(pyro.get_param_store().keys()) == {"m", "l", "s"}


@pytest.mark.parametrize("name", PAGES)
def test_python_is_in_cells_that_run(name: str) -> None:
    blocks = re.findall(r"^```(\S+)(.*)$", PAGES[name].read_text(), re.M)
    fragment = [("{code-block}", " python")] if name == "index" else []
    assert [block for block in blocks if "python" in "".join(block)] == [
        *fragment,
        *[block for block in blocks if block[0] == "{code-cell}"],
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_named_files_exist(path: Path) -> None:
    folders = [ROOT, ROOT / "pyro_gumbel", ROOT / "tests" / "properties"]
    folders += [ROOT / "pyro_gumbel" / "diagnostics"]
    named = re.findall(r"`?((?:[\w.]+/)*\w+\.(?:py|md|cff))\b", path.read_text())
    assert len(named) > 5
    missing = [name for name in named if not any((folder / name).exists() for folder in folders)]
    assert not missing


def test_citation_has_the_version() -> None:
    found = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert found is not None
    assert found[1] == pyro_gumbel.__version__


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in GUIDES if code_cells(GUIDES[name])])
def test_guides_run(name: str) -> None:
    run(GUIDES[name])
