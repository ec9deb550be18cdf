# SPDX-License-Identifier: Apache-2.0
"""A large output is judged in part. Its verdict must be that of the check of all its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import refmoe
import refmoe.testing as assertions
from refmoe.arithmetic.formats import OF_DTYPE, ulp
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.testing import judgement
from refmoe.testing.activation import judge_swiglu
from refmoe.testing.attention import judge_attention
from refmoe.testing.judgement import Judgement
from refmoe.testing.mixture import judge_combine, judge_moe
from refmoe.testing.norm import Norm, judge_rms_norm
from refmoe.testing.products import judge_grouped_linear, judge_linear
from refmoe.testing.rotation import Rotated, judge_rotary
from tests.testing import kernels
from tests.testing.kernels import drawn

Judge = Callable[..., Judgement]
Kernel = tuple[Any, Judge]
"""What an honest kernel returns, and the judgement of it."""


def linear(rng: Any, name: str) -> Kernel:
    scale = 2.0 ** rng.integers(-4, 1, (256, 1))  # columns of unlike size
    x, w = drawn(rng, 40, 96, name=name), drawn(rng, 256, 96, name=name, scale=scale)
    return kernels.linear(x, w), lambda y, **options: judge_linear(y, x, w, **options)


def one_row(rng: Any, name: str) -> Kernel:
    x, w = drawn(rng, 1, 512, name=name), drawn(rng, 1024, 512, name=name)
    return kernels.linear(x, w), lambda y, **options: judge_linear(y, x, w, **options)


def grouped(rng: Any, name: str) -> Kernel:
    x, w, ids = drawn(rng, 40, 96, name=name), drawn(rng, 6, 256, 96, name=name), rng.integers(1, 5, 40)
    found = np.concatenate([kernels.linear(row[None], w[e]) for row, e in zip(x, ids, strict=True)])
    return found, lambda y, **options: judge_grouped_linear(y, x, w, ids=ids, **options)


def norm(rng: Any, name: str) -> Kernel:
    x, gain = drawn(rng, 192, 256, name=name), drawn(rng, 256, name=name)
    return kernels.rms_norm(x, gain, 1e-5), lambda y, **options: judge_rms_norm(y, x, gain, 1e-5, **options)[-1]


def residual(rng: Any, name: str) -> Kernel:
    x, other, gain = drawn(rng, 192, 256, name=name), drawn(rng, 192, 256, name=name), drawn(rng, 256, name=name)
    total = (kernels.wide(x) + kernels.wide(other)).astype(x.dtype)
    normed = kernels.rms_norm(total, gain, 1e-5)

    def judge(y: Any, **options: Any) -> Judgement:
        return judge_rms_norm(normed, x, gain, 1e-5, residual=other, residual_found=y, **options)[0]

    return total, judge


def rotary(rng: Any, name: str) -> Kernel:
    x, positions = drawn(rng, 192, 4, 64, name=name), rng.permutation(192)
    return kernels.rotary(x, positions, 1e4), lambda y, **options: judge_rotary(y, x, positions, 1e4, **options)


def attention(rng: Any, name: str) -> Kernel:
    q, k, v = (drawn(rng, tokens, heads, 16, name=name) for tokens, heads in ((96, 4), (128, 2), (128, 2)))
    mask = np.arange(128) <= np.arange(32, 128)[:, None]
    found = kernels.attention(q, k, v, mask)[0]
    return found, lambda y, **options: judge_attention(y, q, k, v, **options)[0]


def turned_by_heads(rng: Any, name: str) -> Kernel:
    x, positions = drawn(rng, 12, 48, 64, name=name), rng.permutation(12)
    return kernels.rotary(x, positions, 1e4), lambda y, **options: judge_rotary(y, x, positions, 1e4, **options)


def swiglu(rng: Any, name: str) -> Kernel:
    gate, up = drawn(rng, 40, 1024, name=name), drawn(rng, 40, 1024, name=name)
    return kernels.swiglu(gate, up), lambda y, **options: judge_swiglu(y, gate, up, **options)


def combine(rng: Any, name: str) -> Kernel:
    outputs, ids = drawn(rng, 40, 2, 1024, name=name), rng.integers(0, 4, (40, 2))
    weights = kernels.softmax(rng.standard_normal((40, 2)).astype(np.float32))
    return kernels.combine(outputs, weights), lambda y, **options: judge_combine(y, outputs, ids, weights, **options)


def moe(rng: Any, name: str) -> Kernel:
    arguments = kernels.layer(rng, 256, 32, 48, 4, 2, name)
    return kernels.moe(*arguments), lambda y, **options: judge_moe(y, *arguments, **options)


FAMILIES = (
    linear,
    one_row,
    grouped,
    norm,
    residual,
    rotary,
    turned_by_heads,
    attention,
    swiglu,
    combine,
    moe,
)


def in_full(monkeypatch: pytest.MonkeyPatch, judge: Judge, found: Any, **options: Any) -> Judgement:
    """The judgement of all values."""
    with monkeypatch.context() as patch:
        patch.setattr(judgement, "parts", lambda *_: None)
        patch.setattr(judgement, "proven", lambda *_: False)
        done = judge(found, **options)
    assert done.judged == done.values
    return done


@pytest.mark.parametrize("name", kernels.DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_honest_kernel_passes_by_a_part(family: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        found, judge = family(np.random.default_rng(seed), name)
        done = judge(found, seed=seed)
        assert done.verdict == "pass"
        assert len(found) / 4 <= done.judged < 3 * done.values / 4
        assert done.statistics == in_full(monkeypatch, judge, found).statistics


@pytest.mark.parametrize("name", kernels.DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_smallest_error_of_one_value_is_found(family: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One value moves until the check of all values fails. The check of a part fails at the same distance."""
    rng = np.random.default_rng(31)
    found, judge = family(rng, name)
    for _ in range(3):
        at = tuple(int(rng.integers(size)) for size in found.shape)
        value, side = float(found[at]), rng.choice([-1, 1])
        step = float(ulp(np.float64(value), OF_DTYPE[found.dtype]))
        for power in range(0, 60):
            wrong = np.array(found)
            wrong[at] = value + side * step * 2.0 ** (power / 2)
            if not in_full(monkeypatch, judge, wrong, explain=False):
                break
        else:
            pytest.fail("no error was large enough")
        done = judge(wrong, explain=False)
        assert not done
        assert done.worst is not None
        assert done.worst.where == at


