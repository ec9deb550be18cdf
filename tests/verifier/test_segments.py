# SPDX-License-Identifier: Apache-2.0
"""A trace judged in pieces of layers: the report of one pass, and no more computed than is needed."""

from __future__ import annotations

from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe.arithmetic import streaming
from refmoe.parallel import open_executor
from refmoe.profiles.load import policy
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.suite import case_source, read_case, trace_path
from refmoe.traces.trace import Header, read_trace, write_trace
from refmoe.verifier.findings import NOT_CONFORMANT, PASS, Report
from refmoe.verifier.segments import Settings, Spread, needed, segments
from refmoe.verifier.verify import verify
from tests.command_line import Refmoe

GOLDEN = Path(__file__).parents[2] / "golden"


def judged(trace: Any, name: str, spread: Any = None, ops: Any = EnclosureOps, rules: str = "float64") -> Report:
    case = read_case(GOLDEN / name)
    parameters = case.checkpoint().parameters
    return verify(trace, name, case.config, parameters, case.runs(), policy(rules), Settings(ops=ops, spread=spread))


def changed(tmp_path: Path, name: str, keys: tuple[str, ...], edit: Any) -> Any:
    opened = read_trace(trace_path(GOLDEN / name))
    arrays = {key: np.array(tensor.map()) for key, tensor in opened.tensors.items()}
    for key in keys:
        arrays[key] = edit(arrays[key])
    write_trace(tmp_path / "t.safetensors", opened.header, arrays)
    return read_trace(tmp_path / "t.safetensors")


@pytest.fixture(scope="module")
def two_processes() -> Any:
    with open_executor("processes:2") as executor:
        yield executor


