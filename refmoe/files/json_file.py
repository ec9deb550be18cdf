# SPDX-License-Identifier: Apache-2.0
"""JSON objects from users' files. Each field is fetched on its own, and a wrong one raises a sentence about it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refmoe.errors import InputError
from refmoe.files.safetensors_file import one_line, quoted


@dataclass(frozen=True)
class JsonFile:
    """A JSON object of a file. Each method fetches one field, and raises InputError if it is not as expected."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    prefix: str = ""
    """The path of this object within the file, with a final dot. Messages put it before the names of fields."""

    def need(self, name: str) -> Any:
        """The value of a field, which must not be null."""
        if self.values.get(name) is None:
            what = "is null" if name in self.values else "is missing"
            raise InputError(f"{self.path}: {quoted(self.prefix + name)} {what}, but a value was expected")
        return self.values[name]

    def refuse(self, name: str, found: Any, expected: str) -> InputError:
        """The error for a field with the wrong value.   expected: ends the sentence, as "an integer was expected"."""
        return InputError(f"{self.path}: {quoted(self.prefix + name)} is {shown(found)}, but {expected}")

    def integer(self, name: str) -> int:
        """An integer of at most `LARGEST`. The configuration checks whether it makes sense."""
        value = self.need(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(name, value, "an integer was expected")
        if abs(value) > LARGEST:
            raise self.refuse(name, value, f"at most {LARGEST} was expected")
        return value

    def number(self, name: str) -> float:
        """A finite number, integer or not."""
        value = self.need(name)
        # compared rather than converted: an integer may be too large for a float
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
            raise self.refuse(name, value, "a finite number was expected")
        try:
            return float(value)
        except OverflowError:
            raise self.refuse(name, value, "a number that a float can hold was expected") from None

    def within(self, name: str) -> JsonFile:
        """The object that a field holds."""
        value = self.need(name)
        if not isinstance(value, dict):
            raise self.refuse(name, value, "an object was expected")
        return JsonFile(self.path, value, f"{self.prefix}{name}.")


LARGEST = 1 << 40
"""No dimension of a model is larger. A larger integer is a mistake, and a message with all its digits is no help."""


def shown(value: Any) -> str:
    """A JSON value as one line of text, cut short if it is long."""
    try:
        text = json.dumps(value)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def read_json(path: Path) -> JsonFile:
    """Read a JSON object. Raises InputError when the file is missing, is not JSON, repeats a name or is no object."""
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            repeated.append(next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i])))
        return values

    try:
        values = json.loads(path.read_bytes(), object_pairs_hook=unique)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, but a JSON object was expected") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply, but an object of a few levels was expected") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds a JSON {JSON_TYPES[type(values)]}, but an object was expected")
    if repeated:
        raise InputError(f"{path}: {quoted(repeated[0])} is there more than once, but one value was expected")
    return JsonFile(path, values)


JSON_TYPES = {list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
