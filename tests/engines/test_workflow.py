# SPDX-License-Identifier: Apache-2.0
"""``refmoe conform --write-ci``: a workflow that runs unchanged, and a list of today's failures beside it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from refmoe.engines.known import read_known
from refmoe.engines.scaffold.workflow import write_workflow
from tests.command_line import Refmoe
from tests.engines.running import HONEST, hostile
from tests.engines.test_conform_command import CASES, FLOAT32

FROM = ("--refmoe-from", "someone/refmoe")


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("someone/refmoe", ["repository: someone/refmoe", "path: .refmoe"]),
        ("a-b/c.d@1.10", ["repository: a-b/c.d", 'ref: "1.10"', "path: .refmoe"]),
    ],
)
def test_it_takes_refmoe_from_the_repository_that_was_named(source: str, lines: list[str], tmp_path: Path) -> None:
    """Only the installation of the engine is left for the user to fill in."""
    write_workflow(tmp_path / "ci.yml", source, ["--timeout", "9"], ["./x"], None)
    text = (tmp_path / "ci.yml").read_text()
    step = text.partition("uses: actions/checkout@v4\n        with:\n")[2].partition("      - uses")[0]
    assert [line.strip() for line in step.splitlines()] == lines
    assert "OWNER" not in text


def test_todays_failures_are_known_to_the_workflow(refmoe: Refmoe, tmp_path: Path) -> None:
    workflow, command = tmp_path / "conformance.yml", hostile("gives_nan", "top-1")
    status, _, _ = refmoe("conform", *CASES, *FLOAT32, "--no-diagnose", "--write-ci", workflow, *FROM, "--", *command)
    assert status == 1
    (known,) = read_known(tmp_path / "conformance.known.toml")
    assert (known.engine, known.case, known.dtype) == ("honest", "top-1", "float32")
    (line,) = [line for line in workflow.read_text().splitlines() if "refmoe conform -" in line and "run:" in line]
    words = shlex.split(json.loads(line.partition("run: ")[2]))
    assert words[:2] == ["refmoe", "conform"]
    assert words[-len(command) :] == command
    words = words[1 : words.index("--golden")] + words[words.index("--known") : words.index("--out")]
    status, out, _ = refmoe(*words, "--", *command)
    assert status == 0, out


def test_a_workflow_holds_whatever_an_argument_is(refmoe: Refmoe, tmp_path: Path) -> None:
    """The argument has quotes of the shell and of YAML, and braces that GitHub would evaluate."""
    workflow = tmp_path / "ci.yml"
    command = [*HONEST, 'it\'s "${{ secrets.X }}": # é\n']
    refmoe("conform", "--case", "top-1", *FLOAT32, "--write-ci", workflow, *FROM, "--", *command)
    (line,) = [line for line in workflow.read_text().splitlines() if line.startswith('      - run: "refmoe')]
    text = line.partition("run: ")[2]
    assert "${{ secrets" not in text
    assert shlex.split(json.loads(text.replace("${{ '${{' }}", "${{")))[-1] == command[-1]
