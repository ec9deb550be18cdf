# SPDX-License-Identifier: Apache-2.0
"""The laws of the kernels on a real GPU, through CuPy: the device keeps the promises that the CPU runner tests."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from refmoe.cuda.cupy_ops import cupy_ops
from refmoe.cuda.kernels.kernel import STORED, Kernel
from refmoe.cuda.kernels.table import KERNELS
from tests.cuda.examples import examples
from tests.cuda.on_cpu import arrays_of

pytestmark = pytest.mark.gpu


class OnGpu:
    """`Kernels` that take and return NumPy arrays, and compute on the device."""

    def __init__(self) -> None:
        import cupy

        self._cupy, self._kernels = cupy, cupy_ops().kernels

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            moved = [self._cupy.asarray(a) if isinstance(a, np.ndarray) else a for a in arguments]
            found = tuple(array.get() for array in arrays_of(getattr(self._kernels, name)(*moved)))
            return found if len(found) > 1 else found[0]

        return call


@cache
def on_gpu() -> Any:
    return OnGpu()


def twice(call: Any) -> Any:
    """The result of `call` on the device, after a check that two calls give equal bits."""
    first, second = call(on_gpu()), call(on_gpu())
    for a, b in zip(arrays_of(first), arrays_of(second), strict=True):
        assert a.tobytes() == b.tobytes(), "not deterministic"
    return first


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_kernel_keeps_its_law_on_the_device(kernel: Kernel, dtype: str) -> None:
    for law in examples(kernel.name, dtype):
        law(twice)
