# SPDX-License-Identifier: Apache-2.0
"""Honest kernels of any shape, layout and dtype pass, and no assertion needs a tolerance for that."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refmoe.testing as assertions
from tests.own_process import with_jax
from tests.testing import kernels
from tests.testing.kernels import DTYPES, drawn

SEEDS = st.integers(0, 2**32 - 1)
NAMES = st.sampled_from(DTYPES)
SCALES = st.sampled_from([1e-4, 1.0, 30.0])
FEW = settings(max_examples=25, deadline=None)


@given(SEEDS, NAMES, st.integers(1, 40), st.integers(1, 70), st.integers(1, 40), SCALES)
@FEW
def test_linear(seed: int, name: str, tokens: int, terms: int, columns: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    x, w = drawn(rng, tokens, terms, name=name, scale=scale), drawn(rng, columns, terms, name=name)
    found = kernels.linear(x, w)
    assertions.assert_linear(found, x, w)
    assertions.assert_linear(found[None], x[None], np.ascontiguousarray(w.T), transposed=True)
    bias = drawn(rng, columns, name=name)
    summed = (kernels.wide(x) @ kernels.wide(w).T + kernels.wide(bias)).astype(x.dtype)
    assertions.assert_linear(summed, x, w, bias=bias)


@given(SEEDS, NAMES, st.integers(0, 40), st.integers(1, 5))
@FEW
def test_grouped_linear(seed: int, name: str, tokens: int, experts: int) -> None:
    rng = np.random.default_rng(seed)
    x, w = drawn(rng, tokens, 24, name=name), drawn(rng, experts, 10, 24, name=name)
    ids = np.sort(rng.integers(0, experts, tokens))
    found = np.array([kernels.linear(x[t : t + 1], w[e])[0] for t, e in enumerate(ids)], x.dtype).reshape(tokens, 10)
    ends = np.cumsum(np.bincount(ids, minlength=experts))
    assertions.assert_grouped_linear(found, x, w, ids=ids, fused="halves")
    assertions.assert_grouped_linear(found, x, w, offsets=ends)
    assertions.assert_grouped_linear(found, x, w, offsets=np.concatenate([[0], ends]))
    one_hot = ids[:, None] == np.arange(experts)
    assertions.assert_grouped_linear(found, x, w.transpose(0, 2, 1), one_hot=one_hot, transposed=True)


def test_rows_of_padding_may_be_anything() -> None:
    rng = np.random.default_rng(0)
    x, w = drawn(rng, 6, 8), drawn(rng, 2, 4, 8)
    found = np.full((6, 4), np.nan, np.float32)
    found[:3], found[3:4] = kernels.linear(x[:3], w[0]), kernels.linear(x[3:4], w[1])
    assert assertions.assert_grouped_linear(found, x, w, offsets=[3, 4]).rows == 4
    assert assertions.assert_grouped_linear(found, x, w, ids=[0, 0, 0, 1, -1, -1]).rows == 4


@given(SEEDS, NAMES, st.integers(1, 40), st.integers(1, 90), SCALES)
@FEW
def test_rms_norm(seed: int, name: str, tokens: int, size: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    x, gain = drawn(rng, tokens, size, name=name, scale=scale), drawn(rng, size, name=name)
    assertions.assert_rms_norm(kernels.rms_norm(x, gain, 1e-5), x, gain, 1e-5)
    other = drawn(rng, tokens, size, name=name, scale=scale)
    total = kernels.wide(x) + kernels.wide(other)
    stored = total.astype(x.dtype)
    for read in (stored, total):  # the norm reads the sum after it is stored, or before
        found = kernels.rms_norm(read, gain, 1e-5).astype(x.dtype)
        assertions.assert_rms_norm(found, x, gain, 1e-5, residual=other, residual_found=stored)


@given(SEEDS, NAMES, st.integers(1, 30), st.integers(1, 4), st.integers(1, 20), st.booleans())
@FEW
def test_rotary(seed: int, name: str, tokens: int, heads: int, half: int, interleaved: bool) -> None:
    rng = np.random.default_rng(seed)
    x, positions = drawn(rng, tokens, heads, 2 * half, name=name), rng.integers(0, 5000, tokens)
    found = kernels.rotary(x, positions, 1e4, interleaved)
    assertions.assert_rotary(found, x, positions, 1e4, layout="interleaved" if interleaved else "halves")


@given(SEEDS, NAMES, st.integers(1, 20), st.integers(0, 20), st.sampled_from([None, 1, 3, 16]), st.sampled_from([1, 2]))
@FEW
def test_attention(seed: int, name: str, tokens: int, cached: int, window: int | None, group: int) -> None:
    rng = np.random.default_rng(seed)
    keys, scale = tokens + cached, None if seed % 2 else 0.2
    q, k, v = (drawn(rng, n, h, d, name=name) for n, h, d in ((tokens, 2 * group, 8), (keys, 2, 8), (keys, 2, 12)))
    far = np.arange(cached, keys)[:, None] - np.arange(keys)
    found, logs = kernels.attention(q, k, v, (far >= 0) & (far < (window or keys)), scale)
    assertions.assert_attention(found, q, k, v, window=window, scale=scale, log_sum_exp=logs)
    by_head = [each.swapaxes(0, 1) for each in (found, q, k, v)]
    assertions.assert_attention(*by_head, window=window, scale=scale, layout="heads")
    everything, _ = kernels.attention(q, k, v, np.ones((tokens, keys), bool), scale)
    assertions.assert_attention(everything, q, k, v, causal=False, scale=scale)


@pytest.mark.parametrize("name", DTYPES)
def test_attention_of_a_batch_over_caches_of_different_lengths(name: str) -> None:
    rng = np.random.default_rng(3)
    lengths, keys = np.array([5, 9, 1]), 12
    q, k, v = drawn(rng, 3, 1, 4, 8, name=name), *(drawn(rng, 3, keys, 2, 8, name=name) for _ in range(2))
    k[:, 9:], v[:, 9:] = np.nan, np.nan
    found = np.stack(
        [kernels.attention(q[b], k[b, :n], v[b, :n], np.ones((1, n), bool))[0] for b, n in enumerate(lengths)]
    )
    assertions.assert_attention(found, q, k, v, lengths=lengths)
    assertions.assert_attention(found, q, k, v, lengths=lengths, positions=lengths[:, None] - 1)


@given(SEEDS, NAMES, st.integers(1, 40), st.integers(1, 60), SCALES)
@FEW
def test_swiglu(seed: int, name: str, tokens: int, size: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    gate, up = (drawn(rng, tokens, size, name=name, scale=scale) for _ in range(2))
    found = kernels.swiglu(gate, up)
    assertions.assert_swiglu(found, gate, up)
    assertions.assert_swiglu(found, np.concatenate([gate, up], 1), fused="halves")
    assertions.assert_swiglu(found, np.stack([gate, up], 2).reshape(tokens, -1), fused="interleaved")


@given(SEEDS, NAMES, st.integers(0, 24), st.integers(1, 6), st.data())
@FEW
def test_combine_and_moe(seed: int, name: str, tokens: int, experts: int, data: Any) -> None:
    rng, k = np.random.default_rng(seed), data.draw(st.integers(1, experts))
    arrays = kernels.layer(rng, tokens, 20, 12, experts, k, name)
    x, gate, up, down, ids, weights = arrays
    ids[rng.random(ids.shape) < 0.2] = -1  # experts of another rank
    found = kernels.moe(*arrays)
    assertions.assert_moe(found, *arrays)
    both = np.concatenate([gate, up], 1)
    assertions.assert_moe(found, x, both, None, down, ids, weights, fused="halves")
    turned = np.stack([gate, up], 2).reshape(experts, -1, 20).transpose(0, 2, 1)
    swapped = down.transpose(0, 2, 1)
    assertions.assert_moe(found, x, turned, None, swapped, ids, weights, fused="interleaved", transposed=True)
    outputs = drawn(rng, tokens, k, 20, name=name)
    outputs[ids < 0] = np.nan
    summed = kernels.combine(np.where((ids >= 0)[..., None], outputs, 0), np.where(ids >= 0, weights, 0))
    assertions.assert_combine(summed.astype(x.dtype), outputs, ids, weights)


def test_an_expert_that_nobody_chose_may_be_anything() -> None:
    x, gate, up, down, ids, weights = kernels.layer(np.random.default_rng(1), 9, 16, 8, 4, 2, "float32")
    ids = ids % 3
    found = kernels.moe(x, gate, up, down, ids, weights)
    for array in (gate, up, down):
        array[3] = np.nan
    assertions.assert_moe(found, x, gate, up, down, ids, weights)


@given(SEEDS, NAMES, st.integers(1, 40), st.integers(1, 8), st.data())
@FEW
def test_router(seed: int, name: str, tokens: int, experts: int, data: Any) -> None:
    rng, k = np.random.default_rng(seed), data.draw(st.integers(1, experts))
    logits = drawn(rng, tokens, experts, name=name, scale=3)
    if seed % 2:
        logits = np.rint(logits.astype(np.float32)).astype(logits.dtype)  # ties
    y = kernels.wide(logits)
    order = np.argsort(rng.random((tokens, experts)), 1)  # of equal logits, any
    shuffled = np.take_along_axis(y, order, 1)
    ids = np.take_along_axis(order, np.argsort(-shuffled, 1, kind="stable")[:, :k], 1)
    chosen = np.take_along_axis(y, ids, 1)
    assertions.assert_router(ids, softmax_of(chosen), logits)
    all_ = np.take_along_axis(softmax_of(y), ids, 1)
    assertions.assert_router(ids, all_, logits, order="softmax-then-top-k", renormalise=False)
    shares = all_ / all_.sum(1, keepdims=True)
    assertions.assert_router(ids, shares, logits, order="softmax-then-top-k")
    assertions.assert_router(ids[:, ::-1], 2.5 * shares[:, ::-1], logits, order="softmax-then-top-k", scale=2.5)


softmax_of = kernels.softmax


@given(SEEDS, st.sampled_from([(1, 1), (4, 2), (8, 3)]))
@FEW
def test_a_router_of_sigmoids_with_bias_and_groups(seed: int, groups: tuple[int, int]) -> None:
    rng, (count, some) = np.random.default_rng(seed), groups
    logits, bias = drawn(rng, 30, 16), drawn(rng, 16)
    scores = 1 / (1 + np.exp(-logits))
    biased = scores + bias
    best = np.sort(biased.reshape(30, count, -1), 2)[:, :, -2:].sum(2)
    inside = np.zeros((30, count), bool)
    np.put_along_axis(inside, np.argsort(-best, 1)[:, :some], True, 1)
    shown = np.where(np.repeat(inside, 16 // count, 1), biased, -np.inf)
    ids = np.argsort(-shown, 1)[:, :4]
    weights = np.take_along_axis(scores, ids, 1)
    weights = weights / (weights.sum(1, keepdims=True) + np.float32(1e-20)) * np.float32(2.5)
    assertions.assert_router(ids, weights, logits, order="sigmoid", bias=bias, groups=groups, scale=2.5, epsilon=1e-20)


@pytest.mark.engines
@pytest.mark.parametrize("name", DTYPES)
def test_torch(name: str) -> None:
    torch: Any = pytest.importorskip("torch")
    import torch.nn.functional as F

    torch.manual_seed(0)
    dtype = getattr(torch, name)
    x, w, b = torch.randn(64, 256, dtype=dtype), torch.randn(96, 256, dtype=dtype), torch.randn(96, dtype=dtype)
    assertions.assert_linear(F.linear(x, w), x, w)
    assertions.assert_linear(F.linear(x, w, b), x, w, bias=b)
    gain = torch.rand(256, dtype=dtype)
    assertions.assert_rms_norm(F.rms_norm(x, (256,), gain, 1e-5), x, gain, 1e-5)
    assertions.assert_swiglu(F.silu(x) * x.flip(0), x, x.flip(0))
    q, k, v = (torch.randn(2, h, n, 32, dtype=dtype) for h, n in ((8, 24), (2, 40), (2, 40)))
    mask = torch.ones(24, 40, dtype=torch.bool).tril(16)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assertions.assert_attention(mixed, q, k, v, layout="heads")
    logits = torch.randn(64, 8, dtype=dtype)
    probabilities = torch.softmax(logits, -1, dtype=torch.float64 if name == "float64" else torch.float32)
    weights, ids = probabilities.topk(2)
    weights = (weights / weights.sum(-1, keepdim=True)).to(dtype)
    assertions.assert_router(ids, weights, logits, order="softmax-then-top-k")


def jax_kernels() -> None:
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0), 4)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        x, w = jax.random.normal(keys[0], (40, 64), dtype), jax.random.normal(keys[1], (4, 24, 64), dtype)
        sizes = jnp.array([10, 0, 25, 5])
        found = jax.lax.ragged_dot(x, w.transpose(0, 2, 1), sizes)
        assertions.assert_grouped_linear(found, x, w, offsets=jnp.cumsum(sizes))
        assertions.assert_linear(x @ w[0].T, x, w[0])
        gate, up = jax.random.normal(keys[2], (2, 40, 64), dtype)
        # JAX computes the sigmoid of a narrow dtype in that dtype
        policy = f"{gate.dtype}+expert.silu.accumulation={gate.dtype}"
        assertions.assert_swiglu(jax.nn.silu(gate) * up, gate, up, policy=policy)


def test_jax() -> None:
    with_jax(jax_kernels)
