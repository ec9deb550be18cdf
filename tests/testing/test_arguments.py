# SPDX-License-Identifier: Apache-2.0
"""Bad arguments get one sentence, and arrays of every library and layout are taken as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import refmoe.testing as assertions
from refmoe import InputError
from refmoe.testing.products import judge_linear
from tests.cuda.strict import DeviceArray
from tests.own_process import with_jax
from tests.testing import kernels
from tests.testing.kernels import drawn

RNG = np.random.default_rng(1)
X, W = drawn(RNG, 6, 8), drawn(RNG, 4, 8)
Y = kernels.linear(X, W)
GROUPS = drawn(RNG, 3, 4, 8)
LAYER = kernels.layer(RNG, 6, 8, 4, 3, 2, "float32")
OUT = kernels.moe(*LAYER)
IDS, WEIGHTS = LAYER[4:]
LOGITS = drawn(RNG, 6, 3)
HEADS = drawn(RNG, 6, 2, 8)

BAD: dict[str, Callable[[], Any]] = {
    "an option that is none": lambda: assertions.assert_linear(Y, X, W, atol=1e-3),  # type: ignore[call-arg]
    "columns that do not fit": lambda: assertions.assert_linear(Y, X, W[:, :7]),
    "an output of another size": lambda: assertions.assert_linear(Y[:, :3], X, W),
    "a number for an array": lambda: assertions.assert_linear(Y, 3, W),
    "a vector for a matrix": lambda: assertions.assert_linear(Y, X, W[0]),
    "integers for real numbers": lambda: assertions.assert_linear(Y, X.astype(int), W),
    "a complex array": lambda: assertions.assert_linear(Y, X.astype(complex), W),
    "no array": lambda: assertions.assert_linear(Y, None, W),
    "an unknown policy": lambda: assertions.assert_linear(Y, X, W, policy="float31"),
    "a number for a policy": lambda: assertions.assert_linear(Y, X, W, policy=16),  # type: ignore[arg-type]
    "rows that are no rows": lambda: assertions.assert_linear(Y, X, W, rows=[9]),
    "negative rows": lambda: assertions.assert_linear(Y, X, W, rows=-2),
    "rows that are a text": lambda: assertions.assert_linear(Y, X, W, rows="all"),  # type: ignore[arg-type]
    "a seed that is none": lambda: assertions.assert_linear(Y, X, W, rows=2, seed=-1),
    "a significance above 1": lambda: assertions.assert_linear(Y, X, W, significance=2),
    "a flag that is none": lambda: assertions.assert_linear(Y, X, W, transposed="yes"),  # type: ignore[arg-type]
    "a bias that does not fit": lambda: assertions.assert_linear(Y, X, W, bias=X[0]),
    "no experts": lambda: assertions.assert_grouped_linear(Y, X, GROUPS),
    "experts twice": lambda: assertions.assert_grouped_linear(Y, X, GROUPS, ids=IDS[:, 0], offsets=[1, 2, 6]),
    "an expert that is none": lambda: assertions.assert_grouped_linear(Y, X, GROUPS, ids=[0, 1, 2, 3, 0, 0]),
    "falling offsets": lambda: assertions.assert_grouped_linear(Y, X, GROUPS, offsets=[3, 2, 6]),
    "offsets beyond the rows": lambda: assertions.assert_grouped_linear(Y, X, GROUPS, offsets=[3, 4, 7]),
    "offsets of other experts": lambda: assertions.assert_grouped_linear(Y, X, GROUPS, offsets=[3, 6]),
    "two experts in a row": lambda: assertions.assert_grouped_linear(Y, X, GROUPS, one_hot=np.ones((6, 3), int)),
    "an unknown order": lambda: assertions.assert_grouped_linear(Y, X, GROUPS, ids=IDS[:, 0], fused="both"),  # type: ignore[arg-type]
    "eps that is no number": lambda: assertions.assert_rms_norm(X, X, X[0], float("nan")),
    "a residual alone": lambda: assertions.assert_rms_norm(X, X, X[0], 1e-5, residual=X),
    "an odd head": lambda: assertions.assert_rotary(HEADS[..., :7], HEADS[..., :7], np.arange(6), 1e4),
    "a negative position": lambda: assertions.assert_rotary(HEADS, HEADS, -np.arange(6), 1e4),
    "other positions": lambda: assertions.assert_rotary(HEADS, HEADS, np.arange(5), 1e4),
    "theta of 0": lambda: assertions.assert_rotary(HEADS, HEADS, np.arange(6), 0.0),
    "heads that do not share": lambda: assertions.assert_attention(HEADS[:, :1], HEADS[:, :1], HEADS, HEADS),
    "a window without a mask": lambda: assertions.assert_attention(HEADS, HEADS, HEADS, HEADS, causal=False, window=3),
    "a window of 0": lambda: assertions.assert_attention(HEADS, HEADS, HEADS, HEADS, window=0),
    "too long": lambda: assertions.assert_attention(HEADS[None], HEADS[None], HEADS[None], HEADS[None], lengths=[7]),
    "up twice": lambda: assertions.assert_swiglu(X, np.hstack([X, X]), X, fused="halves"),
    "half a gate": lambda: assertions.assert_swiglu(X[:, :3], X[:, :7], fused="halves"),
    "no up": lambda: assertions.assert_swiglu(X, X),
    "k above E": lambda: assertions.assert_router(np.tile(IDS, 2), np.tile(WEIGHTS, 2), LOGITS),
    "a softmax that is not normalised": lambda: assertions.assert_router(IDS, WEIGHTS, LOGITS, renormalise=False),
    "groups that do not divide": lambda: assertions.assert_router(IDS, WEIGHTS, LOGITS, groups=(2, 1)),
    "groups that are no pair": lambda: assertions.assert_router(IDS, WEIGHTS, LOGITS, groups=3),  # type: ignore[arg-type]
    "real ids": lambda: assertions.assert_router(WEIGHTS, WEIGHTS, LOGITS),
    "an expert beyond the matrices": lambda: assertions.assert_moe(OUT, *LAYER[:4], IDS + 1, WEIGHTS),
    "an expert below -1": lambda: assertions.assert_moe(OUT, *LAYER[:4], IDS - 2, WEIGHTS),
    "matrices that are turned": lambda: assertions.assert_moe(OUT, *LAYER, transposed=True),
    "gate and up in one and two": lambda: assertions.assert_moe(OUT, *LAYER, fused="halves"),
    "outputs of other slots": lambda: assertions.assert_combine(OUT, OUT, IDS, WEIGHTS),
    "a table of another size": lambda: assertions.assert_permutation([0, 1], [[0], [1]], counts=[1]),
    "rows without x": lambda: assertions.assert_permutation([0, 1], [[0], [1]], rows=X[:2]),
    "rows of another dtype": lambda: assertions.assert_unpermutation(X, X.astype(np.float64), np.arange(6)),
    "a slot twice": lambda: assertions.assert_unpermutation(X, X, [0, 0, 1, 2, 3, 4]),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_bad_argument_is_one_sentence(mistake: str) -> None:
    with pytest.raises(InputError) as error:
        BAD[mistake]()
    text = str(error.value)
    assert "\n" not in text
    assert "expected" in text or "but" in text


def test_arrays_may_have_any_strides() -> None:
    wide = np.zeros((12, 16), np.float32)
    wide[::2, ::2] = X
    assert assertions.assert_linear(Y[::-1], X[::-1], W)
    assert assertions.assert_linear(np.asfortranarray(Y), wide[::2, ::2], W.T.copy().T)
    assert assertions.assert_linear(Y, X.astype(">f4"), W)
    assert assertions.assert_linear(Y, np.broadcast_to(X, (1, 6, 8))[0], W)


@pytest.mark.engines
def test_tensors_of_torch() -> None:
    torch: Any = pytest.importorskip("torch")
    x, w = torch.randn(6, 8, dtype=torch.bfloat16, requires_grad=True), torch.randn(4, 8, dtype=torch.bfloat16)
    assert assertions.assert_linear(x @ w.T, x, w).policy == "bfloat16"
    ids = torch.tensor([0, 2, 1, 0, 1, 2], dtype=torch.int32)
    stacked = torch.stack([w, -w, 2 * w])
    found = torch.einsum("tk,tnk->tn", x.float(), stacked[ids].float()).bfloat16()
    assertions.assert_grouped_linear(found, x, stacked, ids=ids)
    assertions.assert_grouped_linear(found, x, stacked, one_hot=torch.nn.functional.one_hot(ids.long(), 3).bool())


def arrays_of_jax() -> None:
    import jax.numpy as jnp

    x, w = jnp.asarray(X, jnp.bfloat16), jnp.asarray(W, jnp.bfloat16)
    assert assertions.assert_linear(x @ w.T, x, w).policy == "bfloat16"
    one_hot = jnp.arange(3) == jnp.array([0, 1, 2, 0, 1, 2])[:, None]
    found = jnp.einsum("tk,tnk->tn", x, jnp.stack([w, -w, 2 * w])[jnp.arange(6) % 3])
    assertions.assert_grouped_linear(found, x, jnp.stack([w, -w, 2 * w]), one_hot=one_hot)


def test_arrays_of_jax() -> None:
    with_jax(arrays_of_jax)


def test_arrays_of_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device array that cannot be converted implicitly, as CuPy's cannot."""

    class Array(DeviceArray):
        def get(self) -> Any:
            return self.values

    Array.__module__ = "cupy"
    assert assertions.assert_linear(Array(Y), Array(X), Array(W))


