# SPDX-License-Identifier: Apache-2.0
"""The assertion for tests of engines, and the fixture over the cases."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import refmoe

ROOT = Path(__file__).parents[2]
PLUGIN = "refmoe.api.pytest_plugin"
MINE = """
import pytest, refmoe

@pytest.mark.refmoe_cases({names})
def test_mine(refmoe_case):
    values = refmoe_case.model.run(dtype="float32")
    refmoe.testing.assert_conformant(values, refmoe_case, policy="float32")
"""


def run(folder: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a test file with pytest, as in an environment that has refmoe."""
    (folder / "test_mine.py").write_text(code)
    installed = {each.name for each in entry_points(group="pytest11")}
    plugin = [] if "refmoe_cases" in installed else ["-p", PLUGIN]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--strict-markers", *plugin, *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


def test_an_assertion_that_holds_says_nothing() -> None:
    model = refmoe.load("walking-skeleton")
    assert refmoe.testing.assert_conformant(model.run([1, 2], dtype="float32"), model) is None  # type: ignore[func-returns-value]


def test_an_assertion_that_fails_has_the_report() -> None:
    model = refmoe.load("walking-skeleton")
    values = {"logits": model.run([1, 31])["prefill", "logits"] + 1}
    report = refmoe.verify(values, model, [1, 31], policy="float32")
    with pytest.raises(AssertionError) as failed:
        refmoe.testing.assert_conformant(values, model, [1, 31], policy="float32")
    assert str(failed.value) == str(report)


def test_a_wrong_argument_is_no_failed_assertion() -> None:
    with pytest.raises(refmoe.InputError):
        refmoe.testing.assert_conformant({"logits": [1.0]}, "walking-skeleton", [1, 31])


def test_the_fixture_gives_the_cases_of_a_marker(tmp_path: Path) -> None:
    done = run(tmp_path, MINE.format(names="'walking-skeleton', 'top-1'"), "-v")
    assert (done.returncode, "2 passed" in done.stdout) == (0, True), done.stdout + done.stderr
    assert "test_mine[top-1] PASSED" in done.stdout


def test_the_fixture_gives_all_small_cases_without_a_marker(tmp_path: Path) -> None:
    done = run(tmp_path, "def test_mine(refmoe_case): assert refmoe_case.runs\n", "--collect-only", "-q")
    small = [name for name in refmoe.cases() if not name.startswith(("mixtral-", "production-"))]
    assert done.stdout.count("test_mine[") == len(small)


def test_an_unknown_case_is_one_sentence(tmp_path: Path) -> None:
    done = run(tmp_path, MINE.format(names="'walking-skeletn'"))
    assert done.returncode != 0
    assert "walking-skeleton" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_other_peoples_runs_load_nothing_heavy(tmp_path: Path) -> None:
    """Every run of the environment loads the plugin."""
    heavy = ["numpy", "ml_dtypes", "click", "rich", "torch", "refmoe.api.models"]
    code = f"import sys\ndef test_theirs(): assert [n for n in {heavy} if n in sys.modules] == []\n"
    done = run(tmp_path, code)
    assert (done.returncode, "1 passed" in done.stdout) == (0, True), done.stdout + done.stderr


def test_the_entry_point() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    assert declared["refmoe_cases"] == PLUGIN
