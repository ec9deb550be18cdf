# SPDX-License-Identifier: Apache-2.0
"""Integer codes of the input of a product, as engines with quantised weights make them, and the parts of such weights.

An engine cuts a row into blocks, and gives each block a scale and each value an integer code of eight bits. Then it
multiplies the codes of the row by those of the weights. The rule is public, so the codes follow from the input. Only a
value next to the boundary between two codes may have either: its code is contestable.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product as combinations
from typing import Any

import numpy as np

from refmoe.arithmetic.formats import FLOAT32, Format, nearest

MOST = 127
"""The largest code."""
FREE_CODES = 4
"""The most contestable codes of a row that are tried in every combination. The error of others counts in full."""
SMALL = 2.0**-100
"""A block whose largest magnitude is below has codes that depend on how an engine underflows."""

MAXIMA = ("absolute", "signed")
CODES = ("reciprocal of the maximum", "reciprocal of the scale", "reciprocal of the stored scale")
ROUNDINGS = ("half-even", "half-away")


@dataclass(frozen=True)
class InputFormat:
    """How an engine turns the input of a product into codes."""

    name: str
    about: str
    source: str
    block: int
    """The values that share a scale, a power of two; 0: the whole row."""
    maximum: str
    """Whether the scale is that of the largest magnitude, or has the sign of that value, whose code is then -127."""
    codes: str
    """The factor of a value: 127 over the maximum, or 1 over the scale, before it is stored or after."""
    rounding: str
    """Where a product halfway between two codes goes."""
    scale: Format
    """The dtype of the stored scale."""
    sums: Format | None
    """The dtype of the stored sum of a block: the scale, before it is stored, times the sum of codes. None: no sum."""
    contest: int
    """The roundings of float32 by which two builds of one engine may differ before they round to a code."""
    run: int
    """The fewest terms whose sum reaches the accumulator at once, as an integer or scaled; 0: the whole row."""
    roundings: int
    """The roundings of a term beside those of the runs: of scales, and of the last sum over lanes."""

    def depth(self, terms: int) -> int:
        """The most roundings of a term of the product on its way into the sum."""
        return -(-terms // (self.run or terms)) + self.roundings


@dataclass(frozen=True)
class Factors:
    """Rows of a quantised matrix: weight = term + offset of its group, both exact."""

    terms: Any
    """Scale times code, [m, n]."""
    offsets: Any = None
    """One for each group of inputs, [m, groups]; None where the format has none."""
    sizes: Any = None
    """The magnitudes that an engine may add up in place of those of `terms`, [m, n]; None: those of `terms`."""

    @property
    def nbytes(self) -> int:
        return int(sum(part.nbytes for part in (self.terms, self.offsets, self.sizes) if part is not None))


@dataclass(frozen=True)
class Codes:
    """Rows of codes, [t, n] and [t, blocks]. All numbers are binary64."""

    how: InputFormat
    codes: Any
    """Integers [t, n]."""
    scales: Any
    """As stored, [t, blocks]; not finite where the engine's are not."""
    unrounded: Any
    """Before they are stored, [t, blocks]."""
    ideal: Any
    """The real numbers that are rounded to codes, [t, n]."""
    unknown: Any
    """Booleans [t]: rows whose codes depend on how an engine underflows or overflows."""

    @property
    def width(self) -> int:
        """The values of a block."""
        return int(self.codes.shape[1] // max(self.scales.shape[1], 1))

    @property
    def values(self) -> Any:
        """Scale times code, exact: [t, n]"""
        return self.codes * np.repeat(self.scales, self.width, axis=1)

    def sums(self, groups: int) -> Any:
        """The factors of the offsets of all groups: scale times the sum of codes, [t, groups]"""
        rows, blocks = self.scales.shape
        pieces = max(groups, blocks)  # each number is a multiple of the other one
        within = self.codes.reshape(rows, pieces, -1).sum(-1)
        scales = np.repeat(self.scales if self.how.sums is None else self.unrounded, pieces // blocks, axis=1)
        sums = within * scales
        if self.how.sums is not None:
            sums = nearest(nearest(sums, FLOAT32), self.how.sums)
        return sums.reshape(rows, groups, -1).sum(-1)

    def contestable(self) -> Any:
        """The values that an engine may round either way: booleans [t, n]"""
        size = np.abs(self.ideal)
        near = np.abs(size % 1 - 0.5) <= self.how.contest * FLOAT32.u * np.maximum(size, 1)
        return near & (size < MOST) & ~self.unknown[:, None]

    def replaced(self, row: int, columns: Any, codes: Any) -> Codes:
        """One row with other codes at some columns: [1, n]"""
        made = self.codes[row : row + 1].copy()
        made[0, columns] = codes
        one = slice(row, row + 1)
        return Codes(
            how=self.how, codes=made, scales=self.scales[one], unrounded=self.unrounded[one], ideal=self.ideal[one],
            unknown=self.unknown[one],
        )  # fmt: skip

    def alternatives(self, row: int, contested: Any) -> list[Codes]:
        """The row with every other choice of its contestable codes, of those columns: each [1, n]"""
        low = np.floor(self.ideal[row, contested])
        choices = (low + choice for choice in combinations((0.0, 1.0), repeat=len(contested)))
        here = self.codes[row, contested]
        return [self.replaced(row, contested, codes) for codes in choices if not np.array_equal(codes, here)]


@np.errstate(all="ignore")
def quantise(x: Any, how: InputFormat) -> Codes:
    """The codes of rows of float32 values.   x: [t, n], n whole blocks"""
    single, width = np.float32, how.block or x.shape[1]
    blocks = np.asarray(x, single).reshape(len(x), -1, width)
    at = np.abs(blocks).argmax(-1)[..., None]
    top = np.take_along_axis(blocks, at, -1)
    if how.maximum == "signed":
        factor = single(-MOST) / top
        scale = single(1) / factor
        ideal = blocks.astype(np.float64) * (-MOST / top.astype(np.float64))
    else:
        top = np.abs(top)
        scale = top / single(MOST)
        factor = single(MOST) / top if how.codes == CODES[0] else single(1) / scale
        ideal = blocks.astype(np.float64) * (MOST / top.astype(np.float64))
    stored = nearest(scale, how.scale)
    if how.codes == CODES[2]:
        factor = single(1) / stored.astype(single)
        ideal = blocks.astype(np.float64) / stored
    empty = top == 0
    factor, ideal = np.where(empty, single(0), factor), np.where(empty, 0.0, ideal)
    stored, scale = np.where(empty, 0.0, stored), np.where(empty, 0.0, scale.astype(np.float64))
    made = (blocks * factor).astype(np.float64)
    rounded = np.rint(made) if how.rounding == "half-even" else np.trunc(made + np.copysign(0.5, made))
    unknown = ~np.isfinite(stored) | (np.abs(top) < SMALL) & ~empty | ~np.isfinite(made).all(-1, keepdims=True)
    return Codes(
        how=how, codes=np.clip(rounded, -MOST - 1, MOST).reshape(x.shape), scales=stored[..., 0],
        unrounded=scale[..., 0], ideal=ideal.reshape(x.shape), unknown=unknown[..., 0].any(-1),
    )  # fmt: skip
