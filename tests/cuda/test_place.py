# SPDX-License-Identifier: Apache-2.0
"""Ops by the name of a device: over a strict stand-in for CuPy they equal the CPU's, exact ops to the bit."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from refmoe.arithmetic.exact.slices import on_host
from refmoe.cuda import cupy_ops, device
from refmoe.cuda.cupy_ops import Stored, from_device
from refmoe.cuda.place import CPU, Place
from refmoe.errors import InputError
from refmoe.spec.model import Model, forward
from refmoe.steps.grouped import GROUPED_STEPS
from refmoe.steps.native import NATIVE_STEPS
from refmoe.traces.trace import Recorder
from tests.cuda.on_cpu import needs_compiler
from tests.cuda.strict import DeviceArray, StrictCupy, install
from tests.models import SMALL, random_model, relative_rms

CUDA = Place("cuda")
TOKENS = [3, 1, 4, 1, 5, 9, 2]


def recorded(place: Place, dtype: str, model: Model) -> dict[str, Any]:
    """Every tap of a prefill and of one more token."""
    recorder = Recorder()
    ops = place.arithmetic(dtype, recorder)
    first, caches = len(TOKENS) - 1, None
    for run, piece in (("prefill", slice(0, first)), ("decode", slice(first, None))):
        recorder.run = run
        positions = ops.integers(range(len(TOKENS))[piece])
        _, caches = forward(ops, model, ops.integers(TOKENS[piece]), positions, caches)
    return recorder.arrays


def test_exact_ops_have_the_same_bits_in_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    model = random_model()
    expected, found = recorded(CPU, "exact", model), recorded(CUDA, "exact", model)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert values.dtype == expected[name].dtype, name
        assert values.tobytes() == expected[name].tobytes(), name


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_native_ops_compute_the_model_in_every_place(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    install(monkeypatch)
    model = random_model()
    expected, found = (
        recorded(CPU, dtype, model),
        recorded(CUDA, dtype, Model(SMALL, model.parameters, CUDA.steps(dtype))),
    )
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert values.dtype == (np.int32 if values.dtype == np.int32 else expected[name].dtype)
        assert relative_rms(values, expected[name]) < 1e-4, name


def test_equal_logits_go_to_the_lower_id_even_of_zeros_with_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """ROUTE-3, though a sort by bits would put -0 first."""
    install(monkeypatch)
    ops = CUDA.exact()
    seen: list[Any] = []
    ops.xp.argsort = lambda x, **how: (seen.append(np.signbit(x.values)), device_sort(x, **how))[1]
    assert ops.top_k(ops.array([[0.0, -0.0, -1.0, 0.0]]), 3).tolist() == [[0, 1, 3]]
    assert not seen[0].any()


def device_sort(x: DeviceArray, **how: Any) -> DeviceArray:
    return DeviceArray(np.argsort(x.values, **how))


def test_a_tap_of_the_host_receives_and_returns_host_arrays() -> None:
    xp = StrictCupy()
    received: list[Any] = []
    tap = from_device(lambda name, x: received.append((name, x)), xp)
    assert tap is not None
    assert tap("a", xp.zeros(2)) is None
    assert isinstance(received[0][1], np.ndarray)
    replace = from_device(lambda name, x: x + 1, xp)
    assert replace is not None
    assert replace("a", xp.zeros(2)).tolist() == [1, 1]
    assert from_device(None, xp) is None


def test_a_place_is_sent_to_another_process() -> None:
    assert pickle.loads(pickle.dumps(CUDA)) == CUDA
    assert CPU.steps("exact") is GROUPED_STEPS is CUDA.steps("exact")
    assert CPU.steps("float32") is NATIVE_STEPS
    two = "processes:2"
    assert (CPU.executor(None), CPU.executor(two)) == (None, two)
    assert (CUDA.executor(None), CUDA.executor(two)) == ("processes:1", two)


def test_emulated_float64_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    monkeypatch.setenv("CUBLAS_EMULATE_DOUBLE_PRECISION", "1")
    with pytest.raises(InputError, match=r"^CUBLAS_EMULATE_DOUBLE_PRECISION is '1' in the environment, under which"):
        CUDA.exact()
    CUDA.native("float64")
    device.require_exact({"CUBLAS_EMULATE_DOUBLE_PRECISION": "0"})


def test_the_stand_in_refuses_what_cupy_refuses() -> None:
    """Otherwise tests over the stand-in would prove little."""
    xp = StrictCupy()
    x = xp.ones((2, 3))
    refused: list[Any] = [
        lambda: np.asarray(x), lambda: x + np.ones(3), lambda: np.ones(3) + x, lambda: xp.where(x > 0, x, np.ones(3)),
        lambda: x[np.array([0])], lambda: x.max(initial=0.0), lambda: xp.concatenate([x, np.ones((1, 3))]),
    ]  # fmt: skip
    for call in refused:
        with pytest.raises(TypeError):
            call()
    assert isinstance(x.sum(), DeviceArray)
    assert x.sum().ndim == 0
    x += x
    assert np.abs(x).get().tolist() == [[2.0] * 3] * 2
    assert cupy_ops.kept_bytes(1000) == 750


def test_stored_values_are_indexed_from_the_host_wherever_they_are() -> None:
    xp, values = StrictCupy(), np.arange(6.0).reshape(3, 2)
    for stored in (Stored(values, xp), Stored(xp.asarray(values), xp)):
        assert (stored.shape, stored.dtype) == ((3, 2), np.float64)
        assert on_host(stored[np.array([2, 0])]).tolist() == [[4, 5], [0, 1]]
        assert on_host(stored[1:]).tolist() == [[2, 3], [4, 5]]
        assert isinstance(stored[1], np.ndarray)
