# SPDX-License-Identifier: Apache-2.0
"""The book: its first page, the list of steps, the clauses and their code, and all other pages by name."""

from __future__ import annotations

import ast
from itertools import groupby
from pathlib import Path

from docs.bookmaker.bug_pages import bugs_index, bugs_page, by_kind, quantised_page
from docs.bookmaker.case_pages import by_family, by_file, cases_page, tests_index, tests_page
from docs.bookmaker.evidence import (
    Evidence,
    evidence,
    parsed,
)
from docs.bookmaker.example import example
from docs.bookmaker.figure_pages import certificates_page, engines_page, rounding_page
from docs.bookmaker.markdown import (
    block,
    code,
    contents,
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
from docs.bookmaker.step_pages import bug_link, case_link, step_page, test_link, test_page
from refmoe.bugs.catalogue import MUTANTS
from refmoe.spec.config import PRESETS
from refmoe.suite.audit import AREAS, PACKAGE, Coverage

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
    made["bugs/quantised.md"] = quantised_page(root)
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
