# SPDX-License-Identifier: Apache-2.0
"""The weight formula's speed, compared with NumPy's PCG64 drawing as many raw 64-bit integers, and with its own wall.

The wall is the time of the formula's array operations alone, on one block that stays in the cache. All are timed in
turns, by the time of the thread, so that a shared machine counts less.

python bench/weight_formula.py
python bench/weight_formula.py --repeats 15 --json bench/results/weight_formula.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.checkpoints.weight_formula import BLOCK, TOP_BYTE, elements

CORES = os.cpu_count() or 1


def seconds(work: Callable[[], Any]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def passes() -> list[Callable[[], Any]]:
    """The operations of `elements` on one block, each as a call."""
    steps, z, t = np.arange(BLOCK, dtype=np.uint64), np.empty(BLOCK, np.uint64), np.empty(BLOCK, np.uint64)
    top, block, factor = z.view(np.uint8)[TOP_BYTE::8], np.empty(BLOCK, np.float32), np.uint64(0xBF58476D1CE4E5B9)
    mixing = [
        lambda: np.right_shift(z, np.uint64(30), out=t),
        lambda: np.bitwise_xor(z, t, out=z),
        lambda: np.multiply(z, factor, out=z),
    ]
    return [
        lambda: np.add(steps, factor, out=z),
        *mixing,
        *mixing,
        lambda: np.copyto(block, top, casting="unsafe"),
        lambda: np.subtract(block, np.float32(127.5), out=block),
        lambda: np.multiply(block, np.float32(0.5), out=block),
    ]


def formula(size: int) -> Any:
    return elements(1, "layers.0.experts.0.w1", -14, 0, size)


def on_all_cores(size: int) -> float:
    """Elements a second of all cores together, each by the time of its own thread."""
    with ThreadPoolExecutor(CORES) as pool:
        return sum(pool.map(lambda elements: elements / seconds(lambda: formula(elements)), [size] * CORES))


def measure(size: int, repeats: int) -> dict[str, float]:
    """Medians over the repeats. All are timed in turns, so that other load on the machine affects all."""
    generator, operations = np.random.PCG64(1), passes()

    def alone() -> None:
        for _ in range(size // BLOCK):
            for operation in operations:
                operation()

    rounds = [
        (
            seconds(lambda: formula(size)),
            seconds(lambda: generator.random_raw(size)),
            seconds(alone),
            on_all_cores(size),
        )
        for _ in range(repeats)
    ]
    ours, theirs, wall, together = (statistics.median(column) for column in zip(*rounds, strict=True))
    return {
        "elements": size,
        "repeats": repeats,
        "million_elements_per_second": size / ours / 1e6,
        "pcg64_million_integers_per_second": size / theirs / 1e6,
        "time_over_pcg64": statistics.median(each[0] / each[1] for each in rounds),
        "passes": len(operations),
        "million_elements_per_second_of_passes": size / wall / 1e6,
        "share": statistics.median(each[2] / each[0] for each in rounds),
        "cores": CORES,
        "million_elements_per_second_of_cores": together / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 25)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    options = parser.parse_args()
    found = measure(options.elements, options.repeats)
    print(f"weight formula: {found['million_elements_per_second']:.0f} million elements/s (float32, one core)")
    print(f"NumPy's PCG64:  {found['pcg64_million_integers_per_second']:.0f} million raw 64-bit integers/s")
    print(
        f"its {found['passes']} passes alone: {found['million_elements_per_second_of_passes']:.0f} million elements/s"
    )
    print(f"on {CORES} cores: {found['million_elements_per_second_of_cores']:.0f} million elements/s")
    print(f"time, formula over PCG64: {found['time_over_pcg64']:.2f} (median of {options.repeats} pairs)")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
