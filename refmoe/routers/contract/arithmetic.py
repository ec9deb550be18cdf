"""The floating-point formats that a router may use, as numbers: what a rounding costs, what underflows, who is next.

Nothing here is a tolerance: `unit` and `underflow` follow from the format. The error of an engine's exp does not, and
is stated data with its source, `ExpBudget`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Booleans = NDArray[np.bool_]


@dataclass(frozen=True)
class Format:
    """A binary format. One rounding to it moves a number y by at most `unit` |y| + `underflow`."""

    name: str
    dtype: np.dtype[Any]
    precision: int
    """Bits of the significand, the leading one included."""
    underflow: float
    """What is lost near zero: engines may flush to zero what lies below the smallest normal number; of float16 they
    keep the subnormals, so half the smallest one is lost."""

    @property
    def _limits(self) -> Any:
        finfo: Any = ml_dtypes.finfo
        return finfo(self.dtype)

    @property
    def unit(self) -> float:
        """Half the distance from 1 to the next number: the relative error of one rounding."""
        return 2.0**-self.precision

    @property
    def largest(self) -> float:
        return float(self._limits.max)

    @property
    def smallest_normal(self) -> float:
        return float(self._limits.smallest_normal)

    @property
    def smallest_subnormal(self) -> float:
        return float(self._limits.smallest_subnormal)


FORMATS = {
    form.name: form
    for form in (
        Format("float64", np.dtype(np.float64), 53, 2.0**-1022),
        Format("float32", np.dtype(np.float32), 24, 2.0**-126),
        Format("float16", np.dtype(np.float16), 11, 2.0**-25),
        Format("bfloat16", np.dtype(ml_dtypes.bfloat16), 8, 2.0**-126),
    )
}
REFERENCE_UNIT = 2.0**-53
"""Reference values are computed in float64, by `refmoe.arithmetic.exact.elementary`: their roundings count as well."""


@dataclass(frozen=True)
class ExpBudget:
    """An engine's exp(x) is within (constant + linear |x|) units of the arithmetic, relative. Data: a tolerance."""

    constant: float
    linear: float
    source: str


MEASURED_EXP = ExpBudget(
    8.0, 2.0, "worst relative error on [-88, 0] in units of float32: torch 1.9, NumPy 4.2, exp2(x log2 e) 0.75 |x|"
)
"""Covers these three with room; see the source. An engine with another exp declares its own budget."""


def rounded(values: Any, form: Format) -> Floats:
    """The nearest numbers of a format, as float64."""
    with np.errstate(all="ignore"):
        return np.asarray(values, dtype=np.float64).astype(form.dtype).astype(np.float64)


def neighbour(values: Any, steps: Any, form: Format) -> Floats:
    """The numbers of a format that are so many places above (below, for negative steps), as float64; finite ones."""
    integer = np.dtype(f"i{form.dtype.itemsize}")
    sign = np.int64(np.iinfo(integer).min)
    stored = (
        np.ascontiguousarray(np.asarray(values, dtype=np.float64).astype(form.dtype)).view(integer).astype(np.int64)
    )
    place = np.where(stored < 0, sign - stored, stored) + np.asarray(steps, dtype=np.int64)
    last = np.array(form.largest).astype(form.dtype).view(integer).astype(np.int64)
    place = np.clip(place, -last, last)
    bits = np.where(place < 0, sign - place, place).astype(integer)
    return np.asarray(bits.view(form.dtype).astype(np.float64))