FAULTS = {
    "none": ((), None),
    "a step": (("chunk1/layers.1.expert.up",), lambda x: -x),
    "an output that is gone on from": (("prefill/layers.0.residual",), lambda x: x * 1.01),
    "not finite": (("prefill/layers.0.residual",), lambda x: np.where(np.arange(x.shape[-1]) == 3, np.inf, x)),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("rules", ["float64", "hf-bfloat16"])
def test_side_by_side_is_the_report_of_one_pass(tmp_path: Path, two_processes: Any, fault: str, rules: str) -> None:
    keys, edit = FAULTS[fault]
    trace = changed(tmp_path, "walking-skeleton", keys, edit)
    spread = Spread(two_processes, case_source(read_case(GOLDEN / "walking-skeleton")))
    alone, beside = (
        judged(trace, "walking-skeleton", rules=rules),
        judged(trace, "walking-skeleton", spread, rules=rules),
    )
    assert beside.verdict == alone.verdict
    assert [(c.run, c.tap, c.verdict, c.reason) for c in beside.checks] == [
        (c.run, c.tap, c.verdict, c.reason) for c in alone.checks
    ]
    assert repr(beside.checks) == repr(alone.checks)
    assert sorted(map(repr, beside.decisions)) == sorted(map(repr, alone.decisions))
    assert (beside.headline, beside.notes) == (alone.headline, alone.notes)


class Here(Executor):
    """Calls at once, in this process."""

    def __init__(self) -> None:
        self.layers: list[range] = []

    def submit(self, function: Any, /, *given: Any, **named: Any) -> Future[Any]:
        self.layers.append(given[0].layers)
        made: Future[Any] = Future()
        made.set_result(function(*given, **named))
        return made


@pytest.mark.parametrize(
    ("left_out", "begun"),
    [
        ((), [range(3, 4), range(2, 3), range(1, 2), range(1)]),
        (("layers.1.residual",), [range(1, 3), range(3, 4), range(1)]),
    ],
)
def test_the_longest_segment_begins_first(left_out: tuple[str, ...], begun: list[range], tmp_path: Path) -> None:
    """The head, which belongs to the last segment, may take as long as several layers."""
    opened = read_trace(trace_path(GOLDEN / "four-layers"))
    arrays = {key: np.array(each.map()) for key, each in opened.tensors.items() if not key.endswith(left_out or " ")}
    write_trace(tmp_path / "t.safetensors", opened.header, arrays)
    trace, executor = read_trace(tmp_path / "t.safetensors"), Here()
    beside = judged(trace, "four-layers", Spread(executor, case_source(read_case(GOLDEN / "four-layers"))))
    assert executor.layers == begun
    assert repr(beside.checks) == repr(judged(trace, "four-layers").checks)


def test_where_a_trace_is_cut() -> None:
    config = replace(read_case(GOLDEN / "four-layers").config, layers=4)
    every = frozenset(f"layers.{i}.residual" for i in range(4)) | {"logits"}
    assert segments(config, {"a": every, "b": every}) == [range(i, i + 1) for i in range(4)]
    assert segments(config, {"a": every, "b": every - {"layers.1.residual"}}) == [range(1), range(1, 3), range(3, 4)]
    assert segments(config, {"a": every}, frozenset([("a", "layers.0.residual")])) == [
        range(2),
        range(2, 3),
        range(3, 4),
    ]
    first = frozenset(["embedding", "layers.0.residual", "layers.1.expert.up"])
    assert needed(config, {"a": first}) == range(2)
    assert segments(config, {"a": first}) == [range(1), range(1, 2)]
    assert segments(config, {"a": frozenset(["logits"])}) == [range(4)]
    assert segments(config, {"a": frozenset(["embedding"])}) == [range(1)]
    # of a trace that begins in the middle nothing before it is computed, but for what a run without it needs
    assert segments(config, {"a": frozenset(["layers.1.residual", "layers.2.residual"])})[-1] == range(2, 3)


def test_a_trace_of_the_first_layers_is_judged_without_the_others(refmoe: Refmoe, tmp_path: Path) -> None:
    opened = read_trace(trace_path(GOLDEN / "four-layers"))
    arrays = {
        key: np.array(tensor.map())
        for key, tensor in opened.tensors.items()
        if "layers.0." in key or "layers.1." in key or "embedding" in key
    }
    write_trace(tmp_path / "t.safetensors", opened.header, arrays)
    seen: list[str] = []

    class Watched(EnclosureOps):
        def tap(self, name: str, x: Any) -> Any:
            seen.append(self._prefix + name)
            return super().tap(name, x)

    report = judged(read_trace(tmp_path / "t.safetensors"), "four-layers", ops=Watched)
    assert {check.verdict for check in report.checks} == {PASS}
    assert not [name for name in seen if "layers.2." in name or name == "logits"]
    arrays["prefill/layers.1.moe.output"] *= -1
    write_trace(tmp_path / "wrong.safetensors", opened.header, arrays)
    assert judged(read_trace(tmp_path / "wrong.safetensors"), "four-layers").verdict == NOT_CONFORMANT


@pytest.mark.parametrize("rules", ["float64", "float32", "hf-bfloat16", "hf-float16"])
def test_streamed_products_bound_the_same(monkeypatch: pytest.MonkeyPatch, rules: str) -> None:
    """Weights in blocks of a few rows: every figure of the report, but for the last digits of our own sums."""
    trace = read_trace(trace_path(GOLDEN / "walking-skeleton"))
    whole = judged(trace, "walking-skeleton", rules=rules)
    monkeypatch.setattr(streaming, "BLOCK", 150)
    streamed = judged(trace, "walking-skeleton", ops=lambda rules, tap: EnclosureOps(rules, tap, 0), rules=rules)
    for one, other in zip(whole.checks, streamed.checks, strict=True):
        assert (one.tap, one.verdict, one.values, one.outside) == (
            other.tap,
            other.verdict,
            other.values,
            other.outside,
        )
        for name in ("worst_error", "excess", "rms"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-6, abs=1e-7), (one.tap, name)


def test_the_command_judges_a_synthetic_model_side_by_side(
    refmoe: Refmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from refmoe.spec.config import PRESETS

    case = read_case(GOLDEN / "four-layers")
    monkeypatch.setitem(PRESETS, "mixtral-8x7b", case.config)
    out = tmp_path / "t.safetensors"
    given = ("--checkpoint", "mixtral-8x7b", "--seed", 5)
    assert refmoe("emit", *given, "--tokens", "1,2,3", "--decode", "4", "--out", out)[0] == 0
    status, text, said = refmoe("verify", out, *given, "--policy", "float64", "--executor", "processes:1")
    assert (status, said) == (0, ""), text
    status, _, said = refmoe("verify", out, "--checkpoint", "mixtral-8x7b", "--policy", "float64")
    assert status == 2
    assert "so --seed SEED was expected" in said
    status, _, said = refmoe("verify", out, *given, "--policy", "float64", "--executor", "dask")
    assert (status, "or dask:ADDRESS was expected" in said) == (2, True)
    status, _, said = refmoe("verify", out, "--seed", 5, "--policy", "float64")
    assert (status, "--seed 5 goes with --checkpoint" in said) == (2, True)
    arrays = {key: np.array(tensor.map()) for key, tensor in read_trace(out).tensors.items()}
    header = replace(read_trace(out).header, checkpoint="sha256:0")
    assert isinstance(header, Header)
    write_trace(out, header, arrays)
    status, _, said = refmoe("verify", out, *given, "--policy", "float64")
    assert (status, "but null, as there are no files, was expected" in said) == (2, True)
