# SPDX-License-Identifier: Apache-2.0
"""Arrays of enclosures, and their elementwise rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from refmoe.arithmetic.codes import Contest
from refmoe.arithmetic.formats import FLOAT32, Format, nearest, representable, ulp

OWN = 2.0**-52
"""Twice the bound on the relative error of one binary64 operation of the verifier itself."""

SLACK = 1 + 2.0**-45
"""A factor that covers the error of computing a radius: up to 100 binary64 operations on numbers from zero up."""

UNDERFLOW = 2.0**-1022
"""The error of an operation below the smallest normal binary64, which relative bounds do not cover. It is added to
radius and variance, and is negligible for values from 10^-150 up."""

FAR = 32.0
"""The least distance of a divisor from zero, in standard deviations, for which a spread is computed."""

PIECE = 1 << 14
"""Elements of a long array that are computed together: their temporary arrays stay in the second-level cache."""

quiet = np.errstate(all="ignore")
"""Infinities and NaN are legal here. They become an infinite radius, not a warning."""


@dataclass(frozen=True)
class Choices:
    """Several results of which an engine has one, the same for a whole row. Arrays have the shape of the enclosure."""

    row: Any
    """Integers: the number of the row that an element belongs to; below 0 where there is one result only."""
    mids: tuple[Any, ...]
    """The midpoints of the other results."""
    radius: Any
    """Of each result by itself."""
    contests: Mapping[int, Contest] = field(default_factory=dict)
    """The contestable codes of a row, by the row's number. Its results are in the order of their choices."""

    def map(self, move: Callable[[Any], Any]) -> Choices:
        """The choices with `move` applied to every array."""
        return replace(self, row=move(self.row), mids=tuple(map(move, self.mids)), radius=move(self.radius))


class Partial(NamedTuple):
    """A variance of which a part is known, and the rest costs a matrix product and is rarely needed."""

    known: Any
    whole: Callable[[], Any]
    """Makes the variance, which is nowhere smaller than the known part."""


class Most(NamedTuple):
    """Upper bounds for all elements of an enclosure. NaN if one is not known."""

    size: float
    """Of the magnitude of the midpoint."""
    radius: float
    least_variance: float
    """Of the part of the variance that is known."""


