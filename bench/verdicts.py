# SPDX-License-Identifier: Apache-2.0
"""The cost of a verdict over the cost of what it judges, side by side in one run, and the wall beside each.

    product   the enclosure of x [tokens, n] times a bfloat16 matrix [n, m], over one float32 product of the same
    model     `verify` of every tap of a prefill, over a float32 forward pass whose weights are ready
    streamed  the enclosure of a product with one expert's matrix of 8x7B, from the weight formula, over the product
    layer     `refmoe verify` of one layer of 8x7B with 8 tokens, weights from the formula, over `refmoe emit` of it
    files     the same from files in bfloat16 that are in the page cache, over reading these files once
    busy      both of these commands beside a process that multiplies matrices, over an idle machine
    logits    memory of `refmoe verify` for the case production-8x7b, logits alone, over that with all taps

Preparation of the weights counts for the verdict. Times of the first three are CPU seconds, since other processes
change them less than seconds of a clock. The others are whole commands, with all threads, by the clock. The wall is
the least work: the float64 product counts twice a float32 one, and the sum of magnitudes once. Of `files` it is the
start of a command, and the calls of NumPy for each weight. Each weight is read, tested, made float32 and float64, and
multiplied in both. The calls are timed on blocks in the caches of all cores at once. Of `model` it is the time of the
enclosures of products alone, to which sums, functions and the test of every value are added; `tests` is that of these
tests. Of both, `arithmetic` is the time of the operations of all sums at the measured rate of float32 products: of one
core for `model`, of all for `files`.
Ratios are medians. Rows that are measured alone replace those of the file; `files` and `busy` write 3.5 GB below
--folder, and remove them.

    OMP_NUM_THREADS=1 python -m bench.verdicts --only product --only model --only streamed --json FILE
    python -m bench.verdicts --only layer --only files --only busy --only logits --json FILE
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from threadpoolctl import threadpool_limits

from bench.clock import Clock, keep_bytecode
from bench.verify_cost import MIDDLE, ideal_trace
from refmoe.arithmetic.arrays import StoredWeight
from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.enclosure.products import Accumulator
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.checkpoints.names import parameter_shapes
from refmoe.checkpoints.synthetic import SyntheticWeight, synthetic_checkpoint
from refmoe.checkpoints.weight import Weight
from refmoe.checkpoints.write import write_checkpoint
from refmoe.jobs.source import Formula
from refmoe.profiles.load import policy
from refmoe.spec.config import PRESETS, Config
from refmoe.spec.model import Model, forward
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.steps.native import NATIVE_STEPS
from refmoe.traces.script import Call, plan
from refmoe.traces.trace import read_trace
from refmoe.verifier.findings import CONFORMANT
from refmoe.verifier.passes import Pass
from refmoe.verifier.segments import Settings
from refmoe.verifier.verify import verify

PRODUCTS = ((256, 4096, 4096), (64, 14336, 4096), (64, 512, 1792))
"""Tokens, terms and outputs: attention and an expert of 8x7B, an expert of the model of dim 512."""
EXPERT = (14336, 4096)
LEAST = 3.0
"""Float32 products that the sums behind an enclosure amount to, where errors are as small as usual."""
Work = Callable[[], Any]


def spent(work: Work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def compared(verdict: Work, judged: Work, repeats: int) -> dict[str, float]:
    """Both times and their ratio, measured in turns after one run of each."""
    verdict(), judged()
    pairs = [(spent(verdict), spent(judged)) for _ in range(repeats)]
    return {
        "ratio": statistics.median(a / b for a, b in pairs),
        "verdict_ms": 1e3 * statistics.median(a for a, _ in pairs),
        "judged_ms": 1e3 * statistics.median(b for _, b in pairs),
    }


def machine() -> dict[str, float]:
    """The rate of float32 products, and the bandwidth of reading memory."""
    a, b = np.ones((512, 2048), np.float32), np.ones((2048, 2048), np.float32)
    large = np.ones(1 << 27, np.float32)
    product, read = (statistics.median(spent(work) for _ in range(5)) for work in (lambda: a @ b, large.max))
    return {"gflops": 2e-9 * a.shape[0] * b.size / product, "gb_per_s": 1e-9 * large.nbytes / read}


def rate_of_all_cores() -> float:
    """Operations a second of float32 products, by the clock, with all threads that the BLAS has."""
    a, b = np.ones((512, 2048), np.float32), np.ones((2048, 2048), np.float32)
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2 * a.shape[0] * b.size / statistics.median(seconds)


def weight_of(values: Any) -> Weight:
    return Weight("layers.0.attention.wq", values.shape, values.dtype, source=lambda: values, origin="bench")


def product_row(shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    tokens, n, m = shape
    rng = np.random.default_rng(1)
    x = rng.standard_normal((tokens, n)).astype(np.float32)
    stored = (rng.standard_normal((m, n)) / 64).astype(ml_dtypes.bfloat16)
    weight, ready, used = weight_of(stored), stored.astype(np.float32), policy("float32")
    found = compared(
        lambda: EnclosureOps(used, matrix_bytes=1 << 32).linear(Enclosure(x), weight), lambda: x @ ready.T, repeats
    )
    return {"what": f"product, {tokens} x {n} x {m}", **found, "wall": LEAST}


def held(x: Any, dtype: Any) -> Any:
    """Parameters with all values in memory, in this dtype."""
    if isinstance(x, Weight):
        values = x.read().astype(dtype)
        return Weight(x.name, values.shape, values.dtype, source=lambda: values, origin="bench")
    if isinstance(x, tuple):
        return tuple(held(part, dtype) for part in x)
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{field.name: held(getattr(x, field.name), dtype) for field in fields(x)})
    return x


PRODUCTS_CLOCK, TESTS_CLOCK = Clock(time.process_time), Clock(time.process_time)


class TimedOps(EnclosureOps):
    """Enclosures that count the time of their products."""

    def times_weight(self, x: Enclosure, weight: StoredWeight, how: Accumulator) -> Enclosure:
        made: Enclosure = PRODUCTS_CLOCK.timed(super().times_weight)(x, weight, how)
        return made

    def _matmul(self, a: Enclosure, b: Enclosure, how: Accumulator) -> Enclosure:
        made: Enclosure = PRODUCTS_CLOCK.timed(super()._matmul)(a, b, how)
        return made


class TimedPass(Pass):
    """A pass that counts the time of its tests of values."""

    def _test(self, name: str, step: str, x: Enclosure, dumped: Any) -> int:
        outside: int = TESTS_CLOCK.timed(super()._test)(name, step, x, dumped)
        return outside


def operations(config: Config, tokens: int) -> int:
    """The operations of all matrix products of a prefill of so many tokens, those of masked scores included."""
    c = config
    attention = c.dim * c.head_dim * 2 * (c.heads + c.kv_heads) + 2 * tokens * c.heads * c.head_dim
    mixture = c.dim * c.experts + c.experts_per_token * 3 * c.dim * c.hidden_dim
    return 2 * tokens * (c.layers * (attention + mixture) + c.dim * c.vocab)


def model_row(tokens: int, name: str, repeats: int, folder: Path) -> dict[str, Any]:
    ids = np.random.default_rng(1).integers(0, MIDDLE.vocab, tokens)
    runs, used = plan([Call("prefill", 0, ids.tolist())], MIDDLE.vocab), policy(name)
    parameters = held(synthetic_checkpoint(MIDDLE, 1).parameters, used.at("weights").dtype)
    trace = ideal_trace(folder / f"{tokens}-{name}.safetensors", MIDDLE, parameters, runs, name)
    native, model = NativeOps(np.float32), Model(MIDDLE, held(parameters, np.float32), NATIVE_STEPS)
    settings = Settings(ops=TimedOps, passes=TimedPass)

    def judge() -> None:
        report = verify(trace, "bench", MIDDLE, parameters, runs, used, settings)
        assert report.verdict == CONFORMANT, report.headline

    PRODUCTS_CLOCK.spent = TESTS_CLOCK.spent = 0.0
    found = compared(judge, lambda: forward(native, model, ids, np.arange(tokens), None), repeats)
    products, tests = (each.spent / (repeats + 1) for each in (PRODUCTS_CLOCK, TESTS_CLOCK))
    judged, sums = found["judged_ms"] / 1e3, LEAST * operations(MIDDLE, tokens) / (1e9 * machine()["gflops"])
    what = f"model of dim 512, prefill {tokens}, {name}"
    return {"what": what, **found, "wall": products / judged, "tests": tests / judged, "arithmetic": sums / judged}


def streamed_row(repeats: int) -> dict[str, Any]:
    weight = SyntheticWeight(1, "layers.0.experts.0.w1", EXPERT, -7)
    x = np.random.default_rng(1).standard_normal((2, EXPERT[1])).astype(np.float32)
    used = policy("float32")
    found = compared(
        lambda: EnclosureOps(used).linear(Enclosure(x), weight),
        lambda: NativeOps(np.float32).linear(x, weight),
        repeats,
    )
    return {"what": "streamed, one expert's matrix of 8x7B, 2 tokens", **found, "wall": 1.0}


# ---- whole commands, by the clock

ONE_LAYER = replace(PRESETS["mixtral-8x7b"], layers=1)
EIGHT = "1,2,3,4,5,6,7,8"
BYTES = 2
"""Bytes of a bfloat16."""
BUSY = """
import numpy as np
a = np.ones((1024, 1024), np.float32)
print("ready", flush=True)
while True:
    a @ a
