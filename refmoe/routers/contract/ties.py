# SPDX-License-Identifier: Apache-2.0
"""The tie rule that a router seems to follow."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from refmoe.contracts.broken import LawBroken
from refmoe.contracts.drawing import examples_of
from refmoe.contracts.formats import Floats, Ints
from refmoe.routers.contract.declaration import Declaration
from refmoe.routers.contract.law import LAWS
from refmoe.routers.contract.subject import Subject


@dataclass(frozen=True)
class SeemingRule:
    """The behaviour of one router on ties: which experts it chooses (`selection`) and which come first (`order`)."""

    selection: str
    order: str
    decided: Counter[str]
    """The number of tokens that chose the lower ids, the higher ids, or others, where a tie decides the set."""
    example: tuple[list[float], list[int]] | None
    """Logits and ids of a token that chose other ids, or else decided against the majority."""


def expected_ids(logits: Floats, k: int, rule: str) -> Ints:
    """The ids [T, k] of the k largest logits of each row; of equal logits the lower (higher) id comes first."""
    if rule == "lower":
        return np.asarray(np.argsort(-logits, axis=1, kind="stable")[:, :k])
    experts = logits.shape[1]
    return np.asarray(experts - 1 - np.argsort(-logits[:, ::-1], axis=1, kind="stable")[:, :k])


def seeming_rule(subject: Subject, count: int) -> SeemingRule:
    """The rule that the router seems to follow on the examples of the law `tie-rule`."""
    k = subject.declaration.top_k
    sets: Counter[str] = Counter()
    orders: Counter[str] = Counter()
    seen: dict[str, tuple[list[float], list[int]]] = {}
    for example in examples_of(LAWS["tie-rule"], subject.declaration, count):
        try:
            routing = subject.route(example["logits"])
        except LawBroken:
            continue
        low, high = (expected_ids(routing.logits, k, rule) for rule in ("lower", "higher"))
        for row, found, lower, higher in zip(routing.logits, routing.ids, low, high, strict=True):
            chosen, by_lower, by_higher = (set(ids.tolist()) for ids in (found, lower, higher))
            if by_lower != by_higher:
                rule = "lower" if chosen == by_lower else "higher" if chosen == by_higher else "other"
                sets[rule] += 1
                seen.setdefault(rule, (row.tolist(), found.tolist()))
            equal = [(a, b) for a, b in pairwise(found.tolist()) if row[a] == row[b]]
            orders.update("lower" if a < b else "higher" for a, b in equal)
    verdict = only(sets)
    odd = seen.get("other") or (seen[min(sets, key=lambda rule: sets[rule])] if len(sets) > 1 else None)
    return SeemingRule(verdict, only(orders), sets, odd)


def only(counted: Counter[str]) -> str:
    """The only rule that was counted, or "unknown" or "inconsistent"."""
    if not counted:
        return "unknown"
    return next(iter(counted)) if len(counted) == 1 and "other" not in counted else "inconsistent"


def describe(rule: SeemingRule, d: Declaration) -> str:
    """The rule in a sentence."""
    names = {"lower": "the lower id", "higher": "the higher id", "unknown": "no tie decided anything"}
    words = f"of equal logits it seems to choose {names.get(rule.selection, 'now the lower, now the higher id')}"
    if rule.selection == "inconsistent":
        parts = (f"{rule.decided[name]} {name}" for name in ("lower", "higher", "other") if rule.decided[name])
        words += f" ({', '.join(parts)} of {sum(rule.decided.values())} ties)"
        if rule.example:
            words += f", such as {rule.example[1]} of {[short(x) for x in rule.example[0]]}"
    if d.descending and rule.order not in (rule.selection, "unknown"):
        words += "; among the chosen " + (
            "it puts no id first in a fixed way" if rule.order == "inconsistent" else f"{names[rule.order]} comes first"
        )
    return f"ties declared '{d.ties}': {words}"


def short(number: float) -> float | int:
    """A number, as int where it is an integer."""
    return int(number) if number == int(number) else number
