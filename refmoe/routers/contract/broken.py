"""What a check raises. None of them leaves this package: `checking` turns them into verdicts."""

from __future__ import annotations


class LawBroken(Exception):
    """The router breaks the law: what was found and expected, in words, and at which token."""

    def __init__(self, words: str, token: int | None = None) -> None:
        super().__init__(words)
        self.words = words
        self.token = None if token is None else int(token)


class RouterRaised(LawBroken):
    """The router raised where no exception was declared."""

    def __init__(self, error: BaseException, tokens: int) -> None:
        lines = str(error).strip().splitlines()
        super().__init__(f"the router raised {type(error).__name__} on {tokens} tokens: {lines[0] if lines else ''}")


class Malformed(LawBroken):
    """The result is no ids [T, k] with weights [T, k]: the law of the ids fails, and no other can be judged."""