"""


def clocked(*words: str) -> float:
    """Seconds of a command of refmoe. Raises CalledProcessError where it fails."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "refmoe", *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """A process that multiplies matrices in one thread all the time."""
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, env=alone) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.kill()


def in_turns(what: str, verdict: Work, judged: Work, repeats: int, wall: float) -> dict[str, Any]:
    """A row of two works that return their seconds."""
    pairs = [(verdict(), judged()) for _ in range(repeats)]
    return {
        "what": what,
        "ratio": statistics.median(a / b for a, b in pairs),
        "verdict_ms": 1e3 * statistics.median(a for a, _ in pairs),
        "judged_ms": 1e3 * statistics.median(b for _, b in pairs),
        "wall": wall,
    }


@dataclass(frozen=True)
class Layer:
    """One layer of 8x7B with 8 tokens: the commands that emit and verify it."""

    emit: tuple[str, ...]
    verify: tuple[str, ...]


def from_formula(folder: Path) -> Layer:
    model, trace = ("--checkpoint", "mixtral-8x7b", "--seed", "1"), str(folder / "formula.safetensors")
    given = ("--layers", "0:1", "--tokens", EIGHT, "--dtype", "float32", "--out", trace)
    return Layer(("emit", *model, *given), ("verify", trace, *model, "--policy", "float32"))


def from_files(folder: Path) -> Layer:
    """The commands on files, which are written where they are not there. The head is in them, and is not read."""
    model, trace = folder / "one-layer", str(folder / "files.safetensors")
    if not (model / "config.json").exists():
        write_checkpoint(model, ONE_LAYER, Formula(ONE_LAYER, 1).load().parameters)
    given = ("--tokens", EIGHT, "--dtype", "float32", "--no-digest", "--taps", "embedding,layers.*", "--out", trace)
    at = ("--checkpoint", str(model))
    return Layer(("emit", *at, *given), ("verify", trace, *at, "--policy", "float32"))


def read_once(folder: Path, needed: int) -> float:
    """Seconds of reading so many bytes of the files of a folder, from the page cache."""
    buffer = bytearray(1 << 24)
    began, left = time.perf_counter(), needed
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while left > 0 and (count := file.readinto(buffer)):
                left -= count
    return time.perf_counter() - began


def layer_bytes(folder: Path) -> int:
    """Bytes of the weights of the layer that the trace of `from_files` used, in bfloat16."""
    chosen = {*read_trace(folder / "files.safetensors").get("prefill", "layers.0.router.experts").reshape(-1).tolist()}
    layer = [name for name in parameter_shapes(ONE_LAYER) if name.startswith("layers.0.")]
    used = [name for name in layer if ".experts." not in name or int(name.split(".")[3]) in chosen]
    return sum(BYTES * math.prod(parameter_shapes(ONE_LAYER)[name]) for name in used)


def layer_row(repeats: int, folder: Path) -> Iterator[dict[str, Any]]:
    layer = from_formula(folder)
    clocked(*layer.emit)
    what = "one layer of 8x7B from the formula, 8 tokens, over `emit`"
    yield in_turns(what, lambda: clocked(*layer.verify), lambda: clocked(*layer.emit), repeats, 1.0)


def files_row(repeats: int, folder: Path) -> Iterator[dict[str, Any]]:
    layer = from_files(folder)
    clocked(*layer.emit)
    what, needed = "one layer of 8x7B from bfloat16 files, 8 tokens, over reading them", layer_bytes(folder)

    def read() -> float:
        return read_once(folder / "one-layer", needed)

    row = in_turns(what, lambda: clocked(*layer.verify), read, repeats, 0.0)
    tokens, weights, reading = len(EIGHT.split(",")), needed / BYTES, row["judged_ms"] / 1e3
    start = statistics.median(clocked("--version") for _ in range(repeats))
    rows = tokens * ONE_LAYER.experts_per_token // ONE_LAYER.experts  # of an expert on average
    calls = weights * seconds_for_a_weight(rows) + reading / (os.cpu_count() or 1)
    operations = LEAST * 2 * rows * weights / rate_of_all_cores()
    yield row | {"wall": (start + calls) / reading, "arithmetic": operations / reading}


def seconds_for_a_weight(tokens: int) -> float:
    """Seconds of the calls of NumPy that a bfloat16 weight goes through, on blocks in the cache, with all cores.

    Cores share caches, and threads of Python wait for each other. So two are not twice as fast as one.
    """
    (columns, terms), parts, times = (64, 4096), 32, 200
    cores = os.cpu_count() or 1

    def product(w: Any, x: Any) -> Any:
        return w.reshape(columns, parts, -1).transpose(1, 0, 2) @ x.reshape(parts, -1, tokens)

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        stored = rng.standard_normal((columns, terms)).astype(ml_dtypes.bfloat16)
        narrow, wide = np.empty(stored.shape, np.float32), np.empty(stored.shape)
        x = rng.standard_normal((terms, tokens))
        short = x.astype(np.float32)
        for _ in range(times):
            stored.view(np.int16).max(), stored.view(np.uint16).max()
            np.copyto(narrow, stored), np.copyto(wide, narrow)
            product(wide, x), product(np.abs(narrow, out=narrow), short)

    with threadpool_limits(1), ThreadPoolExecutor(cores) as threads:
        found = []
        for _ in range(5):
            began = time.perf_counter()
            [*threads.map(work, range(cores))]
            found.append(time.perf_counter() - began)
    return statistics.median(found) / (times * cores * columns * terms)


def busy_row(repeats: int, folder: Path) -> Iterator[dict[str, Any]]:
    for name, layer in (("the formula", from_formula(folder)), ("bfloat16 files", from_files(folder))):
        clocked(*layer.emit)

        def beside(layer: Layer = layer) -> float:
            with busy_neighbour():
                return clocked(*layer.verify)

        what = f"one layer of 8x7B from {name}, beside a busy process, over idle"
        yield in_turns(what, beside, lambda layer=layer: clocked(*layer.verify), repeats, 1.0)


# not ru_maxrss, which a process inherits from the one that started it
PEAK = """
import re, sys
from refmoe.cli import main
sys.argv = ["refmoe", *sys.argv[1:]]
try:
    main()
