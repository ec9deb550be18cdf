# SPDX-License-Identifier: Apache-2.0
"""Exit statuses mean one thing each, in every command: 0 well, 1 a difference, 2 unusable input, 3 no verdict.

Whatever is unexpected has a larger one. The tests walk the tree of commands, so no new command can miss them.
"""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from refmoe.cli import main
from tests.cli.every_command import COMMANDS, EXAMPLES, arguments
from tests.command_line import Refmoe

every = pytest.mark.parametrize("name", COMMANDS)


def test_every_command_has_an_example() -> None:
    assert {*EXAMPLES} == {*COMMANDS}


def example(name: str, given: Path, out: Path) -> list[str]:
    """The words of the invocation that works. Skips the test where it needs a package that is not installed."""
    needed = EXAMPLES[name].needs
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} not installed")
    return arguments(name, EXAMPLES[name].works, given, out)


def unread_pipe() -> int:
    """The end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def run_onto(stream: Callable[[], int], words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of the program whose standard output is this stream."""
    monkeypatch.setattr(sys, "argv", ["refmoe", *words])
    with io.TextIOWrapper(os.fdopen(stream(), "wb")) as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        with pytest.raises(SystemExit) as stopped:
            main()
        assert sys.stdout is broken
    return int(stopped.value.code or 0)


@every
@pytest.mark.parametrize("option", [(), ("--json",)], ids=["text", "json"])
def test_a_reader_that_is_gone_changes_nothing(
    given: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str,
    option: tuple[str, ...],
) -> None:  # fmt: skip
    """As with ``| head``: a quiet end, the status of the work itself, and every file is written."""
    words = example(name, given, out)
    at = words.index("--") if "--" in words else len(words)
    status = run_onto(unread_pipe, [*words[:at], *option, *words[at:]], monkeypatch)
    assert capfd.readouterr().err == ""
    assert status == EXAMPLES[name].status
    assert all((out / file).stat().st_size for file in EXAMPLES[name].writes)


@every
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_under_standard_output_is_one_sentence(
    given: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    """The answer is lost, so the status is neither 0 nor 1. Files are written all the same."""
    status = run_onto(full_disk, example(name, given, out), monkeypatch)
    said = capfd.readouterr().err
    assert status == 74
    assert said.count("\n") == 1
    assert os.strerror(errno.ENOSPC) in said
    assert all((out / file).stat().st_size for file in EXAMPLES[name].writes)


@every
def test_unusable_input_is_one_sentence_and_status_2(refmoe: Refmoe, given: Path, out: Path, name: str) -> None:
    words = arguments(name, EXAMPLES[name].unusable, given, out)
    at = words.index("--") if "--" in words else len(words)
    status, printed, said = refmoe(*words)
    assert (status, printed) == (2, "")
    assert said
    assert "Traceback" not in said
    status, printed, said = refmoe(*words[:at], "--json", *words[at:])
    assert status == 2
    assert [*json.loads(printed)] == ["error"]


def refusing(error: Callable[[], BaseException]) -> Callable[..., NoReturn]:
    """The body of a command that raises."""

    def body(*_: Any, **__: Any) -> NoReturn:
        raise error()

    return body


@every
@pytest.mark.parametrize("option", [(), ("--json",)], ids=["text", "json"])
def test_a_defect_of_refmoe_is_reported_as_one(
    refmoe: Refmoe, given: Path, out: Path, monkeypatch: pytest.MonkeyPatch, name: str, option: tuple[str, ...]
) -> None:
    """With the traceback, without a character that acts on a terminal, and never as a difference."""
    monkeypatch.setattr(COMMANDS[name], "callback", refusing(lambda: RuntimeError("bo\x1b[31mom")))
    words = arguments(name, EXAMPLES[name].works, given, out)
    at = words.index("--") if "--" in words else len(words)
    status, printed, said = refmoe(*words[:at], *option, *words[at:])
    assert status == 70
    assert "Traceback" in said
    assert "bo\\u001b[31mom" in said
    assert "report" in said.splitlines()[-1]
    assert [*json.loads(printed)] == ["error"] if option else printed == ""


class Filled(OSError):
    """A disk that is full."""

    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file")


ENDS = {
    "the keyboard": (KeyboardInterrupt, 128 + signal.SIGINT),
    "SystemExit(0)": (lambda: SystemExit(0), 70),
    "SystemExit(1)": (lambda: SystemExit(1), 70),
    "GeneratorExit": (GeneratorExit, 70),
    "AssertionError": (AssertionError, 70),
    "a broken pipe to a process": (lambda: BrokenPipeError(errno.EPIPE, "x"), 70),
    "no memory": (MemoryError, 2),
    "a full disk": (Filled, 2),
}


@pytest.mark.parametrize("end", ENDS)
def test_whatever_ends_a_command_is_no_difference(refmoe: Refmoe, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    error, expected = ENDS[end]
    monkeypatch.setattr(COMMANDS["cases"], "callback", refusing(error))
    status, printed, _ = refmoe("cases")
    assert (status, printed) == (expected, "")


@pytest.fixture
def not_ignored() -> Iterator[None]:
    """Signals have their usual effect, also where the tests themselves run under nohup."""
    inherited = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, action in inherited.items():
        signal.signal(number, action)


@every
@pytest.mark.usefixtures("not_ignored")
@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP"])
def test_a_signal_runs_what_tidies_up(
    refmoe: Refmoe, given: Path, out: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: str
) -> None:
    """The status is that of a shell, and every `finally` has run."""
    tidied = []

    def body(*_: Any, **__: Any) -> None:
        try:
            os.kill(os.getpid(), getattr(signal, number))
            signal.sigtimedwait([], 1)
        finally:
            tidied.append(True)

    monkeypatch.setattr(COMMANDS[name], "callback", body)
    before = signal.getsignal(getattr(signal, number))
    status, printed, said = refmoe(*arguments(name, EXAMPLES[name].works, given, out))
    assert (status, printed, said) == (128 + getattr(signal, number), "", "")
    assert tidied
    assert signal.getsignal(getattr(signal, number)) is before
