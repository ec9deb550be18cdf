# SPDX-License-Identifier: Apache-2.0
"""Assertion on a fused layer of experts: from rows, weights and routing to the sum of the experts' outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Unpack, cast

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.enclosure.array import Enclosure, concatenate
from refmoe.errors import InputError
from refmoe.spec.experts import Expert
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.steps.rounding import CutOps, combine, run_experts
from refmoe.testing.arguments import fit, integers, real
from refmoe.testing.judgement import Judgement, Output, judge, require
from refmoe.testing.options import Options, checked, chosen_rows, policy_for, significance_of
from refmoe.testing.parameters import Matrix, known
from refmoe.testing.products import within

STEP = "moe.output"
ROWS = 512
"""Rows of one expert that are enclosed at a time, so that memory does not grow with them."""


class MoeOptions(Options, total=False):
    """The options of `assert_moe`."""

    transposed: bool
    """Whether the matrices are [E, D, F] and [E, F, D]: inputs before outputs."""
    fused: Literal["halves", "interleaved"] | None
    """Whether `w_gate` has both, [E, 2 F, D], one after the other or in turn. `w_up` is then None."""


@dataclass(frozen=True)
class Layer:
    """The arrays of a call, in the layout of the specification."""

    x: NDArray[Any]
    """[T, D]"""
    w_gate: NDArray[Any]
    """[E, F, D]"""
    w_up: NDArray[Any]
    """[E, F, D]"""
    w_down: NDArray[Any]
    """[E, D, F]"""
    ids: NDArray[Any]
    """Integers [T, k]; -1 for a slot of no expert here."""
    weights: NDArray[Any]
    """[T, k]"""

    def rows(self, at: Any) -> Layer:
        """The layer for some tokens."""
        return Layer(
            x=self.x[at], w_gate=self.w_gate, w_up=self.w_up, w_down=self.w_down, ids=self.ids[at],
            weights=self.weights[at],
        )  # fmt: skip


def assert_moe(
    found: Any, x: Any, w_gate: Any, w_up: Any, w_down: Any, ids: Any, weights: Any, **options: Unpack[MoeOptions]
) -> Judgement:
    """Assert that a kernel computed a layer of experts, within the rounding that its dtypes allow.

    found: [T, D]   x: [T, D]   w_gate, w_up: [E, F, D]   w_down: [E, D, F]
    ids: integers [T, k], the experts of each token; -1 for none   weights: [T, k]
    options: those of `MoeOptions`; they declare other layouts

    The result is the sum over slots of weight * down(silu(gate(x)) * up(x)). A kernel may store what is between two of
    these steps, as the policy says, or keep it.
    Returns the figures. Raises AssertionError when a value is wrong, and InputError for arrays that do not fit.
    """
    __tracebackhide__ = True
    return require(judge_moe(found, x, w_gate, w_up, w_down, ids, weights, **options))


def judge_moe(
    found: Any, x: Any, w_gate: Any, w_up: Any, w_down: Any, ids: Any, weights: Any, **options: Unpack[MoeOptions]
) -> Judgement:
    """The judgement of `assert_moe`, which also takes its arguments."""
    given = checked(options, MoeOptions, "assert_moe")
    layer = read_layer(x, w_gate, w_up, w_down, ids, weights, given)
    values = real(found, "found")
    fit({"found": values}, {"found": "T D"}, {"T": layer.x.shape[0], "D": layer.x.shape[1]})
    rows = chosen_rows(given, len(values))
    mine, values = layer.rows(rows), values[rows]
    output = Output(
        what="mixture of experts",
        step=STEP,
        found=values,
        enclose=lambda ops: enclose(ops, mine),
        where=lambda at: f"token {rows[at[0]]}, column {at[1]}, experts {mine.ids[at[0]].tolist()}",
        reads=mine.x,
        spans=5,
    )
    inputs = {"x": layer.x, "w_gate": layer.w_gate, "w_up": layer.w_up, "w_down": layer.w_down}
    return judge(output, policy_for(given, STEP, values, inputs), significance_of(given))


def read_layer(x: Any, w_gate: Any, w_up: Any, w_down: Any, ids: Any, weights: Any, given: dict[str, Any]) -> Layer:
    """The arrays of a call. Raises InputError when they do not fit."""
    arrays = {"x": real(x, "x"), "w_gate": real(w_gate, "w_gate"), "w_down": real(w_down, "w_down")}
    if given.get("transposed"):
        shapes = {"x": "T D", "w_gate": "E D F", "w_down": "E F D"}
    else:
        shapes = {"x": "T D", "w_gate": "E F D", "w_down": "E D F"}
    fused = given.get("fused")
    if fused not in (None, "halves", "interleaved"):
        raise InputError(f"fused: is {fused!r}, but 'halves', 'interleaved' or None was expected")
    if fused is None:
        arrays["w_up"], shapes["w_up"] = real(w_up, "w_up"), shapes["w_gate"]
    elif w_up is not None:
        raise InputError("w_up: is given although w_gate has both, but None was expected")
    else:
        axis = 2 if given.get("transposed") else 1
        if arrays["w_gate"].ndim != 3 or arrays["w_gate"].shape[axis] % 2:
            wanted = "[E, D, 2 F]" if given.get("transposed") else "[E, 2 F, D]"
            raise InputError(f"w_gate: has shape {list(arrays['w_gate'].shape)}, but {wanted} was expected")
        arrays["w_gate"], arrays["w_up"] = divided(arrays["w_gate"], axis, str(fused))
        shapes["w_up"] = shapes["w_gate"]
    arrays["ids"], shapes["ids"] = integers(ids, "ids"), "T k"
    arrays["weights"], shapes["weights"] = real(weights, "weights"), "T k"
    sizes = fit(arrays, shapes)
    within(arrays["ids"], sizes["E"], "ids")
    if given.get("transposed"):
        for name in ("w_gate", "w_up", "w_down"):
            arrays[name] = arrays[name].transpose(0, 2, 1)
    return Layer(**arrays)


def divided(both: NDArray[Any], axis: int, fused: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Gate and up of an array that has both along an axis.   fused: halves or interleaved"""
    half = both.shape[axis] // 2
    first, second = (slice(0, half), slice(half, None)) if fused == "halves" else (slice(0, None, 2), slice(1, None, 2))
    before = (slice(None),) * axis
    return both[(*before, first)], both[(*before, second)]