def test_the_policy_follows_from_the_arrays() -> None:
    narrow = [each.astype(kernels.dtype("bfloat16")) for each in (X, W)]
    accumulator = kernels.wide(narrow[0]) @ kernels.wide(narrow[1]).T
    assert assertions.assert_linear(accumulator, *narrow).policy.startswith("bfloat16")
    rounded = accumulator.astype(kernels.dtype("bfloat16"))
    assert assertions.assert_linear(rounded, *narrow).policy == "bfloat16"
    with pytest.raises(AssertionError):  # the accumulator was rounded after all
        assertions.assert_linear(kernels.wide(rounded), *narrow)
    assert assertions.assert_linear(Y, X, W, policy="hf-float32").policy == "hf-float32"


def test_a_kernel_may_round_wider_inputs_to_its_own_dtype() -> None:
    x, w = RNG.standard_normal((40, 8)), RNG.standard_normal((4, 8))
    gain = RNG.random(8)
    narrow = [each.astype(np.float32) for each in (x, w, gain)]
    assertions.assert_linear(kernels.linear(*narrow[:2]), x, w)
    assertions.assert_rms_norm(kernels.rms_norm(narrow[0], narrow[2], 1e-5), x, gain, 1e-5)
    assertions.assert_swiglu(kernels.swiglu(narrow[0], narrow[0]), x, x)


