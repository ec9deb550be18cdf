# SPDX-License-Identifier: Apache-2.0
"""The answers of servers in one form: generated tokens, and rows of log-probabilities.

No field of an answer is taken on trust. A field of another type, an id outside the vocabulary, a positive
log-probability or a list that names an entry twice makes it a broken answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from refmoe.engines.process import BROKEN
from refmoe.engines.server.asking import ServerFault
from refmoe.files.sentences import shown

WORD = re.compile(r"<(\d{1,9})>")
"""A token as text, in the vocabulary that refmoe writes: ``<77>`` is the token 77, and blanks mean nothing."""
SLACK = 1e-3
"""A log-probability may exceed 0 by this much: the largest error of a softmax in float16."""


@dataclass(frozen=True)
class Row:
    """The distribution after some tokens: some entries of the vocabulary, or all, the largest first."""

    ids: tuple[int, ...]
    values: tuple[float, ...]

    def first(self, count: int) -> Row:
        """The row with its largest entries only."""
        return Row(self.ids[:count], self.values[:count])


@dataclass(frozen=True)
class Reply:
    """The answer to one prompt."""

    tokens: tuple[int, ...]
    """The generated tokens, as the reply's ids or its text say."""
    rows: Mapping[int, Row] = field(default_factory=dict)
    """The distributions that tokens were generated from, by the number of tokens generated before."""
    prompt_rows: Mapping[int, Row] = field(default_factory=dict)
    """The distributions after tokens of the prompt, by the index of the token, as the API defines them."""
    reported: Mapping[int, int] = field(default_factory=dict)
    """The tokens that stand beside log-probabilities, by the number of tokens generated before."""
    finish: str = ""
    """Why the reply ended, in the server's word."""


def broken(reason: str) -> ServerFault:
    """The fault of an answer that breaks its own API.   reason: one sentence"""
    return ServerFault(BROKEN, reason)


def spelled(tokens: Iterable[int]) -> str:
    """Tokens as a text, in the vocabulary that refmoe writes."""
    return "".join(f"<{token}>" for token in tokens)


def read_text(text: str, vocab: int) -> tuple[int, ...]:
    """The tokens of a text. Raises ServerFault for a text that is not made of tokens."""
    rest = WORD.sub("", text).strip()
    if rest:
        raise broken(
            f"the text {shown(text)} is not made of tokens such as <77>; was its checkpoint written by refmoe?"
        )
    return tuple(_id(int(found), vocab) for found in WORD.findall(text))


def read_ids(value: Any, vocab: int, name: str) -> tuple[int, ...]:
    """A list of token ids. Raises ServerFault."""
    if not isinstance(value, list):
        raise broken(f"'{name}' is {shown(value)}, but a list of token ids was expected")
    return tuple(_id(each, vocab) for each in value)


def key_id(key: str, vocab: int) -> int:
    """The token of a key, as ``77``, ``token_id:77`` or ``<77>``. Raises ServerFault."""
    text = key.strip().removeprefix("token_id:")
    found = WORD.fullmatch(text)
    text = found[1] if found else text
    if not re.fullmatch(r"\d{1,9}", text):
        raise broken(f"the entry {shown(key)} names no token, such as token_id:77 or <77>")
    return _id(int(text), vocab)


def _id(value: Any, vocab: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab:
        raise broken(f"{shown(value)} is no token id, but an integer from 0 to {vocab - 1} was expected")
    return value


def number(value: Any) -> float:
    """A log-probability; null is that of an impossible token. Raises ServerFault."""
    if value is None:
        return -math.inf
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise broken(f"{shown(value)} is no log-probability, but a number was expected")
    return float(value)


def row(pairs: Iterable[tuple[int, float]]) -> Row:
    """The row of some entries. Raises ServerFault for one that cannot be a distribution."""
    ordered = sorted(pairs, key=lambda pair: -pair[1] if pair[1] == pair[1] else math.inf)
    ids = tuple(token for token, _ in ordered)
    values = tuple(value for _, value in ordered)
    if not ids:
        raise broken("a list of log-probabilities is empty, but at least one entry was expected")
    if len(set(ids)) < len(ids):
        twice = next(token for token in ids if ids.count(token) > 1)
        raise broken(f"a list of log-probabilities has the token {twice} twice, but each token once was expected")
    if any(value > SLACK for value in values):
        raise broken(f"a log-probability is {max(values):g}, but one of at most 0 was expected")
    return Row(ids, values)


def rows_of_objects(value: Any, vocab: int, name: str) -> list[Row | None]:
    """Rows that are objects from tokens to numbers, or to objects with a `logprob`; null is no row.

    Raises ServerFault.
    """
    if not isinstance(value, list):
        raise broken(f"'{name}' is {shown(value)}, but a list was expected")
    return [None if each is None else _row_of_object(each, vocab, name) for each in value]


def _row_of_object(value: Any, vocab: int, name: str) -> Row:
    if not isinstance(value, dict):
        raise broken(f"'{name}' has {shown(value)}, but an object of log-probabilities was expected")
    numbers = ((key, each.get("logprob") if isinstance(each, dict) else each) for key, each in value.items())
    return row((key_id(key, vocab), number(each)) for key, each in numbers)


def rows_of_lists(value: Any, vocab: int, name: str) -> tuple[list[Row | None], list[int]]:
    """Rows that are objects with `id` and `top_logprobs`, and the ids. Raises ServerFault."""
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise broken(f"'{name}' is {shown(value)}, but a list of objects was expected")
    rows = [_row_of_list(each.get("top_logprobs"), vocab, name) for each in value]
    return rows, [_id(each.get("id"), vocab) for each in value]


def _row_of_list(value: Any, vocab: int, name: str) -> Row | None:
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise broken(f"'{name}' has {shown(value)}, but a list of log-probabilities was expected")
    return row((_id(each.get("id"), vocab), number(each.get("logprob"))) for each in value)


def there(rows: Sequence[Row | None]) -> dict[int, Row]:
    """The rows that are there, by their place."""
    return {place: each for place, each in enumerate(rows) if each is not None}


def member(value: Any, name: str, kind: type | tuple[type, ...], expected: str) -> Any:
    """A field of an object. Raises ServerFault.   expected: the kind in words"""
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind):
        raise broken(f"'{name}' is {shown(found)}, but {expected} was expected")
    return found
