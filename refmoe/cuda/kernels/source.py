# SPDX-License-Identifier: Apache-2.0
"""The text of the kernels, and the options that it is compiled with."""

from __future__ import annotations

from functools import cache

from refmoe.cuda.kernels.kernel import Kernel
from refmoe.cuda.kernels.table import KERNELS
from refmoe.files.reading import own_text

OPTIONS = ("--std=c++17", "--fmad=false")
"""Our options. Without contraction, every device and the CPU runner compute the arithmetic as it is written."""
CUPY_OPTIONS = ("--device-as-default-execution-space", "-ftz=true")
"""The options that CuPy 14 adds, from its `compile_using_nvrtc`."""
PRELUDE = "numbers.cu"


@cache
def text(file: str) -> str:
    """The text that is compiled for one file: the prelude, then the file, with the file's own line numbers."""
    return "".join(f'#line 1 "{name}"\n{own_text("refmoe.cuda.kernels", name)}\n' for name in (PRELUDE, file))


def kernels_in(file: str) -> tuple[Kernel, ...]:
    """The kernels of one file."""
    return tuple(kernel for kernel in KERNELS if kernel.file == file)


def expressions(file: str) -> tuple[str, ...]:
    """The name expressions of every instance in one file."""
    return tuple(expression for kernel in kernels_in(file) for expression in kernel.expressions)


FILES = tuple(dict.fromkeys(kernel.file for kernel in KERNELS))
