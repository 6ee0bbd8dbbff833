"""Print tables and write their rows to a JSON file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def make_parser(text: str) -> argparse.ArgumentParser:
    """Make a parser with the options of every script."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), help="JSON goes here")
    parser.add_argument("--seed", type=int, default=0)
    return parser


class Report:
    """Prints tables, and writes all so far to ``NAME.json`` after each."""

    def __init__(self, name: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.json"
        self.tables: dict[str, list[dict[str, Any]]] = {}

    def table(self, title: str, rows: list[dict[str, Any]]) -> None:
        """Print rows of the same keys below a title."""
        self.tables[title] = rows
        columns = list(rows[0])
        cells = [columns, *([_show(row[column]) for column in columns] for row in rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        print(f"\n{title}")
        for line in cells:
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
        self.path.write_text(json.dumps(self.tables, indent=1))

    def finish(self) -> None:
        """Print where the tables are."""
        print(f"\nwritten to {self.path}")


def _show(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