def test_some_rows() -> None:
    wrong = np.array(Y)
    wrong[4] = 0
    assert assertions.assert_linear(wrong, X, W, rows=[0, 1, 5, 5]).rows == 3
    with pytest.raises(AssertionError, match="row 4"):
        assertions.assert_linear(wrong, X, W, rows=[1, 4])
    drawn_rows = [judge_linear(wrong, X, W, rows=2, seed=seed, explain=False).verdict for seed in range(20)]
    assert {*drawn_rows} == {"pass", "fail"}
    again = [judge_linear(wrong, X, W, rows=2, seed=seed, explain=False).verdict for seed in range(20)]
    assert drawn_rows == again


def test_nothing_to_judge_passes() -> None:
    assert assertions.assert_linear(Y[:0], X[:0], W).values == 0
    assert assertions.assert_moe(OUT[:0], LAYER[0][:0], *LAYER[1:4], IDS[:0], WEIGHTS[:0])
    assert assertions.assert_router(IDS[:0], WEIGHTS[:0], LOGITS[:0])


def test_a_row_that_is_not_a_number_is_not_judged_and_hides_no_other() -> None:
    x = np.array(X)
    x[2] = np.nan
    found = kernels.linear(x, W)
    judged = assertions.assert_linear(found, x, W)
    assert (judged.undecided, judged.values) == (4, 24)
    found[3, 1] += 1
    with pytest.raises(AssertionError, match="row 3, column 1"):
        assertions.assert_linear(found, x, W)
