# SPDX-License-Identifier: Apache-2.0
"""`docs/routers.md`: every Python block and every command gives the output that the page shows."""

from __future__ import annotations

import doctest
import re
import shlex
import sys
from pathlib import Path

import pytest

from refmoe.cli import main

PAGE = Path(__file__).parent.parent.parent / "docs" / "routers.md"
BLOCKS = re.findall(r"^```(python|console)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
COMMANDS = [
    (command, expected)
    for kind, block in BLOCKS
    if kind == "console"
    for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
]


def test_every_python_block_prints_what_the_page_says() -> None:
    """One session, from the top of the page to its end."""
    session = "\n".join(block for kind, block in BLOCKS if kind == "python")
    examples = doctest.DocTestParser().get_doctest(session, {}, PAGE.name, str(PAGE), 0)
    assert len(examples.examples) > 50
    printed: list[str] = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(examples, out=printed.append)
    assert not failed, "".join(printed)


@pytest.mark.parametrize(("command", "expected"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_every_command_prints_what_the_page_says(
    command: str, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert capsys.readouterr().out.splitlines() == expected.splitlines()


def test_the_page_has_its_blocks() -> None:
    """The pattern finds the blocks. Without this check, a page with misspelt fences would pass the tests above."""
    assert PAGE.read_text(encoding="utf-8").count("```") == 2 * len(BLOCKS)
    assert len(COMMANDS) >= 5
