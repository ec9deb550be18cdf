# SPDX-License-Identifier: Apache-2.0
"""oneMKL: exact for integers, as near as float32 allows elsewhere, and no write outside the result."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmoe.arithmetic.arrays import Array
from refmoe.arithmetic.native import mkl, mkl_ops
from refmoe.arithmetic.native.mkl import Mkl, load_mkl
from refmoe.arithmetic.native.mkl_ops import MklOps, PackedWeights, sliced
from refmoe.arithmetic.native.ops import SIDE_BY_SIDE, NativeOps, Part
from refmoe.checkpoints.names import build_parameters, named_weights
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.checkpoints.weight import BFLOAT16, Weight
from refmoe.cuda.place import CPU, Place
from refmoe.errors import InputError
from refmoe.spec.config import Config
from refmoe.spec.model import Model, Steps, forward
from refmoe.steps.native import NATIVE_STEPS
from tests.machine import needs_mkl

DTYPES = [np.dtype(np.float32), np.dtype(np.float64), BFLOAT16]


@pytest.fixture
def library() -> Mkl:
    return load_mkl()


def stored(matrix: Array) -> Weight:
    return Weight(name="w", shape=matrix.shape, dtype=matrix.dtype, source=lambda: matrix, origin="w")


# ---- the library


@needs_mkl
@given(
    st.sampled_from(DTYPES), st.integers(1, 70), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.booleans(),
    st.sampled_from(["dense", "rows apart", "transposed", "backwards"]), st.integers(0, 99),
)  # fmt: skip
def test_products_of_integers_are_exact(
    dtype: Any, rows: int, m: int, n: int, packed: bool, alone: bool, layout: str, seed: int
) -> None:
    """Packed or not, by one thread or all. Memory beside the result does not change."""
    library, rng = load_mkl(), np.random.default_rng(seed)
    x, matrix = (rng.integers(-8, 9, shape).astype(dtype) for shape in ((rows, n), (m, n)))
    expected = x.astype(np.int64) @ matrix.astype(np.int64).T
    layouts: dict[str, Callable[[], Array]] = {
        "dense": lambda: matrix,
        "rows apart": lambda: np.concatenate([matrix, matrix], axis=1)[:, :n],
        "transposed": lambda: np.ascontiguousarray(matrix.T).T,
        "backwards": lambda: np.ascontiguousarray(matrix[::-1])[::-1],
    }
    room = np.full((rows, m + 2), 99, np.float64 if dtype == np.float64 else np.float32)
    out = room[:, 1:-1]
    if packed:
        library.packed_product(x, library.pack(layouts[layout]()), out)
    elif alone:
        with library.one_thread():
            library.product(x, layouts[layout](), out)
    else:
        library.product(x, layouts[layout](), out)
    np.testing.assert_array_equal(out, expected)
    assert (room[:, [0, -1]] == 99).all()


@needs_mkl
def test_what_would_leave_its_memory_is_refused(library: Mkl) -> None:
    x, matrix, out = np.ones((3, 4), np.float32), np.ones((5, 4), np.float32), np.ones((3, 5), np.float32)
    packed = library.pack(matrix)
    for product, weight in ((library.product, matrix), (library.packed_product, packed)):
        with pytest.raises(TypeError, match="a product of float64 and float32"):
            product(x.astype(np.float64), weight, out)
        with pytest.raises(TypeError, match="as float64"):
            product(x, weight, out.astype(np.float64))
        for wrong in ((x[:2], out), (x[:, :3], out), (x, out[:, :4]), (x, np.ones((3, 10), np.float32)[:, ::2])):
            with pytest.raises(ValueError, match="a product of"):
                product(wrong[0], weight, wrong[1])


@needs_mkl
def test_one_thread_is_taken_back(library: Mkl) -> None:
    threads = library._library.MKL_Get_Max_Threads
    library.set_threads(2)
    assert threads() == 2
    with library.one_thread():
        assert threads() == 1
    assert threads() == 2


def test_without_the_package_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(mkl, "files", absent)
    monkeypatch.setattr(mkl, "find_library", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'refmoe\[mkl\]'"):
        load_mkl.__wrapped__()


def test_a_library_that_cannot_be_loaded_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mkl, "files", lambda name: [])
    monkeypatch.setattr(mkl, "find_library", lambda name: "/nowhere/libmkl_rt.so")
    with pytest.raises(InputError, match=r"oneMKL cannot be loaded: .*nowhere"):
        load_mkl.__wrapped__()


# ---- slices


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9))
def test_slices_add_up_to_the_value(values: list[float]) -> None:
    """The sum is exact where the last bit of the value is a bfloat16: above 2^-109, below the largest bfloat16."""
    x = np.array([[v for v in values if 2.0**-109 <= abs(v) <= 3.3e38 or v == 0]], np.float32)
    slices = sliced(x)
    assert slices.dtype == BFLOAT16
    np.testing.assert_array_equal(slices.astype(np.float64).sum(axis=0), x)


# ---- ops


@pytest.fixture(params=["slices", "float32"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Multiply bfloat16 weights by slices, on any processor, or convert them."""
    monkeypatch.setattr(mkl_ops, "multiplies_bfloat16", lambda: request.param == "slices")
    monkeypatch.setattr(mkl_ops, "LARGE", 0)
    return str(request.param)


