# SPDX-License-Identifier: Apache-2.0
"""The examples that laws are tried on: drawn once for all routers, and equal at every run."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase

from refmoe.routers.contract.declaration import Declaration
from refmoe.routers.contract.examples import Example, Strategy
from refmoe.routers.contract.law import Law


def visit_examples(visit: Callable[[Example], None], strategy: Strategy, count: int, shrink: bool = False) -> None:
    """Call `visit` with examples that Hypothesis draws. Every run draws equal examples and writes no files.

    shrink: after an exception of `visit`, try smaller examples. The last exception is raised.
    """

    def test(example: Example) -> None:
        visit(example)

    settings = hypothesis.settings(
        max_examples=count, phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,), database=None,
        deadline=None, derandomize=False, print_blob=False, report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck), verbosity=hypothesis.Verbosity.quiet,
    )  # fmt: skip
    run: Any = hypothesis.seed(0)(settings(hypothesis.given(strategy)(test)))
    run()


def examples_of(law: Law, declaration: Declaration, count: int) -> tuple[Example, ...]:
    """The examples of a law for a declaration."""
    return drawn_examples(law.examples, sketch(declaration), count)


@lru_cache(maxsize=4096)
def sketch(d: Declaration) -> Declaration:
    """The part of a declaration that its examples depend on. Routers with equal sketches get equal examples."""
    return Declaration(
        experts=d.experts,
        top_k=1,
        dtype=d.dtype,
        arithmetic=d.arithmetic or d.dtype,
        scoring="other" if d.scoring == "other" else "softmax",
        nan="raise" if d.nan == "raise" else "unspecified",
        gate=None if d.gate is None else np.eye(d.experts),
    )


@lru_cache(maxsize=4096)
def drawn_examples(
    strategy: Callable[[Declaration], Strategy], declaration: Declaration, count: int
) -> tuple[Example, ...]:
    """Examples drawn once, equal at every run, and used for every router and law that ask for them."""
    drawn: list[Example] = []
    visit_examples(drawn.append, strategy(declaration), count)
    return tuple(drawn)
