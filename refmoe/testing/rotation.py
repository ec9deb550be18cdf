# SPDX-License-Identifier: Apache-2.0
"""Assertion on rotary position embedding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Unpack, cast

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import upcast
from refmoe.errors import InputError
from refmoe.profiles.policy import Policy
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.steps.rounding import CutOps, rotary_table, rotate
from refmoe.testing.arguments import finite, fit, integers, one_of, real
from refmoe.testing.call import LEAST, WIDE, Change, Output, Plain, Room
from refmoe.testing.judgement import Judgement, judge, require
from refmoe.testing.options import Options, checked, chosen_rows, policy_for, selection
from refmoe.testing.parameters import known

STEP = "attention.q_rope"
LAYOUTS = ("halves", "interleaved")
OTHER_THETA = (1e4, 5e5, 1e6)
"""The bases of Llama 2, Llama 3 and Mixtral."""


@dataclass(frozen=True)
class Rotated(Plain):
    """The pairs of each head turned by the angle of their position. The last field is a mistake."""

    x: NDArray[Any]
    """[T, H, d]"""
    positions: NDArray[Any]
    """Integers [T]"""
    theta: float
    layout: str = "halves"
    sign: int = 1

    def some(self, at: Any) -> Rotated:
        return replace(self, x=self.x[at], positions=self.positions[at])

    @property
    def axis(self) -> int:
        return int(self.x.shape[1] > len(self.x))

    def part(self, at: Any) -> Rotated:
        return replace(self, x=self.x[:, at]) if self.axis else self.some(at)

    def narrow(self, at: Any) -> Rotated:
        return replace(self, x=self.x[:, at])

    def plain(self, dtype: Any) -> NDArray[Any]:
        half, x = self.x.shape[-1] // 2, self.x.astype(dtype, copy=False)
        angle = self.positions[:, None] * self.theta ** (-np.arange(half) / half)
        cos, sin = (each.astype(dtype)[:, None] for each in (np.cos(angle), np.sin(angle)))
        found = np.empty_like(x)
        first, second = self._pairs
        a, b = x[..., first], x[..., second]
        found[..., first], found[..., second] = a * cos - b * sin, b * cos + a * sin
        return found

    def size(self) -> NDArray[Any]:
        """The length of each pair, times the error of an angle that a kernel computes in the dtype of its table."""
        half, x = self.x.shape[-1] // 2, self.x.astype(np.float32, copy=False)
        angle = self.positions[:, None] * self.theta ** (-np.arange(half) / half)
        found = np.empty_like(x)
        first, second = self._pairs
        length = np.hypot(x[..., first], x[..., second])
        length *= (1 + angle).astype(np.float32)[:, None]
        found[..., first] = found[..., second] = length
        return found

    @property
    def _pairs(self) -> tuple[slice, slice]:
        """The first and the second elements of the pairs."""
        half = self.x.shape[-1] // 2
        return (
            (slice(0, half), slice(half, None)) if self.layout == "halves" else (slice(0, None, 2), slice(1, None, 2))
        )

    def room(self, policy: Policy) -> Room | None:
        half, x, u = self.x.shape[-1] // 2, upcast(self.x, WIDE), policy.statistics.u
        pair = np.arange(half) / half
        angle = self.positions[:, None] * self.theta**-pair
        cos, sin = np.cos(angle), self.sign * np.sin(angle)
        # at least: the budget of the frequency, and the rounding of its product with the position
        off = np.minimum((policy.angles.constant + 1) * u * angle, 0.5)
        off[:, 0] = 0  # of the frequency 1
        last, above, across = policy.circle.constant * u, np.abs(cos), np.abs(sin)
        # half a spacing of a product is half of u at least
        of_cos, of_sin = (
            (LEAST * (moved + last + u / 2 * size))[:, None]
            for moved, size in ((across * off, above), (above * off, across))
        )
        cos, sin = cos[:, None], sin[:, None]
        first, second = self._pairs
        a, b = x[..., first], x[..., second]
        exact, slack = np.empty(x.shape), np.empty(x.shape)
        exact[..., first], exact[..., second] = a * cos - b * sin, b * cos + a * sin
        a, b = np.abs(a), np.abs(b)
        slack[..., first], slack[..., second] = a * of_cos + b * of_sin, b * of_cos + a * of_sin
        return Room(exact, slack)

    def enclose(self, ops: EnclosureOps) -> Enclosure:
        size, cuts = self.x.shape[-1], cast(CutOps, ops)
        order = np.arange(size)
        if self.layout == "interleaved":
            order = np.concatenate([order[0::2], order[1::2]])
        cos, sin = rotary_table(cuts, self.positions, size, self.theta)
        turned: Enclosure = rotate(cuts, known(ops, self.x)[..., order], (cos, sin if self.sign > 0 else -sin))
        return turned[..., np.argsort(order)]


class RotaryOptions(Options, total=False):
    """The options of `assert_rotary`."""

    layout: Literal["halves", "interleaved"]
    """Whether element i of a head pairs with i + d / 2, or element 2 i with 2 i + 1."""


def assert_rotary(found: Any, x: Any, positions: Any, theta: float, **options: Unpack[RotaryOptions]) -> Judgement:
    """Assert that a kernel turned the pairs of each head by position * theta^(-2 i / d).

    found, x: [..., H, d]   positions: integers of the shape of the axes before H
    options: those of `RotaryOptions`
    Returns the figures. Raises AssertionError when a value is wrong, and InputError for arrays that do not fit.
    """
    __tracebackhide__ = True
    return require(judge_rotary(found, x, positions, theta, **options))


def judge_rotary(found: Any, x: Any, positions: Any, theta: float, **options: Unpack[RotaryOptions]) -> Judgement:
    """The judgement of `assert_rotary`, which also takes its arguments."""
    given = checked(options, RotaryOptions, "assert_rotary")
    theta, layout = finite(theta, "theta"), str(one_of(given, "layout", LAYOUTS))
    if theta <= 0:
        raise InputError(f"theta: is {theta:g}, but a number above 0 was expected")
    arrays = {"x": real(x, "x"), "found": real(found, "found")}
    for name, array in arrays.items():
        if array.ndim < 3 or array.shape[-1] % 2:
            raise InputError(f"{name}: has shape {list(array.shape)}, but [..., T, H, d] with an even d was expected")
    places = integers(positions, "positions")
    if places.shape != arrays["x"].shape[:-2]:
        wanted = list(arrays["x"].shape[:-2])
        raise InputError(f"positions: has shape {list(places.shape)}, but {wanted} was expected")
    if places.size and places.min() < 0:
        raise InputError(f"positions: has {int(places.min())} in it, but positions from 0 were expected")
    before = arrays["x"].shape
    arrays = {name: array.reshape(-1, *array.shape[-2:]) for name, array in arrays.items()}
    fit(arrays, {"x": "T H d", "found": "T H d"})
    rows = chosen_rows(given, len(arrays["x"]))
    at = selection(rows, len(arrays["x"]))
    values = arrays["found"][at]
    call = Rotated(x=arrays["x"][at], positions=places.reshape(-1)[at], theta=theta, layout=layout)

    def where(at: tuple[int, ...]) -> str:
        token = tuple(int(i) for i in np.unravel_index(rows[at[0]], before[:-2]))
        named = token[0] if len(token) == 1 else token
        return f"token {named}, position {call.positions[at[0]]}, head {at[1]}, column {at[2]}"

    output = Output(
        what="rotary",
        step=STEP,
        found=values,
        call=call,
        reads=(call.x,),
        where=where,
        changes=lambda: rotary_changes(call),
        cuts=("rope.table", "rope.products"),
        inputs={"x": call.x},
    )
    return judge(output, policy_for(given, STEP, values, {"x": arrays["x"]}), given)


def rotary_changes(call: Rotated) -> Iterator[Change]:
    """The mistakes of a rotation."""
    other = LAYOUTS[call.layout == "halves"]
    yield Change(f"pairs are {other}, not {call.layout}", replace(call, layout=other), "rope-interleaved-vs-half")
    yield Change("pairs turn the other way", replace(call, sign=-1), "rope-sign-flipped")
    for theta in OTHER_THETA:
        if theta != call.theta:
            yield Change(f"theta is {theta:g}, not {call.theta:g}", replace(call, theta=theta), "rope-theta-default")
    yield Change(
        "positions are one too large", replace(call, positions=call.positions + 1), "rope-decode-position-plus-one"
    )
    if (call.positions > 0).all():
        yield Change("positions are one too small", replace(call, positions=call.positions - 1))
    yield Change("nothing is turned", replace(call, positions=0 * call.positions), "rope-decode-position-zero")
    yield Change("positions count from the first row", replace(call, positions=np.arange(len(call.positions))))
    yield Change(
        "all rows have the position of the first",
        replace(call, positions=np.full_like(call.positions, call.positions[0])),
    )
    yield Change("everything is turned twice", replace(call, positions=2 * call.positions), "rope-reapplied-to-cache")
