# SPDX-License-Identifier: Apache-2.0
"""The host code of the GPU backend, over NumPy instead of CuPy, and the CPU runner instead of a device."""

from __future__ import annotations

import ast
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refmoe.arithmetic import arrays
from refmoe.arithmetic.exact import dot, double_double, elementary, prepared_weight, slices
from refmoe.arithmetic.exact import ops as exact
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.checkpoints.names import build_parameters, parameter_shapes
from refmoe.checkpoints.weight import Weight
from refmoe.cuda import cupy_ops, device, enclosure
from refmoe.cuda.cupy_ops import FEW_TOKENS, CupyOps
from refmoe.cuda.kernels import calls
from refmoe.errors import InputError
from refmoe.spec.config import Config
from refmoe.spec.model import Model, Parameters, Steps, forward
from refmoe.steps import cuda as steps
from refmoe.steps.cuda import CUPY_STEPS
from refmoe.steps.grouped import GROUPED_STEPS
from tests.cuda.on_cpu import PoisonedNumpy, module, needs_compiler
from tests.cuda.runner.module import Conditions
from tests.models import SMALL, relative_rms

TOKENS = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5])


def parameters(config: Config, dtype: Any, other: Any = None) -> Parameters:
    """Random weights stored in a dtype. other: the dtype of one expert's second matrix"""
    rng = np.random.default_rng(11)

    def weight(name: str) -> Weight:
        shape = parameter_shapes(config)[name]
        scale = 1.7 / np.sqrt(shape[-1]) if len(shape) == 2 and name != "embedding" else 1.0
        kept = other if other is not None and name.endswith("experts.2.w2") else dtype
        values = (rng.standard_normal(shape) * scale).astype(kept)
        return Weight(name=name, shape=shape, dtype=kept, source=lambda: values, origin=name)

    return build_parameters(config, weight)


def on_cpu(dtype: Any = np.float32, tap: Any = None) -> CupyOps:
    how = Conditions("random", guard=None)
    return CupyOps(PoisonedNumpy(), lambda file: module(file).under(how), dtype, tap)


def prefill_and_decode(ops: Any, model: Model) -> list[Any]:
    """Logits of all tokens but two at once, and of two one by one."""
    first = len(TOKENS) - 2
    logits, caches = forward(ops, model, ops.integers(TOKENS[:first]), ops.integers(np.arange(first)))
    results = [logits]
    for i in range(first, len(TOKENS)):
        logits, caches = forward(ops, model, ops.integers(TOKENS[i : i + 1]), ops.integers([i]), caches)
        results.append(logits)
    return results


@needs_compiler
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.float64])
def test_the_model_over_the_kernels_is_the_model(dtype: Any) -> None:
    """The error is that of NumPy's float32, within a factor for another order of sums."""
    assert len(TOKENS) - 2 > FEW_TOKENS, "both ways through the experts"
    model = Model(SMALL, parameters(SMALL, dtype))
    exact = np.concatenate(prefill_and_decode(NativeOps(np.float64), model))
    found = np.concatenate(prefill_and_decode(on_cpu(), replace(model, steps=CUPY_STEPS)))
    native = np.concatenate(prefill_and_decode(NativeOps(np.float32), model))
    assert found.dtype == np.float32
    assert relative_rms(found, exact) <= 4 * max(relative_rms(native, exact), 2.0**-24)


@needs_compiler
def test_taps_are_the_specs_and_watching_changes_nothing() -> None:
    model = Model(SMALL, parameters(SMALL, ml_dtypes.bfloat16), CUPY_STEPS)
    seen: dict[str, list[Any]] = {}
    wanted: dict[str, list[Any]] = {}
    watched = prefill_and_decode(on_cpu(tap=lambda name, x: seen.setdefault(name, []).append(x.copy())), model)
    plain = NativeOps(np.float64, lambda name, x: wanted.setdefault(name, []).append(x.copy()))
    prefill_and_decode(plain, replace(model, steps=Steps()))
    assert sorted(seen) == sorted(wanted)
    for name, values in seen.items():
        assert [x.shape for x in values] == [x.shape for x in wanted[name]], name
        assert (
            relative_rms(np.concatenate([x.ravel() for x in values]), np.concatenate([x.ravel() for x in wanted[name]]))
            < 1e-4
        )
    assert all(np.array_equal(a, b) for a, b in zip(watched, prefill_and_decode(on_cpu(), model), strict=True))


