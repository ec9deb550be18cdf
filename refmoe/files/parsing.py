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
from refmoe.files.reading import decoded, read_bytes, read_text
from refmoe.files.sentences import one_line, quoted

LARGEST_INTEGER = 1 << 64
"""No integer of a file is as large. Beyond it, arithmetic with floats would raise."""
DEEPEST = 40
"""The most levels of arrays and tables in a file."""
SCALARS = (str, int, float, bool)


def strict_json(text: str | bytes) -> Any:
    """Parse JSON in which no object repeats a name. Raises ValueError for any fault, with a sentence.

    An integer of very many digits is cut to its first 40, so that a check of its size still refuses it.
    NaN and infinities are read, because Python programs write them.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {one_line(error)}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None


def read_json_value(path: Path, expected: str, finite: bool = True) -> Any:
    """The value in a JSON file, in which no object repeats a name and no integer has more than 64 bits.

    expected: the kind of file, as "a JSON object"   finite: whether to refuse NaN and infinities
    Raises InputError for any other content, and when the file cannot be read.
    """
    return json_value(path, read_text(path, expected), expected, finite)


def json_value(path: Path, text: str, expected: str, finite: bool = True) -> Any:
    """The value in the text of a JSON file, as `read_json_value` gives it."""
    try:
        value = strict_json(text)
    except ValueError as error:
        raise InputError(f"{path}: {error}, but {expected} was expected") from None
    _refuse_faults(path, value, finite)
    return value


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
        raise InputError(f"{path}: not valid TOML: {one_line(error)}, but {expected} was expected") from None
    _refuse_faults(path, values, finite=True)
    return values


def _refuse_faults(path: Path, values: Any, finite: bool) -> None:
    for name, value, depth in _all_within("", values, 0):
        found = _fault(value, depth, finite)
        if found:
            raise InputError(f"{path}: {quoted(name)} {found}")


def _all_within(name: str, value: Any, depth: int) -> Iterator[tuple[str, Any, int]]:
    """A value and all values in it, each with its name and its level."""
    yield name, value, depth
    if depth <= DEEPEST:
        pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in pairs:
            within = f"{name}[{key}]" if isinstance(value, list) else f"{name}.{key}" if name else str(key)
            yield from _all_within(within, inner, depth + 1)


def _fault(value: Any, depth: int, finite: bool) -> str:
    """The fault of one value in words, or nothing."""
    if depth >= DEEPEST and isinstance(value, list | dict):
        return f"is nested too deeply, but at most {DEEPEST} levels were expected"
    if not isinstance(value, (*SCALARS, list, dict, type(None))):
        return f"is a {type(value).__name__}, but a string, a number, a boolean, an array or a table was expected"
    if isinstance(value, int) and abs(value) >= LARGEST_INTEGER:
        return "is an integer of more than 64 bits, but a smaller one was expected"
    if finite and isinstance(value, float) and not math.isfinite(value):
        return f"is {value}, but a finite number was expected"
    return ""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{quoted(repeated)} is there more than once")
    return values


def _integer(digits: str) -> int:
    return int(digits[:40])
