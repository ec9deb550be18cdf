# SPDX-License-Identifier: Apache-2.0
"""The contract in a user's pytest, in separate processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLUGIN = "refmoe.routers.contract.plugin"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a pytest with only this plugin, loaded as by its entry point."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "COLUMNS": "200"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        PLUGIN,
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(folder),
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


ROUTER = """
import numpy as np
import pytest
from refmoe.routers.contract import Declaration, contract

def route(x):
    ids = np.argsort(-x, axis=1, kind="stable")[:, :2]
    e = np.exp(np.take_along_axis(x, ids, 1) - x.max(axis=1, keepdims=True))
    return ids, e / e.sum(axis=1, keepdims=True)

DECLARED = Declaration(experts=4, top_k=2, ties="lower")
"""


def test_a_class_has_one_item_per_law(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(ROUTER + "TestMyRouter = contract(route, DECLARED)\n")
    done = run(tmp_path, "-v", "--router-examples", "20")
    assert done.returncode == 0, done.stdout
    assert "test_mine.py::TestMyRouter::test_tie_rule PASSED" in done.stdout
    assert "test_mine.py::TestMyRouter::test_nan SKIPPED (needs a declared behaviour: nan)" in done.stdout
    assert "18 passed, 10 skipped" in done.stdout
    assert "TestMyRouter::test_tie_rule: ties declared 'lower': of equal logits it seems to choose the lower id" in (
        done.stdout
    )


def test_a_failure_is_words_and_the_smallest_example(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        ROUTER + "TestMyRouter = contract(lambda x: (route(x)[0][:, ::-1], route(x)[1]), DECLARED)\n"
    )
    done = run(tmp_path, "-k", "falling_order")
    assert done.returncode == 1
    assert "FAIL  falling-order   token 0 of 1" in done.stdout
    assert "      law     Each token's ids are in order of falling logit." in done.stdout
    assert "      logits = [[" in done.stdout
    assert "Traceback" not in done.stdout
    assert "checking.py" not in done.stdout


def test_a_fixture_asks_for_the_laws_one_by_one(tmp_path: Path) -> None:
    """The fixture works for routers that a user's fixture makes."""
    (tmp_path / "test_mine.py").write_text(
        ROUTER
        + """
@pytest.fixture(scope="session")
def model():
    return route

def test_router(router_law, model):
    router_law.check(model, DECLARED)
"""
    )
    done = run(tmp_path, "-v", "--router-examples", "5")
    assert done.returncode == 0, done.stdout
    assert "test_mine.py::test_router[batch-size] PASSED" in done.stdout
    assert "18 passed, 10 skipped" in done.stdout


def test_the_class_needs_no_plugin(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(ROUTER + "TestMyRouter = contract(route, DECLARED)\n")
    done = run(tmp_path, "-p", f"no:{PLUGIN}", "-k", "tie_rule or falling_order")
    assert (done.returncode, "2 passed" in done.stdout) == (0, True), done.stdout + done.stderr


@pytest.mark.parametrize("heavy", ["numpy", "hypothesis", "ml_dtypes", "torch", "rich"])
def test_other_peoples_runs_load_nothing_heavy(tmp_path: Path, heavy: str) -> None:
    """Every run of the environment loads the plugin. A run without routers imports only pytest's own modules."""
    (tmp_path / "test_theirs.py").write_text(
        f"import sys\ndef test_theirs():\n    assert {heavy!r} not in sys.modules\n"
    )
    done = run(tmp_path)
    assert (done.returncode, "1 passed" in done.stdout) == (0, True), done.stdout
    assert "router contract" not in done.stdout


def test_the_entry_point() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    assert declared["refmoe"] == PLUGIN
