# SPDX-License-Identifier: Apache-2.0
"""Decoding in preallocated memory: the specification's logits, no transfer in a step, graphs in memory of their own."""

from __future__ import annotations

import ctypes
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refmoe.arithmetic.native.ops import NativeOps
from refmoe.cuda.cupy_ops import FEW_TOKENS, CupyOps
from refmoe.cuda.decode import DecodeOps, Decoder, can_capture, captured
from refmoe.cuda.gemm import Gemm
from refmoe.cuda.kernels import source
from refmoe.errors import InputError
from refmoe.spec.model import Model, Steps, forward
from refmoe.steps.cuda import CUPY_STEPS
from tests.cuda import strict
from tests.cuda.on_cpu import needs_compiler
from tests.cuda.strict import DeviceArray, StrictCupy
from tests.cuda.test_host import parameters
from tests.models import SMALL, relative_rms

PROMPT, FOLLOWING = [3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5]
CAPACITY = 16


def module(xp: StrictCupy) -> Any:
    return lambda file: xp.RawModule(source.text(file), (), source.expressions(file)).get_function


def decoder(dtype: Any = ml_dtypes.bfloat16, capture: Any = None, **changes: Any) -> Decoder:
    xp = StrictCupy()
    model = Model(SMALL, parameters(SMALL, dtype), CUPY_STEPS)
    return Decoder(DecodeOps(xp, module(xp), CAPACITY, **changes), model, CAPACITY, capture)


def expected(dtype: Any = ml_dtypes.bfloat16) -> list[Any]:
    """Logits [1, V] after the prompt and after each later token, in float64."""
    model, ops = Model(SMALL, parameters(SMALL, dtype), Steps()), NativeOps(np.float64)
    every = PROMPT + FOLLOWING
    logits, _ = forward(ops, model, np.array(every), np.arange(len(every)))
    return [logits[i : i + 1] for i in range(len(PROMPT) - 1, len(every))]


@contextmanager
def no_transfer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A context in which copies from the device, and of arrays to it, fail."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a transfer, for which a step would wait")

    with monkeypatch.context() as patched:
        for name in ("get", "__bool__", "__int__", "__float__"):
            patched.setattr(DeviceArray, name, refuse)
        patched.setattr(strict, "TO_HOST", ())
        patched.setattr(strict, "host_or_list", refuse)
        yield


@needs_compiler
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_the_logits_are_the_specs(dtype: Any) -> None:
    state = decoder(dtype)
    found = [state.read(PROMPT).get(), *(state.step(token).get() for token in FOLLOWING)]
    for a, b in zip(found, expected(dtype), strict=True):
        assert a.shape == (1, SMALL.vocab)
        assert relative_rms(a, b) < 1e-5
    assert (state.past, state.position.tolist()) == (11, [11])


@needs_compiler
def test_a_step_after_the_first_moves_nothing_between_host_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    state = decoder()
    state.read(PROMPT)
    state.step()
    with no_transfer(monkeypatch):
        state.step()
    with pytest.raises(AssertionError, match="a transfer"), no_transfer(monkeypatch):
        state.read(PROMPT)


@needs_compiler
def test_without_a_token_the_largest_logit_is_followed() -> None:
    state, other = decoder(), decoder()
    first = int(state.read(PROMPT).get().argmax())
    other.read(PROMPT)
    assert np.array_equal(state.step().get(), other.step(first).get())


@needs_compiler
def test_recording_leaves_the_state_as_it_was() -> None:
    """Recording runs the step, and each launch runs it once more."""
    runs: list[str] = []

    def capture(step: Any) -> Any:
        step()
        step()
        runs.append("recorded")
        return lambda: (runs.append("launched"), step())

    state, plain = decoder(capture=capture), decoder()
    state.read(PROMPT)
    plain.read(PROMPT)
    for token in FOLLOWING:
        assert np.array_equal(state.step(token).get(), plain.step(token).get())
    assert runs == ["recorded", *["launched"] * len(FOLLOWING)]


@needs_compiler
def test_a_full_cache_is_one_sentence() -> None:
    state = decoder()
    state.read(range(CAPACITY - 1))
    state.step(1)
    with pytest.raises(InputError, match=r"^the cache has room for 16 tokens, but 17 came$"):
        state.step(1)


@needs_compiler
def test_only_what_does_not_wait_for_the_host_is_captured() -> None:
    ops = decoder().ops
    assert can_capture(ops, Model(SMALL, parameters(SMALL, np.float16), CUPY_STEPS))
    assert not can_capture(ops, Model(SMALL, parameters(SMALL, np.float32, ml_dtypes.bfloat16), CUPY_STEPS))
    assert not can_capture(CupyOps(np, module(StrictCupy()), np.float64), Model(SMALL, parameters(SMALL, np.float32)))