except SystemExit:
    pass
print("peak", re.search(r"VmHWM:\\s*([0-9]+)", open("/proc/self/status").read())[1], file=sys.stderr)
"""


def peak(*words: str) -> int:
    """The most memory of a command, in bytes."""
    done = subprocess.run([sys.executable, "-c", PEAK, *words], check=True, capture_output=True, text=True)
    return int(done.stderr.rsplit("peak ", 1)[1]) << 10


def logits_row(_repeats: int, folder: Path) -> Iterator[dict[str, Any]]:
    name = "production-8x7b"
    sizes = []
    for taps in ("logits", "*"):
        trace = folder / "taps.safetensors"
        clocked("emit", "--case", name, "--policy", "bfloat16", "--taps", taps, "--out", str(trace))
        sizes.append(peak("verify", str(trace), "--case", name, "--policy", "bfloat16", "--no-diagnose"))
        trace.unlink()
    yield {
        "what": f"memory of {name}, logits alone over all taps", "ratio": sizes[0] / sizes[1],
        "verdict_bytes": sizes[0], "judged_bytes": sizes[1], "wall": 1.0,
    }  # fmt: skip


# ---- the table


def product_rows(repeats: int, _folder: Path) -> Iterator[dict[str, Any]]:
    for shape in PRODUCTS:
        yield product_row(shape, repeats)


def model_rows(repeats: int, folder: Path) -> Iterator[dict[str, Any]]:
    for tokens in (256, 64):
        for name in ("float32", "bfloat16"):
            yield model_row(tokens, name, repeats, folder)


def streamed_rows(repeats: int, _folder: Path) -> Iterator[dict[str, Any]]:
    yield streamed_row(repeats)


KINDS: dict[str, Callable[[int, Path], Iterator[dict[str, Any]]]] = {
    "product": product_rows, "model": model_rows, "streamed": streamed_rows, "layer": layer_row, "files": files_row,
    "busy": busy_row, "logits": logits_row,
}  # fmt: skip


def merged(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a file with those that were measured again in their places, and new ones at the end."""
    again = {row["what"]: row for row in new}
    kept = [again.pop(row["what"], row) for row in old]
    return [*kept, *again.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*KINDS], action="append", help="this kind of row; repeatable")
    parser.add_argument("--folder", type=Path, help="where files are written for a time; else a temporary folder")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the table here as well")
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "rows": []}
    if options.json and options.json.exists():
        before = json.loads(options.json.read_text(encoding="utf-8"))
        timed = not options.only or {"product", "model"} & {*options.only}
        found = {"machine": found["machine"] if timed else before["machine"], "rows": before["rows"]}
    print(found["machine"], flush=True)
    keep_bytecode()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for kind in options.only or KINDS:
            for row in KINDS[kind](options.repeats, Path(folder)):
                found["rows"] = merged(found["rows"], [row])
                print(f"{row['what']:66} {row['ratio']:5.1f} times, at least {row['wall']:.0f}", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
