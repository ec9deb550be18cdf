# SPDX-License-Identifier: Apache-2.0
"""Assertion on attention: causal or not, with a window, over a cache, with grouped heads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Unpack, cast

import numpy as np
from numpy.typing import NDArray

from refmoe.api.arguments import whole_number
from refmoe.arithmetic.enclosure.array import OWN, SLACK, Enclosure, bounded, concatenate
from refmoe.arithmetic.enclosure.functions import relative_error
from refmoe.errors import InputError
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.steps.rounding import CutOps, as_softmax_reads, context_of, scores_of
from refmoe.testing.arguments import finite, fit, flags, integers, one_of, real
from refmoe.testing.call import Change, Output, Plain
from refmoe.testing.judgement import Judgement, judge, require
from refmoe.testing.options import Options, checked, chosen_rows, policy_for, selection
from refmoe.testing.parameters import known

STEP = "attention.context"
LOGARITHM = "logprobs"
"""The step whose tests a log-sum-exp has: its errors are shared by a row, so only single values count."""
SCORES = 1 << 17
"""Scores that are enclosed at a time, so that their arrays stay in the cache."""
RESCALED = 4
"""Roundings of the largest score in a kernel that computes in powers of two, and returns natural logarithms."""


@dataclass(frozen=True)
class Attention(Plain):
    """Rows of queries over the keys and values of their sequences."""

    q: NDArray[Any]
    """[R, H, d]"""
    k: NDArray[Any]
    """[B, S, K, d]"""
    v: NDArray[Any]
    """[B, S, K, d']"""
    sequence: NDArray[Any]
    """Integers [R]"""
    positions: NDArray[Any]
    """Integers [R], of the queries; key i has position i."""
    lengths: NDArray[Any]
    """Integers [B]: keys from there on are not read."""
    causal: bool = True
    window: int | None = None
    scale: float | None = None
    """None: 1 / sqrt(d)"""

    def some(self, at: Any) -> Attention:
        return replace(self, q=self.q[at], sequence=self.sequence[at], positions=self.positions[at])

    @property
    def terms(self) -> int:
        return int(self.k.shape[1])

    def plain(self, dtype: Any) -> NDArray[Any]:
        heads, kv_heads = self.q.shape[1], self.k.shape[2]
        found = np.zeros((len(self.q), heads, self.v.shape[-1]), dtype)
        q, mask = self.q.astype(dtype, copy=False), np.where(self.visible(), 0, -np.inf).astype(dtype)
        scale = dtype(self.q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        for sequence in np.unique(self.sequence):
            mine = self.sequence == sequence
            mine = slice(None) if mine.all() else mine
            seen = mask[mine]
            # what no row reads may be anything
            read = np.flatnonzero((seen == 0).any(0))
            first, last = (int(read[0]), int(read[-1]) + 1) if read.size else (0, 1)
            seen = seen[:, first:last]
            for head in range(kv_heads):
                k, v = (x[sequence, first:last, head].astype(dtype, copy=False) for x in (self.k, self.v))
                for each in range(head * heads // kv_heads, (head + 1) * heads // kv_heads):
                    share = (q[mine, each] * scale) @ k.T
                    share += seen
                    share -= share.max(-1, keepdims=True)
                    np.exp(share, out=share)
                    found[mine, each] = (share @ v) / share.sum(-1, keepdims=True)
        return found

    def visible(self) -> NDArray[Any]:
        """The keys that each row sees: booleans [R, S]"""
        keys, here = np.arange(self.k.shape[1]), self.positions[:, None]
        seen: NDArray[Any] = keys < self.lengths[self.sequence][:, None]
        if self.causal:
            seen &= keys <= here
        return seen if self.window is None else seen & (here - keys < self.window)

    def enclose(self, ops: EnclosureOps) -> Enclosure:
        cuts = cast(CutOps, ops)

        def mix(scores: Enclosure, mask: NDArray[Any], v: Enclosure) -> Enclosure:
            probs = ops.tap("attention.probs", ops.softmax(as_softmax_reads(cuts, scores), mask[None]))
            return cast(Enclosure, context_of(cuts, probs, v))

        return self.over_blocks(ops, mix)

    def over_blocks(self, ops: EnclosureOps, mix: Any) -> Enclosure:
        """`mix` of the scores [H, n, S], the mask [n, S] and the values [S, K, d'] of some rows: [R, ...]"""
        heads = self.q.shape[1]
        step = max(1, SCORES // max(1, heads * self.k.shape[1]))
        parts, order, visible = [], [], self.visible()
        for sequence in np.unique(self.sequence):
            mine = np.flatnonzero(self.sequence == sequence)
            read = np.asarray(visible[mine].any(0))
            last = int(np.flatnonzero(read)[-1]) + 1 if read.any() else 1
            # what no row reads may be anything
            seen = [x[sequence, :last] for x in (self.k, self.v)]
            if not read[:last].all():
                seen = [np.where(read[:last, None, None], x, 0) for x in seen]
            k, v = (known(ops, x) for x in seen)
            for at in np.array_split(mine, -(-len(mine) // step)):
                parts.append(mix(self.scores(ops, known(ops, self.q[at]), k), visible[at, :last], v))
                order.append(at)
        back = np.argsort(np.concatenate(order), kind="stable")
        return concatenate(parts, axis=0)[back]

    def scores(self, ops: EnclosureOps, q: Enclosure, k: Enclosure) -> Enclosure:
        """The scores [H, n, S] before the softmax."""
        cuts = cast(CutOps, ops)
        if self.scale is None:
            scores = scores_of(cuts, q, k)
        else:
            scores = ops.cut("attention.dots", scores_of(cuts, q, k, scaled=False)) * self.scale
        found: Enclosure = ops.tap("attention.scores", scores)
        return found


@dataclass(frozen=True)
class LogSumExp:
    """The logarithm of the sum of the exponentials of each row's scores."""

    of: Attention | Regrouped

    def some(self, at: Any) -> LogSumExp:
        return LogSumExp(self.of.some(at))

    def enclose(self, ops: EnclosureOps) -> Enclosure:
        def logarithm(scores: Enclosure, mask: NDArray[Any], _: Enclosure) -> Enclosure:
            return log_sum_exp(ops, scores, mask[None]).transpose(1, 0)

        return self.of.over_blocks(ops, logarithm)


def log_sum_exp(ops: EnclosureOps, x: Enclosure, mask: NDArray[Any]) -> Enclosure:
    """The enclosure of log(sum(exp(x))) over the last axis, before its last rounding.

    x: [..., n]   mask: booleans that broadcast to x, one at least true per row

    The logarithm of each exponential errs by at most k, as for a softmax. So does that of their sum, which has n - 1
    additions more. The logarithm errs by as much as exp may err at the result.
    """
    x, policy = x.settle(), ops.policy
    u, n = policy.statistics.u, x.shape[-1]
    shown = np.where(mask, x.mid, -np.inf)
    top = shown.max(-1, keepdims=True)
    below = np.where(mask, top - x.mid, 0.0)
    exponentials = np.where(mask, np.exp(-below), 0.0)
    total = exponentials.sum(-1)
    share, logarithm, top = exponentials / total[..., None], np.log(total), top[..., 0]
    r, v = (np.where(mask, np.broadcast_to(part, x.shape), 0.0) for part in (x.r, x.v))
    own = u * below + relative_error(policy.exp, policy.statistics, below)
    moved = (r * (1 + 2 * u) + own + OWN * (2 * below + 16)).max(-1)
    least = np.abs(top) + logarithm
    apart = n * u * (1 + n * u) + relative_error(policy.exp, policy.statistics, logarithm) + RESCALED * u * least
    radius = (moved + apart + (n + 8) * OWN * (1 + least) + policy.statistics.tiny) * SLACK
    variance = (share**2 * v).sum(-1) + ((share * own).sum(-1) + apart) ** 2 / 3
    return Enclosure(top + logarithm, bounded(radius), bounded(variance), accumulation=policy.statistics, owed=True)


class AttentionOptions(Options, total=False):
    """The options of `assert_attention`."""

    causal: bool
    """Whether a query sees no key after its own position. True by default."""
    window: int | None
    """The number of keys that a causal query sees, its own counted. None: all before it."""
    scale: float | None
    """The factor of the dot products. None: 1 / sqrt(d)."""
    lengths: Any
    """Integers [B]: the number of keys of each sequence. Keys after them are padding. None: all S."""
    positions: Any
    """Integers [T] or [B, T]: the positions of the queries; key i has position i. None: those of the last T keys."""
    log_sum_exp: Any
    """The natural logarithm of the sum of exponentials as the kernel returned it, [B, T, H]. It is judged too."""
    layout: Literal["tokens", "heads"]
    """Whether the axis of tokens comes before that of heads, or after it."""


def assert_attention(found: Any, q: Any, k: Any, v: Any, **options: Unpack[AttentionOptions]) -> Judgement:
    """Assert that a kernel computed softmax(q k^T scale) v, within the rounding that its dtypes allow.

    found: [B, T, H, d']   q: [B, T, H, d]   k: [B, S, K, d]   v: [B, S, K, d'], where query head h reads head
    h // (H / K); the axis B may be missing everywhere
    options: those of `AttentionOptions`
    A query that sees no key is not judged.
    Returns the figures. Raises AssertionError when a value is wrong, and InputError for arrays that do not fit.
    """
    __tracebackhide__ = True
    judgements = judge_attention(found, q, k, v, **options)
    for each in judgements:
        require(each)
    return judgements[0]


def judge_attention(found: Any, q: Any, k: Any, v: Any, **options: Unpack[AttentionOptions]) -> tuple[Judgement, ...]:
    """The judgements of `assert_attention`, which also takes its arguments: of the output, and the log-sum-exp."""
    given = checked(options, AttentionOptions, "assert_attention")
    arrays = {"q": real(q, "q"), "k": real(k, "k"), "v": real(v, "v"), "found": real(found, "found")}
    batched = arrays["q"].ndim == 4
    by_head = one_of(given, "layout", ("tokens", "heads")) == "heads"
    letters = {"q": "T H d", "k": "S K d", "v": "S K e", "found": "T H e"}
    if by_head:
        letters = {
            name: " ".join([text.split()[1], text.split()[0], text.split()[2]]) for name, text in letters.items()
        }
    if given.get("log_sum_exp") is not None:
        arrays["log_sum_exp"] = real(given["log_sum_exp"], "log_sum_exp")
        letters["log_sum_exp"] = "H T" if by_head else "T H"
    sizes = fit(arrays, {name: "B " * batched + text for name, text in letters.items()})
    if sizes["H"] % max(sizes["K"], 1):
        raise InputError(f"q: has {sizes['H']} heads, but a multiple of the {sizes['K']} heads of k was expected")
    arrays = {name: ordered(array, batched, by_head) for name, array in arrays.items()}
    batch = sizes.get("B", 1)
    call, rows, where = read_call(given, arrays, batch, sizes)
    inputs = {name: arrays[name] for name in ("q", "k", "v")}
    cuts = ("attention.query", "attention.scores", "attention.softmax_input", "attention.probs", "attention.mixing")

    def output(name: str, what: str, step: str, mine: Any) -> Output:
        return Output(
            what=what,
            step=step,
            found=flat_rows(arrays[name])[selection(rows, batch * sizes["T"])],
            call=mine(call),
            reads=(call.q,),
            where=where,
            changes=lambda: (
                Change(each.name, mine(each.call), each.bug) for each in attention_changes(call, sizes["K"])
            ),
            cuts=cuts,
            inputs={"q": call.q},
            spans=3,
        )

    first = output("found", "attention", STEP, lambda each: each)
    judgements = [judge(first, policy_for(given, STEP, first.found, inputs), given)]
    if "log_sum_exp" in arrays:
        second = output("log_sum_exp", "log-sum-exp", LOGARITHM, LogSumExp)
        judgements.append(judge(second, policy_for(given, LOGARITHM, second.found, inputs), given))
    return tuple(judgements)


def ordered(array: NDArray[Any], batched: bool, by_head: bool) -> NDArray[Any]:
    """An array as [B, tokens, heads, ...]."""
    array = array if batched else array[None]
    return array.swapaxes(1, 2) if by_head else array


def flat_rows(array: NDArray[Any]) -> NDArray[Any]:
    """[B, T, ...] as [B T, ...]"""
    return array.reshape(-1, *array.shape[2:])


def read_call(given: dict[str, Any], arrays: dict[str, NDArray[Any]], batch: int, sizes: dict[str, int]) -> Any:
    """The call for the rows to judge, these rows, and the words for a place. Raises InputError for a wrong option."""
    tokens, keys = sizes["T"], sizes["S"]
    lengths = np.full(batch, keys)
    if given.get("lengths") is not None:
        lengths = integers(given["lengths"], "lengths").reshape(-1)
        fit({"lengths": lengths}, {"lengths": "B"}, {"B": batch})
        if (lengths < 0).any() or (lengths > keys).any():
            raise InputError(f"lengths: are {lengths.tolist()[:8]}, but numbers from 0 to {keys} were expected")
    positions = lengths[:, None] - tokens + np.arange(tokens)
    if given.get("positions") is not None:
        positions = integers(given["positions"], "positions")
        positions = np.broadcast_to(positions, (batch, tokens)) if positions.shape == (tokens,) else positions
        fit({"positions": positions}, {"positions": "B T"}, {"B": batch, "T": tokens})
    causal, window = flags(given, "causal", True), given.get("window")
    if window is not None:
        window = whole_number(window, "window")
        if not causal or window < 1:
            raise InputError(f"window: is {window}, but causal attention and a number from 1 were expected")
    scale = None if given.get("scale") is None else finite(given["scale"], "scale")
    if scale is not None and math.isclose(scale, arrays["q"].shape[-1] ** -0.5, rel_tol=1e-12):
        scale = None
    call = Attention(
        q=flat_rows(arrays["q"]),
        k=arrays["k"],
        v=arrays["v"],
        sequence=np.repeat(np.arange(batch), tokens),
        positions=positions.reshape(-1),
        lengths=lengths,
        causal=causal,
        window=window,
        scale=scale,
    )
    rows = chosen_rows(given, batch * tokens)
    call = call.some(selection(rows, batch * tokens))
    sees = call.visible().any(1)
    if not sees.all():
        rows, call = rows[sees], call.some(np.flatnonzero(sees))

    def where(at: tuple[int, ...]) -> str:
        sequence, token = divmod(int(rows[at[0]]), tokens)
        place = f"token {token}, head {at[1]}" + (f", column {at[2]}" if len(at) > 2 else "")
        return f"sequence {sequence}, {place}" if batch > 1 else place

    return call, rows, where


def attention_changes(call: Attention, kv_heads: int) -> Iterator[Change]:
    """The mistakes of attention."""
    keys, size = call.k.shape[1], call.q.shape[2]
    if call.causal:
        yield Change("the mask is not causal", replace(call, causal=False, window=None), "attn-mask-polarity-inverted")
        if (call.positions > 0).all():
            yield Change(
                "a query does not see its own key", replace(call, positions=call.positions - 1), "attn-causal-strict"
            )
        yield Change("a query sees one key of the future", replace(call, positions=call.positions + 1))
        first = call.positions - call.positions.min()
        if (first != call.positions).any() and call.window is None:
            yield Change("the mask is aligned to the first key", replace(call, positions=first), "attn-causal-top-left")
    else:
        yield Change("the mask is causal", replace(call, causal=True))
    if call.window is not None:
        yield Change("the window is not used", replace(call, window=None), "attn-swa-dropped-in-one-backend")
        yield Change("the window is one key too long", replace(call, window=call.window + 1), "attn-swa-off-by-one")
        if call.window > 1:
            yield Change(
                "the window is one key too short", replace(call, window=call.window - 1), "attn-swa-off-by-one"
            )
    own = size**-0.5 if call.scale is None else call.scale
    for scale, words in (
        (1.0, "missing"),
        (1 / size, "1 / d"),
        (size**-0.25, "used on one factor only"),
        ((size * call.q.shape[1]) ** -0.5, "1 / sqrt(H d), as if all heads were one"),
        (own * math.log(2), "as for exp, but powers of 2 are taken"),
        (own / math.log(2), "as for powers of 2, but exp is taken"),
    ):
        if scale != own:
            bug = "attn-scale-missing" if scale == 1.0 else ""
            yield Change(f"the scale is {words}", replace(call, scale=scale), bug)
    if call.scale is not None:
        yield Change("the scale is 1 / sqrt(d), not the given one", replace(call, scale=None))
    heads = call.q.shape[1]
    if 1 < kv_heads < heads:
        turns = np.argsort(np.arange(heads) % kv_heads, kind="stable")
        yield Change("query head h reads head h mod K", Regrouped(call, turns), "attn-gqa-tile")
    if (call.lengths < keys).any():
        yield Change("padding after the keys is read", replace(call, lengths=np.full_like(call.lengths, keys)))
    if (call.lengths > 1).all() and not call.causal:
        yield Change("the last key is not read", replace(call, lengths=call.lengths - 1))


@dataclass(frozen=True)
class Regrouped:
    """Attention in which query heads read the keys and values of other heads."""

    of: Attention
    order: NDArray[Any]
    """Integers [H]: the query heads, those first that read the first head of keys."""

    def some(self, at: Any) -> Regrouped:
        return Regrouped(self.of.some(at), self.order)

    def enclose(self, ops: EnclosureOps) -> Enclosure:
        return self._regrouped().enclose(ops)[:, np.argsort(self.order)]

    def over_blocks(self, ops: EnclosureOps, mix: Any) -> Enclosure:
        return self._regrouped().over_blocks(ops, mix)[:, np.argsort(self.order)]

    def _regrouped(self) -> Attention:
        return replace(self.of, q=self.of.q[:, self.order])
