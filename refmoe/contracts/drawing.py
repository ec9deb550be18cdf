# SPDX-License-Identifier: Apache-2.0
"""The examples that laws are tried on: drawn once for all subjects, and equal at every run."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

from refmoe.contracts.law import Example, Law, Strategy

BLOCK_COUNTS = (31, 32, 33, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025)
"""Token counts around the block sizes of kernels."""


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


def examples_of(law: Law, declaration: Any, count: int) -> tuple[Example, ...]:
    """The examples of a law for a declaration."""
    return drawn_examples(law.examples, law.contract.sketch(declaration), count)


@lru_cache(maxsize=4096)
def drawn_examples(strategy: Callable[[Any], Strategy], declaration: Any, count: int) -> tuple[Example, ...]:
    """Examples drawn once, equal at every run, and used for every subject and law that ask for them."""
    drawn: list[Example] = []
    visit_examples(drawn.append, strategy(declaration), count)
    return tuple(drawn)


def permutations(size: int) -> Strategy:
    """Permutations of 0 .. size - 1, the identity when shrunk."""
    return st.binary(min_size=size, max_size=size).map(lambda b: np.argsort(np.frombuffer(b, np.uint8), kind="stable"))


def marks(size: int, one_in: int) -> Strategy:
    """Booleans [size], of which one in `one_in` is true on average, and none when shrunk."""
    return st.binary(min_size=size, max_size=size).map(lambda b: np.frombuffer(b, np.uint8) % one_in == 1)


def block_counts() -> Strategy:
    """Token counts at and around block boundaries."""
    return st.sampled_from(BLOCK_COUNTS)
