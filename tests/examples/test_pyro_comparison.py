"""The comparison with Pyro's own classes runs."""

from __future__ import annotations

import pyro_comparison


def test_pyro_comparison_command(capsys) -> None:
    pyro_comparison.main(["--smoke"])
    printed = capsys.readouterr().out
    for name in pyro_comparison.PROGRAMS:
        assert name in printed
