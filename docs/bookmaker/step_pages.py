# SPDX-License-Identifier: Apache-2.0
"""The page of a step: clauses, equation, code, shapes, worked example, rounding, known bugs, tests, engines."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator

import numpy as np

from docs.bookmaker.equations import equations
from docs.bookmaker.evidence import Evidence, difference, failures_at, title, worst
from docs.bookmaker.example import Example, Value, shown
from docs.bookmaker.markdown import block, code, folded, link, listed, page, sentence, slug, table, text
from docs.bookmaker.spec_pages import LARGE, Function, Page, numbers
from refmoe.bugs.mutant import Mutant
from refmoe.engines.protocol import DTYPES
from refmoe.profiles.cut_points import CUT_POINTS
from refmoe.profiles.load import policy
from refmoe.suite.matrix.outcomes import POLICIES

IN_A_LINE = 3
"""Values in a line of a worked example: a telephone shows as many."""
MOST_CASES = 8
"""Cases in the list of those that kill the most bugs; the page of a bug has all."""


def step_page(step: Page, every: Evidence, worked: Example) -> str:
    """The page of one step."""
    first = step.first
    return page(
        f"# {code(first.name)}",
        text(first.headline),
        f"{link('The book', 'index.md')}. {callers(step)}",
        "## Clauses",
        listed(f"{link(clause, f'clauses/{clause}.md')} {text(words)}" for clause, words in step.clauses.items()),
        *equation(step),
        "## Code",
        *(part for each in step.functions for part in source(each)),
        *shape_table(step),
        *example_of(step, worked),
        *rounding_of(step),
        *bugs_of(step, every),
        *tests_of(step, every),
        *engines_of(step, every),
    )


def callers(step: Page) -> str:
    """The steps that call this one."""
    names = ", ".join(link(code(name), f"steps/{name}.md") for name in step.callers)
    return f"Called by {names}." if names else ""


def equation(step: Page) -> Iterator[str]:
    """The equations of the functions of a page."""
    made = [each for each in step.functions if isinstance(each.node, ast.FunctionDef)]
    if made:
        yield "## Equation"
        yield (
            "Typeset from the code below, statement by statement. A sum or a maximum names the axis over which it is "
            "taken. *result* is what the function returns."
        )
        for each in made:
            yield f"{code(each.name)}:" if len(made) > 1 else ""
            yield f"```{{math}}\n{equations(each)}\n```"


def source(function: Function) -> Iterator[str]:
    """The code as it stands."""
    yield f"{code(f'refmoe/spec/{function.file}')}, line {function.line}:"
    yield block("python", function.source, function.line)


def shape_table(step: Page) -> Iterator[str]:
    """The shapes of the arguments, with the numbers of a published size."""
    rows = [
        [code(each.name), code(name), text(shape), text(numbers(shape))]
        for each in step.functions
        for name, shape in each.shapes.items()
    ]
    if rows:
        yield "## Shapes"
        letters = link("The letters", "steps/index.md#the-letters-of-shapes")
        yield f"The last column has the numbers of {LARGE}. {letters}."
        yield table(["function", "value", "shape", "in the published model"], rows)


# ---- the worked example


def example_of(step: Page, worked: Example) -> Iterator[str]:
    """The values of the functions of a page, in one run of a golden case."""
    made = [each for each in step.functions if each.name in worked.values]
    if not made:
        return
    case, run = worked.case, worked.run
    yield "## Worked example"
    yield (
        f"Case {link(code(case.name), f'cases/{case.family}.md#{slug(case.name)}')}, run {code(run.run)}: "
        f"tokens {', '.join(map(str, run.tokens))}. The values are those of the first call. An array that is too long "
        "is shown in part, at the index that stands beside its name. A certificate is a proven bound on the distance "
        f"from the real number ({link('all certificates', 'certificates.md')})."
    )
    for each in made:
        yield f"### {code(each.name)} in numbers"
        for value in worked.values[each.name]:
            yield from value_of(value, len(run.tokens))


def value_of(value: Value, tokens: int) -> Iterator[str]:
    """One value: its name, shape, tap and certificate, then some numbers, then all of them exactly."""
    array = value.array
    if not array.ndim:
        yield f"{code(value.name)} = {code(array.item())}"
        return
    facts = [f"shape {list(array.shape)}", "given" if value.given else "computed"]
    facts += [f"tap {code(value.taps[0])}"] if value.taps else []
    facts += [certificate(value.bound)] if value.bound is not None else []
    if value.same_as:
        yield f"{code(value.name)} is {code(value.same_as)}: {', '.join(facts)}."
        return
    index, part = shown(array, tokens)
    yield f"{code(value.name)}: {', '.join(facts)}."
    yield block("text", "\n".join(rows_of(f"{value.name}{index}", part)))
    exact = json.dumps(array.tolist())
    yield folded(f"All {array.size} exact values", block("text", exact), "exact")


def certificate(bound: float) -> str:
    """A bound in words. The smallest number above zero is what zero is rounded up to."""
    return "certificate: exact" if bound <= np.nextafter(0, 1) else f"certificate {bound:.2g}"


def rows_of(name: str, array: np.ndarray) -> Iterator[str]:  # type: ignore[type-arg]
    """The numbers of an array, a few in a line, under the index of each row."""
    if array.ndim > 1:
        for i, each in enumerate(array):
            yield from rows_of(f"{name}[{i}]", each)
        return
    yield f"{name} ="
    shorter = [f"{number:>11.6g}" if array.dtype.kind == "f" else f"{int(number):>4}" for number in array]
    for start in range(0, len(shorter), IN_A_LINE):
        yield " ".join(shorter[start : start + IN_A_LINE])


# ---- rounding


def rounding_of(step: Page) -> Iterator[str]:
    """The cut points that the taps of a step show, with their dtypes under the generic policies."""
    rows = [
        [code(name), text(cut.about), *(str(policy(each).at(name)) for each in POLICIES)]
        for name, cut in CUT_POINTS.items()
        if {*step.taps} & {*cut.shown_by}
    ]
    if rows:
        yield "## What may round here"
        yield (
            "A value may always be more precise. "
            f"{link('All cut points, with the budgets of functions', 'rounding.md')}; "
            f"{link('policies', '/docs/policies.md')} of other engines."
        )
        yield table(["cut point", "what is rounded", *POLICIES], rows)


# ---- known bugs, tests, engines


def bugs_of(step: Page, every: Evidence) -> Iterator[str]:
    """The known bugs that break a clause of the page, each with its difference from the right step."""
    bugs = every.bugs_of(step.clauses)
    yield "## Known bugs that break it"
    if not bugs:
        yield "None in the catalogue: the tests below are the proof."
    for each in bugs:
        broken = ", ".join(link(clause, f"clauses/{clause}.md") for clause in each.breaks)
        yield f"**{bug_link(each)}** {text(each.about)} Breaks {broken}. {happened(each)}"
        yield folded(f"The change of {each.id}", block(*difference(each)))


def bug_link(bug: Mutant) -> str:
    """A link to the page of a known bug."""
    return link(bug.id, f"bugs/{bug.kind}.md#{slug(bug.id)}")


def happened(bug: Mutant) -> str:
    """The places where a bug was seen."""
    if not bug.sources:
        return ""
    return "Seen in " + ", ".join(link(place(each), each) for each in bug.sources) + "."


def place(address: str) -> str:
    """The short name of an issue: ``vllm#1234`` of its address."""
    parts = address.rstrip("/").split("/")
    if "github.com" in address and len(parts) > 6 and parts[5] in ("issues", "pull"):
        return f"{parts[4]}\\#{parts[6]}"
    return text(address.removeprefix("https://"))


