# SPDX-License-Identifier: Apache-2.0
"""Assertions on a layer of experts: the sum of the experts' outputs, and the fused layer from rows to that sum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Unpack, cast

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.enclosure.array import Enclosure, concatenate
from refmoe.arithmetic.formats import upcast
from refmoe.errors import InputError
from refmoe.profiles.policy import Policy
from refmoe.spec.experts import Expert
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.steps.rounding import CutOps, combine, run_experts
from refmoe.testing.activation import BUGS, OTHERS, Function, activated, divided, otherwise_fused
from refmoe.testing.arguments import fit, flags, integers, one_of, real
from refmoe.testing.call import LEAST, SPREADS, WIDE, Change, Output, Plain, Room, power_of_two
from refmoe.testing.judgement import Judgement, judge, require
from refmoe.testing.options import Options, checked, chosen_rows, policy_for, selection
from refmoe.testing.parameters import Matrix, known
from refmoe.testing.products import as_transpose, expert_changes, within

STEP = "moe.output"
ROWS = 512
"""Rows of one expert that are enclosed at a time, so that memory does not grow with them."""
BLOCKS = (16, 32, 64, 128)
"""The rows of an expert that kernels take at a time."""
LARGE = 1 << 26
"""Elements of the matrices from which copies of all of them cost too much to try a mistake."""


# ---- the sum over slots


@dataclass(frozen=True)
class Combined(Plain):
    """The sum of a token's expert outputs, each times its weight."""

    outputs: NDArray[Any]
    """[T, k, D]"""
    ids: NDArray[Any]
    """Integers [T, k]; a slot of -1 counts nothing."""
    weights: NDArray[Any]
    """[T, k]"""
    roundings: int = 0
    """The roundings of weights that a mistake computes anew."""

    def some(self, at: Any) -> Combined:
        return replace(self, outputs=self.outputs[at], ids=self.ids[at], weights=self.weights[at])

    axis = 1

    def part(self, at: Any) -> Combined:
        return replace(self, outputs=self.outputs[:, :, at])

    def plain(self, dtype: Any) -> NDArray[Any]:
        weights = np.where(self.ids >= 0, self.weights, 0).astype(dtype)
        outputs = self.outputs.astype(dtype, copy=False)
        if (self.ids < 0).any():
            outputs = np.where((self.ids >= 0)[..., None], outputs, 0)
        return np.asarray(np.einsum("tk,tkd->td", weights, outputs))

    def room(self, policy: Policy) -> Room | None:
        slots = self.ids.shape[1]
        exact = self._term(0)
        slack = power_of_two(exact)
        for slot in range(1, slots):  # arrays of one slot stay in the cache
            term = self._term(slot)
            exact += term
            slack += power_of_two(term)
        # half a spacing of each product; their spread is less than the sum by root 3 n at most
        slack *= LEAST * min(1.0, SPREADS / (3 * slots) ** 0.5) * policy.accumulation.u
        return Room(exact, slack)

    def _term(self, slot: int) -> NDArray[Any]:
        """The outputs of a slot times their weights, 0 where it counts nothing: binary64 [T, D], an array of its own"""
        here = self.ids[:, slot, None] >= 0
        term: NDArray[Any] = upcast(self.outputs[:, slot], WIDE) * upcast(self.weights[:, slot, None], WIDE)
        return term if here.all() else np.where(here, term, 0.0)

    def enclose(self, ops: EnclosureOps) -> Enclosure:
        here = self.ids >= 0
        outputs = known(ops, np.where(here[..., None], self.outputs, 0))
        weights = known(ops, np.where(here, self.weights, 0), self.roundings)
        return cast(Enclosure, combine(cast(CutOps, ops), outputs, weights))


class CombineOptions(Options, total=False):
    """The options of `assert_combine`."""


