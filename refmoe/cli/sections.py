# SPDX-License-Identifier: Apache-2.0
"""A group of commands whose help lists them in sections, by who asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click


class Sections(click.Group):
    """A group with its commands in sections. Each section is a title and the commands, in their order."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sections: list[tuple[str, Sequence[click.Command]]] = []

    def section(self, title: str, *members: click.Command) -> None:
        """Add a section."""
        self.sections.append((title, members))
        for command in members:
            self.add_command(command)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the commands, in the order of the sections."""
        return [str(command.name) for _, members in self.sections for command in members]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections, with the names of all in one column."""
        width = max(len(str(command.name)) for _, members in self.sections for command in members)
        for title, members in self.sections:
            with formatter.section(title):
                formatter.write_dl(
                    [(str(command.name).ljust(width), command.get_short_help_str(200)) for command in members]
                )
