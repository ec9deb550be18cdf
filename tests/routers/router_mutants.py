# SPDX-License-Identifier: Apache-2.0
"""Routers that are wrong, each in one way: known bugs, and others that a law must detect.

``python -m tests.routers.router_mutants`` prints the table law x mutant.

A mutant that only one law can detect often declares scoring 'other'. With a known scoring, correct selections, weights
and ties imply every other law for the batches that are tried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np

from refmoe.contracts.checking import first_broken, hidden_by_shape
from refmoe.routers.contract import LAWS, Declaration, Subject
from refmoe.routers.contract.law import CONTRACT

E, K = 8, 2
EXAMPLES = CONTRACT.number
BASE = Declaration(
    experts=E, top_k=K, selection="logits", ties="lower", nan="propagate", infinity="propagate", all_masked="propagate"
)
OTHER = replace(BASE, scoring="other", nan="unspecified", infinity="unspecified", all_masked="unspecified")
LOSSES = replace(BASE, dtype="float64")


# --- correct pieces


def top(x: Any, k: int = K) -> Any:
    return np.argsort(-x, axis=1, kind="stable")[:, :k]


def at(x: Any, ids: Any) -> Any:
    return np.take_along_axis(x, ids, axis=1)


def softmax(x: Any, axis: int = 1) -> Any:
    parts = np.exp(x - x.max(axis=axis, keepdims=True))
    return parts / parts.sum(axis=axis, keepdims=True)


def normalised(w: Any) -> Any:
    return w / w.sum(axis=1, keepdims=True)


def softplus(x: Any) -> Any:
    return np.logaddexp(x, np.zeros_like(x))


def honest(x: Any) -> Any:
    ids = top(x)
    return ids, normalised(at(softmax(x), ids))


def honest_other(x: Any) -> Any:
    ids = top(x)
    return ids, normalised(softplus(at(x, ids)))


def with_capacity(x: Any, capacity: int, order: Any = None) -> Any:
    """Top-k by token priority; `order` permutes the queue."""
    ids, weights = honest(x)
    room = np.full(E, capacity)
    for token in range(len(x)) if order is None else order(len(x)):
        for slot, expert in enumerate(ids[token]):
            if room[expert] == 0:
                weights[token, slot] = 0
            else:
                room[expert] -= 1
    return ids, weights


def dispatch(x: Any, ids: Any) -> Any:
    order = np.argsort(ids.reshape(-1), kind="stable")
    return x[order // ids.shape[1]], (order, ids.shape)


def combine(rows: Any, plan: Any, weights: Any) -> Any:
    order, (tokens, k) = plan
    y = np.zeros((tokens, rows.shape[1]), rows.dtype)
    np.add.at(y, order // k, rows * weights.reshape(-1)[order][:, None])
    return y


def balance_loss(x: Any, p: Any = None, f: Any = None) -> Any:
    p = softmax(x) if p is None else p
    f = np.bincount(top(x).reshape(-1), minlength=E) / len(x) if f is None else f
    return E * (f * p.mean(axis=0)).sum()


def z_loss(x: Any) -> Any:
    largest = x.max(axis=1)
    return ((largest + np.log(np.exp(x - largest[:, None]).sum(axis=1))) ** 2).mean()


# --- mutants


@dataclass(frozen=True)
class Mutant:
    name: str
    subject: Callable[[], Subject]
    """Makes a new subject, as some routers have state."""
    source: str
    only: str | None = None
    """The only law that kills it."""
    honest_router: bool = False
    """The mistake is in another part, so only the laws that need the part are tried."""


MUTANTS: list[Mutant] = []


def mutant(
    name: str, source: str = "obvious", declared: Declaration = BASE, only: str | None = None, **parts: Any
) -> Callable[[Any], Any]:
    """Decorates a wrong router, which becomes a registered mutant."""

    def register(router: Any) -> Any:
        MUTANTS.append(Mutant(name, lambda: Subject(router, declared, **parts), source, only))
        return router

    return register


@mutant("no-renorm", "router-no-renorm")
def no_renorm(x: Any) -> Any:
    ids = top(x)
    return ids, at(softmax(x), ids)


@mutant("raw-logit-weights", "router-raw-logit-weights")
def raw_logit_weights(x: Any) -> Any:
    ids = top(x)
    return ids, at(x, ids)


@mutant("double-softmax", "router-double-softmax")
def double_softmax(x: Any) -> Any:
    ids = top(x)
    return ids, softmax(at(softmax(x), ids))


@mutant("renorm-wrong-axis", "router-renorm-wrong-axis")
def renorm_wrong_axis(x: Any) -> Any:
    ids = top(x)
    w = at(softmax(x), ids)
    return ids, w / w.sum(axis=0, keepdims=True)


@mutant("renorm-over-everything", "router-renorm-wrong-axis")
def renorm_over_everything(x: Any) -> Any:
    ids = top(x)
    w = at(softmax(x), ids)
    return ids, w / w.sum()


@mutant("softmax-over-tokens", "router-softmax-over-tokens")
def softmax_over_tokens(x: Any) -> Any:
    p = softmax(x, axis=0)
    ids = top(p)
    return ids, normalised(at(p, ids))


@mutant("bfloat16-logits", "router-lowprec-logits")
def bfloat16_logits(x: Any) -> Any:
    return honest(x.astype(ml_dtypes.bfloat16).astype(np.float32))


@mutant("bfloat16-selection", "router-lowprec-logits")
def bfloat16_selection(x: Any) -> Any:
    ids = top(x.astype(ml_dtypes.bfloat16).astype(np.float32))
    return ids, normalised(at(softmax(x), ids))


@mutant("id-in-the-low-bits", "router-lowprec-logits", only="near-ties")
def id_in_the_low_bits(x: Any) -> Any:
    """A sort key that holds the expert's id in the three lowest bits of the logit."""
    ids = top((x.view(np.int32) & ~7).view(np.float32))
    return ids, normalised(at(softmax(x), ids))


