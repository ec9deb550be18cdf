# SPDX-License-Identifier: Apache-2.0
"""Documents whose commands are run: the commands and the Python sessions of a page, in order, in a folder of its own.

python -m tests.tour docs/quickstart.md      # prints each command of a page with all that it prints now
"""

from __future__ import annotations

import contextlib
import doctest
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STATUS = "echo $?"
"""The command by which a page shows the status of the command before it."""
FAILED = re.compile(r"NOT CONFORMANT|\d+ outcomes?: .*not conformant(?!.*known)")
"""A line that tells of an engine that is not conformant."""
BLOCK = re.compile(r"^(?:<!-- ([\w-]+)(?:: (\S+))? -->\n)?```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
"""A block of code: the comment above it (a word, a name), its language and its text."""


@dataclass
class Command:
    """A command of a console block, and the lines that it is said to print."""

    line: str
    shown: list[str] = field(default_factory=list)

    @property
    def fails(self) -> bool:
        """Whether the lines shown are those of an engine that is not conformant."""
        return any(FAILED.match(line) for line in self.shown)


@dataclass(frozen=True)
class Session:
    """A block of Python with prompts."""

    text: str


def steps(text: str) -> list[Command | Session]:
    """The commands and sessions of a page."""
    found: list[Command | Session] = []
    for _, _, language, block in BLOCK.findall(text):
        if language == "console":
            found += _commands(block)
        elif language == "python" and ">>> " in block:
            found.append(Session(block))
    return found


def _commands(block: str) -> list[Command]:
    found: list[Command] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append(Command(line[2:]))
        else:
            found[-1].shown.append(line)
    return found


def console(text: str) -> list[Command]:
    """The commands of a page."""
    return [step for step in steps(text) if isinstance(step, Command)]


def files(text: str) -> dict[str, str]:
    """The files that a reader is told to write: each block after a comment ``<!-- file: NAME -->``, by its name."""
    return {name: block for kind, name, _, block in BLOCK.findall(text) if kind == "file"}


def write_files(text: str, folder: Path) -> None:
    """Write these files."""
    for name, content in files(text).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


def marked(text: str, mark: str) -> str:
    """The block after the comment ``<!-- MARK -->``."""
    (block,) = (block for kind, _, _, block in BLOCK.findall(text) if kind == mark)
    return block.strip()


def run_tour(text: str, folder: Path, told: bool = False) -> None:
    """Run the commands and sessions of a page.

    The lines shown must be among those printed, in their order. A line that is an ellipsis stands for any lines, and an
    ellipsis in a line for any part of it. Fractions may differ, since they are rounding errors; whole numbers may not.
    The status is the one that ``echo $?`` shows. Without it, it is 1 where an engine is not conformant, else 0.

    told: print what the commands print, and compare nothing
    """
    environment = environment_in(folder)
    write_files(text, folder)
    names: dict[str, Any] = {}
    with _working_in(folder):
        _run_steps(steps(text), folder, environment, names, told)


def _run_steps(
    found: list[Command | Session], folder: Path, environment: dict[str, str], names: dict[str, Any], told: bool
) -> None:
    for step, after in pairwise([*found, Command("")]):
        if isinstance(step, Session):
            _run_session(step, names, told)
        elif step.line != STATUS:
            done = subprocess.run(
                step.line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False
            )  # fmt: skip
            if told:
                print(f"$ {step.line}\n{done.stdout}{done.stderr}[{done.returncode}]\n")
                continue
            asked = isinstance(after, Command) and after.line == STATUS
            wanted = int(after.shown[0]) if asked and isinstance(after, Command) else int(step.fails)
            assert done.returncode == wanted, (step.line, done.stdout, done.stderr)
            problem = difference(step.shown, done.stdout + (done.stderr if wanted == 2 else ""))
            assert not problem, (step.line, problem, done.stdout)


def environment_in(folder: Path, columns: int = 100) -> dict[str, str]:
    """The environment of the commands of a page: `python` and `refmoe` are those of this test."""
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(_programs(folder)), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),  # the commands of this tree, also where another one is installed
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_PLUGINS": "refmoe.api.pytest_plugin,refmoe.routers.contract.plugin",
        "COLUMNS": str(columns),
    }


def _programs(folder: Path) -> Path:
    """A folder with `python` and `refmoe`, those of this test."""
    programs = folder / ".programs"
    programs.mkdir()
    for name, words in {"python": "", "refmoe": "-m refmoe "}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}"$@"\n')
        (programs / name).chmod(0o755)
    return programs


class _Checker(doctest.OutputChecker):
    """Compares the output of a session in the same way as that of a command."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want.strip() or difference(want.splitlines(), got) is None


def _run_session(session: Session, names: dict[str, Any], told: bool) -> None:
    test = doctest.DocTestParser().get_doctest(session.text, names, "page", None, 0)
    printed: list[str] = []
    runner = doctest.DocTestRunner(_Checker(), verbose=told)
    failed, _ = runner.run(test, out=sys.stdout.write if told else printed.append, clear_globs=False)  # type: ignore[arg-type]
    names.update(test.globs)
    assert told or not failed, "".join(printed)


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """Work in a folder, whose modules can be imported, and are forgotten afterwards."""
    before, modules = sys.path[:], {*sys.modules}
    with contextlib.chdir(folder):
        sys.path.insert(0, str(folder))
        try:
            yield
        finally:
            sys.path[:] = before
            for name in {*sys.modules} - modules:
                if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                    del sys.modules[name]


def difference(shown: list[str], printed: str) -> str | None:
    """The first line shown that was not printed, in order; None when all were."""
    lines, at = [_comparable(line) for line in printed.splitlines()], 0
    for line in shown:
        if line.strip() == "…":
            continue
        pattern = ".*".join(re.escape(part) for part in _comparable(line).split("…"))
        matching = [i for i in range(at, len(lines)) if re.fullmatch(pattern, lines[i])]
        if not matching:
            return line
        at = matching[0] + 1
    return None


def _comparable(line: str) -> str:
    """The words and whole numbers of a line.

    Distances in standard deviations are whole by accident, and fractions differ in their last digits between machines.
    """
    line = re.sub(r"-?\d[\d.,]*(?=( standard deviations| sigma))", "#", line)
    line = re.sub(r"-?\d[\d,]*(\.\d+(e[+-]?\d+)?|e[+-]?\d+)", "#", line)
    return re.sub(r"\s+", " ", line).strip()


def clone(folder: Path) -> None:
    """Make a folder look like a clone of the repository, for pages that begin with one."""
    for name in ("examples", "golden", "refmoe", "tests", "bench", "docs", "pyproject.toml", "README.md"):
        (folder / name).symlink_to(ROOT / name)


def main() -> None:
    for page in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            clone(Path(folder))
            run_tour(Path(page).read_text(encoding="utf-8"), Path(folder), told=True)


if __name__ == "__main__":
    main()
