# SPDX-License-Identifier: Apache-2.0
"""Assertion on root-mean-square normalisation, with or without the addition of a residual before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Unpack, cast

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.enclosure.functions import RSQRT
from refmoe.arithmetic.formats import ulp, upcast
from refmoe.errors import InputError
from refmoe.profiles.policy import Policy
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.steps.rounding import CutOps, rms_norm
from refmoe.testing.arguments import finite, fit, flat, real
from refmoe.testing.call import LEAST, WIDE, Change, Output, Plain, Room
from refmoe.testing.judgement import Judgement, judge, require
from refmoe.testing.options import Options, checked, chosen_rows, policy_for, selection
from refmoe.testing.parameters import known

STEP = "moe_norm"
SUM = "attention_residual"
BLOCKS = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Elements that kernels take at a time. What is left over may be lost."""
SAFE = 2.0**-60
"""The least mean square whose sum in float32 is far from the smallest normal value."""
OTHER_EPS = (0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-3)
"""The constants that models have, and none."""


@dataclass(frozen=True)
class Norm(Plain):
    """Rows divided by their root mean square, times a gain. The other fields are mistakes."""

    x: NDArray[Any]
    """[T, D]"""
    gain: NDArray[Any]
    """[D]"""
    eps: float
    stored: bool = True
    """Whether x is what the kernel read. If not, it may have read it before it was stored."""
    centred: bool = False
    """The mean is subtracted first, as in a layer norm."""
    outside: bool = False
    """eps is added to the root, not to the mean square."""
    lost: int = 0
    """The last elements that are not in the mean square."""
    roundings: int = 0
    """The roundings of a gain that is computed from the one given."""
    columns: Any = None
    """The columns of the output that are asked for; None: all. The mean square is that of all."""

    def narrow(self, at: Any) -> Norm:
        return replace(self, columns=at)

    def some(self, at: Any) -> Norm:
        return replace(self, x=self.x[at])

    def plain(self, dtype: Any) -> NDArray[Any]:
        x = self.x.astype(dtype, copy=False)
        scale = 1 / np.sqrt(np.einsum("ij,ij->i", x, x) / x.shape[1] + x.dtype.type(self.eps))
        found = x * scale[:, None]
        found *= self.gain.astype(dtype, copy=False)
        return np.asarray(found)

    def room(self, policy: Policy) -> Room | None:
        if not self.stored or self.centred or self.outside or self.lost or self.columns is not None:
            return None
        x = upcast(self.x, WIDE)
        square = np.einsum("ij,ij->i", x, x) / x.shape[1] + self.eps
        if not square.min(initial=np.inf) >= SAFE:
            return None
        exact = x * (1 / np.sqrt(square))[:, None]
        exact *= upcast(self.gain, WIDE)
        # the errors of an inverse root, and half a spacing of the quotient, which is half of u at least
        return Room(exact, np.abs(exact) * (LEAST * (RSQRT + 0.5) * policy.statistics.u))

    def enclose(self, ops: EnclosureOps) -> Enclosure:
        x, gain = known(ops, self.x), known(ops, self.gain, self.roundings)
        if not self.stored:
            spacing = ulp(x.mid, ops.policy.at(SUM))
            x = Enclosure(x.mid, spacing / 2, spacing**2 / 12, accumulation=ops.policy.accumulation)
        if self.centred:
            x = x - (ops.sum(x, axis=-1) / x.shape[-1]).reshape(-1, 1)
        columns = slice(None) if self.columns is None else self.columns
        if self.columns is None and not self.outside and not self.lost:
            return cast(Enclosure, rms_norm(cast(CutOps, ops), x, gain, self.eps))
        x = ops.cut("norm.input", x)
        counted = x[:, : x.shape[-1] - self.lost]
        mean_square = ops.sum(counted * counted, axis=-1) / x.shape[-1]
        root = ops.sqrt(mean_square) + self.eps if self.outside else ops.sqrt(mean_square + self.eps)
        return ops.cut("norm.normed", x[:, columns] / root.reshape(-1, 1)) * gain[columns]


@dataclass(frozen=True)
class Sum(Plain):
    """Two rows added."""

    a: NDArray[Any]
    """[T, D]"""
    b: NDArray[Any]
    """[T, D]"""

    def some(self, at: Any) -> Sum:
        return Sum(self.a[at], self.b[at])

    axis = 1

    def part(self, at: Any) -> Sum:
        return Sum(self.a[:, at], self.b[:, at])

    def plain(self, dtype: Any) -> NDArray[Any]:
        return np.asarray(self.a.astype(dtype, copy=False) + self.b.astype(dtype, copy=False))

    def enclose(self, ops: EnclosureOps) -> Enclosure:
        return known(ops, self.a) + known(ops, self.b)


class NormOptions(Options, total=False):
    """The options of `assert_rms_norm`."""

    residual: Any
    """[..., D], added to x before the norm. `residual_found` is then needed."""
    residual_found: Any
    """[..., D], the sum as the kernel returned it. It is judged as well."""


