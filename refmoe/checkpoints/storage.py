# SPDX-License-Identifier: Apache-2.0
"""How the weights of a checkpoint are stored: per format their number and their bits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from refmoe.checkpoints.layout import Checkpoint
from refmoe.checkpoints.names import named_weights, untied
from refmoe.checkpoints.rows import QuantisedCheckpoint, Stored
from refmoe.files.gguf_tensors import GgufFile
from refmoe.files.safetensors_file import CODES


def stored_in_gguf(opened: GgufFile) -> list[Stored]:
    """How each tensor of a GGUF file is stored. Types that refmoe does not read are told as well."""
    return [Stored(found.kind, math.prod(found.shape), 8 * found.nbytes) for found in opened.tensors.values()]


def stored_in(checkpoint: Checkpoint) -> list[Stored]:
    """How each tensor of a checkpoint is stored."""
    if isinstance(checkpoint, QuantisedCheckpoint):
        return [*checkpoint.stored.values()]
    weights = untied(named_weights(checkpoint.parameters)).values()
    sizes = [(weight.dtype, math.prod(weight.shape)) for weight in weights]
    return [Stored(CODES[dtype], values, 8 * dtype.itemsize * values) for dtype, values in sizes]


def storage_facts(tensors: Iterable[Stored]) -> dict[str, Any]:
    """As JSON: per format the weights and the bits of each, and the bits of a weight over all of them.

    Bits count what a format stores beside codes: scales, offsets, zero points.
    """
    weights: dict[str, int] = {}
    bits: dict[str, int] = {}
    for each in tensors:
        weights[each.format] = weights.get(each.format, 0) + each.values
        bits[each.format] = bits.get(each.format, 0) + each.bits
    total = sum(weights.values())
    return {
        "stored": sorted(weights),
        "formats": {
            name: {"weights": count, "bits_per_weight": bits[name] / count}
            for name, count in sorted(weights.items())
            if count
        },
        "bits_per_weight": sum(bits.values()) / total if total else 0.0,
    }
