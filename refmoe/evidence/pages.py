# SPDX-License-Identifier: Apache-2.0
"""The documents of a package as pages for people, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from refmoe.engines.results import Results
from refmoe.evidence.declared import Declared
from refmoe.evidence.layout import (
    CHECKPOINTS,
    CLAUSES,
    CONTENTS,
    EPSILON,
    LIMITS,
    POWER,
    READINGS,
    REPORT,
    RULES,
    SUMMARY,
    TESTS,
    TRACED,
)
from refmoe.files.markdown import table
from refmoe.files.reading import own_text
from refmoe.suite.audit import AREAS

MOST = 40
"""The most names in a line of a page; the document has all."""
MODEL = AREAS["spec"]
"""The area of the clauses that a forward pass is about."""
TINY = 1e-300
"""A bound below it is that of an exact value."""


def pages(declared: Declared, results: Results, documents: Mapping[str, Any]) -> dict[str, str]:
    """The pages by the names of their files.   documents: those of the package, by name"""
    return {
        REPORT: _text(_report(declared, results, documents)),
        TRACED: _text(_traced(documents)),
        LIMITS: own_text("refmoe.evidence", LIMITS).rstrip() + "\n\n" + _text(_limits(documents)),
        READINGS: own_text("refmoe.evidence", READINGS),
    }


def _text(lines: Iterable[str]) -> str:
    return "\n".join(lines).rstrip() + "\n"


def _report(declared: Declared, results: Results, documents: Mapping[str, Any]) -> Iterable[str]:
    summary = documents[SUMMARY]
    yield from (f"# {summary['engine']['name']} {summary['engine']['version']}: {summary['result']}", "")
    options = ", ".join(f"{name}={value}" for name, value in summary["engine"]["options"].items())
    own = declared.refmoe
    yield from _table(("what", "", "who says so"), [
        ("engine", f"{summary['engine']['name']} {summary['engine']['version']}", "the engine"),
        ("options", options or "none", "the run"),
        ("build", declared.build or "not declared", "the author of this package"),
        ("files of the engine", _names(f"{name} `{digest}`" for name, digest in declared.artifacts.items()),
         "the author; digests by refmoe"),
        ("machine of the run", " ".join(summary["platform"].values()), "refmoe"),
        ("cases", f"{len(summary['cases'])} of {len(summary['cases']) + len(summary['not_run'])} of the suite; "
         f"`{LIMITS}` names the others", "the run"),
        ("date", declared.date, "the author of this package"),
        ("judged by", f"refmoe {summary['refmoe']}", "refmoe"),
        ("package by", f"refmoe {own['version']}, source `{own['source']}`", "refmoe"),
        ("commit", own.get("commit", "not a clean clone"), "git"),
        ("wheel", own.get("record", "not installed from a wheel"), "the list of files of the wheel"),
        ("package made with", _names(f"{name} {version}" for name, version in declared.environment.items()), "refmoe"),
        ("suite", f"`{own['suite']}`", "digest of the suite's manifest"),
        ("weights and tokens", _weights(summary), "the run"),
        ("significance", f"{summary['significance']:g} per case and dtype", "the run"),
        ("smoke test", results.smoke, "the run"),
    ])  # fmt: skip
    yield from (f"Note of the run: {note}\n" for note in results.notes)
    yield from ("## Check this package", "", *CHECK, "")
    yield from ("## Verdicts", "")
    yield from _table(("dtype", "policy", "verdicts"), [
        (dtype, _policy(at), ", ".join(f"{count} {verdict}" for verdict, count in at["verdicts"].items()))
        for dtype, at in summary["dtypes"].items()
    ])  # fmt: skip
    yield from _table(("case", "dtype", "verdict", "reason"), [
        (each.case, each.dtype, each.verdict, each.reason) for each in results.outcomes
    ])  # fmt: skip
    yield from _table(("case", "digest of its checkpoint"), [
        (name, f"`{found['digest']}`") for name, found in documents[CHECKPOINTS].items()
    ])  # fmt: skip
    yield from ("## The derived epsilon", "")
    yield from (f"- {sentence}" for sentence in documents[EPSILON]["argument"])
    yield ""
    for dtype, at in documents[EPSILON]["dtypes"].items():
        yield from _epsilon(dtype, at)
    yield from ("## Power", "")
    yield from _table(("dtype", "taps", "seen", "known", "shown to be absent", "judged by"), [
        (dtype, at["taps"] or "fewer than were measured", str(at["seen"]), str(at["known"]), str(len(at["absent"])),
         _policy(at))
        for dtype, at in documents[POWER].items()
    ])  # fmt: skip
    yield from ("## Clauses", "", f"`{TRACED}` has each clause. {OTHER_AREAS}", "")
    yield from _table(("area", "clauses", "named by a case of this run", "with a bug shown to be absent"), [
        (area, str(len(rows)), str(sum(bool(row["cases"]) for row in rows)),
         str(sum(any(row["bugs_absent"].values()) for row in rows)))
        for area, rows in _by_area(documents[CLAUSES]).items()
    ])  # fmt: skip
    yield from ("## Policies", "")
    for name, rules in documents[RULES].items():
        yield from (f"### {name}", "", rules["about"], "", f"Source: {rules['source']}", "")
        yield from _table(("field or cut point", "value"), [*rules["fields"].items()])
        yield from _table(("budget", "source"), [*rules["sources_of_budgets"].items()])
    yield from ("## The files", "")
    yield from _table(("file", "holds"), [(f"`{name}`", about) for name, about in CONTENTS.items()])


CHECK = (
    "The engine is not needed. `pip install 'refmoe[evidence,certify]'`, then:",
    "",
    "    refmoe evidence verify DIR --key PUBLIC-KEY",
    "",
    "Take the key from its owner, and not from this package. Every value and every page is derived again and compared. "
    "`sha256sum -c SHA256SUMS` compares the digests without refmoe.",
)
OTHER_AREAS = (
    "A run of cases is about the clauses of the model. Those of text, of ranks and of other routers are no part of a "
    "forward pass on one device, and no case names them."
)


def _traced(documents: Mapping[str, Any]) -> Iterable[str]:
    """Each clause, by area."""
    tests = documents[TESTS]["clauses"] if TESTS in documents else {}
    yield from ("# Each clause, with what proves it and what this run says about it", "", OTHER_AREAS, "")
    yield from (
        "A bug is *absent* where the engine conforms on a case that is known to show it. A case in brackets names the "
        f"clause, and was not run. `{CLAUSES}` and `{TESTS}` have the same for a program.",
        "",
    )
    for area, rows in _by_area(documents[CLAUSES]).items():
        yield from (f"## {area}", "")
        yield from _table(("clause", "text", "code", "tests", "known bugs that break it", "cases", "verdicts"), [
            (row["clause"], row["text"], f"`{row['code']}`",
             _lines(f"`{name}`" for name in tests.get(row["clause"], ())),
             _lines(_bug(bug, row["bugs_absent"]) for bug in row["bugs"]),
             _names([*row["cases"], *(f"({name})" for name in row["cases_not_run"])]), _verdicts(row["verdicts"]))
            for row in rows
        ])  # fmt: skip


def _bug(bug: str, absent: Mapping[str, Sequence[str]]) -> str:
    shown = [dtype for dtype, bugs in absent.items() if bug in bugs]
    return f"{bug} (absent in {', '.join(shown)})" if shown else bug


def _verdicts(by_dtype: Mapping[str, Mapping[str, int]]) -> str:
    return _lines(
        f"{dtype}: " + ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
        for dtype, verdicts in by_dtype.items()
        if verdicts
    )


def _lines(parts: Iterable[str]) -> str:
    return "; ".join(parts) or "none"


def _epsilon(dtype: str, at: Mapping[str, Any]) -> Iterable[str]:
    names = ("allowed", "accepted", "reached", "proven", "total", "relative")
    yield from (f"### {dtype}, by {at['policy']}, the largest of {at['cases']} cases", "")
    yield from _table(("step", *names), [
        (step, *(figure(bounds[name]) for name in names)) for step, bounds in at["steps"].items()
    ])  # fmt: skip
    end = at["end_to_end"]
    yield from _table(("end to end, in the logits", ""), [
        ("total: distance from the real numbers", figure(end["total"])),
        ("relative", figure(end["relative"])),
        ("from_tokens, allowed: the worst case under the policy", figure(end["from_tokens"]["allowed"])),
        ("from_tokens, accepted: independent roundings, at the significance", figure(end["from_tokens"]["accepted"])),
    ])  # fmt: skip


def _limits(documents: Mapping[str, Any]) -> Iterable[str]:
    summary = documents[SUMMARY]
    yield from ("## Of this package", "")
    yield from _table(("what was not tested", ""), [
        ("cases of the suite that were not run", _names(summary["not_run"])),
        ("dtypes that were run", _names(summary["dtypes"])),
        ("weights and tokens that were run", _weights(summary)),
        ("clauses of the model that no case of this run names", _names(
            row["clause"] for row in documents[CLAUSES] if not row["cases"] and row["area"] == MODEL)),
        ("clauses that no forward pass on one device is about", _names(
            f"{len(rows)} of {area}" for area, rows in _by_area(documents[CLAUSES]).items() if area != MODEL)),
    ])  # fmt: skip
    for dtype, at in documents[POWER].items():
        yield from (f"### {dtype}, by {_policy(at)}", "")
        yield from _table(("known bugs", "number", "names"), [
            ("that these taps do not show, where it was measured", str(len(at["unseen"])), _names(at["unseen"])),
            ("that this run does not show to be absent", str(len(at["not_excluded"])), _names(at["not_excluded"])),
            ("of text, sampling and losses, which no forward pass shows", str(len(at["outside"])),
             _names(at["outside"])),
        ])  # fmt: skip
        if at["matrix_changed"]:
            yield from (
                f"The matrix of bugs is older than this code: {_names(at['matrix_changed'])} changed since.",
                "",
            )


def _by_area(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["area"], []).append(row)
    return found


def _weights(summary: Mapping[str, Any]) -> str:
    return (
        f"those of fresh cases, by the seed {summary['fresh']}" if "fresh" in summary else "those of the golden cases"
    )


def _policy(at: Mapping[str, Any]) -> str:
    wider = {True: ", wider than the dtype's own", None: ", not one of refmoe's own", False: ""}
    return f"{at['policy']}{wider[at['wider']]}"


def figure(value: float | None) -> str:
    """A bound in words."""
    if value is None:
        return "no bound"
    return f"{value:.3g}" if value == 0 or value > TINY else f"< {TINY:.0e}"  # zero, rounded up


def _names(names: Iterable[str]) -> str:
    found = [*names]
    rest = f" and {len(found) - MOST} more" if len(found) > MOST else ""
    return ", ".join(found[:MOST]) + rest or "none"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    """A table with an empty line after it."""
    yield from (table(heads, rows), "")
