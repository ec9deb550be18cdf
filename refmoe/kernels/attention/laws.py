# SPDX-License-Identifier: Apache-2.0
"""All laws of attention over pages, in the order of reports."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from refmoe.contracts.broken import LawBroken
from refmoe.contracts.frameworks import to_numpy
from refmoe.contracts.law import Need, Strategy
from refmoe.kernels.arrays import check_exact, same
from refmoe.kernels.attention.data import (
    Sizes,
    dense,
    even,
    means,
    paged,
    picked,
    pointing,
    random,
    with_tail,
)
from refmoe.kernels.attention.declaration import Declaration
from refmoe.kernels.attention.law import LAWS, Subject, law

PAGES = (1, 2, 4, 16)
WIDTHS = (8, 16, 32, 64)
NO_ROUNDING = ", the value of the key that the query points at"
HUGE = 2.0**12


def sizes_of(d: Declaration) -> Strategy:
    """Sizes with lengths around pages, around the window, and up to 70 tokens."""
    pages = st.just(d.page) if d.page else st.sampled_from(PAGES)
    widths = st.just(d.width) if d.width else st.sampled_from(WIDTHS)
    lengths = st.one_of(st.integers(1, 9), st.sampled_from((15, 16, 17, 31, 32, 33, 70)))
    if d.window is not None:
        lengths = st.one_of(lengths, st.integers(max(1, d.window - 1), d.window + 2).filter(lambda n: n <= 250))
    return st.builds(
        Sizes, sequences=st.integers(1, 4), groups=st.sampled_from((1, 2, 3)), sharing=st.sampled_from((1, 2, 4)),
        width=widths, page=pages, longest=lengths, seed=st.integers(0, 1 << 20),
    )  # fmt: skip


def any_sizes(d: Declaration) -> Strategy:
    return st.fixed_dictionaries({"sizes": sizes_of(d)})


@law("form", "The result is one array [S, H, C] of floating-point numbers.", "ATTN-5", any_sizes)
def form(subject: Subject, sizes: Sizes) -> None:
    found = pointing(sizes, subject.declaration)
    subject.run(found.q, paged(found, sizes))


@law(
    "picks-a-key",
    "A query that points at one key, far beyond all others, returns this key's value exactly.",
    "ATTN-1, ATTN-5: all other weights are exactly 0",
    any_sizes,
)
def picks_a_key(subject: Subject, sizes: Sizes) -> None:
    given = pointing(sizes, subject.declaration)
    found = subject.run(given.q, paged(given, sizes))
    check_exact(found, picked(given, sizes.sharing), NO_ROUNDING)


@law(
    "even-weights",
    "Where all scores are equal, the result is the mean of the visible values.",
    "ATTN-4, ATTN-5, SOFTMAX-1",
    any_sizes,
)
def even_weights(subject: Subject, sizes: Sizes) -> None:
    d = subject.declaration
    given = even(sizes, d)
    found = subject.run(given.q, paged(given, sizes))
    expected = means(given, sizes.sharing, d)
    powers = np.array([len(each) - d.first(len(each)) for each in given.keys])
    exact = (powers & (powers - 1)) == 0
    check_exact(found[exact], expected[exact], ", the mean of 2^n values, as no operation rounds")


@law(
    "page-order",
    "Pages may lie in memory in any order.",
    "The table says where; neighbours in the table taken for neighbours in memory (hw-native-sys/pypto#470)",
    any_sizes,
)
def page_order(subject: Subject, sizes: Sizes) -> None:
    given = pointing(sizes, subject.declaration)
    found = subject.run(given.q, paged(given, sizes, order="shuffled"))
    check_exact(found, picked(given, sizes.sharing), NO_ROUNDING)


@law(
    "hidden-tokens",
    "A token outside the window is not seen, however well its key would fit.",
    "ATTN-4; windows that are one token too wide",
    any_sizes,
    Need("a window, as declared", lambda s: s.declaration.window is not None),
)
def hidden_tokens(subject: Subject, sizes: Sizes) -> None:
    d = subject.declaration
    given = pointing(sizes, d)
    for s, keys in enumerate(given.keys):
        for group in range(sizes.groups):
            keys[: d.first(len(keys)), group] = 2 * keys[given.targets[s, group * sizes.sharing], group]
    found = subject.run(given.q, paged(given, sizes, order="shuffled"))
    first = np.arange(sizes.heads) % sizes.sharing == 0
    check_exact(found[:, first], picked(given, sizes.sharing)[:, first], ": keys outside the window fit twice as well")


@law(
    "memory-without-tokens",
    "What pages hold behind a sequence's last token, and what other pages hold, leaves no trace.",
    "CACHE-1; 0 times NaN in a page's tail is NaN (openvinotoolkit/openvino#37377)",
    lambda d: st.fixed_dictionaries({"sizes": sizes_of(d), "held": st.sampled_from(("huge", "NaN", "infinity"))}),
)
def memory_without_tokens(subject: Subject, sizes: Sizes, held: str) -> None:
    d = subject.declaration
    value = HUGE if d.held == "finite" else {"huge": HUGE, "NaN": np.nan, "infinity": np.inf}[held]
    given = pointing(sizes, d)
    found = subject.run(given.q, paged(given, sizes, order="shuffled", held=value))
    check_exact(found, picked(given, sizes.sharing), f": memory without tokens holds {value:g}")


@law(
    "table-tail",
    "What the table holds behind a sequence's last page does not matter.",
    "CACHE-1; stale entries of block tables (vllm-project/vllm#42494)",
    lambda d: st.fixed_dictionaries({"sizes": sizes_of(d), "tail": st.sampled_from((0, -1, 1 << 20))}),
)
def table_tail(subject: Subject, sizes: Sizes, tail: int) -> None:
    d = subject.declaration
    given = pointing(sizes, d)
    number = tail if d.table_tail == "anything" else 0
    found = subject.run(given.q, with_tail(paged(given, sizes, order="shuffled"), number))
    check_exact(found, picked(given, sizes.sharing), f": the table holds {number} behind the last page")


@law(
    "shared-prefix",
    "Sequences may share the pages of a common prefix.",
    "CACHE-1; prefix caching",
    any_sizes,
)
def shared_prefix(subject: Subject, sizes: Sizes) -> None:
    given = pointing(replace(sizes, sequences=1), subject.declaration)
    cache = paged(given, sizes, order="shuffled")
    count = max(sizes.sequences, 2)
    lengths = np.maximum(1, sizes.longest - np.arange(count)[::-1] * sizes.page)
    seen = [subject.declaration.first(int(length)) for length in lengths]
    targets = np.array([np.clip(given.targets[0], low, length - 1) for low, length in zip(seen, lengths, strict=True)])
    size = np.abs(given.q).max()
    group = np.arange(sizes.heads) // sizes.sharing
    q = np.stack([size * given.keys[0][row, group] for row in targets])
    shared = replace(cache, table=np.repeat(cache.table, count, axis=0), lengths=lengths)
    found = subject.run(q, shared)
    expected = np.stack([given.values[0][row, group] for row in targets])
    check_exact(found, expected, ": all sequences share the pages of one")


@law(
    "other-sequences",
    "A sequence's result does not depend on the other sequences, be their tokens NaN.",
    "ATTN-5: each sequence for itself",
    any_sizes,
)
def other_sequences(subject: Subject, sizes: Sizes) -> None:
    given = pointing(sizes, subject.declaration)
    keep = int(random(sizes, 5).integers(sizes.sequences))
    poisoned = [values if s == keep else np.full_like(values, np.nan) for s, values in enumerate(given.values)]
    found = subject.run(given.q, paged(replace(given, values=tuple(poisoned)), sizes, order="shuffled"))
    row = slice(keep, keep + 1)
    check_exact(found[row], picked(given, sizes.sharing)[row], f" for sequence {keep}; the others' values are NaN")


@law(
    "legal-values",
    "Every value lies within the enclosure of its formula in the declared dtypes.",
    "ATTN-1 to ATTN-5 within the policy; docs/verification.md",
    any_sizes,
    Need("a judge of values, as refmoe.testing has", lambda s: s.legal is not None),
)
def legal_values(subject: Subject, sizes: Sizes) -> None:
    assert subject.legal is not None
    given = dense(sizes, subject.declaration)
    words = subject.legal(subject.own(given.q, paged(given, sizes)), given, subject.declaration)
    if words is not None:
        raise LawBroken(words)


@law(
    "batch-invariance",
    "A sequence's bits are the same alone and in any batch.",
    "Declared; vllm-project/vllm#53257",
    any_sizes,
    Need("a declared invariance to batches", lambda s: s.declaration.batch_invariant),
)
def batch_invariance(subject: Subject, sizes: Sizes) -> None:
    given = dense(sizes, subject.declaration)
    cache = paged(given, sizes)
    together = subject.run(given.q, cache)
    for s in range(sizes.sequences):
        row = slice(s, s + 1)
        alone = subject.run(given.q[row], replace(cache, table=cache.table[row], lengths=cache.lengths[row]))
        if not same(alone, together[row]).all():
            raise LawBroken(f"sequence {s} has other bits alone than among {sizes.sequences}", s)


@law("inputs-untouched", "The kernel writes to none of its arguments.", "CACHE-1: nothing is overwritten", any_sizes)
def inputs_untouched(subject: Subject, sizes: Sizes) -> None:
    given = pointing(sizes, subject.declaration)
    arguments = subject.arguments(given.q, paged(given, sizes))
    before = {name: to_numpy(array).copy() for name, array in arguments.items()}
    subject.start(arguments)
    for name, was in before.items():
        if not same(to_numpy(arguments[name]), was).all():
            raise LawBroken(f"{name} is not as it was before the call")


@law(
    "repetition",
    "Equal calls give equal bits, whatever was computed in between, and a result is kept.",
    "Determinism, as declared",
    any_sizes,
    Need("equal bits for equal calls, as declared", lambda s: s.declaration.deterministic),
)
def repetition(subject: Subject, sizes: Sizes) -> None:
    given, other = (dense(each, subject.declaration) for each in (sizes, replace(sizes, seed=sizes.seed + 1)))
    arguments = subject.arguments(given.q, paged(given, sizes))
    answer = subject.start(arguments)
    first = to_numpy(answer).copy()
    subject.run(other.q, paged(other, sizes))
    for words, found in (
        ("the first result is", to_numpy(answer)),
        ("an equal call is", subject.run(given.q, paged(given, sizes))),
    ):
        if not same(found, first).all():
            raise LawBroken(f"{words} no longer as it was, after another call")


__all__ = ["LAWS"]
