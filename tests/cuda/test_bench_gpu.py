# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark: its counts, every section over a stand-in for CuPy, and its results when a section fails."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import gpu, gpu_measure, gpu_torch
from bench.gpu_measure import Bench
from bench.gpu_report import (
    Result,
    combine_bytes,
    decode_bytes,
    gather_bytes,
    layers_that_fit,
    met,
    prefill_operations,
    table,
)
from refmoe import suite as golden
from refmoe.cuda import device
from refmoe.spec.config import PRESETS
from tests.cuda.on_cpu import needs_compiler
from tests.cuda.strict import DeviceArray, install
from tests.golden_cases import write_case
from tests.models import SMALL

LARGE = PRESETS["mixtral-8x7b"]


def test_bytes_and_operations_by_hand() -> None:
    """A layer reads 4 projections, the router, 2 norms and 2 experts; the head its norm and matrix."""
    layer = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 8 * 4096 + 2 * 4096 + 2 * 3 * 14336 * 4096
    assert decode_bytes(LARGE, 0) == 2 * (32 * layer + 4096 + 32000 * 4096 + 4096)
    assert decode_bytes(LARGE, 10) - decode_bytes(LARGE, 0) == 10 * 32 * 2 * 8 * 128 * 4
    weights = 32 * (layer - 2 * 4096) + 32000 * 4096
    assert prefill_operations(LARGE, 1) == 2 * weights + 4 * 32 * 32 * 128
    assert prefill_operations(LARGE, 3) == 6 * weights + 4 * 32 * 32 * 128 * 6
    assert gather_bytes(5, 2, 8, 2) == 10 * (8 * 2 * 2 + 4)
    assert combine_bytes(5, 2, 8, 2) == 10 * 8 * 2 + 5 * 8 * 2 + 10 * 8


def test_fewer_layers_where_memory_is_short() -> None:
    assert layers_that_fit(LARGE, 140 << 30) == 32
    assert 0 < layers_that_fit(LARGE, 40 << 30) < 12
    assert layers_that_fit(LARGE, 5 << 30) == 0


def test_the_table_says_what_was_reached() -> None:
    results = [
        Result("a", 4.2, "TB/s", share=0.9, goal=0.85), Result("bb", 3, "TB/s", share=0.5, goal=0.85, note="why"),
        Result("c", None, "s", note="no"), Result("d", 52, "cases", goal=53), Result("e", 1.5, "times", goal=1),
    ]  # fmt: skip
    assert [met(result) for result in results] == [True, False, None, False, True]
    assert table(results).splitlines() == [
        "measurement  value         share  goal",
        "a            4.2 TB/s      90.0%  85%   reached",
        "bb           3 TB/s        50.0%  85%   MISSED; why",
        "c            not measured               no",
        "d            52 cases             53    MISSED",
        "e            1.5 times            1     reached",
    ]


def test_a_section_that_fails_is_a_line_and_what_was_measured_is_on_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results" / "gpu.json"

    def broken(bench: Bench) -> list[Result]:
        assert len(json.loads(path.read_text())["results"]) == 1, "written before the next section begins"
        raise RuntimeError("out of memory\nat length")

    sections = {
        "first": lambda bench: [Result("a", 1.0, "s", share=0.5, goal=0.4)],
        "second": broken,
        "third": lambda bench: [],
    }
    results, whole = gpu.run(Bench(None), sections, {"device": "none"}, path)
    assert not whole
    assert results[1] == Result("second", None, "", note="FAILED: RuntimeError: out of memory")
    found = json.loads(path.read_text())
    assert found["device"] == "none"
    assert [result["met"] for result in found["results"]] == [True, None]
    assert found["seconds"].keys() == sections.keys()
    capsys.readouterr()


