# SPDX-License-Identifier: Apache-2.0
"""Running a law on a router: its examples, the first example that breaks it, and the smallest one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from hypothesis.errors import Flaky

from refmoe.routers.contract.broken import LawBroken, Malformed
from refmoe.routers.contract.drawing import examples_of, sketch, visit_examples
from refmoe.routers.contract.examples import Example
from refmoe.routers.contract.law import Law
from refmoe.routers.contract.laws import LAWS
from refmoe.routers.contract.subject import Subject

Outcome = Literal["pass", "fail", "not applicable", "not judged"]
EXAMPLES = 200
SHAPE_LAW = "distinct-ids"


@dataclass(frozen=True)
class Verdict:
    """The result of one law on one router."""

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


def first_broken(law: Law, subject: Subject, count: int = EXAMPLES) -> tuple[int, LawBroken] | None:
    """The number (from 1) of the first example that breaks the law, with the exception; None where no example does."""
    for number, example in enumerate(examples_of(law, subject.declaration, count), 1):
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
        visit_examples(search, law.examples(sketch(subject.declaration)), count, shrink=True)
    except (LawBroken, Flaky):
        return found[-1]
    return None


def hidden_by_shape(law: Law, error: LawBroken, subject: Subject, count: int) -> bool:
    """Whether a law fails only because the router returns no proper ids, which the law `SHAPE_LAW` reports."""
    if not isinstance(error, Malformed) or law.name == SHAPE_LAW:
        return False
    return first_broken(LAWS[SHAPE_LAW], subject, count) is not None


def judge(law: Law, subject: Subject, count: int = EXAMPLES) -> Verdict:
    """Check one law."""
    missing = law.missing(subject)
    if missing is not None:
        return Verdict(law, "not applicable", f"needs {missing}")
    broken = first_broken(law, subject, count)
    note = law.note(subject, count) if law.note else ""
    if broken is None:
        return Verdict(law, "pass", note, len(examples_of(law, subject.declaration, count)))
    number, error = broken
    if hidden_by_shape(law, error, subject, count):
        return Verdict(law, "not judged", f"{error.words} (law {SHAPE_LAW})", number)
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


def judge_all(subject: Subject, count: int = EXAMPLES, only: Iterable[str] = ()) -> list[Verdict]:
    """Check every law, or those named."""
    names = list(only) or list(LAWS)
    return [judge(LAWS[name], subject, count) for name in names]


def printable(example: Example) -> dict[str, Any]:
    """An example as lists and numbers."""
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in example.items()}