@mutant("bfloat16-weights", "router-lowprec-logits")
def bfloat16_weights(x: Any) -> Any:
    ids, w = honest(x)
    return ids, w.astype(ml_dtypes.bfloat16)


@mutant("tie-to-the-higher-id", "router-tie-break-high-index", only="tie-rule")
def tie_high(x: Any) -> Any:
    ids = E - 1 - top(x[:, ::-1])
    return ids, normalised(at(softmax(x), ids))


BIAS = np.linspace(-0.3, 0.3, E, dtype=np.float32)


@mutant("bias-in-weights", "router-bias-in-weights")
def bias_in_weights(x: Any) -> Any:
    p = softmax(x) + BIAS
    ids = top(p)
    return ids, normalised(at(p, ids))


@mutant("gate-bias", "router-bias-in-weights")
def gate_bias(x: Any) -> Any:
    return honest(x + BIAS)


@mutant(
    "bias-of-deepseek-in-weights", "router-bias-in-weights",
    Declaration(experts=E, top_k=K, scoring="sigmoid", bias=tuple(map(float, BIAS))),
)  # fmt: skip
def deepseek_bias(x: Any) -> Any:
    scores = 1 / (1 + np.exp(-x)) + BIAS
    ids = top(scores)
    return ids, normalised(at(scores, ids))


@mutant("factor-per-expert", "router-bias-in-weights", OTHER, only="expert-permutation")
def factor_per_expert(x: Any) -> Any:
    ids = top(x)
    return ids, normalised(softplus(at(x, ids)) * (1 + BIAS / 500)[ids])


@mutant("k-plus-one", "router-wrong-k", only="distinct-ids")
def k_plus_one(x: Any) -> Any:
    ids = top(x, K + 1)
    return ids, normalised(at(softmax(x), ids))