class Enclosure:
    """An array of intervals mid +- radius, with a variance. None stands for zeros everywhere.

    radius: of the shape of mid, infinite where nothing bounds the value
    owed: whether the operation that made it still rounds its result to the accumulation dtype. That rounding is added
    when the value is used, because a value that is stored in that dtype is rounded only once.
    bias: the distance that a truncating accumulator can shift the value in one direction. It is part of the radius.
    It is an array, or a function that makes it on demand, because it costs a matrix product and is rarely needed.
    variance: an array, or a `Partial`
    length: of the pair that the element belongs to, if an engine may hold the pair turned by an angle that is not
    known. The radius then bounds the length of the pair's error, in whatever direction. None: an element by itself.
    """

    _variance: Any
    """The known part."""
    _whole: Any
    """The variance, or a function that makes it; None where all is known."""

    most: Most | None = None
    """Set where bounds come with the values, so that nobody has to look for them."""
    held: Format | None = None
    """A dtype that has all midpoints, where one is known: they are values that an engine stored."""

    __array_ufunc__ = None  # so that an ndarray on the left leaves the operation to this class

    def __init__(
        self,
        mid: Any,
        radius: Any = None,
        variance: Any = None,
        *,
        accumulation: Format = FLOAT32,
        owed: bool = False,
        bias: Any = None,
        length: Any = None,
        choices: Choices | None = None,
    ) -> None:
        self.mid = np.asarray(mid, np.float64)
        self.radius = radius
        self.variance = variance
        self.accumulation = accumulation
        self.owed = owed
        self._bias = bias
        self.length = length
        self.choices = choices

    @property
    def biased(self) -> bool:
        """Whether the enclosure has a bias."""
        return self._bias is not None

    @property
    def bias(self) -> Any:
        """The bias, or None."""
        bias = self._bias  # read once, because another thread may replace it
        if callable(bias):
            bias = self._bias = bias()
        return bias

    @property
    def variance(self) -> Any:
        """The whole variance, or None."""
        whole = self._whole
        if callable(whole):
            whole = self._whole = whole()
        return self._variance if whole is None else whole

    @variance.setter
    def variance(self, variance: Any) -> None:
        self._variance, self._whole = variance if isinstance(variance, Partial) else (variance, None)

    @property
    def least_variance(self) -> Any:
        """The variance without the part that is computed on demand, or None. It stays what it is."""
        return self._variance

    @property
    def defers(self) -> bool:
        """Whether a part of the spread, or a bias, is computed on demand."""
        return self._whole is not None or self.biased

    def known(self, variance: Any = None) -> Enclosure:
        """The enclosure with another variance, or that which is known, and nothing to be computed on demand."""
        variance = self._variance if variance is None else variance
        return Enclosure(
            self.mid, self.radius, variance, accumulation=self.accumulation, owed=self.owed, length=self.length,
            choices=self.choices,
        )  # fmt: skip

    # ---- the array interface of the spec

    @property
    def shape(self) -> tuple[int, ...]:
        return self.mid.shape

    def map(self, move: Callable[[Any], Any]) -> Enclosure:
        """The enclosure with `move` applied to every array. `move` selects, reshapes or reorders elements."""
        parts = (self.radius, self._variance, self.length)
        radius, variance, length = (None if part is None else move(part) for part in parts)
        if self._whole is not None:
            variance = Partial(variance, lambda: move(self.variance))
        moved = Enclosure(
            move(self.mid),
            radius,
            variance,
            accumulation=self.accumulation,
            owed=self.owed,
            bias=(lambda: move(self.bias)) if self.biased else None,
            length=length,
            choices=None if self.choices is None else self.choices.map(move),
        )
        moved.held = self.held
        return moved

    def fits(self, format: Format) -> bool:
        """Whether the format has all midpoints."""
        return (self.held is not None and format.holds(self.held)) or bool(representable(self.mid, format).all())

    def __getitem__(self, index: Any) -> Enclosure:
        return self.map(lambda part: part[index])

    def reshape(self, *shape: Any) -> Enclosure:
        return self.map(lambda part: part.reshape(*shape))

    def transpose(self, *axes: int) -> Enclosure:
        return self.map(lambda part: part.transpose(*axes))

    # ---- arithmetic

    @property
    def r(self) -> Any:
        """The radius, as a number or an array."""
        return 0.0 if self.radius is None else self.radius

    @property
    def v(self) -> Any:
        """The variance, as a number or an array."""
        return 0.0 if self.variance is None else self.variance

    @property
    def size(self) -> Any:
        """The largest magnitude of the exact value, in whatever direction its pair is turned."""
        return np.abs(self.mid) if self.length is None else self.length

    @quiet
    def settle(self) -> Enclosure:
        """The enclosure with its owed rounding, and with its bias counted as spread."""
        if not self.owed and not self.biased:
            return self
        x = self.known(self.v + self.bias**2 / 3) if self.biased else self
        if not x.owed:
            return x
        u, tiny = x.accumulation.u, x.accumulation.tiny
        size = x.size
        reach = size + x.r
        lost = tiny if x.length is None else 2 * tiny  # two elements of a pair lose root 2 as much as one
        radius = unbounded_beyond(reach, (x.r + (u * reach + lost)) * SLACK, x.accumulation)
        # below tiny the spacing no longer shrinks: half a spacing is u tiny
        rounding = (u * (size + tiny)) ** 2 / 3 + UNDERFLOW
        return x._after(lambda v: bounded(v + rounding), x.mid, radius, length=x.length)

    def _after(self, variance: Callable[[Any], Any], mid: Any, radius: Any, **more: Any) -> Enclosure:
        """The result of an operation on this enclosure alone.

        variance: the rising function from this variance to that of the result
        """
        found = variance(0.0 if self._variance is None else self._variance)
        if self._whole is not None:
            found = Partial(found, lambda: variance(self.v))
        return Enclosure(mid, radius, found, accumulation=self.accumulation, **more)

    def _constant(self, value: Any, inverted: bool) -> Enclosure:
        """A number of the formula, such as eps or 1 / sqrt(d). An engine holds it, or its inverse, in its own dtype."""
        number, format = float(value), self.accumulation
        roundings = int(not representable(number, format)) + (inverted and math.frexp(number)[0] != 0.5)
        if not roundings:
            return Enclosure(number, accumulation=format)
        radius = (roundings * format.u * (1 + format.u) + OWN) * abs(number)
        return Enclosure(number, np.asarray(radius), np.asarray(radius**2 / 3), accumulation=format)

    def _with(self, other: Any, inverted: bool = False) -> tuple[Enclosure, Enclosure]:
        """Both operands, settled. An array that is no enclosure is a parameter, held exactly."""
        if isinstance(other, Enclosure):
            return self.settle(), other.settle()
        if np.ndim(other) == 0:
            return self.settle(), self._constant(other, inverted)
        return self.settle(), Enclosure(other, accumulation=self.accumulation)

    def _owing(self, mid: Any, radius: Any, variance: Any, length: Any = None) -> Enclosure:
        radius, variance = bounded(radius * SLACK), bounded(variance + np.zeros(mid.shape))
        return Enclosure(mid, radius, variance, accumulation=self.accumulation, owed=True, length=length)

    @quiet
    def __add__(self, other: Any) -> Enclosure:
        a, b = self._with(other)
        mid = a.mid + b.mid
        # the exact rounding error of this sum (Knuth 1998, theorem 4.2.2 B): if it is zero, so is the radius
        part = mid - a.mid
        own = np.abs((a.mid - (mid - part)) + (b.mid - part))
        radius = own + (a.r + b.r)
        # the ends of the interval are computed in binary64 too: a radius below its spacing would be lost
        return self._owing(mid, radius + (radius > 0) * OWN * np.abs(mid), a.v + b.v)

    __radd__ = __add__

    def __neg__(self) -> Enclosure:
        return Enclosure(
            -self.mid,
            self.radius,
            self.variance,
            accumulation=self.accumulation,
            owed=self.owed,
            bias=self._bias,
        )

    def __sub__(self, other: Any) -> Enclosure:
        result: Enclosure = self + -other
        return result

    def __rsub__(self, other: Any) -> Enclosure:
        result: Enclosure = -self + other
        return result

    @quiet
    def __mul__(self, other: Any) -> Enclosure:
        square = other is self
        if isinstance(other, Enclosure) and not square and self.mid.size > PIECE and self.shape == other.shape:
            return in_pieces(lambda one, two: one * two, self, other)
        a, b = self._with(other)
        mid = a.mid * b.mid
        own = OWN * np.abs(mid) + UNDERFLOW
        if a.radius is None and b.radius is None:
            return self._owing(mid, own, 0.0)
        if square:  # both factors have the same error
            size = np.abs(a.mid)
            return self._owing(mid, (2 * size + a.r) * a.r + own, 4 * mid * a.v + 2 * a.v**2)
        radius, variance = own, 0.0
        for one, two in ((a, b), (b, a)):
            if two.radius is not None:
                radius = radius + (np.abs(one.mid) + (one.r if one is a else 0.0)) * two.r
                variance = variance + (one.mid**2 + (one.v if one is a else 0.0)) * two.v
        return self._owing(mid, radius, variance)

    __rmul__ = __mul__

    @quiet
    def __truediv__(self, other: Any) -> Enclosure:
        a, b = self._with(other, inverted=True)
        mid = a.mid / b.mid
        # one divisor for all elements leaves a pair what it is
        length = None if a.length is None or b.mid.ndim else a.length / np.abs(b.mid)
        size = np.abs(mid) if length is None else length
        if b.radius is None:
            radius = bounded((a.r / np.abs(b.mid) + OWN * size + UNDERFLOW) * SLACK)

            def spread(v: Any) -> Any:
                return bounded(v / b.mid**2 + np.zeros(mid.shape))

            return a._after(spread, mid, radius, owed=True, length=length)
        room = np.abs(b.mid) - b.r
        # b.r is divided before it is multiplied: size * b.r may lose its digits below the smallest normal value
        radius = np.where(room > 0, a.r / room + size * (b.r / room), np.inf) + OWN * size + UNDERFLOW
        # the spread is of first order, which holds only for a divisor far from zero
        variance = np.where(FAR**2 * b.v < b.mid**2, (a.v + size**2 * b.v) / b.mid**2, np.inf)
        return self._owing(mid, radius, variance, length)

    @quiet
    def cut(self, format: Format, any_scale: bool = False) -> Enclosure:
        """The enclosure after a rounding to the format, or without one.

        any_scale: whether the value may be rounded before it is divided by a number from 1 up, as the exponentials of
        flash attention are. Zero stays zero.
        """
        if self.radius is None and not self.owed and not any_scale and self.fits(format):
            kept = Enclosure(self.mid, accumulation=self.accumulation)
            kept.held = self.held or format
            return kept
        once = self.owed and not self.biased and format == self.accumulation
        x = self if once else self.settle()
        size = x.size
        reach = size + x.r
        if x.length is not None:
            half = _pair_rounding(reach, format)
            spread = ulp(size, format) ** 2 / 12 + UNDERFLOW
        elif any_scale:
            known = reach == 0
            half = np.where(known, 0.0, format.u * (reach + format.tiny))
            spread = np.where(known, 0.0, (format.u * (size + format.tiny)) ** 2 / 3)
        else:
            half = ulp(reach, format) / 2 + UNDERFLOW
            spread = ulp(size, format) ** 2 / 12 + UNDERFLOW
        radius = unbounded_beyond(reach, (x.r + half) * SLACK, format)
        return x._after(lambda v: v + spread, x.mid, radius, length=x.length)


