"""The examples that laws are tried on: drawn once for all routers, the same at every run."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase

from refmoe.routers.contract.declaration import Declaration
from refmoe.routers.contract.examples import Example, Strategy
from refmoe.routers.contract.law import Law


def settings(count: int, *phases: Phase) -> hypothesis.settings:
    """Settings for Hypothesis under which every run has equal examples and writes no files."""
    return hypothesis.settings(
        max_examples=count, phases=phases, database=None, deadline=None, derandomize=False, print_blob=False,
        report_multiple_bugs=False, suppress_health_check=list(HealthCheck), verbosity=hypothesis.Verbosity.quiet,
    )  # fmt: skip


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

    @hypothesis.seed(0)
    @settings(count, Phase.generate)
    @hypothesis.given(strategy(declaration))
    def collect(example: Example) -> None:
        drawn.append(example)

    collect()
    return tuple(drawn)
