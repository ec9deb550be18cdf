# SPDX-License-Identifier: Apache-2.0
"""A law: a sentence about routers or kernels with its source, its needs, its examples and its check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

Example: TypeAlias = dict[str, Any]
"""The arguments of one check, by name."""
Strategy: TypeAlias = Any
"""A search strategy of Hypothesis."""
Check = Callable[..., None]
"""Called as check(subject, **example). Raises LawBroken."""


class Subject(Protocol):
    """A function under test, with what is claimed about it."""

    @property
    def declaration(self) -> Any: ...


@dataclass(frozen=True)
class Need:
    """A condition on a subject or its declaration, without which a law does not apply."""

    words: str
    met: Callable[[Any], bool]


@dataclass(frozen=True)
class Law:
    """One law, stated by `words`. Where one of `needs` is not met, it is not applicable."""

    name: str
    words: str
    source: str
    needs: tuple[Need, ...]
    examples: Callable[[Any], Strategy]
    """From a declaration to a strategy of examples."""
    check: Check
    contract: Contract = field(repr=False)
    note: Callable[[Any, int], str] | None = None
    """From a subject and a number of examples to a note, which is shown with every verdict."""

    def missing(self, subject: Subject) -> str | None:
        """The first need that is not met, in words."""
        return next((need.words for need in self.needs if not need.met(subject)), None)


@dataclass(frozen=True, eq=False)
class Contract:
    """The laws of one kind of function, by name and in the order of reports."""

    subject: str
    """The word for a function under test, such as "router"."""
    shape_law: str
    """The law that reports a malformed result. No other law judges one."""
    sketch: Callable[[Any], Any]
    """The part of a declaration that examples depend on. Subjects with equal sketches get equal examples."""
    tokens: Callable[[Example], int]
    """The number of tokens of an example, whose records and arrays are dictionaries and lists."""
    number: int = 200
    """The number of examples of a law, where no other is asked for."""
    laws: dict[str, Law] = field(default_factory=dict)

    def law(
        self, name: str, words: str, source: str, examples: Callable[[Any], Strategy], *needs: Need,
        note: Callable[[Any, int], str] | None = None,
    ) -> Callable[[Check], Law]:  # fmt: skip
        """Decorates a check, which becomes a registered law."""

        def register(check: Check) -> Law:
            self.laws[name] = Law(
                name=name, words=words, source=source, needs=needs, examples=examples, check=check, contract=self,
                note=note,
            )  # fmt: skip
            return self.laws[name]

        return register
