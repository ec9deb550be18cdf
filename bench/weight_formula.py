# SPDX-License-Identifier: Apache-2.0
"""The weight formula's speed on one core, compared with NumPy's PCG64 drawing as many raw 64-bit integers.

python bench/weight_formula.py
python bench/weight_formula.py --repeats 15 --json bench/results/weight_formula.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.checkpoints.weight_formula import elements


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(size: int, repeats: int) -> dict[str, float]:
    """Medians over the repeats. Both are timed in turns, so that other load on the machine affects both."""
    generator = np.random.PCG64(1)
    formula, pcg64 = [], []
    for _ in range(repeats):
        formula.append(seconds(lambda: elements(1, "layers.0.experts.0.w1", -14, 0, size)))
        pcg64.append(seconds(lambda: generator.random_raw(size)))
    ratios = [ours / theirs for ours, theirs in zip(formula, pcg64, strict=True)]
    return {
        "elements": size,
        "repeats": repeats,
        "million_elements_per_second": size / statistics.median(formula) / 1e6,
        "pcg64_million_integers_per_second": size / statistics.median(pcg64) / 1e6,
        "time_over_pcg64": statistics.median(ratios),
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
    print(f"time, formula over PCG64: {found['time_over_pcg64']:.2f} (median of {options.repeats} pairs)")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
