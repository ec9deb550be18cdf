# SPDX-License-Identifier: Apache-2.0
"""Measurements on the device, each a function from a `Bench` to results. `gpu_report` counts bytes and operations."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bench.gpu_report import (
    Result,
    combine_bytes,
    decode_bytes,
    gather_bytes,
    layers_that_fit,
    prefill_operations,
)
from refmoe import suite as golden
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.cuda import cupy_ops
from refmoe.cuda.decode import DecodeOps, Decoder, captured
from refmoe.cuda.gemm import cuda_gemm
from refmoe.cuda.kernels.calls import Kernels
from refmoe.cuda.place import Place
from refmoe.cuda.synthetic import on_device
from refmoe.spec.config import PRESETS, Config
from refmoe.spec.model import Model
from refmoe.steps.cuda import CUPY_STEPS
from refmoe.suite.fingerprint import fingerprint_difference, read_fingerprints
from refmoe.suite.manifest import content_file

ROOT = Path(__file__).parent.parent
CUDA = Place("cuda")
LARGE = PRESETS["mixtral-8x7b"]
PROMPT, STEPS, CAPACITY = 2048, 64, 2048 + 128
FULL_CASE = ROOT / "golden" / "mixtral-8x7b"


@dataclass
class Bench:
    """The device, the sizes of measurements, and the rates measured so far."""

    cupy: Any
    config: Config = LARGE
    prompt: int = PROMPT
    tokens: int = 1 << 16
    """Rows that are gathered and combined."""
    copied: int = 4 << 30
    """Bytes that are copied."""
    sides: tuple[int, ...] = (8192, 16384)
    """Sides of the matrices that are multiplied."""
    copy_rate: float | None = None
    """Bytes per second, read and written."""
    matmul_rate: float | None = None
    """Operations per second in bfloat16."""
    notes: dict[str, Any] = field(default_factory=dict)

    def seconds(self, call: Callable[[], Any], repeats: int = 10) -> float:
        """The median time of a call on the device, by events, after one call to warm up."""
        cupy = self.cupy
        call()
        times = []
        for _ in range(repeats):
            start, stop = cupy.cuda.Event(), cupy.cuda.Event()
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, stop) / 1000)
        return statistics.median(times)

    def of_copy(self, rate: float) -> float | None:
        return None if self.copy_rate is None else rate / self.copy_rate

    def free(self) -> None:
        """Return unused memory to the driver, so that other libraries can use it."""
        gc.collect()  # a recorded step and its decoder refer to each other
        self.cupy.get_default_memory_pool().free_all_blocks()


def copying(bench: Bench) -> list[Result]:
    """The ceiling of rates in bytes: the better of the driver's copy and a kernel's copy."""
    cupy, size = bench.cupy, bench.copied
    a, b = cupy.zeros(size // 4, np.float32), cupy.empty(size // 4, np.float32)
    by_driver = bench.seconds(lambda: b.data.copy_from_device_async(a.data, size))
    by_kernel = bench.seconds(lambda: cupy.add(a, np.float32(1), out=b))
    bench.copy_rate = 2 * size / min(by_driver, by_kernel)
    note = f"driver {2 * size / by_driver / 1e12:.2f}, kernel {2 * size / by_kernel / 1e12:.2f}"
    return [Result("device copy, read and written", bench.copy_rate / 1e12, "TB/s", note=note)]


def multiplying(bench: Bench) -> list[Result]:
    """The ceiling of rates of products: bfloat16 with float32 sums, the better of two sizes."""
    cupy, gemm, rates = bench.cupy, cuda_gemm(bench.cupy), {}
    for n in bench.sides:
        a = cupy.ones((n, n), np.float32).astype(ml_dtypes.bfloat16)
        out = cupy.empty((n, n), np.float32)
        rates[n] = 2 * n**3 / bench.seconds(lambda a=a, out=out: gemm(a, a, out))
    bench.matmul_rate = max(rates.values())
    note = ", ".join(f"n = {n}: {rate / 1e12:.0f}" for n, rate in rates.items())
    return [Result("bfloat16 matmul", bench.matmul_rate / 1e12, "TFLOP/s", note=note)]


def rows(bench: Bench) -> list[Result]:
    """Gather and combine in float16, compared with CuPy's take."""
    cupy, tokens, k, columns = bench.cupy, bench.tokens, bench.config.experts_per_token, bench.config.dim
    kernels = Kernels(cupy, cupy_ops.compiled)
    order = cupy.asarray(np.random.default_rng(1).permutation(tokens * k).astype(np.int32))
    x = cupy.ones((tokens, columns), np.float16)
    outputs = cupy.ones((tokens * k, columns), np.float16)
    position = cupy.asarray(np.argsort(order.get()).astype(np.int32).reshape(tokens, k))
    weights = cupy.full((tokens, k), 0.5, np.float32)
    token = order // k
    moved = gather_bytes(tokens, k, columns, 2)
    gather = moved / bench.seconds(lambda: kernels.gather_rows(x, order, k))
    take = moved / bench.seconds(lambda: cupy.take(x, token, axis=0))
    summed = combine_bytes(tokens, k, columns, 2) / bench.seconds(lambda: kernels.combine(outputs, position, weights))
    bench.notes["gather_bytes_per_second"], bench.notes["combine_bytes_per_second"] = gather, summed
    return [
        Result("gather kernel", gather / 1e12, "TB/s", share=bench.of_copy(gather), goal=0.85),
        Result("cupy.take, the same", take / 1e12, "TB/s", bench.of_copy(take)),
        Result("combine kernel", summed / 1e12, "TB/s", share=bench.of_copy(summed), goal=0.85),
    ]


