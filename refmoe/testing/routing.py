# SPDX-License-Identifier: Apache-2.0
"""Assertion on routers: the experts that were chosen, and their weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal, Unpack

import numpy as np
from numpy.typing import NDArray

from refmoe.api.arguments import whole_number
from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import OF_DTYPE, upcast
from refmoe.errors import InputError
from refmoe.profiles.policy import Policy
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.testing.arguments import finite, fit, flags, integers, one_of, real
from refmoe.testing.call import LEAST, SPREADS, WIDE, Change, Output, Provable, Room
from refmoe.testing.judgement import Judgement, judge, require
from refmoe.testing.options import Options, checked, chosen_rows, policy_for, significance_of
from refmoe.testing.parameters import known
from refmoe.verifier.findings import FAIL, PASS
from refmoe.verifier.routing import consistent, sharper, valid
from refmoe.verifier.routing import judge as judge_choice
from refmoe.verifier.tally import Limits

STEP = "router.weights"
ORDERS = ("top-k-then-softmax", "softmax-then-top-k", "sigmoid")
MOST_SETS = 5000
"""Sets of groups that are tried for one token. Beyond it a choice counts as legal: it cannot be decided."""


class RouterOptions(Options, total=False):
    """The options of `assert_router`."""

    order: Literal["top-k-then-softmax", "softmax-then-top-k", "sigmoid"]
    """The softmax of the chosen logits, the softmax of all logits, or the sigmoid of each."""
    renormalise: bool
    """Whether the weights of a token are divided by their sum. True by default."""
    bias: Any
    """[E], added to the scores for the choice only."""
    groups: tuple[int, int]
    """The number of groups of consecutive experts, and how many of the groups a token may choose from."""
    scale: float
    """A factor of all weights."""
    epsilon: float
    """A number added to the sum that divides the weights, such as 1e-20."""


@dataclass(frozen=True)
class Routed(Provable):
    """A router's call. The fields from `unbiased` on are mistakes."""

    logits: NDArray[Any]
    """[T, E]"""
    ids: NDArray[Any]
    """Integers [T, k], as found: the weights are those of these experts."""
    order: str = ORDERS[0]
    renormalise: bool = True
    bias: NDArray[Any] | None = None
    """[E]"""
    groups: tuple[int, int] = (1, 1)
    scale: float = 1.0
    epsilon: float = 0.0
    unbiased: bool = True
    """Whether the weights are without the bias."""
    raw: bool = False
    """Whether the weights are the logits themselves."""
    twice: bool = False
    """Whether the softmax is taken twice."""

    def some(self, at: Any) -> Routed:
        return replace(self, logits=self.logits[at], ids=self.ids[at])

    def scores(self, ops: EnclosureOps) -> Enclosure:
        """The score of each expert, [T, E]."""
        logits = known(ops, self.logits)
        if self.raw:
            return logits
        scores: Enclosure = ops.sigmoid(logits) if self.order == "sigmoid" else ops.softmax(logits, None)
        return ops.cut("router.probs", scores)

    def compared(self, ops: EnclosureOps) -> Enclosure:
        """The numbers that the choice compares, [T, E]."""
        scores = self.scores(ops)
        return scores if self.bias is None else scores + known(ops, self.bias)

    @property
    def of_chosen(self) -> bool:
        """Whether the weights are the softmax of the chosen logits, in whatever order it is computed."""
        plain = self.unbiased or self.bias is None
        return self.order != "sigmoid" and self.renormalise and plain and not self.raw and not self.epsilon

    def room(self, policy: Policy) -> Room | None:
        if not self.of_chosen or self.twice:
            return None
        logits = upcast(self.logits, WIDE)
        if not np.isfinite(logits).all():
            return None
        chosen = logits[np.arange(len(logits))[:, None], self.ids]
        exact = np.exp(chosen - chosen.max(1, keepdims=True))
        exact *= self.scale / exact.sum(1, keepdims=True)
        # n + 4 roundings of a softmax, and 6 of the order that renormalises; the spread of both
        n = self.ids.shape[1]
        roundings = min(n + 10.0, SPREADS * (14 + n / 9) ** 0.5)
        return Room(exact, np.abs(exact) * (LEAST * roundings * policy.statistics.u))

    def enclose(self, ops: EnclosureOps) -> Enclosure:
        """The weights of the experts found, [T, k]."""
        plain = self.unbiased or self.bias is None
        if self.of_chosen:
            weights = ops.weigh(known(ops, self.logits), self.ids)
        else:
            weights = ops.gather(self.scores(ops) if plain else self.compared(ops), self.ids)
            if self.renormalise:
                total = ops.sum(weights, axis=-1)
                total = total + self.epsilon if self.epsilon else total
                weights = weights / total.reshape(-1, 1)
        if self.twice:
            weights = ops.softmax(weights, None)
        return weights if self.scale == 1.0 else weights * self.scale


