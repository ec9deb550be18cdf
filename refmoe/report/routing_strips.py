# SPDX-License-Identifier: Apache-2.0
"""Routing decisions as strips of characters, one per token. They can be read without colour and script."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from refmoe.report.summary import deviates
from refmoe.report.wording import visible
from refmoe.verifier.findings import CONTESTABLE, FORCED, TIE, Decision, Report

DRAWN = 20_000
"""The most tokens that a page draws, layers with illegal decisions first. The other layers show only counts."""

MARKS = {
    "illegal": ("✕", "illegal"), "deviating": ("≠", "legal, but not the exact choice"),
    FORCED: ("·", "forced"), TIE: ("=", "tie"), CONTESTABLE: ("~", "contestable"),
    "absent": ("?", "not in the trace"), "gap": ("_", "no decision shown"),
}  # fmt: skip
"""Per state of a token: its character and its words in the legend."""

TENS = 10


@dataclass(frozen=True)
class Stretch:
    """Neighbouring tokens in the same state."""

    state: str
    text: str


@dataclass(frozen=True)
class Strip:
    """The decisions of one layer in one run."""

    layer: int
    counts: dict[str, int]
    stretches: tuple[Stretch, ...]
    """Empty if the strip is not drawn."""
    illegal: int


@dataclass(frozen=True)
class RunStrips:
    """The decisions of one run, layer by layer."""

    run: str
    strips: tuple[Strip, ...]
    tokens: int
    illegal: int
    left_out: int
    """The number of strips that are not drawn."""


def routing_strips(report: Report) -> list[RunStrips]:
    """All decisions, by run and layer."""
    groups: dict[str, dict[int, list[Decision]]] = {}
    for decision in report.decisions:
        groups.setdefault(decision.run, {}).setdefault(decision.layer, []).append(decision)
    drawn = _drawn(groups)
    result = []
    for run, layers in groups.items():
        strips = tuple(_strip(layer, made, (run, layer) in drawn) for layer, made in sorted(layers.items()))
        tokens = max(decision.token for made in layers.values() for decision in made) + 1
        illegal = sum(strip.illegal for strip in strips)
        left_out = sum(not strip.stretches for strip in strips)
        result.append(RunStrips(run=visible(run), strips=strips, tokens=tokens, illegal=illegal, left_out=left_out))
    return result


def state(decision: Decision) -> str:
    """The state of a decision, a key of `MARKS`."""
    if not decision.legal:
        return "illegal"
    if not decision.found:
        return "absent"
    return "deviating" if deviates(decision) else decision.kind


def _drawn(groups: dict[str, dict[int, list[Decision]]]) -> set[tuple[str, int]]:
    every = [(run, layer, made) for run, layers in groups.items() for layer, made in sorted(layers.items())]
    every.sort(key=lambda entry: all(decision.legal for decision in entry[2]))
    left, drawn = DRAWN, set()
    for run, layer, made in every:
        tokens = max(decision.token for decision in made) + 1
        if tokens <= left:
            left -= tokens
            drawn.add((run, layer))
    return drawn


def _strip(layer: int, made: list[Decision], draw: bool) -> Strip:
    counts = {kind: sum(decision.kind == kind for decision in made) for kind in (FORCED, TIE, CONTESTABLE)}
    illegal = sum(not decision.legal for decision in made)
    return Strip(layer, counts, _stretches(made) if draw else (), illegal)


def _stretches(made: list[Decision]) -> tuple[Stretch, ...]:
    """Stretches of equal states. A space follows every ten tokens, so that lines break there and a reader can count."""
    known = {decision.token: state(decision) for decision in made}
    states = [known.get(token, "gap") for token in range(max(known) + 1)]
    parts = []
    for name, tokens in groupby(enumerate(states), key=lambda pair: pair[1]):
        text = "".join(MARKS[name][0] + " " * ((token + 1) % TENS == 0) for token, _ in tokens)
        parts.append(Stretch(name, text))
    return tuple(parts)
