# SPDX-License-Identifier: Apache-2.0
"""Fingerprints: digests of tensors that are too large to keep."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.exact import dot
from refmoe.checkpoints.weight_formula import elements
from refmoe.errors import InputError
from refmoe.files.parsing import json_value
from refmoe.files.reading import read_text
from refmoe.suite.manifest import tensor_digest
from refmoe.traces.trace import FORMAT_VERSION, Header, Recorder, parse_header

PROJECTIONS = 4
LEADING = 8


@dataclass(frozen=True)
class Fingerprint:
    """The fingerprint of a tensor. The digest shows whether every bit is right, the rest how far off a wrong one is."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    projections: tuple[str, ...]
    """Sums of all elements with different signs, each rounded once, as hexadecimal floats."""
    leading: tuple[str | int, ...]
    """The first elements: hexadecimal floats or integers."""


class Fingerprinter(Recorder):
    """A tap that keeps the fingerprints of arrays."""

    def __init__(self, progress: Callable[[], None] | None = None) -> None:
        super().__init__(progress=progress)
        self.fingerprints: dict[str, Fingerprint] = {}

    def keep(self, key: str, array: NDArray[Any]) -> None:
        self.fingerprints[key] = fingerprint(key, array)


def fingerprint(key: str, array: NDArray[Any]) -> Fingerprint:
    """The fingerprint of a tensor of float64 values or integers below 2^53.   key: ``<run>/<tap>``"""
    flat = array.reshape(-1)
    leading = flat[:LEADING].tolist()
    return Fingerprint(
        dtype=str(array.dtype),
        shape=array.shape,
        sha256=tensor_digest(array),
        projections=tuple(projection(key, j, flat.astype(np.float64)).hex() for j in range(PROJECTIONS)),
        leading=tuple(value.hex() if isinstance(value, float) else value for value in leading),
    )


def projection(key: str, j: int, flat: NDArray[Any]) -> float:
    """The sum of the elements, signed as the synthetic weights named ``fingerprint.{j}/{key}`` of seed 0. flat: [n]"""
    signs = np.sign(elements(0, f"fingerprint.{j}/{key}", 0, 0, len(flat)))
    return float(dot.sum(flat * signs, 0))


def from_json(entry: Any) -> Fingerprint:
    """The fingerprint in a JSON object that `asdict` made. Raises KeyError or TypeError for any other value."""
    return Fingerprint(
        dtype=entry["dtype"],
        shape=tuple(entry["shape"]),
        sha256=entry["sha256"],
        projections=tuple(entry["projections"]),
        leading=tuple(entry["leading"]),
    )


def fingerprint_text(header: Header, fingerprints: dict[str, Fingerprint]) -> str:
    """The text of the file of a case's fingerprints.   fingerprints: by ``<run>/<tap>``"""
    tensors = {key: asdict(fingerprints[key]) for key in sorted(fingerprints)}
    return json.dumps({**header.to_json(), "tensors": tensors}, indent=1) + "\n"


def read_fingerprints(path: Path) -> tuple[Header, dict[str, Fingerprint]]:
    """Read a file of fingerprints. Raises InputError when the file cannot be read or is not such a file."""
    text = read_text(path, "a file of fingerprints")
    header = parse_header(path, text)
    tensors: Any = json_value(path, text, "a file of fingerprints").get("tensors")
    try:
        return header, {key: from_json(entry) for key, entry in tensors.items()}
    except (AttributeError, KeyError, TypeError):
        raise InputError(f"{path}: 'tensors' is not an object of fingerprints of version {FORMAT_VERSION}") from None


def fingerprint_difference(stored: Fingerprint, computed: Fingerprint) -> str | None:
    """The difference of two fingerprints of one tensor, in words, or None."""
    if stored == computed:
        return None
    if (stored.dtype, stored.shape) != (computed.dtype, computed.shape):
        return f"is {stored.dtype} {list(stored.shape)}, but {computed.dtype} {list(computed.shape)} was computed"
    for i, (old, new) in enumerate(zip(stored.leading, computed.leading, strict=False)):
        if old != new:
            at = [int(k) for k in np.unravel_index(i, computed.shape)]
            return f"differs at {at}: stored {old}, computed {new}"
    for i, (old, new) in enumerate(zip(stored.projections, computed.projections, strict=False)):
        if old != new:
            return f"differs beyond its first {len(computed.leading)} elements: projection {i} is {old}, computed {new}"
    return f"has another SHA-256 than the {computed.sha256} of what was computed"