def model_on_device(bench: Bench) -> tuple[DecodeOps, Model]:
    """The published size with synthetic weights in bfloat16; fewer layers where memory is short."""
    bench.free()
    layers = layers_that_fit(bench.config, CUDA.free_memory())
    config = replace(bench.config, layers=layers)
    bench.notes["layers"] = layers
    parameters = on_device(config, synthetic_checkpoint(config, 1).parameters, bench.cupy, "bfloat16")
    ops = DecodeOps(bench.cupy, cupy_ops.compiled, CAPACITY, gemm=cuda_gemm(bench.cupy))
    return ops, Model(config, parameters, CUPY_STEPS)


def decoding(bench: Bench) -> list[Result]:
    """Tokens one by one, as a graph and launch by launch, and a prompt in one call, on the same weights."""
    ops, model = model_on_device(bench)
    if not model.config.layers:
        return [Result("decode, batch 1", None, "tokens/s", note="not one layer fits into the free memory")]
    results = [prefilling(bench, ops, model)]
    for name, capture in (("graph", lambda step: captured(bench.cupy, step)), ("launch by launch", None)):
        state = Decoder(ops, model, 256, capture)
        state.read([1] * 8)
        state.step()
        repeats = STEPS if capture else 8
        seconds = bench.seconds(lambda state=state: state.step(), repeats)
        moved = decode_bytes(model.config, state.capacity)
        note = f"{model.config.layers} layers, {seconds * 1e3:.2f} ms, {moved / 1e9:.2f} GB"
        goal = 0.8 if capture else None
        bench.notes[f"decode_seconds_{name}"] = seconds
        results.append(
            Result(
                f"decode, batch 1, {name}",
                1 / seconds,
                "tokens/s",
                share=bench.of_copy(moved / seconds),
                goal=goal,
                note=note,
            )
        )
    return results


def prefilling(bench: Bench, ops: DecodeOps, model: Model) -> Result:
    tokens = np.random.default_rng(2).integers(0, model.config.vocab, bench.prompt).tolist()

    def read() -> None:
        Decoder(ops, model, bench.prompt).read(tokens)

    seconds = bench.seconds(read, 3)
    bench.notes["prefill_seconds"] = seconds
    rate = prefill_operations(model.config, bench.prompt) / seconds
    share = None if bench.matmul_rate is None else rate / bench.matmul_rate
    note = f"{model.config.layers} layers, {seconds * 1e3:.1f} ms"
    return Result(f"prefill, {bench.prompt} tokens", rate / 1e12, "TFLOP/s", share=share, goal=0.6, note=note)


def goldens(bench: Bench) -> list[Result]:
    """Every golden case recomputed by exact ops on the device, bit for bit."""
    cases, wrong, start = golden.find_cases(ROOT / "golden"), [], time.perf_counter()
    for folder in cases:
        differences = golden.check(folder, place=CUDA)
        if differences:
            wrong.append(folder.name)
            print(f"{folder.name}: {differences[0].what}", flush=True)
    bench.notes["goldens_that_differ"] = wrong
    note = f"of {len(cases)}, {time.perf_counter() - start:.0f} s{''.join(f', not {name}' for name in wrong)}"
    return [
        Result(
            "golden cases with the CPU's bits", len(cases) - len(wrong), "cases", share=None, goal=len(cases), note=note
        )
    ]


def full_size(bench: Bench) -> list[Result]:
    """The whole published model in exact arithmetic, weights from the formula on the device, and its digests."""
    if not FULL_CASE.exists():
        return [Result("exact run of the whole model", None, "s", note=f"{FULL_CASE} is not there")]
    bench.free()
    case = golden.read_case(FULL_CASE)
    start = time.perf_counter()
    computed = golden.compute_fingerprints(case, lambda: print(".", end="", flush=True), place=CUDA)
    seconds = time.perf_counter() - start
    _, stored = read_fingerprints(FULL_CASE / content_file(golden.read_manifest(FULL_CASE)))
    wrong = [key for key in sorted(stored) if key not in computed or stored[key] != computed[key]]
    for key in wrong[:3]:
        how = fingerprint_difference(stored[key], computed[key]) if key in computed else "is missing"
        print(f"\n{key}: {how}", flush=True)
    digest = hashlib.sha256("".join(computed[key].sha256 for key in sorted(computed)).encode()).hexdigest()
    bench.notes["full_size_digest"], bench.notes["full_size_logits"] = digest, computed["prefill/logits"].sha256
    note = f"{len(stored) - len(wrong)} of {len(stored)} tensors as on the CPU; digest {digest[:16]}"
    return [
        Result("exact run of the whole model", seconds, "s", note=note),
        Result("its tensors with the CPU's bits", len(stored) - len(wrong), "tensors", share=None, goal=len(stored)),
    ]


def sanitizing(bench: Bench) -> list[Result]:
    """The kernels' tests under compute-sanitizer, where that is installed."""
    tool = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    if tool is None:
        return [Result("compute-sanitizer", None, "", note="the tool is not installed")]
    results = []
    for check in ("memcheck", "racecheck"):
        test = [sys.executable, "-m", "pytest", "tests/cuda/test_on_gpu.py", "-q", "-p", "no:cacheprovider"]
        command = [tool, "--tool", check, "--error-exitcode", "9", *test]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        lines = (done.stdout + done.stderr).strip().splitlines()
        results.append(
            Result(
                f"compute-sanitizer {check}", float(done.returncode == 0), "clean", share=None, goal=1, note=lines[-1]
            )
        )
    return results
