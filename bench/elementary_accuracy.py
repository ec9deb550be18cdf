# SPDX-License-Identifier: Apache-2.0
"""Measure the largest error of refmoe's elementary functions against ball arithmetic, in units in the last place."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from flint import arb, ctx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from refmoe.arithmetic.exact import elementary, elementary_tables

ctx.prec = 256  # bits of every ball: a reduction from 2^31 to 2^-60 still leaves 160
TO_UNITS = {e: arb(2) ** (52 - e) for e in range(-1022, 1024)}
"""By the binary exponent of a result: the factor that makes its last place 1."""
CIRCLES = [(1e6, 128), (1e4, 128), (1e4, 80), (5e5, 64), (10.0, 6), (1e6, 96), (1.0, 2), (2.0**100, 14), (0.25, 10)]
"""Bases and denominators at which unit_circle is measured: every even numerator, as rotary embeddings use them."""

REAL: dict[str, Callable[[Any], Any]] = {
    "exp": lambda x: x.exp(),
    "log": lambda x: x.log(),
    "sin": lambda x: x.sin(),
    "cos": lambda x: x.cos(),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
}
OURS: dict[str, Callable[[Any], Any]] = {
    "exp": elementary.exp,
    "log": elementary.log,
    "sin": lambda x: elementary.sin_cos(x)[0],
    "cos": lambda x: elementary.sin_cos(x)[1],
    "sigmoid": elementary.sigmoid,
}
FUNCTIONS = [*REAL, "circle"]


def error_in_ulp(found: float, real: Any) -> float:
    """An upper bound of |found - real| in units in the last place of `real`, a ball; 2^-1074 at least."""
    if math.isinf(found):  # rounding makes infinity of what is at least half a unit above the largest float64
        return 0.0 if abs(real) > arb(2) ** 1024 - arb(2) ** 970 and (real > 0) == (found > 0) else math.inf
    if math.isnan(found):
        return math.inf
    size = abs(found)
    fraction, exponent = math.frexp(size)
    exponent -= 1
    if fraction == 0.5 and not abs(real) >= arb(size):
        exponent -= 1  # found is a power of two and the real value lies below, where units are half as large
    return float((abs(arb(found) - real) * TO_UNITS[max(exponent, -1022) if size else -1022]).upper())


def is_correctly_rounded(found: float, real: Any) -> bool:
    """Whether no other float64 is as near to `real`. It is proven, as balls compare only where they are apart."""
    if math.isinf(found):
        return error_in_ulp(found, real) == 0.0
    if real == 0:
        return found == 0.0
    below, above = math.nextafter(found, -math.inf), math.nextafter(found, math.inf)
    lower = (arb(found) + arb(below)) / 2 if math.isfinite(below) else -(arb(2) ** 1024 - arb(2) ** 970)
    upper = (arb(found) + arb(above)) / 2 if math.isfinite(above) else arb(2) ** 1024 - arb(2) ** 970
    return bool(lower < real and real < upper)


def nearest_to_multiples_of_half_pi() -> np.ndarray:
    """The float64 in [1, 2^30] nearest to multiples of pi / 2: continued fractions of 2^q 2 / pi, by exponent."""
    found = []
    two_over_pi = Fraction(str((arb(2) ** 201 / arb.pi()).floor().unique_fmpz())) / 2**200
    for exponent in range(30):
        ratio = two_over_pi * Fraction(2) ** (exponent - 52)  # steps of pi / 2 per unit in the last place
        before, denominator = 0, 1
        while denominator < 2**53 and ratio != int(ratio):
            found.append(math.ldexp(denominator, exponent - 52))
            ratio = 1 / (ratio - int(ratio))
            before, denominator = denominator, before + int(ratio) * denominator
    return np.array([x for x in found if x <= 2.0**30])


def scattered(rng: np.random.Generator, n: int, low: int, high: int) -> np.ndarray:
    """n float64 of either sign with every binary exponent from low to high - 1."""
    signed = rng.choice([-1.0, 1.0], n) * rng.uniform(1, 2, n)
    return np.asarray(np.ldexp(signed, rng.integers(low, high, n)))


def around(centres: np.ndarray, rng: np.random.Generator, n: int) -> np.ndarray:
    """n float64 at most three places away from some of the centres."""
    chosen = rng.choice(np.asarray(centres, dtype=np.float64), n)
    moved = (chosen.view(np.int64) + rng.integers(-3, 4, n)).view(np.float64)
    return np.where(np.isfinite(moved), moved, chosen)


def near_half_pi(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """n float64 in [1, 2^30] next to multiples of pi / 2 (steps = 16) or other multiples of pi / 32."""
    k = rng.integers(16, 10 * 2**30, n) // steps * steps
    high = k * elementary_tables.PI_STEP[0]
    x = np.where(high <= 2.0**30, high, 1.0)
    return (x.view(np.int64) + rng.integers(-1, 2, n)).view(np.float64)


def arguments(function: str, n: int, seed: int) -> np.ndarray:
    """n arguments: one half spread over the domain, the other half where the algorithm's error is likely largest."""
    rng = np.random.default_rng([FUNCTIONS.index(function), seed])
    tiny = scattered(rng, n // 10, -1074, 0)
    if function == "exp":
        step = math.log(2) / 32
        parts = [
            rng.uniform(-745.2, 709.8, n // 4),
            rng.uniform(-1, 1, n // 4),
            around(rng.integers(-34000, 32700, 4000) * step, rng, n // 5),  # the ends and centres of the reduction
            rng.uniform(-745.2, -708.3, n // 5),  # subnormal results
            np.array(
                [709.782712893384, 709.7827128933841, -745.1332191019411, -745.1332191019412, 0.0, -708.396418532264]
            ),
            tiny,
        ]
    elif function == "log":
        ends = np.concatenate([32 / (np.arange(23, 46) - 0.5), 32 / np.arange(23, 46), [0.5**0.5, 2**0.5]])
        ends = np.concatenate([np.ldexp(ends, k) for k in (-1022, -500, -1, 0, 1, 600)])
        parts = [
            rng.integers(1, 0x7FF0000000000000, n // 2).view(np.float64),
            1.0 + scattered(rng, n // 5, -53, -1),
            around(ends, rng, n // 10),
            rng.integers(1, 2**52, n // 10).view(np.float64),  # subnormal
            around(np.ldexp(1.0, np.arange(-1000, 1000)), rng, n // 20),
            np.array([5e-324, 2.0**-1022, sys.float_info.max, 1.0]),
        ]
    elif function in ("sin", "cos"):
        parts = [
            rng.uniform(-(2.0**30), 2.0**30, n // 4),
            scattered(rng, n // 4, -30, 30),
            near_half_pi(rng, n // 5, 16),
            near_half_pi(rng, n // 10, 1),
            around((rng.integers(0, 2000, 2000) + 0.5) * np.pi / 32, rng, n // 10),  # the ends of the reduction
            nearest_to_multiples_of_half_pi()[: n // 4],
            tiny,
        ]
    elif function == "sigmoid":
        parts = [
            rng.uniform(-745.2, 40, n // 4),
            rng.uniform(-10, 10, n // 2),
            rng.uniform(-753, -700, n // 10),  # subnormal results
            around(rng.integers(-2000, 2000, 2000) * math.log(2) / 32, rng, n // 20),
            tiny,
        ]
    else:
        raise ValueError(function)
    x = np.concatenate(parts)[:n]
    return np.concatenate([x, rng.uniform(-20, 20, n - len(x)) if function != "log" else rng.uniform(0, 2, n - len(x))])


def circle(n: int, seed: int) -> Iterator[tuple[str, float, Any]]:
    """At least n results of unit_circle, each with a description, the value and the real number."""
    rng = np.random.default_rng(seed)
    edges = [0, 1, 2, 4096, 32768, 2**31 - 1, 2**31]
    per_circle = max(len(edges) + 1, -(-n // sum(d for _, d in CIRCLES)))
    for base, denominator in CIRCLES:
        low = rng.integers(0, 2**17, per_circle)
        positions = np.where(rng.random(per_circle) < 0.5, low, rng.integers(0, 2**31, per_circle))
        positions[: len(edges)] = edges
        numerators = np.arange(0, denominator, 2)
        cos, sin = elementary.unit_circle(positions, base, numerators, denominator)
        for i, numerator in enumerate(numerators.tolist()):
            frequency = (arb(base).log() * -numerator / denominator).exp()
            for t, position in enumerate(positions.tolist()):
                real_sin, real_cos = (frequency * position).sin_cos()
                name = f"{position} * {base:g}^(-{numerator}/{denominator})"
                yield "cos " + name, float(cos[t, i]), real_cos
                yield "sin " + name, float(sin[t, i]), real_sin


def measure(function: str, n: int, seed: int) -> dict[str, Any]:
    """The largest error over n arguments, its argument, and the number of results that are not the nearest float64."""
    worst, where, missed, count = 0.0, "", 0, 0
    if function == "circle":
        results: Any = circle(n, seed)
    else:
        x = arguments(function, n, seed)
        real = REAL[function]
        results = ((v, y, real(arb(v))) for v, y in zip(x.tolist(), OURS[function](x).tolist(), strict=True))
    for argument, found, exact in results:
        error = error_in_ulp(found, exact)
        count += 1
        missed += error >= 0.5
        if error > worst:
            worst, where = error, argument if isinstance(argument, str) else argument.hex()
    return {"function": function, "arguments": count, "max_ulp": worst, "at": where, "not_nearest": missed}


def merge(rows: list[dict[str, Any]]) -> dict[str, Any]:
    worst = max(rows, key=lambda row: row["max_ulp"])
    return worst | {key: sum(row[key] for row in rows) for key in ("arguments", "not_nearest")}


def write_vectors(path: Path) -> None:
    """Write the golden vectors: edges, a spread of arguments, and arguments with a value near a rounding boundary."""
    edges = [0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, -5e-324, 2.0**-1022, -(2.0**-1022), 1.0, -1.0, 0.5, -0.5]
    edges += [
        2.0**-28,
        2.0**-27,
        -(2.0**-26),
        709.782712893384,
        709.7827128933841,
        -708.3964185322641,
        -745.1332191019411,
    ]
    edges += [
        -745.1332191019412,
        -751.9,
        -752.1,
        -800.0,
        -801.0,
        40.0,
        64.0,
        65.0,
        2.0**30,
        math.nextafter(2.0**30, 2e9),
    ]
    edges += [sys.float_info.max, -sys.float_info.max, 2.0**1023, math.pi, -math.pi / 2, 710.0, -37.0, 37.0]

    def bits(value: float) -> str:
        return f"{int(np.float64(value).view(np.uint64)):016x}"

    functions: dict[str, list[list[Any]]] = {}
    for name, real in REAL.items():
        x = np.concatenate([edges, arguments(name, 40000, 7)])
        rows = []
        for v, y in zip(x.tolist(), OURS[name](x).tolist(), strict=True):
            if not math.isfinite(v) or math.isnan(y) or (name == "log" and v == 0):
                rows.append((0.0, [bits(v), bits(y), True]))
            else:
                exact = real(arb(v))
                rows.append((error_in_ulp(y, exact), [bits(v), bits(y), is_correctly_rounded(y, exact)]))
        ranked = sorted((row for row in rows[len(edges) :]), key=lambda row: -row[0])
        chosen = rows[: len(edges)] + rows[len(edges) :: 400] + ranked[:100]
        functions[name] = [row for _, row in chosen]
    circles = []
    for base, denominator in CIRCLES:
        positions = np.array([0, 1, 5, 4095, 32767, 1234567, 2**31])
        numerators = np.arange(0, denominator, 2)[:: max(1, denominator // 16)]
        cos, sin = elementary.unit_circle(positions, base, numerators, denominator)
        for (t, i), cosine in np.ndenumerate(cos):
            c, s = float(cosine), float(sin[t, i])
            real_sin, real_cos = (
                (arb(base).log() * -int(numerators[i]) / denominator).exp() * int(positions[t])
            ).sin_cos()
            row: list[Any] = [int(positions[t]), bits(base), int(numerators[i]), denominator, bits(c), bits(s)]
            circles.append([*row, is_correctly_rounded(c, real_cos), is_correctly_rounded(s, real_sin)])
    text = ",\n".join(
        f' "{name}": [\n' + ",\n".join("  " + json.dumps(row) for row in rows) + "\n ]"
        for name, rows in functions.items()
    )
    text += ',\n "unit_circle": [\n' + ",\n".join("  " + json.dumps(row) for row in circles) + "\n ]"
    path.write_text('{\n "format_version": "1",\n' + text + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__ + "\n\nexample: python bench/elementary_accuracy.py --arguments 2000000 --json errors.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--arguments", type=int, default=2_000_000, metavar="N", help="per function (default: %(default)s)"
    )
    parser.add_argument("--function", choices=FUNCTIONS, action="append", help="only this one; may be repeated")
    parser.add_argument("--processes", type=int, default=2, metavar="P", help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the table here as well")
    parser.add_argument(
        "--vectors", type=Path, metavar="PATH", help="write golden/elementary-vectors.json, measure nothing"
    )
    options = parser.parse_args()
    if options.vectors:
        write_vectors(options.vectors)
        return
    console, chunk, started = Console(), 20_000, time.perf_counter()
    functions = options.function or FUNCTIONS
    chunks = -(-options.arguments // chunk)
    jobs = [(f, min(chunk, options.arguments), seed) for f in functions for seed in range(chunks)]
    rows: dict[str, list[dict[str, Any]]] = {f: [] for f in functions}
    with (
        ProcessPoolExecutor(options.processes) as pool,
        Progress(console=console, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task("arguments", total=len(jobs))
        for row in pool.map(measure, *zip(*jobs, strict=True)):
            rows[row["function"]].append(row)
            bar.advance(task)
    merged = [merge(rows[f]) for f in functions]
    table = Table("function", "arguments", "largest error, ulp", "at", "not the nearest float64")
    for row in merged:
        table.add_row(
            row["function"], f"{row['arguments']:,}", f"{row['max_ulp']:.6f}", row["at"], str(row["not_nearest"])
        )
    console.print(table)
    console.print(f"{sum(row['arguments'] for row in merged):,} results in {time.perf_counter() - started:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(merged, indent=1) + "\n")


if __name__ == "__main__":
    main()
