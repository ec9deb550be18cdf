# SPDX-License-Identifier: Apache-2.0
"""Parse JSON and TOML of a stranger. Every fault is a ValueError with a sentence, however the parser reports it."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refmoe.errors import InputError
from refmoe.files.reading import decoded, read_bytes
from refmoe.files.sentences import one_line, quoted

LARGEST_INTEGER = 1 << 64
"""No integer of a file is as large. Beyond it, arithmetic with floats would raise."""
DEEPEST = 40
"""The most levels of arrays and tables in a file."""
SCALARS = (str, int, float, bool)


def strict_json(text: str | bytes, finite: bool = True) -> Any:
    """Parse JSON in which no object repeats a name. Raises ValueError for any fault.

    finite: whether NaN and infinities are faults. Python's own json writes them, though JSON has none.
    """

    def constant(name: str) -> float:
        if finite:
            raise ValueError(f"it holds {name}, but finite numbers were expected")
        return float(name)

    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_int=_integer, parse_float=_finite if finite else float,
            parse_constant=constant,
        )  # fmt: skip
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def toml(path: Path, expected: str, content: bytes | None = None) -> dict[str, Any]:
    """The tables of a TOML file: strings, booleans, finite numbers, arrays and tables, of at most `DEEPEST` levels.

    expected: the kind of file, as "a policy in TOML".   content: the bytes of the file, if they are read already
    Raises InputError for any other content, and when the file cannot be read.
    """
    text = decoded(path, read_bytes(path, expected) if content is None else content, expected)
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply, but {expected} of a few levels was expected") from None
    except ValueError as error:  # of tomllib, and of int() for thousands of digits
        raise InputError(f"{path}: not valid TOML: {one_line(error)}") from None
    for name, value, depth in _all_within("", values, 0):
        found = _fault(value, depth)
        if found:
            raise InputError(f"{path}: {quoted(name)} {found}")
    return values


def _all_within(name: str, value: Any, depth: int) -> Iterator[tuple[str, Any, int]]:
    """A value and all values in it, each with its name and its level."""
    yield name, value, depth
    if depth <= DEEPEST:
        pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in pairs:
            within = f"{name}[{key}]" if isinstance(value, list) else f"{name}.{key}" if name else str(key)
            yield from _all_within(within, inner, depth + 1)


def _fault(value: Any, depth: int) -> str:
    """The fault of one value in words, or nothing."""
    if depth > DEEPEST:
        return f"is nested too deeply, but at most {DEEPEST} levels were expected"
    if not isinstance(value, (*SCALARS, list, dict)):
        return f"is a {type(value).__name__}, but a string, a number, a boolean, an array or a table was expected"
    if isinstance(value, int) and abs(value) >= LARGEST_INTEGER:
        return "is an integer of more than 64 bits, but a smaller one was expected"
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {value}, but a finite number was expected"
    return ""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{quoted(repeated)} is there more than once, but one value was expected")
    return values


def _integer(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) >= LARGEST_INTEGER:
        raise ValueError(f"it holds an integer of {len(digits)} digits, but one of at most 64 bits was expected")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("it holds a number beyond the range of float64, but finite numbers were expected")
    return value
