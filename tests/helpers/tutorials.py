"""The code of the manual's tutorials."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
TUTORIALS = {page.stem: page for page in sorted((DOCS / "tutorials").glob("*.md"))}


def code_cells(page: Path) -> list[str]:
    """The code of a page's cells, without their options."""
    cells = re.findall(r"^```\{code-cell\}[^\n]*\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [re.sub(r"\A(:[\w-]+:[^\n]*\n)+", "", cell) for cell in cells]


def run(page: Path) -> dict[str, Any]:
    """Run a page's cells, which assert its claims, and return their names."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in code_cells(page):
        exec(compile(cell, page.name, "exec"), names)
    return names
