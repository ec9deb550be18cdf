# SPDX-License-Identifier: Apache-2.0
"""Whether this machine has a GPU that refmoe can use; if not, the reason in one sentence."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from refmoe.errors import InputError

INSTALL = "pip install 'refmoe[cuda13]' 'cupy-cuda13x[ctk]'"
"""refmoe's extra brings CuPy. CuPy's extra brings the libraries of the CUDA toolkit, which CuPy does not contain."""


def gpu_problem() -> str | None:
    """Why no GPU can be used, or None if one can.

    Importing CuPy succeeds without a driver, a device or a toolkit, so each of them is tested in turn. The test
    compiles nothing and allocates no memory.
    """
    try:
        cupy = import_module("cupy")
    except ImportError as error:
        return f"CuPy is not installed or does not load ({_line(error)}): {INSTALL}"
    runtime = cupy.cuda.runtime
    try:
        devices = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        return f"there is no NVIDIA driver that CuPy can use ({_line(error)})"
    if not devices:
        return "the NVIDIA driver shows no device; CUDA_VISIBLE_DEVICES may hide it"
    try:
        cupy.cuda.nvrtc.getVersion()
        import_module("cupy.cuda").cublas  # noqa: B018  loaded when it is first named
    except (ImportError, AttributeError, RuntimeError) as error:
        return f"a library of the CUDA toolkit is missing ({_line(error)}): {INSTALL}"
    return None


def require_gpu() -> ModuleType:
    """The module cupy. Raises InputError with the reason where no GPU can be used."""
    problem = gpu_problem()
    if problem:
        raise InputError(f"no GPU can be used: {problem}")
    return import_module("cupy")


EMULATION = ("CUBLAS_EMULATE_DOUBLE_PRECISION",)
"""Environment variables that let cuBLAS 13 replace float64 products by products of shorter numbers."""


def require_exact(environment: Mapping[str, str] | None = None) -> None:
    """Raises InputError where products of float64 numbers on the device would not be IEEE-754's."""
    found = os.environ if environment is None else environment
    for name in EMULATION:
        if found.get(name, "0") != "0":
            raise InputError(
                f"{name} is {found[name]!r} in the environment, under which cuBLAS emulates float64, but 0 or nothing "
                "was expected for exact results"
            )


def free_memory(cupy: Any) -> int:
    """Free bytes of the current device, including those that CuPy's pool holds."""
    free, _total = cupy.cuda.runtime.memGetInfo()
    return int(free) + int(cupy.get_default_memory_pool().free_bytes())


def _line(error: Exception) -> str:
    """The first line of a message, or the kind of error where there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
