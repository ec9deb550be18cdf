# SPDX-License-Identifier: Apache-2.0
"""The adapter of transformers: three cases in every dtype, with each attention."""

from __future__ import annotations

from pathlib import Path

import pytest

from refmoe.engines.protocol import TAPS
from refmoe.engines.results import read_results
from tests.command_line import Refmoe

pytestmark = pytest.mark.engines

CASES = ("walking-skeleton", "batch-ragged", "window-chunks")
"""Chunks and decoding, several sequences, a window."""
UNSEEN = {"eager": {"attention.scores"}, "sdpa": {"attention.scores", "attention.probs"}}


@pytest.mark.parametrize("attention", UNSEEN)
def test_it_is_conformant_in_every_dtype(attention: str, refmoe: Refmoe, tmp_path: Path) -> None:
    golden, out = Path(__file__).parents[2] / "golden", tmp_path / "results.json"
    cases = [word for case in CASES for word in ("--case", case)]
    option = f"attention={attention}"
    status, said, err = refmoe(
        "conform", "--adapter", "transformers", "--option", option, "--golden", golden, *cases, "--out", out
    )  # fmt: skip
    assert status == 0, said + err
    results = read_results(out)
    assert results.counts == {"conformant": 12}
    assert {each.policy for each in results.outcomes} == {f"hf-{each.dtype}" for each in results.outcomes}
    seen = set(results.outcomes[0].worst_errors) | {"router.experts"}
    assert set(TAPS) - seen == UNSEEN[attention]


def test_an_option_that_is_none_is_one_sentence(refmoe: Refmoe) -> None:
    golden = Path(__file__).parents[2] / "golden"
    for option, words in (("attention=flash", "option attention is 'flash'"), ("threads=0", "option threads is '0'")):
        status, _, err = refmoe("conform", "--adapter", "transformers", "--golden", golden, "--option", option)
        assert status == 2
        assert words in err
