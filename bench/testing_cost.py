# SPDX-License-Identifier: Apache-2.0
"""The cost of the assertions on kernels: each against one evaluation of its step in float32 by NumPy, in turns.

Few rows of a step without a matrix are proven legal. Their figures take longer, and are computed when one is read: that
ratio stands beside.

Beside them stand the walls. An assertion on one value costs its calls. To judge a value of a step without sums takes
many passes over arrays of binary64, and the time of one such pass is measured too.

Processor time is measured, which other processes of the machine change little. Use one thread: OMP_NUM_THREADS=1.

    python -m bench.testing_cost
    python -m bench.testing_cost --repeats 5 --json bench/results/testing_cost.json
    python -m bench.testing_cost --small
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

import refmoe
from refmoe.testing import screening
from refmoe.testing.checking import PIECE
from refmoe.verifier.tally import ROWS

Work = Callable[[], Any]
MODEL = {"D": 4096, "F": 14336, "E": 8, "k": 2, "H": 32, "K": 8, "d": 128, "S": 1024}
"""The sizes of Mixtral 8x7B."""
SMALL = {"D": 512, "F": 1792, "E": 8, "k": 2, "H": 8, "K": 2, "d": 64, "S": 1024}
"""An eighth of them."""
LEAST = dict.fromkeys(MODEL, 1) | {"d": 2}
"""One value, or one pair."""
FLOOR = 50
"""Repeats of an assertion on one value, and of one on all values of a step."""
SHORT = 0.2
"""Seconds for which a short step is repeated, up to as often: its times differ by a fifth."""
ALONE = ("rms norm", "rotary", "swiglu", "combine")
"""The steps without sums over a matrix."""
PROVEN = (*ALONE, "router")
"""The steps of which few rows are proven legal, and whose figures are computed when they are read."""
WHOLE = 32
"""Tokens of which all values are judged."""


def silu(x: Any) -> Any:
    return x / (1 + np.exp(-x))


def softmax(x: Any) -> Any:
    shifted = np.exp(x - x.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def products(rng: Any, tokens: int, n: int, m: int) -> tuple[Work, Work]:
    x, w = rng.standard_normal((tokens, n), np.float32), rng.standard_normal((m, n), np.float32)
    return lambda: x @ w.T, lambda: refmoe.testing.assert_linear(x @ w.T, x, w)


def grouped(rng: Any, tokens: int, size: dict[str, int]) -> tuple[Work, Work]:
    x = rng.standard_normal((tokens, size["D"]), np.float32)
    w = rng.standard_normal((size["E"], size["F"], size["D"]), np.float32)
    ids = np.sort(rng.integers(0, size["E"], tokens))

    def work() -> Any:
        return np.concatenate([x[ids == e] @ w[e].T for e in np.unique(ids)])

    return work, lambda: refmoe.testing.assert_grouped_linear(work(), x, w, ids=ids)


def norm(rng: Any, tokens: int, size: dict[str, int]) -> tuple[Work, Work]:
    x, gain = rng.standard_normal((tokens, size["D"]), np.float32), rng.random(size["D"], np.float32)

    def work() -> Any:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(1e-5)) * gain

    return work, lambda: refmoe.testing.assert_rms_norm(work(), x, gain, 1e-5)


def rotary(rng: Any, tokens: int, size: dict[str, int]) -> tuple[Work, Work]:
    x, half = rng.standard_normal((tokens, size["H"], size["d"]), np.float32), size["d"] // 2
    positions = np.arange(tokens)

    def work() -> Any:
        frequency = (1e6 ** -(np.arange(half) / half)).astype(np.float32)
        angle = (positions[:, None].astype(np.float32) * frequency)[:, None]
        cos, sin, a, b = np.cos(angle), np.sin(angle), x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    return work, lambda: refmoe.testing.assert_rotary(work(), x, positions, 1e6)


def attention(rng: Any, tokens: int, size: dict[str, int]) -> tuple[Work, Work]:
    q = rng.standard_normal((tokens, size["H"], size["d"]), np.float32)
    k, v = (rng.standard_normal((size["S"], size["K"], size["d"]), np.float32) for _ in range(2))
    positions = np.arange(size["S"] - tokens, size["S"])
    mask = np.where(np.arange(size["S"]) <= positions[:, None], 0, -np.inf).astype(np.float32)

    def work() -> Any:
        found = np.empty_like(q)
        for head in range(size["H"]):
            shared = head * size["K"] // size["H"]
            scores = q[:, head] @ k[:, shared].T * np.float32(size["d"] ** -0.5) + mask
            found[:, head] = softmax(scores) @ v[:, shared]
        return found

    return work, lambda: refmoe.testing.assert_attention(work(), q, k, v)


def swiglu(rng: Any, tokens: int, size: dict[str, int]) -> tuple[Work, Work]:
    gate, up = (rng.standard_normal((tokens, size["F"]), np.float32) for _ in range(2))
    return lambda: silu(gate) * up, lambda: refmoe.testing.assert_swiglu(silu(gate) * up, gate, up)


def routing(rng: Any, tokens: int, size: dict[str, int]) -> tuple[Any, Any, Any]:
    logits = rng.standard_normal((tokens, size["E"]), np.float32)
    ids = np.argsort(-logits, 1, kind="stable")[:, : size["k"]]
    return logits, ids, softmax(np.take_along_axis(logits, ids, 1))


def router(rng: Any, tokens: int, size: dict[str, int]) -> tuple[Work, Work]:
    logits, ids, weights = routing(rng, tokens, size)

    def work() -> Any:
        chosen = np.argsort(-logits, 1, kind="stable")[:, : size["k"]]
        return softmax(np.take_along_axis(logits, chosen, 1))

    return work, lambda: refmoe.testing.assert_router(ids, weights, logits)


def combine(rng: Any, tokens: int, size: dict[str, int]) -> tuple[Work, Work]:
    _, ids, weights = routing(rng, tokens, size)
    outputs = rng.standard_normal((tokens, size["k"], size["D"]), np.float32)

    def work() -> Any:
        return (outputs * weights[..., None]).sum(1)

    return work, lambda: refmoe.testing.assert_combine(work(), outputs, ids, weights)


def mixture(rng: Any, tokens: int, size: dict[str, int]) -> tuple[Work, Work]:
    _, ids, weights = routing(rng, tokens, size)
    x = rng.standard_normal((tokens, size["D"]), np.float32)
    wide = (size["E"], size["F"], size["D"])
    gate, up = (rng.standard_normal(wide, np.float32) / np.float32(size["D"] ** 0.5) for _ in range(2))
    down = rng.standard_normal((size["E"], size["D"], size["F"]), np.float32) / np.float32(size["F"] ** 0.5)

    def work() -> Any:
        found = np.zeros_like(x)
        for expert in np.unique(ids):
            token, slot = np.nonzero(ids == expert)
            rows = x[token]
            hidden = silu(rows @ gate[expert].T) * (rows @ up[expert].T)
            found[token] += weights[token, slot, None] * (hidden @ down[expert].T)
        return found

    return work, lambda: refmoe.testing.assert_moe(work(), x, gate, up, down, ids, weights)


FAMILIES: dict[str, Callable[[Any, int, dict[str, int]], tuple[Work, Work]]] = {
    "linear, D to F": lambda rng, tokens, size: products(rng, tokens, size["D"], size["F"]),
    "linear, F to D": lambda rng, tokens, size: products(rng, tokens, size["F"], size["D"]),
    "grouped linear": grouped,
    "rms norm": norm,
    "rotary": rotary,
    "attention over 1024 keys": attention,
    "swiglu": swiglu,
    "router": router,
    "combine": combine,
    "mixture of experts": mixture,
}


def measured(size: dict[str, int], tokens: list[int], repeats: int, only: str) -> Iterator[dict[str, Any]]:
    """The median time of each family's step, and of its assertion without the step, for each number of tokens.

    figures: the ratio of the assertion where a figure is read, if it is computed then
    """
    for name, make in FAMILIES.items():
        if only not in name:
            continue
        for count in tokens:
            step, assertion = make(np.random.default_rng(0), count, size)
            plain, both = medians([step, assertion], repeats)
            row = {"step": name, "tokens": count, "numpy": plain, "assertion": both - plain, "ratio": both / plain - 1}
            if count < ROWS and name in PROVEN:
                before, figures = medians([step, partial(read, assertion)], repeats)
                row["figures"] = figures / before - 1
            yield row


def medians(works: list[Work], repeats: int) -> list[float]:
    """The median processor time of each, in turns, so that each finds the caches as the others left them."""
    times: list[list[float]] = [[] for _ in works]
    begun = time.process_time()
    while len(times[0]) < repeats or (time.process_time() - begun < SHORT and len(times[0]) < FLOOR):
        for work, spent in zip(works, times, strict=True):
            start = time.process_time()
            work()
            spent.append(time.process_time() - start)
    return [statistics.median(each) for each in times]


def read(assertion: Work) -> float:
    """A figure of an assertion."""
    found: float = assertion().headroom
    return found


def per_value(size: dict[str, int], least: dict[str, float]) -> dict[str, float]:
    """The seconds in which a value is judged, where all values are.   least: those of an assertion on one value"""
    found = {}
    for name in ALONE:
        step = FAMILIES[name](np.random.default_rng(0), WHOLE, size)[0]
        with patch.object(screening, "MANY", 1 << 62):
            row = next(measured(size, [WHOLE], FLOOR, name))
        found[name] = (row["assertion"] - least[name]) / step().size
    return found


def one_pass() -> float:
    """The seconds for each value in which two arrays of binary64 are added, in pieces as the assertions take them."""
    a, b = np.ones((2, PIECE))
    times = []
    for _ in range(FLOOR):
        start = time.perf_counter()
        for _ in range(FLOOR):
            np.add(a, b, out=b)
        times.append(time.perf_counter() - start)
    return min(times) / FLOOR / PIECE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="an eighth of the sizes of Mixtral 8x7B")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 1024])
    parser.add_argument("--only", default="", help="steps whose name has this in it")
    parser.add_argument("--json", type=Path, help="write the table here as well")
    options = parser.parse_args()
    size = SMALL if options.small else MODEL
    rows = []
    print(f"{'step':<26} {'tokens':>6} {'numpy s':>9} {'assert s':>9} {'ratio':>6} {'figures':>8}")
    for row in measured(size, options.tokens, options.repeats, options.only):
        rows.append(row)
        print(
            f"{row['step']:<26} {row['tokens']:>6} {row['numpy']:>9.5f} {row['assertion']:>9.5f} {row['ratio']:>6.1f}"
            + (f" {row['figures']:>8.1f}" if "figures" in row else ""),
            flush=True,
        )
    least = {row["step"]: row["assertion"] for row in measured(LEAST, [1], FLOOR, options.only)}
    for step, spent in least.items():
        print(f"{step:<26} one value: {1000 * spent:.2f} ms")
    value = per_value(size, least) if not options.only else {}
    for step, spent in value.items():
        print(f"{step:<26} a value judged: {1e9 * spent:.0f} ns")
    print(f"one pass over an array: {1e9 * (single := one_pass()):.2f} ns for each value")
    if options.json:
        options.json.write_text(
            json.dumps(
                {
                    "sizes": size,
                    "repeats": options.repeats,
                    "rows": rows,
                    "least": least,
                    "value": value,
                    "pass": single,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
