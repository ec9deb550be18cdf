# SPDX-License-Identifier: Apache-2.0
"""The floating-point formats that a subject may use: the errors of rounding and underflow, and neighbouring numbers.

`unit` and `underflow` are no tolerances: they follow from the format.
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
    """The largest error near zero. Engines may flush numbers below the smallest normal one to zero, except in float16,
    where the error is half the smallest subnormal number."""

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


def rounded(values: Any, form: Format) -> Floats:
    """The nearest numbers of a format, as float64."""
    with np.errstate(all="ignore"):
        return np.asarray(values, dtype=np.float64).astype(form.dtype).astype(np.float64)


def neighbour(values: Any, steps: Any, form: Format) -> Floats:
    """The finite numbers of a format `steps` places above the values (below, for negative steps), as float64."""
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
