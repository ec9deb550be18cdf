# SPDX-License-Identifier: Apache-2.0
"""Products of codes with quantised matrices, for every order in which the parts of a sum can be added.

A term of the sum is code times code times two scales, or the offset of a group times the sum of its codes. Let S be the
sum of their magnitudes. Sums of codes are integers, and exact. On its way into the result a term takes part in at most
`depth` roundings of float32: one for each run of terms in its lane, and those of scales and of the last sum over lanes.
So every legal result is within ((1 + u)^depth - 1) S of the exact product, in whatever order the terms are added.

Where the codes are not known, a value in a row differs from its code times its scale by half a step at most. The sum of
these errors is then part of the radius.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refmoe.arithmetic.codes import (
    FIXED,
    FREE_CODES,
    SMALL,
    STORED,
    TOWARD_ZERO,
    Codes,
    Contest,
    Factors,
    InputFormat,
    quantise,
)
from refmoe.arithmetic.enclosure.array import (
    OWN,
    SLACK,
    UNDERFLOW,
    Choices,
    Enclosure,
    bounded,
    quiet,
    unbounded_beyond,
)
from refmoe.arithmetic.enclosure.matrices import between, from_zero_up, product_and_path
from refmoe.arithmetic.formats import FLOAT32, nearest, representable

LOST = 2.0**-135
"""The most that a term loses below the smallest normal float32: a scale errs by 2^-150, times a sum of 4096 codes."""
STEP_ERROR = 2.0**-14
"""The error of a value over its scale, before it is rounded to a code, in steps: below 2^-14 for values up to 128."""


@dataclass(frozen=True)
class Left:
    """The left factor of a product: rows of codes times scales, and the sums of their groups. Binary64."""

    values: Any
    """[t, n]"""
    sums: Any
    """[t, groups]; None where the matrix has no offsets."""
    radius: Any = None
    """The most by which an engine's values may differ, [t, n]; None: they are known."""
    sums_radius: Any = None
    """The most by which the sums may differ, [t, groups]."""
    owners: Any = None
    """Integers [t]: the row that each row is a choice of, in order; None: each row is a row of its own."""
    rows: int = 0
    """The rows without other choices: rows 0 to `rows` - 1 come first, and their other choices after them."""
    contests: tuple[Contest, ...] = ()
    """The contestable codes of each row that has other choices, in the order of rows."""


# ---- the left factor


@quiet
def left_factor(x: Enclosure, how: InputFormat, groups: int) -> Left:
    """The input [t, n] of a product as an engine makes codes of it.   groups: of offsets in a row; 0: no offsets

    If the input is known, its codes are, but for contestable ones. Each choice of these is a row of its own, but in a
    row with many of them each may be either.
    """
    if x.radius is not None or not representable(x.mid, FLOAT32).all():
        return _unknown(x, how, groups)
    codes = quantise(x.mid, how)
    doubt = codes.contestable()
    many = doubt.sum(-1) > FREE_CODES
    parts, owners, contests = [codes], [*range(len(x.mid))], list[Contest]()
    for row in map(int, np.flatnonzero(doubt.any(-1) & ~many)):
        columns = np.flatnonzero(doubt[row])
        others = codes.alternatives(row, columns)
        contests.append(codes.contest(row, columns, others))
        parts += others
        owners += [row] * len(others)
    values = np.concatenate([part.values for part in parts])
    sums = np.concatenate([part.sums(groups) for part in parts]) if groups else None
    left = Left(values=values, sums=sums, owners=np.asarray(owners), rows=len(x.mid), contests=tuple(contests))
    either = many & ~codes.unknown
    loose = codes.unknown
    if groups and how.sums is not None:  # a stored sum is rounded, so it does not follow from the ends of the codes
        either, loose = np.zeros_like(either), loose | many
    if either.any():
        left = _loosened(left, _either(codes, groups), np.flatnonzero(either))
    return _loosened(left, _unknown(x, how, groups), np.flatnonzero(loose)) if loose.any() else left


def _loosened(left: Left, rough: Left, rows: Any) -> Left:
    """`left` with some of its rows from `rough`, which has no other choices.   rows: integers"""

    def joined(exact: Any, wide: Any) -> Any:
        if wide is None:
            return None
        made = np.zeros((len(left.values), wide.shape[1])) if exact is None else exact
        made[rows] = wide[rows]
        return made

    parts = ("values", "sums", "radius", "sums_radius")
    return replace(left, **{part: joined(getattr(left, part), getattr(rough, part)) for part in parts})


def _either(codes: Codes, groups: int) -> Left:
    """Rows in which each contestable code may be either of two, whatever the others are. All other codes are known."""
    low, high = codes.ends()
    mid, radius = low / 2 + high / 2, (high - low) / 2
    if not groups:
        return Left(values=mid, sums=None, radius=radius, rows=len(mid))
    sums, off = (part.reshape(len(mid), groups, -1).sum(-1) for part in (mid, radius))
    return Left(values=mid, sums=sums, radius=radius, sums_radius=off * SLACK, rows=len(mid))


