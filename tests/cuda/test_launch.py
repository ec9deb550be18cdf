# SPDX-License-Identifier: Apache-2.0
"""A launch is checked against the table, and the table against the text."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refmoe.cuda.kernels import table
from refmoe.cuda.kernels.calls import Kernels
from refmoe.cuda.kernels.kernel import C_TYPES, GetFunction, Kernel, evaluate, parse
from refmoe.cuda.kernels.source import FILES, text

FLOATS, IDS = np.float32, np.int32


def nothing(file: str) -> GetFunction:
    """A module whose functions fail when they are called."""

    def get_function(expression: str) -> Callable[..., None]:
        raise AssertionError(f"{expression} was launched")

    return get_function


KERNELS = Kernels(np, nothing)
ROWS, MANY = np.zeros((2, 8), FLOATS), np.zeros((40_000, 2, 4), FLOATS)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: KERNELS.route(np.zeros((2, 8)), 2), "T is float64, but there are only float32, bfloat16"),
        (lambda: KERNELS.route(np.zeros((2, 257), FLOATS), 2), "experts is 257, more than 256"),
        (lambda: KERNELS.route(np.zeros((2, 40), FLOATS), 33), "k is 33, more than 32"),
        (lambda: KERNELS.route(np.zeros((2, 3), FLOATS), 4), "4 of 3 experts"),
        (lambda: KERNELS.route(np.zeros((8, 2), FLOATS).T, 2), "not C-contiguous"),
        (lambda: KERNELS.sort_pairs(np.zeros((2, 2), np.int64), 4), r"chosen is int64 \(4,\), not int32\[pairs\]"),
        (lambda: KERNELS.rms_norm(ROWS, np.zeros(7, FLOATS), 1e-5), r"gain \(7,\) is not T\[columns\]"),
        (lambda: KERNELS.rms_norm(ROWS, np.zeros(8, np.float16), 1e-5), "gain is float16"),
        (
            lambda: KERNELS.rotate(np.zeros((2, 3, 9), FLOATS), np.zeros((2, 4), FLOATS), np.zeros((2, 4), FLOATS)),
            r"x \(2, 3, 9\) is not T\[tokens, heads, 2\*half\] with 2\*half = 8",
        ),
        (
            lambda: KERNELS.expert_output(np.zeros((2, 3, 4), FLOATS), MANY, np.zeros((40_000, 2), IDS)),
            r"a grid of \(1, 80000\) blocks is more than CUDA launches",
        ),
        (lambda: table.SWIGLU.launch(nothing(""), gate=np.zeros(3, FLOATS)), "argument out is missing or unknown"),
        (lambda: table.RMS_NORM.launch(nothing(""), x=ROWS, gain=ROWS[0], out=ROWS), "argument eps is missing"),
        (lambda: table.SWIGLU.launch(nothing(""), gate=ROWS[0], up=ROWS[0], out=ROWS[0], n=3), "argument n is missing"),
        (lambda: table.SCAN_COUNTS.launch(nothing(""), count=1), "argument count is missing or unknown"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_an_error_before_the_launch(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


def test_an_empty_grid_is_not_launched() -> None:
    assert KERNELS.swiglu(np.zeros((0, 5), FLOATS), np.zeros((0, 5), FLOATS)).shape == (0, 5)
    assert KERNELS.gather_rows(np.zeros((3, 5), FLOATS), np.zeros(0, IDS), 2).shape == (0, 5)


def test_shapes_are_read_and_evaluated() -> None:
    assert parse("T[rows, 2*half]") == ("T", ["rows", "2*half"])
    assert evaluate("2*half+1", {"half": 3}) == 7


@pytest.mark.parametrize("kernel", table.KERNELS, ids=lambda kernel: kernel.name)
def test_the_table_says_what_the_text_says(kernel: Kernel) -> None:
    """Every parameter in order, its type, whether it is an array, and the block size of the launch bounds."""
    found = re.search(rf"__launch_bounds__\((\w+)\)\s+{kernel.name}\(([^)]*)\)", text(kernel.file))
    assert found
    names = {"PAIRS": table.PAIRS, "THREADS": 256}
    assert kernel.block == (int(found[1]) if found[1].isdigit() else names[found[1]])
    declared = [parameter.removeprefix("const ").split() for parameter in re.split(r",\s*", found[2])]
    types = {"int32": "int", "int64": "long long", "float32": "float", "T": "W" if kernel.file == "experts.cu" else "T"}
    expected = []
    for name, kind in kernel.arguments.items():
        element = parse(kind)[0] if "[" in kind else kind
        expected.append([*f"{types[element]}{'*' * ('[' in kind)}".split(), name])
    assert declared == expected


def test_constants_of_the_table_are_those_of_the_texts() -> None:
    whole = "".join(text(file) for file in FILES)
    for name in ("MOST_EXPERTS", "PAIRS", "PIECE"):
        assert set(re.findall(rf"constexpr int {name} = (\d+);", whole)) == {str(getattr(table, name))}
    assert all(
        re.search(rf"struct {name} {{|^float$", whole, re.MULTILINE) or name == "float" for name in C_TYPES.values()
    )
