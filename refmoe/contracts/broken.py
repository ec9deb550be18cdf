# SPDX-License-Identifier: Apache-2.0
"""The exceptions of checks. `checking` turns them into verdicts, so none leaves this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 500
"""The most characters of an exception's text."""


class LawBroken(Exception):
    """The subject breaks the law. words: the found and the expected result; token: where."""

    def __init__(self, words: str, token: int | None = None) -> None:
        super().__init__(words)
        self.words = words
        self.token = None if token is None else int(token)


class Raised(LawBroken):
    """The subject raised an exception that it did not declare."""


class Malformed(LawBroken):
    """The result has not the declared form. The law of the form fails, and no other law can be judged."""


@contextmanager
def foreign(what: str, where: str = "") -> Iterator[None]:
    """Run a function of the user's, which may do anything, and turn what it raises into a broken law.

    what: the function, in words   where: the end of the sentence about it.
    An exception that asks the program to end is no exception that a router may declare, so it is not `Raised`.
    """
    try:
        yield
    except (LawBroken, KeyboardInterrupt):
        raise
    except BaseException as error:
        kind = Raised if isinstance(error, Exception) else LawBroken
        raise kind(f"{what} raised {type(error).__name__}{where}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, cut short. An exception of a stranger may fail to have a text."""
    try:
        lines = str(error).strip().splitlines()
    except BaseException:
        return "it has no text"
    return lines[0][:LONGEST] if lines else ""
