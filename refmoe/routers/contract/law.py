# SPDX-License-Identifier: Apache-2.0
"""A law: a sentence about routers with its source, its needs, its examples and its check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from refmoe.routers.contract.declaration import Declaration
from refmoe.routers.contract.subject import Subject

Check = Callable[..., None]
"""Called as check(subject, **example). Raises LawBroken."""


@dataclass(frozen=True)
class Need:
    """A condition on a router or its declaration, without which a law does not apply."""

    words: str
    met: Callable[[Subject], bool]


@dataclass(frozen=True)
class Law:
    """One law, stated by `words`. Where one of `needs` is not met, it is not applicable."""

    name: str
    words: str
    source: str
    needs: tuple[Need, ...]
    examples: Callable[[Declaration], Any]
    check: Check
    note: Callable[[Subject, int], str] | None = None
    """From a router and a number of examples to a note, which is shown with every verdict."""

    def missing(self, subject: Subject) -> str | None:
        """The first need that is not met, in words."""
        return next((need.words for need in self.needs if not need.met(subject)), None)


LAWS: dict[str, Law] = {}
"""All laws by name, in the order of `laws.py`."""


def law(
    name: str, words: str, source: str, examples: Callable[[Declaration], Any], *needs: Need,
    note: Callable[[Subject, int], str] | None = None,
) -> Callable[[Check], Law]:  # fmt: skip
    """Decorates a check, which becomes a registered law."""

    def register(check: Check) -> Law:
        LAWS[name] = Law(name=name, words=words, source=source, needs=needs, examples=examples, check=check, note=note)
        return LAWS[name]

    return register


NORMALISED = Need("weights declared normalised", lambda s: s.declaration.normalised)
KNOWN_SCORING = Need("a known scoring: softmax or sigmoid", lambda s: s.declaration.scoring != "other")
LOGITS = Need("a router that is given logits, not hidden states", lambda s: s.declaration.gate is None)
NO_BIAS = Need("a selection without bias", lambda s: s.declaration.bias is None)
NO_CAPACITY = Need("no capacity: with one, tokens compete", lambda s: s.declaration.capacity is None)
CAPACITY = Need("a declared capacity", lambda s: s.declaration.capacity is not None)
ANY_K = Need("the same router for k = E (with_top_k; --factory)", lambda s: s.with_top_k is not None)
SEVERAL = Need("k < E: else there is nothing to choose", lambda s: s.declaration.top_k < s.declaration.experts)
