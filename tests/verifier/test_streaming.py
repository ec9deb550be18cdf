# SPDX-License-Identifier: Apache-2.0
"""Long traces are read in pieces and judged as if read at once, in memory that does not grow with them.

As a module, ``python -m tests.verifier.test_streaming TRACE LAYERS HEADS TOKENS BLOCK_BYTES`` verifies a trace made by
`zeros`. It prints the verdict and the peak of its own memory, with the pages of the mapped file.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refmoe.arithmetic.native.ops import NativeOps
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.profiles.load import policy
from refmoe.spec.config import Config
from refmoe.spec.model import Model
from refmoe.traces.script import execute, plan
from refmoe.traces.trace import Header, Recorder, Run, read_trace, write_trace
from refmoe.verifier import blocks, passes
from refmoe.verifier.findings import CONFORMANT, NOT_CONFORMANT, Report
from refmoe.verifier.subject import shape_of
from refmoe.verifier.verify import verify
from tests.verifier.hostile import GOLDEN, file

SMALL = Config(
    dim=12, layers=2, heads=4, kv_heads=2, head_dim=4, hidden_dim=20, vocab=53, experts=5, experts_per_token=2,
    rope_theta=3e4,
)  # fmt: skip
GIB = 1 << 30
HUGE = ("attention.scores", "attention.probs")
"""Taps that grow with the square of the tokens."""


def model(layers: int, heads: int, tokens: int) -> tuple[Config, tuple[Run, ...]]:
    config = replace(SMALL, layers=layers, heads=heads)
    return config, plan([("prefill", 0, [(7 + 29 * i) % config.vocab for i in range(tokens)])], config.vocab)


def zeros(path: Path, layers: int, heads: int, tokens: int) -> int:
    """A sparse trace whose scores and probabilities, float64, are all zero. Returns its size in bytes."""
    config, (run,) = model(layers, heads, tokens)
    header = {"format_version": "1", "policy": "float32", "producer": {}, "runs": [run.__dict__]}
    table: dict[str, Any] = {"__metadata__": {"refmoe": json.dumps(header)}}
    size = 0
    for layer in range(layers):
        for name in HUGE:
            tap = f"layers.{layer}.{name}"
            shape = shape_of(tap, config, run)
            offsets = [size, size + 8 * math.prod(shape)]
            table[f"prefill/{tap}"] = {"dtype": "F64", "shape": shape, "data_offsets": offsets}
            size = offsets[1]
    path.write_bytes(file(json.dumps(table), b""))
    os.truncate(path, path.stat().st_size + size)
    return size


def peak() -> int:
    """The largest resident set of this process so far, in bytes; mapped files count.

    Not getrusage: on Linux its maximum begins with that of the process that started this one.
    """
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def main() -> None:
    """Verify a trace of zeros, and print verdict, counts and memory as JSON."""
    path, (layers, heads, tokens, block_bytes) = Path(sys.argv[1]), map(int, sys.argv[2:])
    blocks.BLOCK_BYTES = block_bytes
    config, runs = model(layers, heads, tokens)
    before = peak()
    report = verify(
        read_trace(path), "zeros", config, synthetic_checkpoint(config, 1).parameters, runs, policy("float32")
    )
    values = {check.tap: check.values for check in report.checks}
    print(json.dumps({"verdict": report.verdict, "values": values, "before": before, "peak": peak()}))


def verify_zeros(path: Path, layers: int, heads: int, tokens: int, block_bytes: int) -> dict[str, Any]:
    """In a process of its own."""
    command = [sys.executable, "-m", __name__, *map(str, (path, layers, heads, tokens, block_bytes))]
    done = subprocess.run(command, cwd=GOLDEN.parent, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux, to measure memory")


@needs_proc
def test_memory_does_not_grow_with_the_trace(tmp_path: Path) -> None:
    """60 MB in blocks of 1 MiB take far less memory than the trace has bytes, and every value is looked at."""
    size = zeros(tmp_path / "t", 1, 4, 970)
    found = verify_zeros(tmp_path / "t", 1, 4, 970, 1 << 20)
    assert found["verdict"] == NOT_CONFORMANT
    assert found["values"] == {
        "layers.0.attention.scores": 4 * 970 * 971 // 2, "layers.0.attention.probs": 4 * 970 * 970,
    }  # fmt: skip
    assert size > 60e6
    assert found["peak"] - found["before"] < 40e6


@needs_proc
@pytest.mark.slow
def test_ten_gigabytes_take_less_than_one(tmp_path: Path) -> None:
    """Blocks as they are by default."""
    size = zeros(tmp_path / "t", 1, 8, 9200)
    assert size > 10 * GIB
    found = verify_zeros(tmp_path / "t", 1, 8, 9200, blocks.BLOCK_BYTES)
    assert found["verdict"] == NOT_CONFORMANT
    assert found["peak"] < GIB


SCRIPTS: dict[str, tuple[int | None, list[Any]]] = {
    "prefill": (None, [("prefill", 0, range(200))]),
    "chunks": (None, [("prefill", 0, range(70)), ("chunk", 0, range(90)), ("decode", 0, [1, 2])]),
    "window": (40, [("prefill", 0, range(90)), ("chunk", 0, range(70)), ("decode", 0, [3])]),
    "narrow window": (1, [("prefill", 0, range(60)), ("chunk", 0, range(60))]),
    "cut": (None, [("prefill", 0, range(90)), ("chunk", 0, range(60)), ("chunk", 0, range(60), 50)]),
    "sequences": (None, [("prefill", 0, range(80)), ("prefill", 1, range(70)), ("chunk", 0, range(50))]),
}
"""Window and calls; a range stands for that many tokens."""


def emit(path: Path, config: Config, calls: list[Any], arithmetic: str, taps: str = "*", **header: Any) -> Any:
    """An honest trace of NumPy's own arithmetic, its values in the dtype of the policy."""
    planned = [(op, row, [(7 + 29 * i) % config.vocab for i in ids], *keep) for op, row, ids, *keep in calls]
    runs = plan(planned, config.vocab)
    parameters = synthetic_checkpoint(config, 1).parameters
    recorder = Recorder(taps)
    execute(
        NativeOps("float64" if arithmetic == "float64" else "float32", recorder),
        Model(config, parameters),
        runs,
        recorder,
    )
    write_trace(path, Header(runs, policy=arithmetic, **header), recorder.arrays)
    return read_trace(path), config, parameters, runs


