"""The matrix: every mutant on every case at every dtype, judged as if it were a foreign engine.

It proves that the suite can fail. Beside the mutants the specification itself is run, and must pass everywhere.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from refmoe.golden import Case, read_case
from refmoe.mutants.catalogue import MUTANTS
from refmoe.mutants.engine import run, same
from refmoe.mutants.mutant import PARALLEL, Mutant
from refmoe.mutants.on_ranks import ONE_DEVICE, on_ranks
from refmoe.mutants.quantised import INT8, quantised
from refmoe.mutants.sources import digests
from refmoe.parallel import results
from refmoe.policy.load import policy as named_policy
from refmoe.sharding.layout import layouts
from refmoe.trace import Trace
from refmoe.verify.findings import FAIL, NOT_CONFORMANT, Report
from refmoe.verify.verify import verify

POLICIES = ("float32", "bfloat16", "float16")
FORMAT_VERSION = "1"
MATRIX_FILE = "matrix.json"

IMPOSSIBLE, IMPROBABLE, ROUTING = "impossible", "improbable", "routing"
"""What kills: a value outside its hard interval, a statistic, an illegal choice of experts."""


@dataclass(frozen=True)
class Work:
    """A case at a dtype, and the mutants to run on it."""

    case: Path
    policy: str
    mutants: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """One mutant on one case at one dtype."""

    mutant: str
    case: str
    policy: str
    verdict: str
    """``inert``: it changes no bit of the trace. Else that of the verification."""
    step: str = ""
    """The first wrong step, where it is killed."""
    by: str = ""
    rung: str = ""

    @property
    def killed(self) -> bool:
        return self.verdict == NOT_CONFORMANT


def judge_case(work: Work) -> list[Outcome]:
    """Run the mutants on a case and judge them; the specification itself comes first, under the name ``-``."""
    case = read_case(work.case)
    ground = case.checkpoint().parameters
    outcomes, judged = [], set()
    for name in ("-", *work.mutants):
        each = MUTANTS.get(name)
        text = work.policy + (each.judged_by if each else "")
        quantised_model = each is not None and "QUANT" in each.needs
        policy, parameters = named_policy(text), quantised(ground, INT8) if quantised_model else ground
        right = _right_run(work.case, text, quantised_model)
        if (text, quantised_model) not in judged:
            # the specification itself, under each policy and on each checkpoint that a mutant is judged by
            judged.add((text, quantised_model))
            report = verify(right, f"case {case.name}", case.config, parameters, case.runs(), policy)
            outcomes.append(outcome_of("-", case.name, work.policy, report))
        if each is None:
            continue
        if each.changes == PARALLEL:
            outcomes.append(judge_parallel(each, case, work.policy))
            continue
        trace = run(each, case.config, parameters, case.runs(), policy)
        if same(trace, right):
            outcomes.append(Outcome(name, case.name, work.policy, "inert"))
            continue
        report = verify(trace, f"case {case.name}", case.config, parameters, case.runs(), policy)
        outcomes.append(outcome_of(name, case.name, work.policy, report))
    return outcomes


def judge_parallel(mutant: Mutant, case: Case, policy: str) -> Outcome:
    """A mutant of the sharded run on a case: on the layouts that fit, until one shows it."""
    parameters, outcome = case.checkpoint().parameters, Outcome(mutant.id, case.name, policy, "inert")
    for layout in layouts(case.config):
        if layout == ONE_DEVICE:
            continue
        trace = run(on_ranks(mutant, layout), case.config, parameters, case.runs(), named_policy(policy))
        report = verify(trace, f"case {case.name}", case.config, parameters, case.runs(), named_policy(policy))
        outcome = outcome_of(mutant.id, case.name, policy, report)
        if outcome.killed:
            break
    return outcome


@lru_cache(maxsize=4)
def _right_run(folder: Path, policy: str, quantised_model: bool) -> Trace:
    case = read_case(folder)
    ground = case.checkpoint().parameters
    parameters = quantised(ground, INT8) if quantised_model else ground
    return run(None, case.config, parameters, case.runs(), named_policy(policy))


def outcome_of(mutant: str, case: str, policy: str, report: Report) -> Outcome:
    """What a verification says of a mutant."""
    if report.verdict != NOT_CONFORMANT or report.first_wrong is None:
        return Outcome(mutant, case, policy, report.verdict)
    check = next(check for check in report.checks if check.verdict == FAIL)
    by = ROUTING if check.step == "router.experts" else IMPOSSIBLE if check.outside else IMPROBABLE
    return Outcome(mutant, case, policy, report.verdict, check.step, by, check.rung)


def compute_matrix(
    cases: Sequence[Path], mutants: Sequence[str], policies: Sequence[str] = POLICIES, jobs: int | None = None,
    progress: Callable[[], None] | None = None,
) -> list[Outcome]:  # fmt: skip
    """All outcomes, in an order that does not depend on the number of processes."""
    work = [Work(case, policy, tuple(mutants)) for case in cases for policy in policies]
    found: list[Outcome] = []
    with results(judge_case, work, jobs) as judged:
        for _, outcomes in judged:
            found += outcomes
            if progress is not None:
                progress()
    order = {name: i for i, name in enumerate(("-", *MUTANTS))}
    return sorted(found, key=lambda each: (order[each.mutant], each.policy, each.case))


def runnable() -> tuple[str, ...]:
    """The mutants that are variations of a forward pass, sharded or not."""
    return tuple(
        each.id for each in MUTANTS.values() if (each.in_one_pass or each.changes == PARALLEL) and not each.equivalent
    )


def to_json(outcomes: Iterable[Outcome], root: Path) -> str:
    """The matrix as a file: per mutant and policy the cases that kill it, and at which step."""
    kills: dict[str, dict[str, dict[str, str]]] = {}
    other: dict[str, dict[str, list[str]]] = {}
    for each in outcomes:
        if each.killed:
            place = f"{each.step} {each.by} {each.rung}"
            kills.setdefault(each.mutant, {}).setdefault(each.policy, {})[each.case] = place
        elif each.verdict != "inert" and each.mutant != "-":
            other.setdefault(each.mutant, {}).setdefault(each.policy, []).append(each.case)
    values = {
        "format_version": FORMAT_VERSION, "policies": list(POLICIES), "sources": digests(root),
        "kills": kills, "seen_but_legal": other, "equivalent": {
            each.id: each.equivalent for each in MUTANTS.values() if each.equivalent
        },
    }  # fmt: skip
    return json.dumps(values, indent=1, sort_keys=False) + "\n"


@dataclass(frozen=True)
class Summary:
    """The matrix in short."""

    killed: dict[str, int]
    """Per policy, how many mutants at least one case kills."""
    alive: dict[str, tuple[str, ...]]
    """Per policy, the mutants that no case kills."""
    false_alarms: tuple[str, ...]
    """Cases and policies in which the specification itself fails."""
    redundant: tuple[str, ...]
    """Cases that kill nothing which no other case kills at the same dtype."""
    mutants: int


def summarise(kills: Mapping[str, Mapping[str, Mapping[str, Any]]], cases: Sequence[str]) -> Summary:
    """kills: as in the file, per mutant, policy and case."""
    names = runnable()
    alive = {policy: tuple(name for name in names if not kills.get(name, {}).get(policy)) for policy in POLICIES}
    needed: dict[str, int] = defaultdict(int)
    for name in names:
        for policy in POLICIES:
            killers = [*kills.get(name, {}).get(policy, {})]
            if len(killers) == 1:
                needed[killers[0]] += 1
    alarms = tuple(f"{case} {policy}" for policy, found in kills.get("-", {}).items() for case in found)
    redundant = tuple(case for case in cases if not needed[case])
    counts = {policy: len(names) - len(alive[policy]) for policy in POLICIES}
    return Summary(counts, alive, alarms, redundant, len(names))
