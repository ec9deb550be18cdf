# SPDX-License-Identifier: Apache-2.0
"""A small model whose dimensions all differ, and safetensors files taken apart without the library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.checkpoints.names import named_weights
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters

UNEVEN = Config(
    dim=26, layers=2, heads=6, kv_heads=3, head_dim=8, hidden_dim=28, vocab=37, experts=5, experts_per_token=4,
    norm_eps=3e-5, rope_theta=3e4, window=11, context=99,
)  # fmt: skip
"""All dimensions differ, none is a default, and head_dim is not dim / heads."""

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Names of dtypes, and their names in safetensors."""


def all_values(parameters: Parameters) -> dict[str, np.ndarray[Any, Any]]:
    """Every parameter as float64, by its canonical name."""
    return {name: weight.read().astype(np.float64) for name, weight in named_weights(parameters).items()}


def assert_same_values(found: Parameters, expected: Parameters) -> None:
    """Assert that two models have equal parameters, bit for bit, as float64."""
    left, right = all_values(found), all_values(expected)
    assert left.keys() == right.keys()
    for name, values in right.items():
        assert left[name].shape == values.shape, name
        assert left[name].tobytes() == values.tobytes(), name


def take_apart(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file and the bytes after it."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def put_together(path: Path, header: dict[str, Any] | bytes, data: bytes, align: int = 8, shift: int = 0) -> None:
    """Write a safetensors file, its header padded until the data begins at a multiple of `align` plus `shift`."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * ((shift - len(text) - 8) % align)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def rename(path: Path, old: str, new: str) -> None:
    """Replace a part of every tensor's name in a safetensors file or an index."""
    if path.suffix == ".json":
        index = json.loads(path.read_text())
        index["weight_map"] = {name.replace(old, new): shard for name, shard in index["weight_map"].items()}
        path.write_text(json.dumps(index))
    else:
        header, data = take_apart(path)
        put_together(path, {name.replace(old, new): entry for name, entry in header.items()}, data)
