# SPDX-License-Identifier: Apache-2.0
"""The cost of exactness: exact ops against native float64 on the same input, in one run.

Weights are prepared (exact) or converted (native) once, before the clock starts, as in use. Both are timed in turns, in
one thread and by that thread's own time, so that other work on the machine counts little.
The median of the ratios is printed, then the share of each operation in the exact time. A computation on few values
takes the time of its calls of functions, so that the ratio of their numbers is the wall.

    python bench/exact_cost.py
    python bench/exact_cost.py --repeats 9 --json bench/results/exact_cost.json
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import json
import pstats
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from threadpoolctl import threadpool_limits

from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.checkpoints.weight import Weight
from refmoe.spec.config import PRESETS, Config
from refmoe.spec.experts import Expert, run_expert
from refmoe.spec.model import Model, forward
from refmoe.suite import read_case

ROOT = Path(__file__).parent.parent
MIDDLE = Config(
    dim=512, layers=4, heads=8, kv_heads=2, head_dim=64, hidden_dim=1792, vocab=4096, experts=8, experts_per_token=2
)
OPERATIONS = ("linear", "matmul", "sum", "exp", "sigmoid", "unit_circle")
LEAST = 1.0
"""Seconds for which a computation is repeated at least."""


class Stopwatch(ExactOps):
    """Exact ops that record the time spent in each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.spent: dict[str, float] = defaultdict(float)

    def __getattribute__(self, name: str) -> Any:
        operation = super().__getattribute__(name)
        if name not in OPERATIONS:
            return operation

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.thread_time()
            result = operation(*arguments, **named)
            self.spent[name] += time.thread_time() - start
            return result

        return timed


def gaussian_expert(rng: np.random.Generator, config: Config) -> Expert:
    """One expert with Gaussian bfloat16 weights."""

    def weight(name: str, rows: int, columns: int) -> Weight:
        values = (rng.standard_normal((rows, columns), np.float32) / np.float32(np.sqrt(columns))).astype(
            ml_dtypes.bfloat16
        )
        return Weight(name=name, shape=values.shape, dtype=values.dtype, source=lambda: values, origin=name)

    return Expert(
        weight("w1", config.hidden_dim, config.dim),
        weight("w2", config.dim, config.hidden_dim),
        weight("w3", config.hidden_dim, config.dim),
    )


def subjects() -> dict[str, Callable[[Any], Any]]:
    """The computations that are timed, as functions of ops by name."""
    rng = np.random.default_rng(1)
    case = read_case(ROOT / "golden" / "walking-skeleton")
    small = Model(case.config, case.checkpoint().parameters)
    tokens = case.calls[0][2]
    middle = Model(MIDDLE, synthetic_checkpoint(MIDDLE, 1).parameters)
    prompt = rng.integers(0, MIDDLE.vocab, 64)
    full = PRESETS["mixtral-8x7b"]
    x = rng.standard_normal((8, full.dim))
    synthetic = synthetic_checkpoint(full, 1).parameters.layers[0].experts[0]
    gaussian = gaussian_expert(rng, full)

    starts = itertools.count()  # other positions each time, as in use: only the layers of one pass share their angles

    def run(model: Model, ids: Any) -> Callable[[Any], Any]:
        def pass_once(ops: Any) -> Any:
            start = next(starts)
            return forward(ops, model, ops.integers(ids), ops.integers(range(start, start + len(ids))))

        return pass_once

    return {
        f"golden case walking-skeleton, prefill of {len(tokens)}": run(small, tokens),
        "dim 512, 4 layers, hidden 1792, prefill of 64": run(middle, prompt),
        "8x7B expert, T = 8, synthetic weights": lambda ops: run_expert(ops, synthetic, ops.array(x)),
        "8x7B expert, T = 8, Gaussian bfloat16 weights": lambda ops: run_expert(ops, gaussian, ops.array(x)),
    }


def seconds(work: Callable[[], Any]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def calls(subject: Callable[[Any], Any], ops: Any) -> int:
    """The number of function calls that a computation makes once its weights are ready, NumPy's included."""
    profile = cProfile.Profile()
    profile.runcall(subject, ops)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def measure(subject: Callable[[Any], Any], repeats: int) -> dict[str, Any]:
    """Median times, the median of the ratios, the ratio of the numbers of calls, and the shares of the exact time."""
    native, exact, watch = NativeOps(np.float64), ExactOps(), Stopwatch()
    for ops in (native, exact, watch):
        subject(ops)
    repeats = max(repeats, int(LEAST / seconds(lambda: subject(exact))))
    pairs = [(seconds(lambda: subject(exact)), seconds(lambda: subject(native))) for _ in range(repeats)]
    watch.spent.clear()
    total = sum(seconds(lambda: subject(watch)) for _ in range(repeats))
    return {
        "ratio": statistics.median(a / b for a, b in pairs),
        "exact_ms": 1e3 * statistics.median(a for a, _ in pairs),
        "native_ms": 1e3 * statistics.median(b for _, b in pairs),
        "calls": calls(subject, exact) / calls(subject, native),
        "shares": {name: spent / total for name, spent in sorted(watch.spent.items(), key=lambda item: -item[1])},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="at least, and for a second at least")
    parser.add_argument("--json", type=Path, help="write the table here as well")
    options = parser.parse_args()
    results = {}
    for name, subject in subjects().items():
        with threadpool_limits(1):
            results[name] = found = measure(subject, options.repeats)
        shares = ", ".join(f"{operation} {share:.0%}" for operation, share in found["shares"].items() if share > 0.01)
        print(
            f"{name:48} {found['ratio']:5.1f} x  ({found['exact_ms']:.1f} ms / {found['native_ms']:.1f} ms), "
            f"{found['calls']:.1f} x the calls;  {shares}"
        )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
