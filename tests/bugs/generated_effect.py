# SPDX-License-Identifier: Apache-2.0
"""Whether a name that was given to a fault is another description of it: it must hold for calls that nobody has seen.

The engine with the fault runs on other tokens. The name is held against that trace, which it was not read from. A
description of the fault predicts the new values. A name that fits one trace by chance does not.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from refmoe.bugs.catalogue import MUTANTS
from refmoe.profiles.load import policy
from refmoe.traces.trace import Header, Run, read_trace, write_trace
from refmoe.verifier.diagnosis.arithmetic import other_arithmetic
from refmoe.verifier.diagnosis.diagnose import placed
from refmoe.verifier.diagnosis.evidence import Evidence, gather
from refmoe.verifier.diagnosis.grammar.fault import Search
from refmoe.verifier.diagnosis.grammar.search import hypotheses
from refmoe.verifier.diagnosis.known import Cause, cause_of, explain
from refmoe.verifier.diagnosis.settings import other_settings
from refmoe.verifier.findings import FAIL, STRUCTURE
from refmoe.verifier.verify import verify
from tests.verifier.engines import Arrays, Model

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


@dataclass(frozen=True)
class Given:
    """A name that the diagnosis gave.   where: the rows that it is limited to, in words"""

    name: str
    kind: str
    where: str


def unseen_calls(runs: tuple[Run, ...], vocab: int) -> tuple[Run, ...]:
    """The calls with other tokens. Sequences that repeat tokens at equal positions still do."""
    other = np.random.default_rng(len(runs)).permutation(vocab)
    shift = np.random.default_rng(vocab).integers(vocab, size=1 + max(max(run.positions) for run in runs))
    return tuple(
        replace(
            run,
            tokens=tuple(int(other[(t + shift[p]) % vocab]) for t, p in zip(run.tokens, run.positions, strict=True)),
        )
        for run in runs
    )


def holds_elsewhere(
    model: Model, given: Given, dtype: str, engine: Callable[[tuple[Run, ...]], Arrays], precision: float
) -> bool:
    """Whether a name explains the trace of the same engine for other tokens.

    engine: the taps of the engine with the fault for these calls   precision: the relative error of a right number
    """
    runs = unseen_calls(model.runs, model.config.vocab)
    rules, parameters = f"hf-{dtype}", model.checkpoint.parameters
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.safetensors"
        write_trace(path, Header(runs, policy=rules), engine(runs))
        trace, used = read_trace(path), policy(rules)
        report = verify(trace, model.name, model.config, parameters, runs, used)
        if not any(check.verdict == FAIL for check in report.checks):
            return False
        with np.errstate(all="ignore"):
            evidence = gather(trace, model.config, parameters, runs, used, report)
            step, colon, _ = given.name.partition(": ")
            if given.kind == STRUCTURE and colon:
                return _structure_holds(evidence, step, given, precision)
            return any(explain(evidence, each).explains for each in _causes(evidence) if each.name == given.name)


def _structure_holds(evidence: Evidence, step: str, given: Given, precision: float) -> bool:
    """Whether a structure of that name, in the same rows, is proven from other tokens."""
    search = Search(evidence, step)
    if not search.usable:
        return False
    for fault in hypotheses(search):
        if alike(f"{step}: {fault.name}", given.name, precision) and search.near(fault):
            proof = search.prove(fault)
            if proof is not None and proof.where.words == given.where:
                return True
    return False


def _causes(evidence: Evidence) -> Iterator[Cause]:
    """Every known bug, setting and other arithmetic."""
    yield from (cause_of(each) for each in MUTANTS.values() if each.in_one_pass)
    yield from map(cause_of, placed(MUTANTS.values(), evidence.right.config))
    yield from (cause_of(each, STRUCTURE) for each in other_settings(evidence.right.config))
    yield from other_arithmetic(evidence.policy, evidence.right.config.head_dim)


def alike(one: str, two: str, precision: float) -> bool:
    """Whether two names are the same, up to the precision of numbers with a fraction in them."""
    if NUMBER.sub("#", one) != NUMBER.sub("#", two):
        return False
    pairs = zip(NUMBER.findall(one), NUMBER.findall(two), strict=True)
    return all(a == b or ("." in a + b and abs(float(a) - float(b)) <= precision * abs(float(b))) for a, b in pairs)
