# SPDX-License-Identifier: Apache-2.0
"""The contract of attention over pages, and the kernel under test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.contracts.broken import foreign
from refmoe.contracts.formats import Floats
from refmoe.contracts.frameworks import to_framework
from refmoe.contracts.law import Contract, Example
from refmoe.kernels.arrays import integers, own_dtype, returned
from refmoe.kernels.attention.data import Cache, Sequences
from refmoe.kernels.attention.declaration import Declaration

Legal = Callable[[NDArray[Any], Sequences, Declaration], str | None]
"""Judges a result [S, H, C] in its own dtype by the enclosure of its call; None where it is legal."""


@dataclass(frozen=True)
class Subject:
    """A kernel, its declaration, and a judge of values, without which only exact values are judged."""

    kernel: Callable[..., Any]
    declaration: Declaration
    legal: Legal | None = None

    def arguments(self, q: Floats, cache: Cache) -> dict[str, Any]:
        """The arguments of a call, in order."""
        d = self.declaration
        named = {name: to_framework(each, d.given, d.framework) for name, each in (
            ("q", q), ("keys", cache.keys), ("values", cache.values),
        )}  # fmt: skip
        for name, numbers in (("table", cache.table), ("lengths", cache.lengths)):
            named[name] = integers(numbers, d.ids_dtype, d.given, d.framework)
        return named

    def start(self, arguments: dict[str, Any]) -> Any:
        """Call the kernel. Returns what it returned."""
        with np.errstate(all="ignore"), foreign("the kernel", f" on {len(arguments['lengths'])} sequences"):
            return self.kernel(*arguments.values())

    def run(self, q: Floats, cache: Cache) -> Floats:
        """The result [S, H, C] as float64. Raises LawBroken when the kernel raises, Malformed for another form."""
        return returned(self.start(self.arguments(q, cache)), q.shape)

    def own(self, q: Floats, cache: Cache) -> NDArray[Any]:
        """The result [S, H, C] in its own dtype."""
        answer = self.start(self.arguments(q, cache))
        returned(answer, q.shape)
        return own_dtype(answer)


def sketch(d: Declaration) -> Declaration:
    """The part of a declaration that its examples depend on."""
    return replace(
        d, dtype="float32", ids_dtype="int64", framework="numpy", scale=None, held="finite", table_tail="pages",
        batch_invariant=False, deterministic=True, policy=None,
    )  # fmt: skip


def sequences(example: Example) -> int:
    """The number of sequences of an example."""
    return int(example["sizes"]["sequences"]) if "sizes" in example else 0


CONTRACT = Contract(subject="attention kernel", shape_law="form", sketch=sketch, tokens=sequences, number=100)
LAWS = CONTRACT.laws
"""All laws by name."""
law = CONTRACT.law