def _pair_rounding(reach: Any, format: Format) -> Any:
    """The largest length of the rounding error of a pair of elements, however it is turned. reach: its largest length

    Neither element errs by more than half a spacing at `reach`, nor by more than u of itself if it is normal.
    """
    return np.minimum(ulp(reach, format) / math.sqrt(2), format.u * (reach + 2 * format.tiny)) * SLACK + UNDERFLOW


def overflow(format: Format) -> float:
    """The smallest real number that rounds to infinity."""
    return (2 - format.u) * 2.0**format.exponent_max


def unbounded_beyond(reach: Any, radius: Any, format: Format) -> Any:
    """The radius, made infinite where the format may not hold the value."""
    limit = overflow(format)
    if np.maximum.reduce(reach, axis=None, initial=0.0) < limit:
        return radius
    return np.where(reach < limit, radius, np.inf)


def bounded(x: Any) -> Any:
    """The radius or variance with infinity in place of NaN."""
    # the largest of some numbers is NaN if one of them is, and no array is made to see it
    return np.where(np.isnan(x), np.inf, x) if math.isnan(np.maximum.reduce(x, axis=None, initial=0.0)) else x


def stored(values: Any, format: Format, accumulation: Format) -> Enclosure:
    """Parameters as an engine holds them: rounded to nearest once, and then known exactly."""
    return Enclosure(nearest(np.asarray(values, np.float64), format), accumulation=accumulation)