def assert_combine(
    found: Any, expert_outputs: Any, ids: Any, weights: Any, **options: Unpack[CombineOptions]
) -> Judgement:
    """Assert that a kernel added the outputs of each token's experts, each times its weight.

    found: [T, D]   expert_outputs: [T, k, D] or [T k, D], in the order of slots
    ids: integers [T, k]; a slot of -1 counts nothing, whatever its output is   weights: [T, k]
    Returns the figures. Raises AssertionError when a value is wrong, and InputError for arrays that do not fit.
    """
    __tracebackhide__ = True
    return require(judge_combine(found, expert_outputs, ids, weights, **options))


def judge_combine(
    found: Any, expert_outputs: Any, ids: Any, weights: Any, **options: Unpack[CombineOptions]
) -> Judgement:
    """The judgement of `assert_combine`, which also takes its arguments."""
    given = checked(options, CombineOptions, "assert_combine")
    arrays = {"ids": integers(ids, "ids"), "weights": real(weights, "weights"), "found": real(found, "found")}
    sizes = fit(arrays, {"ids": "T k", "weights": "T k", "found": "T D"})
    some_slots(sizes["k"])
    outputs = real(expert_outputs, "expert_outputs")
    if outputs.ndim == 2 and len(outputs) == sizes["T"] * sizes["k"]:
        outputs = outputs.reshape(sizes["T"], sizes["k"], -1)
    fit({"expert_outputs": outputs}, {"expert_outputs": "T k D"}, sizes)
    rows = chosen_rows(given, sizes["T"])
    at = selection(rows, sizes["T"])
    values, call = arrays["found"][at], Combined(outputs[at], arrays["ids"][at], arrays["weights"][at])
    output = Output(
        what="combine",
        step=STEP,
        found=values,
        call=call,
        reads=(call.outputs,),
        where=lambda at: f"token {rows[at[0]]}, column {at[1]}, experts {call.ids[at[0]].tolist()}",
        changes=lambda: combine_changes(call),
        cuts=("combine.weighted", "combine.partial"),
    )
    return judge(output, policy_for(given, STEP, values, {"expert_outputs": outputs}), given)


def some_slots(count: int) -> None:
    """Raises InputError where tokens have no slots.   count: of each token"""
    if not count:
        raise InputError("ids: has 0 experts per token, but 1 or more were expected")


def combine_changes(call: Combined) -> Iterator[Change]:
    """The mistakes of the sum over slots."""
    for words, ids, weights, bug in slot_changes(call.ids, call.weights):
        yield Change(words, replace(call, ids=ids, weights=weights, roundings=roundings_of(weights, call.weights)), bug)
    if call.ids.shape[1] > 1:
        turned = replace(call, outputs=call.outputs[:, ::-1], ids=call.ids[:, ::-1])
        yield Change("the slots of a token have each other's weights", turned, "router-weights-order-mismatch")
    if (call.ids < 0).any():
        everything = replace(call, ids=np.maximum(call.ids, 0))
        yield Change("slots without an expert are counted", everything, "expert-padding-not-zero")


def slot_changes(ids: NDArray[Any], weights: NDArray[Any]) -> Iterator[tuple[str, NDArray[Any], NDArray[Any], str]]:
    """Mistakes in the use of slots: in words, the ids [T, k] and weights [T, k] that they have, and the known bug."""
    k, wide = ids.shape[1], weights.astype(np.float64)
    with np.errstate(all="ignore"):
        yield "the weights are not used", ids, np.ones_like(wide), "expert-weight-missing"
        yield "the weights are used twice", ids, wide**2, ""
        shared = np.where(ids >= 0, wide, 0.0)
        total = shared.sum(1, keepdims=True)
        if not (total == 0).any():
            yield "the weights are renormalised once more", ids, wide / total, ""
        if k > 1:
            yield "the experts of a token have equal weights that sum to 1", ids, np.full_like(wide, 1 / k), ""
            yield (
                "each token has the weights of token 0",
                ids,
                np.broadcast_to(wide[:1], wide.shape),
                "expert-weights-of-first-token",
            )
            for slot in range(min(k, 4)):
                left = np.where(np.arange(k) == slot, -1, ids)
                yield f"slot {slot} of each token is not added", left, wide, ""
        for slot, words in ((0, "first"), (k - 1, "last")) if k > 2 else ():
            only = np.where(np.arange(k) == slot, ids, -1)
            yield f"only the {words} slot of each token is added", only, wide, "expert-scatter-overwrite"
        for words, left in lost_rows(ids):
            yield words, left, wide, ""
        repeated = np.array([len({*row[row >= 0].tolist()}) < (row >= 0).sum() for row in ids])
        if repeated.any():
            once = np.array(ids)
            for row in np.flatnonzero(repeated):
                for slot in range(1, k):
                    if once[row, slot] in ids[row, :slot]:
                        once[row, slot] = -1
            yield "an expert that a token has twice is added once", once, wide, "expert-scatter-overwrite"