def _unknown(x: Enclosure, how: InputFormat, groups: int) -> Left:
    """Rows whose codes are not known: the input itself, with half a step of the code and the error of the scale."""
    x = x.settle()
    rows = len(x.mid)
    most = x.size + _error(x)
    radius = _rough(x, how)
    if not groups:
        return Left(values=x.mid, sums=None, radius=radius, rows=rows)
    sums, off = (part.reshape(rows, groups, -1).sum(-1) for part in (x.mid, radius))
    if how.sums is not None:
        stored, size = _stored(how), (most + radius).reshape(rows, groups, -1).sum(-1)
        off = unbounded_beyond(size, off + (stored + how.sums.u) * size + how.sums.u * how.sums.tiny, how.sums)
    return Left(values=x.mid, sums=sums, radius=radius, sums_radius=off * SLACK, rows=rows)


def _error(x: Enclosure) -> Any:
    """The most by which a float32 that an engine makes a code of may differ from the middle of its enclosure."""
    return x.r + (0.0 if representable(x.mid, FLOAT32).all() else FLOAT32.u * x.size + FLOAT32.tiny)


def _stored(how: InputFormat) -> float:
    """The relative error of a stored scale."""
    return how.scale.u + FLOAT32.u * 4


def _rough(x: Enclosure, how: InputFormat) -> Any:
    """The most by which scale times code may differ from the middle of its enclosure [t, n], whatever the codes are."""
    rows, width, kind = len(x.mid), how.block or x.shape[1], how.limits
    error = _error(x)
    most = x.size + error
    if how.maximum == FIXED:
        step = np.ones(x.shape)
    else:
        step = np.repeat(most.reshape(rows, -1, width).max(-1), width, axis=1) / how.most
    stored, lost = _stored(how), how.scale.u * how.scale.tiny
    scaled = step * (1 + stored) + lost
    if kind.format is None:
        half = scaled * (max(0.5, how.most - kind.high) + STEP_ERROR)
    else:
        half = (kind.format.u + 4 * FLOAT32.u) * most + scaled * kind.format.u * kind.format.tiny
    if how.rounding == TOWARD_ZERO:
        half = 2 * half
    if how.maximum == FIXED:
        half = half + np.maximum(most - kind.high, 0)
    radius = error + stored * (most + scaled) + lost * kind.high + half
    return unbounded_beyond(scaled, radius * SLACK, how.scale)


@quiet
def in_codes(x: Enclosure, how: InputFormat) -> Enclosure:
    """x [.., n] as an engine keeps it that stores codes and scales. A contestable code may be either of two."""
    x = x.settle()
    flat = x.reshape(-1, x.shape[-1])
    wide = _rough(flat, how)
    if x.length is not None:
        radius = bounded(wide * math.sqrt(2) * SLACK)  # of two elements of a pair, each may err by as much
        variance = bounded(flat.v + radius**2 / 3)
        made = Enclosure(flat.mid, radius, variance, accumulation=x.accumulation, length=flat.length)
        return made.reshape(x.shape)
    if x.radius is None and representable(x.mid, FLOAT32).all():
        codes = quantise(flat.mid, how)
        low, high = codes.ends()
        known = np.broadcast_to(~codes.unknown[:, None], flat.shape)
    else:
        low, high, known = _ends(flat, how)
    mid, radius = np.where(known, low / 2 + high / 2, flat.mid), np.where(known, (high - low) / 2, wide)
    variance = np.where(known, radius**2, flat.v + radius**2 / 3)  # an engine has one of the ends
    return Enclosure(mid, bounded(radius), bounded(variance), accumulation=x.accumulation).reshape(x.shape)


def _ends(x: Enclosure, how: InputFormat) -> tuple[Any, Any, Any]:
    """The least and the largest of scale times code, and where they hold, for values within their radii: [t, n] each.

    They hold where codes are integers, and the value that decides the scale has one sign. Codes and scales go up with a
    value and down with the maximum, or the other way round, so that the ends of intervals decide.
    """
    shape, kind, width = x.shape, how.limits, how.block or x.shape[1]
    mid, error = (part.reshape(len(x.mid), -1, width) for part in (x.mid, _error(x) + np.zeros(shape)))
    least, most = (np.max(np.abs(mid) + each, axis=-1, keepdims=True) for each in (-error, error))
    known = (least >= SMALL) & (kind.format is None)
    sign = np.ones(most.shape)
    if how.maximum == "signed":
        sign = -np.sign(np.take_along_axis(mid, np.abs(mid).argmax(-1)[..., None], -1))
        largest = np.abs(mid) + error >= least
        known &= (~largest | (-sign * mid > error)).all(-1, keepdims=True)
    tops = [np.full(most.shape, how.most)] * 2 if how.maximum == FIXED else [least, most]
    wider = (1 - 4 * FLOAT32.u, 1 + 4 * FLOAT32.u)
    scales = [nearest(top / how.most * by, how.scale) for top, by in zip(tops, wider, strict=True)]
    known &= (scales[0] > 0) & np.isfinite(scales[1])
    steps = scales if how.codes == STORED else [top / how.most for top in tops]
    ideal = [sign * end / step for end in (mid - error, mid + error) for step in steps]
    low, high = np.minimum.reduce(ideal), np.maximum.reduce(ideal)
    off, half = (how.contest + 4) * FLOAT32.u, 0.0 if how.rounding == TOWARD_ZERO else 0.5
    low, high = low - off * np.maximum(np.abs(low), 1), high + off * np.maximum(np.abs(high), 1)
    # toward zero, a code is less than one step from its value, on the side of zero
    low = np.ceil(low - half) if half else np.trunc(low)
    high = np.floor(high + half) if half else np.trunc(high)
    corners = [sign * code.clip(kind.low, kind.high) * scale for code in (low, high) for scale in scales]
    ends = np.minimum.reduce(corners).reshape(shape), np.maximum.reduce(corners).reshape(shape)
    return *ends, np.broadcast_to(known, mid.shape).reshape(shape)