def concatenate(parts: Any, axis: int, order: Any = None) -> Enclosure:
    """Enclosures joined along an axis.

    order: integers, the place to which each row of the joined parts goes, for the first axis; None: they stay in order
    """
    if len({part.owed for part in parts}) > 1:
        parts = [part.settle() for part in parts]

    def along(fields: Any) -> Any:
        if order is None:
            return np.concatenate(fields, axis=axis)
        result, start = np.empty((len(order), *fields[0].shape[1:])), 0
        for each in fields:
            result[order[start : start + len(each)]] = each
            start += len(each)
        return result

    def join(name: str) -> Any:
        fields = [getattr(part, name) for part in parts]
        if all(field is None for field in fields):
            return None
        return along(
            [np.zeros(part.shape) if field is None else field for part, field in zip(parts, fields, strict=True)]
        )

    choices = _joined_choices(parts, axis)
    if choices is not None and order is not None:
        back = np.argsort(order)
        choices = choices.map(lambda part: part[back])
    mid = along([part.mid for part in parts])
    first = parts[0]
    bias = (lambda: join("bias")) if any(part.biased for part in parts) else None
    variance = join("least_variance")
    if any(part._whole is not None for part in parts):
        variance = Partial(variance, lambda: join("variance"))
    return Enclosure(
        mid,
        join("radius"),
        variance,
        accumulation=first.accumulation,
        owed=first.owed,
        bias=bias,
        length=join("length") if all(part.length is not None for part in parts) else None,
        choices=choices,
    )


