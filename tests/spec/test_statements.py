# SPDX-License-Identifier: Apache-2.0
"""The table in `refmoe.spec`: each command runs the statement of the model that the table says."""

from __future__ import annotations

import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import refmoe.spec
from tests.command_line import Refmoe
from tests.engines.running import HONEST

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^ {4}refmoe\.(\S+) +(.+?) {2,}(\S+)$", re.MULTILINE)
TABLE = {module: (commands, test) for module, commands, test in ROW.findall(refmoe.spec.__doc__ or "")}
"""Statement to the commands that run it and the test that holds it to the spec."""

STEPS = {"attend", "run_experts"}
"""Functions by which a statement is told; a file of steps that replaces the whole attention block has `attention`."""
SHARED = {"steps.sharded": {"steps.rounding"}}
"""A rank attends with the steps that have cut points, and the specification itself is run beside each mutant."""

CASE = "one-pair"
Arguments = list[Any]
COMMANDS: dict[str, Callable[[Path], Arguments]] = {
    "suite check": lambda _: ["suite", "check", CASE, "--executor", "processes:1"],
    "suite certify": lambda out: ["suite", "certify", CASE, "--golden", out / "golden"],
    "suite emit": lambda out: ["suite", "emit", CASE, "--golden", out / "golden"],
    "emit --policy": lambda out: ["emit", "--case", CASE, "--policy", "bfloat16", "--out", out / "ideal.safetensors"],
    "emit --checkpoint": lambda out: [
        "emit", "--checkpoint", out / "model", "--tokens", "1,2", "--out", out / "trace.safetensors"
    ],
    "verify": lambda out: ["verify", out / "ideal.safetensors", "--case", CASE, "--no-diagnose"],
    "conform": lambda _: ["conform", "--case", CASE, "--dtype", "float32", "--no-diagnose", "--", *HONEST],
    "mutants matrix": lambda _: [
        "mutants", "matrix", "--case", CASE, "--mutant", "rope-sign-flipped", "--dtype", "float32",
        "--executor", "processes:1",
    ],
    "mutants matrix --mutant of several ranks": lambda _: [
        "mutants", "matrix", "--case", CASE, "--mutant", "tp-kv-replication-wrong", "--dtype", "float32",
        "--executor", "processes:1",
    ],
    "generate": lambda out: ["generate", "--checkpoint", out / "model", "--tokens", "1,2", "--max-new-tokens", 2],
}  # fmt: skip
"""An invocation of each row of the table that needs neither a GPU nor a model of full size."""
ELSEWHERE = {"suite check of a case of full size", "any of these with --device cuda, at float32"}


@contextmanager
def statements_that_run() -> Iterator[set[str]]:
    """The modules of the spec and of steps whose functions of `STEPS` are called meanwhile."""
    found: set[str] = set()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        name, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        told = function in STEPS or (function == "attention" and name.startswith("refmoe.steps."))
        if event == "call" and told and name.startswith(("refmoe.spec.", "refmoe.steps.")):
            found.add(name)

    sys.setprofile(profile)
    threading.setprofile(profile)  # a command may judge in a thread of its own
    try:
        yield found
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]
        sys.setprofile(None)


def commands(statement: str) -> list[str]:
    return re.split(r", (?!at )", TABLE[statement][0])


def test_the_table_names_every_statement_and_a_test_of_each() -> None:
    folder = ROOT / "refmoe" / "steps"
    replacing = {path.stem for path in folder.glob("*.py") if " = Steps(" in path.read_text()} | {"sharded"}
    assert {*TABLE} == {"spec"} | {f"steps.{name}" for name in replacing}
    assert all((ROOT / test).is_file() for _, test in TABLE.values())
    assert {command for name in TABLE for command in commands(name)} == {*COMMANDS, *ELSEWHERE}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_the_statement_of_its_row(
    refmoe: Refmoe, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the statements of attention and experts it runs this one alone."""
    monkeypatch.chdir(ROOT)
    shutil.copytree(ROOT / "golden" / CASE, tmp_path / "golden" / CASE)
    if command in ("emit --checkpoint", "generate"):
        assert refmoe("materialise", CASE, tmp_path / "model")[0] == 0
    if command == "verify":
        assert refmoe(*COMMANDS["emit --policy"](tmp_path))[0] == 0
    with statements_that_run() as found:
        status, out, err = refmoe(*COMMANDS[command](tmp_path))
    assert status == 0, out + err
    (statement,) = (name for name in TABLE if command in commands(name))
    others = {name for name in TABLE if any(module.startswith(f"refmoe.{name}") for module in found)}
    assert others - SHARED.get(statement, set()) == {statement}