def test_not_a_number_is_found_beside_rows_that_may_be() -> None:
    """A row of NaN has a result of NaN, and so many such rows hide no other."""
    rng = np.random.default_rng(32)
    gate, up = drawn(rng, 600, 64), drawn(rng, 600, 64)
    gate[::3] = np.nan
    found = kernels.swiglu(gate, up)
    assert judge_swiglu(found, gate, up)
    found[400, 7] = np.nan
    done = judge_swiglu(found, gate, up, explain=False)
    assert not done
    assert done.worst is not None
    assert done.worst.where == (400, 7)


def test_a_failure_has_the_figures_and_the_name_that_all_values_give(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(33)
    x, w, gate, up = drawn(rng, 64, 256), drawn(rng, 256, 256), drawn(rng, 64, 1024), drawn(rng, 64, 1024)
    shorter = np.array(x)
    shorter[:, 9] = 0
    cases: list[tuple[Any, Judge]] = [
        (kernels.linear(x, w.T), lambda y, **options: judge_linear(y, x, w, **options)),
        (kernels.linear(shorter, w), lambda y, **options: judge_linear(y, x, w, **options)),
        (kernels.swiglu(up, gate), lambda y, **options: judge_swiglu(y, gate, up, **options)),
    ]
    for found, judge in cases:
        done, full = judge(found), in_full(monkeypatch, judge, found)
        assert full.explanations
        assert done == full
        assert done.message == full.message


def test_a_mistake_in_a_very_large_output_has_its_name() -> None:
    """The cause is searched in some rows, and each mistake is tried on the same rows."""
    rng = np.random.default_rng(34)
    gate, up = drawn(rng, 700, 500), drawn(rng, 700, 500)
    with pytest.raises(AssertionError, match="gate and up are exchanged"):
        assertions.assert_swiglu(kernels.swiglu(up, gate), gate, up)
    x, positions = drawn(rng, 700, 8, 64), np.arange(700)
    with pytest.raises(AssertionError, match="theta is 500000, not 10000"):
        assertions.assert_rotary(kernels.rotary(x, positions, 5e5), x, positions, 1e4)


def test_errors_that_are_too_large_together_are_found_in_a_part() -> None:
    """No value is wrong by itself. Only the size of all errors shows that they are too large."""
    rng = np.random.default_rng(35)
    x, w = drawn(rng, 40, 256), drawn(rng, 512, 256)
    lengths = np.sqrt((x.astype(float) ** 2).sum(1)[:, None] * (w.astype(float) ** 2).sum(1))
    noise = 0.75 * 2.0**-24 * lengths * rng.standard_normal((40, 512))
    done = judge_linear((x.astype(float) @ w.T.astype(float) + noise).astype(np.float32), x, w, explain=False)
    assert not done
    assert done.headroom <= 1
    assert done.deviations <= done.limit
    assert done.size > 1


def test_the_seed_chooses_the_part() -> None:
    found, judge = linear(np.random.default_rng(36), "float32")
    first, again, other = (judge(found, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert (first.size, first.lean) != (other.size, other.lean)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_the_enclosure_of_some_columns_is_that_of_the_whole(name: str) -> None:
    rng, at = np.random.default_rng(9), np.array([1, 2, 5])
    policy = refmoe.policy(name)
    x, gain = drawn(rng, 7, 24, name=name), drawn(rng, 24, name=name)
    turned = drawn(rng, 5, 8, 16, name=name)
    for call in (
        Norm(x, gain, 1e-5), Norm(x, gain, 1e-5, outside=True), Norm(x, gain, 1e-5, lost=3, stored=False),
        Rotated(turned, np.arange(5), 1e4), Rotated(turned, np.arange(5), 1e4, layout="interleaved"),
    ):  # fmt: skip
        whole, some = call.enclose(EnclosureOps(policy)), call.narrow(at).enclose(EnclosureOps(policy))
        for part in ("mid", "r", "v"):
            assert np.array_equal(getattr(whole, part)[:, at], getattr(some, part)), (call, part)


@pytest.mark.parametrize("rows", [16, 192])
def test_a_wrong_value_outside_the_drawn_columns_is_found(rows: int) -> None:
    """Its row is among the farthest, which are judged in full, and its place is the right one."""
    rng = np.random.default_rng(10)
    x, gain = drawn(rng, rows, 1024), drawn(rng, 1024)
    right = kernels.rms_norm(x, gain, 1e-5)
    assert judge_rms_norm(right, x, gain, 1e-5)[-1].judged < right.size
    for _ in range(8):
        at = int(rng.integers(rows)), int(rng.integers(1024))
        wrong = np.array(right)
        wrong[at] *= 1.001
        found = judge_rms_norm(wrong, x, gain, 1e-5, explain=False)[-1]
        assert found.verdict == "fail"
        assert found.worst is not None
        assert found.worst.where == at
