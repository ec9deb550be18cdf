# SPDX-License-Identifier: Apache-2.0
"""How tight the enclosure of a matrix product is, and which faults of an accumulator it detects.

One row of n values is multiplied by n x 384 weights. Legal sums come in many orders, trees, blockings and, where the
policy allows it, from truncating accumulators. The faults are those of kernels that should accumulate in float32.
For each fault the table has the share of outputs outside the legal interval, and the worst excess. The excess is the
distance of an output's cell from the exact value in standard deviations. The limit is that of a verification of ten
million values. Beside them stands the share of outputs that `numpy.allclose` accepts at a common tolerance.

    python -m bench.enclosures
    python -m bench.enclosures --json bench/results/enclosures.json
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from bench.accumulators import (
    FAULTS,
    KINDS,
    LEGAL,
    NO_FAULT,
    OUTPUTS,
    TRUNCATED,
    by_size,
    data,
    lanes,
    tf32,
    toward_zero,
)
from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import FLOAT32, FORMATS, nearest, ulp
from refmoe.profiles.load import policy
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.verifier.tally import Limits, Tally

VALUES = 10_000_000
LIMIT = Limits(1e-6, VALUES, 1000).excess
POLICIES = {"bfloat16": "hf-bfloat16", "float16": "hf-float16", "float32": "float32"}
TRUNCATING = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32+truncates=true"}
SIZES = (64, 4096, 14336)
TOLERANCE = 2e-2
"""`rtol` and `atol` of a common test of kernels in bfloat16, for comparison."""


# ---- measuring


def hold(x: Enclosure, found: Any, storage: str) -> Tally:
    """The verifier's tests on one row of outputs."""
    tally = Tally()
    with np.errstate(all="ignore"):
        tally.add(x[0], found, FORMATS[storage], FORMATS[storage], lambda at: (0, at), False)
    return tally


def enclose(x: Any, w: Any, name: str) -> Enclosure:
    return EnclosureOps(policy(name)).matmul(Enclosure(x[None]), Enclosure(w))


def fault_row(fault: str, storage: str, n: int, kind: str = "gaussian", seed: int = 1) -> dict[str, Any] | None:
    """One entry of the table of faults, or None where the fault changes nothing."""
    x, w = data(kind, n, storage, seed)
    terms = x[:, None] * w
    honest = nearest(lanes(terms, 16), FORMATS[storage])
    if fault == "output truncated":
        found = toward_zero(lanes(terms, 16), storage)
    elif fault == "TF32 inputs":
        found = nearest(lanes(tf32(x)[:, None] * tf32(w), 16), FORMATS[storage])
    else:
        found = nearest(FAULTS[fault](terms), FORMATS[storage])
    if np.array_equal(found, honest):
        return None
    tally = hold(enclose(x, w, POLICIES[storage]), found, storage)
    close = np.isclose(found, honest, rtol=TOLERANCE, atol=TOLERANCE)
    return {"outside": tally.outside / OUTPUTS, "excess": tally.excess, "allclose": float(np.mean(close))}


def tightness(storage: str, n: int) -> dict[str, Any]:
    """Radius over the worst error, and error over standard deviation, for legal sums of every kind of data."""
    row: dict[str, Any] = {"excess": 0.0, "outside": 0, "rms": 0.0, "radius_over_worst": math.inf, "allclose": 1.0}
    sorted_ratio, ulps, truncated = math.inf, 0.0, {"excess": 0.0, "outside": 0}
    for kind in KINDS:
        x, w = data(kind, n, storage)
        terms = x[:, None] * w
        plain = enclose(x, w, POLICIES[storage])
        radius, sigma = plain.r[0], np.sqrt(plain.v[0])
        worst = 0.0
        for variant in LEGAL.values():
            sums = np.asarray(variant(terms), np.float64)
            error = np.abs(sums - plain.mid[0])
            worst = max(worst, float((error / radius).max()))
            row["rms"] = max(row["rms"], float(np.sqrt(np.mean((error / sigma) ** 2))))
            stored = nearest(sums, FORMATS[storage])
            close = np.isclose(stored, nearest(plain.mid[0], FORMATS[storage]), rtol=TOLERANCE, atol=TOLERANCE)
            row["allclose"] = min(row["allclose"], float(np.mean(close)))
            tally = hold(plain, stored, storage)
            row["excess"] = max(row["excess"], tally.excess, float((error / sigma).max()))
            row["outside"] += tally.outside
        row["radius_over_worst"] = min(row["radius_over_worst"], 1 / worst)
        error = np.abs(np.asarray(by_size(terms), np.float64) - plain.mid[0])
        sorted_ratio = min(sorted_ratio, 1 / float((error / radius).max()))
        if kind == "gaussian":
            row["gaussian_radius_over_worst"] = 1 / worst
            ulps = float(np.median(radius / ulp(plain.mid[0], FORMATS[storage])))
        wide = enclose(x, w, TRUNCATING[storage])
        sums = nearest(terms, FLOAT32) if storage == "float32" else terms
        for variant in TRUNCATED.values():
            tally = hold(wide, nearest(variant(sums), FORMATS[storage]), storage)
            truncated["excess"] = max(truncated["excess"], tally.excess)
            truncated["outside"] += tally.outside
    return {**row, "sorted_radius_over_worst": sorted_ratio, "radius_in_ulps": ulps, "truncating": truncated}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the tables here as well")
    options = parser.parse_args()
    cells = [(storage, n) for storage in POLICIES for n in SIZES]
    tight = {f"{storage} {n}": tightness(storage, n) for storage, n in cells}
    rows = [*FAULTS, "TF32 inputs", "output truncated"]
    faults = {
        fault: {
            f"{storage} {n}": fault_row(fault, storage, n) for storage, n in cells if (fault, storage) not in NO_FAULT
        }
        for fault in rows
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"limit": LIMIT, "tolerance": TOLERANCE, "legal": tight, "faults": faults}, indent=1) + "\n"
        )
    print("Legal sums, six kinds of data: radius / worst error (Gaussian data; all; sorted by value), radius in ulps,")
    print("rms error / sigma, worst |error| / sigma and number outside; the same of truncating accumulators after bias")
    for cell, row in tight.items():
        cut = row["truncating"]
        print(
            f"{cell:16} {row['gaussian_radius_over_worst']:7.0f} {row['radius_over_worst']:7.0f} "
            f"{row['sorted_radius_over_worst']:6.1f} {row['radius_in_ulps']:9.2g}   {row['rms']:5.2f} "
            f"{row['excess']:5.1f} {row['outside']:3d}   {cut['excess']:5.1f} {cut['outside']:3d}"
        )
    print(f"\nFaults: share outside the legal interval / worst excess in sigma; limit {LIMIT:.1f}")
    print(" " * 30 + "".join(f"{cell:>16}" for cell in tight))
    for fault, found in faults.items():
        text = ""
        for cell in tight:
            one = found.get(cell, "")
            shown = "same bits" if one is None else f"{one['outside']:.2g} / {one['excess']:.0e}" if one else ""
            text += f"{shown:>16}"
        print(f"{fault:30}{text}")


if __name__ == "__main__":
    main()
