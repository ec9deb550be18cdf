# SPDX-License-Identifier: Apache-2.0
"""Arrays of every library, at their own dtype."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refmoe import InputError
from refmoe.api.arrays import to_numpy
from tests.cuda.strict import DeviceArray
from tests.own_process import with_jax

VALUES = np.array([[1.0, -2.5, 3.0], [0.5, 0.0, 7.0]])


def same(found: Any, dtype: str, expected: Any = VALUES) -> None:
    assert isinstance(found, np.ndarray)
    assert str(found.dtype) == dtype
    assert np.array_equal(found.astype(np.float64), expected)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_numpy(dtype: str) -> None:
    array = VALUES.astype(np.dtype(dtype))
    found = to_numpy(array, "x")
    same(found, dtype)
    assert np.shares_memory(found, array)


def test_numpy_of_the_other_byte_order_and_subclasses() -> None:
    same(to_numpy(VALUES.astype(">f4"), "x"), "float32")
    same(to_numpy(np.ma.masked_array(VALUES), "x"), "float64")
    same(to_numpy(VALUES.tolist(), "x"), "float64")
    same(to_numpy(VALUES.T[::-1], "x"), "float64", VALUES.T[::-1])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint64", ">i4"])
def test_integers_become_int64(dtype: str) -> None:
    same(to_numpy(np.array([3, 0]).astype(dtype), "x"), "int64", [3, 0])


@pytest.mark.engines
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_torch(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.tensor(VALUES, dtype=getattr(torch, dtype))
    same(to_numpy(tensor, "x"), dtype)
    same(to_numpy(tensor.clone().requires_grad_(), "x"), dtype)
    same(to_numpy(torch.nn.Parameter(tensor), "x"), dtype)
    same(to_numpy(tensor.T, "x"), dtype, VALUES.T)
    same(to_numpy(tensor[:, ::2], "x"), dtype, VALUES[:, ::2])
    same(to_numpy(tensor[:1].expand(4, 3), "x"), dtype, np.repeat(VALUES[:1], 4, axis=0))
    negated = torch.view_as_complex(torch.ones(3, 2)).conj().imag  # only a bit says so
    same(to_numpy(negated, "x"), "float32", [-1] * 3)
    with torch.inference_mode():
        same(to_numpy(tensor * 1, "x"), dtype)


@pytest.mark.engines
@pytest.mark.gpu
def test_torch_on_a_gpu() -> None:
    torch = pytest.importorskip("torch")
    same(to_numpy(torch.tensor(VALUES, dtype=torch.bfloat16, device="cuda"), "x"), "bfloat16")


@pytest.mark.engines
def test_a_subclass_of_a_tensor() -> None:
    torch = pytest.importorskip("torch")

    class Mine(torch.Tensor):  # type: ignore[misc]
        pass

    same(to_numpy(torch.tensor(VALUES, dtype=torch.bfloat16).as_subclass(Mine), "x"), "bfloat16")


@pytest.mark.engines
def test_tensors_without_values_are_refused() -> None:
    torch = pytest.importorskip("torch")
    hostile = [
        torch.ones(3, device="meta"), torch.ones(2, 2).to_sparse(), torch.ones(3, dtype=torch.complex64),
        torch.ones(3, dtype=torch.bool), torch.ones(3).to(torch.float8_e4m3fn),
    ]  # fmt: skip
    for tensor in hostile:
        with pytest.raises(InputError, match=r"^x: "):
            to_numpy(tensor, "x")


def arrays_of_jax() -> None:
    import jax
    import jax.numpy as jnp

    for dtype in ("float32", "float16", "bfloat16"):
        same(to_numpy(jnp.asarray(VALUES, dtype=dtype), "x"), dtype)
    with pytest.raises(InputError, match=r"^x: "):
        jax.jit(lambda x: to_numpy(x, "x"))(1.0)


def test_arrays_of_jax() -> None:
    """Each dtype; an array that is only traced has no values."""
    with_jax(arrays_of_jax)


def test_cupy_is_asked_for_its_copy() -> None:
    """The stand-in refuses implicit conversion, as CuPy does."""

    class Array(DeviceArray):
        pass

    Array.__module__ = "cupy"
    same(to_numpy(Array(VALUES.astype(ml_dtypes.bfloat16)), "x"), "bfloat16")


def test_mlx() -> None:
    mx = pytest.importorskip("mlx.core")
    same(to_numpy(mx.array(VALUES.tolist(), dtype=mx.bfloat16), "x"), "bfloat16")
    same(to_numpy(mx.array(VALUES.tolist()), "x"), "float32")


class Hostile:
    def __array__(self, *_: Any, **__: Any) -> Any:
        raise KeyError("mine")


@pytest.mark.parametrize(
    "value",
    [
        None, "text", b"bytes", {"a": 1}, [[1.0], [1.0, 2.0]], [1.0, None], True, [True], 1j, object(), Hostile(),
        {1, 2}, np.array(["a"]), np.zeros(2, np.longdouble),
        np.zeros(2, ml_dtypes.float8_e4m3fn), np.zeros(2, "V2"),
        np.zeros(2, "datetime64[s]"), np.array([1 << 63], np.uint64), np.zeros(1, [("a", "f4")]), range, iter([1.0]),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_anything_else_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"^x: "):
        to_numpy(value, "x")