@mutant("one-expert-twice", "router-wrong-k")
def one_expert_twice(x: Any) -> Any:
    ids = np.repeat(top(x, 1), K, axis=1)
    return ids, np.full(ids.shape, 1 / K, np.float32)


@mutant("jitter", "router-jitter-at-eval")
def jitter(x: Any) -> Any:
    return honest(x * JITTER.uniform(0.99, 1.01, x.shape).astype(np.float32))


JITTER = np.random.default_rng(1)


@mutant("ties-by-chance", "router-jitter-at-eval", replace(BASE, ties="unspecified"), only="repetition")
def ties_by_chance(x: Any) -> Any:
    order = JITTER.permutation(E)
    ids = order[top(x[:, order])]
    return ids, normalised(at(softmax(x), ids))


STATIC = np.zeros((4096, K), np.int64), np.zeros((4096, K), np.float32)


@mutant("static-buffer", "expert-graph-reads-frozen-buffer", only="results-kept")
def static_buffer(x: Any) -> Any:
    """Views of a buffer that the next call overwrites, as the outputs of a captured graph are."""
    for buffer, values in zip(STATIC, honest(x), strict=True):
        buffer[: len(x)] = values
    return STATIC[0][: len(x)], STATIC[1][: len(x)]


@mutant("first-experts-only", "router-first-experts-only")
def first_experts_only(x: Any) -> Any:
    ids = top(x[:, : E - 2])
    return ids, normalised(at(softmax(x), ids))


@mutant("sorts-powers-of-two", "router-sort-powers-of-two", replace(BASE, experts=6))
def sorts_powers_of_two(x: Any) -> Any:
    ids = top(x[:, :4])
    return ids, normalised(at(softmax(x), ids))


@mutant("negative-logits-lost", "router-negative-logits-lost")
def negative_logits_lost(x: Any) -> Any:
    ids = top(np.maximum(x, 0))
    return ids, normalised(at(softmax(x), ids))


@mutant("exhausted-marked-by-minus-one", "https://github.com/vllm-project/vllm/pull/42608")
def exhausted_marked(x: Any) -> Any:
    """Experts with a logit of -Inf are none: their slots name expert 0, with the mark -1 as weight."""
    ids, weights = honest(x)
    none = np.isneginf(at(x, ids))
    return np.where(none, 0, ids), np.where(none, -1, weights).astype(weights.dtype)


@mutant("writes-to-its-input", "router-jitter-leaks-to-experts", only="input-untouched")
def writes_to_its_input(x: Any) -> Any:
    answer = honest(x)
    x -= x.max(axis=1, keepdims=True)
    return answer


@mutant("order-mismatch", "router-weights-order-mismatch", replace(BASE, descending=False))
def order_mismatch(x: Any) -> Any:
    ids, w = honest(x)
    return np.sort(ids, axis=1), w


@mutant("weights-reversed", "router-weights-order-mismatch", OTHER, only="monotone")
def weights_reversed(x: Any) -> Any:
    ids, w = honest_other(x)
    return ids, w[:, ::-1]


@mutant("index-off-by-one", "router-index-off-by-one")
def index_off_by_one(x: Any) -> Any:
    ids, w = honest(x)
    return (ids + 1) % E, w


@mutant("ids-from-one", "router-index-off-by-one")
def ids_from_one(x: Any) -> Any:
    ids, w = honest(x)
    return ids + 1, w


@mutant("last-expert-ignored", "router-index-off-by-one")
def last_expert_ignored(x: Any) -> Any:
    return honest(np.where(np.arange(E) == E - 1, -np.inf, x).astype(np.float32))


HIDDEN = replace(BASE, gate=np.eye(E, 12, 2), infinity="unspecified", all_masked="unspecified")


@mutant("reads-another-hidden-state", "router-input-unnormalised", HIDDEN)
def reads_another_hidden_state(h: Any) -> Any:
    return honest((1.5 * h) @ HIDDEN.gate_matrix.T.astype(np.float32))