def enclose(ops: EnclosureOps, layer: Layer) -> Enclosure:
    """The enclosure of the layer's output, before it is stored: [T, D]"""
    tokens, k = layer.ids.shape
    cuts = cast(CutOps, ops)
    slots = layer.ids.reshape(-1)
    x = known(ops, layer.x)
    parts, order = [], []
    for expert in np.unique(slots):
        at = np.flatnonzero(slots == expert)
        order.append(at)
        if expert < 0:
            parts.append(Enclosure(np.zeros((len(at), layer.x.shape[1])), accumulation=ops.policy.accumulation))
            continue
        matrices = Expert(
            w1=Matrix("w1", layer.w_gate[expert]), w3=Matrix("w3", layer.w_up[expert]),
            w2=Matrix("w2", layer.w_down[expert]),
        )  # fmt: skip
        for start in range(0, len(at), ROWS):
            some = x[at[start : start + ROWS] // k]
            done = run_experts(cuts, [matrices], some, np.zeros((len(some.mid), 1), np.int64))
            parts.append(done[:, 0])
    back = np.empty(len(slots), np.int64)
    back[np.concatenate(order)] = np.arange(len(slots))
    outputs = concatenate(parts, axis=0)[back].reshape(tokens, k, -1)
    return cast(Enclosure, combine(cuts, outputs, known(ops, layer.weights)))
