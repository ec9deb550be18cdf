# SPDX-License-Identifier: Apache-2.0
"""Orders: slices along an axis in another order, exchanged, shifted, repeated or transposed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.verifier.blocks import without_bound
from refmoe.verifier.diagnosis.grammar.fault import AXES, CLOSE, Fault, Search
from refmoe.verifier.diagnosis.grammar.laboratory import Laboratory
from refmoe.verifier.diagnosis.grammar.views import View, masked
from refmoe.verifier.passes import Key

LONGEST = 4096
"""The most slices along an axis for which an order is sought. All distances between slices must fit in memory."""
FIX = "look at the order of {noun}s where they are loaded, split, gathered or reshaped"


def orders(search: Search, view: View) -> Iterator[Fault]:
    """The orders that explain a view."""
    for axis, dimension in enumerate(view.dims):
        if view.pairs and dimension not in ("T", "S"):
            yield from _mapped(search, view, axis, AXES[dimension])
        elif view.pairs and dimension == "T":
            yield from _mapped_tokens(search, view, axis)
        yield from _laws(search, view, axis, dimension)
    yield from _transposed(search, view)
    for axis, dimension in enumerate(view.dims):
        if not view.pairs and dimension not in ("T", "S"):
            yield from _few(search, view, axis, AXES[dimension])
        elif dimension == "S":
            yield from _positions(search, view, axis)


FEW = 12
"""The most slices of which every pair is tried, where no map can be read off."""
MOST_POSITIONS = 256
"""The most cached positions of which each is tried as zero."""


def _few(search: Search, view: View, axis: int, noun: str) -> Iterator[Fault]:
    """Two slices exchanged, one in the place of another, or one of them zero."""
    count = view.base(search.rough, search.failed[0]).mid.shape[axis]
    if count > FEW or search.least < 5.0:
        return
    own = np.arange(count)
    for i in range(count):
        for j in range(count):
            sources = own.copy()
            if i < j:
                sources[[i, j]] = j, i
                yield mapped(view, axis, noun, sources)
            if i != j:
                sources = own.copy()
                sources[i] = j
                yield mapped(view, axis, noun, sources)

        def move(lab: Laboratory, key: Key, x: Enclosure, zero: Any = own == i) -> Enclosure | None:
            return zeroed_at(x, axis, zero) if x.mid.shape[axis] == count else None

        yield Fault(
            name=f"{noun} {i} zeroed{view.of}",
            about=f"{noun} {i}{view.of} is zero",
            fix="look for a part that is dropped, masked or never written",
            bits=5.0 + float(np.log2(count)),
            predict=view.predict(move),
        )


def _positions(search: Search, view: View, axis: int) -> Iterator[Fault]:
    """One cached position zero, one with what belongs to another, or two exchanged. Calls have different numbers."""
    count = max(view.base(search.rough, key).mid.shape[axis] for key in search.failed)
    if count > MOST_POSITIONS or search.least < 5.0:
        return
    each = float(np.log2(max(count, 2)))
    for i in range(count):
        yield _position(view, axis, {i: -1}, f"cached position {i} zeroed", 4.0 + each)
    for i, j in combinations(range(count if count <= 2 * FEW else 0), 2):
        yield _position(view, axis, {i: j, j: i}, f"cached positions {i} and {j} exchanged", 4.0 + 2 * each)
        for to, source in ((i, j), (j, i)):
            words = f"cached positions taken from other cached positions ({to} holds {source})"
            yield _position(view, axis, {to: source}, words, 4.0 + 2 * each)


def _position(view: View, axis: int, moved: dict[int, int], words: str, bits: float) -> Fault:
    """Cached positions that hold others, or zeros.   moved: the source of each, -1 for a zero"""

    def move(lab: Laboratory, key: Key, x: Enclosure) -> Enclosure | None:
        count = x.mid.shape[axis]
        sources = np.arange(count)
        if max(*moved, *moved.values()) < count:
            sources[list(moved)] = list(moved.values())
        taken = x.map(lambda part: np.take(np.broadcast_to(part, x.mid.shape), np.maximum(sources, 0), axis=axis))
        return zeroed_at(taken, axis, sources < 0) if (sources < 0).any() else taken

    return Fault(
        name=f"{words}{view.of}",
        about=f"{words}{view.of}",
        fix="look at the slots of the cache that are written, and at those that are read",
        bits=bits + 2.0 * bool(view.name),
        predict=view.predict(move),
    )


# ---- any map, found by the nearest slice


def _mapped(search: Search, view: View, axis: int, noun: str) -> Iterator[Fault]:
    """The hypothesis that slice i holds the values of slice p(i), the same p in all calls."""
    pooled: list[Any] = [[], []]
    for key, both in view.pairs.items():
        for into, part in zip(pooled, both, strict=True):
            part = masked(view, search, key, part, by_slot=view.dims[axis] != "k")
            into.append(np.moveaxis(part, axis, 0).reshape(part.shape[axis], -1))
    if len({len(part) for part in pooled[0]}) > 1:
        return
    sources = nearest_slices(np.concatenate(pooled[1], 1), np.concatenate(pooled[0], 1))
    if sources is not None:
        yield mapped(view, axis, noun, sources)


def nearest_slices(found: Any, right: Any) -> Any:
    """The slice of `right` that each slice of `found` is nearest to. None if it is another thing. [n, m] -> [n]"""
    count = len(found)
    if not 2 <= count <= LONGEST:
        return None
    with np.errstate(all="ignore"):
        distance: Any = (found * found).sum(1)[:, None] + (right * right).sum(1)[None, :] - 2 * (found @ right.T)
        sources = distance.argmin(1)
        own = np.diagonal(distance) <= distance.min(1) + 1e-12 * (found * found).sum(1)
        sources = np.where(own, np.arange(count), sources)
        error = np.linalg.norm(found - right)
        if (sources == np.arange(count)).all() or not np.linalg.norm(found - right[sources]) <= CLOSE * error:
            return None
    return sources


def mapped(view: View, axis: int, noun: str, sources: Any, only: Any = None) -> Fault:
    """The fault that slice i along an axis holds slice sources[i].   only: the tap it is limited to, if any"""
    count = len(sources)

    def move(lab: Laboratory, key: Key, x: Enclosure) -> Enclosure | None:
        if x.mid.shape[axis] != count or only not in (None, key[0]):
            return None
        return x.map(lambda part: np.take(np.broadcast_to(part, x.mid.shape), sources, axis=axis))

    name, listing, bits = order_in_words(sources, noun)
    return Fault(
        name=f"{noun}s {name}{view.of}",
        about=f"{noun}s{view.of} hold what belongs to others: {listing}",
        fix=FIX.format(noun=noun),
        bits=bits + 2.0 * bool(view.name) + 4.0 * (only is not None),
        predict=view.predict(move),
    )


def order_in_words(sources: Any, noun: str) -> tuple[str, str, float]:
    """An order in words, its members, and its length in bits."""
    count, own = len(sources), np.arange(len(sources))
    moved = np.flatnonzero(sources != own)
    listing = ", ".join(f"{i} holds {sources[i]}" for i in moved[:6]) + (", ..." if len(moved) > 6 else "")
    each = np.log2(max(count, 2))
    if len(set(sources.tolist())) < count:
        same = set(sources[moved].tolist())
        if len(same) == 1 and len(moved) >= count - 1:
            return f"all replaced by {noun} {next(iter(same))}", listing, 3 + each
        return f"taken from other {noun}s ({listing})", listing, 4 + 2 * each * len(moved)
    by = int(own[0] - sources[0])
    shifts = [s for s in range(1, count) if (sources == (own - s) % count).all()]
    if shifts:
        by = shifts[0] if shifts[0] <= count // 2 else shifts[0] - count
        if 2 * abs(by) == count and count > 2:
            return "with their halves exchanged", listing, 3.0
        return f"shifted by {by:+d} in a circle", listing, 3 + min(abs(by), each)
    if (sources == own[::-1]).all():
        return "in reverse order", listing, 3.0
    if len(moved) == 2:
        return f"{moved[0]} and {moved[1]} exchanged", listing, 3 + 2 * each
    if count % 2 == 0 and (sources == own ^ 1).all():
        return "exchanged in pairs", listing, 3.0
    return f"permuted ({listing})", listing, 4 + each * len(moved)


def _mapped_tokens(search: Search, view: View, axis: int) -> Iterator[Fault]:
    """The hypothesis that the tokens of one call are in another order."""
    for right, had in view.pairs.values():
        if right.shape[axis] < 3:
            continue
        a, b = (np.moveaxis(part, axis, 0).reshape(right.shape[axis], -1) for part in (had, right))
        sources = nearest_slices(a, b)
        if sources is not None:
            yield mapped(view, axis, "token", sources)
            return


# ---- laws that hold for any length

Law = Callable[[int], Any]


def _laws(search: Search, view: View, axis: int, dimension: str) -> Iterator[Fault]:
    noun = AXES[dimension]
    size = None if dimension in ("T", "S") else view.base(search.rough, search.failed[0]).mid.shape[axis]
    for words, bits, law, open_ in laws(dimension, view.name != ""):
        words = words if size is None else in_short(law(size), noun, words)

        def move(lab: Laboratory, key: Key, x: Enclosure, law: Any = law, open_: Any = open_) -> Enclosure | None:
            count = x.mid.shape[axis]
            sources = law(count)
            if sources is None:
                return None
            sources = np.asarray(sources)
            moved = x.map(lambda part: np.take(np.broadcast_to(part, x.mid.shape), np.maximum(sources, 0), axis=axis))
            if (sources < 0).any():
                moved = zeroed_at(moved, axis, sources < 0)
            return without_bound(moved, open_) if open_ is not None and axis == 0 else moved

        yield Fault(
            name=f"{noun}s {words}{view.of}",
            about=f"{noun}s{view.of} are {words}",
            fix=FIX.format(noun=noun),
            bits=bits + 2.0 * bool(view.name),
            predict=view.predict(move),
        )


def in_short(sources: Any, noun: str, words: str) -> str:
    """The words of a law for this many slices. In small numbers a law is a simpler order."""
    if sources is None or (np.asarray(sources) < 0).any() or (sources == np.arange(len(sources))).all():
        return words
    shorter = order_in_words(np.asarray(sources), noun)[0]
    return words if shorter.startswith(("permuted", "taken")) else shorter


def laws(dimension: str, inner: bool) -> Iterator[tuple[str, float, Law, Any]]:
    """Orders by a law: in words, length in bits, the source of each slice, and the slices that are unknown.

    A source of -1 is a zero.   inner: whether the array is an input, where no map can be read off
    """
    if dimension in ("T", "S"):
        yield from OF_TOKENS
    elif inner:
        yield from OF_OTHERS


def _circle(by: int) -> Law:
    return lambda n: (np.arange(n) - by) % n


def _ended(by: int) -> Law:
    """Shifted, and the slice at the end repeated."""
    return lambda n: np.clip(np.arange(n) - by, 0, n - 1)


def _emptied(by: int) -> Law:
    """Shifted, and zeros at the end."""

    def law(n: int) -> Any:
        sources = np.arange(n) - by
        return np.where((sources < 0) | (sources >= n), -1, sources)

    return law


def _without(end: int) -> Law:
    """A zero in the first or last slice."""

    def law(n: int) -> Any:
        sources = np.arange(n)
        sources[end] = -1
        return sources

    return law


def _copied(source: int, to: int) -> Law:
    """One slice in the place of another, both counted from the end."""

    def law(n: int) -> Any:
        sources = np.arange(n)
        if n < 2:
            return None
        sources[to] = n + source
        return sources

    return law


def _pairs(n: int) -> Any:
    """Neighbours exchanged; the last of an odd number stays."""
    return np.where(np.arange(n) ^ 1 < n, np.arange(n) ^ 1, np.arange(n))


def _halves(n: int) -> Any:
    return (np.arange(n) + n // 2) % n if n % 2 == 0 and n > 2 else None


def _interleaved(parts: int) -> Law:
    return lambda n: np.arange(n).reshape(parts, -1).T.reshape(-1) if n % parts == 0 and n > parts else None


def _split(parts: int) -> Law:
    return lambda n: np.arange(n).reshape(-1, parts).T.reshape(-1) if n % parts == 0 and n > parts else None


def _ends(n: int) -> Any:
    sources = np.arange(n)
    sources[[0, -1]] = sources[[-1, 0]]
    return sources


def _dropped(parts: int, part: int) -> Law:
    """Zeros in one of several equal parts."""

    def law(n: int) -> Any:
        if n % parts or n <= parts:
            return None
        return np.where(np.arange(n) // (n // parts) == part, -1, np.arange(n))

    return law


def _parts(parts: int, i: int, j: int) -> Law:
    """Two of several equal parts exchanged."""

    def law(n: int) -> Any:
        if n % parts or n <= parts:
            return None
        blocks = np.arange(n).reshape(parts, -1)
        blocks[[i, j]] = blocks[[j, i]]
        return blocks.reshape(-1)

    return law


OF_TOKENS: tuple[tuple[str, float, Law, Any], ...] = (
    ("shifted by +1", 4.0, _ended(1), [0]),
    ("shifted by -1", 4.0, _ended(-1), [-1]),
    ("shifted by +1 in a circle", 4.5, _circle(1), None),
    ("shifted by -1 in a circle", 4.5, _circle(-1), None),
    ("shifted by +2 in a circle", 5.5, _circle(2), None),
    ("shifted by -2 in a circle", 5.5, _circle(-2), None),
    ("shifted by +1, the first repeated", 5.0, _ended(1), None),
    ("shifted by -1, the last repeated", 5.0, _ended(-1), None),
    ("shifted by +1, the first zero", 5.0, _emptied(1), None),
    ("shifted by -1, the last zero", 5.0, _emptied(-1), None),
    ("in reverse order", 3.0, lambda n: np.arange(n)[::-1], None),
    ("all replaced by the first", 3.0, lambda n: np.zeros(n, int), None),
    ("all replaced by the last", 3.0, lambda n: np.full(n, n - 1), None),
    ("exchanged in pairs", 3.5, _pairs, None),
    ("with the first zero", 4.0, _without(0), None),
    ("with the last zero", 4.0, _without(-1), None),
    ("with the first and last exchanged", 4.0, _ends, None),
    ("with the last also in the place before it", 4.5, _copied(-1, -2), None),
    ("with the last but one also in the place of the last", 4.5, _copied(-2, -1), None),
)
"""Orders of tokens and cached positions."""
OF_OTHERS: tuple[tuple[str, float, Law, Any], ...] = (
    ("in reverse order", 3.0, lambda n: np.arange(n)[::-1], None),
    ("shifted by +1 in a circle", 4.0, _circle(1), None),
    ("shifted by -1 in a circle", 4.0, _circle(-1), None),
    ("shifted by +2 in a circle", 5.0, _circle(2), None),
    ("shifted by -2 in a circle", 5.0, _circle(-2), None),
    ("with their halves exchanged", 3.0, _halves, None),
    ("exchanged in pairs", 3.0, _pairs, None),
    *((f"interleaved by {parts}", 4.0, _interleaved(parts), None) for parts in (2, 4, 8)),
    *((f"split by {parts} as if interleaved", 4.0, _split(parts), None) for parts in (2, 4, 8)),
    *((f"with part {i} of {n} zeroed", 5.0, _dropped(n, i), None) for n in (2, 4) for i in range(n)),
    *((f"with parts {i} and {j} of 4 exchanged", 5.5, _parts(4, i, j), None) for i, j in combinations(range(4), 2)),
    ("all replaced by the first", 4.0, lambda n: np.zeros(n, int), None),
)
"""Orders of heads, channels, experts, slots, rows and columns of inputs, where no map can be read off."""


def zeroed_at(x: Enclosure, axis: int, zero: Any) -> Enclosure:
    """The enclosure with exact zeros in some slices along an axis. zero: booleans [n]"""
    at = np.broadcast_to(zero.reshape([-1 if i == axis else 1 for i in range(x.mid.ndim)]), x.mid.shape)
    return x.map(lambda part: np.where(at, 0.0, np.broadcast_to(part, x.mid.shape)))


# ---- transpositions


def _transposed(search: Search, view: View) -> Iterator[Fault]:
    """The hypotheses that two axes are exchanged in memory: by a reshape instead of a transposition, or the reverse."""
    for i, j in combinations(range(len(view.dims)), 2):
        for exchange in (exchanged_after, exchanged_before):

            def move(lab: Laboratory, key: Key, x: Enclosure, exchange: Any = exchange, i: int = i, j: int = j) -> Any:
                shape = x.mid.shape
                return x.map(lambda part: exchange(np.broadcast_to(part, shape), i, j))

            one, two = AXES[view.dims[i]], AXES[view.dims[j]]
            yield Fault(
                name=f"{one}s and {two}s transposed{view.of}",
                about=f"the axes of {one}s and {two}s{view.of} are exchanged in memory",
                fix="look for a reshape where a transposition belongs",
                bits=4.0 + 2.0 * bool(view.name),
                predict=view.predict(move),
            )


def exchanged_after(values: Any, i: int, j: int) -> Any:
    """The values with axes i and j exchanged, read in the old shape."""
    return np.swapaxes(values, i, j).reshape(values.shape)


def exchanged_before(values: Any, i: int, j: int) -> Any:
    """The values read in the shape with axes i and j exchanged, and then exchanged."""
    shape = list(values.shape)
    shape[i], shape[j] = shape[j], shape[i]
    return np.swapaxes(values.reshape(shape), i, j)
