# SPDX-License-Identifier: Apache-2.0
"""Assertions on dispatch: the plan that brings rows to their experts, the rows that it moves, and the way back. Exact.

A slot is one of the k choices of a token: slot s of token t has the number t k + s.
"""

from __future__ import annotations

from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from refmoe.api.arguments import whole_number
from refmoe.api.arrays import to_numpy
from refmoe.errors import InputError
from refmoe.testing.arguments import fit, flags, integers
from refmoe.testing.judgement import Judgement, require
from refmoe.testing.options import checked
from refmoe.testing.products import within
from refmoe.verifier.findings import FAIL, PASS


class PlanOptions(TypedDict, total=False):
    """The options of `assert_permutation`."""

    experts: int
    """E. None: one more than the largest id."""
    padding: int | None
    """The number at a place of the plan that has no slot. None: -1, or any number from T k on."""
    block: int
    """Each expert's places begin at a multiple of this, and fill whole blocks. 1 by default."""
    expert_of_block: Any
    """Integers [blocks], the expert of each block of places that is used."""
    offsets: Any
    """Integers [E], the place after each expert's last one, padding included, or [E + 1] with a 0 before."""
    counts: Any
    """Integers [E], the slots of each expert."""
    total: Any
    """The number of places that are used, padding included."""
    stable: bool
    """Whether an expert's slots must be in rising order."""
    rows: Any
    """[P, D], the rows that the kernel moved; those at padding may be anything. `x` is then needed."""
    x: Any
    """[T, D], the rows before."""


def assert_permutation(order: Any, ids: Any, **options: Unpack[PlanOptions]) -> Judgement:
    """Assert that a plan brings each slot to its expert once, with the experts in rising order.

    order: integers [P], the slot at each place, or padding   ids: integers [T, k]; a slot of -1 has no place
    options: those of `PlanOptions`
    Returns the figures. Raises AssertionError when the plan is wrong, and InputError for arrays that do not fit.
    """
    __tracebackhide__ = True
    return require(judge_permutation(order, ids, **options))


def judge_permutation(order: Any, ids: Any, **options: Unpack[PlanOptions]) -> Judgement:
    """The judgement of `assert_permutation`, which also takes its arguments."""
    given = checked(options, PlanOptions, "assert_permutation")
    plan, chosen = integers(order, "order"), integers(ids, "ids")
    fit({"order": plan, "ids": chosen}, {"order": "P", "ids": "T k"})
    flat = chosen.reshape(-1)
    experts = whole_number(given["experts"], "experts") if "experts" in given else int(flat.max(initial=-1)) + 1
    within(chosen, experts, "ids")
    block = whole_number(given.get("block", 1), "block")
    if block < 1:
        raise InputError("block: is 0, but a number from 1 was expected")
    is_slot = (plan >= 0) & (plan < len(flat))
    faults = slot_faults(plan, is_slot, flat, given.get("padding"))
    if not faults:
        faults = region_faults(plan, is_slot, flat, experts, block, given)
    if not faults and given.get("rows") is not None:
        faults = row_faults(plan, is_slot, chosen.shape[1], given)
    return exact("permutation", len(plan), faults)


def slot_faults(plan: NDArray[Any], is_slot: NDArray[Any], flat: NDArray[Any], padding: Any) -> list[str]:
    """Slots that have no place, several, or one although they have no expert; padding that is not as declared."""
    times = np.bincount(plan[is_slot], minlength=len(flat))
    faults = []
    for wrong, words in (
        ((times == 0) & (flat >= 0), "has no place"),
        ((times > 1) & (flat >= 0), "has several places"),
        ((times > 0) & (flat < 0), "has a place, but no expert"),
    ):
        faults += [f"slot {slot} (expert {flat[slot]}) {words}" for slot in np.flatnonzero(wrong)]
    rest = plan[~is_slot]
    if padding is not None:
        value = int(padding)
        faults += [f"place {at} holds {plan[at]}, but {value} was expected as padding"
                   for at in np.flatnonzero(~is_slot & (plan != value))]  # fmt: skip
    elif (rest < -1).any():
        faults.append(f"place {int(np.flatnonzero(~is_slot & (plan < -1))[0])} holds {int(rest[rest < -1][0])}")
    return faults


