# SPDX-License-Identifier: Apache-2.0
"""The formats of codes, by name: refmoe's own in `inputs.toml`, and those of a policy of a user."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from refmoe.arithmetic.codes import CODES, KINDS, MAXIMA, ROUNDINGS, TOWARD_ZERO, InputFormat
from refmoe.arithmetic.formats import FORMATS, Format
from refmoe.errors import InputError
from refmoe.files.parsing import toml
from refmoe.files.reading import own_text
from refmoe.files.sentences import shown
from refmoe.profiles.cut_points import PROJECTIONS, TENSOR_FORMATS

MATRICES = (
    "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "MXFP4", "int8-channel", "int8-tensor",
    "fp8-channel", "fp8-tensor", "fp8-block128x128", *TENSOR_FORMATS.values(),
)  # fmt: skip
"""The formats of a matrix for which a policy may name a format of the input: those that `refmoe info` prints."""


def is_matrix(name: str) -> bool:
    """Whether a policy may name a format of the input for this: a format, or a product and a format.

    name: such as ``int8-channel``, or ``expert.gate.int8-channel``
    """
    step, _, matrix = name.rpartition(".")
    return matrix in MATRICES and (not step or step in PROJECTIONS)


TEXTS = ("about", "source")
CHOICES = {
    "kind": (*KINDS,), "maximum": MAXIMA, "codes": CODES, "rounding": ROUNDINGS, "scale": (*FORMATS,),
    "sums": (*FORMATS,),
}  # fmt: skip
NUMBERS = {"block": 1 << 20, "contest": 64, "run": 1 << 20, "roundings": 64}
"""The fields that are integers from 0, each with the largest value."""
MOST = "most"
"""The field that is a number of halves, at least 1 and at most one more than the largest code."""
OPTIONAL = {"sums": None}

Refuse = Callable[[str, Any, str], InputError]


@cache
def own_tables() -> dict[str, Any]:
    """The tables of `inputs.toml`."""
    return toml(Path("inputs.toml"), "a file of formats", own_text("refmoe.profiles", "inputs.toml").encode())


@cache
def input_formats() -> dict[str, InputFormat]:
    """Refmoe's own formats, in the order of `inputs.toml`."""
    tables = own_tables()

    def refuse(field: str, found: Any, expected: str) -> InputError:
        return InputError(f"inputs.toml: {field} is {shown(found)}, but {expected} was expected")

    return {name: build(name, tables[name], tables, refuse) for name in tables}


def build(name: str, table: Any, tables: Mapping[str, Any], refuse: Refuse) -> InputFormat:
    """The format of a table.   tables: the bases that it may have   refuse: makes the error for a field

    Raises InputError for a field that is not known, missing, or has another value than it can have.
    """
    values, seen = dict(table), {name}
    while "base" in values:
        base = values.pop("base")
        if not isinstance(base, str) or base not in tables or base in seen:
            raise refuse("base", base, f"one of {', '.join(each for each in tables if each not in seen)}")
        seen.add(base)
        values = {**{key: value for key, value in tables[base].items() if key not in TEXTS}, **values}
    known = (*TEXTS, *CHOICES, *NUMBERS, MOST)
    for field in values.keys() - {*known}:
        raise refuse(field, values[field], f"no such field, but one of {', '.join(known)}")
    made: dict[str, Any] = {**OPTIONAL, "name": name}
    for field in (each for each in known if each in values or each not in OPTIONAL):
        made[field] = _value(field, values.get(field), refuse)
    largest = KINDS[made["kind"]].high
    if not largest / 2 <= made[MOST] <= largest + 1:
        raise refuse(
            MOST, made[MOST], f"a number from {largest / 2:g} to {largest + 1:g}, for codes of {made['kind']},"
        )
    if made["rounding"] == TOWARD_ZERO and made["contest"]:
        raise refuse("contest", made["contest"], f"0, as nothing is decided halfway with rounding {TOWARD_ZERO},")
    return InputFormat(**made)


def _value(field: str, found: Any, refuse: Refuse) -> Any:
    if field in TEXTS:
        if not isinstance(found, str):
            raise refuse(field, found, "a text of its own")
        return " ".join(found.split())
    if field in NUMBERS:
        if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found <= NUMBERS[field]:
            raise refuse(field, found, f"an integer from 0 to {NUMBERS[field]}")
        if field == "block" and found & (found - 1):
            raise refuse(field, found, "a power of two, or 0 for the whole row,")
        return found
    if field == MOST:
        if not isinstance(found, int | float) or isinstance(found, bool) or not (2.0 * found).is_integer():
            raise refuse(field, found, "a number of whole halves")
        return float(found)
    if found not in CHOICES[field]:
        raise refuse(field, found, f"one of {', '.join(CHOICES[field])}")
    return FORMATS[found] if field in ("scale", "sums") else found


def input_format(found: Any, refuse: Callable[[str], InputError]) -> InputFormat | Format:
    """The format of a name: of `input_formats`, or of a dtype, whose values a product then reads."""
    formats = input_formats()
    if isinstance(found, str) and (found in formats or found in FORMATS):
        return formats[found] if found in formats else FORMATS[found]
    raise refuse(f"one of {', '.join((*formats, *FORMATS))}")
