# SPDX-License-Identifier: Apache-2.0
"""Engines that give only what a server gives: the last position, and log-probabilities in place of logits."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from refmoe.engines.observations import has_golden_bits
from refmoe.suite import MANIFEST_FILE, trace_path
from refmoe.traces.held import held_trace
from refmoe.traces.trace import read_trace
from refmoe.verifier.findings import CONFORMANT
from tests.engines.running import HARNESSES, case_named, ran

CASES = ("walking-skeleton", "batch-ragged")


@pytest.mark.parametrize("given", ["logits", "logprobs", "top"])
def test_an_engine_that_gives_the_last_position_is_judged(given: str) -> None:
    command = [sys.executable, str(HARNESSES / "served.py"), given]
    results, logs = ran(command, *CASES, smoke=CASES[0])
    assert [outcome.verdict for outcome in results.outcomes] == [CONFORMANT] * len(CASES), logs
    for outcome in results.outcomes:
        assert ("logits" if given == "logits" else "logprobs") in outcome.worst_errors
        assert "logprobs.ids" not in outcome.worst_errors


@pytest.mark.parametrize("form", [lambda array: array[-1], lambda array: array[-1:]])
def test_copied_logits_of_the_last_position_are_told_from_computed_ones(form: object) -> None:
    """Log-probabilities beside them, which no golden has, hide nothing."""
    case = case_named("dims-distinct")
    golden = read_trace(trace_path(case.folder))
    arrays = {
        key: np.asarray(form(tensor.map()) if key.endswith("/logits") else tensor.map())  # type: ignore[operator]
        for key, tensor in golden.tensors.items()
    }
    arrays["prefill/logprobs"] = np.zeros((2, 2))
    assert has_golden_bits(held_trace(golden.header, arrays), case)
    arrays["prefill/logits"] = arrays["prefill/logits"] + 1
    assert not has_golden_bits(held_trace(golden.header, arrays), case)


def test_the_golden_is_read_again_where_it_has_changed(tmp_path: Path) -> None:
    case = case_named("dims-distinct")
    trace = read_trace(trace_path(case.folder))
    copied = replace(case, folder=Path(shutil.copytree(case.folder, tmp_path / case.name)))
    assert has_golden_bits(trace, copied)
    (copied.folder / MANIFEST_FILE).unlink()
    assert not has_golden_bits(trace, copied)
    other = case_named("top-1")
    shutil.copytree(other.folder, copied.folder, dirs_exist_ok=True)
    assert not has_golden_bits(trace, copied)
    assert has_golden_bits(read_trace(trace_path(other.folder)), replace(other, folder=copied.folder))
