# SPDX-License-Identifier: Apache-2.0
"""A few rows may be proven legal without their enclosure. The verdict must be that of the enclosure."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refmoe
from refmoe.arithmetic.formats import OF_DTYPE, nearest, ulp
from refmoe.profiles.policy import Policy
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.testing import judgement
from refmoe.testing.activation import Gated, judge_swiglu
from refmoe.testing.call import SPREADS, Output, Provable, Room
from refmoe.testing.judgement import Judgement, judge
from refmoe.testing.mixture import Combined, judge_combine
from refmoe.testing.norm import Norm, judge_rms_norm
from refmoe.testing.proof import arrays_of, proven, within
from refmoe.testing.rotation import Rotated, judge_rotary
from refmoe.testing.routing import ORDERS, Routed, judge_router
from refmoe.verifier.findings import PASS
from tests.testing import kernels
from tests.testing.kernels import drawn

DTYPES = ("float32", "float16", "bfloat16")
STEPS = ("swiglu", "norm", "rotary", "combine", "router")
SIGNIFICANCE = 1e-6
SPECIAL = (0.0, -0.0, np.nan, np.inf, -np.inf, 1.0, 2.0**-149, 2.0**-126, 6e-8, 3.3e38, -6e4, 1e4, -88.0, -745.0)
"""Values at the ends of the formats, and arguments at which exp leaves them."""


def call_of(step: str, rng: Any, name: str, scale: float) -> tuple[str, Any]:
    """A call of a step, and the tap of its output."""
    t, n = int(rng.integers(1, 30)), int(rng.integers(1, 24))
    x = drawn(rng, t, 2 * n, name=name, scale=scale)
    ids = np.argsort(rng.random((t, 8)), axis=1)[:, : int(rng.integers(1, 9))]
    if step == "swiglu":
        return "expert.hidden", Gated(x, drawn(rng, t, 2 * n, name=name))
    if step == "norm":
        return "moe_norm", Norm(x, drawn(rng, 2 * n, name=name), float(rng.choice([0.0, 1e-5, 1.0])))
    if step == "rotary":
        turned = drawn(rng, t, 3, 2 * n, name=name, scale=scale)
        positions, layout = (
            rng.integers(0, 10 ** int(rng.integers(1, 7)), t),
            str(rng.choice(["halves", "interleaved"])),
        )
        return "attention.q_rope", Rotated(turned, positions, 1e4, layout, int(rng.choice([-1, 1])))
    if step == "combine":
        ids[rng.random(ids.shape) < 0.1] = -1
        weights = drawn(rng, *ids.shape, name=str(rng.choice([name, "float32"])))
        return "moe.output", Combined(drawn(rng, t, ids.shape[1], n, name=name, scale=scale), ids, weights)
    logits = drawn(rng, t, 8, name=name, scale=scale)
    return "router.weights", Routed(logits, ids, ORDERS[int(rng.integers(2))], scale=float(rng.choice([1.0, 2.5])))


def with_special(rng: Any, array: Any) -> Any:
    """The array with some values at the ends of the formats."""
    found = np.array(array)
    with np.errstate(over="ignore"):
        found[rng.random(found.shape) < rng.choice([0, 0.02, 0.3])] = rng.choice(SPECIAL)
    return found


def policies() -> st.SearchStrategy[Policy]:
    names = (*DTYPES, "llama.cpp-float32", "mlx-float32")
    plain = [refmoe.policy(name) for name in names]
    stored = [replace(plain[2], cuts={**plain[2].cuts, cut: plain[0].storage}) for cut in ("moe_norm", "expert.silu")]
    return st.sampled_from([*plain, *stored, replace(plain[0], flushes=True), replace(plain[1], ranks=2)])


@settings(max_examples=50)
@given(st.sampled_from(STEPS), st.sampled_from(DTYPES), policies(), st.integers(0, 2**32), st.integers(-40, 12))
def test_a_room_is_within_the_enclosure(step: str, name: str, policy: Policy, seed: int, power: int) -> None:
    """The claim on which the proof rests: the slack is within the radius and the spread, and the middle is exact."""
    rng = np.random.default_rng(seed)
    call = call_of(step, rng, name, 2.0**power)[1]
    with np.errstate(all="ignore"):
        room, x = call.room(policy), call.enclose(EnclosureOps(policy))
        if room is None:
            return
        assert room.exact.shape == room.slack.shape == x.shape
        finite = np.isfinite(room.exact)
        assert (room.slack <= x.r)[finite].all()
        assert (room.slack <= SPREADS * np.sqrt(x.v))[finite].all()
        below = np.abs(room.exact) < 1e-30  # smaller than the spacing of any format
        assert ((np.abs(room.exact - x.mid) <= room.slack * 2.0**-11) | below)[finite].all()


@settings(max_examples=100)
@given(st.sampled_from(DTYPES), st.integers(-30, 12), st.integers(0, 2**32))
def test_a_value_within_a_room_is_a_rounding_of_a_number_in_it(name: str, power: int, seed: int) -> None:
    """Around powers of two, where cells are lopsided, around zero, and where values are subnormal."""
    rng, format = np.random.default_rng(seed), OF_DTYPE[kernels.dtype(name)]
    spacing = 2.0 ** (power + 1 - format.precision)
    shift = rng.choice([rng.uniform(-2, 2, 64), rng.integers(-8, 9, 64) / 4])  # the second has ties
    exact = rng.choice([-1, 1]) * (2.0**power * rng.choice([0.0, 1.0, 1.5]) + spacing * shift)
    slack = spacing * rng.choice([0.0, 1e-3, 0.1, 0.5, 2.0]) * rng.random(64)
    beside = rng.choice([-1, 1], 64) * (slack + ulp(exact, format) * rng.choice([0.5, 1.0, rng.uniform(0, 2)], 64))
    y = nearest(exact + beside * rng.choice([0, 1], 64), format)
    low, high = nearest(exact - slack, format), nearest(exact + slack, format)
    legal = (low <= y) & (y <= high)
    for i in range(64):
        room = Room(exact[i : i + 1], slack[i : i + 1])
        assert legal[i] or not within(y[i : i + 1], room, format.precision, format.tiny)
        sure = nearest(exact[i : i + 1] * (1 - 1e-6), format) == y[i] == nearest(exact[i : i + 1] * (1 + 1e-6), format)
        if sure and ulp(np.abs(exact[i]) - slack[i], format) == ulp(exact[i], format) and slack[i] < abs(exact[i]):
            assert within(y[i : i + 1], room, format.precision, format.tiny)


def in_full(output: Output, policy: Policy) -> Judgement:
    with patch.object(judgement, "proven", lambda *_: False):
        return judge(output, policy, {"explain": False})


@settings(max_examples=80)
@given(st.sampled_from(STEPS), st.sampled_from(DTYPES), policies(), st.integers(0, 2**32), st.integers(-40, 12))
def test_the_verdict_is_that_of_the_enclosure(step: str, name: str, policy: Policy, seed: int, power: int) -> None:
    """Values at the ends of the legal interval, beside them, and special ones."""
    rng = np.random.default_rng(seed)
    tap, call = call_of(step, rng, name, 2.0**power)
    real = {key: each for key, each in arrays_of(call).items() if each.dtype != np.int64}
    call = replace(call, **{key: with_special(rng, each) for key, each in real.items()})
    with np.errstate(all="ignore"):
        x = call.enclose(EnclosureOps(policy))
        stored = OF_DTYPE[kernels.dtype(str(rng.choice([name, "float32"])))]
        half = ulp(x.mid, policy.at(tap)) / 2
        reach = rng.choice([0.0, 0.5, 0.99, 1.0, 1.01, 1.5], x.shape, p=[0.05, 0.05, 0.1, 0.7, 0.05, 0.05])
        # of one output nearly all values are at the end, of another few are
        reach = np.where(rng.random(x.shape) < rng.choice([0.0, 0.05, 1.0]), reach, 0.3)
        found = x.mid + rng.choice([-1, 1], x.shape) * reach * (x.r + half * rng.choice([0.0, 1.0]))
        found = nearest(found, stored).astype(stored.dtype)
        found = with_special(rng, found) if rng.random() < 0.3 else found
        output = Output(what="step", step=tap, found=found, call=call, reads=(), where=str)
        short = proven(output, policy, SIGNIFICANCE)
    full = in_full(output, policy)
    if short:
        assert full.verdict == PASS
        assert not full.undecided
    assert repr(judge(output, policy, {"explain": False})) == repr(full)  # figures may be NaN


def honest(step: str, rng: Any, name: str) -> Judgement:
    """The judgement of an honest kernel."""
    x, other = drawn(rng, 16, 256, name=name), drawn(rng, 16, 256, name=name)
    if step == "swiglu":
        return judge_swiglu(kernels.swiglu(x, other), x, other)
    if step == "norm":
        return judge_rms_norm(kernels.rms_norm(x, other[0], 1e-5), x, other[0], 1e-5)[-1]
    if step == "rotary":
        turned, positions = x.reshape(16, 4, 64), rng.integers(0, 4096, 16)
        return judge_rotary(kernels.rotary(turned, positions, 1e4), turned, positions, 1e4)
    weights, ids = kernels.softmax(rng.standard_normal((16, 2)).astype(np.float32)), rng.integers(0, 4, (16, 2))
    if step == "combine":
        outputs = x.reshape(16, 2, 128)
        return judge_combine(kernels.combine(outputs, weights), outputs, ids, weights)
    logits = x[:, :8]
    ids = np.argsort(-kernels.wide(logits), 1, kind="stable")[:, :2]
    found = kernels.softmax(np.take_along_axis(kernels.wide(logits), ids, 1)).astype(x.dtype)
    return judge_router(ids, found, logits)[-1]


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("step", STEPS)
def test_an_honest_kernel_is_proven(step: str, name: str) -> None:
    """Its verdict needs no enclosure. Its figures do, and are those that it has without a proof."""
    with patch.object(judgement, "checked_in_pieces", side_effect=AssertionError("an enclosure was computed")):
        done = honest(step, np.random.default_rng(5), name)
        assert done
    with patch.object(judgement, "proven", lambda *_: False):
        full = honest(step, np.random.default_rng(5), name)
    assert done == full
    assert done.headroom > 0


def test_figures_are_those_of_the_arrays_as_they_were() -> None:
    rng = np.random.default_rng(6)
    gate, up = drawn(rng, 4, 64), drawn(rng, 4, 64)
    found = kernels.swiglu(gate, up)
    with patch.object(judgement, "proven", lambda *_: False):
        full = judge_swiglu(found, gate, up)
    done, again, third = (judge_swiglu(found, gate, up) for _ in range(3))
    gate[:], up[:], found[:] = 1, 2, 3
    assert pickle.loads(pickle.dumps(again)) == full
    assert repr(third) == repr(full)
    assert not hasattr(done, "nothing")
    assert done.worst == full.worst
    assert done == full


def test_a_call_with_a_mistake_in_it_has_no_room_of_the_right_one() -> None:
    rng = np.random.default_rng(7)
    x, gain = drawn(rng, 4, 64), drawn(rng, 64)
    policy = refmoe.policy("float32")
    norm, gated = Norm(x, gain, 1e-5), Gated(x, x)
    wrong: list[Provable] = [
        replace(norm, centred=True), replace(norm, outside=True), replace(norm, lost=3), replace(norm, stored=False),
        replace(gated, function="relu"), Routed(x, np.array([[0, 1]] * 4), twice=True),
        Routed(x, np.array([[0, 1]] * 4), raw=True),
    ]  # fmt: skip
    assert all(call.room(policy) is None for call in wrong)
    assert norm.room(policy) is not None


def test_no_slots_are_an_error() -> None:
    with pytest.raises(refmoe.InputError, match="0 experts per token"):
        judge_combine(np.zeros((2, 4), np.float32), np.zeros((2, 0, 4)), np.zeros((2, 0), int), np.zeros((2, 0)))
