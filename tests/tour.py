"""Documents whose commands are run: every command of their console blocks, in order, in a folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

MODEL = "/tmp/model"
"""Where documents write a model; tests write it into their own folder."""
STATUS = "echo $?"
"""The command by which a document shows a status that is not 0."""


@dataclass
class Command:
    """A command of a console block, and the lines it is said to print."""

    line: str
    shown: list[str] = field(default_factory=list)


def console(text: str) -> list[Command]:
    """The commands of a document."""
    found: list[Command] = []
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append(Command(line[2:]))
            else:
                found[-1].shown.append(line)
    return found


def files(text: str) -> dict[str, str]:
    """What a reader is told to write: each block after a comment ``<!-- file: NAME -->``, by its name."""
    return dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", text, re.DOTALL))


def run_tour(text: str, folder: Path) -> None:
    """Run a document's commands. The lines shown must be among those printed, in their order.

    In what is shown, a line that is an ellipsis stands for any lines, and one that ends in an ellipsis for any end of
    the line. Measured numbers may differ, and counts of outcomes may not. A status is the one shown by ``echo $?``
    right after; without, 1 after a trace that is not conformant, else 0.
    """
    environment = {**os.environ, "PATH": os.pathsep.join([str(_programs(folder)), os.environ["PATH"]])}
    for name, content in files(text).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_moved(content))
    commands = console(text)
    for command, after in zip(commands, [*commands[1:], Command("")], strict=True):
        if command.line == STATUS:
            continue
        wanted = int(after.shown[0]) if after.line == STATUS else int("NOT CONFORMANT" in command.shown)
        done = subprocess.run(
            _moved(command.line), shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )  # fmt: skip
        assert done.returncode == wanted, (command.line, done.stdout, done.stderr)
        _compare(command, done.stdout)


def _programs(folder: Path) -> Path:
    """A folder with `python` and `refmoe`, those of this test."""
    programs = folder / ".programs"
    programs.mkdir()
    for name, words in {"python": "", "refmoe": "-m refmoe "}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}"$@"\n')
        (programs / name).chmod(0o755)
    return programs


def _moved(text: str) -> str:
    return text.replace(MODEL, MODEL.rpartition("/")[2])


def _compare(command: Command, out: str) -> None:
    printed = [_comparable(line) for line in out.splitlines()]
    at = 0
    for line in command.shown:
        if line == "…":
            continue
        wanted = _comparable(_moved(line))
        matching = [i for i in range(at, len(printed)) if _is_shown(wanted, printed[i])]
        assert matching, (command.line, line, out)
        at = matching[0] + 1


def _is_shown(wanted: str, printed: str) -> bool:
    return printed.startswith(wanted[:-1]) if wanted.endswith("…") else printed == wanted


def _comparable(line: str) -> str:
    """A line's words: measured numbers differ in their last digits from machine to machine, counts do not."""
    counted = re.match(r"\d+ outcomes?: ", line)
    return re.sub(r"\s+", " ", line if counted else re.sub(r"-?\d[\d.,]*(e[+-]\d+)?", "#", line)).strip()
