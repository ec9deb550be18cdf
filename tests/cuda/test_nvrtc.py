# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's compiler accepts the text for every architecture, within the registers that the table allows."""

from __future__ import annotations

import re

import pytest

from refmoe.cuda.kernels.source import CUPY_OPTIONS, FILES, OPTIONS, expressions, kernels_in, text
from tests.cuda.nvrtc import Compiled, CompileError, compile_text, library_path, usage

pytestmark = pytest.mark.skipif(
    library_path() is None, reason="nvidia-cuda-nvrtc not installed: pip install -e '.[kernels]'"
)
ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")
"""From the oldest that CUDA 13 compiles for (Turing) to the newest: CuPy asks for the device's own."""
MOST_SHARED = 48 << 10
"""Static shared memory per block, on every architecture."""


def compiled(file: str, architecture: str) -> Compiled:
    return compile_text(text(file), architecture, (*OPTIONS, *CUPY_OPTIONS, "--ptxas-options=-v"), expressions(file))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_every_kernel_compiles_within_its_registers(file: str, architecture: str) -> None:
    """The result is a binary for that architecture, without spills, stack or warnings."""
    result = compiled(file, architecture)
    assert result.code[:4] == b"\x7fELF"
    assert "warning" not in result.log
    used = usage(result.log)
    assert len(used) == len(expressions(file))
    for kernel in kernels_in(file):
        for expression in kernel.expressions:
            found = used[result.names[expression]]
            assert found.registers <= kernel.registers, f"{expression} on {architecture}: {found}"
            assert found.spilled == found.stack == 0, f"{expression} on {architecture}: {found}"
            assert found.shared <= MOST_SHARED
            assert found.registers * kernel.block <= 65536 // 2, "at least two blocks on a multiprocessor"


@pytest.mark.parametrize("expression", ["expert_hidden<bfloat16>", "expert_output<float16>", "expert_output<float>"])
def test_weights_are_loaded_sixteen_bytes_at_a_time(expression: str) -> None:
    """The generated code has such loads, for aligned rows."""
    result = compile_text(text("experts.cu"), "compute_90", (*OPTIONS, *CUPY_OPTIONS), [expression])
    body = result.code.decode().partition(f".entry {result.names[expression]}(")[2]
    assert re.search(r"ld\.global\S*\.v4\.(u32|b32|f32)|ld\.global\S*\.v2\.(u64|b64)", body)


def test_the_written_arithmetic_is_the_compiled_one() -> None:
    """The rotation has products and sums without contraction, and flushes subnormals, as CuPy asks."""
    result = compile_text(text("rotary.cu"), "compute_90", (*OPTIONS, *CUPY_OPTIONS), ["rotate<float>"])
    code = result.code.decode()
    assert "mul.rn.ftz.f32" in code
    assert "fma.rn" not in code


def test_what_does_not_compile_is_an_error_with_its_line() -> None:
    with pytest.raises(CompileError, match=r'^wrong\.cu\(3\): error: identifier "itn" is undefined'):
        compile_text('#line 1 "wrong.cu"\n\n\n__global__ void f() { itn i; }', "sm_90", OPTIONS, ["f"])
