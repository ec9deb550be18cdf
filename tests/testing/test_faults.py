# SPDX-License-Identifier: Apache-2.0
"""Kernels with one mistake each: every one fails, and has its right name or none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import refmoe.testing as assertions
from tests.testing import kernels
from tests.testing.kernels import drawn

RNG = np.random.default_rng(5)
X, W, BIAS = drawn(RNG, 48, 96), drawn(RNG, 96, 96), drawn(RNG, 96)
RIGHT = kernels.linear(X, W)


def changed(array: Any, index: Any, value: Any) -> Any:
    """A copy of an array with other values in some places."""
    copy = np.array(array)
    copy[index] = value
    return copy


def cut_off(x: Any) -> Any:
    """Float32 values with the bits that bfloat16 lacks set to zero."""
    return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def half_sums(x: Any, w: Any) -> Any:
    total = np.zeros((len(x), len(w)), np.float16)
    for i in range(x.shape[1]):
        total += x[:, i, None].astype(np.float16) * w[None, :, i].astype(np.float16)
    return total.astype(x.dtype)


LINEAR: dict[str, tuple[Any, str]] = {
    "transposed": (kernels.linear(X, W.T), "the matrix is read as its transpose"),
    "zeros": (0 * RIGHT, "all values: zeros"),
    "not a number": (np.nan * RIGHT, "all values are not a number"),
    "constant": (0 * RIGHT + 3, "all values are 3"),
    "echo": (X, "the output is the input x"),
    "one term dropped": (kernels.linear(changed(X, (slice(None), 17), 0), W), "term 17 of 96 is missing"),
    "a block dropped": (
        kernels.linear(changed(X, (slice(None), slice(32, 64)), 0), W), "terms 32 to 63 of 96 are missing",
    ),
    "one term twice": (kernels.linear(X * (1 + (np.arange(96) == 4)), W), "term 4 of 96 is counted twice"),
    "a row of another": (changed(RIGHT, 5, RIGHT[6]), "row 5 has the result of row 6"),
    "shifted": (np.roll(RIGHT, 1, 0), "rows 0 to 47 have the result of the row 1 before"),
    "columns exchanged": (
        RIGHT[:, changed(np.arange(96), [3, 9], [9, 3])], "columns 3, 9 (2) have the results of columns 9, 3 (2)",
    ),
    "halved": (RIGHT / 2, "all values are 1/2 times the right ones"),
    "last rows not written": (changed(RIGHT, slice(32, None), 0), "rows 32 to 47: zeros"),
    "a tile not written": (changed(RIGHT, (slice(16, 32), slice(64, 96)), 0), "rows 16 to 31, columns 64 to 95: zeros"),
    "rounded factors": (
        kernels.linear(*(each.astype(ml_dtypes.bfloat16).astype(np.float32) for each in (X, W))),
        "the factors are rounded to bfloat16 before they are multiplied",
    ),
    "rounded output": (RIGHT.astype(np.float16).astype(np.float32), "the output is rounded to float16"),
    "cut off": (cut_off(RIGHT), "values are cut off to bfloat16, toward zero, not rounded to nearest"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", LINEAR)
def test_linear(mistake: str) -> None:
    found, name = LINEAR[mistake]
    with pytest.raises(AssertionError) as failed:
        assertions.assert_linear(found.astype(np.float32), X, W)
    assert name in names(failed.value)


def names(error: AssertionError) -> list[str]:
    """The mistakes that a message names, without the ids of known bugs."""
    lines = str(error).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("Explained by"))
    one = lines[at].removeprefix("Explained by: ")
    several = [line.strip() for line in lines[at + 1 :] if line.startswith("    ")]
    return [text.partition(" (known bug")[0] for text in ([one] if one != lines[at] else several)]


def test_noise_has_no_name() -> None:
    noisy = RIGHT * (1 + 0.01 * RNG.standard_normal(RIGHT.shape).astype(np.float32))
    with pytest.raises(AssertionError) as failed:
        assertions.assert_linear(noisy, X, W)
    assert "nothing" in names(failed.value)[0]


def test_the_size_of_errors_is_stated() -> None:
    with pytest.raises(AssertionError, match="size of arithmetic in float16") as failed:
        assertions.assert_linear(half_sums(X, W), X, W)
    assert "nothing" in names(failed.value)[0]


def test_a_missing_bias() -> None:
    with pytest.raises(AssertionError) as failed:
        assertions.assert_linear(RIGHT, X, W, bias=BIAS)
    assert names(failed.value) == ["the bias is missing"]


def norm_faults() -> dict[str, Any]:
    x, gain = X * np.float32(1e-3), RNG.random(96, np.float32)
    centred = x - x.mean(1, keepdims=True)
    root = np.sqrt((x * x).mean(1, keepdims=True))
    return {
        "x": x, "gain": gain,
        "eps is 1e-06, not 1e-05": kernels.rms_norm(x, gain, 1e-6),
        "the gain is 1 + weight": kernels.rms_norm(x, 1 + gain, 1e-5),
        "the gain is missing": kernels.rms_norm(x, np.ones_like(gain), 1e-5),
        "the mean is subtracted, as in a layer norm": kernels.rms_norm(centred, gain, 1e-5),
        "eps is added outside the root": x / (root + np.float32(1e-5)) * gain,
        "squares are summed, not averaged": x / np.sqrt((x * x).sum(1, keepdims=True) + np.float32(1e-5)) * gain,
    }  # fmt: skip


@pytest.mark.parametrize("name", [each for each in norm_faults() if len(each) > 4])
def test_rms_norm(name: str) -> None:
    faults = norm_faults()
    with pytest.raises(AssertionError) as failed:
        assertions.assert_rms_norm(faults[name], faults["x"], faults["gain"], 1e-5)
    assert names(failed.value) == [name]


def test_a_residual_that_is_not_added() -> None:
    other, gain = drawn(RNG, 48, 96), RNG.random(96, np.float32)
    total = X + other
    right = kernels.rms_norm(total, gain, 1e-5)
    for found, stored, name in (
        (kernels.rms_norm(X, gain, 1e-5), total, "the norm reads the input without the residual"),
        (right, X, "the residual is not added"),
    ):
        with pytest.raises(AssertionError) as failed:
            assertions.assert_rms_norm(found, X, gain, 1e-5, residual=other, residual_found=stored)
        assert names(failed.value) == [name]


def test_what_arrays_cannot_show_is_said() -> None:
    """At a root mean square of 1000 no float32 value shows eps."""
    gain = np.ones(96, np.float32)
    with pytest.raises(AssertionError) as failed:
        assertions.assert_rms_norm(0 * X, 1000 * X, gain, 1e-5)
    unseen = next(line for line in str(failed.value).splitlines() if line.startswith("It does not see"))
    assert "eps is 1e-06" in unseen


POSITIONS = np.arange(5, 37)
TURNED: dict[str, Callable[[Any], Any]] = {
    "pairs are interleaved, not halves": lambda x: kernels.rotary(x, POSITIONS, 1e6, True),
    "theta is 10000, not 1e+06": lambda x: kernels.rotary(x, POSITIONS, 1e4),
    "positions are one too large": lambda x: kernels.rotary(x, POSITIONS + 1, 1e6),
    "positions count from the first row": lambda x: kernels.rotary(x, POSITIONS - 5, 1e6),
    "pairs turn the other way": lambda x: kernels.rotary(x, -POSITIONS, 1e6),
    "nothing is turned": lambda x: x,
    "everything is turned twice": lambda x: kernels.rotary(x, 2 * POSITIONS, 1e6),
}


@pytest.mark.parametrize("name", TURNED)
def test_rotary(name: str) -> None:
    x = drawn(np.random.default_rng(2), 32, 3, 32)
    with pytest.raises(AssertionError) as failed:
        assertions.assert_rotary(TURNED[name](x), x, POSITIONS, 1e6)
    assert name in names(failed.value)


def seen(before: int, window: int = 100) -> Any:
    """The mask of 20 queries, the first of which sees `before` keys, over 32 keys."""
    far = np.arange(20)[:, None] + before - 1 - np.arange(32)
    return (far >= 0) & (far < window)


MASKED = {
    "the mask is not causal": (np.ones((20, 32), bool), None, None),
    "a query does not see its own key": (seen(12), None, None),
    "a query sees one key of the future": (seen(14), None, None),
    "the mask is aligned to the first key": (seen(1), None, None),
    "the scale is missing": (seen(13), None, 1.0),
    "the scale is 1 / sqrt(H d), as if all heads were one": (seen(13), None, 1 / 8),
    "the scale is as for exp, but powers of 2 are taken": (seen(13), None, math.log(2) / 4),
    "the scale is as for powers of 2, but exp is taken": (seen(13), None, 1 / 4 / math.log(2)),
    "the window is not used": (seen(13), 8, None),
    "the window is one key too long": (seen(13, 9), 8, None),
    "the window is one key too short": (seen(13, 7), 8, None),
}


@pytest.mark.parametrize("name", MASKED)
def test_attention(name: str) -> None:
    rng = np.random.default_rng(3)
    q, k, v = (drawn(rng, n, h, 16) for n, h in ((20, 4), (32, 2), (32, 2)))
    mask, window, scale = MASKED[name]
    found, logs = kernels.attention(q, k, v, mask, scale)
    with pytest.raises(AssertionError) as failed:
        assertions.assert_attention(found, q, k, v, window=window)
    assert name in names(failed.value)
    right, _ = kernels.attention(q, k, v, seen(13, window or 100))
    with pytest.raises(AssertionError) as failed:
        assertions.assert_attention(right, q, k, v, window=window, log_sum_exp=logs)
    assert name in names(failed.value)


def test_heads_that_read_the_wrong_keys() -> None:
    rng = np.random.default_rng(4)
    q, k, v = (drawn(rng, 20, h, 16) for h in (4, 2, 2))
    turns = [0, 2, 1, 3]
    found = kernels.attention(q[:, turns], k, v, np.tri(20, dtype=bool))[0][:, turns]
    with pytest.raises(AssertionError) as failed:
        assertions.assert_attention(found, q, k, v)
    assert names(failed.value) == ["query head h reads head h mod K"]


GATED: dict[str, Callable[[Any, Any], Any]] = {
    "gate and up are exchanged": lambda gate, up: kernels.silu(up) * gate,
    "the gate is multiplied as it is, without silu": lambda gate, up: gate * up,
    "the gate has relu, not silu": lambda gate, up: np.maximum(gate, 0) * up,
    "the gate has x sigmoid(1.702 x), not silu": lambda gate, up: gate / (1 + np.exp(-1.702 * gate)) * up,
    "up is missing": lambda gate, up: kernels.silu(gate),
    "the gate has gelu by tanh, not silu": lambda gate, up: gate * up / 2
    * (1 + np.tanh(0.7978845608 * (gate + 0.044715 * gate**3))),
}  # fmt: skip


@pytest.mark.parametrize("name", GATED)
def test_swiglu(name: str) -> None:
    rng = np.random.default_rng(6)
    gate, up = drawn(rng, 40, 50), drawn(rng, 40, 50)
    with pytest.raises(AssertionError) as failed:
        assertions.assert_swiglu(GATED[name](gate, up).astype(np.float32), gate, up)
    assert name in names(failed.value)


ARGUMENTS = kernels.layer(np.random.default_rng(8), 40, 32, 24, 6, 2, "float32")


def with_(**others: Any) -> Any:
    """The right layer with other arguments."""
    given = dict(zip(("x", "w_gate", "w_up", "w_down", "ids", "weights"), ARGUMENTS, strict=True))
    return kernels.moe(**{**given, **others})


def fused_otherwise() -> tuple[Any, Any]:
    both = np.concatenate(ARGUMENTS[1:3], 1)
    return both[:, 0::2], both[:, 1::2]


MIXED: dict[str, Callable[[], Any]] = {
    "gate and up are exchanged": lambda: with_(w_gate=ARGUMENTS[2], w_up=ARGUMENTS[1]),
    "gate and up are read as interleaved, but are in halves": lambda: with_(
        w_gate=fused_otherwise()[0], w_up=fused_otherwise()[1]
    ),
    "each row has the matrix of the next expert": lambda: with_(ids=(ARGUMENTS[4] + 1) % 6),
    "all experts have the w_down of expert 0": lambda: with_(w_down=np.broadcast_to(ARGUMENTS[3][:1], (6, 32, 24))),
    "the weights are not used": lambda: with_(weights=np.ones((40, 2), np.float32)),
    "the experts of a token have equal weights that sum to 1": lambda: with_(weights=np.full((40, 2), 0.5, np.float32)),
    "the slots of a token have each other's weights": lambda: with_(weights=ARGUMENTS[5][:, ::-1]),
    "slot 1 of each token is not added": lambda: with_(ids=changed(ARGUMENTS[4], (slice(None), 1), -1)),
    "the last 1 of 24 terms of the down projection are missing": lambda: with_(
        w_down=changed(ARGUMENTS[3], (slice(None), slice(None), -1), 0)
    ),
    "the gate is multiplied as it is, without silu": lambda: with_(activation=lambda x: x),
    "the weight multiplies the expert's input": lambda: sum(
        kernels.moe(
            ARGUMENTS[0] * ARGUMENTS[5][:, s, None], *ARGUMENTS[1:4], ARGUMENTS[4][:, s : s + 1],
            np.ones((40, 1), np.float32),
        )
        for s in range(2)
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXED)
def test_moe(name: str) -> None:
    with pytest.raises(AssertionError) as failed:
        assertions.assert_moe(MIXED[name](), *ARGUMENTS)
    assert name in names(failed.value)


@pytest.mark.slow
def test_a_hidden_row_that_is_stored_in_half_is_named() -> None:
    x, gate, up, down, ids, weights = ARGUMENTS
    found = np.zeros_like(x)
    for token, slot in np.ndindex(*ids.shape):
        e = ids[token, slot]
        hidden = (kernels.silu(gate[e] @ x[token]) * (up[e] @ x[token])).astype(np.float16).astype(np.float32)
        found[token] += weights[token, slot] * (down[e] @ hidden)
    with pytest.raises(AssertionError) as failed:
        assertions.assert_moe(found, *ARGUMENTS)
    assert names(failed.value) == ["expert.hidden is stored in float16"]


def routed(logits: Any) -> tuple[Any, Any]:
    ids = np.argsort(-logits, 1, kind="stable")[:, :2]
    return ids, kernels.softmax(np.take_along_axis(logits, ids, 1))


def test_router_weights() -> None:
    logits = drawn(np.random.default_rng(9), 40, 8)
    ids, weights = routed(logits)
    everything = np.take_along_axis(kernels.softmax(logits), ids, 1)
    raw = np.take_along_axis(logits, ids, 1)
    for found, name in (
        (everything, "the weights are not renormalised"),
        (raw, "the weights are the logits"),
        (kernels.softmax(weights), "the softmax is taken twice"),
        (weights[:, ::-1], "the slots of a token have each other's weights"),
        (1 / (1 + np.exp(-raw)), "the scores are sigmoid, not softmax, and not renormalised"),
    ):
        with pytest.raises(AssertionError) as failed:
            assertions.assert_router(ids, found, logits)
        assert name in names(failed.value)


def test_router_choices() -> None:
    logits = drawn(np.random.default_rng(9), 40, 8)
    ids, weights = routed(logits)
    for found, name in (
        ((ids + 1) % 8, "the ids are one too large"),
        (routed(-logits)[0], "the experts with the smallest logits are chosen"),
        (changed(ids, 3, (ids[3] + 1) % 8), "nothing that refmoe knows"),
        (ids[:, :1].repeat(2, 1), "nothing that refmoe knows"),
    ):
        with pytest.raises(AssertionError) as failed:
            assertions.assert_router(found, weights, logits)
        assert names(failed.value) == [name]


def test_a_router_that_forgets_bias_or_groups() -> None:
    rng = np.random.default_rng(10)
    logits, bias = drawn(rng, 40, 8), 2 * drawn(rng, 8)
    scores = 1 / (1 + np.exp(-logits))
    for compared, options, name in (
        (scores, {"bias": bias}, "the bias is not used for the choice"),
        (scores, {"groups": (4, 1)}, "the groups are not used"),
    ):
        ids = np.argsort(-compared, 1)[:, :2]
        weights = np.take_along_axis(scores, ids, 1)
        with pytest.raises(AssertionError) as failed:
            assertions.assert_router(ids, weights / weights.sum(1, keepdims=True), logits, order="sigmoid", **options)
        assert names(failed.value) == [name]


def test_grouped_linear() -> None:
    rng = np.random.default_rng(11)
    x, w, ids = drawn(rng, 40, 16), drawn(rng, 4, 16, 16), np.sort(rng.integers(0, 4, 40))

    def run(w: Any, ids: Any) -> Any:
        return np.einsum("tk,tnk->tn", x, w[ids])

    turned = np.arange(16).reshape(2, 8).T.reshape(-1)
    for found, name in (
        (run(w, (ids + 1) % 4), "each row has the matrix of the next expert"),
        (run(w, np.concatenate([ids[:1], ids[:-1]])), "each expert's rows begin one row late"),
        (run(w.transpose(0, 2, 1), ids), "the matrices are read as their transposes"),
        (run(w, ids)[:, turned], "gate and up are interleaved, where halves are declared"),
        (run(w, ids)[:, np.roll(np.arange(16), 8)], "gate and up are exchanged"),
    ):
        with pytest.raises(AssertionError) as failed:
            assertions.assert_grouped_linear(found.astype(np.float32), x, w, ids=ids, fused="halves")
        assert name in names(failed.value)


def test_combine() -> None:
    rng = np.random.default_rng(12)
    outputs, weights = drawn(rng, 40, 2, 16), kernels.softmax(drawn(rng, 40, 2))
    ids = np.argsort(rng.random((40, 4)), 1)[:, :2]
    for other, name in (
        (np.ones_like(weights), "the weights are not used"),
        (weights**2, "the weights are used twice"),
        (weights[:, ::-1], "the slots of a token have each other's weights"),
        (weights * [1, 0], "slot 1 of each token is not added"),
    ):
        with pytest.raises(AssertionError) as failed:
            assertions.assert_combine(kernels.combine(outputs, other.astype(np.float32)), outputs, ids, weights)
        assert name in names(failed.value)


LOST: dict[str, Callable[[list[Any]], list[Any]]] = {
    "the first row of each expert is lost": lambda rows: rows[:1],
    "the last row of each expert is lost": lambda rows: rows[-1:],
    "the rows of each expert behind its last whole block of 16 are lost": lambda rows: rows[len(rows) // 16 * 16 :],
    "the rows of each expert behind its first 32 are lost": lambda rows: rows[32:],
}


@pytest.mark.parametrize("name", LOST)
def test_rows_of_experts_that_are_lost_are_named(name: str) -> None:
    """Each expert's rows are its slots, token after token."""
    rng = np.random.default_rng(14)
    outputs, weights = drawn(rng, 200, 2, 16), kernels.softmax(drawn(rng, 200, 2))
    ids = np.argsort(rng.random((200, 4)), 1)[:, :2]
    kept = np.array(weights)
    for expert in range(4):
        for slot in LOST[name]([slot for slot in np.ndindex(*ids.shape) if ids[slot] == expert]):
            kept[slot] = 0
    with pytest.raises(AssertionError) as failed:
        assertions.assert_combine(kernels.combine(outputs, kept), outputs, ids, weights)
    assert name in names(failed.value)


def test_one_wrong_value_among_very_many_is_found() -> None:
    """Such an output is screened, and the row with the value is judged."""
    rng = np.random.default_rng(13)
    gate, up = drawn(rng, 600, 800), drawn(rng, 600, 800)
    found = kernels.swiglu(gate, up)
    assert assertions.assert_swiglu(found, gate, up).values == found.size
    with pytest.raises(AssertionError, match="row 417, column 20"):
        assertions.assert_swiglu(changed(found, (417, 20), found[417, 20] * np.float32(1.001)), gate, up)
    with pytest.raises(AssertionError, match="row 599, column 799"):
        assertions.assert_swiglu(changed(found, (599, 799), np.nan), gate, up)
    with pytest.raises(AssertionError) as failed:
        assertions.assert_swiglu(cut_off(found), gate, up)
    assert "values are cut off to bfloat16, toward zero, not rounded to nearest" in names(failed.value)
