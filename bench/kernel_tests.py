# SPDX-License-Identifier: Apache-2.0
"""Three kernels, honest and with a mistake each, under the usual comparison with a tolerance, and under refmoe's.

    python -m bench.kernel_tests
    python -m bench.kernel_tests --json bench/results/kernel_tests.json

The kernel in Triton runs in its interpreter, where triton is installed. The usual comparison is `torch.allclose` with
the result of the same step in float32, rounded to the dtype of the output.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import refmoe
from bench.kernels import with_cpp, with_torch

TOLERANCES = {
    "assert_close, its defaults": None,
    "atol=rtol=1e-2": (1e-2, 1e-2),
    "atol=2e-2, rtol=0": (2e-2, 0.0),
}
"""The defaults of torch.testing, and those that KernelBench and vLLM's tests of fused experts use."""
MISSING = "bench.kernel_tests: triton is not installed, so its kernel is left out (pip install triton)"

Row = tuple[str, str, Any, Any, Callable[[], Any]]
"""Kernel, mistake, found, the plain result, and refmoe's assertion."""


def of_torch(dtype: torch.dtype) -> Iterator[Row]:
    """The layer of experts."""
    torch.manual_seed(0)
    tokens, size, hidden, experts = 96, 128, 192, 8
    x = torch.randn(tokens, size).to(dtype)
    gate_up = (torch.randn(experts, 2 * hidden, size) * size**-0.5).to(dtype)
    down = (torch.randn(experts, size, hidden) * hidden**-0.5).to(dtype)
    weights, ids = torch.softmax(torch.randn(tokens, experts), -1).topk(2)
    weights = weights / weights.sum(-1, keepdim=True)
    plain = with_torch.moe(x.float(), gate_up.float(), down.float(), ids, weights).to(dtype)
    # in bfloat16 a sum in bfloat16 is no mistake: transformers adds experts like that
    for mistake in with_torch.MISTAKES[: None if dtype == torch.float32 else -1]:
        found = with_torch.moe(x, gate_up, down, ids, weights.to(dtype), mistake)

        def judge(found: Any = found) -> Any:
            kernel_weights = weights.to(dtype)
            return refmoe.testing.assert_moe(found, x, gate_up, None, down, ids, kernel_weights, fused="halves")

        yield f"experts, PyTorch, {str(dtype)[6:]}", mistake, found, plain, judge


def of_cpp() -> Iterator[Row]:
    """The norm, on rows of the size that embeddings have."""
    torch.manual_seed(1)
    x, gain = (0.02 * torch.randn(64, 1027)).numpy(), torch.rand(1027).numpy()
    plain = torch.nn.functional.rms_norm(torch.from_numpy(x), (1027,), torch.from_numpy(gain), 1e-5)
    for mistake in with_cpp.MISTAKES:
        found = with_cpp.rms_norm(x, gain, 1e-5, mistake)

        def judge(found: Any = found) -> Any:
            return refmoe.testing.assert_rms_norm(found, x, gain, 1e-5)

        yield "rms norm, C++, float32", mistake, torch.from_numpy(found), plain, judge


def of_triton(dtype: torch.dtype) -> Iterator[Row]:
    """The product, in Triton's interpreter."""
    from bench.kernels import with_triton

    torch.manual_seed(2)
    x, w = torch.randn(40, 104).to(dtype), (torch.randn(56, 104) * 104**-0.5).to(dtype)
    plain = (x.float() @ w.float().T).to(dtype)
    # the interpreter of triton 3.9 multiplies the bits of bfloat16 as integers, so that no mistake can be added
    count = {torch.float32: 3, torch.float16: 4, torch.bfloat16: 1}[dtype]
    for mistake in with_triton.MISTAKES[:count]:
        found = with_triton.linear(x, w, mistake)

        def judge(found: Any = found) -> Any:
            return refmoe.testing.assert_linear(found, x, w)

        yield f"linear, Triton, {str(dtype)[6:]}", mistake, found, plain, judge


def rows() -> Iterator[Row]:
    yield from of_torch(torch.float32)
    yield from of_torch(torch.bfloat16)
    yield from of_cpp()
    if find_spec("triton") is None:
        print(MISSING)
        return
    os.environ["TRITON_INTERPRET"] = "1"
    yield from of_triton(torch.float32)
    yield from of_triton(torch.float16)
    yield from of_triton(torch.bfloat16)


def passes(found: Any, plain: Any, tolerance: tuple[float, float] | None) -> bool:
    """Whether `torch.testing.assert_close` takes the result."""
    given = {} if tolerance is None else {"atol": tolerance[0], "rtol": tolerance[1]}
    try:
        torch.testing.assert_close(found, plain, **given)
    except AssertionError:
        return False
    return True


def explained(judge: Callable[[], Any]) -> tuple[bool, str]:
    """Whether refmoe passes a result, and the first line of what explains a failure."""
    try:
        judge()
    except AssertionError as error:
        _, _, words = str(error).partition("Explained by")
        # one mistake follows a colon; several are listed on lines of their own
        return False, words.lstrip(":").splitlines()[0 if words.startswith(":") else 1].strip()
    return True, ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the table here as well")
    options = parser.parse_args()
    results = []
    for kernel, mistake, found, plain, judge in rows():
        usual = {name: passes(found, plain, tolerance) for name, tolerance in TOLERANCES.items()}
        ours, words = explained(judge)
        results.append({"kernel": kernel, "mistake": mistake, "usual": usual, "refmoe": ours, "explained": words})
        marks = " ".join(f"{'pass' if each else 'fail':<5}" for each in usual.values())
        print(
            f"{kernel:<28} {mistake or '(none)':<14} {marks} refmoe {'pass' if ours else 'FAIL'}  {words}", flush=True
        )
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