def test_link(test: str) -> str:
    """A link to the source of a test."""
    path, _, name = test.partition("::")
    anchor = f"#{slug(name)}" if name else ""
    shown_as = code(name or path)
    return link(shown_as, f"tests/{test_page(path)}.md{anchor}")


def test_page(path: str) -> str:
    """The name of the page of a test file: ``spec-test_model`` of ``tests/spec/test_model.py``."""
    return path.removeprefix("tests/").removesuffix(".py").replace("/", "-")


def tests_of(step: Page, every: Evidence) -> Iterator[str]:
    """The tests that name the clauses of a page, and the cases that see its bugs."""
    yield "## Tests and cases"
    yield table(
        ["clause", "tests that name it", "cases made for it"],
        [
            [
                link(clause, f"clauses/{clause}.md"),
                ", ".join(map(test_link, every.clauses[clause].tests)),
                ", ".join(case_link(every, name) for name in every.clauses[clause].cases),
            ]
            for clause in step.clauses
        ],
    )
    bugs = every.bugs_of(step.clauses)
    killers = every.killers(bugs)
    if killers:
        best = ", ".join(f"{case_link(every, name)} ({len(seen)})" for name, seen in [*killers.items()][:MOST_CASES])
        yield f"Of the {sentence(len(bugs), 'known bug')} above, the cases that see the most: {best}."


def case_link(every: Evidence, name: str) -> str:
    """A link to a case, or to the document of the vectors where it is a file of them."""
    if name in every.families:
        return link(name, f"cases/{every.families[name]}.md#{slug(name)}")
    return link(code(name), "/golden/vectors/FORMAT.md") if name.startswith("vectors/") else code(name)


def errors_table(every: Evidence, taps: tuple[str, ...]) -> str:
    """The worst error of each engine at some taps, at each dtype."""
    measured = [(title(results), worst(results, taps)) for results in every.engines]
    return table(
        ["engine", *DTYPES],
        [
            [text(name), *(f"{errors[each]:.3f}" if each in errors else "" for each in DTYPES)]
            for name, errors in measured
            if errors
        ],
    )


def engines_of(step: Page, every: Evidence) -> Iterator[str]:
    """The errors that were measured at the taps of a step, and the engines that are wrong there."""
    if not step.taps:
        return
    taps = ", ".join(link(code(tap), f"engines.md#{slug(tap)}") for tap in step.taps)
    yield "## Engines measured here"
    yield (
        f"The worst error of each engine at {taps}, over all cases in which it conforms. 1 is the largest error that "
        "its policy allows."
    )
    yield errors_table(every, step.taps)
    yield listed(
        f"{text(title(results))} at {outcome.dtype}, case {case_link(every, outcome.case)}: {text(known.reason)}"
        for results, outcome, known in failures_at(every, step.taps)
    )