def test_a_graph_has_a_stream_and_a_pool_of_its_own() -> None:
    log: list[str] = []
    graph = types.SimpleNamespace(launch=lambda stream: log.append(f"launch on {stream.name}"))

    class Stream:
        name = "own"

        def __enter__(self) -> None:
            log.append("enter")

        def __exit__(self, *_: Any) -> None:
            log.append("exit")

        def synchronize(self) -> None:
            log.append("synchronize")

        def begin_capture(self) -> None:
            log.append("begin")

        def end_capture(self) -> Any:
            log.append("end")
            return graph

    @contextmanager
    def using_allocator(malloc: str) -> Iterator[None]:
        log.append(malloc)
        yield
        log.append("no longer")

    cuda = types.SimpleNamespace(
        Stream=Stream, MemoryPool=lambda: types.SimpleNamespace(malloc="pool"), using_allocator=using_allocator,
        get_current_stream=lambda: types.SimpleNamespace(synchronize=lambda: log.append("wait")),
    )  # fmt: skip
    launch = captured(types.SimpleNamespace(cuda=cuda), lambda: log.append("step"))
    before = ["wait", "enter", "pool", "step", "synchronize", "begin", "step", "end", "no longer", "exit"]
    assert log == before
    launch()
    launch()
    assert log == [*before, *["launch on own"] * 2]


# ---- products at the stored dtype


class Blas:
    """cuBLAS's `gemmEx` by its documentation: column-major, op(A) [m, k] times op(B) [k, n]."""

    CUBLAS_OP_N, CUBLAS_OP_T, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT = 0, 1, 68, -1

    def __init__(self) -> None:
        self.calls = 0
        self.TYPES = {"bfloat16": 14, "float16": 2, "float32": 0}

    def gemmEx(
        self, handle: Any, opa: int, opb: int, m: int, n: int, k: int, alpha: int, a: int, atype: int, lda: int, b: int,
        btype: int, ldb: int, beta: int, c: int, ctype: int, ldc: int, compute: int, algorithm: int,
    ) -> None:  # fmt: skip
        self.calls += 1
        assert (compute, algorithm, ctype) == (68, -1, 0)
        factors = [ctypes.c_float.from_address(address).value for address in (alpha, beta)]
        left = self._matrix(a, atype, lda, *((m, k) if opa == 0 else (k, m)))
        right = self._matrix(b, btype, ldb, *((k, n) if opb == 0 else (n, k)))
        out = self._matrix(c, ctype, ldc, m, n)
        wide = [x.astype(np.float32) for x in (left if opa == 0 else left.T, right if opb == 0 else right.T)]
        assert factors == [1, 0]
        out[...] = wide[0] @ wide[1]

    def _matrix(self, address: int, kind: int, leading: int, rows: int, columns: int) -> Any:
        """The view of memory that BLAS has of a matrix."""
        names = {code: name for name, code in self.TYPES.items()}
        dtype = np.dtype(ml_dtypes.bfloat16 if names[kind] == "bfloat16" else names[kind])
        raw = (ctypes.c_char * (leading * columns * dtype.itemsize)).from_address(address)
        return np.frombuffer(raw, dtype).reshape(columns, leading).T[:rows]


class Pointed(np.ndarray):
    """An array with `data.ptr`, as CuPy's arrays have it."""

    @property
    def data(self) -> Any:  # type: ignore[override]
        return types.SimpleNamespace(ptr=self.ctypes.data)


class PointedNumpy:
    def __getattr__(self, name: str) -> Any:
        found = getattr(np, name)
        return (lambda *a, **k: found(*a, **k).view(Pointed)) if name in ("empty", "ascontiguousarray") else found


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize(("n", "k", "m"), [(1, 3, 2), (7, 5, 4), (4, 8, 9), (0, 3, 2)])
def test_products_are_asked_for_as_cublas_lays_them_out(dtype: Any, n: int, k: int, m: int) -> None:
    rng, blas = np.random.default_rng(n), Blas()
    gemm = Gemm(PointedNumpy(), blas, lambda: 1, blas.TYPES)
    rows, weight = rng.standard_normal((n, k)).astype(np.float32), rng.standard_normal((m, k)).astype(dtype)
    wanted = rows.astype(dtype).astype(np.float32) @ weight.astype(np.float32).T
    assert np.array_equal(gemm(rows, weight.view(Pointed)), wanted)
    out = np.full((n + 2, m), 7, np.float32).view(Pointed)
    gemm(rows, weight.view(Pointed), out[1 : n + 1])
    assert np.array_equal(out[1 : n + 1], wanted)
    assert (out[0] == 7).all()
    assert (out[-1] == 7).all()
    assert blas.calls == (2 if n else 0)


def test_other_weights_are_refused() -> None:
    gemm = Gemm(PointedNumpy(), Blas(), lambda: 1, {"bfloat16": 14, "float32": 0})
    for weight in (np.ones((2, 3)), np.ones((3, 2), ml_dtypes.bfloat16).T):
        with pytest.raises(ValueError, match="that is contiguous was expected"):
            gemm(np.ones((1, 3), np.float32), weight)


@needs_compiler
def test_a_prompt_goes_through_the_products_that_are_given() -> None:
    """With rows rounded to bfloat16, the error of the logits grows by about the unit of bfloat16."""
    assert len(PROMPT) > FEW_TOKENS
    calls: list[Any] = []

    def gemm(rows: Any, weight: Any, out: Any) -> Any:
        calls.append(weight.shape)
        narrow = rows.values.astype(weight.dtype).astype(np.float32)
        out[...] = DeviceArray(narrow @ weight.values.astype(np.float32).T)
        return out

    found = decoder(gemm=gemm).read(PROMPT).get()
    assert len(calls) > 5 * SMALL.layers
    assert 1e-5 < relative_rms(found, expected()[0]) < 0.05
