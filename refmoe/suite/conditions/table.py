# SPDX-License-Identifier: Apache-2.0
"""The table of cases and conditions, and the check of each case's declaration."""
# ruff: noqa: I001  (the order of imports is the order of the table: each registers its conditions)

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from refmoe.suite.conditions import calls, shapes, windows, magnitudes, decisions  # noqa: F401
from refmoe.suite.conditions.observed import CONDITIONS, Observed
from refmoe.suite import compute, is_emitted, trace_path
from refmoe.suite.case import FAMILIES, PRODUCTION, SMALL, Case
from refmoe.traces.trace import read_trace

ABOUT = {
    SMALL: "small: dimensions as small as a bug allows",
    PRODUCTION: "production: dimensions that the kernels of production engines take",
}
"""Per family its heading."""
NOT_OF_A_CASE = {
    "POISON": "memory filled with NaN before a call: what a harness does, on any case with EMPTY or DECODE",
    "REPEAT": "the same call twice: what a harness does, on any case",
    "TRAINFLAG": "a model in training mode: what a harness does, on any case",
    "PAR": "several devices: what a harness does, on any case with COVER",
    "QUANT": "a quantised checkpoint: goldens are of unquantised ones",
    "TOK": "text to tokens: vectors of their own",
    "GEN": "choosing tokens from logits: vectors of their own",
    "LOSS": "auxiliary losses: vectors of their own",
}
"""Needs of known bugs that no case can satisfy, and the harness or vectors that do."""


def holding(case: Case, arrays: Mapping[str, NDArray[Any]]) -> list[str]:
    """The names of the conditions that hold, in the order of the table."""
    seen = Observed(case, arrays)
    return [each.name for each in CONDITIONS.values() if each.holds(seen)]


def golden_arrays(case: Case) -> Mapping[str, NDArray[Any]]:
    """Every tap of a case by ``<run>/<tap>``: read from the golden trace, or else computed."""
    if case.store != "trace" or not is_emitted(case):
        return compute(case)
    return {key: tensor.map() for key, tensor in read_trace(trace_path(case.folder)).tensors.items()}


def render(cases: list[Case]) -> str:
    """The text of golden/CASES.md."""
    families = {name: [case for case in cases if case.family == name] for name in FAMILIES}
    present = {name: members for name, members in families.items() if members}
    lines = [
        "# Cases and conditions",
        "",
        "Written by `python -m refmoe.suite.conditions --write` from the case.toml files. A test checks three",
        "things. The table is current. A case declares exactly the conditions that hold in its golden. Each condition",
        "has a case.",
    ]
    for name, members in present.items():
        lines += ["", f"## {ABOUT[name]}", "", *_grid(members)]
    lines += [
        "",
        "## The conditions",
        "",
        f"| condition | holds when there is | its name in the needs of known bugs | {' | '.join(present)} |",
        f"|---|---|---|{'---|' * len(present)}",
    ]
    for each in CONDITIONS.values():
        counts = [str(sum(each.name in case.conditions for case in members)) for members in present.values()]
        lines.append(f"| `{each.name}` | {each.what} | {', '.join(each.needs)} | {' | '.join(counts)} |")
    lines += ["", "What known bugs need that no case can give:", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {why} |" for name, why in NOT_OF_A_CASE.items()]
    return "\n".join(lines) + "\n"


def _grid(cases: list[Case]) -> list[str]:
    """A line for each condition with a mark for each case, then a line for each case."""
    width = max(map(len, CONDITIONS))
    numbers = range(1, len(cases) + 1)
    return [
        "```",
        f"{'':{width}} {''.join(str(n // 10) if n > 9 else ' ' for n in numbers)}",
        f"{'':{width}} {''.join(str(n % 10) for n in numbers)}",
        *(
            f"{name:{width}} {''.join('x' if name in case.conditions else '.' for case in cases)}"
            for name in CONDITIONS
        ),
        "```",
        "",
        "| | case | shows | conditions |",
        "|---|---|---|---|",
        *(f"| {n} | `{case.name}` | {summary(case)} | {len(case.conditions)} |" for n, case in enumerate(cases, 1)),
    ]


def summary(case: Case) -> str:
    """The first sentence of a case's `why`."""
    return " ".join(case.why.split()).partition(". ")[0].rstrip(".")


def mistakes(case: Case) -> list[str]:
    """The differences between the conditions that a case declares and those that hold, in words."""
    holds = holding(case, golden_arrays(case))
    found = [f"{name} is declared but does not hold" for name in case.conditions if name not in holds]
    return found + [f"{name} holds but is not declared" for name in holds if name not in case.conditions]
