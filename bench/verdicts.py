# SPDX-License-Identifier: Apache-2.0
"""The cost of a verdict over the cost of what it judges, side by side in one run, and the wall beside each.

    product   the enclosure of x [tokens, n] times a bfloat16 matrix [n, m], over one float32 product of the same
    model     `verify` of every tap of a prefill, over a float32 forward pass whose weights are ready
    streamed  the enclosure of a product with one expert's matrix of 8x7B, from the weight formula, over the product

Preparation of the weights counts for the verdict. Times are CPU seconds, since other processes change them less than
seconds of a clock. The wall is the least work: the float64 product counts twice a float32 one, and the sums of
magnitudes and of squares once each. Ratios are medians.

    OMP_NUM_THREADS=1 python -m bench.verdicts --json bench/results/verdicts.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bench.verify_cost import MIDDLE, ideal_trace
from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.checkpoints.synthetic import SyntheticWeight, synthetic_checkpoint
from refmoe.checkpoints.weight import Weight
from refmoe.profiles.load import policy
from refmoe.spec.model import Model, forward
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.steps.native import NATIVE_STEPS
from refmoe.traces.script import Call, plan
from refmoe.verifier.findings import CONFORMANT
from refmoe.verifier.verify import verify

PRODUCTS = ((256, 4096, 4096), (64, 14336, 4096), (64, 512, 1792))
"""Tokens, terms and outputs: attention and an expert of 8x7B, an expert of the model of dim 512."""
EXPERT = (14336, 4096)
LEAST = 4.0
"""Float32 products that the sums behind an enclosure amount to, at least."""
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


def model_row(tokens: int, name: str, repeats: int, folder: Path) -> dict[str, Any]:
    ids = np.random.default_rng(1).integers(0, MIDDLE.vocab, tokens)
    runs, used = plan([Call("prefill", 0, ids.tolist())], MIDDLE.vocab), policy(name)
    parameters = held(synthetic_checkpoint(MIDDLE, 1).parameters, used.at("weights").dtype)
    trace = ideal_trace(folder / f"{tokens}-{name}.safetensors", MIDDLE, parameters, runs, name)
    native, model = NativeOps(np.float32), Model(MIDDLE, held(parameters, np.float32), NATIVE_STEPS)

    def judge() -> None:
        report = verify(trace, "bench", MIDDLE, parameters, runs, used)
        assert report.verdict == CONFORMANT, report.headline

    found = compared(judge, lambda: forward(native, model, ids, np.arange(tokens), None), repeats)
    return {"what": f"model of dim 512, prefill {tokens}, {name}", **found, "wall": LEAST}


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


def rows(repeats: int, folder: Path) -> Iterator[dict[str, Any]]:
    for shape in PRODUCTS:
        yield product_row(shape, repeats)
    for tokens in (256, 64):
        for name in ("float32", "bfloat16"):
            yield model_row(tokens, name, repeats, folder)
    yield streamed_row(repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the table here as well")
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "rows": []}
    print(found["machine"], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(options.repeats, Path(folder)):
            found["rows"].append(row)
            print(f"{row['what']:50} {row['ratio']:5.1f} times, at least {row['wall']:.0f}", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