@needs_compiler
def test_what_a_tap_returns_is_what_the_kernels_go_on_with() -> None:
    """The tap returns another choice of experts, and other outputs of them."""
    config = replace(SMALL, layers=1)
    model = Model(config, parameters(config, np.float32), CUPY_STEPS)

    def swapped(name: str, x: Any) -> Any:
        if name.endswith("router.experts"):
            return np.ascontiguousarray(x[:, ::-1])
        return np.ones_like(x) if name.endswith("expert.output") else None

    sums: list[Any] = []
    for kind in (on_cpu, NativeOps):

        def tap(name: str, x: Any) -> Any:
            if name.endswith(("moe.output", "router.weights")):
                sums.append(x.astype(np.float64))
            return swapped(name, x)

        prefill_and_decode(kind(np.float32, tap), model if kind is on_cpu else replace(model, steps=Steps()))
    half = len(sums) // 2
    for found, expected in zip(sums[:half], sums[half:], strict=True):
        assert np.abs(found - expected).max() <= 2.0**-18


@needs_compiler
@pytest.mark.parametrize(("dtype", "other"), [(np.float64, None), (np.float32, ml_dtypes.bfloat16)])
def test_where_kernels_do_not_apply_the_steps_are_the_grouped_ones(dtype: Any, other: Any) -> None:
    """The kernels do not apply at float64, and to experts that are stored in different dtypes."""
    model = Model(SMALL, parameters(SMALL, np.float32, other), CUPY_STEPS)
    found = prefill_and_decode(on_cpu(dtype), model)
    expected = prefill_and_decode(NativeOps(dtype), replace(model, steps=GROUPED_STEPS))
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a, b) if dtype == np.float64 else relative_rms(a, b) < 1e-4


def test_weights_are_uploaded_once_and_tables_made_once() -> None:
    ops, reads = on_cpu(np.float64), []
    weight = Weight(
        name="w",
        shape=(2, 2),
        dtype=np.float32,
        source=lambda: reads.append(1) or np.eye(2, dtype=np.float32),
        origin="w",
    )
    for inner in (ops, ops.within("layers.0."), ops.within("layers.1.")):
        assert inner.linear(np.ones((9, 2)), weight).tolist() == [[1, 1]] * 9
    assert len(reads) == 1
    positions = ops.integers([0, 1])
    table = ops.unit_circle(positions, 100.0, [0, 1], 2)
    assert ops.within("layers.1.").unit_circle(positions, 100.0, [0, 1], 2) is table
    assert ops.unit_circle(ops.integers([2]), 100.0, [0, 1], 2)[0].shape == (1, 2)
    assert ops.unit_circle(positions, 50.0, [0, 1], 2) is not table


IN_CUPY = {
    "abs", "arange", "argsort", "asarray", "ascontiguousarray", "bincount", "broadcast_to", "concatenate", "cumsum",
    "empty", "empty_like", "exp", "frexp", "log", "maximum", "moveaxis", "nonzero", "rint",
    "sign", "sqrt", "stack", "take_along_axis", "unique", "where", "zeros",
}  # fmt: skip
"""The names that the host code uses of an array module, looked up in CuPy 14.2. Add a new name only if CuPy has it."""


def used(path: str, names: tuple[str, ...] = ("xp", "_xp")) -> set[str]:
    """The names that a file reads from the array module."""
    tree = ast.walk(ast.parse(Path(path).read_text()))
    attributes = [node for node in tree if isinstance(node, ast.Attribute)]
    return {
        node.attr
        for node in attributes
        if (isinstance(node.value, ast.Name) and node.value.id in names)
        or (isinstance(node.value, ast.Attribute) and node.value.attr in names)
    }


def test_what_is_asked_of_the_array_module_is_in_cupy() -> None:
    """Importing CuPy needs no device. Where CuPy is not installed, the list above replaces it."""
    parts = (
        cupy_ops, calls, steps, arrays, exact, dot, elementary, slices, prepared_weight, double_double, enclosure,
    )  # fmt: skip
    asked = set().union(*(used(str(part.__file__)) for part in parts))
    assert asked - IN_CUPY == set()
    assert IN_CUPY - asked == set()
    assert all(hasattr(np, name) for name in asked)
    try:
        import cupy
    except ImportError:
        return
    assert all(hasattr(cupy, name) for name in asked)


NAMED = {
    "cupy.RawModule", "cupy.__version__", "cupy.add", "cupy.asarray", "cupy.cuda.Event", "cupy.cuda.MemoryPool",
    "cupy.cuda.Stream", "cupy.cuda.cublas", "cupy.cuda.device.get_cublas_handle", "cupy.cuda.get_current_stream",
    "cupy.cuda.get_elapsed_time", "cupy.cuda.runtime", "cupy.cuda.nvrtc.getVersion", "cupy.cuda.runtime.CUDA_R_16BF",
    "cupy.cuda.runtime.CUDA_R_16F", "cupy.cuda.runtime.CUDA_R_32F", "cupy.cuda.runtime.driverGetVersion",
    "cupy.cuda.runtime.getDeviceProperties", "cupy.cuda.runtime.memGetInfo", "cupy.cuda.runtime.runtimeGetVersion",
    "cupy.cuda.using_allocator", "cupy.empty", "cupy.full", "cupy.get_default_memory_pool", "cupy.ones", "cupy.take",
    "cupy.zeros",
}  # fmt: skip
"""The names of CuPy that are used, apart from functions of arrays."""
METHODS = {
    "cupy.cuda.Stream": ("begin_capture", "end_capture", "synchronize", "__enter__"),
    "cupy.cuda.Graph": ("launch",),
    "cupy.cuda.MemoryPool": ("malloc", "free_bytes", "free_all_blocks"),
    "cupy.cuda.MemoryPointer": ("copy_from_device_async", "ptr"),
    "cupy.cuda.Event": ("record", "synchronize"),
    "cupy.RawModule": ("get_function",),
    "cupy.ndarray": ("get", "argmax", "data"),
}


