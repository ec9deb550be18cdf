# SPDX-License-Identifier: Apache-2.0
"""The verdict on a server as results with one outcome. So it has the files and reports of any other run."""

from __future__ import annotations

import platform
from collections.abc import Mapping

from refmoe import __version__
from refmoe.engines.first_wrong import first_token
from refmoe.engines.judge import worst_errors
from refmoe.engines.observations import is_wider
from refmoe.engines.results import Cause, Engine, Outcome, Results
from refmoe.engines.server.verdict import Verdict
from refmoe.suite import Case
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT

ENGINE = "server"
"""The name of the engine. Its option `kind` tells servers apart, as no server says its own name."""
UNKNOWN = "unknown"
"""The version of a server that does not say it."""


def results_of(found: Verdict, case: Case, significance: float, identity: Mapping[str, str]) -> Results:
    """The results of a run with this verdict.

    case: the one whose model was served   significance: of the judgement
    identity: options of the engine beside its kind, such as the command that started it
    """
    dtype = found.policy.storage.name
    return Results(
        engine=Engine(ENGINE, found.version or UNKNOWN, {**({"kind": found.kind} if found.kind else {}), **identity}),
        platform={"system": platform.system(), "machine": platform.machine()},
        refmoe=__version__,
        significance=significance,
        cases={case.name: case.digest},
        smoke=f"the server {found.gives}" if found.gives else "the server answered no question",
        outcomes=(outcome_of(found, case.name),),
        notes=(*([power_in_words(found)] if answered(found) else []), *found.notes),
        wider=(dtype,) if is_wider(found.policy, dtype) else (),
    )


def outcome_of(found: Verdict, case: str) -> Outcome:
    """The outcome. Right answers that show fewer than half of the known bugs are no judgement.   case: its name"""
    report = found.judgement.report
    weak = found.verdict == CONFORMANT and found.power.weak
    return Outcome(
        case=case,
        dtype=found.policy.storage.name,
        policy=found.policy.name,
        verdict=CANNOT_JUDGE if weak else found.verdict,
        reason=f"{found.reason}, but {power_in_words(found)}" if weak else found.reason,
        first_wrong=None if report is None else report.first_wrong,
        token=None if report is None else first_token(report),
        taps=found.level if answered(found) else None,
        worst_errors={} if report is None else worst_errors(report),
        explanations=tuple(
            Cause(name=each.name, kind=each.kind, about=each.about, fix=each.fix, sources=each.sources)
            for each in found.explanations or ()
        ),
    )


def answered(found: Verdict) -> bool:
    """Whether the server gave anything that could be judged."""
    return bool(found.judgement.tokens) or found.judgement.report is not None


def power_in_words(found: Verdict) -> str:
    """The known bugs that the evidence shows, in a sentence."""
    power = found.power
    return f"{found.level} show {power.seen} of {power.known} known bugs at {power.dtype}, on refmoe's own model"
