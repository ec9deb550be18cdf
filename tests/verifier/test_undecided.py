# SPDX-License-Identifier: Apache-2.0
"""Values without a bound: no verdict without the last step, and NaN in the trace is named as the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.profiles.load import policy
from refmoe.spec.model import Parameters
from refmoe.suite import read_case
from refmoe.traces.trace import Trace, read_trace
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT, NOT_CONFORMANT, UNDECIDABLE, Report
from refmoe.verifier.verify import verify
from tests.verifier.hostile import CASE, GOLDEN, Draft, draft


def judged(path: Path, change: Any = None, parameters: Parameters | None = None) -> Report:
    """The report of an honest float32 trace with a change, held against the case or other parameters."""
    honest: Draft = draft(path, "float32")
    if change is not None:
        change(honest)
    path.write_bytes(honest.whole())
    case = read_case(GOLDEN / CASE)
    trace: Trace = read_trace(path)
    parameters = parameters or case.checkpoint().parameters
    return verify(trace, CASE, case.config, parameters, case.runs(), policy("float32"))


def overflowing() -> Parameters:
    """The case's parameters with a head whose every product may overflow in float32."""
    case = read_case(GOLDEN / CASE)
    huge = {"parameter": "output", "value": float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)}
    return synthetic_checkpoint(case.config, case.seed, case.exponents, (*case.edits, huge)).parameters


def test_an_honest_trace_is_judged(tmp_path: Path) -> None:
    assert judged(tmp_path / "t.safetensors").verdict == CONFORMANT


def test_no_verdict_where_the_last_step_has_no_bound(tmp_path: Path) -> None:
    """An engine whose logits overflow: infinities are legal, and no finite value would be wrong either."""

    def change(honest: Draft) -> None:
        honest.change(lambda logits: np.full_like(logits, np.inf), "/logits")

    report = judged(tmp_path / "t.safetensors", change, overflowing())
    assert {check.verdict for check in report.checks if check.step == "logits"} == {UNDECIDABLE}
    assert sum(check.undecided for check in report.checks) * 2 < sum(check.values for check in report.checks)
    assert report.verdict == CANNOT_JUDGE
    assert "logits" in report.headline


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("tap", "reader"),
    [
        ("layers.0.attention.q", "layers.0.attention.q_rope"),
        ("layers.0.attention.v", "layers.0.attention.context"),
        ("layers.1.moe_norm", "layers.1.router.logits"),
        ("layers.0.residual", "layers.1.attention_norm"),
        ("final_norm", "logits"),
    ],
)
def test_a_gap_in_the_trace_is_the_reason(tmp_path: Path, tap: str, reader: str, value: float) -> None:
    def change(honest: Draft) -> None:
        honest.put(f"prefill/{tap}", np.full_like(honest.array(f"prefill/{tap}"), value))

    report = judged(tmp_path / "t.safetensors", change)
    assert (report.verdict, report.first_wrong) == (NOT_CONFORMANT, ("prefill", tap))
    check = report.check("prefill", reader)
    assert check is not None
    assert check.verdict != UNDECIDABLE or f"prefill/{tap}" in check.reason


def test_a_gap_in_the_cache_is_the_reason(tmp_path: Path) -> None:
    def change(honest: Draft) -> None:
        honest.put("prefill/layers.0.attention.v", np.full_like(honest.array("prefill/layers.0.attention.v"), np.nan))

    report = judged(tmp_path / "t.safetensors", change)
    check = report.check("decode1", "layers.0.attention.context")
    assert check is not None
    assert check.verdict == UNDECIDABLE
    assert "prefill/layers.0.attention.v" in check.reason