def assert_rms_norm(found: Any, x: Any, weight: Any, eps: float, **options: Unpack[NormOptions]) -> Judgement:
    """Assert that a kernel computed x / sqrt(mean(x^2) + eps) * weight over the last axis.

    found: [..., D]   x: [..., D]   weight: [D]
    options: those of `NormOptions`
    With a residual, the norm reads `residual_found`, or the sum before it was stored where the policy allows it.
    Returns the figures of the norm. Raises AssertionError when a value of norm or sum is wrong, and InputError for
    arrays that do not fit.
    """
    __tracebackhide__ = True
    judgements = judge_rms_norm(found, x, weight, eps, **options)
    for each in judgements:
        require(each)
    return judgements[-1]


def judge_rms_norm(
    found: Any, x: Any, weight: Any, eps: float, **options: Unpack[NormOptions]
) -> tuple[Judgement, ...]:
    """The judgements of `assert_rms_norm`, which also takes its arguments: of the sum if there is one, and the norm."""
    given = checked(options, NormOptions, "assert_rms_norm")
    eps = finite(eps, "eps")
    arrays = {"x": flat(real(x, "x")), "weight": real(weight, "weight"), "found": flat(real(found, "found"))}
    shapes = {"x": "T D", "weight": "D", "found": "T D"}
    added = [name for name in ("residual", "residual_found") if given.get(name) is not None]
    if len(added) == 1:
        raise InputError(f"assert_rms_norm: {added[0]} is given alone, but residual and residual_found were expected")
    for name in added:
        arrays[name], shapes[name] = flat(real(given[name], name)), "T D"
    fit(arrays, shapes)
    rows = chosen_rows(given, len(arrays["x"]))
    at = selection(rows, len(arrays["x"]))
    values = arrays["found"][at]

    def where(at: tuple[int, ...]) -> str:
        return f"row {rows[at[0]]}, column {at[1]}"

    judgements: list[Judgement] = []
    inputs = {"x": arrays["x"]}
    source = arrays["residual_found"] if added else arrays["x"]
    if added:
        total, call = arrays["residual_found"][at], Sum(arrays["x"][at], arrays["residual"][at])
        output = Output(
            what="residual", step=SUM, found=total, call=call, reads=(call.a,), where=where,
            changes=lambda: sum_changes(call),
        )  # fmt: skip
        inputs = {"x": arrays["x"], "residual": arrays["residual"]}
        judgements.append(judge(output, policy_for(given, SUM, total, inputs), given))
    norm = Norm(x=source[at], gain=arrays["weight"], eps=eps)
    plain = Norm(x=arrays["x"][at], gain=arrays["weight"], eps=eps) if added else None
    output = Output(
        what="rms norm",
        step=STEP,
        found=values,
        call=norm,
        reads=(norm.x,),
        where=where,
        changes=lambda: norm_changes(norm, plain),
        cuts=("norm.input", "norm.normed"),
        normalises=True,
        inputs={"x": norm.x},
    )
    policy = policy_for(given, STEP, values, {"x": source})
    judgement = judge(output, policy, given)
    if added and not judgement and policy.consumers == "unrounded":
        again = judge(replace(output, call=replace(norm, stored=False)), policy, given)
        judgement = again or judgement
    return (*judgements, judgement)


def sum_changes(call: Sum) -> Iterator[Change]:
    """The mistakes of the addition."""
    nothing = np.zeros_like(call.a)
    yield Change("the residual is not added", replace(call, b=nothing))
    yield Change("the input is not added", replace(call, a=nothing))


def norm_changes(call: Norm, plain: Norm | None) -> Iterator[Change]:
    """The mistakes of the norm.   plain: the norm of the input alone, where a residual was to be added"""
    for eps in OTHER_EPS:
        if eps != call.eps:
            bug = "norm-eps-1e-6" if eps == 1e-6 else ""
            yield Change(f"eps is {eps:g}, not {call.eps:g}", replace(call, eps=eps), bug)
    yield Change("eps is added outside the root", replace(call, outside=True), "norm-eps-outside-sqrt")
    yield Change("the mean is subtracted, as in a layer norm", replace(call, centred=True), "norm-layernorm-mean")
    gain = call.gain.astype(np.float64)
    yield Change("the gain is 1 + weight", replace(call, gain=1 + gain, roundings=1), "norm-gain-plus-one")
    yield Change("the gain is missing", replace(call, gain=np.ones_like(gain)))
    yield Change("the gain multiplies twice", replace(call, gain=gain**2, roundings=1))
    width = call.x.shape[1]
    for lost in sorted({width % block for block in BLOCKS} - {0, width}):
        yield Change(f"the last {lost} of {width} elements are not in the mean square", replace(call, lost=lost))
    yield Change(
        "squares are summed, not averaged", replace(call, eps=call.eps / width, gain=gain / np.sqrt(width), roundings=4)
    )
    if plain is not None:
        yield Change("the norm reads the input without the residual", plain)
