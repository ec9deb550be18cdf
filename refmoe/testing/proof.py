# SPDX-License-Identifier: Apache-2.0
"""A short proof that an output of few rows is legal, without its enclosure.

An enclosure takes a hundred passes over the values, and a kernel takes a few. Most honest values are much nearer to the
exact result than they must be. So a step has a `Room`: the exact output, and distances that the enclosure allows at
least. A value passes every test of the verifier if it is the rounding of a number as near as that. With fewer than
`ROWS` rows there are no tests of several values together.

The proof only ever says yes, or nothing. Without it all goes on as if it had not been tried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.formats import FLOAT32, OF_DTYPE, upcast
from refmoe.arithmetic.memory import keep_memory
from refmoe.profiles.policy import Policy
from refmoe.testing.call import EXPONENT, SPREADS, WIDE, Output, Provable, Room
from refmoe.testing.checking import PIECE
from refmoe.verifier.tally import ROWS, Limits

MOST = 1 << 18
"""The most values of an output that is proven: its arrays are copied for the figures."""
BELOW = 1 - 2.0**-20
"""A factor that keeps a value off the end of its cell, where ties are."""


def proven(output: Output, policy: Policy, significance: float) -> bool:
    """Whether a short proof shows that the check of all values passes, and that each value has a bound."""
    call, found = output.call, output.found
    if not isinstance(call, Provable) or len(found) >= ROWS or found.size > MOST or not in_float32(policy):
        return False
    if WIDE in {found.dtype, *(array.dtype for array in arrays_of(call).values())}:
        return False
    if Limits(significance, found.size, 1).excess < SPREADS:
        return False
    keep_memory()
    formats = policy.at(output.step), OF_DTYPE[found.dtype]
    last = max(each.precision for each in formats), min(each.tiny for each in formats)
    with np.errstate(all="ignore"):
        for part, values in pieces(call, found):
            room = part.room(policy)
            if room is None or not within(upcast(values, WIDE), room, *last):
                return False
    return True


def in_float32(policy: Policy) -> bool:
    """Whether sums and statistics are in float32 and nothing is kept in codes, as each `Provable` expects."""
    return policy.accumulation == policy.statistics == FLOAT32 and not policy.kept


def pieces(call: Any, found: NDArray[Any]) -> list[tuple[Any, NDArray[Any]]]:
    """The call and its output, some rows after others."""
    step = max(1, PIECE * len(found) // found.size)
    if step >= len(found):
        return [(call, found)]
    each = [slice(start, start + step) for start in range(0, len(found), step)]
    return [(call.some(at), found[at]) for at in each]


def within(y: NDArray[Any], room: Room, precision: int, tiny: float) -> bool:
    """Whether each value is a number within its room, rounded at most once.

    y: binary64 of the shape of the room
    precision, tiny: the most bits and the smallest normal value of a dtype to which a value was rounded
    NaN is within no room, and so is no infinity.

    A value beyond an end of its room is the rounding of that end if it is nearer than half the spacing there. The end
    with the narrower spacing is |exact| - slack, whatever its sign.
    """
    apart = y - room.exact
    np.abs(apart, out=apart)
    if (apart <= room.slack).all():
        return True
    half = np.abs(room.exact)
    half -= room.slack
    half.view(np.int64)[...] &= EXPONENT
    if tiny > FLOAT32.tiny:
        np.maximum(half, tiny, out=half)
    half *= BELOW * 2.0**-precision
    half += room.slack
    return bool((apart <= half).all())


def kept(output: Output) -> Callable[[], Output]:
    """A function that gives the output as it is now, whatever becomes of its arrays. The arrays are copied at once."""
    call: Any = output.call
    found, own = output.found.copy(), {name: array.copy() for name, array in arrays_of(call).items()}
    return lambda: replace(output, found=found, call=replace(call, **own), reads=(), inputs={})


def arrays_of(call: Any) -> dict[str, NDArray[Any]]:
    """The arrays of a call, by the names of its fields."""
    return {name: value for name, value in vars(call).items() if isinstance(value, np.ndarray)}
