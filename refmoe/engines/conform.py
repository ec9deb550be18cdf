"""The suite: every case at every dtype of a harness, and what became of each."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from refmoe import __version__
from refmoe.engines.attempt import attempted, lacks, materialised
from refmoe.engines.harness import Description, Harness, Refused
from refmoe.engines.judgement import Judge
from refmoe.engines.keeping import kept_file
from refmoe.engines.outcome import SKIPPED, Engine, Outcome, Results
from refmoe.engines.process import HarnessError
from refmoe.engines.smoke import smoke_test
from refmoe.errors import InputError
from refmoe.policy.load import policy as named_policy
from refmoe.policy.policy import Policy
from refmoe.spec.model import Parameters
from refmoe.suite import Case

Log = Callable[[Outcome, str], None]
"""Called with each outcome and, where the harness has failed, the end of its standard error."""


@dataclass(frozen=True)
class Suite:
    """What is asked of an engine."""

    cases: Sequence[Case]
    """Those to run."""
    smoke: Sequence[Case]
    """Those among which the smoke test chooses."""
    dtypes: Sequence[str] = ()
    """In which to run them; all that the harness has where there is none."""
    policies: Mapping[str, Policy] = field(default_factory=dict)
    """Per dtype the policy, in place of the one that the harness declares."""
    judge: Judge = field(default_factory=Judge)
    keep: Path | None = None
    """A folder for the traces that come back."""


def conform(harness: Harness, options: Mapping[str, str], suite: Suite, log: Log = lambda *_: None) -> Results:
    """Run a suite on a harness that has been started, and end it.

    options: what else identifies the engine, such as the options of its adapter.   log: called after each outcome.
    Raises HarnessUnusable where the smoke test finds the harness itself broken, InputError where it lacks a dtype.
    """
    described = harness.description
    try:
        policies = chosen_policies(described, suite)
        with tempfile.TemporaryDirectory(prefix="refmoe-conform-") as temporary:
            folder = Path(temporary)
            smoke = smoke_test(harness, suite.smoke, next(iter(policies)), folder)
            outcomes = []
            for case in suite.cases:
                for outcome in _outcomes(harness, case, policies, suite, folder):
                    outcomes.append(outcome)
                    log(outcome, harness.log if outcome.failed else "")
        note = harness.stop()
    finally:
        harness.kill()
    return Results(
        Engine(described.name, described.version, options),
        {"system": platform.system(), "machine": platform.machine()}, __version__, suite.judge.significance,
        {case.name: case.digest for case in suite.cases}, smoke, tuple(outcomes), () if note is None else (note,),
    )  # fmt: skip


def chosen_policies(described: Description, suite: Suite) -> dict[str, Policy]:
    """Per dtype to be run the policy. Raises InputError for a dtype that the harness lacks."""
    for dtype in (*suite.dtypes, *suite.policies):
        if dtype not in described.dtypes:
            raise InputError(
                f"dtype {dtype}: {described.name} {described.version} does not have it, but one of "
                f"{', '.join(described.dtypes)} was expected"
            )
    return {
        dtype: suite.policies.get(dtype) or named_policy(described.policies.get(dtype, dtype))
        for dtype in suite.dtypes or described.dtypes
    }


def _outcomes(
    harness: Harness, case: Case, policies: Mapping[str, Policy], suite: Suite, folder: Path
) -> Iterator[Outcome]:
    """The outcomes of one case, dtype by dtype."""
    kept = {dtype: None if suite.keep is None else kept_file(suite.keep, case.name, dtype) for dtype in policies}
    lacking = lacks(case.runs(), harness.description.abilities)
    if lacking is not None:
        yield from (Outcome(case.name, dtype, each.name, SKIPPED, lacking) for dtype, each in policies.items())
        return
    parameters = case.checkpoint().parameters
    with materialised(case, parameters, folder, harness.description.layout) as checkpoint:
        for dtype, policy in policies.items():
            yield _outcome(harness, case, parameters, checkpoint, dtype, policy, suite.judge, kept[dtype])


def _outcome(
    harness: Harness, case: Case, parameters: Parameters, checkpoint: Path, dtype: str, policy: Policy, judge: Judge,
    kept: Path | None,
) -> Outcome:  # fmt: skip
    skipped = Outcome(case.name, dtype, policy.name, SKIPPED, "")
    try:
        with attempted(harness, case, checkpoint, dtype, policy.name, kept) as trace:
            return judge.judge(case, parameters, dtype, trace, policy)
    except Refused as refused:
        return replace(skipped, reason=refused.reason, issue=refused.issue)
    except HarnessError as error:
        return replace(skipped, verdict=error.kind, reason=error.reason)