def assert_router(ids: Any, weights: Any, logits: Any, **options: Unpack[RouterOptions]) -> Judgement:
    """Assert that a router chose the best experts and gave them their weights.

    ids: integers [T, k], in any order; a row of -1 is padding and not judged   weights: [T, k]   logits: [T, E]
    options: those of `RouterOptions`
    Experts with equal scores are equally good. So are those that rounding can exchange, under the policy.
    Returns the figures of the weights. Raises AssertionError when a choice or a weight is wrong, and InputError for
    arrays that do not fit.
    """
    __tracebackhide__ = True
    judgements = judge_router(ids, weights, logits, **options)
    for each in judgements:
        require(each)
    return judgements[-1]


def judge_router(ids: Any, weights: Any, logits: Any, **options: Unpack[RouterOptions]) -> tuple[Judgement, ...]:
    """The judgements of `assert_router`, which also takes its arguments: of the choice, and of the weights."""
    given = checked(options, RouterOptions, "assert_router")
    arrays = {"ids": integers(ids, "ids"), "weights": real(weights, "weights"), "logits": real(logits, "logits")}
    shapes = {"ids": "T k", "weights": "T k", "logits": "T E"}
    if given.get("bias") is not None:
        arrays["bias"], shapes["bias"] = real(given["bias"], "bias"), "E"
    sizes = fit(arrays, shapes)
    if not 1 <= sizes["k"] <= sizes["E"]:
        raise InputError(f"ids: has {sizes['k']} experts per token, but 1 to {sizes['E']} were expected")
    rows = chosen_rows(given, sizes["T"])
    rows = rows[(arrays["ids"][rows] != -1).any(1)]
    call = Routed(
        logits=arrays["logits"][rows],
        ids=arrays["ids"][rows],
        order=str(one_of(given, "order", ORDERS)),
        renormalise=flags(given, "renormalise", True),
        bias=arrays.get("bias"),
        groups=groups_of(given.get("groups", (1, 1)), sizes["E"], sizes["k"]),
        scale=finite(given.get("scale", 1.0), "scale"),
        epsilon=finite(given.get("epsilon", 0.0), "epsilon"),
    )
    if call.order == ORDERS[0] and not call.renormalise:
        raise InputError("renormalise: is False, but the softmax of the chosen logits sums to 1 by itself")
    found = arrays["weights"][rows]
    policy = router_policy(policy_for(given, STEP, found, {"logits": arrays["logits"]}), call)
    significance = significance_of(given)
    right = valid(call.ids, sizes["E"]) if len(rows) else np.zeros(0, bool)
    choice = judge_ids(call, rows, right, policy, significance)
    weighed, shown = call, rows
    if not right.all():
        at = np.flatnonzero(right)
        weighed, shown, found = call.some(at), rows[at], found[at]
    output = Output(
        what="router weights",
        step=STEP,
        found=found,
        call=weighed,
        reads=(weighed.logits,),
        where=lambda at: f"token {shown[at[0]]}, slot {at[1]}, expert {weighed.ids[at[0]][at[1]]}",
        changes=lambda: weight_changes(weighed),
        cuts=("router.probs", "router.softmax_input"),
    )
    return choice, judge(output, policy, given)