@mutant("found-by-value", "sglang#8125", replace(BASE, ties="unspecified"), only="distinct-ids")
def found_by_value(x: Any) -> Any:
    largest = -np.sort(-x, axis=1)[:, :K]
    ids = (x[:, None, :] == largest[:, :, None]).argmax(axis=2)
    w = at(softmax(x), ids)
    return ids, normalised(w)


@mutant("ids-as-floats", only="distinct-ids")
def ids_as_floats(x: Any) -> Any:
    ids, w = honest(x)
    return ids.astype(np.float32), w


@mutant("negative-weights")
def negative_weights(x: Any) -> Any:
    ids = top(x)
    return ids, np.tanh(at(x, ids))


@mutant("own-scoring-not-normalised", "router-no-renorm", OTHER, only="weights-are-shares")
def own_scoring_not_normalised(x: Any) -> Any:
    ids = top(x)
    return ids, softplus(at(x, ids))


@mutant("argmin")
def argmin(x: Any) -> Any:
    ids = top(-x)
    return ids, normalised(at(softmax(x), ids))


@mutant(
    "floor-under-the-scores", "scores + 1e-20 and the like", replace(BASE, descending=False), only="optimal-selection"
)
def floor_under_the_scores(x: Any) -> Any:
    ids = top(np.maximum(x - x.max(axis=1, keepdims=True), -50))
    return ids, normalised(at(softmax(x), ids))


@mutant("not-in-order", declared=replace(BASE, ties="unspecified"), only="falling-order")
def not_in_order(x: Any) -> Any:
    ids, w = honest(x)
    return ids[:, ::-1], w[:, ::-1]


@mutant("temperature", only="weight-values")
def temperature(x: Any) -> Any:
    ids = top(x)
    return ids, normalised(at(softmax(x * np.float32(0.9375)), ids))


@mutant("exp-without-maximum")
def exp_without_maximum(x: Any) -> Any:
    ids = top(x)
    return ids, normalised(np.exp(at(x, ids)))


@mutant("float16-overflow", "prec-fp16-ffn-overflow", replace(BASE, dtype="float16", arithmetic="float32"))
def float16_overflow(x: Any) -> Any:
    ids = top(x)
    return ids, normalised(np.exp(at(x, ids)))


@mutant("softplus-for-exp", declared=replace(OTHER, shift_invariant=True), only="shift")
def softplus_for_exp(x: Any) -> Any:
    return honest_other(x)


@mutant("least-logit-leaks", declared=OTHER, only="unchosen-logits")
def least_logit_leaks(x: Any) -> Any:
    ids = top(x)
    sharper = np.where(x.min(axis=1, keepdims=True) < -4, 2, 1)
    return ids, softmax(at(x, ids) * sharper)


@mutant("k-equals-E", "mlx-examples#671", only="dense-at-k-equals-E", with_top_k=lambda k: lambda x: partitioned(x, k))
def partitioned(x: Any, k: int = K) -> Any:
    np.argpartition(-x, kth=k, axis=1)
    ids = top(x, k)
    return ids, normalised(at(softmax(x), ids))


@mutant("remainder-of-four", "expert-token-index-drift", OTHER, only="token-permutation")
def remainder_of_four(x: Any) -> Any:
    """Batches go four tokens at a time, and the code for the remaining tokens is wrong."""
    ids, w = honest_other(x)
    if 4 < len(x) < 16:
        w[4:] = normalised(w[4:] ** 2)
    return ids, w


@mutant("maximum-of-the-batch", "router-softmax-over-tokens", OTHER, only="other-tokens")
def maximum_of_the_batch(x: Any) -> Any:
    ids = top(x)
    return ids, normalised(np.exp(np.maximum(at(x, ids) - x.max(), -80)))


