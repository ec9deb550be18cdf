# SPDX-License-Identifier: Apache-2.0
"""A small part of the campaign of inputs, the tables that it sweeps over, and what it has found."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import click
import numpy as np
import pytest
from hypothesis import given as for_all
from hypothesis import strategies as st

from refmoe.cli.guard import Output, OutputFolder
from refmoe.errors import InputError
from refmoe.files.npy_file import read_npz
from refmoe.files.reading import LARGEST, read_bytes
from refmoe.report.json_text import json_text
from tests.cli.every_command import COMMANDS, ROOT
from tests.command_line import Refmoe
from tests.fuzz import inputs
from tests.fuzz.inputs_coverage import one_input, readers
from tests.fuzz.inputs_places import INVOCATIONS, command_of

COUNT = 350
linux = pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc of Linux")


@linux
def test_a_part_of_the_campaign_has_no_fault(tmp_path: Path) -> None:
    """In a process of its own, since it forks."""
    counts = tmp_path / "counts.json"
    command = [sys.executable, "-m", "tests.fuzz", "--seed", "7", "--count", str(COUNT), "--minutes", "30"]
    done = subprocess.run([*command, "--json", str(counts)], cwd=ROOT, capture_output=True, text=True, check=False)
    found = json.loads(counts.read_text())
    assert found["faults"] == [], done.stderr
    assert found["inputs"] > 0.95 * COUNT  # the shares of the kinds are rounded
    assert done.returncode == 0
    statuses = {status for kind in found["kinds"].values() for status in kind["statuses"]}
    assert {"0", "1", "2"} <= statuses, "the mutations are too weak or too strong to reach most of the code"


def test_every_command_and_every_path_is_swept_over() -> None:
    """A new command, or a new option that names a file, must be in some invocation."""
    assert {command_of(words) for words in INVOCATIONS} == {*COMMANDS}
    missing = [
        f"{name} {parameter.opts[0]}"
        for name, command in COMMANDS.items()
        for parameter in command.params
        if isinstance(parameter, click.Option) and isinstance(parameter.type, click.Path)
        if not any(command_of(words) == name and parameter.opts[0] in words.split() for words in INVOCATIONS)
    ]
    # written folders of goldens: the commands of the suite have them, and matrix writes only a whole matrix
    assert missing == []
    outputs = {type(parameter.type) for command in COMMANDS.values() for parameter in command.params}
    assert {Output, OutputFolder} <= outputs


def ended(status: int, out: bytes = b"", err: bytes = b"") -> inputs.Ended:
    return inputs.Ended(status, out, err)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("info",), ended(70)),
        (("info",), ended(1)),
        (("cases",), ended(3)),
        (("info",), ended(2)),
        (("info",), ended(2, b"", b"refmoe: a\nrefmoe: b\n")),
        (("info",), ended(2, b"text", b"refmoe: a\n")),
        (("info",), ended(0, b"\x1b[31m")),
        (("info",), ended(0, b"", b"x.py:1: RuntimeWarning: overflow\n")),
        (("info",), ended(2, b"", b"refmoe: " + b"x" * 10**6)),
        (("info", "--json"), ended(0, b'{"a": NaN}')),
        (("info", "--json"), ended(2, b"", b"refmoe: a\n")),
        (("info",), inputs.Ended(0, seconds=10**4)),
        (("info",), inputs.Ended(0, memory=10**10)),
        (("verify",), ended(1, b"Traceback (most recent call last):")),
    ],
)
def test_the_oracle_sees_a_fault(tmp_path: Path, words: tuple[str, ...], found: inputs.Ended) -> None:
    assert [*inputs.faults(inputs.Run(words), found, {}, tmp_path)]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("info",), ended(0, b"text\n")),
        (("info",), ended(2, b"", b"refmoe: config.json: no such file\n")),
        (
            ("info",),
            ended(2, b"", b"Usage: refmoe info [OPTIONS]\nTry 'refmoe info -h' for help.\n\nError: No such option\n"),
        ),
        (("verify", "--json"), ended(3, b'{"a": "NaN"}')),
    ],
)
def test_the_oracle_lets_good_ends_pass(tmp_path: Path, words: tuple[str, ...], found: inputs.Ended) -> None:
    assert [*inputs.faults(inputs.Run(words), found, {}, tmp_path)] == []


def test_the_oracle_sees_what_happens_to_files(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "input").write_text("a")
    before = inputs.state(tmp_path)
    run = inputs.Run(["info", "--out", "out/t.json"])
    (tmp_path / "out" / "t.json").write_text("{}")
    assert [*inputs.faults(run, ended(0), before, tmp_path)] == []
    (tmp_path / "out" / "t.json").write_text("{")
    assert len([*inputs.faults(run, ended(0), before, tmp_path)]) == 1
    (tmp_path / "input").write_text("b")
    (tmp_path / ".x.tmp").write_text("")
    (tmp_path / "other").write_text("")
    assert len([*inputs.faults(run, ended(0), before, tmp_path)]) == 4


@linux
@pytest.mark.parametrize("body", ["os._exit(3)", "time.sleep(60)", "os.kill(os.getpid(), 9)"])
def test_a_worker_that_dies_or_hangs_is_a_fault_of_its_trial(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    monkeypatch.setattr(inputs, "WAIT", 0.5)
    import time

    places = {"os": os, "time": time}
    kind = inputs.Kind(lambda number, dice, folder: eval(body, places) if number == 1 else inputs.Run(["-h"]), 1)
    trials = iter([inputs.Trial("kind", number, 0) for number in range(3)])
    found = [*inputs.campaign(trials, {"kind": kind})]
    assert [each.trial.number for each in found] == [0, 1, 2]
    assert [bool(each.faults) for each in found] == [False, True, False]


# ---- what the campaign has found

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner),
)


@for_all(VALUES)
def test_what_commands_print_is_json_for_every_parser(value: object) -> None:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    json.loads(json_text(value), parse_constant=refuse)


def test_commands_make_json_in_one_place() -> None:
    """`json.dumps` writes NaN, which is no JSON."""
    assert [path.name for path in (ROOT / "refmoe" / "cli").glob("*.py") if "json.dumps" in path.read_text()] == []


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 5 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="67,108,864"):
            read_bytes(tmp_path / "large", "a file")
        assert tracemalloc.get_traced_memory()[1] < LARGEST
    finally:
        tracemalloc.stop()


def test_a_member_of_an_archive_that_is_no_array_is_refused(tmp_path: Path) -> None:
    array = io.BytesIO()
    np.save(array, np.zeros(2))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", array.getvalue())
        archive.writestr("y.npy", b"no array")
    with pytest.raises(InputError, match="'y'"):
        read_npz(tmp_path / "a.npz")


def test_a_value_of_several_lines_is_one_line_of_the_message(refmoe: Refmoe) -> None:
    status, _, said = refmoe("info", "mixtral-8x7b", "--tokens", "a\nb")
    assert status == 2
    assert len([line for line in said.splitlines() if "'a" in line and "b'" in line]) == 1


def test_a_model_is_not_written_into_the_folder_of_goldens(refmoe: Refmoe, tmp_path: Path) -> None:
    (tmp_path / "one-pair").mkdir()
    (tmp_path / "one-pair" / "case.toml").write_bytes((ROOT / "golden" / "one-pair" / "case.toml").read_bytes())
    status, _, said = refmoe("materialise", "one-pair", tmp_path, "--golden", tmp_path)
    assert (status, [each.name for each in tmp_path.iterdir()]) == (2, ["one-pair"])
    assert str(tmp_path) in said


def test_the_name_of_a_page_is_checked_before_the_work(refmoe: Refmoe, tmp_path: Path) -> None:
    status, printed, said = refmoe("verify", tmp_path / "none", "--html", f"{tmp_path}/\x01")
    assert (status, printed) == (2, "")
    assert "control characters" in said


@pytest.mark.parametrize("name", readers())
def test_the_targets_of_the_coverage_guided_search_read(tmp_path: Path, name: str) -> None:
    for data in (b"", b"{}", b"\x93NUMPY", b"[" * 10**5, b"\xff", bytes(64)):
        one_input(name, tmp_path, data)
