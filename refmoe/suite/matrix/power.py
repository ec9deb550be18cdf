# SPDX-License-Identifier: Apache-2.0
"""Measure the power of each set of taps: the mutants that it sees, on a case that shows them with all taps.

A mutant that a case kills with all taps is judged again there with fewer taps, the fewest first. A set that contains
another one sees what that one sees. One case per mutant and dtype is enough to know what kind of evidence it needs, and
costs a fraction of the matrix. Cases of one layer hide little from the logits, so cases with more layers come first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.mutant import PARALLEL
from refmoe.bugs.run_engine import run, same
from refmoe.bugs.sharded_mutant import ONE_DEVICE, on_ranks
from refmoe.files.atomic import replacing
from refmoe.parallel import results
from refmoe.profiles.policy import Policy
from refmoe.spec.model import Parameters
from refmoe.spec.taps import step_of
from refmoe.steps.sharded.layout import layouts
from refmoe.suite import Case, read_case
from refmoe.suite.matrix.changes import cost
from refmoe.suite.matrix.file import Matrix
from refmoe.suite.matrix.outcomes import POLICIES, runnable, setting
from refmoe.suite.power import FORMAT_VERSION, TAP_SETS, Seen
from refmoe.traces.trace import Trace
from refmoe.verifier.findings import NOT_CONFORMANT
from refmoe.verifier.verify import verify


@dataclass(frozen=True)
class Work:
    """A mutant at a dtype, and the cases that may show it, in the order in which they are tried."""

    mutant: str
    policy: str
    cases: tuple[Path, ...]


def plan(mutants: Sequence[str], cases: Sequence[Case], matrix: Matrix | None) -> list[Work]:
    """The work of measuring some mutants. Cases that killed a mutant in the matrix come first, deep ones before, then
    cheap ones."""
    found = []
    for name in mutants:
        for policy in POLICIES:
            killers = matrix.killers(name, policy) if matrix is not None else {}
            order = sorted(
                cases, key=lambda case: (case.name not in killers, case.config.layers < 2, cost(case), case.name)
            )
            wanted = order[:1] if killers else order
            if policy not in MUTANTS[name].unseen:
                found.append(Work(name, policy, tuple(case.folder for case in wanted)))
    return found


def measure(work: Work) -> tuple[str, list[str]]:
    """The first case that shows the mutant, and the sets of taps by which it does; no name where none shows it."""
    for folder in work.cases:
        sets = seen_by(work.mutant, read_case(folder), work.policy)
        if sets:
            return folder.name, sets
    return "", []


def seen_by(mutant: str, case: Case, policy: str) -> list[str]:
    """The sets of taps by which a case shows a mutant, the largest first; none where all taps do not show it."""
    rules, parameters = setting(mutant, case, policy)
    right = run(None, case.config, parameters, case.runs(), rules)
    sets = [*TAP_SETS]
    for trace in traces(mutant, case, rules, parameters):
        if same(trace, right):
            continue
        for place in reversed(range(len(sets))):
            part = restricted(trace, frozenset(TAP_SETS[sets[place]]))
            report = verify(part, f"case {case.name}", case.config, parameters, case.runs(), rules)
            if report.verdict == NOT_CONFORMANT:
                return sets[: place + 1]
    return []


def traces(mutant: str, case: Case, rules: Policy, parameters: Parameters) -> Iterator[Trace]:
    """The traces of an engine with this bug; of a sharded one, a trace per layout of ranks."""
    each = MUTANTS[mutant]
    if each.changes != PARALLEL:
        yield run(each, case.config, parameters, case.runs(), rules)
        return
    for layout in layouts(case.config):
        if layout != ONE_DEVICE:
            yield run(on_ranks(each, layout), case.config, parameters, case.runs(), rules)


def restricted(trace: Trace, steps: frozenset[str]) -> Trace:
    """The trace with the taps of these steps only."""
    kept = {key: tensor for key, tensor in trace.tensors.items() if step_of(key.partition("/")[2]) in steps}
    return replace(trace, tensors=kept)


def compute_power(
    work: Sequence[Work], before: Seen, executor: str | None = None, progress: Callable[[], None] | None = None
) -> Seen:
    """The table with this work done anew.   before: the table so far; what it holds of other mutants stays"""
    again = {each.mutant for each in work}
    found: Seen = {name: dict(at) for name, at in before.items() if name not in again}
    with results(measure, work, executor) as measured:
        for each, (case, seen) in measured:
            found.setdefault(each.mutant, {})[each.policy] = {"case": case, "seen": seen}
            if progress is not None:
                progress()
    return {
        name: {policy: found[name][policy] for policy in POLICIES if policy in found[name]}
        for name in runnable()
        if name in found
    }


def write_power(path: Path, seen: Seen) -> None:
    """One line for each mutant and policy. Raises InputError when it cannot be written."""
    lines = []
    for name, at in seen.items():
        inside = ",\n".join(f"   {json.dumps(policy)}: {json.dumps(found)}" for policy, found in at.items())
        lines.append(f"  {json.dumps(name)}: {{\n{inside}\n  }}" if at else f"  {json.dumps(name)}: {{}}")
    whole = ",\n".join(lines)
    with replacing(path) as temporary:
        temporary.write_text(
            f'{{\n "format_version": {json.dumps(FORMAT_VERSION)},\n "mutants": {{\n{whole}\n }}\n}}\n',
            encoding="utf-8",
        )
