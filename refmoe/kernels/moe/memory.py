# SPDX-License-Identifier: Apache-2.0
"""Laws of memory: strides, shared and written memory, and what is left of a call when the next one comes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refmoe.contracts.broken import LawBroken
from refmoe.contracts.formats import Floats
from refmoe.contracts.frameworks import to_numpy
from refmoe.contracts.law import Need
from refmoe.kernels.arrays import can_reserve, check_exact, far_apart, repeated_rows, same, strided
from refmoe.kernels.moe.call import exact_result
from refmoe.kernels.moe.data import Sizes, dense_call, exact_call
from refmoe.kernels.moe.examples import built, only, small
from refmoe.kernels.moe.law import STRIDED, law
from refmoe.kernels.moe.subject import Subject

BUFFER = Need("an output that it is given, as declared", lambda s: s.declaration.buffer)
MEMORY = Need("arrays that have an address: NumPy or torch", lambda s: s.declaration.framework in ("numpy", "torch"))
FAR_EXPERTS = 4
"""The experts of the law about far matrices: the last two begin at 2^31 elements and beyond."""
DETERMINISTIC = Need("equal bits for equal calls, as declared", lambda s: s.declaration.deterministic)


def addresses(subject: Subject) -> bool:
    """Whether far matrices can lie in memory."""
    return can_reserve(FAR_EXPERTS, subject.declaration.given.dtype.itemsize)


@law(
    "strided",
    "Arguments that are strided give the same result.",
    "Arrays have strides; experts taken to lie next to each other (linkedin/Liger-Kernel#1377)",
    lambda d: only(small(d)),
    STRIDED,
)
def strided_arguments(subject: Subject, sizes: Sizes) -> None:
    d, call = subject.declaration, exact_call(sizes)

    def place(values: Floats, name: str) -> Any:
        return strided(values, d.shares if name == "weights" else d.given, d.framework)

    found = subject.run(call, place)
    check_exact(found, exact_result(call), ": x, weights and matrices are every second element of larger arrays")


@law(
    "shared-memory",
    "Arguments that share memory give the same result: rows of x at one place, gate and up in one matrix.",
    "A function of values; expanded tensors have stride 0",
    lambda d: only(small(d, least=2)),
    STRIDED,
    MEMORY,
)
def shared_memory(subject: Subject, sizes: Sizes) -> None:
    d, call = subject.declaration, exact_call(sizes)
    one = replace(call, x=np.repeat(call.x[:1], len(call.x), axis=0), w_up=call.w_gate)
    both: dict[str, Any] = {}

    def place(values: Floats, name: str) -> Any:
        if name == "x":
            return repeated_rows(values, d.given, d.framework)
        if name in ("w_gate", "w_up"):
            return both.setdefault("w_gate", subject.array(values, name))
        return subject.array(values, name)

    if d.dtype == "float16":  # 1024 n by 1024 m is too large for it
        one = replace(one, w_up=call.w_up)
        both = _Never()
    found = subject.run(one, place)
    check_exact(found, exact_result(one), ": all rows of x lie at one place, and w_gate is w_up")


class _Never(dict[str, Any]):
    """Keeps nothing, so that no two matrices are one."""

    def setdefault(self, _key: str, value: Any = None) -> Any:
        return value


@law(
    "far-offsets",
    "Matrices may lie more than 2^31 elements apart.",
    "Offsets are 64 bits wide (linkedin/Liger-Kernel#1296, vllm-project/vllm#34279)",
    lambda d: only(built(d, st.integers(1, 3), st.just(FAR_EXPERTS), st.integers(1, 2), st.integers(1, 9))),
    STRIDED,
    MEMORY,
    Need("4 GiB of addresses for each byte of an element", addresses),
)
def far_offsets(subject: Subject, sizes: Sizes) -> None:
    d = subject.declaration
    call = exact_call(replace(sizes, load="last expert"))

    def place(values: Floats, name: str) -> Any:
        if name.startswith("w_"):
            return far_apart(values, d.given, d.framework)
        return subject.array(values, name)

    found = subject.run(call, place)
    check_exact(found, exact_result(call), ": the last experts' matrices begin at 2^31 elements and beyond")


@law(
    "inputs-untouched",
    "The kernel writes to none of its arguments but the output.",
    "The residual stream reads x again; x normalised or quantised in place",
    lambda d: only(small(d)),
)
def inputs_untouched(subject: Subject, sizes: Sizes) -> None:
    arguments = subject.arguments(exact_call(sizes))
    before = {name: to_numpy(array).copy() for name, array in arguments.named.items() if name != "out"}
    subject.start(arguments)
    for name, was in before.items():
        now = to_numpy(arguments.named[name])
        if now.shape != was.shape or not same(now, was).all():
            raise LawBroken(f"{name} is not as it was before the call")


@law(
    "every-value-written",
    "Every value of the output is written, whatever its memory held, and nothing beside it.",
    "A no-op (AI-Hypercomputer/accelerator-agents#50); last tiles left out (linkedin/Liger-Kernel#1361)",
    lambda d: only(small(d, least=0, most=40), held=st.sampled_from(("NaN", "huge", "result"))),
    BUFFER,
)
def every_value_written(subject: Subject, sizes: Sizes, held: str) -> None:
    call = exact_call(sizes)
    arguments = subject.arguments(call)
    out = arguments.named["out"]
    out[...] = {"NaN": float("nan"), "huge": 2.0**14, "result": 1.0}[held]
    found = subject.result(arguments, subject.start(arguments))
    check_exact(found, exact_result(call), f": the output's memory held {held if held != 'result' else 1}")


@law(
    "live-arguments",
    "A call reads its arguments anew: when they are changed in place, the result follows.",
    "A kernel is a function; frozen buffers (vllm-project/vllm#52383), kept weights (sgl-project/sglang#30247)",
    lambda d: only(small(d)),
    MEMORY,
)
def live_arguments(subject: Subject, sizes: Sizes) -> None:
    first, second = exact_call(sizes), exact_call(replace(sizes, seed=sizes.seed + 1))
    arguments = subject.arguments(first)
    subject.start(arguments)
    for name, array in subject.arguments(second).named.items():
        if name != "out":
            arguments.named[name][...] = array
    now = subject.arguments(second)
    now = replace(arguments, order=now.order, shares=now.shares)
    found = subject.result(now, subject.start(now))
    check_exact(found, exact_result(second), " in the second call, whose arguments lie at the place of the first's")


@law(
    "later-calls",
    "Each call of a series is right, whatever came before.",
    "A kernel is a function; views kept from the first call (flashinfer-ai/flashinfer#3066)",
    lambda d: only(small(d), calls=st.integers(2, 5)),
)
def later_calls(subject: Subject, sizes: Sizes, calls: int) -> None:
    for number in range(calls):
        call = exact_call(replace(sizes, seed=sizes.seed + number // 2))
        found = subject.run(call)
        check_exact(found, exact_result(call), f" in call {number + 1} of {calls}")


@law(
    "results-kept",
    "A later call does not change the result that an earlier call returned.",
    "A kernel is a function; static buffers of captured graphs (vllm-project/vllm#52383)",
    lambda d: only(small(d)),
)
def results_kept(subject: Subject, sizes: Sizes) -> None:
    call = exact_call(sizes)
    arguments = subject.arguments(call)
    answer = subject.start(arguments)
    subject.result(arguments, answer)
    subject.run(exact_call(replace(sizes, seed=sizes.seed + 1)))
    check_exact(subject.result(arguments, answer), exact_result(call), " after another call")


@law(
    "repetition",
    "Equal calls give equal bits, whatever was computed in between.",
    "Determinism, as declared; sums by atomic adds (vllm-project/vllm#56887)",
    lambda d: only(small(d, most=40)),
    DETERMINISTIC,
)
def repetition(subject: Subject, sizes: Sizes) -> None:
    call = dense_call(sizes, subject.declaration)
    run = partial(subject.run, call)
    first = run()
    subject.run(dense_call(replace(sizes, seed=sizes.seed + 1), subject.declaration))
    second = run()
    wrong = ~same(second, first)
    for token, column in np.argwhere(wrong)[:1]:
        raise LawBroken(
            f"column {column} was {float(first[token, column])!r}, then {float(second[token, column])!r}", int(token)
        )
