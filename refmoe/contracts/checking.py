# SPDX-License-Identifier: Apache-2.0
"""Running a law on a subject: its examples, the first example that breaks it, and the smallest one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, Literal

import numpy as np
from hypothesis.errors import Flaky

from refmoe.contracts.broken import LawBroken, Malformed
from refmoe.contracts.drawing import examples_of, visit_examples
from refmoe.contracts.law import Example, Law, Subject

Outcome = Literal["pass", "fail", "not applicable", "not judged"]


@dataclass(frozen=True)
class Verdict:
    """The result of one law on one subject."""

    law: Law
    outcome: Outcome
    words: str
    """The finding of a law that fails, the reason for no verdict, or the note of a law that passes."""
    examples: int = 0
    """How many examples were tried."""
    example: Example | None = None
    """The smallest example that breaks the law."""
    token: int | None = None


def check(law: Law, subject: Subject, example: Example) -> None:
    """Try one example. Infinite and undefined bounds may occur; they mean that a value has no bound."""
    with np.errstate(all="ignore"):
        law.check(subject, **example)


def first_broken(law: Law, subject: Subject, count: int | None = None) -> tuple[int, LawBroken] | None:
    """The number (from 1) of the first example that breaks the law, with the exception; None where no example does."""
    for number, example in enumerate(examples_of(law, subject.declaration, count or law.contract.number), 1):
        try:
            check(law, subject, example)
        except LawBroken as broken:
            return number, broken
    return None


def smallest(law: Law, subject: Subject, count: int) -> tuple[Example, LawBroken] | None:
    """The smallest example that breaks the law, as Hypothesis shrinks it."""
    found: list[tuple[Example, LawBroken]] = []

    def search(example: Example) -> None:
        try:
            check(law, subject, example)
        except LawBroken as broken:
            found.append((example, broken))
            raise

    try:
        visit_examples(search, law.examples(law.contract.sketch(subject.declaration)), count, shrink=True)
    except (LawBroken, Flaky):
        return found[-1]
    return None


def hidden_by_shape(law: Law, error: LawBroken, subject: Subject, count: int) -> bool:
    """Whether a law fails only because the result is malformed, which the shape law of the contract reports."""
    contract = law.contract
    if not isinstance(error, Malformed) or law.name == contract.shape_law:
        return False
    return first_broken(contract.laws[contract.shape_law], subject, count) is not None


def judge(law: Law, subject: Subject, number: int | None = None) -> Verdict:
    """Check one law.   number: of examples; the contract's own if not given"""
    count = number or law.contract.number
    missing = law.missing(subject)
    if missing is not None:
        return Verdict(law, "not applicable", f"needs {missing}")
    broken = first_broken(law, subject, count)
    note = law.note(subject, count) if law.note else ""
    if broken is None:
        return Verdict(law, "pass", note, len(examples_of(law, subject.declaration, count)))
    number, error = broken
    if hidden_by_shape(law, error, subject, count):
        return Verdict(law, "not judged", f"{error.words} (law {law.contract.shape_law})", number)
    example = examples_of(law, subject.declaration, count)[number - 1]
    found = smallest(law, subject, count)
    if found is not None:
        example, error = found
    return Verdict(
        law=law,
        outcome="fail",
        words=f"{error.words}; {note}" if note else error.words,
        examples=number,
        example=example,
        token=error.token,
    )


def printable(example: Example) -> dict[str, Any]:
    """An example as lists and numbers."""
    return {name: plain(value) for name, value in example.items()}


def plain(value: Any) -> Any:
    """An array as lists, a record as a dictionary, and any other value as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
