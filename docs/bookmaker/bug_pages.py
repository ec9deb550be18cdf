# SPDX-License-Identifier: Apache-2.0
"""The pages of known bugs: each class, and the list of all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.quantised_bugs import LIMITS, passes
from docs.bookmaker.evidence import (
    Evidence,
    difference,
)
from docs.bookmaker.markdown import (
    block,
    code,
    contents,
    folded,
    link,
    page,
    sentence,
    table,
    text,
)
from docs.bookmaker.step_pages import bug_link, case_link, happened
from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.mutant import Mutant
from refmoe.bugs.quantised.bug import QuantisedBug
from refmoe.bugs.quantised.catalogue import QUANTISED
from refmoe.suite.matrix.outcomes import POLICIES

CONDITIONS = "/golden/CASES.md#the-conditions"
USUAL = {
    "product": f"the normalised error of each product within {LIMITS['product']:g}",
    "cosine": f"the cosine of the logits at least {LIMITS['cosine']:g}",
    "divergence": f"the mean KL divergence within {LIMITS['divergence']:g}",
    "tokens": "the same tokens, generated greedily",
}
"""The usual checks of a quantised engine, in words."""


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
    rows = quantised_rows(every.root)
    parts += [
        f"## {link('quantised', 'bugs/quantised.md')}",
        table(
            ["bug", "what it does", "usual checks that it passes"],
            [[bug_link(bug), text(bug.about), str(sum(passes(rows[bug.id]).values()))] for bug in QUANTISED.values()],
        ),
    ]
    return page(
        "# Known bugs",
        "Each is a bug that an implementation had. It is run as if it were somebody's engine, and judged: "
        f"{link('what is measured', '/docs/measurements.md#known-bugs-that-the-cases-catch')}.",
        *parts,
        contents(f"bugs/{kind}" for kind in (*(kind for kind, _ in by_kind()), "quantised")),
    )


# ---- bugs of quantised matrices


def quantised_rows(root: Path) -> dict[str, dict[str, Any]]:
    """Per bug of quantised matrices what was measured of it.   root: the repository"""
    rows = json.loads((root / "bench" / "results" / "quantised_bugs.json").read_text(encoding="utf-8"))
    return {row["bug"]: row for row in rows}


def quantised_page(root: Path) -> str:
    """The known bugs of quantised matrices. They run on models in their formats, and not on the cases."""
    rows = quantised_rows(root)
    parts = [part for each in QUANTISED.values() for part in quantised_parts(each, rows[each.id])]
    return page(
        "# Known bugs: quantised",
        f"{link('All known bugs', 'bugs/index.md')}. Each runs in the ideal engine of a policy, on a case in a format "
        f"that shows it: {link('what is measured', '/docs/measurements.md#bugs-of-quantised-engines')}.",
        *parts,
    )


def quantised_parts(bug: QuantisedBug, row: dict[str, Any]) -> Iterator[str]:
    """One known bug of quantised matrices: what it does, where it happened, what shows it, and what lets it pass."""
    passed = [words for name, words in USUAL.items() if passes(row)[name]]
    yield f"## {bug.id}"
    yield f"{text(bug.about)} {happened(bug)}"
    yield table(
        ["fact", "value"],
        [
            ["formats", ", ".join(map(code, bug.formats))],
            ["wrong products", ", ".join(map(code, bug.touches))],
            ["first wrong step", f"{code(row['first_wrong'])}, in {code(row['model'])} under {code(row['policy'])}"],
            ["usual checks that it passes", "; ".join(passed) or "none"],
            ["to mend it", text(bug.fix)],
        ],
    )