@mutant("tail-of-the-block", "expert-token-index-drift", only="batch-size")
def tail_of_the_block(x: Any) -> Any:
    ids, w = honest(x)
    if len(x) > 32:
        done = len(x) // 32 * 32
        ids[done:], w[done:] = np.arange(K), 1 / K
    return ids, w


@mutant("tail-uninitialised", "expert-token-index-drift", only="batch-size")
def tail_uninitialised(x: Any) -> Any:
    ids, w = honest(x)
    if len(x) > 128:
        ids[len(x) // 128 * 128 :] = 0
    return ids, w


@mutant("nan-swallowed", only="nan")
def nan_swallowed(x: Any) -> Any:
    return honest(np.where(np.isnan(x), np.float32(-1e30), x))


@mutant("infinity-clipped", only="infinity")
def infinity_clipped(x: Any) -> Any:
    return honest(np.minimum(x, np.finfo(np.float32).max))


@mutant("uniform-where-all-masked", only="all-masked")
def uniform_where_all_masked(x: Any) -> Any:
    return honest(np.where(np.isneginf(x).all(axis=1, keepdims=True), np.float32(0), x))


@mutant("masked-becomes-zero", "nan_to_num(neginf=0)", replace(BASE, all_masked="unspecified"), only="masked-experts")
def masked_becomes_zero(x: Any) -> Any:
    return honest(np.where(np.isneginf(x), np.float32(0), x))


class Remembering:
    """A bias against experts that were used, which is updated at inference too."""

    def __init__(self) -> None:
        self.bias = np.zeros(E, np.float32)

    def __call__(self, x: Any) -> Any:
        ids, w = honest(x + self.bias)
        self.bias -= np.bincount(ids.reshape(-1), minlength=E).astype(np.float32) * np.float32(0.01)
        return ids, w


class Stale:
    """An output buffer per shape, which is returned again while it is still in use."""

    def __init__(self) -> None:
        self.buffers: dict[int, Any] = {}

    def __call__(self, x: Any) -> Any:
        last = self.buffers.get(len(x))
        self.buffers[len(x)] = honest(x)
        return last or self.buffers[len(x)]


MUTANTS += [
    Mutant("state-between-calls", lambda: Subject(Remembering(), BASE), "router-jitter-at-eval"),
    Mutant("stale-buffer", lambda: Subject(Stale(), BASE), "obvious"),
]

CAP = replace(BASE, capacity=2, nan="unspecified", infinity="unspecified", all_masked="unspecified")


@mutant("capacity-plus-one", declared=CAP, only="capacity-limit")
def capacity_plus_one(x: Any) -> Any:
    return with_capacity(x, 3)


@mutant("no-capacity", declared=CAP, only="capacity-limit")
def no_capacity(x: Any) -> Any:
    return honest(x)


@mutant("last-tokens-kept", declared=CAP, only="capacity-prefix")
def last_tokens_kept(x: Any) -> Any:
    return with_capacity(x, 2, lambda tokens: range(tokens - 1, -1, -1))


@mutant("tokens-for-choices", declared=replace(CAP, priority="choice"), only="capacity-prefix")
def tokens_for_choices(x: Any) -> Any:
    return with_capacity(x, 2)


def parts(name: str, source: str, only: str, declared: Declaration = BASE, **changed: Any) -> None:
    """Register a correct router with a wrong part."""
    MUTANTS.append(Mutant(name, lambda: Subject(honest, declared, **changed), source, only, honest_router=True))


def combine_overwrites(rows: Any, plan: Any, weights: Any) -> Any:
    order, (tokens, k) = plan
    y = np.zeros((tokens, rows.shape[1]), rows.dtype)
    y[order // k] = rows * weights.reshape(-1)[order][:, None]
    return y


def combine_in_expert_order(rows: Any, plan: Any, weights: Any) -> Any:
    _, (tokens, k) = plan
    return (rows.reshape(tokens, k, -1) * weights[:, :, None]).sum(axis=1)


def combine_first_weight(rows: Any, plan: Any, weights: Any) -> Any:
    return combine(rows, plan, np.repeat(weights[:, :1], weights.shape[1], axis=1))


def combine_drops_a_tail(rows: Any, plan: Any, weights: Any) -> Any:
    y = combine(rows, plan, weights)
    if len(y) > 256:
        y[256:] = 0
    return y


for _combine, _bug in (
    (combine_overwrites, "expert-scatter-overwrite"),
    (combine_in_expert_order, "expert-unpermute-missing"),
    (combine_first_weight, "expert-weight-rank0-for-all"),
    (combine_drops_a_tail, "expert-int32-index-overflow"),
):
    parts(_combine.__name__.replace("_", "-"), _bug, "dispatch-combine", dispatch=dispatch, combine=_combine)


def loss_counts_ties(x: Any) -> Any:
    chosen = x >= -np.sort(-x, axis=1)[:, K - 1 : K]
    return balance_loss(x, f=chosen.mean(axis=0))


for _name, _bug, _law, _loss in (
    ("loss-counts-ties", "aux-wrong-reduction", "balance-loss-even", loss_counts_ties),
    (
        "loss-double-softmax",
        "aux-double-softmax",
        "balance-loss-values",
        lambda x: balance_loss(x, p=softmax(softmax(x))),
    ),
    ("loss-constant", "aux-constant", "balance-loss-values", lambda x: balance_loss(x, f=np.full(E, K / E))),
):
    parts(_name, _bug, _law, LOSSES, balance_loss=_loss)
parts("z-loss-without-square", "obvious", "z-loss-values", LOSSES, z_loss=lambda x: np.sqrt(z_loss(x)))
parts(
    "z-loss-clipped", "obvious", "z-loss-values", replace(BASE, dtype="float32"),
    z_loss=lambda x: (np.log(np.exp(np.clip(x, -80, 80)).sum(axis=1)) ** 2).mean(),
)  # fmt: skip

HONEST = {
    "softmax": Subject(honest, BASE, dispatch=dispatch, combine=combine),
    "own scoring": Subject(honest_other, OTHER),
    "losses": Subject(honest, LOSSES, balance_loss=balance_loss, z_loss=z_loss),
    "capacity": Subject(lambda x: with_capacity(x, 2), CAP),
    "hidden states": Subject(lambda h: honest(h @ HIDDEN.gate_matrix.T.astype(np.float32)), HIDDEN),
}
"""The correct routers that the mutants change. Every law passes for them."""


# --- the table


@dataclass(frozen=True)
class Row:
    """One mutant, and the laws that kill it with the number of the first example that does."""

    mutant: Mutant
    kills: dict[str, int] = field(default_factory=dict)


def row(wrong: Mutant, count: int = EXAMPLES) -> Row:
    """Try every law on one mutant."""
    kills = {}
    for law in LAWS.values():
        subject = wrong.subject()
        plain = Subject(subject.router, subject.declaration)
        if law.missing(subject) is not None or (wrong.honest_router and law.missing(plain) is None):
            continue
        broken = first_broken(law, subject, count)
        if broken is not None and not hidden_by_shape(law, broken[1], wrong.subject(), count):
            kills[law.name] = broken[0]
    return Row(wrong, kills)


def table(rows: list[Row]) -> str:
    """The table with laws across and mutants down: the number of the killing example, or a dot."""
    names = list(LAWS)
    lines = [f"{number:>3} {name}" for number, name in enumerate(names, 1)]
    lines.append(" " * 28 + "".join(f"{number:>4}" for number in range(1, len(names) + 1)))
    for each in rows:
        cells = "".join(f"{each.kills.get(name, '.'):>4}" for name in names)
        lines.append(f"{each.mutant.name:<28}{cells}   {each.mutant.source}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([row(each) for each in MUTANTS]))