def judge(emitted: Any, arithmetic: str) -> Report:
    trace, config, parameters, runs = emitted
    return verify(trace, "a long prompt", config, parameters, runs, policy(arithmetic))


def assert_same(found: Report, expected: Report) -> None:
    """Up to the last bits of a product, which depend on the shapes that it is computed with.

    A block's rows of attention end where the block does, and bounds grow with the length of a row: in blocks they are
    tighter.
    """
    assert (found.verdict, found.first_wrong) == (expected.verdict, expected.first_wrong)
    for mine, its in zip(found.checks, expected.checks, strict=True):
        for name in ("run", "tap", "since", "rung", "verdict", "values", "undecided", "outside"):
            assert getattr(mine, name) == getattr(its, name), (mine.run, mine.tap, name)
        if mine.step in ("attention.probs", "attention.context"):
            continue
        for name in ("worst_error", "excess", "rms", "rms_limit", "truncation", "truncation_snr"):
            wanted = pytest.approx(getattr(its, name), rel=0.02, abs=0.02, nan_ok=True)
            assert getattr(mine, name) == wanted, (mine.run, mine.tap, name)
    assert decisions(found) == decisions(expected)


def decisions(report: Report) -> dict[Any, Any]:
    found = {(d.run, d.layer, d.token): (d.kind, d.legal, d.found, d.expected) for d in report.decisions}
    assert len(found) == len(report.decisions)
    return found


