# SPDX-License-Identifier: Apache-2.0
"""Declarations are records; a field that is a Literal allows only the values that it lists."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal, get_args, get_type_hints

from refmoe.errors import InputError

Dtype = Literal["float64", "float32", "float16", "bfloat16"]
Framework = Literal["numpy", "torch", "jax", "cupy"]


def check_choices(declaration: Any) -> None:
    """Raises InputError for a field of a dataclass whose value is none of those that its Literal lists."""
    hints = get_type_hints(type(declaration))
    for field in fields(declaration):
        value, allowed = getattr(declaration, field.name), choices(hints[field.name])
        if allowed and value not in allowed:
            wanted = ", ".join(str(choice) for choice in allowed if choice is not None)
            raise InputError(f"declaration: {field.name} is {value!r}, one of {wanted} was expected")


def check_least(declaration: Any, **least: int) -> None:
    """Raises InputError for a field that is a number below the given one."""
    for name, number in least.items():
        value = getattr(declaration, name)
        if value is not None and value < number:
            raise InputError(f"declaration: {name} is {value}, at least {number} was expected")


def choices(hint: Any) -> tuple[Any, ...]:
    """The values that a Literal allows, with None where it is optional; no values for another type."""
    found: list[Any] = []
    for part in get_args(hint) or ():
        if get_args(part):
            found += get_args(part)
        elif isinstance(part, str) or (part is type(None) and found):
            found.append(None if part is type(None) else part)
    return tuple(found) if all(isinstance(item, str | None) for item in found) else ()