def groups_of(groups: Any, experts: int, k: int) -> tuple[int, int]:
    """The number of groups and of those that a token may use. Raises InputError when they do not fit."""
    try:
        all_, some = groups
    except (TypeError, ValueError):
        raise InputError("groups: two numbers were expected, all groups and those that a token may use") from None
    all_, some = whole_number(all_, "groups"), whole_number(some, "groups")
    if not 1 <= some <= all_ or experts % all_ or some * (experts // all_) < k:
        raise InputError(
            f"groups: {some} of {all_} groups were given for {experts} experts and {k} per token, but equal groups "
            "with enough experts were expected"
        )
    return all_, some


def router_policy(policy: Policy, call: Routed) -> Policy:
    """The policy with the order of the call, and with logits as the router was given them."""
    order = ORDERS[1] if call.order == "sigmoid" else call.order
    given = OF_DTYPE[call.logits.dtype]
    return replace(policy, router_order=order, compared="stored", cuts={**policy.cuts, "router.logits": given})


# ---- the choice


def judge_ids(
    call: Routed, rows: NDArray[Any], known_ids: NDArray[Any], policy: Policy, significance: float
) -> Judgement:
    """The judgement of the choice of experts.

    rows: the tokens of the call, integers [T]   known_ids: whether those of a token are different experts, [T]
    """
    spreads = Limits(significance, max(call.logits.size, 1), 1).excess
    wrong = ~known_ids
    if known_ids.any():
        some = call if known_ids.all() else call.some(known_ids)
        wrong[known_ids] = ~legal_choices(some, policy, spreads)
    bad = np.flatnonzero(wrong)
    names: tuple[str, ...] = ()
    message, reason, place = "", "each choice is a top-k of legal scores", ""
    if bad.size:
        place = f"token {rows[bad[0]]}"
        names = tuple(choice_names(call, policy, spreads)) if known_ids.all() else ()
        reason, message = choice_message(call, rows, bad, names)
    return Judgement(
        what="router", policy=policy.name, verdict=FAIL if bad.size else PASS, reason=reason, values=len(rows),
        rows=len(rows), headroom=float("inf") if bad.size else 0.0, deviations=0.0, limit=spreads, size=0.0, lean=0.0,
        statistics=False, place=place, explanations=names, message=message,
    )  # fmt: skip


def legal_choices(call: Routed, policy: Policy, spreads: float) -> NDArray[Any]:
    """Whether rounding under the policy can lead to each choice: booleans [T]

    spreads: standard deviations that count as certain
    """
    by_logits = call.order != "sigmoid" and call.bias is None and call.groups[0] == call.groups[1]
    if by_logits and largest(call.logits, call.ids):
        return np.ones(len(call.ids), bool)
    ops = EnclosureOps(policy)
    with np.errstate(all="ignore"):
        if by_logits:
            logits = known(ops, call.logits)
            legal: NDArray[Any] = judge_choice(logits, None, True, call.ids, call.ids.shape[1], policy, spreads).legal
            return legal
        x = sharper(call.compared(ops).settle(), spreads)
        radius = np.where(np.isnan(x.r) | np.isnan(x.mid), np.inf, x.r)
        mid = np.nan_to_num(x.mid, nan=0.0)
        low, high = np.nextafter(mid - radius, -np.inf), np.nextafter(mid + radius, np.inf)
        if call.groups[0] == call.groups[1]:
            return np.asarray(consistent(low, high, call.ids))
        return np.array([in_groups(call, low[t], high[t], call.ids[t], policy) for t in range(len(low))], bool)


def largest(logits: NDArray[Any], ids: NDArray[Any]) -> bool:
    """Whether no logit is larger than one that is chosen, in any row. Such a choice needs no rounding to be legal.

    logits: [T, E]   ids: integers [T, k], in range   NaN is larger than any
    """
    rows = np.arange(len(ids))[:, None]
    rest = np.array(logits)
    chosen = rest[rows, ids]
    rest[rows, ids] = -np.inf
    return bool((chosen.min(1) >= rest.max(1)).all())


def in_groups(call: Routed, low: NDArray[Any], high: NDArray[Any], ids: NDArray[Any], policy: Policy) -> bool:
    """Whether a token's choice is the best of some set of groups that can be the best.

    low, high: of the compared scores, [E]   ids: integers [k]
    A group's score is the sum of its two largest scores after a sigmoid, and its largest score after a softmax.
    """
    (count, some), experts = call.groups, len(low)
    size = experts // count
    group = np.arange(experts) // size
    take = min(2, size) if call.order == "sigmoid" else 1
    slack = 2 * policy.statistics.u
    ends = [np.sort(side.reshape(count, size), axis=1)[:, size - take :].sum(1) for side in (low, high)]
    least, most = ends[0] - slack * np.abs(ends[0]), ends[1] + slack * np.abs(ends[1])
    needed = {*group[ids].tolist()}
    if len(needed) > some:
        return False
    threshold = np.sort(least)[count - some]
    possible = [g for g in range(count) if most[g] >= threshold and g not in needed]
    for tried, rest in enumerate(combinations(possible, some - len(needed))):
        if tried == MOST_SETS:
            return True
        chosen = np.array(sorted(needed | {*rest}))
        inside = np.isin(group, chosen)
        place = np.cumsum(inside) - 1
        if consistent(least[None], most[None], chosen[None])[0]:
            mine = place[ids][None]
            if consistent(low[inside][None], high[inside][None], mine)[0]:
                return True
    return False


def choice_names(call: Routed, policy: Policy, spreads: float) -> Iterator[str]:
    """The mistakes under which all choices are legal, in words."""
    experts = call.logits.shape[1]
    # more mistakes fit a few tokens than one can tell apart
    for words, changed in choice_changes(call):
        if valid(changed.ids, experts).all() and legal_choices(changed, policy, spreads).all():
            yield words
            return


def choice_changes(call: Routed) -> Iterator[tuple[str, Routed]]:
    """The mistakes of a choice, in words and as calls in which the choice would be right."""
    experts = call.logits.shape[1]
    if call.bias is not None:
        yield "the bias is not used for the choice", replace(call, bias=None)
    if call.groups[0] != call.groups[1]:
        yield "the groups are not used", replace(call, groups=(1, 1))
    yield "the ids are one too large", replace(call, ids=(call.ids - 1) % experts)
    yield "the ids are one too small", replace(call, ids=(call.ids + 1) % experts)
    yield "the experts with the smallest logits are chosen", replace(call, logits=-call.logits)
    yield "the experts with the largest magnitudes are chosen", replace(call, logits=np.abs(call.logits))
    half = experts // 2
    if half >= call.ids.shape[1]:
        rest = np.where(np.arange(experts) < half, call.logits, call.logits.dtype.type(-np.inf))
        yield f"only the first {half} experts are looked at", replace(call, logits=rest)
    lost = np.maximum(call.logits, 0)
    if (call.logits < 0).any():
        yield "negative logits count as 0 (known bug router-negative-logits-lost)", replace(call, logits=lost)


def choice_message(call: Routed, rows: NDArray[Any], bad: NDArray[Any], names: tuple[str, ...]) -> tuple[str, str]:
    """The reason and the message of illegal choices.   bad: the rows of the call, integers [n]"""
    experts, k = call.logits.shape[1], call.ids.shape[1]
    row = bad[0]
    found = call.ids[row]
    if not valid(found[None], experts)[0]:
        reason = (
            f"token {rows[row]} has {found.tolist()}, but {k} different experts from 0 to {experts - 1} were expected"
        )
    else:
        best = np.argsort(-call.logits[row].astype(np.float64), kind="stable")[: k + 1]
        reason = (
            f"token {rows[row]} has experts {{{', '.join(map(str, sorted(found.tolist())))}}}, with logits "
            f"{[float(f'{call.logits[row, e]:.6g}') for e in found]}; the largest logits are those of {best.tolist()}: "
            f"{[float(f'{call.logits[row, e]:.6g}') for e in best]}"
        )
    lines = [
        "router: a choice of experts is not legal",
        "",
        f"Mismatched tokens: {len(bad)} / {len(call.ids)} ({100 * len(bad) / len(call.ids):.1f}%)",
        f"First: {reason}",
        f"Explained by: {names[0] if names else 'nothing that refmoe knows'}",
    ]
    return f"{len(bad)} of {len(call.ids)} choices are illegal; {reason}", "\n".join(lines)


# ---- the weights


def weight_changes(call: Routed) -> Iterator[Change]:
    """The mistakes of the weights."""
    if call.renormalise:
        all_ = replace(call, renormalise=False, order=ORDERS[1] if call.order == ORDERS[0] else call.order)
        yield Change("the weights are not renormalised", all_, "router-no-renorm")
    else:
        yield Change("the weights are renormalised", replace(call, renormalise=True))
    if call.scale != 1.0:
        yield Change("the scale is missing", replace(call, scale=1.0))
        yield Change("the scale is used twice", replace(call, scale=call.scale**2))
    if call.order == "sigmoid":
        yield Change("the scores are softmax, not sigmoid", replace(call, order=ORDERS[1]))
    else:
        yield Change("the scores are sigmoid, not softmax", replace(call, order="sigmoid"))
        if call.renormalise:
            plain = replace(call, order="sigmoid", renormalise=False)
            yield Change("the scores are sigmoid, not softmax, and not renormalised", plain)
    if call.bias is not None:
        yield Change("the bias is in the weights", replace(call, unbiased=False), "router-bias-in-weights")
    yield Change("the weights are the logits", replace(call, raw=True, renormalise=False), "router-raw-logit-weights")
    yield Change("the softmax is taken twice", replace(call, twice=True), "router-double-softmax")
    if call.ids.shape[1] > 1:
        turned = replace(call, ids=call.ids[:, ::-1])
        yield Change("the slots of a token have each other's weights", turned, "router-weights-order-mismatch")
        yield Change("the weights are in order of expert", ByExpert(call), "router-weights-order-mismatch")


@dataclass(frozen=True)
class ByExpert:
    """The weights in rising order of their experts, whatever the order of the ids."""

    of: Routed

    def some(self, at: Any) -> ByExpert:
        return ByExpert(self.of.some(at))

    def enclose(self, ops: EnclosureOps) -> Enclosure:
        return replace(self.of, ids=np.sort(self.of.ids, axis=1)).enclose(ops)
