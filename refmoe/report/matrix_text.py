# SPDX-License-Identifier: Apache-2.0
"""The matrix as lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from refmoe.report.wording import count
from refmoe.suite.matrix.changes import RENEW
from refmoe.suite.matrix.outcomes import POLICIES, Work
from refmoe.suite.matrix.summary import Summary


def summary_lines(summary: Summary) -> Iterable[str]:
    """The mutants killed, the mutants that live and why, and the cases that kill; the failures come last."""
    for policy in POLICIES:
        yield f"{policy:9} {summary.killed[policy]} of {summary.mutants} mutants killed"
        for name, reason in summary.unseen[policy].items():
            yield f"          {name} cannot be seen: {reason}"
    caught = summary.outside - len(summary.outside_alive)
    yield f"vectors   {caught} of {summary.outside} mutants of tokenizer, sampler and loss killed"
    alone = ", ".join(f"{case} {number}" for case, number in summary.unique.items())
    yield f"what a case alone kills, mutants times dtypes: {alone or 'nothing'}"
    yield f"cases that alone kill nothing: {', '.join(summary.redundant) or 'none'}"
    yield from failures(summary.problems)


def family_lines(family: str, summary: Summary) -> Iterable[str]:
    """The mutants that the cases of one family kill by themselves."""
    killed = ", ".join(f"{summary.killed[policy]} in {policy}" for policy in summary.killed)
    yield f"the {family} cases by themselves kill, of {summary.mutants} mutants: {killed}"
    yield from failures(summary.problems)


def repeated_lines(parts: Sequence[str], work: Sequence[Work], problems: Sequence[str]) -> Iterable[str]:
    """The changes since the matrix was computed, the runs that were repeated, and the failures among them."""
    yield f"changed: {', '.join(parts)}" if parts else "nothing has changed since the matrix was computed"
    if work:
        mutants = {name for each in work for name in each.mutants}
        runs = f"{count(sum(len(each.mutants) for each in work), 'run')} of {count(len(mutants), 'mutant')}"
        cases = count(len({each.case for each in work}), "case")
        yield f"{runs} on {cases} repeated, and the specification there"
        if not problems:
            yield "every mutant that was killed is killed"
    yield from failures(problems)


def stale_lines(parts: Sequence[str]) -> Iterable[str]:
    """A line where the matrix was computed from other sources than those there are."""
    if parts:
        yield f"changed since: {', '.join(parts)}; `{RENEW}` makes the matrix current"


def failures(problems: Sequence[str]) -> Iterable[str]:
    """A line per problem."""
    return (f"FAIL  {problem}" for problem in problems)
