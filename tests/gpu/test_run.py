"""The parts of ``make gpu``: limits of time, and figures that survive a failure."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("gpu_run", Path(__file__).with_name("run.py"))
gpu_run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_run)

REPORT = """<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">
<testcase classname="tests.a" name="good"/>
<testcase classname="tests.a" name="left"><skipped message="no CUDA device"/></testcase>
<testcase classname="tests.a" name="bad"><failure message="got 1"/></testcase>
</testsuite></testsuites>"""


def part(code, limit=60, figures=str.splitlines):
    return gpu_run.Part(limit, ["-c", code], figures)


def test_a_part_that_takes_too_long_is_stopped_and_its_figures_are_kept(tmp_path):
    slow = "import subprocess, sys; print(1, flush=True); subprocess.run(['sleep', '600'])"
    outcome = gpu_run.run(part(slow, limit=2), tmp_path / "log")
    assert outcome["status"] == "stopped after 2 s"
    assert outcome["figures"] == ["1"]


@pytest.mark.parametrize(
    ("code", "figures", "status"),
    [
        ("print('{}')", json.loads, "ok"),
        ("raise SystemExit(3)", str.splitlines, "exit status 3"),
        ("print('none')", json.loads, "ok; no figures (JSONDecodeError"),
    ],
)
def test_a_part_reports_its_status(code, figures, status, tmp_path):
    outcome = gpu_run.run(part(code, figures=figures), tmp_path / "log")
    assert outcome["status"].startswith(status)


def test_a_failed_part_costs_neither_the_others_nor_the_figures(tmp_path, monkeypatch, capsys):
    made = {"first": part("raise ValueError('here')"), "second": part("print(7)")}
    monkeypatch.setattr(gpu_run, "parts", lambda *args: made)
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        gpu_run.main()
    assert caught.value.code
    assert "ValueError: here" in capsys.readouterr().out
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert found["first"]["status"] == "exit status 1"
    assert found["second"]["status"] == "ok"
    assert found["second"]["figures"] == ["7"]


def test_all_parts_take_eight_minutes_at_most(tmp_path):
    assert sum(part.limit for part in gpu_run.parts(tmp_path, "cuda", False).values()) <= 480


def test_failed_tests_and_cases_are_listed(tmp_path):
    (tmp_path / "tests.xml").write_text(REPORT)
    found = gpu_run.read_tests(tmp_path / "tests.xml")
    assert found["failed"] == {"tests.a.bad": "got 1"}
    assert (found["tests"], found["failures"], found["skipped"]) == (3, 1, 1)
    found = gpu_run.read_cases('a warning\n{"laws": {"one": null, "two": "an error"}}')
    assert found == {"cases": 2, "failed": {"laws/two": "an error"}}
