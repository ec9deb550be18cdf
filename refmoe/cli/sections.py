# SPDX-License-Identifier: Apache-2.0
"""A group of commands whose help lists them in sections, by who asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import click


@dataclass(frozen=True)
class Later:
    """A command that is imported when it is used, so that the help of the others does not wait for it.

    name: the command NAME is NAME_command of the module refmoe.cli.NAME
    help: the first line of its help
    """

    name: str
    help: str

    def get_short_help_str(self, _limit: int = 45) -> str:
        """The line of the command in a list."""
        return self.help

    def command(self) -> click.Command:
        """The command itself."""
        found: click.Command = getattr(import_module(f"refmoe.cli.{self.name}"), f"{self.name}_command")
        return found


class Sections(click.Group):
    """A group with its commands in sections. Each section is a title and the commands, in their order."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sections: list[tuple[str, Sequence[click.Command | Later]]] = []

    def section(self, title: str, *members: click.Command | Later) -> None:
        """Add a section."""
        self.sections.append((title, members))

    def members(self) -> dict[str, click.Command | Later]:
        """The commands by name, in the order of the sections."""
        return {str(command.name): command for _, members in self.sections for command in members}

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name."""
        found = self.members().get(cmd_name)
        return found.command() if isinstance(found, Later) else found

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the commands, in the order of the sections."""
        return [*self.members()]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections, with the names of all in one column."""
        width = max(len(name) for name in self.members())
        for title, members in self.sections:
            with formatter.section(title):
                formatter.write_dl(
                    [(str(command.name).ljust(width), command.get_short_help_str(200)) for command in members]
                )
