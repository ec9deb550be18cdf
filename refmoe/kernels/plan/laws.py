# SPDX-License-Identifier: Apache-2.0
"""All laws of dispatch plans, in the order of reports."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from refmoe.contracts.broken import LawBroken
from refmoe.contracts.drawing import BLOCK_COUNTS
from refmoe.contracts.formats import Ints
from refmoe.contracts.frameworks import to_numpy
from refmoe.contracts.law import Need, Strategy
from refmoe.kernels.moe.data import Sizes, choose, random
from refmoe.kernels.moe.examples import EXPERT_COUNTS, LOADS, SEEDS
from refmoe.kernels.plan.declaration import Declaration
from refmoe.kernels.plan.law import BLOCKS, COUNTS, LAWS, SLOTS, Plan, Subject, law

BLOCK_WIDTHS = (1, 2, 16, 64, 128)


def batches(d: Declaration) -> Strategy:
    """Sizes of batches around blocks, any load, up to 256 experts, and the number of slots of a block."""

    def make(t: int, e: int, k: int, seed: int, load: str) -> Sizes:
        experts = min(e, d.most_experts)
        return Sizes(
            tokens=min(t, d.most_tokens), experts=experts, top_k=min(k, experts), hidden=0, inner=0, seed=seed,
            load=load,  # type: ignore[arg-type]
        )  # fmt: skip

    counts = st.one_of(st.integers(0, 9), st.sampled_from(BLOCK_COUNTS))
    sizes = st.builds(make, counts, st.sampled_from(EXPERT_COUNTS), st.integers(1, 4), SEEDS, st.sampled_from(LOADS))
    return st.fixed_dictionaries({"sizes": sizes, "block": st.sampled_from((d.block,) if d.block else BLOCK_WIDTHS)})


def ids_of(sizes: Sizes, d: Declaration) -> Ints:
    """The ids [T, k] of an example, with empty slots where these are declared."""
    ids = choose(sizes, random(sizes))
    if not d.padding:
        return ids
    empty = random(sizes, 1).random(ids.shape) < 0.3
    return np.where(empty, -1, ids)


def counted(ids: Ints, experts: int) -> Ints:
    """The number of slots of each expert [E]."""
    return np.bincount(ids[ids >= 0], minlength=experts)


@law("form", "A plan has the declared parts, for no token as well.", "DISPATCH-1", batches)
def form(subject: Subject, sizes: Sizes, block: int) -> None:
    subject.plan(ids_of(sizes, subject.declaration), block, sizes.experts)


@law(
    "every-slot-once",
    "Every slot is named exactly once, an empty one never.",
    "DISPATCH-1, DISPATCH-2; all but the first dropped (vllm-project/vllm-xpu-kernels#453), -1 as an index (#571)",
    batches,
    SLOTS,
)
def every_slot_once(subject: Subject, sizes: Sizes, block: int) -> None:
    ids = ids_of(sizes, subject.declaration)
    slots = subject.plan(ids, block, sizes.experts).slots
    assert slots is not None
    named = np.sort(slots[(slots >= 0) & (slots < ids.size)])
    expected = np.flatnonzero(ids.reshape(-1) >= 0)
    missing, twice = np.setdiff1d(expected, named), named[1:][named[1:] == named[:-1]]
    extra = np.setdiff1d(named, expected)
    for words, wrong in (("is missing", missing), ("is there twice", twice), ("is empty but named", extra)):
        if wrong.size:
            raise LawBroken(f"slot {wrong[0]} {words}, as are {wrong.size - 1} others", wrong[0] // sizes.top_k)


@law(
    "block-experts",
    "The blocks are those of each expert in turn, as many as its slots need, and no more.",
    "DISPATCH-1; vLLM's moe_align_block_size",
    batches,
    BLOCKS,
)
def block_experts(subject: Subject, sizes: Sizes, block: int) -> None:
    ids = ids_of(sizes, subject.declaration)
    plan = subject.plan(ids, block, sizes.experts)
    needed = -(-counted(ids, sizes.experts) // block)
    expected = np.repeat(np.arange(sizes.experts), needed)
    assert plan.experts is not None
    found = plan.experts[: plan.total // block]
    if not np.array_equal(found, expected):
        raise LawBroken(f"the blocks are of experts {found.tolist()}, expected {expected.tolist()}")


@law(
    "slots-at-their-expert",
    "A block holds slots of its expert alone, and every other place holds S, the number of all slots, or more.",
    "DISPATCH-1; vLLM's moe_align_block_size",
    batches,
    BLOCKS,
)
def slots_at_their_expert(subject: Subject, sizes: Sizes, block: int) -> None:
    ids = ids_of(sizes, subject.declaration)
    plan = subject.plan(ids, block, sizes.experts)
    assert plan.slots is not None
    assert plan.experts is not None
    of_place = np.repeat(plan.experts[: plan.total // block], block)
    real = (plan.slots >= 0) & (plan.slots < ids.size)
    flat = np.append(ids.reshape(-1), -2)
    wrong = np.where(real, flat[np.where(real, plan.slots, -1)] != of_place, plan.slots < ids.size)
    for place in np.flatnonzero(wrong)[:1]:
        slot = int(plan.slots[place])
        words = f"slot {slot} of expert {flat[slot]}" if real[place] else f"{slot}, which is no slot"
        raise LawBroken(f"place {place}, in a block of expert {of_place[place]}, holds {words}")


@law(
    "counts",
    "Counts and offsets are those of the slots of each expert.",
    "DISPATCH-1",
    batches,
    COUNTS,
)
def counts(subject: Subject, sizes: Sizes, block: int) -> None:
    ids = ids_of(sizes, subject.declaration)
    found, expected = subject.plan(ids, block, sizes.experts).counts, counted(ids, sizes.experts)
    assert found is not None
    for expert in np.flatnonzero(found != expected)[:1]:
        raise LawBroken(f"expert {expert} has {found[expert]} slots, expected {expected[expert]}")


@law(
    "grouped",
    "The slots of a permutation stand expert by expert, as its offsets say.",
    "DISPATCH-1",
    batches,
    Need("a permutation, as declared", lambda s: s.declaration.kind == "permutation"),
)
def grouped(subject: Subject, sizes: Sizes, block: int) -> None:
    ids = ids_of(sizes, subject.declaration)
    slots = subject.plan(ids, block, sizes.experts).slots
    assert slots is not None
    expected = np.sort(ids[ids >= 0], kind="stable")
    found = ids.reshape(-1)[np.clip(slots, 0, max(ids.size - 1, 0))] if ids.size else slots
    if not np.array_equal(found, expected):
        raise LawBroken(f"the slots are of experts {found.tolist()[:40]}, expected {expected.tolist()[:40]}")


@law(
    "stable",
    "The slots of an expert are in rising order, so that equal calls give equal sums.",
    "DISPATCH-1: within an expert they are in the order of the queue",
    batches,
    SLOTS,
    Need("a stable order, as declared", lambda s: s.declaration.stable),
)
def stable(subject: Subject, sizes: Sizes, block: int) -> None:
    ids = ids_of(sizes, subject.declaration)
    slots = subject.plan(ids, block, sizes.experts).slots
    assert slots is not None
    real = slots[(slots >= 0) & (slots < ids.size)]
    owner = ids.reshape(-1)[real]
    falls = (real[1:] < real[:-1]) & (owner[1:] == owner[:-1])
    for place in np.flatnonzero(falls)[:1]:
        raise LawBroken(f"slot {real[place]} stands before slot {real[place + 1]}, both of expert {owner[place]}")


@law(
    "spare-blocks",
    "The experts of blocks behind the last one are -1.",
    "Declared; they were 0, a valid expert (vllm-project/vllm#35161)",
    batches,
    BLOCKS,
    Need("spare blocks declared absent", lambda s: s.declaration.spare == "absent"),
)
def spare_blocks(subject: Subject, sizes: Sizes, block: int) -> None:
    plan = subject.plan(ids_of(sizes, subject.declaration), block, sizes.experts)
    assert plan.experts is not None
    spare = plan.experts[plan.total // block :]
    if (spare != -1).any():
        raise LawBroken(f"the spare blocks are of experts {spare.tolist()[:40]}, -1 was expected")


@law("inputs-untouched", "The ids are not written to.", "The combination reads them again", batches)
def inputs_untouched(subject: Subject, sizes: Sizes, block: int) -> None:
    given = subject.array(ids_of(sizes, subject.declaration))
    was = to_numpy(given).copy()
    subject.call(given, block, sizes.experts)
    if not np.array_equal(to_numpy(given), was):
        raise LawBroken("the ids are not as they were before the call")


@law(
    "results-kept",
    "A call changes neither the plan of an earlier one nor that of a later one.",
    "A plan is a function; indices kept by shape (sgl-project/sglang#28676)",
    batches,
)
def results_kept(subject: Subject, sizes: Sizes, block: int) -> None:
    d = subject.declaration
    first, other = ids_of(sizes, d), ids_of(replace(sizes, seed=sizes.seed + 1), d)
    answer = subject.call(subject.array(first), block, sizes.experts)
    before = deepcopy(subject.read(answer, sizes.experts, block))
    later = subject.plan(other, block, sizes.experts)
    if not equal(subject.read(answer, sizes.experts, block), before):
        raise LawBroken("the plan of the first call was changed by the second call")
    found, expected = counts_of(later, other.size, block, sizes.experts), counted(other, sizes.experts)
    for expert in np.flatnonzero(found != expected)[:1]:
        raise LawBroken(f"in the second call expert {expert} has {found[expert]} slots, expected {expected[expert]}")


def equal(one: Plan, other: Plan) -> bool:
    """Whether two plans of one kind are the same."""
    pairs = ((getattr(one, name), getattr(other, name)) for name in ("slots", "counts", "experts"))
    return all(a is b if a is None else np.array_equal(a, b) for a, b in pairs)


def counts_of(plan: Plan, size: int, block: int, experts: int) -> Ints:
    """The number of slots of each expert [E] that a plan has.   size: the number of all slots"""
    if plan.experts is None or plan.slots is None:
        assert plan.counts is not None
        return plan.counts
    owners = np.repeat(plan.experts[: plan.total // block], block)
    real = (plan.slots >= 0) & (plan.slots < size) & (owners >= 0) & (owners < experts)
    return np.bincount(owners[real], minlength=experts)


__all__ = ["LAWS"]
