# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of conformance: the harnesses of `tests/engines/harnesses` as commands, and runs of them."""

from __future__ import annotations

import sys
from pathlib import Path

from refmoe.engines.conform import Suite, Watch, conform
from refmoe.engines.harness import Harness
from refmoe.engines.judge import Judge
from refmoe.engines.results import Outcome, Results
from refmoe.suite import Case, read_case

GOLDEN = Path(__file__).parents[2] / "golden"
HARNESSES = Path(__file__).parent / "harnesses"
HONEST = [sys.executable, str(HARNESSES / "honest.py")]
LIMIT = 60.0
"""Seconds for a request that must succeed, even on a busy machine."""


def hostile(name: str, case: str) -> list[str]:
    """The command of a harness that misbehaves in one case."""
    return [sys.executable, str(HARNESSES / "hostile.py"), name, case]


def says(*lines: str, rest: str = "") -> list[str]:
    """The command of a harness that gives these answers to any requests, and then runs the statements in `rest`."""
    script = (
        f"import sys, os, time\nfor line in {list(lines)!r}:\n    sys.stdin.readline()\n    print(line, flush=True)\n"
    )
    return [sys.executable, "-S", "-c", f"{script}{rest}"]


def case_named(name: str) -> Case:
    return read_case(GOLDEN / name)


def ran(
    command: list[str], *cases: str, dtypes: tuple[str, ...] = ("float32",), smoke: str | None = None,
    limit: float = LIMIT, diagnosing: bool = False,
) -> tuple[Results, dict[str, str]]:  # fmt: skip
    """The results of a harness in these cases, and per case the end of its standard error.

    smoke: the case of the smoke test; None: no smoke test.
    """
    logs: dict[str, str] = {}

    def log(outcome: Outcome, said: str) -> None:
        logs[outcome.case] = said

    suite = Suite(
        cases=[case_named(name) for name in cases],
        smoke=[case_named(smoke)] if smoke else [],
        dtypes=dtypes,
        judge=Judge(diagnosing=diagnosing),
    )
    return conform(Harness(command, limit), {"command": "test"}, suite, Watch(log)), logs
