# SPDX-License-Identifier: Apache-2.0
"""Laws of what does not matter: other tokens, other experts, the order of either, and the batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from refmoe.contracts.broken import LawBroken
from refmoe.contracts.drawing import BLOCK_COUNTS
from refmoe.contracts.law import Need, Strategy
from refmoe.kernels.arrays import check_exact, same
from refmoe.kernels.moe.call import exact_result
from refmoe.kernels.moe.data import Sizes, dense_call, exact_call, random
from refmoe.kernels.moe.declaration import Declaration
from refmoe.kernels.moe.examples import built, only, small
from refmoe.kernels.moe.law import IDS, law
from refmoe.kernels.moe.subject import Subject

OTHERS = ("zeros", "huge", "NaN", "infinity")
FILLS = {"zeros": 0.0, "huge": 2.0**12, "NaN": np.nan, "infinity": np.inf}


@law(
    "other-tokens",
    "A token's result does not depend on the other tokens, be they huge, NaN or infinite.",
    "MOE-1: each row for itself",
    lambda d: only(small(d, least=2), kept=st.integers(0, 7), others=st.sampled_from(OTHERS)),
)
def other_tokens(subject: Subject, sizes: Sizes, kept: int, others: str) -> None:
    call = exact_call(sizes)
    keep = kept % max(sizes.tokens, 1)
    x = np.full_like(call.x, FILLS[others])
    x[keep : keep + 1] = call.x[keep : keep + 1]
    found = subject.run(replace(call, x=x))[keep : keep + 1]
    expected = exact_result(call.rows(np.arange(len(call.x))[keep : keep + 1]))
    check_exact(found, expected, f" for token {keep}, whatever the others are (here {others})")


@law(
    "nan-in-a-row",
    "A token with a NaN gets a row of NaN, and no other token notices.",
    "IEEE 754-2019, 6.2: a NaN operand gives a NaN; oracles in which NaN is a wildcard (gpu-mode/pygpubench#7)",
    lambda d: only(small(d), spot=st.integers(0, 40)),
    Need("NaN declared to stay in its row", lambda s: s.declaration.nan == "row"),
)
def nan_in_a_row(subject: Subject, sizes: Sizes, spot: int) -> None:
    call = exact_call(sizes)
    call = replace(call, weights=np.where(call.weights == 0, 0.5, call.weights))
    token, x = spot % max(sizes.tokens, 1), call.x.copy()
    x[token : token + 1, spot % sizes.hidden] = np.nan
    found, expected = subject.run(replace(call, x=x)), exact_result(call)
    expected[token : token + 1] = np.nan
    check_exact(found, expected, f": token {token} has a NaN in column {spot % sizes.hidden}, and no other one")


@law(
    "batch-invariance",
    "A token's bits are the same alone and in any batch.",
    "Declared; thinking-machines-lab/batch_invariant_ops, vllm-project/vllm#27433",
    lambda d: only(
        built(d, st.sampled_from((2, 3, *BLOCK_COUNTS[:6])), st.integers(1, 4), st.integers(1, 2), st.integers(1, 40))
    ),
    Need("a declared invariance to batches", lambda s: s.declaration.batch_invariant),
)
def batch_invariance(subject: Subject, sizes: Sizes) -> None:
    call = dense_call(sizes, subject.declaration)
    together = subject.run(call)
    for token in {0, sizes.tokens // 2, sizes.tokens - 1} - {-1}:
        alone = subject.run(call.rows(np.array([token])))
        if not same(alone[0], together[token]).all():
            column = int(np.argwhere(~same(alone[0], together[token]))[0, 0])
            raise LawBroken(
                f"column {column} is {float(alone[0, column])!r} alone and {float(together[token, column])!r} among "
                f"{sizes.tokens}",
                token,
            )


@law(
    "token-order",
    "Permuting the tokens permutes the rows of the result.",
    "Equivariance; gathers and scatters in another order (vllm-project/vllm-ascend#11921)",
    lambda d: only(small(d, least=2, most=40)),
)
def token_order(subject: Subject, sizes: Sizes) -> None:
    call = exact_call(sizes)
    order = random(sizes, 7).permutation(sizes.tokens)
    found = subject.run(call.rows(order))
    check_exact(found, exact_result(call)[order], f" when the tokens stand in the order {order.tolist()}")


@law(
    "expert-order",
    "Permuting the experts, and their ids with them, changes nothing.",
    "Equivariance; index maps lost in a port (flashinfer-ai/flashinfer#2629)",
    lambda d: only(small(d)),
)
def expert_order(subject: Subject, sizes: Sizes) -> None:
    call = exact_call(sizes)
    order = random(sizes, 8).permutation(sizes.experts)
    place = np.argsort(order)
    moved = replace(
        call, w_gate=call.w_gate[order], w_up=call.w_up[order], w_down=call.w_down[order], ids=place[call.ids]
    )
    found = subject.run(moved)
    check_exact(found, exact_result(call), f" when the experts stand in the order {order.tolist()}")


@law(
    "slot-order",
    "Permuting the slots of each token, with their weights, changes nothing.",
    "COMBINE-1 is a sum; pytorch/torchtitan#2679 (slots that are not sorted)",
    lambda d: only(small(d)),
    IDS,
)
def slot_order(subject: Subject, sizes: Sizes) -> None:
    call = exact_call(sizes)
    order = np.argsort(random(sizes, 9).random(call.ids.shape), axis=1)
    moved = replace(
        call, ids=np.take_along_axis(call.ids, order, 1), weights=np.take_along_axis(call.weights, order, 1)
    )
    found = subject.run(moved)
    check_exact(found, exact_result(call), " when the slots of each token are exchanged")


@law(
    "zero-weights",
    "A slot of weight 0 adds nothing, and takes nothing from the others.",
    "COMBINE-1",
    lambda d: only(small(d)),
    IDS,
)
def zero_weights(subject: Subject, sizes: Sizes) -> None:
    call = exact_call(sizes)
    zero = random(sizes, 10).random(call.weights.shape) < 0.5
    exact = replace(call, weights=np.where(zero, 0.0, call.weights))
    found = subject.run(exact)
    check_exact(found, exact_result(exact), ": some slots have weight 0")


@law(
    "unused-experts",
    "An expert that no token has chosen leaves no trace, be its matrices NaN.",
    "DISPATCH-1: an expert sees its own tokens; 0 times NaN is NaN (vllm-project/vllm#41249)",
    lambda d: only(small(d)),
)
def unused_experts(subject: Subject, sizes: Sizes) -> None:
    call = exact_call(sizes)
    unused = np.ones(sizes.experts, bool)
    unused[call.ids.reshape(-1)] = False
    wrong = [each.copy() for each in (call.w_gate, call.w_up, call.w_down)]
    for each in wrong:
        each[unused] = np.nan
    found = subject.run(replace(call, w_gate=wrong[0], w_up=wrong[1], w_down=wrong[2]))
    check_exact(found, exact_result(call), f": the matrices of experts {np.flatnonzero(unused).tolist()} are NaN")


def with_ranks(d: Declaration) -> Strategy:
    return only(small(d), ranks=st.integers(1, 4))


@law(
    "ranks",
    "Experts of other ranks leave no trace, and the sum over all ranks is the whole.",
    "DISPATCH-1; maps with -1 (vllm-project/vllm#46408), experts added on several ranks (sgl-project/sglang#32962)",
    with_ranks,
    Need("an expert map, as declared", lambda s: s.declaration.expert_map),
)
def ranks_sum(subject: Subject, sizes: Sizes, ranks: int) -> None:
    call = exact_call(sizes)
    home = random(sizes, 11).integers(0, ranks, sizes.experts)
    total = np.zeros_like(call.x)
    for rank in range(ranks):
        here = np.flatnonzero(home == rank)
        if not here.size:
            continue
        places = np.full(sizes.experts, -1)
        places[here] = np.arange(len(here))
        part = replace(
            call, w_gate=call.w_gate[here], w_up=call.w_up[here], w_down=call.w_down[here], expert_map=places
        )
        found = subject.run(part)
        check_exact(found, exact_result(part), f" on rank {rank}, whose expert map is {places.tolist()}")
        total += found
    check_exact(total, exact_result(call), f" as the sum over {ranks} ranks")


@law(
    "empty-slots",
    "A slot of id -1 adds nothing, and a token of nothing but such slots gets zeros.",
    "DISPATCH-1; sentinels of padding (vllm-project/vllm#46408, vllm-project/vllm#32058, sgl-project/sglang#25285)",
    lambda d: only(small(d)),
    Need("padding by -1, as declared", lambda s: s.declaration.padding),
)
def empty_slots(subject: Subject, sizes: Sizes) -> None:
    call = exact_call(sizes)
    rng = random(sizes, 12)
    empty = rng.random(call.ids.shape) < 0.3
    empty[rng.random(len(empty)) < 0.3] = True
    padded = replace(call, ids=np.where(empty, -1, call.ids))
    found = subject.run(padded)
    check_exact(found, exact_result(padded), f": {int(empty.sum())} of {empty.size} slots are empty")
