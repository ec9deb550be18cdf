# SPDX-License-Identifier: Apache-2.0
"""The elementary functions: as near to the real value as promised, and equal bits on every machine."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import json
import math
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flint import arb, ctx
from hypothesis import given
from hypothesis import strategies as st

from refmoe.arithmetic.exact import double_double, elementary, elementary_tables

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("elementary_accuracy", ROOT / "bench" / "elementary_accuracy.py")
assert spec is not None
assert spec.loader is not None
bench: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

BOUND = 0.51  # ulp, as golden/elementary.md promises
VECTORS = json.loads((ROOT / "golden" / "elementary-vectors.json").read_text())
NAMES = list(bench.REAL)
NUMPY: dict[str, Any] = {
    "exp": np.exp,
    "log": np.log,
    "sin": np.sin,
    "cos": np.cos,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}
SEARCHED = {name: (-1e5, 1e5) for name in NAMES} | {
    "log": (5e-324, sys.float_info.max),
    "sin": (-(2.0**30), 2.0**30),
    "cos": (-(2.0**30), 2.0**30),
}
XP_NAMES = {"abs", "asarray", "empty", "empty_like", "maximum", "rint", "where"}  # all of them CuPy's too
HOST_NAMES = {"array", "asarray", "concatenate", "float64", "inf", "int64", "nan", "ones_like", "rint", "zeros_like"}


@pytest.fixture(autouse=True)
def precise() -> Iterator[None]:
    with ctx.workprec(256):
        yield


def bits(values: Any) -> Any:
    return np.ascontiguousarray(values, dtype=np.float64).view(np.uint64)


def from_hex(words: list[str]) -> Any:
    return np.array([int(word, 16) for word in words], dtype=np.uint64).view(np.float64)


def every_function(n: int) -> dict[str, Any]:
    """The bits of every function at the golden vectors and at n arguments each."""
    found = {}
    for name in NAMES:
        x = np.concatenate([from_hex([row[0] for row in VECTORS[name]]), bench.arguments(name, n, 1)])
        found[name] = bits(bench.OURS[name](x))
    cos, sin = elementary.unit_circle(np.arange(n), 1e6, np.arange(0, 128, 2), 128)
    return found | {"circle cos": bits(cos), "circle sin": bits(sin)}


def digests() -> dict[str, str]:
    return {name: hashlib.sha256(found.tobytes()).hexdigest() for name, found in every_function(3000).items()}


@pytest.mark.parametrize("function", [*NAMES, "circle"])
def test_the_error_is_below_the_bound(function: str) -> None:
    row = bench.measure(function, 20000, 12345)
    assert row["max_ulp"] < BOUND, row


@pytest.mark.parametrize("function", NAMES)
@given(data=st.data())
def test_the_error_is_below_the_bound_wherever_hypothesis_looks(function: str, data: st.DataObject) -> None:
    x = data.draw(st.floats(*SEARCHED[function]))
    assert bench.error_in_ulp(float(bench.OURS[function](x)), bench.REAL[function](arb(x))) < BOUND


@given(x=st.floats(-746, 710), y=st.floats(-746, 710))
def test_exp_grows(x: float, y: float) -> None:
    low, high = sorted((x, y))
    assert float(elementary.exp(low)) <= np.nextafter(float(elementary.exp(high)), np.inf)


@pytest.mark.parametrize("function", NAMES)
def test_golden_vectors(function: str) -> None:
    rows = VECTORS[function]
    x, y = from_hex([row[0] for row in rows]), from_hex([row[1] for row in rows])
    assert np.array_equal(bits(bench.OURS[function](x)), bits(y))
    for argument, found, (_, _, nearest) in zip(x.tolist(), y.tolist(), rows, strict=True):
        if math.isfinite(argument) and not math.isnan(found) and not (function == "log" and argument == 0):
            assert bench.is_correctly_rounded(found, bench.REAL[function](arb(argument))) == nearest
    with np.errstate(all="ignore"):
        assert not np.array_equal(bits(NUMPY[function](x[40:])), bits(y[40:])), "NumPy's own would not be noticed"


def test_golden_vectors_of_the_unit_circle() -> None:
    for position, base, numerator, denominator, *expected, cos_nearest, sin_nearest in VECTORS["unit_circle"]:
        theta = float(from_hex([base])[0])
        found = elementary.unit_circle(np.array([position]), theta, [numerator], denominator)
        assert [f"{int(bits(part)[0, 0]):016x}" for part in found] == expected
        real_sin, real_cos = ((arb(theta).log() * -numerator / denominator).exp() * position).sin_cos()
        assert bench.is_correctly_rounded(float(found[0][0, 0]), real_cos) == cos_nearest
        assert bench.is_correctly_rounded(float(found[1][0, 0]), real_sin) == sin_nearest


@pytest.mark.parametrize(
    ("function", "x", "y"),
    [
        *[(name, math.nan, math.nan) for name in NAMES],
        *[(name, -math.nan, math.nan) for name in NAMES],
        *[("exp", x, 1.0) for x in (0.0, -0.0, 5e-324, -(2.0**-54))],
        *[("exp", x, math.inf) for x in (math.inf, 709.7827128933841, 1e300)],
        *[("exp", x, 0.0) for x in (-math.inf, -745.1332191019412, -800.0, -1e300)],
        ("exp", 709.782712893384, float.fromhex("0x1.fffffffffff2ap+1023")),
        ("exp", -745.1332191019411, 5e-324),
        *[("log", x, -math.inf) for x in (0.0, -0.0)],
        *[("log", x, math.nan) for x in (-5e-324, -1.0, -math.inf)],
        ("log", 1.0, 0.0),
        ("log", math.inf, math.inf),
        *[(name, x, math.nan) for name in ("sin", "cos") for x in (math.inf, -math.inf, 2.0**30 + 1, -1e300)],
        *[("sin", x, x) for x in (0.0, -0.0, 5e-324, -(2.0**-1022), 2.0**-27)],
        *[("cos", x, 1.0) for x in (0.0, -0.0, 5e-324, -(2.0**-27))],
        *[("sigmoid", x, y) for x, y in ((0.0, 0.5), (-0.0, 0.5), (math.inf, 1.0), (40.0, 1.0), (-math.inf, 0.0))],
    ],
)
def test_edges(function: str, x: float, y: float) -> None:
    assert bits(bench.OURS[function](x)) == bits(abs(y) if math.isnan(y) else y)


def test_any_nan_becomes_the_one_nan() -> None:
    nans = np.array([0x7FF0000000000001, 0xFFF0000000000001, 0xFFF8000000000000, 0x7FFFFFFFFFFFFFFF], dtype=np.uint64)
    for name in NAMES:
        assert set(bits(bench.OURS[name](nans.view(np.float64))).tolist()) == {0x7FF8000000000000}


def test_unit_circle_at_its_edges() -> None:
    cos, sin = elementary.unit_circle(np.array([-1, 0, 2**31 + 1], dtype=np.int64), 1e4, [0, 2, 4], 4)
    assert np.isnan(cos[[0, 2]]).all()
    assert np.isnan(sin[[0, 2]]).all()
    assert (bits(cos[1]) == bits(1.0)).all()
    assert (bits(sin[1]) == 0).all()
    assert elementary.unit_circle(np.zeros(0, dtype=np.int32), 1e4, [0, 2], 4)[0].shape == (0, 2)
    for base, numerators, denominator in (
        (0.0, [0], 2),
        (math.nan, [0], 2),
        (1e4, [3], 2),
        (1e4, [-1], 2),
        (1e4, [0], 0),
    ):
        with pytest.raises(ValueError, match="unit_circle takes"):
            elementary.unit_circle(np.arange(2), base, numerators, denominator)
    with pytest.raises(TypeError, match="positions are integers"):
        elementary.unit_circle(np.arange(2.0), 1e4, [0], 2)
    with pytest.raises(TypeError, match="float64 is wanted"):
        elementary.exp(np.zeros(2, dtype=np.float32))


@pytest.mark.parametrize("function", NAMES)
def test_neither_shape_nor_place_changes_bits(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, x = bench.OURS[function], bench.arguments(function, 20160, 5)
    expected = bits(ours(x))
    order = np.random.default_rng(1).permutation(len(x))
    assert np.array_equal(bits(ours(x[order])), expected[order])
    assert np.array_equal(bits(ours(x[::-3])), expected[::-3])
    assert np.array_equal(
        bits(ours(x.reshape(2, 90, 112).transpose(2, 0, 1))).ravel(),
        expected.reshape(2, 90, 112).transpose(2, 0, 1).ravel(),
    )
    unaligned = np.frombuffer(b"123" + x.tobytes(), dtype=np.uint8)[3:].view(np.float64)
    assert not unaligned.flags.aligned
    assert np.array_equal(bits(ours(unaligned)), expected)
    assert [int(bits(ours(value)).item()) for value in x[:50].tolist()] == expected[:50].tolist()
    assert ours(np.float64(1.0)).shape == ()
    assert ours(np.zeros((0, 3))).shape == (0, 3)
    for size in (1, 7, 64, 1 << 20):
        monkeypatch.setattr(elementary, "_BLOCK", size)
        assert np.array_equal(bits(ours(x[:4000])), expected[:4000])


@pytest.mark.parametrize("function", ["exp", "sigmoid"])
@pytest.mark.parametrize("other", [math.nan, math.inf, -math.inf, 128.1, 709.9, -128.1, -745.0, -740.0, -800.5])
def test_an_element_out_of_the_ordinary_changes_no_bit_of_its_neighbours(function: str, other: float) -> None:
    """A block of ordinary elements takes fewer operations."""
    kernel = getattr(elementary, function)
    most = elementary._ORDINARY
    x = np.random.default_rng(12).uniform(-most, most, 4000)
    x[:1000] /= 100
    x[:5] = 0.0, -0.0, 1e-320, most, -most
    assert elementary._is_ordinary(x)
    assert not elementary._is_ordinary(np.append(x, other))
    assert kernel(x).tobytes() == kernel(np.append(x, other))[:-1].tobytes()


def test_arguments_are_left_alone() -> None:
    x = np.linspace(-5, 5, 100)
    x.flags.writeable = False
    for name in NAMES:
        bench.OURS[name](x)


def test_another_array_module_needs_few_names() -> None:
    xp = SimpleNamespace(**{name: getattr(np, name) for name in XP_NAMES})
    x = bench.arguments("sin", 10000, 6)
    for function in (elementary.exp, elementary.log, elementary.sin_cos, elementary.sigmoid):
        assert np.array_equal(bits(function(x, xp)), bits(function(x)))
    assert np.array_equal(
        bits(elementary.unit_circle(np.arange(999), 1e4, range(0, 80, 2), 80, xp)),
        bits(elementary.unit_circle(np.arange(999), 1e4, range(0, 80, 2), 80)),
    )


@pytest.mark.parametrize("module", [elementary, elementary_tables, double_double])
def test_the_source_uses_no_other_arithmetic(module: Any) -> None:
    tree = ast.parse(Path(module.__file__).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("np", "xp"):
            assert node.attr in (XP_NAMES if node.value.id == "xp" else HOST_NAMES), f"line {node.lineno}: {node.attr}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            assert set(names) <= {
                "__future__",
                "collections.abc",
                "functools",
                "typing",
                "numpy",
                "refmoe.arithmetic.arrays",
                "refmoe.arithmetic.exact",
                "refmoe.arithmetic.exact.double_double",
            }
        assert not isinstance(node, ast.MatMult | ast.Mod)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):  # of literals, and exact
            assert isinstance(node.left, ast.Constant)
            assert node.left.value in (2, 2.0)
            assert ast.unparse(node.right).lstrip("-").isdigit()


def test_constants_are_those_of_arb() -> None:
    ln2, pi = arb(2).log(), arb.pi()

    def nearest(value: float, real: Any, unit: int) -> bool:
        """Whether value is a multiple of 2^unit, and no other is nearer to real."""
        return float(value) % 2.0**unit == 0 and bool(abs(arb(value) - real) <= arb(2) ** (unit - 1))

    def rounded(value: float, real: Any) -> bool:
        return bool(bench.is_correctly_rounded(float(value), real))

    def unit(value: float, places: int) -> int:
        return math.frexp(value)[1] - places

    for j, (high, low) in enumerate(elementary_tables.EXP_TABLE.T.tolist()):
        real = (ln2 * j / 16).exp()
        assert nearest(high, real, -25)
        assert low == 0.0 if j == 0 else rounded(low, real - arb(high))
    for j, (high, low) in enumerate(elementary_tables.SIN_TABLE.T.tolist()):
        if j % 32 == 0:
            assert (high, low) == (0.0, 0.0)
            assert math.copysign(1, high) == math.copysign(1, low) == 1
        elif j % 16 == 0:
            assert (high, low) == (1.0 if j == 16 else -1.0, 0.0)
        else:
            real = (pi * j / 32).sin()
            assert nearest(high, real, unit(high, 26))
            assert rounded(low, real - arb(high))
    for i, (high, low) in enumerate(elementary_tables.LOG_TABLE.T.tolist(), start=23):
        real = (arb(32) / i).log()
        assert nearest(high, real, -42)
        assert low == 0.0 if i == 32 else rounded(low, real - arb(high))
    assert nearest(elementary_tables.LN2_STEP_1, ln2 / 16, -42)
    assert rounded(elementary_tables.LN2_STEP_2, ln2 / 16 - arb(elementary_tables.LN2_STEP_1))
    assert nearest(elementary_tables.LN2_1, ln2, -42)
    assert rounded(elementary_tables.LN2_2, ln2 - arb(elementary_tables.LN2_1))
    left = pi / 32
    for part in elementary_tables.PI_STEP_PARTS[:-1]:
        assert nearest(part, left, unit(part, 19))
        left -= arb(part)
    assert rounded(elementary_tables.PI_STEP_PARTS[-1], left)
    for (high, low), real in (
        (elementary_tables.PI_STEP, pi / 32),
        ((elementary_tables.STEPS_PER_PI, elementary_tables.STEPS_PER_PI_LOW), 32 / pi),
    ):
        assert rounded(high, real)
        assert rounded(low, real - arb(high))
    assert rounded(elementary_tables.STEPS_PER_LN2, 16 / ln2)
    sqrt_half = float(np.int64(elementary_tables.SQRT_HALF_BITS).view(np.float64))
    assert math.nextafter(sqrt_half, 0) < arb(0.5).sqrt() < sqrt_half
    largest = elementary._EXP_LARGEST
    assert arb(largest).exp() < arb(2) ** 1024 - arb(2) ** 970 < arb(math.nextafter(largest, 1e3)).exp()


def test_switching_off_simd_changes_no_bit() -> None:
    umath = importlib.import_module("numpy._core._multiarray_umath")
    enabled = [name for name in umath.__cpu_dispatch__ if umath.__cpu_features__.get(name)]
    if not enabled:
        pytest.skip("this NumPy dispatches to no SIMD level above its baseline on this CPU")
    environment = os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(enabled), "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == digests()


HARNESS = r"""
#include <stdio.h>
int main(int argc, char **argv) {
    double x[4], y[2];
    char f = argc > 1 ? argv[1][0] : 'e';
    while (fread(x, 8, f == 'u' ? 4 : 1, stdin) > 0) {
        if (f == 'e') y[0] = refmoe_exp(x[0]);
        if (f == 'l') y[0] = refmoe_log(x[0]);
        if (f == 'g') y[0] = refmoe_sigmoid(x[0]);
        if (f == 's') refmoe_sin_cos(x[0], &y[0], &y[1]);
        if (f == 'u') refmoe_unit_circle((int64_t)x[0], x[1], (int64_t)x[2], (int64_t)x[3], &y[0], &y[1]);
        fwrite(y, 8, f == 's' || f == 'u' ? 2 : 1, stdout);
    }
    return 0;
}
"""


@pytest.mark.parametrize("flags", [["-O0"], ["-O2"], ["-O3", "-march=native"]], ids=" ".join)
def test_the_documented_c_returns_the_same_bits(flags: list[str], tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    text = (ROOT / "golden" / "elementary.md").read_text()
    source = tmp_path / "elementary.c"
    source.write_text(text.split("```c\n")[1].split("```")[0] + HARNESS)
    program = tmp_path / "elementary"
    options = ["-std=c11", "-Wall", "-Werror", "-ffp-contract=off", *flags]
    subprocess.run([compiler, *options, str(source), "-o", str(program), "-lm"], check=True)

    def in_c(function: str, data: bytes) -> Any:
        found = subprocess.run([str(program), function], input=data, capture_output=True, check=True)
        return np.frombuffer(found.stdout, dtype=np.uint64)

    for letter, name in (("e", "exp"), ("l", "log"), ("g", "sigmoid"), ("s", "sin")):
        x = np.concatenate([from_hex([row[0] for row in VECTORS[name]]), bench.arguments(name, 60000, 9)])
        ours = elementary.sin_cos(x) if name == "sin" else bench.OURS[name](x)
        assert np.array_equal(in_c(letter, x.tobytes()), bits(ours).T.ravel()), name
    rows = [(row[0], from_hex([row[1]])[0], row[2], row[3], *from_hex(row[4:6])) for row in VECTORS["unit_circle"]]
    data = b"".join(struct.pack("4d", *row[:4]) for row in rows)
    assert np.array_equal(in_c("u", data), bits([row[4:] for row in rows]).ravel())


if __name__ == "__main__":
    print(json.dumps(digests()))
