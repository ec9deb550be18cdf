# SPDX-License-Identifier: Apache-2.0
"""The published vectors of the sum of products: made by rational arithmetic, and met by every function that sums."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from refmoe.arithmetic.exact import dot
from tests.arithmetic.generate_dot_vectors import PATH, document

VECTORS = json.loads(PATH.read_text())["vectors"]


def numbers(listed: list[str]) -> Any:
    return np.array([float.fromhex(text) for text in listed], np.float64)


def same(found: float, expected: float) -> bool:
    return found.hex() == expected.hex()  # tells -0.0 from 0.0


def test_the_file_is_what_its_generator_writes() -> None:
    assert PATH.read_text() == document()


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["why"])
def test_every_vector_is_met(vector: dict[str, Any]) -> None:
    """As a linear map, as a product of matrices, backwards, beside other rows, and as a sum where b is all ones."""
    a, b, expected = numbers(vector["a"]), numbers(vector["b"]), float.fromhex(vector["sum"])
    for x, y in ((a, b), (b, a), (a[::-1], b[::-1])):
        rows, columns = np.stack([np.ones_like(x), x]), np.stack([y, np.ones_like(y)])
        assert same(float(dot.linear(rows, dot.prepare(columns))[1, 0]), expected)
        assert same(float(dot.matmul(rows[None], columns.T[None])[0, 1, 0]), expected)
    if (b == 1).all() and len(b):
        assert same(float(dot.sum(a[None], axis=1)[0]), expected)