@needs_mkl
@pytest.mark.parametrize("rows", [1, 2, SIDE_BY_SIDE - 1, SIDE_BY_SIDE, 70])
@pytest.mark.parametrize("packed_bytes", [0, 1 << 30])
def test_a_product_is_as_near_as_float32_allows(ways: str, rows: int, packed_bytes: int) -> None:
    """The first product and those with packed weights are within n units of the sum of the absolute terms."""
    rng = np.random.default_rng(rows)
    ops, n = MklOps(np.float32, packed_bytes=packed_bytes), 300
    matrices = [rng.standard_normal((m, n)).astype(np.float32).astype(BFLOAT16) for m in (5, 64, 33)]
    x = (rng.standard_normal((rows, n)) * 2.0 ** rng.integers(-20, 20, (rows, 1))).astype(np.float32)
    parts = [Part(stored(matrices[0])), Part(stored(matrices[1]), slice(8, 40)), Part(stored(matrices[2]))]
    wide = np.concatenate([matrices[0], matrices[1][8:40], matrices[2]]).astype(np.float64)
    exact, terms = x.astype(np.float64) @ wide.T, np.abs(x).astype(np.float64) @ np.abs(wide).T
    factor = ops.ready(x)
    for _ in range(3):
        out = np.full((rows, len(wide)), np.nan, np.float32)
        ops.multiply(factor, parts, out)
        assert (np.abs(out - exact) <= n * np.finfo(np.float32).eps * terms).all()


@needs_mkl
@pytest.mark.parametrize("calls", [(1, 1, 1), (40, 1, 1), (7, 40, 1)])
@pytest.mark.parametrize("upcast_bytes", [1 << 30, 1 << 12])
def test_the_model_is_the_spec(ways: str, calls: tuple[int, ...], upcast_bytes: int) -> None:
    """The distance from float64 is at most twice that of NumPy's float32, also where weights are streamed."""
    config = Config(
        dim=64, layers=2, heads=8, kv_heads=2, head_dim=16, hidden_dim=96, vocab=50, experts=4, experts_per_token=2
    )
    parameters = in_bfloat16(config)
    exact = logits(NativeOps(np.float64), Model(config, parameters, Steps()), calls)
    plain = logits(NativeOps(np.float32), Model(config, parameters, NATIVE_STEPS), calls)
    ops = MklOps(np.float32, upcast_bytes=upcast_bytes)
    limit = 2 * np.abs(plain - exact).max()
    for _ in range(3):  # with packed weights from the second time on
        assert np.abs(logits(ops, Model(config, parameters, NATIVE_STEPS), calls) - exact).max() < limit


@needs_mkl
def test_float64_is_float64() -> None:
    config = Config(
        dim=64, layers=2, heads=8, kv_heads=2, head_dim=16, hidden_dim=96, vocab=50, experts=4, experts_per_token=2
    )
    ops, model = MklOps(np.float64), Model(config, in_bfloat16(config), NATIVE_STEPS)
    exact = logits(NativeOps(np.float64), Model(config, model.parameters, Steps()), (40, 1))
    for _ in range(3):
        np.testing.assert_allclose(logits(ops, model, (40, 1)), exact, rtol=0, atol=1e-11)


def in_bfloat16(config: Config) -> Any:
    """The formula's weights, stored as published checkpoints store theirs."""
    formula = named_weights(synthetic_checkpoint(config, 1).parameters)
    return build_parameters(config, lambda name: stored(formula[name].read().astype(BFLOAT16)))


def logits(ops: NativeOps, model: Model, calls: tuple[int, ...]) -> Array:
    """Logits [T, V] of tokens. calls: tokens per call"""
    caches, past, found = None, 0, []
    for count in calls:
        positions = np.arange(past, past + count)
        new, caches = forward(ops, model, positions % model.config.vocab, positions, caches)
        found.append(new.astype(np.float64))
        past += count
    return np.concatenate(found)


# ---- packed weights


@needs_mkl
def test_a_weight_is_packed_when_it_comes_again(library: Mkl) -> None:
    weights = PackedWeights(1 << 30)
    matrix = np.ones((4, 8), np.float32)
    part = Part(stored(matrix), slice(0, 2))
    assert weights.get([part], None, lambda: library.pack(matrix)) is None
    packed = weights.get([part], None, lambda: library.pack(matrix))
    assert packed is not None
    assert weights.get([part], None, lambda: pytest.fail("packed twice")) is packed
    assert weights.get([Part(part.weight, slice(2, 4))], None, lambda: library.pack(matrix)) is None  # another part
    assert weights.get([part], "otherwise", lambda: library.pack(matrix)) is None
    assert weights.left == (1 << 30) - packed.buffer.nbytes


@needs_mkl
def test_what_has_no_room_is_not_packed(library: Mkl) -> None:
    weights, matrix = PackedWeights(100), np.ones((4, 8), np.float32)
    for _ in range(3):
        assert weights.get([Part(stored(matrix))], None, lambda: library.pack(matrix)) is None


# ---- where it is asked for


def test_mkl_is_refused_on_a_gpu() -> None:
    with pytest.raises(InputError, match=r"--blas mkl multiplies on the CPU, but --device is cuda"):
        Place("cuda").native(np.float32, blas="mkl")
    assert isinstance(CPU.native(np.float32), NativeOps)
