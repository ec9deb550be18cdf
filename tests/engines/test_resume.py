# SPDX-License-Identifier: Apache-2.0
"""``refmoe conform --resume``: a run that was killed goes on, and ends as one that was not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from refmoe.engines.results import read_results
from tests.command_line import Refmoe
from tests.engines.running import HONEST
from tests.engines.test_ends import judged, wait_for

ROOT = Path(__file__).parents[2]
STOPS_ONCE = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from tests.engines.harnesses import honest

def answer(request):
    if request["command"] == "load":
        loaded = os.path.basename(request["checkpoint"]) + " " + request["dtype"]
        with open(sys.argv[1], "a") as log:
            log.write(loaded + "\\n")
        if not os.path.exists(sys.argv[2]) and loaded == "top-3 bfloat16":
            open(sys.argv[2], "w").close()
            time.sleep(600)
    return honest.answer(request)

honest.converse(answer)
"""
CASES = ("--case", "top-1", "--case", "top-3", "--case", "window-1")


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_what_is_killed_and_resumed_ends_as_what_ran_through(refmoe: Refmoe, tmp_path: Path) -> None:
    """Byte for byte, and without running again what was done."""
    (tmp_path / "engine.py").write_text(STOPS_ONCE)
    loads, stopped, out, whole = (tmp_path / name for name in ("loads", "stopped", "out.json", "whole.json"))
    command = [sys.executable, str(tmp_path / "engine.py"), str(loads), str(stopped)]
    arguments = [*CASES, "--out", str(out), "--", *command]
    process = subprocess.Popen(
        [sys.executable, "-m", "refmoe", "conform", *arguments], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    wait_for(lambda: stopped.exists() and judged(out) == 3)
    process.kill()
    process.communicate()
    done = [(each.case, each.dtype) for each in read_results(out).outcomes]
    assert done == [("top-1", "float32"), ("top-1", "bfloat16"), ("top-3", "float32")]
    loads.unlink()
    status, said, err = refmoe("conform", "--resume", *arguments)
    assert status == 0, said + err
    smoke = ["window-1 float32"] * 2
    assert loads.read_text().splitlines() == [*smoke, "top-3 bfloat16", "window-1 float32", "window-1 bfloat16"]
    assert refmoe("conform", *CASES, "--out", whole, "--", *command)[0] == 0
    assert out.read_bytes() == whole.read_bytes()


def test_a_suite_with_more_cases_runs_these_alone(refmoe: Refmoe, tmp_path: Path) -> None:
    """The file is that of one run of all."""
    out, whole = tmp_path / "out.json", tmp_path / "whole.json"
    assert refmoe("conform", "--case", "top-3", "--out", out, "--", *HONEST)[0] == 0
    first = {(each.case, each.dtype): each for each in read_results(out).outcomes}
    assert refmoe("conform", "--resume", *CASES, "--out", out, "--", *HONEST)[0] == 0
    assert refmoe("conform", *CASES, "--out", whole, "--", *HONEST)[0] == 0
    assert out.read_bytes() == whole.read_bytes()
    assert first.items() <= {(each.case, each.dtype): each for each in read_results(out).outcomes}.items()
    status, _, err = refmoe("conform", "--resume", "--case", "top-1", "--out", out, "--", *HONEST)
    assert status == 2
    assert "differ by their cases" in err


def test_a_case_that_has_changed_is_run_again(refmoe: Refmoe, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ("conform", "--resume", *CASES, "--dtype", "float32", "--out", out, "--", *HONEST)
    assert refmoe(*arguments)[0] == 0
    whole, values = out.read_bytes(), json.loads(out.read_text())
    values["cases"]["top-3"] = "0" * 64
    for each in values["outcomes"]:
        each["verdict"] = "crashed"
    out.write_text(json.dumps(values))
    assert refmoe(*arguments)[0] == 1
    assert [each.verdict for each in read_results(out).outcomes] == ["crashed", "conformant", "crashed"]
    assert json.loads(out.read_text())["cases"] == json.loads(whole)["cases"]


def test_a_finished_run_runs_nothing_again_and_a_first_one_starts(refmoe: Refmoe, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ("conform", "--resume", "--case", "top-1", "--out", out, "--", *HONEST)
    texts = []
    for _ in range(2):
        assert refmoe(*arguments)[0] == 0
        texts.append(out.read_bytes())
    assert texts[0] == texts[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of a run of one case in one dtype."""
    out = tmp_path_factory.mktemp("finished") / "out.json"
    command = [sys.executable, "-m", "refmoe", "conform", "--case", "top-1", "--dtype", "float32", "--out", str(out)]
    subprocess.run([*command, "--", *HONEST], cwd=ROOT, capture_output=True, check=True)
    return out.read_text()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("engine.version", "0.9", 'differ by their version, "0.9" and "1.0"'),
        ("engine.options", {"command": "./x"}, "differ by their options"),
        ("platform", {"system": "Plan 9"}, "differ by their platform"),
        ("refmoe", "0", "differ by their version of refmoe"),
        ("significance", 0.5, "differ by their significance, 0.5 and 1e-06"),
        ("fresh", 3, "differ by their seed of fresh cases, 3 and null"),
        ("cases", {"top-9": "aa"}, "differ by their cases"),
        ("outcomes.0.policy", "hf-float32", "judge float32 by hf-float32, and this run by float32"),
        ("outcomes.0.dtype", "float64", "have outcomes in float64, which this run leaves out"),
    ],
)
def test_results_of_another_run_are_refused(
    refmoe: Refmoe, tmp_path: Path, finished: str, field: str, value: Any, words: str
) -> None:
    out = tmp_path / "out.json"
    arguments = ("conform", "--case", "top-1", "--dtype", "float32", "--out", out, "--resume", "--", *HONEST)
    values = json.loads(finished)
    *parents, name = field.split(".")
    place = values
    for parent in parents:
        place = place[int(parent)] if parent.isdigit() else place[parent]
    place[name] = value
    out.write_text(json.dumps(values))
    before = out.read_bytes()
    status, _, err = refmoe(*arguments)
    assert status == 2
    assert words in err
    assert out.read_bytes() == before


def test_it_needs_a_file(refmoe: Refmoe) -> None:
    status, _, err = refmoe("conform", "--resume", "--", *HONEST)
    assert status == 2
    assert "--resume needs --out FILE" in err