@pytest.mark.parametrize(
    ("script", "arithmetic"), [*((script, "float32") for script in SCRIPTS), ("window", "float64")]
)
def test_a_long_run_is_judged_in_pieces_as_it_is_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, arithmetic: str
) -> None:
    """Prefills, chunks after a cache, windows, cut caches; blocks of a dozen tokens."""
    window, calls = SCRIPTS[script]
    emitted = emit(tmp_path / "t", replace(SMALL, window=window), calls, arithmetic)
    whole = judge(emitted, arithmetic)
    assert whole.verdict == CONFORMANT, whole.headline
    sizes = []
    size_of = blocks.block_size

    def block_size(config: Config, run: Run, attending: bool) -> int:
        sizes.append((size_of(config, run, attending), len(run.tokens)))
        return sizes[-1][0]

    monkeypatch.setattr(blocks, "BLOCK_BYTES", 24 << 10)
    monkeypatch.setattr(passes, "block_size", block_size)
    assert_same(judge(emitted, arithmetic), whole)
    assert any(size * 3 < tokens for size, tokens in sizes)


@pytest.mark.parametrize(
    "tap", ["attention.scores", "attention.probs", "attention.k_rope", "router.experts", "residual"]
)
def test_a_fault_late_in_a_run_is_found_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tap: str) -> None:
    """Token 85 of 100, in one of the last blocks: the place is counted from the start of the run."""
    _, config, parameters, runs = emit(tmp_path / "t", SMALL, [("prefill", 0, range(100))], "float32")
    trace = read_trace(tmp_path / "t")
    arrays = {key: np.array(stored.map()) for key, stored in trace.tensors.items()}
    array = arrays[f"prefill/layers.1.{tap}"]
    if tap == "router.experts":
        array[85] = array[85, ::-1] + [0, 99]
    else:
        array[(2, 85, 3) if tap in HUGE else (85, *[1] * (array.ndim - 1))] += np.float32(100)
    write_trace(tmp_path / "t", trace.header, arrays)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 24 << 10)
    report = judge((read_trace(tmp_path / "t"), config, parameters, runs), "float32")
    assert report.first_wrong == ("prefill", f"layers.1.{tap}")
    check = report.check(*report.first_wrong)
    assert check is not None
    if tap == "router.experts":
        assert "token 85" in check.reason
    else:
        assert check.outside == 1
        assert check.worst is not None
        assert check.worst.where[:2] == ((2, 85) if tap in HUGE else (85, 1))


def test_a_probability_after_the_last_block_of_its_row_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row's keys after its own block are masked, and are read all the same."""
    _, config, parameters, runs = emit(tmp_path / "t", SMALL, [("prefill", 0, range(100))], "float32")
    trace = read_trace(tmp_path / "t")
    arrays = {key: np.array(stored.map()) for key, stored in trace.tensors.items()}
    arrays["prefill/layers.0.attention.probs"][1, 5, 95] = 1e-6
    write_trace(tmp_path / "t", trace.header, arrays)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 24 << 10)
    report = judge((read_trace(tmp_path / "t"), config, parameters, runs), "float32")
    assert report.first_wrong == ("prefill", "layers.0.attention.probs")
    check = report.check(*report.first_wrong)
    assert check is not None
    assert check.worst is not None
    assert check.worst.where == (1, 5, 95)


def test_three_thousand_tokens_conform(tmp_path: Path) -> None:
    """The trace has no scores and probabilities: their size would hide all else."""
    config = replace(SMALL, layers=1, heads=2)
    taps = "logits,embedding,*norm,*residual,*.q,*.k,*.v,*rope,*context,*output,router.*,*router.*,*expert.*"
    emitted = emit(tmp_path / "t", config, [("prefill", 0, range(3000))], "float32", taps)
    report = judge(emitted, "float32")
    assert report.verdict == CONFORMANT, report.headline
    assert len(report.decisions) == 3000
    assert set(report.missing) == set(HUGE)


def test_bfloat16_logits_alone_are_judged_by_replicas_within_memory(tmp_path: Path) -> None:
    """Replicas keep whole taps, so above a limit there are none: such a trace cannot be judged, and says so."""
    from refmoe.verifier import free_running

    trace, config, parameters, runs = emit(tmp_path / "t", SMALL, [("prefill", 0, range(60))], "bfloat16", "logits")
    rounded = {key: stored.map().astype(ml_dtypes.bfloat16) for key, stored in trace.tensors.items()}
    write_trace(tmp_path / "t", trace.header, rounded)
    emitted = read_trace(tmp_path / "t"), config, parameters, runs
    assert free_running.MOST_VALUES * 130 < GIB
    assert judge(emitted, "bfloat16").verdict == CONFORMANT


if __name__ == "__main__":
    main()
