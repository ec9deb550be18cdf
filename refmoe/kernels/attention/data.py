# SPDX-License-Identifier: Apache-2.0
"""Sequences in mathematics, and the pages that hold them. Queries point at one key each, so that results are exact."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from refmoe.contracts.formats import Floats, Ints, rounded
from refmoe.kernels.attention.declaration import Declaration


@dataclass(frozen=True)
class Sizes:
    """The sizes of an example and the seed of its numbers."""

    sequences: int
    groups: int
    sharing: int
    """The number of query heads that share a key head."""
    width: int
    page: int
    longest: int
    seed: int = 0

    @property
    def heads(self) -> int:
        return self.groups * self.sharing


@dataclass(frozen=True, eq=False)
class Sequences:
    """Queries, and all keys and values of each sequence."""

    q: Floats
    """[S, H, C]"""
    keys: tuple[Floats, ...]
    """Of each sequence [L, G, C]"""
    values: tuple[Floats, ...]
    """Of each sequence [L, G, C]"""
    targets: Ints
    """The position that each query points at [S, H]."""

    @property
    def lengths(self) -> Ints:
        return np.array([len(each) for each in self.keys], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Cache:
    """Pages, and where each sequence's tokens lie in them."""

    keys: Floats
    """[P, B, G, C]"""
    values: Floats
    """[P, B, G, C]"""
    table: Ints
    """[S, M]"""
    lengths: Ints
    """[S]"""


def random(sizes: Sizes, *more: int) -> np.random.Generator:
    """The source of all numbers of an example."""
    s = sizes
    return np.random.default_rng([s.seed, s.sequences, s.groups, s.sharing, s.width, s.page, s.longest, *more])


def lengths_of(sizes: Sizes) -> Ints:
    """The lengths of the sequences [S]: at least 1, the longest among them, and some at the end of a page."""
    rng = random(sizes)
    found = rng.integers(1, sizes.longest + 1, sizes.sequences)
    whole = rng.random(sizes.sequences) < 0.3
    found = np.where(whole, np.maximum(found // sizes.page, 1) * sizes.page, found)
    found = np.minimum(found, sizes.longest)
    found[-1] = sizes.longest
    return found


def pointing(sizes: Sizes, d: Declaration) -> Sequences:
    """Each query points at one visible key: its score is so much larger that all other weights are exactly 0.

    Keys are distinct words of 1 and -1. A query is a multiple of its target's key.
    """
    rng = random(sizes, 1)
    gap = 1024.0 if d.dtype == "float64" else 128.0
    size = 2.0 ** np.ceil(np.log2(gap / (2 * d.factor(sizes.width))))
    keys, values, q = [], [], np.zeros((sizes.sequences, sizes.heads, sizes.width))
    targets = np.zeros((sizes.sequences, sizes.heads), np.int64)
    for s, length in enumerate(lengths_of(sizes)):
        words = np.stack([rng.permutation(256)[:length] for _ in range(sizes.groups)], axis=1)
        bits = (words[:, :, None] >> np.arange(8)) & 1
        signs = np.where(rng.random((1, sizes.groups, sizes.width)) < 0.5, -1.0, 1.0) * np.ones((length, 1, 1))
        signs[:, :, :8] = 2.0 * bits - 1
        keys.append(signs)
        values.append(rng.integers(-8, 9, signs.shape).astype(np.float64))
        targets[s] = rng.integers(d.first(int(length)), length, sizes.heads)
        for head in range(sizes.heads):
            q[s, head] = size * signs[targets[s, head], head // sizes.sharing]
    return Sequences(q=q, keys=tuple(keys), values=tuple(values), targets=targets)


def even(sizes: Sizes, d: Declaration) -> Sequences:
    """Queries of zeros over as many visible tokens as a power of two, whose values are -1, 0 or 1."""
    rng = random(sizes, 2)
    most = sizes.longest if d.window is None else min(sizes.longest, d.window)
    keys, values = [], []
    for _ in range(sizes.sequences):
        count = 2 ** int(rng.integers(0, most.bit_length()))
        length = count if d.window is None or count < d.window else int(rng.integers(count, sizes.longest + 1))
        keys.append(rng.integers(-4, 5, (length, sizes.groups, sizes.width)).astype(np.float64))
        values.append(rng.integers(-1, 2, keys[-1].shape).astype(np.float64))
    targets = np.zeros((sizes.sequences, sizes.heads), np.int64)
    q = np.zeros((sizes.sequences, sizes.heads, sizes.width))
    return Sequences(q=q, keys=tuple(keys), values=tuple(values), targets=targets)


def dense(sizes: Sizes, d: Declaration) -> Sequences:
    """Normally distributed queries, keys and values."""
    rng = random(sizes, 3)
    shapes = [(int(length), sizes.groups, sizes.width) for length in lengths_of(sizes)]
    return Sequences(
        q=rounded(rng.standard_normal((sizes.sequences, sizes.heads, sizes.width)), d.given),
        keys=tuple(rounded(rng.standard_normal(shape), d.given) for shape in shapes),
        values=tuple(rounded(rng.standard_normal(shape), d.given) for shape in shapes),
        targets=np.zeros((sizes.sequences, sizes.heads), np.int64),
    )


def picked(sequences: Sequences, sharing: int) -> Floats:
    """The values of the keys that the queries point at [S, H, C]."""
    result = np.zeros_like(sequences.q)
    for s, head in np.ndindex(*sequences.targets.shape):
        result[s, head] = sequences.values[s][sequences.targets[s, head], head // sharing]
    return result


def means(sequences: Sequences, sharing: int, d: Declaration) -> Floats:
    """The mean of the visible values, which queries of zeros give [S, H, C]."""
    result = np.zeros_like(sequences.q)
    for s, head in np.ndindex(*sequences.targets.shape):
        values = sequences.values[s]
        result[s, head] = values[d.first(len(values)) :, head // sharing].mean(axis=0)
    return result


def paged(sequences: Sequences, sizes: Sizes, order: str = "straight", held: float = 0.0, spare: int = 2) -> Cache:
    """The sequences in pages.

    order: of the pages in memory, straight or shuffled   held: what memory without a token holds
    spare: pages without a token, and columns of the table behind the longest sequence
    """
    page, lengths = sizes.page, sequences.lengths
    counts = -(-lengths // page)
    total = int(counts.sum()) + spare
    numbers = np.arange(total) if order == "straight" else random(sizes, 4).permutation(total)
    shape = (total, page, *sequences.keys[0].shape[1:])
    keys, values = np.full(shape, held), np.full(shape, held)
    table = np.full((len(lengths), int(counts.max()) + spare), numbers[-1] if spare else 0)
    used = 0
    for s, length in enumerate(lengths):
        own = numbers[used : used + counts[s]]
        used += int(counts[s])
        table[s, : len(own)] = own
        for pages, tokens in ((keys, sequences.keys[s]), (values, sequences.values[s])):
            place = np.arange(length)
            pages[own[place // page], place % page] = tokens
    return Cache(keys=keys, values=values, table=table, lengths=lengths)


def with_tail(cache: Cache, number: int) -> Cache:
    """The cache with another number behind each sequence's last page in the table."""
    counts = -(-cache.lengths // cache.keys.shape[1])
    behind = np.arange(cache.table.shape[1]) >= counts[:, None]
    return replace(cache, table=np.where(behind, number, cache.table))
