# SPDX-License-Identifier: Apache-2.0
"""The power of a verification: of the known bugs, those that it would see with the taps and the dtype of a trace.

The table ``power.json`` beside this file holds what `refmoe.suite.matrix.power` measured: per bug and policy, the sets
of taps by which it is seen, on a golden case that shows it with all taps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from refmoe.arithmetic.formats import FLOAT32
from refmoe.files.parsing import strict_json
from refmoe.files.reading import own_text
from refmoe.profiles.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.taps import IDS, LAYER_TAPS, LOGPROBS, MODEL_TAPS, step_of, tap_names
from refmoe.traces.pieces import by_pieces, call_of
from refmoe.traces.trace import Trace
from refmoe.verifier.findings import ALL_TAPS, CONFORMANT, Power, Report

FORMAT_VERSION = "1"
TABLE = "power.json"

INTERNALS = (
    "attention.scores", "attention.probs", "expert.gate", "expert.up", "expert.hidden", "expert.output",
)  # fmt: skip
"""The taps that fused kernels of attention and experts do not give."""
STEPS = (*MODEL_TAPS, *LAYER_TAPS)

TAP_SETS: Mapping[str, tuple[str, ...]] = {
    ALL_TAPS: STEPS,
    "the taps outside fused kernels": tuple(step for step in STEPS if step not in INTERNALS),
    "hidden states and logits": ("residual", "logits"),
    "logits": ("logits",),
}
"""The sets of taps for which power was measured, the largest first. The taps are named without their layer."""

Seen = dict[str, dict[str, dict[str, Any]]]
"""Per mutant and policy: ``case``, the one that was run, and ``seen``, the sets of taps that show the mutant there."""


@cache
def table() -> Seen:
    """The measured table, as the package holds it."""
    document: dict[str, Any] = strict_json(own_text("refmoe.suite", TABLE))
    assert document["format_version"] == FORMAT_VERSION
    seen: Seen = document["mutants"]
    return seen


def with_power(report: Report, trace: Trace, config: Config, policy: Policy) -> Report:
    """The report with its power. The headline of a conformant trace says how far the taps show that.

    trace, config, policy: as they were judged
    """
    power = power_of(held_steps(trace, config), policy)
    report = replace(report, power=power)
    if report.verdict != CONFORMANT:
        return report
    return replace(report, headline=f"{in_words(report)} with {policy.name}: {report.headline.partition(': ')[2]}")


def in_words(report: Report) -> str:
    """The verdict, and for a conformant trace without all taps how far these show it."""
    power = report.power
    if report.verdict != CONFORMANT or power is None or power.taps == ALL_TAPS:
        return report.verdict
    if not power.taps:
        return f"{report.verdict} as far as its taps show"
    return f"{report.verdict} as far as {power.taps} show (sees {power.seen} of {power.known} known bugs)"


def held_steps(trace: Trace, config: Config) -> frozenset[str]:
    """The steps whose taps a trace holds in every layer and position of every call of which it holds anything.

    Log-probabilities of the whole vocabulary count as the logits. They differ by a number for each position, and see
    the same known bugs.
    """
    known = frozenset(tap_names(config))
    calls: dict[str, list[frozenset[str]]] = {}
    trace, runs = by_pieces(trace, trace.runs, config)
    for run in runs:
        names = frozenset(trace.names(run.run))
        if LOGPROBS in names and IDS not in names:
            names |= {"logits"}
        calls.setdefault(call_of(run), []).append(known & names)
    held = [pieces for pieces in calls.values() if any(pieces)]
    lacking = {step_of(tap) for pieces in held for names in pieces for tap in known - names}
    return frozenset(STEPS) - lacking if held else frozenset()


def power_of(steps: frozenset[str], policy: Policy) -> Power:
    """The power that was measured for the largest set of taps within `steps`, at the dtype of the policy."""
    dtype = policy.storage.name if not policy.storage.holds(FLOAT32) else FLOAT32.name
    fitting = [name for name, taps in TAP_SETS.items() if steps >= frozenset(taps)]
    if not fitting:
        return Power(taps="", dtype=dtype, seen=0, known=len(table()), unseen=())
    unseen = tuple(mutant for mutant, at in table().items() if fitting[0] not in at.get(dtype, {}).get("seen", ()))
    known = len(table())
    return Power(taps=fitting[0], dtype=dtype, seen=known - len(unseen), known=known, unseen=unseen)
