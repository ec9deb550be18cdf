"""Harnesses to begin with: they run as they are, pass the smoke test's rules, and show how a tap is written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from refmoe.checkpoint.write import write_checkpoint
from refmoe.conform.process import Process
from refmoe.conform.scaffold import SCAFFOLDS
from tests.command_line import Refmoe
from tests.conform.running import LIMIT, case_named
from tests.conform.test_protocol import valid

COMPILER = shutil.which("cc")


def built(language: str, path: Path) -> list[str]:
    """The command of a scaffold that has been written."""
    if language == "python":
        return [sys.executable, str(path)]
    if COMPILER is None:
        pytest.skip("there is no C compiler, cc")
    program = path.with_suffix("")
    subprocess.run([COMPILER, "-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-o", program, path], check=True)
    return [str(program)]


@pytest.fixture(params=SCAFFOLDS)
def command(request: pytest.FixtureRequest, refmoe: Refmoe, tmp_path: Path) -> list[str]:
    path = tmp_path / SCAFFOLDS[request.param]
    status, out, _ = refmoe("conform", "--scaffold", request.param, path)
    assert status == 0
    assert "refmoe conform -- " in out
    return built(request.param, path)


def test_it_runs_as_it_is_and_skips_every_case(command: list[str], refmoe: Refmoe) -> None:
    golden = Path(__file__).parents[2] / "golden"
    status, out, err = refmoe("conform", "--golden", golden, "--case", "one-pair", "--case", "top-1", "--", *command)
    assert status == 2, err
    assert "skipped: not written yet: one-pair" in out
    assert "skipped: needs decode" in out
    assert "2 outcomes: 2 skipped" in out
    assert "note" not in out, "it stops when it is told to"


def test_its_example_is_the_embedding(command: list[str], tmp_path: Path) -> None:
    """Through the protocol by hand, with a path that JSON escapes, and requests that are none in between."""
    case, checkpoint, out = case_named("top-1"), tmp_path / 'mödel "x"', tmp_path / "öut.safetensors"
    parameters = case.checkpoint().parameters
    write_checkpoint(checkpoint, case.config, parameters, "bfloat16")
    process = Process(command)
    assert valid(process.ask({"command": "start", "protocol": "1"}, LIMIT), "description")
    assert valid(
        process.ask({"command": "dance", "x": [1, -2.5e3, None, True, {"y": "\u20ac\U0001f600"}]}, LIMIT), "error"
    )
    run = {"run": "prefill", "op": "prefill", "sequence": 0, "tokens": [3, 0, 52], "positions": [0, 1, 2], "past": 0}
    runs = {"command": "run", "runs": [run, {**run, "run": "again"}], "taps": ["embedding", "logits"], "out": str(out)}
    assert valid(process.ask(runs, LIMIT), "error"), "nothing is loaded"
    missing = process.ask({"command": "load", "checkpoint": "/no/such", "dtype": "float32"}, LIMIT)
    assert valid(missing, "error")
    assert process.ask({"command": "load", "checkpoint": str(checkpoint), "dtype": "float32"}, LIMIT) == {"ok": True}
    answer = process.ask(runs, LIMIT)
    assert valid(answer, "skipped")
    assert answer["skipped"] == "not written yet"
    assert process.stop() is None
    arrays = load_file(out)
    assert sorted(arrays) == ["again/embedding", "prefill/embedding"]
    table = np.asarray(parameters.embedding.read(), np.float32)
    assert arrays["prefill/embedding"].dtype == np.float32
    assert np.array_equal(arrays["prefill/embedding"], table[[3, 0, 52]])


def test_nothing_is_written_over(refmoe: Refmoe, tmp_path: Path) -> None:
    path = tmp_path / "harness.c"
    path.write_text("mine")
    status, _, err = refmoe("conform", "--scaffold", "c", path)
    assert status == 2
    assert "is there already" in err
    assert path.read_text() == "mine"
