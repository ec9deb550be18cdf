# SPDX-License-Identifier: Apache-2.0
"""The contract of dispatch plans, and the function under test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refmoe.contracts.broken import Malformed, first_line, foreign
from refmoe.contracts.formats import FORMATS, Ints
from refmoe.contracts.frameworks import to_numpy
from refmoe.contracts.law import Contract, Example, Need
from refmoe.kernels.arrays import integers
from refmoe.kernels.plan.declaration import Declaration


@dataclass(frozen=True)
class Plan:
    """The plan that a function returned, of which only the parts of its kind are set."""

    slots: Ints | None = None
    """Slots in the experts' order, with the numbers that fill blocks."""
    experts: Ints | None = None
    """The expert of each block."""
    total: int = 0
    """The number of slots that count, fillers included."""
    counts: Ints | None = None
    """The number of slots of each expert."""


@dataclass(frozen=True)
class Subject:
    """A function that plans, and its declaration."""

    function: Callable[..., Any]
    declaration: Declaration

    def array(self, ids: Ints) -> Any:
        """The ids as an array of the function's framework."""
        return integers(ids, self.declaration.ids_dtype, FORMATS["float32"], self.declaration.framework)

    def plan(self, ids: Ints, block: int, experts: int) -> Plan:
        """The plan for ids [T, k]. Raises LawBroken when the function raises, Malformed for another form."""
        return self.read(self.call(self.array(ids), block, experts), experts, block)

    def call(self, ids: Any, block: int, experts: int) -> Any:
        """The result of the function."""
        sizes = (block, experts) if self.declaration.kind == "blocks" else (experts,)
        with np.errstate(all="ignore"), foreign("the plan", f" for {len(ids)} tokens"):
            return self.function(ids, *sizes)

    def read(self, answer: Any, experts: int, block: int) -> Plan:
        """A result as a plan. Raises Malformed for another form."""
        kind = self.declaration.kind
        if kind == "histogram":
            return Plan(counts=whole(answer, "counts", experts))
        if kind == "offsets":
            return Plan(counts=np.diff(begins_at_zero(whole(answer, "offsets", experts + 1))))
        count = 3 if kind == "blocks" else 2
        if not isinstance(answer, tuple | list) or len(answer) != count:
            raise Malformed(f"found {type(answer).__name__}, {count} values were expected")
        slots = whole(answer[0], "slots", None)
        if kind == "permutation":
            offsets = begins_at_zero(whole(answer[1], "offsets", experts + 1))
            return Plan(slots=slots, counts=np.diff(offsets), total=len(slots))
        places = whole(np.asarray(to_numpy(answer[2])).reshape(-1), "total", 1)
        total, of_blocks = int(places[0]), whole(answer[1], "experts of blocks", None)
        if total % block or not 0 <= total <= min(len(slots), len(of_blocks) * block):
            raise Malformed(f"found total {total} for {len(slots)} slots in {len(of_blocks)} blocks of {block}")
        return Plan(slots=slots[:total], experts=of_blocks, total=total)


def begins_at_zero(offsets: Ints) -> Ints:
    """The offsets. Raises Malformed unless the first is 0."""
    if offsets[0] != 0:
        raise Malformed(f"found offsets that begin at {offsets[0]}, 0 was expected")
    return offsets


def whole(answer: Any, name: str, size: int | None) -> Ints:
    """An array of integers [size]. Raises Malformed for another."""
    try:
        found = to_numpy(answer)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of the user's own array class
        raise Malformed(f"{name}: is no array: {first_line(error)}") from error
    if found.dtype.kind != "i" or found.ndim != 1 or (size is not None and len(found) != size):
        wanted = "n" if size is None else size
        raise Malformed(f"{name}: found {found.dtype} of shape {list(found.shape)}, integers [{wanted}] were expected")
    return found


def sketch(d: Declaration) -> Declaration:
    """The part of a declaration that its examples depend on."""
    return replace(d, ids_dtype="int64", framework="numpy", stable=True, spare="unspecified", kind="blocks")


def tokens(example: Example) -> int:
    """The number of tokens of an example."""
    return int(example["sizes"]["tokens"]) if "sizes" in example else 0


CONTRACT = Contract(subject="plan", shape_law="form", sketch=sketch, tokens=tokens, number=100)
LAWS = CONTRACT.laws
"""All laws by name."""
law = CONTRACT.law

BLOCKS = Need("blocks, as declared", lambda s: s.declaration.kind == "blocks")
SLOTS = Need(
    "a plan that names slots: blocks or permutation", lambda s: s.declaration.kind in ("blocks", "permutation")
)
COUNTS = Need("a plan that counts", lambda s: s.declaration.kind != "blocks")
