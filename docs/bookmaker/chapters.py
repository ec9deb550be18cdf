# SPDX-License-Identifier: Apache-2.0
"""The chapters of the book: steps, clauses, known bugs, cases, tests, code, rounding, certificates, engines."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from docs.bookmaker.evidence import (
    Evidence,
    difference,
    evidence,
    failures_at,
    parsed,
    source_of_test,
    title,
)
from docs.bookmaker.example import example
from docs.bookmaker.markdown import (
    block,
    code,
    contents,
    folded,
    link,
    listed,
    minutes,
    page,
    sentence,
    slug,
    table,
    text,
)
from docs.bookmaker.questions import questions_page
from docs.bookmaker.spec_pages import LARGE, SIZES, Page, pages
from docs.bookmaker.step_pages import bug_link, case_link, errors_table, happened, step_page, test_link, test_page
from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.mutant import Mutant
from refmoe.profiles.cut_points import CUT_POINTS
from refmoe.profiles.load import budget_in_words, policies, policy
from refmoe.spec.config import PRESETS
from refmoe.spec.taps import LAYER_TAPS, MODEL_TAPS
from refmoe.suite import FAMILIES, Case, read_manifest
from refmoe.suite.audit import AREAS, PACKAGE, Coverage
from refmoe.suite.matrix.outcomes import POLICIES

DOCUMENTS = {
    "model": ("How a trace is judged", "/docs/verification.md"),
    "arithmetic": ("Sums of products", "/golden/dot.md"),
    "ranks": ("Ranks in a policy", "/docs/policies.md"),
    "text": ("Checkpoints and their text", "/docs/checkpoints.md#text"),
    "routers of the literature": ("Routers", "/docs/routers.md"),
    "router contract": ("The contract of routers", "/docs/router-contract.md#the-laws"),
}
"""Per area the document about it."""
MEASURED = {
    "model": ("known bugs that the cases catch", "known-bugs-that-the-cases-catch"),
    "arithmetic": ("the same bits everywhere", "the-same-bits-everywhere"),
    "ranks": ("known bugs that the cases catch", "known-bugs-that-the-cases-catch"),
    "text": ("known bugs that the cases catch", "known-bugs-that-the-cases-catch"),
    "routers of the literature": ("known bugs that the cases catch", "known-bugs-that-the-cases-catch"),
    "router contract": ("whatever a stranger hands in", "whatever-a-stranger-hands-in"),
}
"""Per area the figures that were measured."""
CONDITIONS = "/golden/CASES.md#the-conditions"
MOST_RUNS = 12
"""Runs of a case that its page names."""
READING = (
    ("The arithmetic of a golden", "/golden/arithmetic.md"),
    ("Sums of products", "/golden/dot.md"),
    ("Elementary functions", "/golden/elementary.md"),
    ("Policies", "/docs/policies.md"),
    ("How a trace is judged", "/docs/verification.md"),
    ("Cases, traces, manifests", "/golden/FORMAT.md"),
    ("The protocol of engines", "/refmoe/engines/PROTOCOL.md"),
    ("Findings in other engines", "/docs/findings.md"),
)
"""Documents that a reader takes between the model and its evidence, in this order."""


def book(root: Path) -> dict[str, str]:
    """Every page of the book: its name to its text.   root: the repository"""
    every = evidence(root)
    steps = pages(root / "refmoe")
    worked = example(root / "golden", steps)
    made = {f"steps/{each.name}.md": step_page(each, every, worked) for each in steps}
    made |= {f"clauses/{name}.md": clause_page(row, every, steps) for name, row in every.clauses.items()}
    made |= {f"bugs/{kind}.md": bugs_page(kind, [*bugs], every) for kind, bugs in by_kind()}
    made |= {f"cases/{family}.md": cases_page(family, [*cases], every) for family, cases in by_family(every)}
    made |= {f"tests/{test_page(path)}.md": tests_page(path, tests, every) for path, tests in by_file(every).items()}
    made |= {f"code/{slug(area)}.md": code_page(area, every) for area in AREAS.values() if area != "model"}
    made["rounding.md"] = rounding_page()
    made["certificates.md"] = certificates_page(every)
    made["engines.md"] = engines_page(every)
    made["steps/index.md"] = steps_index(steps)
    made["clauses/index.md"] = clauses_index(every)
    made["bugs/index.md"] = bugs_index(every)
    made["tests/index.md"] = tests_index(every)
    made["questions.md"] = questions_page(every)
    made["index.md"] = index(root, made, steps, every)
    return made


# ---- the first page


def index(root: Path, made: dict[str, str], steps: list[Page], every: Evidence) -> str:
    """The first page: what the book holds, in reading order, with the time that it takes."""
    chapters = [("An auditor's ten questions", "questions.md"), ("The letters of shapes", "steps/index.md")]
    chapters += [(code(each.name), f"steps/{each.name}.md") for each in steps]
    chapters += [("What may round, and how far functions may be off", "rounding.md")]
    after = [
        ("How far goldens are from the real numbers", "certificates.md"), ("Engines, step by step", "engines.md"),
        ("All clauses", "clauses/index.md"), ("Known bugs", "bugs/index.md"), ("Tests", "tests/index.md"),
    ]  # fmt: skip
    rows, total = [], 0
    for name, target in [*chapters, *READING, *after]:
        own = made[target] if target in made else (root / target[1:]).read_text(encoding="utf-8")
        time = minutes(own)
        total += time
        rows.append([link(name, target), str(time)])
    counts = every.audited.counts
    stale = every.audited.stale
    return page(
        "# The auditor's book",
        "**Question: what does the specification say, and what proves each sentence of it?** Every page of the book is "
        "made from the code, the goldens and the files of results. Nothing of it is typed by hand.",
        f"The specification states {counts['all']['stated']} clauses, {counts['forward pass']['stated']} of them about "
        f"the forward pass. Of these, {counts['forward pass']['named by a test']} are named by a test, and "
        f"{counts['forward pass']['with a killed mutant']} are broken by a known bug that is caught.",
        f"The matrix of bugs and cases is older than this code in: {', '.join(stale)}." if stale else "",
        "## In reading order",
        f"The minutes are counted from the words and the lines of code of each page: {total / 60:.1f} hours in all. "
        f"The model alone takes {sum(minutes(made[f'steps/{each.name}.md']) for each in steps)} minutes.",
        table(["page", "minutes"], rows),
        contents(["questions"]),
        contents(["steps/index", "rounding", "certificates", "engines"]),
        contents(
            ["clauses/index", "bugs/index", *(f"cases/{family}" for family, _ in by_family(every)), "tests/index"]
        ),
    )


def steps_index(steps: list[Page]) -> str:
    """The list of steps, and the letters of their shapes."""
    large = PRESETS[LARGE]
    return page(
        "# The model, step by step",
        "Each page has the clauses of a step, its equation, its code, and all evidence about it.",
        table(
            ["step", "what it does", "clauses"],
            [[link(code(e.name), f"steps/{e.name}.md"), text(e.first.headline), str(len(e.clauses))] for e in steps],
        ),
        "## The letters of shapes",
        "T is the number of tokens in a call, S that of cached positions with these, n any number of rows.",
        table(
            ["letter", "field", LARGE],
            [[letter, code(field), str(getattr(large, field))] for letter, field in SIZES.items()],
        ),
        contents(f"steps/{each.name}" for each in steps),
    )


# ---- clauses


def clause_page(row: Coverage, every: Evidence, steps: list[Page]) -> str:
    """The page of a clause: its text, and links to its code, tests, bugs, cases and measurements."""
    bugs = [MUTANTS[name] for name in row.mutants]
    killers = every.killers(bugs)
    family = row.clause.rpartition("-")[0]
    beside = [each for each in every.clauses if each.rpartition("-")[0] == family and each != row.clause]
    name, document = DOCUMENTS[row.area]
    measured, anchor = MEASURED[row.area]
    figures = [link(measured, f"/docs/measurements.md#{anchor}")]
    for step in steps:
        if row.clause in step.clauses:
            figures += [link(f"engines at {code(tap)}", f"engines.md#{slug(tap)}") for tap in step.taps]
    return page(
        f"# {row.clause}",
        "> " + text(row.text),
        f"{link('The book', 'index.md')}, {link('all clauses of its area', f'clauses/index.md#{slug(row.area)}')}.",
        f"Proof: {proof(row)}",
        "## Evidence",
        listed(
            f"**{what}:** {links or 'none'}"
            for what, links in (
                ("stated in", ", ".join(code_link(place) for place in row.code.split(", "))),
                ("tests that name it", ", ".join(map(test_link, row.tests))),
                ("known bugs that break it", ", ".join(map(bug_link, bugs))),
                ("cases made for it", ", ".join(case_link(every, each) for each in row.cases)),
                ("cases that catch such a bug", ", ".join(case_link(every, each) for each in killers)),
                ("measured", ", ".join(figures)),
                ("stated beside it", ", ".join(link(each, f"clauses/{each}.md") for each in beside)),
                ("read more", link(name, document)),
            )
        ),
        orphan=True,
    )


def proof(row: Coverage) -> str:
    """One sentence about the tests and the known bugs that prove a clause."""
    parts = [f"{sentence(len(row.tests), 'test names', 'tests name')} it"] if row.tests else []
    parts += [f"{sentence(len(row.killed), 'known bug that breaks it is', 'known bugs that break it are')} caught "
              "wherever a case can show it"] if row.killed else []  # fmt: skip
    return (" and ".join(parts) or "nothing yet") + "."


def code_link(place: str) -> str:
    """A link to the code that states a clause, ``spec/norm.py:10 rms_norm``."""
    path, _, name = place.partition(" ")
    file = path.partition(":")[0]
    if file.startswith("spec/"):
        return link(code(f"{file} {name}"), f"steps/{name}.md")
    area = next(area for folder, area in AREAS.items() if file.startswith(f"{folder}/"))
    return link(code(f"{file} {name}"), f"code/{slug(area)}.md#{slug(f'{file} {name}')}")


def clauses_index(every: Evidence) -> str:
    """Every clause, by area, with the counts of its evidence."""
    parts = []
    for area, of_area in groupby(every.clauses.values(), key=lambda row: row.area):
        rows = [
            [link(row.clause, f"clauses/{row.clause}.md"), text(row.text)]
            + [str(len(each)) for each in (row.tests, row.mutants, row.cases)]
            for row in of_area
        ]
        parts.append(f"## {area}")
        parts.append(table(["clause", "text", "tests", "bugs", "cases"], rows))
    return page("# All clauses", f"Command: {code('refmoe suite audit')} prints the same.", *parts)


def code_page(area: str, every: Evidence) -> str:
    """The code outside the model that states the clauses of an area."""
    places = dict.fromkeys(
        place for row in every.clauses.values() for place in row.code.split(", ")
        if any(place.startswith(f"{folder}/") for folder, its in AREAS.items() if its == area)
    )  # fmt: skip
    parts = []
    for place in places:
        where, _, name = place.partition(" ")
        file, _, line = where.partition(":")
        parts.append(f"## {code(f'{file} {name}')}")
        parts.append(block("python", *source_at(PACKAGE / file, name, int(line))))
    return page(
        f"# Code: {area}", f"{link('The clauses of this area', f'clauses/index.md#{slug(area)}')}.", *parts, orphan=True
    )


def source_at(path: Path, name: str, line: int) -> tuple[str, int]:
    """The source of a function or class, or the docstring of a module, with the number of its first line."""
    tree, lines = parsed(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (node.name, node.lineno) == (name, line):
            return "\n".join(lines[line - 1 : node.end_lineno]), line
    first = tree.body[0]
    return "\n".join(lines[first.lineno - 1 : first.end_lineno]), first.lineno


# ---- known bugs


def by_kind() -> Iterator[tuple[str, Iterator[Mutant]]]:
    """The known bugs by their class, in the order of the catalogue."""
    yield from groupby(MUTANTS.values(), key=lambda each: each.kind)


def bugs_page(kind: str, bugs: list[Mutant], every: Evidence) -> str:
    """The known bugs of a class."""
    parts = [part for each in bugs for part in bug_parts(each, every)]
    return page(f"# Known bugs: {kind.replace('_', ' ')}", f"{link('All known bugs', 'bugs/index.md')}.", *parts)


def bug_parts(bug: Mutant, every: Evidence) -> Iterator[str]:
    """One known bug: what it does, where it happened, what it changes, what catches it."""
    yield f"## {bug.id}"
    yield f"{text(bug.about)} {happened(bug)}"
    yield table(
        ["fact", "value"],
        [
            ["breaks", ", ".join(link(each, f"clauses/{each}.md") for each in bug.breaks)],
            ["first seen at", ", ".join(map(code, bug.touches)) or "no tap of a forward pass"],
            [
                "needs",
                ", ".join(link(code(each), CONDITIONS) for each in bug.needs) or "nothing",
            ],
            ["severity", bug.severity],
            ["to mend it", text(bug.fix)],
        ],
    )
    yield block(*difference(bug))
    kills = every.kills[bug.id]
    rows = []
    for name in POLICIES:
        if kills[name]:
            steps = ", ".join(code(step) for step in dict.fromkeys(at.split(" ")[0] for at in kills[name].values()))
            rows.append([name, str(len(kills[name])), steps])
        elif name in bug.unseen:
            rows.append([name, "0", text(bug.unseen[name])])
    yield table(["dtype", "cases that catch it", "first wrong step there"], rows)
    names = sorted(every.killing(bug.id))
    if names:
        yield folded(
            f"The {sentence(len(names), 'case')} that catch {bug.id}",
            ", ".join(case_link(every, each) for each in names),
        )
    for place, vectors in every.matrix.outside.get(bug.id, {}).items():
        named = ", ".join(map(text, vectors))
        yield f"Caught by {sentence(len(vectors), 'vector')} of {case_link(every, place)}: {named}."
    if bug.equivalent:
        yield f"No legal run shows it: {text(bug.equivalent)}."


def bugs_index(every: Evidence) -> str:
    """Every known bug, by class, with the number of cases that catch it."""
    parts = []
    for kind, bugs in by_kind():
        rows = []
        for bug in bugs:
            seen = every.killing(bug.id)
            vectors = sum(map(len, every.matrix.outside.get(bug.id, {}).values()))
            caught = sentence(len(seen), "case") if seen else sentence(vectors, "vector") if vectors else "none can"
            rows.append([bug_link(bug), text(bug.about), caught])
        parts += [
            f"## {link(kind.replace('_', ' '), f'bugs/{kind}.md')}",
            table(["bug", "what it does", "caught by"], rows),
        ]
    return page(
        "# Known bugs",
        "Each is a bug that an implementation had. It is run as if it were somebody's engine, and judged: "
        f"{link('what is measured', '/docs/measurements.md#known-bugs-that-the-cases-catch')}.",
        *parts,
        contents(f"bugs/{kind}" for kind, _ in by_kind()),
    )


# ---- cases and tests


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


MOST_RUNS = 12


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


# ---- rounding, certificates, engines


def rounding_page() -> str:
    """Every cut point and budget under the generic policies, and the list of policies."""
    generic = [policy(name) for name in POLICIES]
    budgets = ("exp", "angles", "circle")
    return page(
        "# What may round, and how far functions may be off",
        "A policy says which dtype an engine may round to at each cut point. A value may always be more precise. The "
        f"three generic policies are below; {link('policies', '/docs/policies.md')} says how to change one.",
        "## Cut points",
        table(
            ["cut point", "what is rounded", "shown by", *POLICIES],
            [
                [
                    code(name),
                    text(cut.about),
                    ", ".join(map(text, cut.shown_by)),
                    *(str(each.at(name)) for each in generic),
                ]
                for name, cut in CUT_POINTS.items()
            ],
        ),
        "## Budgets of functions",
        "Nothing but its author bounds the exp of an engine. So these are tolerances, in units of the roundoff of the "
        "dtype of statistics.",
        table(
            ["budget", *POLICIES, "source"],
            [
                [
                    each,
                    *(text(budget_in_words(getattr(p, each))) for p in generic),
                    text(getattr(generic[0], each).source),
                ]
                for each in budgets
            ],
        ),
        "## All policies",
        table(
            ["policy", "whose arithmetic", "read from"],
            [[code(p.name), text(p.about), text(p.source)] for p in policies()],
        ),
    )


def certificates_page(every: Evidence) -> str:
    """The certificate of each case."""
    return page(
        "# How far goldens are from the real numbers",
        "A certificate is a proven bound on the distance between each golden value and the real number that it stands "
        "for. Arb computes it in ball arithmetic, from the same specification. "
        f"Command: {code('refmoe suite certify')}; code: {code('refmoe/suite/certify.py')}. The bounds of each tap are "
        f"in the manifest of the case ({link('format', '/golden/FORMAT.md#manifests')}).",
        table(
            ["case", "certificate", "its worst tap", "decisions that are not proven"],
            [
                [
                    case_link(every, case.name), certificate_words(certificate),
                    code(certificate["worst"]["tensor"]),  # type: ignore[index]
                    ", ".join(map(code, certificate["decisions"]["unproven"][:3]))  # type: ignore[index]
                    + (" …" if len(certificate["decisions"]["unproven"]) > 3 else ""),  # type: ignore[index]
                ]
                for case, certificate in every.certificates()
            ],
        ),
        "A decision that is not proven is an exact tie, made on purpose.",
    )  # fmt: skip


def engines_page(every: Evidence) -> str:
    """The worst error of each engine at each tap."""
    parts = []
    for tap in ("embedding", *LAYER_TAPS, "final_norm", "logits"):
        errors = errors_table(every, (tap,))
        parts += [f"## {tap}", errors or "No engine shows it, or it has no size of error."]
        parts.append(
            listed(
                f"First wrong here: {text(title(results))} at {outcome.dtype}, case {case_link(every, outcome.case)}: "
                f"{text(known.reason)}"
                for results, outcome, known in failures_at(every, (tap,))
            )
        )
    assert {*MODEL_TAPS} == {"embedding", "final_norm", "logits"}
    return page(
        "# Engines, step by step",
        "The worst error of each engine at each tap, over all cases in which it conforms. 1 is the largest error that "
        "its policy allows. An empty cell was not run, or does not show the tap. "
        f"{link('All verdicts', '/docs/measurements.md#real-engines')}; {link('findings', '/docs/findings.md')}. "
        f"The files are in {code('bench/results/conform')}.",
        *parts,
    )
