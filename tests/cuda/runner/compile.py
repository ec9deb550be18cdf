# SPDX-License-Identifier: Apache-2.0
"""From CUDA text to a shared library, which is built once and kept under its hash."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
CACHE = HERE.parents[2] / "build" / "kernels-on-cpu"
COMPILER = os.environ.get("CXX", "g++")

PLAIN = ("-O1",)
CHECKED = ("-O1", "-fsanitize=undefined", "-fno-sanitize=vptr", "-fsanitize-undefined-trap-on-error")
"""Undefined behaviour (an index past a shared array, a misaligned vector, signed overflow) traps without a library."""
ALWAYS = (
    "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-clobbered",
    "-Wno-unused-variable", "-ffp-contract=off", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-fvisibility=hidden",
    "-fno-gnu-unique", "-fstack-clash-protection",
)  # fmt: skip
"""No contraction: the text says where a fused multiply-add is. No fortification: it forbids longjmp between stacks.

Symbols are hidden and not unique, so each library has its own fibers and shared memory, also in templates. Stacks are
probed, so that a large frame cannot skip the inaccessible page.
"""


class CompileError(Exception):
    """The host compiler refused the text; the message is its output."""


def missing_compiler() -> str | None:
    """Why this machine cannot compile, or None if it can."""
    return None if shutil.which(COMPILER) else f"no C++ compiler: {COMPILER} is not on the PATH"


@cache
def runner_text() -> bytes:
    return b"".join(path.read_bytes() for path in sorted(HERE.glob("*.h")))


def shared_library(text: str, expressions: Sequence[str], flags: Sequence[str] = PLAIN) -> ctypes.CDLL:
    """The library of the text, with one `launch_<i>` for each expression, built unless it exists already."""
    exports = "".join(f"EXPORT({i}, {expression})\n" for i, expression in enumerate(expressions))
    whole = f'{text}\n#line 1 "exports"\n{exports}'
    command = (COMPILER, *ALWAYS, *flags, "-include", str(HERE / "cuda.h"), "-x", "c++", "-", "-o")
    key = hashlib.sha256(repr((whole, command)).encode() + runner_text()).hexdigest()[:24]
    library = CACHE / f"{key}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with open(CACHE / f"{key}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process of the same test run builds it only once
            if not library.exists():
                _build(command, whole, library)
    return ctypes.CDLL(str(library))


def _build(command: Sequence[str], text: str, library: Path) -> None:
    unfinished = library.with_suffix(".tmp")
    done = subprocess.run([*command, str(unfinished)], input=text, text=True, capture_output=True)
    if done.returncode:
        raise CompileError(done.stderr)
    unfinished.replace(library)