def dotted(node: ast.AST) -> str | None:
    """``a.b.c`` as it is written, or None for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    before = dotted(node.value) if isinstance(node, ast.Attribute) else None
    return f"{before}.{node.attr}" if isinstance(node, ast.Attribute) and before else None


def named(source: str) -> set[str]:
    """The longest names that begin with ``cupy.``, imports from it included."""
    tree = [*ast.walk(ast.parse(source))]
    inner = {id(node.value) for node in tree if isinstance(node, ast.Attribute)}
    names = {dotted(node) or "" for node in tree if isinstance(node, ast.Attribute) and id(node) not in inner}
    imported = {
        alias.name: f"{node.module}.{alias.name}"
        for node in tree
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("cupy")
        for alias in node.names
    }
    full = {f"{imported[first]}.{rest}" for first, _, rest in (n.partition(".") for n in names) if first in imported}
    return {name for name in names if name.startswith("cupy.")} | full


def test_what_is_named_of_cupy_is_there() -> None:
    root = Path(__file__).parent.parent.parent
    files = [
        *(root / "refmoe" / "cuda").glob("*.py"), *(root / "bench").glob("gpu*.py"),
        *(Path(str(part.__file__)) for part in (device, cupy_ops, calls, steps)),
    ]  # fmt: skip
    asked = set().union(*(named(path.read_text()) for path in files))
    assert {name for name in asked if not name.startswith("cupy.cuda.cublas")} == NAMED - {"cupy.cuda.cublas"}
    try:
        import cupy
    except ImportError:
        return
    for name in NAMED - {"cupy.cuda.cublas"}:  # its library is not needed to import CuPy
        found = cupy
        for part in name.split(".")[1:]:
            found = getattr(found, part)
    for name, methods in METHODS.items():
        found = cupy
        for part in name.split(".")[1:]:
            found = getattr(found, part)
        assert [method for method in methods if not hasattr(found, method)] == [], name


class CudaError(RuntimeError):
    """A stand-in for cupy.cuda.runtime.CUDARuntimeError."""


def fail(error: Exception) -> Any:
    raise error


def fake_cupy(devices: Any = 1, nvrtc: Any = None, cublas: bool = True) -> Any:
    runtime = types.SimpleNamespace(CUDARuntimeError=CudaError)
    runtime.getDeviceCount = lambda: fail(devices) if isinstance(devices, Exception) else devices
    cuda = types.SimpleNamespace(runtime=runtime)
    cuda.nvrtc = types.SimpleNamespace(getVersion=lambda: fail(nvrtc) if nvrtc else (13, 0))
    if cublas:
        cuda.cublas = object()
    return types.SimpleNamespace(cuda=cuda)


@pytest.mark.parametrize(
    ("cupy", "sentence"),
    [
        (None, "CuPy is not installed or does not load (No module named 'cupy')"),
        (fake_cupy(CudaError("cudaErrorInsufficientDriver: too old")), "no NVIDIA driver that CuPy can use (cudaErr"),
        (fake_cupy(0), "the NVIDIA driver shows no device"),
        (fake_cupy(nvrtc=RuntimeError('Failure finding "libnvrtc"\nat length')), '(Failure finding "libnvrtc"):'),
        (fake_cupy(cublas=False), "a library of the CUDA toolkit is missing"),
        (fake_cupy(), None),
    ],
)  # fmt: skip
def test_why_no_gpu_can_be_used_is_one_sentence(monkeypatch: Any, cupy: Any, sentence: str | None) -> None:
    def import_module(name: str) -> Any:
        if cupy is None:
            raise ModuleNotFoundError("No module named 'cupy'")
        return cupy.cuda if name == "cupy.cuda" else cupy

    monkeypatch.setattr(device, "import_module", import_module)
    problem = device.gpu_problem()
    if sentence is None:
        assert problem is None
        assert device.require_gpu() is cupy
        return
    assert sentence in str(problem)
    assert "\n" not in str(problem)
    with pytest.raises(InputError, match=r"^no GPU can be used: "):
        cupy_ops.cupy_ops()
