# SPDX-License-Identifier: Apache-2.0
"""NVRTC through ctypes: compile CUDA text to a cubin or PTX on a machine with neither GPU nor driver.

The library comes from the package nvidia-cuda-nvrtc of the extra 'kernels'.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path


class CompileError(Exception):
    """The compiler refused the text; the message is its log."""


@dataclass(frozen=True)
class Compiled:
    """A compiled text.   names: name expressions to names in the binary.   log: with ptxas's figures, if asked for."""

    code: bytes
    names: dict[str, str]
    log: str


@cache
def library_path() -> Path | None:
    """The shared library, or None where the package is not installed."""
    for package in ("nvidia.cu13", "nvidia.cuda_nvrtc"):
        try:
            spec = find_spec(package)
        except ModuleNotFoundError:
            continue
        for folder in spec.submodule_search_locations or () if spec else ():
            found = sorted(path for path in Path(folder).glob("lib/libnvrtc.so.*") if "alt" not in path.name)
            if found:
                return found[0]
    return None


@cache
def library() -> ctypes.CDLL:
    path = library_path()
    assert path, "nvidia-cuda-nvrtc is not installed: pip install -e '.[kernels]'"
    for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins))  # opened by name later, which finds what is already loaded
    loaded = ctypes.CDLL(str(path))
    loaded.nvrtcGetErrorString.restype = ctypes.c_char_p
    return loaded


def version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def compile_text(text: str, architecture: str, options: Sequence[str], expressions: Sequence[str]) -> Compiled:
    """Compile a text. architecture: ``sm_90`` for a cubin, ``compute_90`` for PTX.   expressions: to instantiate"""
    program = ctypes.c_void_p()
    _call("nvrtcCreateProgram", ctypes.byref(program), text.encode(), b"refmoe.cu", 0, None, None)
    try:
        for expression in expressions:
            _call("nvrtcAddNameExpression", program, expression.encode())
        flags = [option.encode() for option in (f"-arch={architecture}", *options)]
        status = library().nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
        log = _read(program, "ProgramLog").rstrip(b"\0").decode()
        if status:
            raise CompileError(log or library().nvrtcGetErrorString(status).decode())
        names = {expression: _lowered(program, expression) for expression in expressions}
        return Compiled(_read(program, "CUBIN" if architecture.startswith("sm_") else "PTX"), names, log)
    finally:
        _call("nvrtcDestroyProgram", ctypes.byref(program))


@dataclass(frozen=True)
class Usage:
    """The resources of a kernel, as ptxas reports them."""

    registers: int
    spilled: int  # bytes, stores and loads
    stack: int
    shared: int


def usage(log: str) -> dict[str, Usage]:
    """The resources of every kernel in a log of ``--ptxas-options=-v``, by its name in the binary."""
    found = {}
    for block in re.split(r"Compiling entry function '", log)[1:]:
        stack, stores, loads = (_number(rf"(\d+) bytes {what}", block) for what in ("stack", "spill st", "spill lo"))
        found[block.partition("'")[0]] = Usage(
            _number(r"Used (\d+) registers", block), stores + loads, stack, _number(r"(\d+) bytes smem", block, 0)
        )
    return found


def _number(pattern: str, text: str, default: int | None = None) -> int:
    match = re.search(pattern, text)
    assert match or default is not None, f"no {pattern!r} in:\n{text}"
    return int(match[1]) if match else int(default or 0)


def _call(name: str, *arguments: object) -> None:
    status = library()[name](*arguments)
    if status:
        raise RuntimeError(f"{name}: {library().nvrtcGetErrorString(status).decode()}")


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    _call(f"nvrtcGet{what}", program, buffer)
    return buffer.raw


def _lowered(program: ctypes.c_void_p, expression: str) -> str:
    name = ctypes.c_char_p()
    _call("nvrtcGetLoweredName", program, expression.encode(), ctypes.byref(name))
    assert name.value
    return name.value.decode()