def in_pieces(function: Callable[..., Enclosure], *arrays: Enclosure) -> Enclosure:
    """`function` of arrays of one shape, which treats each element by itself. Long arrays go piece by piece."""
    shape, size = arrays[0].shape, arrays[0].mid.size
    if size <= PIECE:
        return function(*arrays)
    flat = [each.reshape(-1) for each in arrays]
    places = [slice(start, start + PIECE) for start in range(0, size, PIECE)]
    made = joined((function(*(each[place] for each in flat)) for place in places), [(place,) for place in places], size)
    return made.reshape(shape)


def joined(parts: Iterable[Enclosure], places: Sequence[Any], *shape: int) -> Enclosure:
    """The enclosure of this shape whose parts are the results of one operation. Each is copied as it comes.

    So no part is read from memory again, as `concatenate` does when it has all of them.
    parts: without choices   places: the index of each part; together they cover the whole
    """
    found: dict[str, Any] = {}
    deferring: list[tuple[Any, Enclosure]] = []
    for i, (place, part) in enumerate(zip(places, parts, strict=True)):
        arrays = {"mid": part.mid, "radius": part.radius, "variance": part.least_variance, "length": part.length}
        for name, array in arrays.items():
            if array is not None and name not in found:
                found[name] = np.zeros(shape) if i else np.empty(shape)
            if name in found:
                found[name][place] = 0.0 if array is None else array
        if part.defers:
            deferring.append((place, part))

    def filled(known: Any, name: str) -> Any:
        made = np.zeros(shape) if known is None else known.copy()
        for place, part in deferring:
            array = getattr(part, name)
            made[place] = 0.0 if array is None else array
        return made

    known = found.get("variance")
    defers = any(part._whole is not None for _, part in deferring)
    return Enclosure(
        found["mid"],
        found.get("radius"),
        Partial(known, lambda: filled(known, "variance")) if defers else known,
        accumulation=part.accumulation,
        owed=part.owed,
        bias=(lambda: filled(None, "bias")) if any(part.biased for _, part in deferring) else None,
        length=found.get("length"),
    )


def _joined_choices(parts: Any, axis: int) -> Choices | None:
    """The choices of several enclosures. One without another choice has its own midpoint in its place."""
    if all(part.choices is None for part in parts):
        return None
    most = max(len(part.choices.mids) for part in parts if part.choices is not None)
    rows, mids, radius = [], [], []
    contests: dict[int, Contest] = {}
    for part in parts:
        own = part.choices or Choices(row=np.full(part.shape, -1), mids=(), radius=np.zeros(part.shape) + part.r)
        rows.append(own.row)
        mids.append([*own.mids, *[part.mid] * (most - len(own.mids))])
        radius.append(own.radius)
        contests |= own.contests
    others = tuple(np.concatenate(each, axis) for each in zip(*mids, strict=True))
    rows, radius = np.concatenate(rows, axis), np.concatenate(radius, axis)
    return Choices(row=rows, mids=others, radius=radius, contests=contests)
