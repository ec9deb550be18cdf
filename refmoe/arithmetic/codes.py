# SPDX-License-Identifier: Apache-2.0
"""Codes of the input of a product or of a cache, as quantised engines make them, and the parts of quantised weights.

An engine cuts a row into blocks, and gives each block a scale and each value a code: an integer, or a float of eight
bits. Then it multiplies the codes of the row by those of the weights. The rule is public, so the codes follow from the
input. Only a value next to the boundary between two codes may have either: its code is contestable.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product as combinations
from typing import Any

import numpy as np

from refmoe.arithmetic.formats import FLOAT32, Format, nearest, ulp

FREE_CODES = 4
"""The most contestable codes of a row that are tried in every combination. Of more, each may be either of two."""
SMALL = 2.0**-100
"""A block whose largest magnitude is below has codes that depend on how an engine underflows."""

FIXED, STORED = "none", "reciprocal of the stored scale"
MAXIMA = ("absolute", "signed", FIXED)
CODES = (
    "reciprocal of the maximum", "reciprocal of the scale", STORED, "quotient by the scale",
)  # fmt: skip
TOWARD_ZERO = "toward zero"
ROUNDINGS = ("half-even", "half-away", "half-up", TOWARD_ZERO)
E4M3 = Format("e4m3", precision=4, exponent_min=-6, exponent_max=8)
E5M2 = Format("e5m2", precision=3, exponent_min=-14, exponent_max=15)


@dataclass(frozen=True)
class Kind:
    """The codes that there are."""

    low: float
    high: float
    """The least and the largest code."""
    format: Format | None = None
    """The format of codes that are floats; None: they are integers."""

    def spacing(self, size: Any) -> Any:
        """The distance of two codes at these magnitudes."""
        return 1.0 if self.format is None else ulp(size, self.format)


KINDS = {
    "int8": Kind(low=-128, high=127), "int4": Kind(low=-8, high=7), "e4m3": Kind(low=-448, high=448, format=E4M3),
    "e5m2": Kind(low=-E5M2.largest, high=E5M2.largest, format=E5M2),
}  # fmt: skip
"""The codes that a format may have. E4M3 keeps the place of 480 for NaN."""


@dataclass(frozen=True)
class InputFormat:
    """How an engine turns the input of a product into codes."""

    name: str
    about: str
    source: str
    block: int
    """The values that share a scale, a power of two; 0: the whole row."""
    kind: str
    """One of `KINDS`: integers or floats, and of how many bits."""
    most: float
    """The code of the largest magnitude, before it is rounded; it may lie between two codes."""
    maximum: str
    """Whether the scale is that of the largest magnitude, or has the sign of that value, whose code is then negative.

    ``none``: the scale is 1.
    """
    codes: str
    """The factor of a value: `most` over the maximum, or 1 over the scale, before it is stored or after.

    ``quotient by the scale``: the value is divided by the scale as it is before it is stored.
    """
    rounding: str
    """Where a product halfway between two codes goes; `TOWARD_ZERO`: every product goes there."""
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

    @property
    def limits(self) -> Kind:
        """The codes of its kind."""
        return KINDS[self.kind]

    def depth(self, terms: int) -> int:
        """The most roundings of a term of the product on its way into the sum."""
        return -(-terms // (self.run or terms)) + self.roundings

    def quantised(self, x: Any) -> Codes:
        """The codes of rows of float32 values. A known bug has a format whose codes are others.   x: [t, n]"""
        return _codes(x, self)


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
class Contest:
    """The contestable codes of one row, and the choices that an engine has."""

    format: str
    """The name of the codes."""
    columns: tuple[int, ...]
    """Where they are in the row."""
    ideal: tuple[float, ...]
    """Of each code the real number that is rounded to it."""
    choices: tuple[tuple[float, ...], ...]
    """Of each choice a code for each column. The first choice is what the format's own rule gives."""


