# SPDX-License-Identifier: Apache-2.0
"""``refmoe suite new``: a case of the user's own dimensions, made by one command without a clone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from refmoe.api.conforming import Conformance, conform
from refmoe.checkpoints.write import write_checkpoint
from refmoe.suite import MANIFEST_FILE, check, find_cases, read_case, verify_documents
from refmoe.suite.conditions import mistakes
from refmoe.traces.script import Call
from tests.command_line import Refmoe

ROOT = Path(__file__).parents[1]
HONEST = ROOT / "tests" / "engines" / "harnesses" / "honest.py"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return tmp_path / "cases"


def test_a_new_case_is_whole_and_an_engine_runs_on_it(refmoe: Refmoe, own: Path) -> None:
    changes = [word for change in ("layers=1", "window=4", "norm_eps=1e-6") for word in ("--set", change)]
    tokens = ["--tokens", "1,2,3", "--chunk", "4,5", "--chunk", "6", "--decode", "7,8"]
    status, _, _ = refmoe("suite", "new", "mine", "--golden", own, "--like", "top-3", *changes, *tokens)
    assert status == 0
    case, like = read_case(own / "mine"), read_case(ROOT / "golden" / "top-3")
    assert (case.config.layers, case.config.window, case.config.norm_eps) == (1, 4, 1e-6)
    assert (case.config.dim, case.config.experts_per_token) == (like.config.dim, 3)
    assert case.calls == (
        Call("prefill", 0, (1, 2, 3)), Call("chunk", 0, (4, 5)), Call("chunk", 0, (6,)), Call("decode", 0, (7, 8)),
    )  # fmt: skip
    assert "SWA" in case.conditions
    assert mistakes(case) == []
    assert check(own / "mine") == []
    assert verify_documents(own) == []
    asked = Conformance(harness=(sys.executable, str(HONEST)), golden=own, dtypes=("float32",))
    results, _ = conform(asked)
    assert dict(results.counts) == {"conformant": 1}


def test_two_cases_lie_in_one_folder_and_the_second_has_drawn_tokens(refmoe: Refmoe, own: Path) -> None:
    assert refmoe("suite", "new", "a", "--golden", own, "--like", "one-pair")[0] == 0
    status, out, _ = refmoe("suite", "new", "b", "--golden", own, "--like", "one-pair", "--seed", 7, "--json")
    assert status == 0
    assert json.loads(out)["tokens"] == 11
    assert [folder.name for folder in find_cases(own)] == ["a", "b"]
    assert json.loads((own / MANIFEST_FILE).read_text())["cases"] == ["a", "b"]
    assert verify_documents(own) == []


def test_the_dimensions_of_a_checkpoint_are_taken(refmoe: Refmoe, own: Path, tmp_path: Path) -> None:
    model = read_case(ROOT / "golden" / "window-decode")
    write_checkpoint(tmp_path / "model", model.config, model.checkpoint().parameters, "float32")
    config = tmp_path / "model" / "config.json"
    assert refmoe("suite", "new", "mine", "--golden", own, "--config", config)[0] == 0
    assert read_case(own / "mine").config == model.config


def test_a_large_case_stores_a_fingerprint(refmoe: Refmoe, own: Path) -> None:
    more = ["--set", "hidden_dim=40000", "--tokens", "1,2,3,4,5"]
    assert refmoe("suite", "new", "wide", "--golden", own, "--like", "one-pair", *more)[0] == 0
    case = read_case(own / "wide")
    assert case.store == "fingerprint"
    assert check(own / "wide") == []


BAD = {
    "no such field": (["--set", "hads=2"], "hads"),
    "no number": (["--set", "heads=two"], "heads=two"),
    "no model": (["--set", "heads=5"], "heads = 5"),
    "a token outside": (["--tokens", "1,999"], "999"),
    "no prefill": (["--decode", "3"], "--tokens"),
    "no such case": (["--like", "no-such"], "no-such"),
    "no such file": (["--config", "no-such.json"], "no-such.json"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_made_is_said_and_leaves_nothing(refmoe: Refmoe, own: Path, name: str) -> None:
    arguments, said = BAD[name]
    status, _, error = refmoe("suite", "new", "mine", "--golden", own, *arguments)
    assert status == 2
    assert said in error
    assert len(error.splitlines()) == 1
    assert not (own / "mine").exists()


def test_a_folder_whose_manifest_cannot_be_written_keeps_no_part_of_the_case(refmoe: Refmoe, own: Path) -> None:
    (own / MANIFEST_FILE).mkdir(parents=True)
    status, _, _ = refmoe("suite", "new", "mine", "--golden", own, "--like", "one-pair")
    assert status == 2
    assert not (own / "mine").exists()


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", ""])
def test_a_name_that_is_no_folder_is_refused(refmoe: Refmoe, own: Path, name: str) -> None:
    assert refmoe("suite", "new", name, "--golden", own)[0] == 2
    assert not own.exists()


def test_a_case_is_never_replaced(refmoe: Refmoe, own: Path) -> None:
    assert refmoe("suite", "new", "mine", "--golden", own, "--like", "one-pair")[0] == 0
    before = (own / "mine" / "case.toml").read_bytes()
    assert refmoe("suite", "new", "mine", "--golden", own, "--like", "top-3")[0] == 2
    assert (own / "mine" / "case.toml").read_bytes() == before


@pytest.mark.slow
def test_it_needs_no_clone(tmp_path: Path) -> None:
    """As a wheel has it: the goldens inside the package, and no repository around it."""
    shutil.copytree(ROOT / "refmoe", tmp_path / "site" / "refmoe", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "golden", tmp_path / "site" / "refmoe" / "goldens")
    (tmp_path / "empty").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    environment.pop("REFMOE_GOLDEN", None)

    def run(*arguments: str) -> Any:
        return subprocess.run(
            [sys.executable, "-m", "refmoe", *arguments], cwd=tmp_path / "empty", env=environment, text=True,
            capture_output=True, check=False,
        )  # fmt: skip

    made = run("suite", "new", "mine", "--golden", "own", "--like", "production-head-32")
    assert made.returncode == 0, made.stderr
    assert run("suite", "check", "--golden", "own").returncode == 0
    listed = json.loads(run("cases", "--golden", "own", "--json").stdout)
    assert [each["name"] for each in listed] == ["mine"]
    assert listed[0]["config"]["head_dim"] == 32
