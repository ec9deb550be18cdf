# SPDX-License-Identifier: Apache-2.0
"""Each bug of the catalogue, diagnosed by a catalogue without it: a known bug or other arithmetic named then is wrong.

A name is right if what it names computes the same values on this trace. It is then left out too, and the rest of the
catalogue is tried again.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.mutant import Mutant
from refmoe.bugs.run_engine import same
from refmoe.profiles.load import policy as named_policy
from refmoe.profiles.policy import Policy
from refmoe.spec.model import Parameters
from refmoe.spec.taps import step_of
from refmoe.traces.held import held_trace
from refmoe.traces.trace import Trace
from refmoe.verifier.diagnosis import diagnose
from refmoe.verifier.findings import FAIL, STRUCTURE
from tests.bugs.judging import GOLDEN, case_named, judged_under, policy_for, reference, traced_under
from tests.bugs.shown_by import SHOWN_BY

TAPS: dict[str, Any] = {
    "all": lambda step: True,
    "no expert internals": lambda step: not step.startswith("expert."),
    "hidden states": lambda step: step in ("residual", "logits"),
    "logits": lambda step: step == "logits",
}
"""The taps that a trace keeps, by the name of the choice."""
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LeftOut:
    """The diagnosis of one bug by a catalogue without it."""

    bug: str
    case: str
    dtype: str
    taps: str
    visible: bool
    same: tuple[str, ...]
    """The names of what computes the same values there; they are left out too."""
    named: str
    """The first name given; empty if none is."""
    kind: str
    residual: float
    seconds: float
    """The processor's time for the last diagnosis."""

    @property
    def wrong(self) -> bool:
        """Whether a wrong known bug, or other arithmetic, is named. A structure describes; it names no cause."""
        return self.named != "" and self.kind != STRUCTURE

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "wrong": self.wrong, "seconds": round(self.seconds, 2)}


@cache
def kills() -> dict[str, dict[str, dict[str, str]]]:
    """The cases that show each bug at each dtype, from the matrix."""
    found: dict[str, dict[str, dict[str, str]]] = json.loads((GOLDEN / "matrix.json").read_text())["kills"]
    return found


def case_for(bug: str, dtype: str) -> str:
    """The cheapest case that shows a bug at a dtype; empty if none does."""
    shown = kills().get(bug, {}).get(dtype, {})
    preferred = SHOWN_BY.get(bug, "")
    if preferred in shown:
        return preferred
    return min(shown, key=_cost, default="")


def _cost(name: str) -> int:
    return sum(len(run.tokens) for run in case_named(name).runs()) * case_named(name).config.layers


def keeping(trace: Trace, taps: str) -> Trace:
    """The trace with some of its taps."""
    arrays = {key: np.array(tensor.get()) for key, tensor in trace.tensors.items()}
    kept = {key: array for key, array in arrays.items() if TAPS[taps](step_of(key.partition("/")[2]))}
    return held_trace(trace.header, kept)


def leave_out(bug: str, dtype: str, taps: str) -> LeftOut | None:
    """The diagnosis of a bug by a catalogue without it. None if no case shows the bug."""
    case = case_for(bug, dtype)
    if not case:
        return None
    used, parameters = policy_for(bug, dtype), reference(bug, case)
    trace = keeping(traced_under(bug, case, parameters, used), taps)
    report = judged_under(trace, case, parameters, used)
    alike: list[str] = []
    start = time.process_time()
    if not any(check.verdict == FAIL for check in report.checks):
        return LeftOut(bug, case, dtype, taps, False, (), "", "", float("nan"), 0.0)
    while True:
        rest = [each for each in MUTANTS.values() if each.id not in (bug, *alike)]
        start = time.process_time()
        runs = case_named(case).runs()
        found = diagnose(trace, case_named(case).config, parameters, runs, used, report, rest)
        seconds = time.process_time() - start
        named = [each for each in found if each.explains and each.name not in alike]
        first = named[0] if named else None
        if first is not None and first.kind != STRUCTURE and computes(first.name, trace, case, parameters, used):
            alike.append(first.name)
            if first.name in MUTANTS:
                continue
            named = [each for each in named if each.name != first.name]
            first = named[0] if named else None
        return LeftOut(
            bug=bug,
            case=case,
            dtype=dtype,
            taps=taps,
            visible=True,
            same=tuple(alike),
            named=first.name if first else "",
            kind=first.kind if first else "",
            residual=first.residual if first else float("nan"),
            seconds=seconds,
        )


def computes(name: str, trace: Trace, case: str, parameters: Parameters, used: Policy) -> bool:
    """Whether what is named computes the values of the trace, bit by bit."""
    if name in MUTANTS:
        other = traced_under(name, case, parameters, used)
    elif "+" in name and " " not in name:
        other = traced_under(None, case, parameters, named_policy(name))
    else:
        return False
    kept = {key: np.array(tensor.get()) for key, tensor in other.tensors.items() if key in trace.tensors}
    return same(trace, held_trace(trace.header, kept))


def bugs() -> list[Mutant]:
    """The bugs of a forward pass."""
    return [each for each in MUTANTS.values() if each.in_one_pass]
