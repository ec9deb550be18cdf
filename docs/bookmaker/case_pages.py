# SPDX-License-Identifier: Apache-2.0
"""The pages of cases and of tests."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from docs.bookmaker.evidence import (
    Evidence,
    source_of_test,
)
from docs.bookmaker.markdown import (
    block,
    code,
    folded,
    link,
    page,
    sentence,
    table,
    text,
)
from docs.bookmaker.spec_pages import SIZES
from docs.bookmaker.step_pages import bug_link, test_link, test_page
from refmoe.bugs.catalogue import MUTANTS
from refmoe.suite import FAMILIES, Case, read_manifest
from refmoe.suite.matrix.outcomes import POLICIES

MOST_RUNS = 12
"""Runs of a case that its page names."""


def by_family(every: Evidence) -> Iterator[tuple[str, Iterator[Case]]]:
    """The cases by family, as they are listed."""
    ordered = sorted(every.cases, key=lambda case: (FAMILIES.index(case.family), case.name))
    yield from groupby(ordered, key=lambda case: case.family)


def cases_page(family: str, cases: list[Case], every: Evidence) -> str:
    """The cases of a family."""
    parts = [part for case in cases for part in case_parts(case, every)]
    conditions = link("The table of cases and conditions", "/golden/CASES.md")
    return page(f"# Cases: {family}", f"{conditions} has them in short.", *parts)


def case_parts(case: Case, every: Evidence) -> Iterator[str]:
    """One case: the reason for it, its dimensions, its calls, the bugs that it catches, its certificate."""
    config = case.config
    named = case.name
    caught = {
        name: at for name in MUTANTS
        if (at := [policy for policy in POLICIES if named in every.kills[name][policy]])
    }  # fmt: skip
    runs = [f"{code(run.run)} ({sentence(len(run.tokens), 'token')})" for run in case.runs()]
    yield f"## {case.name}"
    yield text(case.why)
    yield table(
        ["fact", "value"],
        [
            ["dimensions", ", ".join(f"{field} {getattr(config, field)}" for field in SIZES.values())],
            ["runs", ", ".join(runs[:MOST_RUNS]) + (f" and {len(runs) - MOST_RUNS} more" if runs[MOST_RUNS:] else "")],
            ["clauses", ", ".join(link(each, f"clauses/{each}.md") for each in case.clauses)],
            ["made for", ", ".join(bug_link(MUTANTS[each]) for each in case.bugs if each in MUTANTS) or "no bug alone"],
            ["catches", f"{len(caught)} of {len(MUTANTS)} known bugs"],
            ["certificate", certificate_words(read_manifest(case.folder)["certificate"])],
        ],
    )  # fmt: skip
    yield (
        folded(f"The known bugs that {case.name} catches", ", ".join(bug_link(MUTANTS[name]) for name in caught))
        if caught
        else ""
    )


def certificate_words(certificate: dict[str, object] | None) -> str:
    """A certificate in one line."""
    if certificate is None:
        return "none"
    worst_at, decisions = certificate["worst"], certificate["decisions"]
    assert isinstance(worst_at, dict)
    assert isinstance(decisions, dict)
    proven = int(decisions["all"]) - len(decisions["unproven"])
    return (
        f"every value within {worst_at['relative']:.2g} of its tap's RMS ({certificate['arithmetic']}); "
        f"{proven} of {decisions['all']} routing decisions proven"
    )


def by_file(every: Evidence) -> dict[str, list[str]]:
    """The tests that name a clause, by their file."""
    found: dict[str, list[str]] = {}
    for test in sorted({test for row in every.clauses.values() for test in row.tests}):
        found.setdefault(test.partition("::")[0], []).append(test)
    return found


def tests_page(path: str, tests: list[str], every: Evidence) -> str:
    """The tests of a file that name clauses, as they stand."""
    parts = []
    for test in tests:
        name = test.partition("::")[2]
        line, source = source_of_test(every.root, test)
        clauses = [row.clause for row in every.clauses.values() if test in row.tests]
        parts += [f"## {code(name)}"] if name else []
        parts += ["Names " + ", ".join(link(each, f"clauses/{each}.md") for each in clauses) + "."]
        parts += [block("python", source, line)]
    return page(f"# {code(path)}", f"{link('All tests that name a clause', 'tests/index.md')}.", *parts, orphan=True)


def tests_index(every: Evidence) -> str:
    """The files of tests that name clauses."""
    return page(
        "# Tests that name a clause",
        f"{link('What each folder of tests is for', '/tests/README.md')}.",
        table(
            ["file", "tests"],
            [
                [
                    link(code(path), f"tests/{test_page(path)}.md"),
                    ", ".join(test_link(each) for each in tests if "::" in each),
                ]
                for path, tests in by_file(every).items()
            ],
        ),
    )