def region_faults(
    plan: NDArray[Any], is_slot: NDArray[Any], flat: NDArray[Any], experts: int, block: int, given: dict[str, Any]
) -> list[str]:
    """Places that are not where the experts' counts put them, and tables that do not say where that is."""
    counts = np.bincount(flat[flat >= 0], minlength=experts)
    padded = -(-counts // block) * block
    ends = np.cumsum(padded)
    total = int(ends[-1]) if experts else 0
    faults = []
    expected = np.full(len(plan), -1)
    if len(plan) < total:
        return [f"the plan has {len(plan)} places, but {total} were expected"]
    for expert in range(experts):
        start = int(ends[expert] - padded[expert])
        expected[start : start + int(counts[expert])] = expert
    mine = np.where(is_slot, flat[np.where(is_slot, plan, 0)] if len(flat) else -1, -1)
    for at in np.flatnonzero(mine != expected):
        faults.append(f"place {at} holds {plan[at]} ({_expert(mine[at])}), but {_expert(expected[at])} was expected")
    if flags(given, "stable"):
        for at in np.flatnonzero(is_slot[1:] & is_slot[:-1] & (mine[1:] == mine[:-1]) & (plan[1:] < plan[:-1])):
            faults.append(f"place {at + 1} holds slot {plan[at + 1]} after slot {plan[at]}")
    faults += table_faults("counts", counts, given)
    faults += table_faults("expert_of_block", np.repeat(np.arange(experts), padded // block), given)
    if given.get("offsets") is not None:
        offsets = integers(given["offsets"], "offsets")
        wanted = np.concatenate([[0], ends]) if offsets.shape == (experts + 1,) else ends
        faults += table_faults("offsets", wanted, given)
    if given.get("total") is not None:
        found = integers(given["total"], "total").reshape(-1)
        if found.tolist() != [total]:
            faults.append(f"total is {found.tolist()}, but {total} was expected")
    return faults


def _expert(expert: int) -> str:
    return f"expert {expert}" if expert >= 0 else "no slot"


def table_faults(name: str, expected: NDArray[Any], given: dict[str, Any]) -> list[str]:
    """Entries of a table that differ. A table of blocks may be longer than what is used."""
    if given.get(name) is None:
        return []
    found = integers(given[name], name)
    long_enough = len(found) >= len(expected) if name == "expert_of_block" and found.ndim == 1 else False
    if not long_enough and found.shape != expected.shape:
        raise InputError(f"{name}: has shape {list(found.shape)}, but {list(expected.shape)} was expected")
    found = found[: len(expected)]
    return [f"{name}[{at}] is {found[at]}, but {expected[at]} was expected" for at in np.flatnonzero(found != expected)]


def row_faults(plan: NDArray[Any], is_slot: NDArray[Any], k: int, given: dict[str, Any]) -> list[str]:
    """Rows that are not copies of their token's row."""
    if given.get("x") is None:
        raise InputError("assert_permutation: rows is given without x, but the rows before were expected too")
    rows, x = to_numpy(given["rows"], "rows"), to_numpy(given["x"], "x")
    fit({"rows": rows, "x": x}, {"rows": "P D", "x": "T D"}, {"P": len(plan)})
    at = np.flatnonzero(is_slot)
    tokens = plan[at] // k
    if tokens.size and tokens.max() >= len(x):
        raise InputError(f"x: has {len(x)} rows, but {int(tokens.max()) + 1} were expected")
    wrong = at[~same_rows(rows[at], x[tokens])]
    return [f"row {each} is no copy of the row of token {plan[each] // k}" for each in wrong]


def same_rows(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """Whether rows have the same bits: booleans [n].   a, b: [n, ...]"""
    if a.dtype != b.dtype:
        raise InputError(f"rows: have dtype {a.dtype}, but {b.dtype} was expected, as they are moved and not computed")
    if not a.size:
        return np.ones(len(a), bool)
    first, second = (np.ascontiguousarray(each).reshape(len(each), -1).view(np.uint8) for each in (a, b))
    return np.asarray((first == second).all(1))


class UnpermutationOptions(TypedDict, total=False):
    """The options of `assert_unpermutation`."""

    zero: bool
    """Whether slots that have no place in the plan must be zeros. True by default."""


def assert_unpermutation(found: Any, rows: Any, order: Any, **options: Unpack[UnpermutationOptions]) -> Judgement:
    """Assert that rows came back to their slots.

    found: [T k, D] or [T, k, D]   rows: [P, D], in the order of the plan
    order: integers [P], the slot at each place; a number outside 0 .. T k - 1 is padding
    options: those of `UnpermutationOptions`
    Returns the figures. Raises AssertionError when a row is wrong, and InputError for arrays that do not fit.
    """
    __tracebackhide__ = True
    return require(judge_unpermutation(found, rows, order, **options))


def judge_unpermutation(found: Any, rows: Any, order: Any, **options: Unpack[UnpermutationOptions]) -> Judgement:
    """The judgement of `assert_unpermutation`, which also takes its arguments."""
    given = checked(options, UnpermutationOptions, "assert_unpermutation")
    back, moved, plan = to_numpy(found, "found"), to_numpy(rows, "rows"), integers(order, "order")
    if back.ndim == 3:
        back = back.reshape(-1, back.shape[2])
    fit({"found": back, "rows": moved, "order": plan}, {"found": "S D", "rows": "P D", "order": "P"})
    at = np.flatnonzero((plan >= 0) & (plan < len(back)))
    if len(np.unique(plan[at])) < len(at):
        raise InputError("order: has a slot twice, but each slot once was expected")
    wrong = at[~same_rows(back[plan[at]], moved[at])]
    faults = [f"slot {plan[each]} is no copy of row {each}" for each in wrong]
    if flags(given, "zero", True):
        rest = np.setdiff1d(np.arange(len(back)), plan[at])
        faults += [f"slot {slot} has no place, but is not zero" for slot in rest[(back[rest] != 0).any(1)]]
    return exact("unpermutation", len(back), faults)


def exact(what: str, count: int, faults: list[str]) -> Judgement:
    """The judgement of something that is right or wrong.   count: places judged   faults: in words"""
    message = ""
    if faults:
        share = f"Mismatched places: {len(faults)} / {count}"
        message = "\n".join([f"{what}: not exact", "", share, *(f"    {fault}" for fault in faults[:5])])
    return Judgement(
        what=what, policy="exact", verdict=FAIL if faults else PASS,
        reason=f"{len(faults)} are wrong: {faults[0]}" if faults else "every place is right", values=count, rows=count,
        headroom=float("inf") if faults else 0.0, deviations=0.0, limit=0.0, size=0.0, lean=0.0, statistics=False,
        message=message,
    )  # fmt: skip
