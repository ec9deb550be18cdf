# SPDX-License-Identifier: Apache-2.0
"""Assertion on SwiGLU, and the functions that a kernel may have in its place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Unpack

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.enclosure.functions import relative_error
from refmoe.arithmetic.formats import upcast
from refmoe.errors import InputError
from refmoe.profiles.policy import Policy
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.testing.arguments import fit, flat, one_of, real
from refmoe.testing.call import LEAST, WIDE, Change, Output, Plain, Room
from refmoe.testing.judgement import Judgement, judge, require
from refmoe.testing.options import Options, checked, chosen_rows, policy_for, selection
from refmoe.testing.parameters import known
from refmoe.testing.structures import Rearranged

STEP = "expert.hidden"
GELU = 2 * math.sqrt(2 / math.pi)
"""gelu(x) by tanh is x sigmoid(GELU (x + CUBIC x^3))."""
CUBIC = 0.044715
SLOPE = 1.702
"""The slope of the sigmoid in the quick form of gelu, and in the SwiGLU of gpt-oss."""

Function = Literal["silu", "gelu", "tanh gelu", "quick gelu", "relu", "sigmoid", "nothing"]
OTHERS: dict[Function, str] = {
    "nothing": "the gate is multiplied as it is, without silu",
    "gelu": "the gate has gelu, not silu",
    "tanh gelu": "the gate has gelu by tanh, not silu",
    "quick gelu": f"the gate has x sigmoid({SLOPE} x), not silu",
    "relu": "the gate has relu, not silu",
    "sigmoid": "the gate has the sigmoid, not silu",
}
"""The functions that a kernel may have in the place of silu, in words."""
BUGS: dict[Function, str] = {"gelu": "expert-gelu", "tanh gelu": "expert-gelu"}


def activated(ops: EnclosureOps, x: Enclosure, function: Function) -> Enclosure:
    """The function of each element."""
    if function == "silu":
        return ops.silu(x)
    if function == "nothing":
        return x
    if function == "relu":
        above: Enclosure = ops.where(x.mid > 0, x, 0.0)
        return above
    if function == "sigmoid":
        return ops.sigmoid(x)
    if function == "quick gelu":
        return x * ops.sigmoid(x * SLOPE)
    return gelu(ops, x, function == "tanh gelu")


def gelu(ops: EnclosureOps, x: Enclosure, by_tanh: bool) -> Enclosure:
    """x / 2 (1 + erf(x / sqrt(2))), or its approximation by tanh.

    A kernel computes erf or tanh, and adds 1. So its error is relative to x, however small the result is. It is taken
    as twice the budget of exp, since this function only serves to recognise a mistake. |gelu'| <= 1.13.
    """
    x, policy = x.settle(), ops.policy
    m = x.mid
    if by_tanh:
        mid = m / (1 + np.exp(-GELU * (m + CUBIC * m**3)))
    else:
        mid = m * np.vectorize(math.erfc, otypes=[float])(-m / math.sqrt(2)) / 2
    own = 2 * relative_error(policy.exp, policy.accumulation, 1.0) * np.abs(m)
    return Enclosure(
        mid, 1.13 * x.r + own, 1.13**2 * np.asarray(x.v) + own**2 / 3, accumulation=x.accumulation, owed=True
    )


@dataclass(frozen=True)
class Gated(Plain):
    """A function of the gate, times up."""

    gate: NDArray[Any]
    """[T, F]"""
    up: NDArray[Any]
    """[T, F]"""
    function: Function = "silu"

    def some(self, at: Any) -> Gated:
        return replace(self, gate=self.gate[at], up=self.up[at])

    axis = 1

    def part(self, at: Any) -> Gated:
        return replace(self, gate=self.gate[:, at], up=self.up[:, at])

    def plain(self, dtype: Any) -> NDArray[Any]:
        gate, up = (each.astype(dtype, copy=False) for each in (self.gate, self.up))
        found = np.exp(-gate)
        found += 1
        np.divide(gate, found, out=found)
        found *= up
        return np.asarray(found)

    def room(self, policy: Policy) -> Room | None:
        if self.function != "silu" or "expert.silu.accumulation" in policy.cuts:
            return None
        # the errors of exp, 1 + exp and the inverse, and half a spacing of silu, which is half of u at least
        gate, exact = (upcast(each, WIDE) for each in (self.gate, self.up))
        divisor = np.exp(-gate)
        divisor += 1
        exact = gate / divisor * exact
        return Room(exact, np.abs(exact) * (LEAST * (policy.exp.constant + 2.5) * policy.accumulation.u))

    def enclose(self, ops: EnclosureOps) -> Enclosure:
        return activated(ops, known(ops, self.gate), self.function) * known(ops, self.up)


class SwigluOptions(Options, total=False):
    """The options of `assert_swiglu`."""

    fused: Literal["halves", "interleaved"] | None
    """Whether `gate` has both, [..., 2 F], one after the other or in turn. `up` is then None."""


def assert_swiglu(found: Any, gate: Any, up: Any = None, **options: Unpack[SwigluOptions]) -> Judgement:
    """Assert that a kernel computed silu(gate) * up, within the rounding that its dtypes allow.

    found: [..., F]   gate, up: [..., F]
    options: those of `SwigluOptions`
    Returns the figures. Raises AssertionError when a value is wrong, and InputError for arrays that do not fit.
    """
    __tracebackhide__ = True
    return require(judge_swiglu(found, gate, up, **options))


def judge_swiglu(found: Any, gate: Any, up: Any = None, **options: Unpack[SwigluOptions]) -> Judgement:
    """The judgement of `assert_swiglu`, which also takes its arguments."""
    given = checked(options, SwigluOptions, "assert_swiglu")
    fused = one_of(given, "fused", (None, "halves", "interleaved"))
    arrays = {"found": flat(real(found, "found")), "gate": flat(real(gate, "gate"))}
    if fused is None:
        arrays["up"] = flat(real(up, "up"))
    else:
        arrays["gate"], arrays["up"] = divided(arrays["gate"], 1, fused, "gate", up)
    fit(arrays, dict.fromkeys(("gate", "up", "found"), "T F"))
    rows = chosen_rows(given, len(arrays["gate"]))
    at = selection(rows, len(arrays["gate"]))
    values, call = arrays["found"][at], Gated(arrays["gate"][at], arrays["up"][at])
    output = Output(
        what="swiglu",
        step=STEP,
        found=values,
        call=call,
        reads=(call.gate, call.up),
        where=lambda at: f"row {rows[at[0]]}, column {at[1]}",
        changes=lambda: swiglu_changes(call, fused),
        cuts=("expert.silu",),
        inputs={"gate": call.gate, "up": call.up},
    )
    return judge(output, policy_for(given, STEP, values, {"gate": arrays["gate"], "up": arrays["up"]}), given)


def swiglu_changes(call: Gated, fused: str | None) -> Iterator[Change]:
    """The mistakes of SwiGLU."""
    yield Change("gate and up are exchanged", Gated(call.up, call.gate), "expert-w1-w3-swapped")
    if call.gate.shape[1] > 1:
        for words, gate, up in otherwise_fused(call.gate, call.up, 1, fused):
            yield Change(words, Gated(gate, up))
    for function, words in OTHERS.items():
        yield Change(words, replace(call, function=function), BUGS.get(function, ""))
    yield Change("up is missing", replace(call, up=np.ones_like(call.up)))
    own = np.arange(len(call.gate))
    yield Change("the result has the other sign", Rearranged(call, own, factor=-1.0))


def divided(both: NDArray[Any], axis: int, fused: str, name: str, other: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Gate and up of an array that has both along an axis.

    fused: halves or interleaved   name: of the array   other: the argument for up, which must be None
    Raises InputError when up is given too, or the axis has an odd length.
    """
    if other is not None:
        raise InputError(f"{name.replace('gate', 'up')}: is given although {name} has both, but None was expected")
    if both.ndim <= axis or both.shape[axis] % 2:
        raise InputError(f"{name}: has shape {list(both.shape)}, but gate and up in its axis {axis} were expected")
    half = both.shape[axis] // 2
    first, second = (slice(0, half), slice(half, None)) if fused == "halves" else (slice(0, None, 2), slice(1, None, 2))
    before = (slice(None),) * axis
    return both[(*before, first)], both[(*before, second)]


def otherwise_fused(
    gate: NDArray[Any], up: NDArray[Any], axis: int, fused: str | None
) -> Iterator[tuple[str, NDArray[Any], NDArray[Any]]]:
    """Gate and up as a kernel reads them that takes another order for the declared one, in words and as arrays.

    fused: the declared order; None: the kernel fused them by itself, and any order may be confused
    """
    if fused in (None, "halves"):
        both = np.concatenate([gate, up], axis=axis)
        yield ("gate and up are read as interleaved, but are in halves", *divided(both, axis, "interleaved", "", None))
    if fused in (None, "interleaved"):
        both = np.stack([gate, up], axis=axis + 1).reshape(
            *gate.shape[:axis], 2 * gate.shape[axis], *gate.shape[axis + 1 :]
        )
        yield ("gate and up are read as halves, but are interleaved", *divided(both, axis, "halves", "", None))
