# SPDX-License-Identifier: Apache-2.0
"""All documents that follow from the inputs of a package."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from refmoe.checkpoints.load import checkpoint_digest, load_checkpoint
from refmoe.engines.observations import policies_used
from refmoe.engines.run_case import Materialised
from refmoe.evidence.clauses import clauses
from refmoe.evidence.epsilon import epsilon
from refmoe.evidence.given import Given
from refmoe.evidence.judged import Judged, judge_trace
from refmoe.evidence.layout import (
    CHECKPOINTS,
    CLAUSES,
    EPSILON,
    FORMAT_VERSION,
    POWER,
    RULES,
    SUMMARY,
    TESTS,
)
from refmoe.evidence.own import Own
from refmoe.evidence.power import power
from refmoe.files.scratch import Scratch
from refmoe.profiles.load import BUDGETS, differences
from refmoe.profiles.policy import Policy
from refmoe.suite.manifest import MANIFEST_FILE, file_digest
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT

Judgements = dict[tuple[str, str], Judged]
"""By case and dtype."""


@dataclass(frozen=True)
class Derived:
    """The documents of a package, and the judgements that they rest on."""

    documents: dict[str, Any]
    """By the names of their files."""
    judged: Judgements


def derive(given: Given, own: Own, advance: Callable[[], None] = lambda: None) -> Derived:
    """Derive all documents.

    advance: called after each trace.   Raises InputError for a trace or a case that cannot be read.
    """
    judged: Judgements = {}
    for each in given.results.outcomes:
        if given.trace(each) is not None:
            judged[each.case, each.dtype] = judge_trace(given, each)
        advance()
    seen = power(given, judged, own)
    documents = {
        SUMMARY: summary(given, own),
        CHECKPOINTS: checkpoints(given),
        RULES: {name: rules(policy) for name, policy in given.policies.items()},
        EPSILON: epsilon(given, judged),
        CLAUSES: clauses(given, own, {dtype: at["absent"] for dtype, at in seen.items()}),
        POWER: seen,
    }
    return Derived(documents if own.tests is None else documents | {TESTS: {**own.tests}}, judged)


def summary(given: Given, own: Own) -> dict[str, Any]:
    """The engine that was judged, the refmoe that judged it, and the outcome."""
    results = given.results
    used = policies_used(results)
    return {
        "format_version": FORMAT_VERSION,
        "result": result_of(given),
        "engine": {
            "name": results.engine.name,
            "version": results.engine.version,
            "options": {**results.engine.options},
        },
        "platform": {**results.platform},
        "refmoe": results.refmoe,
        "significance": results.significance,
        **({} if results.fresh is None else {"fresh": results.fresh}),
        "dtypes": {
            dtype: {
                "policy": used[dtype].name,
                "wider": used[dtype].wider,
                "verdicts": dict(Counter(each.verdict for each in results.outcomes if each.dtype == dtype)),
            }
            for dtype in given.dtypes
        },
        "cases": {
            name: {
                "family": case.family,
                "case.toml": given.stored[name].digest,
                MANIFEST_FILE: file_digest(case.folder / MANIFEST_FILE),
            }
            for name, case in given.cases.items()
        },
        "not_run": [name for name in own.cases if name not in given.cases],
        "traces": {
            f"{each.case} {each.dtype}": file_digest(path)
            for each in results.outcomes
            if (path := given.trace(each)) is not None
        },
    }  # fmt: skip


PASSED, WARNED, FAILED = "PASSED", "WARNED", "FAILED"


def result_of(given: Given) -> str:
    """The result as in-toto names it: `WARNED` where nothing failed, but something was not judged."""
    kinds = {result_of_verdict(each.verdict, each.failed) for each in given.results.outcomes}
    return FAILED if FAILED in kinds else WARNED if WARNED in kinds or not kinds else PASSED


def result_of_verdict(verdict: str, failed: bool) -> str:
    """The result of one case at a dtype. What could not be judged did not fail as a test of the engine."""
    if verdict == CONFORMANT:
        return PASSED
    return FAILED if failed and verdict != CANNOT_JUDGE else WARNED


def checkpoints(given: Given) -> dict[str, Any]:
    """Per case the digest of its checkpoint, as ``refmoe materialise CASE`` writes it."""
    with Scratch("evidence") as scratch:
        return {name: _checkpoint(Materialised(case, scratch, "hf")) for name, case in given.cases.items()}


def _checkpoint(model: Materialised) -> dict[str, Any]:
    with model:
        found = load_checkpoint(model.path())
        return {"digest": checkpoint_digest(found), "files": {path.name: file_digest(path) for path in found.files}}


def rules(policy: Policy) -> dict[str, Any]:
    """A policy in full: whose arithmetic it is, each field in words, and the sources of its budgets."""
    return {
        "about": policy.about, "source": policy.source,
        "fields": {row.field: row.values[0] for row in differences([policy])},
        "sources_of_budgets": {name: getattr(policy, name).source for name in BUDGETS},
    }  # fmt: skip