def lost_rows(ids: NDArray[Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Rows of experts that a kernel loses: in words, and the ids [T, k] that are left, -1 for what is lost."""
    flat = ids.reshape(-1)
    _, expert, counts = np.unique(flat, return_inverse=True, return_counts=True)
    expert = expert.reshape(-1)
    place = np.empty(flat.size, np.int64)  # among the rows of the slot's expert
    starts = np.cumsum(counts) - counts
    order = np.argsort(expert, kind="stable")
    place[order] = np.arange(flat.size) - starts[expert[order]]
    count = counts[expert]
    losses = {
        "the first row of each expert is lost": place == 0,
        "the last row of each expert is lost": place == count - 1,
    }
    for block in BLOCKS:
        losses[f"the rows of each expert behind its last whole block of {block} are lost"] = (
            place >= count // block * block
        )
        losses[f"the rows of each expert behind its first {block} are lost"] = place >= block
    for words, lost in losses.items():
        if (lost & (flat >= 0)).any():
            yield words, np.where(lost, -1, flat).reshape(ids.shape)


def roundings_of(weights: NDArray[Any], given: NDArray[Any]) -> int:
    """The roundings of weights that a mistake has: none if they are the given ones, or whole numbers. [T, k] each"""
    return 0 if np.array_equal(weights, given) or np.isin(weights, (0.0, 0.5, 1.0)).all() else 2 + weights.shape[1]


# ---- the fused layer


class MoeOptions(Options, total=False):
    """The options of `assert_moe`."""

    transposed: bool
    """Whether the matrices are [E, D, F] and [E, F, D]: inputs before outputs."""
    fused: Literal["halves", "interleaved"] | None
    """Whether `w_gate` has both, [E, 2 F, D], one after the other or in turn. `w_up` is then None."""
    weigh: Literal["output", "input"]
    """Whether a weight multiplies the output of an expert, or its input, as Llama 4 has it."""


@dataclass(frozen=True)
class Layer(Plain):
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
    function: Function = "silu"
    weigh: str = "output"
    roundings: int = 0
    """The roundings of weights that a mistake computes anew."""

    def some(self, at: Any) -> Layer:
        return replace(self, x=self.x[at], ids=self.ids[at], weights=self.weights[at])

    @property
    def terms(self) -> int:
        return int(self.w_gate[0].size)

    def plain(self, dtype: Any) -> NDArray[Any]:
        x, found = self.x.astype(dtype, copy=False), np.zeros(self.x.shape, dtype)
        for expert in np.unique(self.ids[self.ids >= 0]):
            w_gate, w_up, w_down = (
                array[expert].astype(dtype, copy=False) for array in (self.w_gate, self.w_up, self.w_down)
            )
            token, slot = np.nonzero(self.ids == expert)
            weights, rows = self.weights[token, slot, None].astype(dtype), x[token]
            if self.weigh == "input":
                rows, weights = rows * weights, np.ones_like(weights)
            gate = rows @ w_gate.T
            hidden = gate / (1 + np.exp(-gate)) * (rows @ w_up.T)
            np.add.at(found, token, weights * (hidden @ w_down.T))
        return found

    def enclose(self, ops: EnclosureOps) -> Enclosure:
        """Expert by expert, so that each matrix is prepared once and memory stays small."""
        (tokens, k), slots = self.ids.shape, self.ids.reshape(-1)
        x, weights = known(ops, self.x), known(ops, np.where(self.ids >= 0, self.weights, 0), self.roundings)
        parts, order = [], []
        for expert in np.unique(slots):
            at = np.flatnonzero(slots == expert)
            for some in np.array_split(at, -(-len(at) // ROWS)):
                rows = x[some // k]
                if self.weigh == "input":
                    rows = ops.cut("moe_norm", rows * weights.reshape(-1)[some][:, None])
                parts.append(self._expert(ops, int(expert), rows))
                order.append(some)
        if not parts:
            return Enclosure(np.zeros(self.x.shape), accumulation=ops.policy.accumulation)
        back = np.empty(len(slots), np.int64)
        back[np.concatenate(order)] = np.arange(len(slots))
        outputs = concatenate(parts, axis=0)[back].reshape(tokens, k, -1)
        if self.weigh == "input":
            weights = Enclosure(np.where(self.ids >= 0, 1.0, 0.0), accumulation=ops.policy.accumulation)
        return cast(Enclosure, combine(cast(CutOps, ops), outputs, weights))

    def _expert(self, ops: EnclosureOps, expert: int, rows: Enclosure) -> Enclosure:
        """The outputs of one expert; zeros for -1. rows, returns: [n, D]"""
        if expert < 0:
            return Enclosure(np.zeros(rows.shape), accumulation=ops.policy.accumulation)
        w1, w2, w3 = (
            Matrix(name, array[expert]) for name, array in (("w1", self.w_gate), ("w2", self.w_down), ("w3", self.w_up))
        )
        if self.function == "silu":
            mine = np.zeros((rows.shape[0], 1), np.int64)
            done: Enclosure = run_experts(cast(CutOps, ops), [Expert(w1=w1, w2=w2, w3=w3)], rows, mine)[:, 0]
            return done
        gate, up = ops.cut("expert.gate", ops.linear(rows, w1)), ops.cut("expert.up", ops.linear(rows, w3))
        hidden = ops.cut("expert.hidden", activated(ops, gate, self.function) * up)
        return ops.cut("expert.output", ops.linear(hidden, w2))


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
    layer = read_layer(
        {"x": x, "w_gate": w_gate, "w_up": w_up, "w_down": w_down, "ids": ids, "weights": weights}, given
    )
    values = real(found, "found")
    fit({"found": values}, {"found": "T D"}, {"T": layer.x.shape[0], "D": layer.x.shape[1]})
    rows = chosen_rows(given, len(values))
    at = selection(rows, len(values))
    call, values = layer.some(at), values[at]
    output = Output(
        what="mixture of experts",
        step=STEP,
        found=values,
        call=call,
        reads=(call.x,),
        where=lambda at: f"token {rows[at[0]]}, column {at[1]}, experts {call.ids[at[0]].tolist()}",
        changes=lambda: moe_changes(call, one_of(given, "fused", (None, "halves", "interleaved"))),
        cuts=("expert.gate", "expert.up", "expert.hidden", "expert.output", "combine.weighted", "combine.partial"),
        spans=5,
        inputs={"x": call.x},
        cost=3 * layer.ids.shape[1] * layer.w_gate[:1].size,
    )
    inputs = {"x": layer.x, "w_gate": layer.w_gate, "w_up": layer.w_up, "w_down": layer.w_down}
    return judge(output, policy_for(given, STEP, values, inputs), given)


def read_layer(values: dict[str, Any], given: dict[str, Any]) -> Layer:
    """The arrays of a call. Raises InputError when they do not fit.   values: by the names of the arguments"""
    transposed = flags(given, "transposed")
    fused = one_of(given, "fused", (None, "halves", "interleaved"))
    weigh = one_of(given, "weigh", ("output", "input"))
    arrays = {name: real(values[name], name) for name in ("x", "w_gate", "w_down", "weights")}
    arrays["ids"] = integers(values["ids"], "ids")
    if fused is None:
        arrays["w_up"] = real(values["w_up"], "w_up")
    else:
        axis = 2 if transposed else 1
        arrays["w_gate"], arrays["w_up"] = divided(arrays["w_gate"], axis, fused, "w_gate", values["w_up"])
    first, second = ("E D F", "E F D") if transposed else ("E F D", "E D F")
    shapes = {"x": "T D", "w_gate": first, "w_up": first, "w_down": second, "ids": "T k", "weights": "T k"}
    sizes = fit(arrays, shapes)
    some_slots(sizes["k"])
    within(arrays["ids"], sizes["E"], "ids")
    if transposed:
        for name in ("w_gate", "w_up", "w_down"):
            arrays[name] = arrays[name].transpose(0, 2, 1)
    return Layer(**cast(Any, arrays), weigh=str(weigh))


def moe_changes(call: Layer, fused: str | None) -> Iterator[Change]:
    """The mistakes of the fused layer.   fused: the declared order of gate and up"""
    for words, ids, weights, bug in slot_changes(call.ids, call.weights):
        yield Change(words, replace(call, ids=ids, weights=weights, roundings=roundings_of(weights, call.weights)), bug)
    if call.ids.shape[1] > 1:
        turned = replace(call, weights=call.weights[:, ::-1])
        yield Change("the slots of a token have each other's weights", turned, "router-weights-order-mismatch")
    other = "output" if call.weigh == "input" else "input"
    yield Change(f"the weight multiplies the expert's {other}", replace(call, weigh=other), "expert-weight-on-input")
    yield Change("gate and up are exchanged", replace(call, w_gate=call.w_up, w_up=call.w_gate), "expert-w1-w3-swapped")
    for function, words in OTHERS.items():
        yield Change(words, replace(call, function=function), BUGS.get(function, ""))
    yield from expert_changes(len(call.w_gate), call.ids, lambda ids: replace(call, ids=ids))
    if call.w_gate.size < LARGE:
        for words, gate, up in otherwise_fused(call.w_gate, call.w_up, 1, fused):
            yield Change(words, replace(call, w_gate=gate, w_up=up))
        for name in ("w_gate", "w_up", "w_down"):
            flipped = np.stack([as_transpose(each) for each in getattr(call, name)])
            bug = "expert-w2-transposed" if name == "w_down" else ""
            yield Change(f"{name} is read as its transpose", replace(call, **cast(Any, {name: flipped})), bug)
        for name in ("w_gate", "w_up", "w_down"):
            matrices = getattr(call, name)
            first = np.broadcast_to(matrices[:1], matrices.shape)
            if len(matrices) > 1:
                yield Change(f"all experts have the {name} of expert 0", replace(call, **cast(Any, {name: first})))
        for words, changed in shorter(call):
            yield Change(words, changed, "expert-reduction-tail-lost")


def shorter(call: Layer) -> Iterator[tuple[str, Layer]]:
    """The layer without the last of the terms that its products sum, in words."""
    hidden, size = call.w_gate.shape[1:]
    for count in (1, min(32, hidden // 2)):
        if 0 < count < hidden:
            down = np.array(call.w_down)
            down[:, :, hidden - count :] = 0
            yield f"the last {count} of {hidden} terms of the down projection are missing", replace(call, w_down=down)
    for count in (1, min(32, size // 2)):
        if 0 < count < size:
            x = np.array(call.x)
            x[:, size - count :] = 0
            yield f"the last {count} of {size} terms of gate and up are missing", replace(call, x=x)
