# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts under test: called with the arrays, the layout and the framework that its declaration names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.contracts.broken import LawBroken, Malformed, foreign
from refmoe.contracts.formats import FORMATS, Floats, Ints
from refmoe.contracts.frameworks import to_framework, to_numpy
from refmoe.kernels.arrays import integers, own_dtype, returned
from refmoe.kernels.moe.call import Call
from refmoe.kernels.moe.declaration import Declaration

Kernel = Callable[..., Any]
Place = Callable[[Floats, str], Any]
"""From values and the name of an argument to an array of the kernel's framework and dtype."""
GUARD = 3
"""Rows of the output's memory before and after it, which no kernel may write to."""


@dataclass(frozen=True)
class Judged:
    """A result that is not legal."""

    words: str
    token: int | None = None


Legal = Callable[[NDArray[Any], Call, Declaration], Judged | None]
"""Judges a result [T, D] in its own dtype by the enclosure of its call; None where it is legal."""


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call, as the kernel gets them."""

    named: dict[str, Any]
    """In the order of the call."""
    shape: tuple[int, int]
    """The shape of the result."""
    order: Ints | None = None
    """The place of each row in the call, where rows are sorted by expert."""
    shares: Floats | None = None
    """The weights [T, 1] by which the rows of a kernel of offsets, which has none, are still to be multiplied."""
    memory: Any = None
    """The memory around the output, if the kernel is given one."""


@dataclass(frozen=True)
class Subject:
    """A kernel, its declaration, and a judge of values, without which only exact values are judged."""

    kernel: Kernel
    declaration: Declaration
    legal: Legal | None = None

    def run(self, call: Call, place: Place | None = None) -> Floats:
        """The result [T, D] of a call, as float64. Raises LawBroken when the kernel raises, or returns something else.

        place: makes the arrays of float arguments; that of `array` if not given
        """
        arguments = self.arguments(call, place)
        return self.result(arguments, self.start(arguments))

    def array(self, values: Floats, name: str) -> Any:
        """A new array of the kernel's framework, in the dtype of the argument."""
        form = self.declaration.shares if name == "weights" else self.declaration.given
        return to_framework(values, form, self.declaration.framework)

    def whole(self, values: Ints) -> Any:
        """A new array of the kernel's framework, in the dtype of ids."""
        return integers(values, self.declaration.ids_dtype, self.declaration.given, self.declaration.framework)

    def arguments(self, call: Call, place: Place | None = None) -> Arguments:
        """The arguments of a call in the declared layout. Rows that share a slot are sorted for a kernel of offsets."""
        d, put = self.declaration, place or self.array
        call, order, offsets = sorted_rows(call) if d.routing == "offsets" else (call, None, None)
        named = {"x": put(call.x, "x"), **{name: put(each, name) for name, each in matrices(call, d).items()}}
        if offsets is not None:
            named["offsets"] = self.whole(offsets)
        else:
            named |= {"ids": self.whole(call.ids), "weights": put(call.weights, "weights")}
        if d.expert_map:
            found = np.arange(len(call.w_gate)) if call.expert_map is None else call.expert_map
            named["expert_map"] = self.whole(found)
        memory = None
        tokens, hidden = call.x.shape
        if d.buffer:
            memory = to_framework(np.full((tokens + 2 * GUARD, hidden), np.nan), d.given, d.framework)
            named["out"] = memory[GUARD : GUARD + tokens]
        shares = None if offsets is None else call.weights
        return Arguments(named=named, shape=(tokens, hidden), order=order, shares=shares, memory=memory)

    def start(self, arguments: Arguments) -> Any:
        """Call the kernel. Returns what it returned, or the output that it was given."""
        with np.errstate(all="ignore"), foreign("the kernel", f" on {arguments.shape[0]} tokens"):
            answer = self.kernel(*arguments.named.values())
        return arguments.named["out"] if self.declaration.buffer else answer

    def result(self, arguments: Arguments, answer: Any) -> Floats:
        """The result [T, D] in the order of the call's tokens. Raises Malformed for another form."""
        values = returned(answer, arguments.shape)
        if arguments.memory is not None:
            around = to_numpy(arguments.memory)
            if not np.isnan(np.concatenate([around[:GUARD], around[-GUARD:]])).all():
                raise LawBroken("the kernel wrote to memory before or after its output")
        if arguments.order is None or arguments.shares is None:
            return values
        back = np.empty_like(values)
        back[arguments.order] = values * arguments.shares
        return back

    def own(self, arguments: Arguments, answer: Any) -> NDArray[Any]:
        """The result [T, D] in its own dtype, in the order of the call's tokens."""
        self.result(arguments, answer)
        values = own_dtype(answer)
        if values.dtype.name not in FORMATS:
            raise Malformed(f"found {values.dtype}, one of {', '.join(FORMATS)} was expected")
        if arguments.order is not None:
            values = values[np.argsort(arguments.order)]
        return values


def sorted_rows(call: Call) -> tuple[Call, Ints, Ints]:
    """A call of one slot per token with its rows sorted by expert, the place of each row, and offsets [E + 1]."""
    ids = call.ids[:, 0]
    order = np.argsort(ids, kind="stable")
    counts = np.bincount(ids, minlength=len(call.w_gate))
    return replace(call.rows(order)), order, np.concatenate([[0], np.cumsum(counts)])


def matrices(call: Call, d: Declaration) -> dict[str, Floats]:
    """The experts' matrices in the declared layout, by the names of the arguments."""
    first, second = (call.w_gate, call.w_up) if d.gate_first else (call.w_up, call.w_gate)
    turn = (0, 2, 1) if d.transposed else (0, 1, 2)
    w_down = np.ascontiguousarray(call.w_down.transpose(turn))
    if d.fused is None:
        names = ("w_gate", "w_up") if d.gate_first else ("w_up", "w_gate")
        parts = (np.ascontiguousarray(each.transpose(turn)) for each in (first, second))
        return {**dict(zip(names, parts, strict=True)), "w_down": w_down}
    if d.fused == "halves":
        both = np.concatenate([first, second], axis=1)
    else:
        both = np.stack([first, second], axis=2).reshape(len(first), -1, first.shape[2])
    return {"w_gate_up": np.ascontiguousarray(both.transpose(turn)), "w_down": w_down}
