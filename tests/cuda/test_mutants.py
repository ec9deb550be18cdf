# SPDX-License-Identifier: Apache-2.0
"""The tests of the kernels can fail: every one-line bug compiles, and is caught by a law of its kernel."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest

from refmoe.cuda.kernels.calls import Kernels
from refmoe.cuda.kernels.kernel import C_TYPES, STORED, GetFunction, Kernel
from refmoe.cuda.kernels.source import text
from refmoe.cuda.kernels.table import KERNELS
from tests.cuda.examples import examples
from tests.cuda.laws import Run
from tests.cuda.mutants import MUTANTS, Mutant
from tests.cuda.on_cpu import PoisonedNumpy, in_every_order, kernels, module, needs_compiler
from tests.cuda.runner.compile import CHECKED, PLAIN
from tests.cuda.runner.module import EVERY_ORDER, Conditions, LaunchError, Module

pytestmark = needs_compiler


def of(kernel: Kernel) -> tuple[Mutant, ...]:
    return tuple(mutant for mutant in MUTANTS if mutant.kernel == kernel.name)


def compiled(kernel: Kernel, dtype: str) -> tuple[Module, list[str]]:
    """The kernel and all its mutants in one library, each in its own namespace, and their names there.

    Raises CompileError where a mutant does not compile, as such a bug would be useless.
    """
    sources = [text(kernel.file), *(mutant.source() for mutant in of(kernel))]
    whole = "".join(f"namespace mutant_{i} {{\n{source}\n}}\n" for i, source in enumerate(sources))
    template = f"<mutant_{{i}}::{C_TYPES[dtype]}>" if kernel.dtypes else ""
    expressions = [f"mutant_{i}::{kernel.name}{template.format(i=i)}" for i in range(len(sources))]
    return Module(whole, expressions, (*PLAIN, "-w")), expressions  # a bug may leave a variable unused


def run_with(changed: Module, changed_name: str, file: str, name: str) -> Run:
    """`in_every_order`, with one kernel, `name` of `file`, taken from the changed module."""

    def changed_kernels(conditions: Conditions) -> Kernels:
        def functions(of_file: str) -> GetFunction:
            def get_function(asked: str) -> Callable[..., None]:
                if (of_file, asked) == (file, name):
                    return changed.under(conditions)(changed_name)
                return module(of_file).under(conditions)(asked)

            return get_function

        return Kernels(PoisonedNumpy(), functions)

    return lambda call: in_every_order(call, over=changed_kernels)


def caught(run: Run, kernel: Kernel, dtype: str) -> bool:
    """Whether the law fails on any example of the kernel."""
    for law in examples(kernel.name, dtype):
        try:
            law(run)
        except (AssertionError, LaunchError):
            return True
    return False


def caught_apart(run: Run, kernel: Kernel, dtype: str) -> bool:
    """`caught` in a process of its own, as a bug may write beyond all guards and destroy memory that is used later.

    A bug that kills its process is caught.
    """
    child = os.fork()
    if child == 0:
        status = 2
        try:
            status = 0 if caught(run, kernel, dtype) else 1
        finally:
            os._exit(status)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended != 2, "the law itself has failed"
    return ended != 1


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_one_line_bug_is_caught(kernel: Kernel) -> None:
    dtype = "bfloat16"
    library, expressions = compiled(kernel, dtype)
    name = kernel.expression(dtype if kernel.dtypes else None)
    survivors = [
        name_of_bug
        for name_of_bug, expression in zip(("none", *(mutant.name for mutant in of(kernel))), expressions, strict=True)
        if not caught_apart(run_with(library, expression, kernel.file, name), kernel, dtype)
    ]
    assert survivors == ["none"]


def test_every_kernel_has_mutants() -> None:
    count = Counter(mutant.kernel for mutant in MUTANTS)
    assert all(count[kernel.name] >= 3 for kernel in KERNELS)
    assert len({(mutant.kernel, mutant.name) for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dtype", STORED)
def test_the_kernel_itself_is_not(kernel: Kernel, dtype: str) -> None:
    """No law catches the unchanged kernel, in the build that traps undefined behaviour."""
    for law in examples(kernel.name, dtype):
        law(lambda call: in_every_order(call, EVERY_ORDER[:3], partial(kernels, flags=CHECKED)))
