# SPDX-License-Identifier: Apache-2.0
"""The format document agrees with the code: its table of taps, and its test vectors."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe.checkpoints.weight_formula import elements, gains
from refmoe.spec.taps import LAYER_TAPS, MODEL_TAPS

TEXT = (Path(__file__).parent.parent / "golden" / "FORMAT.md").read_text()


def test_the_table_of_taps_is_the_spec_s() -> None:
    found = dict(re.findall(r"^\| `([a-z_.{}]+)` \| ([A-Za-z ]+) \|$", TEXT, re.MULTILINE))
    assert found == {f"layers.{{i}}.{name}": shape for name, shape in LAYER_TAPS.items()} | MODEL_TAPS


def test_the_vectors_of_the_weight_formula_are_what_it_gives() -> None:
    vectors = re.findall(r"^\| `([a-z0-9_.]+)` \| (\d+) to (\d+) \| (-?\d+) \| ([-\d, ]+) times", TEXT, re.MULTILINE)
    assert len(vectors) == 4
    for name, first, last, exponent, values in vectors:
        found = elements(1, name, int(exponent), int(first), int(last) + 1)
        assert found.tolist() == [int(value) * 2.0 ** int(exponent) for value in values.split(",")]
    (listed,) = re.findall(r"^\| `layers.0.moe_norm` \| 0 to 3 \| \| (.*) \|$", TEXT, re.MULTILINE)
    numerators = [int(sign + k) for sign, k in re.findall(r"1 ([+-]) (\d+)/128", listed)]
    assert gains(1, "layers.0.moe_norm", 4).tolist() == [1 + k / 128 for k in numerators]


@pytest.fixture(scope="module")
def in_c(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The document's C code, compiled with all warnings."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: install gcc to check the example of the weight formula")
    (code,) = re.findall(r"^```c\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    folder = tmp_path_factory.mktemp("c")
    (folder / "formula.c").write_text(code)
    command = [compiler, "-std=c99", "-O1", "-Wall", "-Wextra", "-pedantic", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*command, "-o", folder / "formula.so", folder / "formula.c", "-lm"], check=True)
    library: Any = ctypes.CDLL(str(folder / "formula.so"))
    library.key.restype, library.key.argtypes = ctypes.c_uint64, [ctypes.c_uint64, ctypes.c_char_p]
    library.element.restype = ctypes.c_double
    library.element.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int]
    library.gain.restype, library.gain.argtypes = ctypes.c_double, [ctypes.c_uint64, ctypes.c_uint64]
    return library


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
@pytest.mark.parametrize(
    ("name", "exponent", "start"),
    [
        ("embedding", -8, 0),
        ("layers.0.attention.wq", -9, 12345),
        ("layers.31.experts.7.w2", -14, 58720252),
        ("layers.55.experts.7.w3", -126, 2**31 - 100),
        ("output", 120, 2**32 - 100),
        ("final_norm", None, 0),
        ("layers.0.moe_norm", None, 0),
    ],
)
def test_the_example_in_c_gives_the_same_bits(
    in_c: Any, seed: int, name: str, exponent: int | None, start: int
) -> None:
    """Two hundred elements each, also across 2^31 and 2^32."""
    key = in_c.key(seed, hashlib.sha256(name.encode()).digest())
    span = range(start, start + 200)
    if exponent is None:
        found, expected = [in_c.gain(key, i) for i in span], gains(seed, name, 200)
    else:
        found, expected = (
            [in_c.element(key, i, exponent) for i in span],
            elements(seed, name, exponent, start, start + 200),
        )
    assert len({*found}) > 60
    assert np.array(found).tobytes() == expected.astype(np.float64).tobytes()