def test_without_a_gpu_it_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_cupy(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'cupy'")

    monkeypatch.setattr(device, "import_module", no_cupy)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.startswith("bench.gpu: no GPU can be used: CuPy is not installed")
    assert gpu.main(["--only", "nothing"]) == 2
    assert "--only names 'nothing', but some of copying, " in capsys.readouterr().err


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bench on which every call takes 2 milliseconds."""

    def gemm(rows: Any, weight: Any, out: Any) -> Any:
        out[...] = DeviceArray(rows.values.astype(np.float32) @ weight.values.astype(np.float32).T)
        return out

    cupy = install(monkeypatch, free=11 << 30)
    monkeypatch.setattr(gpu_measure, "cuda_gemm", lambda _cupy: gemm)
    monkeypatch.setattr(gpu_measure, "captured", lambda _cupy, step: step)
    return Bench(cupy, replace(SMALL, layers=1), prompt=6, tokens=16, copied=1 << 12, sides=(8, 16))


def test_ceilings_are_rates_of_what_was_done(bench: Bench) -> None:
    (copy,) = gpu_measure.copying(bench)
    assert bench.copy_rate == 2 * (1 << 12) / 0.002
    assert copy.value == bench.copy_rate / 1e12
    (matmul,) = gpu_measure.multiplying(bench)
    assert bench.matmul_rate == 2 * 16**3 / 0.002
    assert matmul.value == bench.matmul_rate / 1e12


@needs_compiler
def test_decoding_and_rows_are_held_against_the_ceilings(bench: Bench) -> None:
    bench.copy_rate, bench.matmul_rate = 1e9, 1e10
    prefill, graph, plain = gpu_measure.decoding(bench)
    assert graph.share == pytest.approx(decode_bytes(bench.config, 256) / 0.002 / 1e9)
    assert plain.share == graph.share
    assert (graph.goal, plain.goal, prefill.goal) == (0.8, None, 0.6)
    assert prefill.share == pytest.approx(prefill_operations(bench.config, 6) / 0.002 / 1e10)
    assert bench.notes["layers"] == 1
    shares = [result.share for result in gpu_measure.rows(bench)]
    gathered, combined = (count(16, 2, 20, 2) / 0.002 / 1e9 for count in (gather_bytes, combine_bytes))
    assert shares == pytest.approx([gathered, gathered, combined])


def test_too_little_memory_for_a_layer_is_a_line(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_measure, "layers_that_fit", lambda *_: 0)
    bench.config = replace(bench.config, layers=1)
    monkeypatch.setattr(gpu_measure, "model_on_device", lambda _: (None, gpu_measure.Model(_Empty, None)))
    assert gpu_measure.decoding(bench)[0].note == "not one layer fits into the free memory"


class _Empty:
    layers = 0


def test_goldens_and_the_whole_model_are_compared(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "golden"
    folder.mkdir()
    for seed, name in enumerate("ab"):
        write_case(folder / name, seed, 'store = "fingerprint"')
        golden.emit(golden.read_case(folder / name))
    golden.write_folder_manifest(folder)
    monkeypatch.setattr(gpu_measure, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_measure, "FULL_CASE", folder / "a")
    assert met(gpu_measure.goldens(bench)[0]) is True
    taken, tensors = gpu_measure.full_size(bench)
    assert met(tensors) is True
    assert taken.note.startswith(f"{int(tensors.goal or 0)} of {int(tensors.goal or 0)} tensors as on the CPU; digest ")
    assert len(bench.notes["full_size_digest"]) == 64
    stored = json.loads((folder / "b" / "manifest.json").read_text())
    content = next(name for name in stored["files"] if name.startswith("fingerprint"))
    (folder / "b" / content).write_text((folder / "b" / content).read_text().replace("0x1.", "0x1.0", 1))
    assert met(gpu_measure.goldens(bench)[0]) is False
    assert bench.notes["goldens_that_differ"] == ["b"]
    monkeypatch.setattr(gpu_measure, "FULL_CASE", folder / "c")
    assert gpu_measure.full_size(bench)[0].note.endswith("is not there")
    capsys.readouterr()


def test_tools_that_are_not_there_are_a_line(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert gpu_measure.sanitizing(bench)[0].note == "the tool is not installed"
    monkeypatch.setattr(gpu_torch, "torch_problem", lambda: "torch is not installed")
    assert gpu_torch.compared(bench)[0].note == "torch is not installed"


@pytest.mark.engines
def test_the_decoder_that_torch_compiles_is_a_decoder() -> None:
    """Its logits are finite and depend on the token, its position and the earlier tokens."""
    import torch

    torch.manual_seed(0)
    step = gpu_torch.decoder_step(SMALL, 8, "cpu", torch.float32)
    for name, buffer in step.named_buffers():
        if name.startswith(("k_", "v_")):
            buffer.zero_()

    def logits(token: int, position: int) -> Any:
        with torch.inference_mode():
            return step(torch.tensor([token]), torch.tensor([position])).clone()

    first = logits(3, 0)
    assert first.shape == (SMALL.vocab,)
    assert torch.isfinite(first).all()
    second = logits(3, 1)
    assert torch.equal(logits(3, 1), second)
    assert not torch.equal(logits(4, 1), second)
    logits(5, 0)
    assert not torch.equal(logits(3, 1), second)
