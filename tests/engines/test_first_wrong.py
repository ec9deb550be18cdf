# SPDX-License-Identifier: Apache-2.0
"""The place of the first wrong step: the token that a reader looks at first."""

from __future__ import annotations

from dataclasses import replace

import pytest

from refmoe.engines.first_wrong import first_token, wrong_choices
from refmoe.verifier.findings import CONFORMANT, FAIL, FORCED, LOCAL, Check, Decision, Element, Report


def report(tap: str, where: tuple[int, ...] | None, decisions: tuple[Decision, ...] = ()) -> Report:
    """A report whose first wrong step is this tap, with the index of its worst value."""
    worst = None if where is None else Element(where=where, found=1, expected=0, low=0, high=0, sigma=1)
    check = Check(run="prefill", tap=tap, since=(), rung=LOCAL, verdict=FAIL, reason="", worst=worst)
    return Report(
        trace="t", subject="s", producer="p", policy="float32", significance=1e-6, verdict="not conformant",
        headline="h", checks=(check,), decisions=decisions, first_wrong=("prefill", tap),
    )  # fmt: skip


def decision(layer: int, token: int, legal: bool, run: str = "prefill") -> Decision:
    return Decision(
        run=run, layer=layer, token=token, kind=FORCED, legal=legal, found=(1,), expected=(0,), margin=1, movable=0
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tap", "where", "token"),
    [
        ("layers.1.residual", (5, 7), 5),
        ("layers.1.attention.scores", (2, 9, 4), 9),  # [H, T, S]
        ("logits", (0, 3), 0),
        ("logprobs", (6, 1), 6),
        ("layers.0.router.weights", (4, 1), 4),
        ("layers.0.residual", None, None),
        ("layers.0.residual", (3,), None),
        ("layers.0.something", (3, 1), None),
    ],
)
def test_the_token_is_the_index_along_its_dimension(tap: str, where: tuple[int, ...] | None, token: int | None) -> None:
    assert first_token(report(tap, where)) == token


@pytest.mark.parametrize("step", ["router.experts", "router.weights"])
def test_a_wrong_choice_comes_first(step: str) -> None:
    made = (decision(0, 1, False), decision(1, 2, True), decision(1, 3, False, "decode1"), decision(1, 4, False))
    found = report(f"layers.1.{step}", (0, 0), made)
    assert [each.token for each in wrong_choices(found, "prefill", f"layers.1.{step}")] == [4]
    assert first_token(found) == 4


def test_a_conformant_trace_has_no_place() -> None:
    assert first_token(replace(report("logits", (0, 1)), first_wrong=None, verdict=CONFORMANT)) is None
