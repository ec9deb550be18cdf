# SPDX-License-Identifier: Apache-2.0
"""The exceptions of checks. `checking` turns them into verdicts, so none leaves this package."""

from __future__ import annotations


class LawBroken(Exception):
    """The router breaks the law. words: the found and the expected result; token: where."""

    def __init__(self, words: str, token: int | None = None) -> None:
        super().__init__(words)
        self.words = words
        self.token = None if token is None else int(token)


class RouterRaised(LawBroken):
    """The router raised an exception that it did not declare."""

    def __init__(self, error: BaseException, tokens: int) -> None:
        lines = str(error).strip().splitlines()
        super().__init__(f"the router raised {type(error).__name__} on {tokens} tokens: {lines[0] if lines else ''}")


class Malformed(LawBroken):
    """The result is not ids [T, k] with weights [T, k]. The law of the ids fails, and no other law can be judged."""
