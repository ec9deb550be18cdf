# SPDX-License-Identifier: Apache-2.0
"""Tables of commands: whole lines in a pipe, and no line longer than the terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from refmoe.cli import table

ROWS = [("a-name", "word " * 30, "3"), ("another-name", "short", "14")]


def printed(monkeypatch: pytest.MonkeyPatch, width: int | None, **options: Any) -> list[str]:
    """The lines of the table.   width: of the terminal; None: a pipe"""
    text = io.StringIO()
    terminal = width is not None
    place = Console(
        file=text, width=width, force_terminal=terminal, color_system=None, highlight=False, soft_wrap=True
    )  # fmt: skip
    monkeypatch.setattr(table, "console", lambda: place)
    table.print_table(("name", "what", "n"), ROWS, **options)
    return text.getvalue().splitlines()


def test_in_a_pipe_every_row_is_a_whole_line(monkeypatch: pytest.MonkeyPatch) -> None:
    found = printed(monkeypatch, None)
    assert len(found) == 1 + len(ROWS)
    assert ROWS[0][1].strip() in found[1]
    assert all(line == line.rstrip() for line in found)


@pytest.mark.parametrize("width", [40, 60, 80])
@pytest.mark.parametrize("wrap", [False, True])
def test_on_a_terminal_no_line_is_longer_than_it(monkeypatch: pytest.MonkeyPatch, width: int, wrap: bool) -> None:
    """Cut, a row is one line with an ellipsis; wrapped, nothing is left out."""
    found = printed(monkeypatch, width, wrap=wrap, right=[2])
    assert max(map(len, found)) <= width
    assert all(any(line.startswith(row[0]) for line in found) for row in ROWS)
    text = "\n".join(found)
    assert text.count("word") == 30 if wrap else (len(found), text.count("…")) == (3, 1)
    assert found[-1].endswith(" 14")


@pytest.mark.parametrize(("width", "columns"), [(120, 3), (44, 2), (None, 3)])
def test_a_narrow_terminal_does_without_what_is_optional(
    monkeypatch: pytest.MonkeyPatch, width: int | None, columns: int
) -> None:
    heading = printed(monkeypatch, width, optional=[2])[0]
    assert len(heading.split()) == columns
