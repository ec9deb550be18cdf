# SPDX-License-Identifier: Apache-2.0
"""Traces: a written trace is read back; a file that is not a trace is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from refmoe.errors import InputError
from refmoe.traces.held import held_trace
from refmoe.traces.script import plan
from refmoe.traces.trace import Header, Recorder, Run, read_trace, write_trace

RUNS = plan([("prefill", 0, [1, 2, 3]), ("decode", 0, [4])], 10)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_trace_survives_the_disk(tmp_path: Path, dtype: Any) -> None:
    """Every bit, dtype, shape and header field."""
    arrays = {
        "prefill/logits": np.arange(30).reshape(3, 10).astype(dtype),
        "decode1/layers.0.router.experts": np.array([[4, 1]]),
    }
    header = Header(
        runs=RUNS, case="a case", checkpoint="sha256:00", policy="bfloat16", producer={"name": "x", "version": "1"}
    )
    write_trace(tmp_path / "t", header, arrays)
    trace = read_trace(tmp_path / "t")
    assert trace.header == header
    assert trace.names("prefill") == ["logits"]
    for key, array in arrays.items():
        found = trace.get(*key.rsplit("/", 1))
        assert found.dtype == array.dtype
        assert np.array_equal(found, array)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_a_trace_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write to a temporary name, then rename."""
    write_trace(tmp_path / "t", Header(RUNS), {"prefill/logits": np.ones(3)})
    before = (tmp_path / "t").read_bytes()

    def fails(arrays: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("refmoe.traces.trace.save_file", fails)
    with pytest.raises(InputError, match="No space left on device"):
        write_trace(tmp_path / "t", Header(RUNS), {"prefill/logits": np.zeros(3)})
    assert (tmp_path / "t").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def good_header() -> dict[str, Any]:
    run = {"run": "prefill", "op": "prefill", "sequence": 0, "tokens": [1, 2], "positions": [0, 1], "past": 0}
    return {
        "format_version": "1", "case": None, "checkpoint": None, "policy": "float32",
        "producer": {"name": "x", "version": "1"}, "runs": [run],
    }  # fmt: skip


BROKEN = {
    "format_version": ({"format_version": "2"}, "format_version"),
    "case": ({"case": 3}, "'case' is 3"),
    "policy": ({"policy": None}, "'policy'"),
    "producer": ({"producer": "me"}, "'producer'"),
    "no runs": ({"runs": []}, "'runs'"),
    "runs object": ({"runs": {}}, "'runs'"),
    "run number": ({"runs": [3]}, "'runs[0]'"),
    "run name": ({"runs": [{"run": "a/b"}]}, "'runs[0].run'"),
    "operation": ({"runs": [{"run": "a", "op": "train"}]}, "'runs[0].op'"),
    "sequence": ({"runs": [{"run": "a", "op": "decode", "sequence": -1}]}, "'runs[0].sequence'"),
    "past": ({"runs": [{"run": "a", "op": "decode", "sequence": 0, "past": True}]}, "'runs[0].past'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_header_is_refused_by_its_field(tmp_path: Path, name: str) -> None:
    change, words = BROKEN[name]
    text = json.dumps(good_header() | change)
    save_file({"prefill/logits": np.zeros(3)}, tmp_path / "t", {"refmoe": text})
    with pytest.raises(InputError) as caught:
        read_trace(tmp_path / "t")
    assert words in str(caught.value)
    assert str(tmp_path / "t") in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": []}, "tokens"),
        ({"tokens": [1, -2]}, "tokens"),
        ({"tokens": [1, 2.5]}, "tokens"),
        ({"tokens": "12"}, "tokens"),
        ({"positions": [0]}, "positions"),
        ({"positions": [0, 2**70]}, "positions"),
    ],
)
def test_a_broken_run_is_refused_by_its_field(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    header = good_header()
    header["runs"][0] |= change
    save_file({"prefill/logits": np.zeros(3)}, tmp_path / "t", {"refmoe": json.dumps(header)})
    with pytest.raises(InputError, match=words):
        read_trace(tmp_path / "t")


def test_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    header = good_header()
    header["runs"] *= 2
    save_file({"prefill/logits": np.zeros(3)}, tmp_path / "t", {"refmoe": json.dumps(header)})
    with pytest.raises(InputError, match="different name"):
        read_trace(tmp_path / "t")


def test_files_that_are_not_traces(tmp_path: Path) -> None:
    save_file({"a": np.zeros(3)}, tmp_path / "plain")
    save_file({"a": np.zeros(3)}, tmp_path / "words", {"refmoe": "words"})
    save_file({"a": np.zeros(3)}, tmp_path / "list", {"refmoe": "[]"})
    save_file({"elsewhere/a": np.zeros(3)}, tmp_path / "stray", {"refmoe": json.dumps(good_header())})
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    expected = {
        "plain": "not a trace", "words": "not JSON", "list": "an object", "stray": "belongs to no run",
        "text": "not a whole safetensors", "empty": "not a whole safetensors", "absent": "no such file",
    }  # fmt: skip
    for name, words in expected.items():
        with pytest.raises(InputError, match=words):
            read_trace(tmp_path / name)


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    write_trace(tmp_path / "t", Header(RUNS), {"prefill/logits": np.ones(3)})
    whole = (tmp_path / "t").read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(InputError, match="not a whole safetensors file"):
            read_trace(tmp_path / "cut")


def test_the_recorder_keeps_what_its_patterns_name() -> None:
    recorder = Recorder("logits,layers.*.residual")
    recorder.run = "prefill"
    for name in ("logits", "embedding", "layers.0.residual", "layers.11.residual", "layers.0.attention_residual"):
        recorder(name, np.zeros(1))
    assert set(recorder.arrays) == {"prefill/logits", "prefill/layers.0.residual", "prefill/layers.11.residual"}


def test_a_trace_is_indexed_by_run_and_tap(tmp_path: Path) -> None:
    """Names that are not there are refused with the names that are."""
    run = Run(run="prefill", op="prefill", sequence=0, tokens=(1, 2), positions=(0, 1), past=0)
    logits = np.arange(6, dtype=np.float32).reshape(2, 3)
    held = held_trace(Header((run,)), {"prefill/logits": logits}, "mine")
    held.save(tmp_path / "trace.safetensors")
    for trace in (held, read_trace(tmp_path / "trace.safetensors")):
        assert trace["prefill"] == ["logits"]
        assert np.array_equal(trace["prefill", "logits"], logits)
        assert trace.runs == (run,)
        assert repr(trace).endswith(": 1 runs (prefill), 1 arrays>")
        for key, words in (("decode1", "expected"), (("prefill", "final_norm"), "lists its taps")):
            with pytest.raises(InputError, match=words):
                trace[key]
