# SPDX-License-Identifier: Apache-2.0
"""JSON objects from users' files. Each field is fetched on its own, and a wrong one raises a sentence about it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refmoe.errors import InputError
from refmoe.files.parsing import read_json_value
from refmoe.files.sentences import quoted, shown


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

    def flag(self, name: str) -> bool:
        """A boolean; false where the field is missing or null."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(name, value, "true or false was expected")
        return bool(value)

    def within(self, name: str) -> JsonFile:
        """The object that a field holds."""
        value = self.need(name)
        if not isinstance(value, dict):
            raise self.refuse(name, value, "an object was expected")
        return JsonFile(self.path, value, f"{self.prefix}{name}.")


LARGEST = 1 << 40
"""No dimension of a model is larger. A larger integer is a mistake, and a message with all its digits is no help."""


def read_json(path: Path) -> JsonFile:
    """Read a JSON object. Raises InputError when the file cannot be read, is not JSON, repeats a name or is no object.

    NaN and infinities are read, because Python programs write them into config.json. A field that is used refuses them.
    """
    values = read_json_value(path, "a JSON object", finite=False)
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds a JSON {JSON_TYPES[type(values)]}, but an object was expected")
    return JsonFile(path, values)


JSON_TYPES = {list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
