# SPDX-License-Identifier: Apache-2.0
"""A number that differs between layers, calls, heads or experts is never named as one, however near the two are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refmoe.verifier.diagnosis.grammar.evenness import Share, uneven
from tests.bugs.generated import Change, Generated, Place
from tests.bugs.generated_judging import WRONG, by_grammar, judge

NEAR = ((0.96, 0.97), (1.5, 1.53), (2.0, 2.03), (0.7, 0.71))
"""Pairs of factors, some roundoffs of bfloat16 apart."""


def by_layer(pair: tuple[float, float]) -> Change:
    return lambda x, where: x * pair[where.layer % 2]


def by_call(pair: tuple[float, float]) -> Change:
    return lambda x, where: x * pair[where.runs.index(where.run) % 2]


def by_head(pair: tuple[float, float]) -> Change:
    return lambda x, where: x * _parity(x, x.shape[1], pair)[None, :, None]


def by_expert(pair: tuple[float, float]) -> Change:
    def change(x: Any, where: Place) -> Any:
        chosen = where.memory["experts"]
        return x * _parity(x, int(chosen.max()) + 1, pair)[chosen][..., None]

    return change


def _parity(x: Any, count: int, pair: tuple[float, float]) -> Any:
    """The first factor at even numbers, the second at odd ones.   x: tells the dtype"""
    import torch

    return torch.as_tensor([pair[i % 2] for i in range(count)], dtype=x.dtype)


KINDS: dict[str, tuple[str, str, Callable[[tuple[float, float]], Change], str]] = {
    "layer": ("shared-prefix", "moe.output", by_layer, "a factor for each layer|layers? .*times"),
    "call": ("one-shot-chunked-stepwise", "residual", by_call, "$never"),
    "head": ("walking-skeleton", "attention.q", by_head, "a factor for each head|heads? .*times"),
    "expert": ("mini-8x7b", "expert.output", by_expert, "a factor for each expert|experts? .*times"),
}
"""Per kind of group a case, a step, the fault and the words that are right."""


@pytest.mark.engines
@pytest.mark.parametrize("pair", NEAR, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_near_factors_are_not_named_as_one(kind: str, pair: tuple[float, float]) -> None:
    case, step, change, accepts = KINDS[kind]
    fault = Generated(
        seed=-1, case=case, step=step, place="output", kind="near factors", axis="", detail=str(pair),
        accepts=(accepts,), change=change(pair),
    )  # fmt: skip
    found = judge(fault, "bfloat16", explain=by_grammar)
    assert found.verdict != WRONG, found


def shares(apart: float, rows: int, seed: int, shared: float = 0.0) -> list[Share]:
    """Two layers of rows of 12 values, with effects of 1 and errors of deviation 0.1 around coefficients that differ.

    shared: the deviation of an error that all values of a row have in common
    """
    random, made = np.random.default_rng(seed), []
    for layer in range(2):
        effect = np.ones((rows, 12))
        noise = 0.1 * random.standard_normal((rows, 12)) + shared * random.standard_normal((rows, 1))
        error = (1 + apart * layer) * effect + noise
        variance = np.full(effect.shape, 0.01)
        groups = {"layer": np.array(layer)}
        made.append(Share(error=error, effect=effect, predicted=20 * effect, variance=variance, groups=groups))
    return made


def test_groups_that_differ_are_found_and_others_are_not() -> None:
    """Half a deviation of one value is 1.7 of a row of 12, and 5 of 10 rows."""
    assert all(uneven(shares(0.5, 10, seed), unit=0.001) == "layer" for seed in range(50))
    assert not any(uneven(shares(0.0, 10, seed), unit=0.001) for seed in range(2000))


def test_an_error_that_a_row_shares_is_scatter_of_rows() -> None:
    assert not any(uneven(shares(0.0, 10, seed, shared=0.5), unit=0.001) for seed in range(2000))


def test_a_difference_below_a_roundoff_is_none() -> None:
    """A coefficient of 1.5 instead of 1 changes values of size 20 by 2.5 percent."""
    assert uneven(shares(0.5, 10, 1), unit=0.01) == "layer"
    assert not uneven(shares(0.5, 10, 1), unit=0.02)
