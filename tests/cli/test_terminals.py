# SPDX-License-Identifier: Apache-2.0
"""No character of a stranger acts on a terminal; any encoding takes any text; widths and colours are the terminal's."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import click
import numpy as np
import pytest
from hypothesis import example as also
from hypothesis import given as for_all
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.numpy import load_file, save_file

from refmoe.cli.streams import Plain
from refmoe.report.neutral import LONGEST, neutral, sentence
from refmoe.report.terminal import SafeConsole
from tests.cli.every_command import COMMANDS, EXAMPLES, ROOT, arguments
from tests.command_line import Refmoe

HOSTILE = "\x1b]0;t\x07\x9b31m\u202egnp\u2066\x7f\r\x00\u2028"
ACTS = re.compile(r"\x1b\[[0-9;]*m")
MOVES = re.compile(r"\x1b\[[0-9;?]*[A-HJKSTfhlsu]|\r(?!\n)")
LOCALES = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ASCII": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "tr_TR": {"LC_ALL": "tr_TR.ISO-8859-9", "PYTHONUTF8": "0"},
    "UTF-8": {"LC_ALL": "C.UTF-8"},
}


def unsafe(text: str) -> set[str]:
    """The characters that act on a terminal: controls and changes of direction."""
    return {
        c
        for c in text
        if (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\n\t") or c in "\u202e\u2066"
    }


@for_all(st.text(st.characters()))
@also(HOSTILE)
def test_nothing_unsafe_is_left(text: str) -> None:
    assert unsafe(neutral(text)) == set()
    assert neutral(neutral(text)) == neutral(text)
    assert "\n" not in sentence(text)
    assert len(sentence(text * 2000)) <= LONGEST


def test_readable_text_is_left_as_it_is() -> None:
    for text in ("plain\ttext\n", "é ü 漢字 👩‍🚀 ≠ …", "a\u00a0b"):
        assert neutral(text) == text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_console_acts_only_by_its_own_styles(terminal: bool) -> None:
    """Whatever is printed: a string, a text, a table, and text above a bar."""
    out = io.StringIO()
    console = SafeConsole(file=out, force_terminal=terminal, width=60, color_system="truecolor" if terminal else None)
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(Text(HOSTILE, style="red"))
    for each in (HOSTILE, Text(HOSTILE, style="bold"), table, [HOSTILE]):
        console.print(each, style="green")
    assert unsafe(ACTS.sub("", out.getvalue())) == set()
    assert bool(ACTS.search(out.getvalue())) is terminal


def test_consoles_are_made_in_one_place() -> None:
    """Another console would let characters of a stranger through."""
    made = {path.name for path in (ROOT / "refmoe").rglob("*.py") if re.search(r"(?<!\w)Console\(", path.read_text())}
    assert made <= {"terminal.py"}
    assert issubclass(SafeConsole, Console)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "iso-8859-9", "utf-8"])
def test_a_stream_takes_any_text(encoding: str) -> None:
    raw = io.BytesIO()
    stream = Plain(io.TextIOWrapper(raw, encoding=encoding, errors=Plain(None).errors))
    stream.write(HOSTILE + "█ … 漢 \udcff é\n")
    stream.flush()
    text = raw.getvalue().decode(encoding)
    assert unsafe(text) == set()
    assert "\\xff" in text
    assert "\\u6f22" in text or encoding == "utf-8"
    assert "# . " in text or encoding in ("utf-8", "cp1252")


# ---- whole commands


def places_of(name: str, given: Path, out: Path) -> list[str]:
    """The unusable invocation of a command with hostile names in the place of every name."""
    words = arguments(name, EXAMPLES[name].unusable, given, out)
    at = words.index("--") if "--" in words else len(words)
    return [word.replace("none", f"none{HOSTILE.replace(chr(0), '')}\udcff\nok") for word in words[:at]] + words[at:]


@pytest.mark.parametrize("name", COMMANDS)
def test_no_name_that_is_refused_acts_on_a_terminal(refmoe: Refmoe, given: Path, out: Path, name: str) -> None:
    for option in ((), ("--json",)):
        words = places_of(name, given, out)
        at = words.index("--") if "--" in words else len(words)
        status, printed, said = refmoe(*words[:at], *option, *words[at:])
        assert status == 2
        assert unsafe(printed + said) == set()
        assert not any(line.startswith("ok") for line in said.splitlines())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_message_has_a_bounded_length(refmoe: Refmoe, given: Path, out: Path, name: str) -> None:
    """A name of 20,000 characters, and one that a file system takes."""
    for many in (200, 20_000):
        words = [w.replace("none", "none" + "x" * many) for w in arguments(name, EXAMPLES[name].unusable, given, out)]
        status, _, said = refmoe(*words)
        assert status == 2
        assert len(said) < 2 * LONGEST


def test_names_of_cases_and_files_do_not_act_on_a_terminal(refmoe: Refmoe, tmp_path: Path) -> None:
    """A golden folder as a stranger may pack it: the name of a case, and of a stray file in it."""
    name = "x\x1b]0;t\x07\nok    y"
    case = tmp_path / "golden" / name
    shutil.copytree(ROOT / "golden" / "one-pair", case)
    (case / "stray\x1b[2J").write_text("")
    status, printed, said = refmoe("suite", "check", "--golden", tmp_path / "golden")
    assert status == 1
    assert unsafe(printed + said) == set()
    assert not any(line.startswith("ok") for line in printed.splitlines())


def run(words: list[str], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[bytes]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHONIO"))}
    return subprocess.run(
        [os.fsencode(word) for word in (sys.executable, "-m", "refmoe", *words)],
        cwd=folder, env={**kept, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "place", [name if name in ("C", "UTF-8") else pytest.param(name, marks=pytest.mark.slow) for name in LOCALES]
)
def test_any_locale_takes_any_output(given: Path, tmp_path: Path, place: str) -> None:
    """A picture of marks, and a folder and a trace with a name that is no text."""
    environment = LOCALES[place]
    done = run(["router", "show", "--tokens", "3"], environment, tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    model = os.fsencode(tmp_path) + b"/m\xff\xe9"
    shutil.copytree(given / "model", os.fsdecode(model))
    for words in (
        ["info", os.fsdecode(model)],
        ["emit", "--checkpoint", os.fsdecode(model), "--tokens", "1", "--out", "t\udcff"],
    ):
        done = run(words, environment, tmp_path)
        assert (done.returncode, done.stderr) == (0, b"")
    assert b"t\xff" in os.listdir(os.fsencode(tmp_path))


# ---- terminals of all kinds


def on_terminal(words: list[str], environment: dict[str, str]) -> str:
    """The characters that a command writes on a terminal."""
    pty = pytest.importorskip("pty")
    child, handle = pty.fork()
    if not child:
        os.environ.pop("NO_COLOR", None)
        os.environ.update({"TERM": "xterm-256color", "PYTHONPATH": str(ROOT), **environment})
        os.execv(sys.executable, [sys.executable, "-m", "refmoe", *words])
    written = b""
    while True:
        try:
            block = os.read(handle, 1 << 16)
        except OSError:
            break
        if not block:
            break
        written += block
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(handle)
    return written.decode()


KINDS = {
    "a terminal": ({}, True, True),
    "TERM=dumb": ({"TERM": "dumb"}, False, False),
    "NO_COLOR": ({"NO_COLOR": "1"}, False, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_colours_and_movements_are_those_that_the_terminal_has(kind: str) -> None:
    environment, coloured, moving = KINDS[kind]
    cases = sorted(path.parent.name for path in (ROOT / "golden").glob("*/case.toml"))[:1]
    bar = on_terminal(["suite", "check", cases[0], "one-pair", "--executor", "processes:1"], environment)
    assert bool(MOVES.search(bar)) is moving
    picture = on_terminal(["router", "show", "--tokens", "3"], environment)
    assert bool(re.search(r"\x1b\[(?:\d+;)*3[0-7](?:;\d+)*m", picture)) is coloured
    if kind == "TERM=dumb":
        assert "\x1b" not in bar + picture


@pytest.mark.slow
@pytest.mark.parametrize("columns", [40, 80, 160])
def test_no_line_of_a_table_is_wider_than_the_terminal(columns: int) -> None:
    for words in (["policies"], ["cases"], ["mutants", "list"]):
        lines = ACTS.sub("", on_terminal(words, {"COLUMNS": str(columns), "NO_COLOR": "1"})).splitlines()
        assert max(map(len, lines)) <= columns


# ---- words


def test_what_executes_a_file_says_so() -> None:
    """The help of every command that runs a stranger's code names the rights with which it runs."""
    for words in (["router", "check"], ["conform"]):
        context = click.Context(COMMANDS[" ".join(words)], info_name="refmoe")
        assert "your rights" in " ".join(COMMANDS[" ".join(words)].get_help(context).split())


@pytest.mark.parametrize("size", [3e38, -1e38, 1e-45])
def test_no_warning_about_numbers_reaches_a_user(refmoe: Refmoe, given: Path, tmp_path: Path, size: float) -> None:
    """Weights near the ends of float32, in every command that computes with a model."""
    shutil.copytree(given / "model", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    huge = {name: np.full(array.shape, size, np.float32) for name, array in tensors.items()}
    save_file(huge, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    model = ("--checkpoint", tmp_path / "model")
    for words in (
        ("generate", *model, "--tokens", "1,2", "--max-new-tokens", 3),
        ("generate", *model, "--tokens", "1,2", "--max-new-tokens", 3, "--dtype", "float64"),
        ("emit", *model, "--tokens", "1,2", "--dtype", "float32", "--out", tmp_path / "t"),
        ("verify", tmp_path / "t", *model, "--policy", "float32"),
        ("verify", given / "trace", "--distances", tmp_path / "t"),
    ):
        _, _, said = refmoe(*words)
        assert "Warning" not in said
        assert said.count("\n") <= 1