# ---- the product


@quiet
def coded_product(left: Left, right: Factors, depth: int) -> Enclosure:
    """The enclosure of rows of codes times the transpose of a quantised matrix: one row for each row of `left`, [t, m].

    depth: the most roundings of a term
    """
    terms = right.terms.T.astype(np.float64)
    n, size = terms.shape[0], np.abs(left.values)
    magnitudes = np.abs(terms)
    added = magnitudes if right.sizes is None else right.sizes.T.astype(np.float64)
    mid, path = product_and_path(left.values, terms)
    total, energy = size @ added, left.values**2 @ terms**2
    inherited: Any = 0.0
    if left.radius is not None:
        inherited = from_zero_up(left.radius, magnitudes)
        total = total + from_zero_up(left.radius, added)
    if right.offsets is not None:
        offsets = right.offsets.T.astype(np.float64)
        shifts, rest = product_and_path(left.sums, offsets)
        mid, path = mid + shifts, path + rest
        total, energy = total + np.abs(left.sums) @ np.abs(offsets), energy + left.sums**2 @ offsets**2
        if left.sums_radius is not None:
            more = from_zero_up(left.sums_radius, np.abs(offsets))
            inherited, total = inherited + more, total + more
    count = n + (0 if right.offsets is None else right.offsets.shape[1])
    growth = math.expm1(depth * FLOAT32.u)
    own = (count + 2) * OWN * total
    radius = (inherited + growth * total + count * LOST + own) * (SLACK + count * OWN)
    radius = unbounded_beyond(total * (1 + growth), radius, FLOAT32)
    spread = np.maximum(count / 3 * mid**2 + count / 2 * energy, path + between(n) / 2 * energy) + energy
    variance = FLOAT32.u**2 / 3 * spread + inherited**2 / 3 + (count * LOST) ** 2 + UNDERFLOW
    return Enclosure(mid, bounded(np.where(np.isfinite(mid), radius, np.inf)), bounded(variance))


def with_choices(made: Enclosure, left: Left, names: Iterable[int]) -> Enclosure:
    """The product's rows [t, m] from those of all choices, each row with the other choices that it has.

    names: a number for each row that has choices, in the order of rows
    """
    rows = left.rows
    if len(made.mid) == rows:
        return made
    owners, numbers = left.owners[rows:], [*names]
    row = np.full((rows, 1), -1)
    row[np.unique(owners), 0] = numbers
    most = int(np.bincount(owners).max())
    mids = [made.mid[:rows].copy() for _ in range(most)]
    radius, variance = made.radius[:rows], made.variance[:rows]
    hull = radius.copy()
    for owner in np.unique(owners):
        for number, at in enumerate(rows + np.flatnonzero(owners == owner)):
            mids[number][owner] = made.mid[at]
            np.maximum(radius[owner], made.radius[at], out=radius[owner])
        distance = np.max([np.abs(mid[owner] - made.mid[owner]) for mid in mids], axis=0)
        hull[owner] = (radius[owner] + distance) * SLACK
    contests = dict(zip(numbers, left.contests, strict=True))
    choices = Choices(row=np.broadcast_to(row, hull.shape), mids=tuple(mids), radius=radius, contests=contests)
    far = hull - radius
    return Enclosure(
        made.mid[:rows], hull, variance + far**2 / 3, accumulation=made.accumulation, choices=choices,
    )  # fmt: skip


def contested_rows(left: Left) -> list[int]:
    """The rows that have several choices, in order."""
    return [] if left.owners is None else np.unique(left.owners[left.rows :]).tolist()


def candidates(x: Enclosure) -> Iterator[tuple[int, Any, list[Any]]]:
    """Of each row with choices its number, which elements belong to it, and the midpoints of each choice there."""
    choices = x.choices
    if choices is None:
        return
    for number in np.unique(choices.row):
        if number >= 0:
            at = choices.row == number
            yield int(number), at, [x.mid[at], *(mid[at] for mid in choices.mids)]
