# SPDX-License-Identifier: Apache-2.0
"""For each law a kernel that it finds: a public bug, a cheat, or one made for a law that neither breaks by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refmoe.bugs.kernels.catalogue import KERNEL_BUGS
from refmoe.bugs.kernels.cheats import CHEATS
from refmoe.bugs.kernels.honest import align, attend, mapped, mixture, one_query, wide


@dataclass(frozen=True)
class Wrong:
    """A wrong kernel and its claims."""

    make: Callable[[], Callable[..., Any]]
    claims: Mapping[str, Any] = field(default_factory=dict)


def bug(name: str) -> Wrong:
    return Wrong(KERNEL_BUGS[name].make, KERNEL_BUGS[name].claims)


def cheat(name: str) -> Wrong:
    return Wrong(CHEATS[name].make, CHEATS[name].claims)


def always(kernel: Callable[..., Any], **claims: Any) -> Wrong:
    return Wrong(lambda: kernel, claims)


# ---- mixtures


def two_results(*arguments: Any) -> Any:
    return mixture(*arguments), None


def noisy() -> Callable[..., Any]:
    rng = np.random.default_rng(0)

    def kernel(x: Any, *others: Any) -> Any:
        return mixture(x, *others) * (1 + 1e-6 * rng.standard_normal())

    return kernel


def static_buffer() -> Callable[..., Any]:
    memory = np.zeros(1 << 16, np.float32)

    def kernel(x: Any, *others: Any) -> Any:
        out = memory[: x.size].reshape(x.shape)
        out[...] = mixture(x, *others)
        return out

    return kernel


def depends_on_the_largest_token(x: Any, *others: Any) -> Any:
    scale = np.float32(2.0) if np.isfinite(x).all() and np.abs(x).max(initial=0) < 2**10 else np.float32(0.0)
    return mixture(x, *others) * scale / 2


def nan_to_zero(x: Any, *others: Any) -> Any:
    return np.nan_to_num(mixture(x, *others), posinf=np.inf, neginf=-np.inf)


def first_token_twice(x: Any, *others: Any) -> Any:
    y = mixture(x, *others)
    return y if len(y) < 3 or x[0].tobytes() <= x[1].tobytes() else y[[0, 0, *range(2, len(y))]]


def last_expert_is_a_copy(x: Any, w_gate: Any, w_up: Any, w_down: Any, ids: Any, weights: Any) -> Any:
    return mixture(x, w_gate, w_up, w_down, np.minimum(ids, max(len(w_gate) - 2, 0)), weights)


def slots_by_place(x: Any, w_gate: Any, w_up: Any, w_down: Any, ids: Any, weights: Any) -> Any:
    return mixture(x, w_gate, w_up, w_down, ids, -np.sort(-weights, axis=1))


def zero_weight_takes_all(x: Any, w_gate: Any, w_up: Any, w_down: Any, ids: Any, weights: Any) -> Any:
    left = np.where((weights == 0).any(axis=1, keepdims=True) & (ids.shape[1] > 1), 0, weights)
    return mixture(x, w_gate, w_up, w_down, ids, left.astype(weights.dtype))


def same_rows_once(x: Any, w_gate: Any, w_up: Any, w_down: Any, ids: Any, weights: Any) -> Any:
    """Groups tokens by the address of their row, so that rows at one place become one token."""
    if x.strides[0] == 0 and len(x) > 1:
        return np.repeat(mixture(x[:1], w_gate, w_up, w_down, ids[:1], weights[:1]), len(x), axis=0)
    return mixture(x, w_gate, w_up, w_down, ids, weights)


def more_than_64_experts(x: Any, w_gate: Any, w_up: Any, w_down: Any, ids: Any, weights: Any) -> Any:
    return mixture(x, w_gate, w_up, w_down, ids % 64, weights)


def flushes(x: Any, *others: Any) -> Any:
    y = mixture(x, *others)
    return np.where(np.abs(y) < 2.0**-24, 0, y)


MOE: dict[str, tuple[str, Wrong]] = {
    "form": ("two results", always(two_results)),
    "exact-sums": ("weight-of-the-first-slot", bug("weight-of-the-first-slot")),
    "legal-values": ("relu-for-silu", cheat("relu-for-silu")),
    "wide-sums": ("sums-in-float16", bug("sums-in-float16")),
    "rounds-to-nearest": ("truncated-to-bfloat16", bug("truncated-to-bfloat16")),
    "block-sizes": ("last-block-dropped", cheat("last-block-dropped")),
    "loads": ("more than 64 experts", always(more_than_64_experts)),
    "widths": ("padding-that-is-not-zero", bug("padding-that-is-not-zero")),
    "powers-of-two": ("flushes small numbers", always(flushes)),
    "other-tokens": ("depends on the largest token", always(depends_on_the_largest_token)),
    "nan-in-a-row": ("NaN becomes zero", always(nan_to_zero)),
    "batch-invariance": ("split-by-the-batch", bug("split-by-the-batch")),
    "token-order": ("a token for another", always(first_token_twice)),
    "expert-order": ("one-expert-for-all", cheat("one-expert-for-all")),
    "slot-order": ("weights sorted without their ids", always(slots_by_place)),
    "zero-weights": ("a weight of 0 takes the others with it", always(zero_weight_takes_all)),
    "unused-experts": ("masked-by-a-product", bug("masked-by-a-product")),
    "ranks": ("global-ids-on-a-rank", bug("global-ids-on-a-rank")),
    "empty-slots": ("unwritten-slots-summed", bug("unwritten-slots-summed")),
    "strided": ("experts-next-to-each-other", bug("experts-next-to-each-other")),
    "shared-memory": ("rows at one place are one token", always(same_rows_once)),
    "far-offsets": ("expert-offset-of-32-bits", bug("expert-offset-of-32-bits")),
    "inputs-untouched": ("sets-its-input-to-zero", cheat("sets-its-input-to-zero")),
    "every-value-written": ("output-times-zero", bug("output-times-zero")),
    "live-arguments": ("packed-weights-kept-by-address", bug("packed-weights-kept-by-address")),
    "later-calls": ("the-first-result", cheat("the-first-result")),
    "results-kept": ("a static buffer", Wrong(static_buffer)),
    "repetition": ("noise", Wrong(noisy)),
}
"""By law: the name of a kernel that it finds, and the kernel."""


# ---- plans


def no_total(ids: Any, block: int, experts: int) -> Any:
    return align(ids, block, experts)[:2]


def one_block_too_many(ids: Any, block: int, experts: int) -> Any:
    slots, owners, total = align(ids, block, experts)
    return np.append(slots, np.full(block, ids.size)), np.insert(owners, 0, 0), total + block


def padded_with_zero(ids: Any, block: int, experts: int) -> Any:
    slots, owners, total = align(ids, block, experts)
    return np.where(slots == ids.size, -1, slots), owners, total


def falling(ids: Any, block: int, experts: int) -> Any:
    slots, owners, total = align(ids[::-1, ::-1], block, experts)
    return np.where(slots < ids.size, ids.size - 1 - slots, slots), owners, total


def histogram_of_the_first_slot(ids: Any, experts: int) -> Any:
    return np.bincount(ids[:, 0], minlength=experts)


def in_the_order_of_tokens(ids: Any, experts: int) -> Any:
    counts = np.bincount(ids.reshape(-1), minlength=experts)
    return np.arange(ids.size), np.concatenate([[0], np.cumsum(counts)])


def marks_what_it_has_placed(ids: Any, block: int, experts: int) -> Any:
    plan = align(ids, block, experts)
    ids[...] = 0
    return plan


def kept_by_shape() -> Callable[..., Any]:
    kept: dict[Any, Any] = {}

    def plan(ids: Any, block: int, experts: int) -> Any:
        return kept.setdefault((ids.shape, block, experts), align(ids, block, experts))

    return plan


PLAN: dict[str, tuple[str, Wrong]] = {
    "form": ("no total", always(no_total)),
    "every-slot-once": ("minus-one-as-an-index", bug("minus-one-as-an-index")),
    "block-experts": ("one block too many", always(one_block_too_many)),
    "slots-at-their-expert": ("filled with -1", always(padded_with_zero)),
    "counts": ("only the first slot is counted", always(histogram_of_the_first_slot, kind="histogram")),
    "grouped": ("in the order of tokens", always(in_the_order_of_tokens, kind="permutation")),
    "stable": ("an expert's slots fall", always(falling)),
    "spare-blocks": ("spare-blocks-of-expert-0", bug("spare-blocks-of-expert-0")),
    "inputs-untouched": ("overwrites the ids", always(marks_what_it_has_placed)),
    "results-kept": ("a plan is kept by shape", Wrong(kept_by_shape)),
}


# ---- attention


def window_too_wide(q: Any, keys: Any, values: Any, table: Any, lengths: Any) -> Any:
    return attend(q, keys, values, table, lengths, 9)


def two_heads_exchanged(q: Any, *others: Any) -> Any:
    y = attend(q, *others)
    return y[:, ::-1]


def reads_one_token_less(q: Any, keys: Any, values: Any, table: Any, lengths: Any) -> Any:
    return attend(q, keys, values, table, np.maximum(lengths - 1, 1))


def reads_the_whole_table(q: Any, keys: Any, values: Any, table: Any, lengths: Any) -> Any:
    """Gathers all pages of the table before it looks at the length."""
    gathered = keys[table]
    assert gathered.shape[:2] == table.shape
    return attend(q, keys, values, table, lengths)


def pages_are_owned(q: Any, keys: Any, values: Any, table: Any, lengths: Any) -> Any:
    """Frees a page for the sequence that names it last: the others read zeros."""
    out = np.zeros_like(q)
    page = keys.shape[1]
    owner = np.full(len(keys), -1)
    for s, length in enumerate(lengths.tolist()):
        owner[table[s, : -(-length // page)]] = s
    for s, length in enumerate(lengths.tolist()):
        mine = owner[table[s, np.arange(length) // page]] == s
        at = np.arange(length)
        k, v = (wide(each[table[s, at // page], at % page]) * mine[:, None, None] for each in (keys, values))
        out[s] = one_query(wide(q[s]), k, v, keys.shape[2])
    return out


def adds_all_sequences(q: Any, keys: Any, values: Any, table: Any, lengths: Any) -> Any:
    y = attend(q, keys, values, table, lengths)
    with np.errstate(all="ignore"):
        return y + 0 * y.sum(axis=0, keepdims=True)


def no_scale(q: Any, *others: Any) -> Any:
    return attend((q * q.dtype.type(q.shape[2] ** 0.5)).astype(q.dtype), *others)


def split_by_the_batch(q: Any, keys: Any, values: Any, table: Any, lengths: Any) -> Any:
    y = attend(q, keys, values, table, lengths)
    return y if len(q) == 1 else (y * np.float32(1 + 2**-20)).astype(q.dtype)


def scales_q_in_place(q: Any, *others: Any) -> Any:
    y = attend(q, *others)
    q *= 0.5
    return y


def one_output_for_all_calls() -> Callable[..., Any]:
    memory = np.zeros(1 << 16, np.float32)

    def kernel(q: Any, *others: Any) -> Any:
        out = memory[: q.size].reshape(q.shape)
        out[...] = attend(q, *others)
        return out

    return kernel


ATTENTION: dict[str, tuple[str, Wrong]] = {
    "form": ("one row", always(lambda q, *others: attend(q, *others)[0])),
    "picks-a-key": ("heads in turn", always(two_heads_exchanged)),
    "even-weights": ("one token is not read", always(reads_one_token_less)),
    "page-order": (
        "neighbours-in-the-table-are-none-in-memory",
        bug("neighbours-in-the-table-are-none-in-memory"),
    ),
    "hidden-tokens": ("a window that is one too wide", always(window_too_wide, window=8)),
    "memory-without-tokens": ("zero-times-the-tail-of-a-page", bug("zero-times-the-tail-of-a-page")),
    "table-tail": ("the whole table is read", always(reads_the_whole_table, table_tail="anything")),
    "shared-prefix": ("a page has one owner", always(pages_are_owned)),
    "other-sequences": ("0 times the others", always(adds_all_sequences)),
    "legal-values": ("no scale", always(no_scale)),
    "batch-invariance": ("another sum in a batch", always(split_by_the_batch, batch_invariant=True)),
    "inputs-untouched": ("scales q in place", always(scales_q_in_place)),
    "repetition": ("one output for all calls", Wrong(one_output_for_all_calls)),
}
EVERY = {"moe": MOE, "plan": PLAN, "attention": ATTENTION}
RIGHT: dict[str, list[Wrong]] = {
    "moe": [
        always(mixture, padding=True),
        always(mixture, dtype="bfloat16", padding=True),
        always(mapped, dtype="float16", expert_map=True, padding=True),
        always(mixture, dtype="float64"),
        always(mixture, dtype="bfloat16", weights_dtype="float32"),
    ],
    "plan": [always(align), always(align, padding=True, spare="absent", block=16)],
    "attention": [
        always(attend, table_tail="anything"),
        always(attend, dtype="bfloat16"),
        always(lambda *each: attend(*each, window=8), window=8, dtype="float16"),
    ],
}
"""Right kernels of each contract, which no law may find."""


# ---- the tables of docs/kernel-contract.md


def laws_table(contract: str) -> str:
    """The laws of a contract in Markdown, each with a kernel that it finds."""
    from refmoe.kernels.contracts import LAWS

    rows = ["| law | in words | from | needs | finds, for instance |", "|---|---|---|---|---|"]
    for name, law in LAWS[contract].items():
        needs = "; ".join(need.words for need in law.needs) or "nothing"
        rows.append(f"| `{name}` | {law.words} | {law.source} | {needs} | {EVERY[contract][name][0]} |")
    return "\n".join(rows)


def bugs_table() -> str:
    """The public bugs in Markdown."""
    rows = ["| bug | contract | reported | in words |", "|---|---|---|---|"]
    for each in KERNEL_BUGS.values():
        owner, repository, _, number = each.source.removeprefix("https://github.com/").split("/")
        link = f"[{owner}/{repository}#{number}]({each.source})"
        rows.append(f"| `{each.name}` | {each.contract} | {each.date}, {link} | {each.words} |")
    return "\n".join(rows)


if __name__ == "__main__":
    for contract in EVERY:
        print(f"{contract}\n\n{laws_table(contract)}\n")
    print(bugs_table())