@dataclass(frozen=True)
class Codes:
    """Rows of codes, [t, n] and [t, blocks]. All numbers are binary64."""

    how: InputFormat
    codes: Any
    """[t, n]"""
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
        if self.how.rounding == TOWARD_ZERO:  # it has no contest
            return np.zeros(self.ideal.shape, bool)
        low, high = self._neighbours(self.ideal)
        steps = np.abs(self.ideal) / self.how.limits.spacing(self.ideal)
        near = np.abs(steps % 1 - 0.5) <= self.how.contest * FLOAT32.u * np.maximum(steps, 1)
        return near & (low != high) & ~self.unknown[:, None]

    def _neighbours(self, ideal: Any) -> tuple[Any, Any]:
        """The codes below and above real numbers."""
        kind = self.how.limits
        spacing = kind.spacing(ideal)
        low = np.floor(ideal / spacing) * spacing
        return low.clip(kind.low, kind.high), (low + spacing).clip(kind.low, kind.high)

    def ends(self) -> tuple[Any, Any]:
        """The least and the largest value, scale times code, that an engine may have: [t, n] each"""
        doubt, scales = self.contestable(), np.repeat(self.scales, self.width, axis=1)
        ends = [np.where(doubt, codes, self.codes) * scales for codes in self._neighbours(self.ideal)]
        return np.minimum(*ends), np.maximum(*ends)

    def replaced(self, row: int, columns: Any, codes: Any) -> Codes:
        """One row with other codes at some columns: [1, n]"""
        made = self.codes[row : row + 1].copy()
        made[0, columns] = codes
        one = slice(row, row + 1)
        return replace(
            self, codes=made, scales=self.scales[one], unrounded=self.unrounded[one], ideal=self.ideal[one],
            unknown=self.unknown[one],
        )  # fmt: skip

    def alternatives(self, row: int, contested: Any) -> list[Codes]:
        """The row with every other choice of its contestable codes, of those columns: each [1, n]"""
        low, high = self._neighbours(self.ideal[row, contested])
        choices = (np.where(up, high, low) for up in combinations((False, True), repeat=len(contested)))
        here = self.codes[row, contested]
        return [self.replaced(row, contested, codes) for codes in choices if not np.array_equal(codes, here)]

    def contest(self, row: int, contested: Any, others: list[Codes]) -> Contest:
        """A row's contestable codes, at those columns, in words of a report.   others: of `alternatives`"""
        rows = [self.codes[row], *(other.codes[0] for other in others)]
        return Contest(
            format=self.how.name, columns=tuple(contested.tolist()), ideal=tuple(self.ideal[row, contested].tolist()),
            choices=tuple(tuple(codes[contested].tolist()) for codes in rows),
        )  # fmt: skip


def quantise(x: Any, how: InputFormat) -> Codes:
    """The codes of rows of float32 values.   x: [t, n], n whole blocks"""
    return how.quantised(x)


@np.errstate(all="ignore")
def _codes(x: Any, how: InputFormat) -> Codes:
    single, width, kind = np.float32, how.block or x.shape[1], how.limits
    blocks = np.asarray(x, single).reshape(len(x), -1, width)
    at = np.abs(blocks).argmax(-1)[..., None]
    top = np.take_along_axis(blocks, at, -1)
    if how.maximum == FIXED:
        top = np.full_like(top, how.most)  # so that the scale is 1
    most = single(-how.most if how.maximum == "signed" else how.most)
    top = top if how.maximum == "signed" else np.abs(top)
    if how.codes == CODES[0]:
        factor = most / top
        scale = single(1) / factor if how.maximum == "signed" else top / most
    else:
        scale = top / most
        factor = single(1) / scale
    ideal = blocks.astype(np.float64) * (float(most) / top.astype(np.float64))
    stored = nearest(scale, how.scale)
    if how.codes == STORED:
        factor = single(1) / stored.astype(single)
        ideal = blocks.astype(np.float64) / stored
    empty = top == 0
    factor, ideal = np.where(empty, single(0), factor), np.where(empty, 0.0, ideal)
    made = (np.where(empty, single(0), blocks / scale) if how.codes == CODES[3] else blocks * factor).astype(np.float64)
    stored, scale = np.where(empty, 0.0, stored), np.where(empty, 0.0, scale.astype(np.float64))
    unknown = ~np.isfinite(stored) | (np.abs(top) < SMALL) & ~empty | ~np.isfinite(made).all(-1, keepdims=True)
    return Codes(
        how=how, codes=_rounded(made, how).clip(kind.low, kind.high).reshape(x.shape), scales=stored[..., 0],
        unrounded=scale[..., 0], ideal=ideal.reshape(x.shape), unknown=unknown[..., 0].any(-1),
    )  # fmt: skip


def _rounded(made: Any, how: InputFormat) -> Any:
    """Float32 values, as binary64, rounded to codes."""
    kind = how.limits
    if how.rounding == TOWARD_ZERO:
        spacing = kind.spacing(made)
        return np.trunc(made / spacing) * spacing
    if kind.format is not None:
        return nearest(made.clip(kind.low, kind.high), kind.format)
    if how.rounding == "half-even":
        return np.rint(made)
    if how.rounding == "half-away":
        return np.trunc(made + np.copysign(0.5, made))
    return np.floor((made + (0.5 - kind.low)).astype(np.float32)) + kind.low  # the sum is one of float32
