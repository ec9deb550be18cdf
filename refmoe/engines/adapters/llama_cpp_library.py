# SPDX-License-Identifier: Apache-2.0
"""The part of llama.cpp's C interface that the adapter needs, from the shared library in the wheel xllamacpp.

The wheel's Python interface is a server: it neither takes tokens nor gives tensors. Its shared library exports all of
llama.h and ggml.h. Two structs of llama.h are passed by value and differ from build to build. So `load_library` first
compares the library's defaults with those expected. Another build may be given by its file.
"""

from __future__ import annotations

import ctypes as c
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.errors import InputError, require
from refmoe.files.sentences import one_line
from refmoe.traces.trace import Run

PACKAGE = "xllamacpp"
LIBRARY = "xllamacpp, or a path of libllama"
"""The values of the option `library`."""
FLASH = {"off": 0, "on": 1}
"""LLAMA_FLASH_ATTN_TYPE_DISABLED and _ENABLED."""
TYPES = {"float32": 0, "float16": 1, "q8_0": 8, "q4_0": 2}
"""GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0 and GGML_TYPE_Q4_0."""
CODED = ("q8_0", "q4_0")
"""The types that are codes with scales."""
BLOCK = 32
"""The values of a head that share a scale in these types."""
ROUNDED = "+F16.input=float16+BF16.input=bfloat16"
"""The change of a policy for GGUF files: inputs of a matrix in a dtype are rounded to it."""
TURN = ("on", "off")
UNTURNED = "LLAMA_ATTN_ROT_DISABLE"
"""The variable by which a quantised cache keeps heads as they are, and not turned by a Hadamard matrix."""
DTYPES = {0: np.float32, 1: np.float16, 26: np.int32}
"""The NumPy dtypes of some values of ggml_type."""
LOUD = (3, 4)
"""GGML_LOG_LEVEL_WARN and _ERROR."""

RESERVE = 256
"""Bytes after a struct that is passed by value. A build whose struct is longer writes into them."""


class ModelParams(c.Structure):
    """llama_model_params. Its fields keep their defaults."""

    _fields_ = [("fields", c.c_char * 80), ("reserve", c.c_char * RESERVE)]


class ContextParams(c.Structure):
    """llama_context_params as in xllamacpp 2026.10.11549. The adapter does not use the fields in `rest`."""

    _fields_ = [
        *((name, c.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, c.c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c.c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type")),
        *((name, c.c_int32) for name in ("pooling_type", "attention_type", "flash_attn_type")),
        *((name, c.c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
        *((name, c.c_float) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", c.c_uint32),
        ("defrag_thold", c.c_float),
        ("cb_eval", c.c_void_p),
        ("cb_eval_user_data", c.c_void_p),
        ("type_k", c.c_int32),
        ("type_v", c.c_int32),
        ("rest", c.c_char * 56),
        ("reserve", c.c_char * RESERVE),
    ]


DEFAULTS = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_rs_seq": 0, "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1, "n_threads": 4, "n_threads_batch": 4, "ctx_type": 0, "rope_scaling_type": -1,
    "pooling_type": -1, "attention_type": -1, "flash_attn_type": -1, "rope_freq_base": 0.0, "rope_freq_scale": 0.0,
    "yarn_ext_factor": -1.0, "yarn_attn_factor": -1.0, "yarn_beta_fast": -1.0, "yarn_beta_slow": -1.0,
    "yarn_orig_ctx": 0, "defrag_thold": -1.0, "cb_eval": None, "cb_eval_user_data": None, "type_k": 1, "type_v": 1,
}  # fmt: skip
"""The fields that llama_context_default_params of xllamacpp 2026.10.11549 returns."""


class Batch(c.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.POINTER(c.c_float)),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    ]


class Tensor(c.Structure):
    """ggml_tensor up to its name."""

    _fields_ = [
        ("type", c.c_int32),
        ("buffer", c.c_void_p),
        ("ne", c.c_int64 * 4),
        ("nb", c.c_size_t * 4),
        ("op", c.c_int32),
        ("op_params", c.c_int32 * 16),
        ("flags", c.c_int32),
        ("src", c.c_void_p * 10),
        ("view_src", c.c_void_p),
        ("view_offs", c.c_size_t),
        ("data", c.c_void_p),
        ("name", c.c_char * 64),
    ]


EvalCallback = c.CFUNCTYPE(c.c_bool, c.POINTER(Tensor), c.c_bool, c.c_void_p)
"""Called twice for each tensor: before, to ask whether its value is wanted, and after it was computed."""
LogCallback = c.CFUNCTYPE(None, c.c_int32, c.c_char_p, c.c_void_p)

SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LogCallback, c.c_void_p]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c.c_void_p, [c.c_char_p, ModelParams]),
    "llama_model_free": (None, [c.c_void_p]),
    "llama_init_from_model": (c.c_void_p, [c.c_void_p, ContextParams]),
    "llama_free": (None, [c.c_void_p]),
    "llama_batch_init": (Batch, [c.c_int32, c.c_int32, c.c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c.c_int32, [c.c_void_p, Batch]),
    "llama_get_memory": (c.c_void_p, [c.c_void_p]),
    "llama_memory_seq_rm": (c.c_bool, [c.c_void_p, c.c_int32, c.c_int32, c.c_int32]),
    "ggml_op_desc": (c.c_char_p, [c.POINTER(Tensor)]),
}
"""Per function its result and its arguments."""


def load_library(log: Callable[[str], object], path: Path | None = None) -> Any:
    """A library that is ready to load models: the wheel's, or the one in a file.

    log: called with each warning or error, end of line included.
    path: of libllama, whose other libraries lie beside it, those of its backends included.

    Raises InputError when there is none, RuntimeError when its structs differ from those above.
    """
    if path is None:
        library: Any = c.CDLL(require(f"{PACKAGE}.{PACKAGE}", "llama-cpp", "the adapter llama_cpp").__file__)
    else:
        library = _opened(path)
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments

    def hear(level: int, text: bytes, _: Any) -> None:
        if level in LOUD:
            log(text.decode(errors="replace"))

    library.heard = LogCallback(hear)  # must live as long as the library
    library.llama_log_set(library.heard, None)
    found = library.llama_context_default_params()
    for field, value in DEFAULTS.items():
        if getattr(found, field) != value:
            raise RuntimeError(
                f"llama_context_params has {field} = {getattr(found, field)} by default, but {value} was expected: "
                f"this build of {path or PACKAGE} has another struct than the one that the adapter was written for"
            )
    library.llama_backend_init()
    if path is not None:
        library.ggml_backend_load_all_from_path(bytes(path.parent))
    return library


def _opened(path: Path) -> Any:
    """The library in a file. Raises InputError where it cannot be opened."""
    try:
        for pattern in ("libggml-base*.so*", "libggml.*so*"):
            for needed in sorted(path.parent.glob(pattern)):
                c.CDLL(str(needed), mode=c.RTLD_GLOBAL)
        library = c.CDLL(str(path), mode=c.RTLD_GLOBAL)
        library.ggml_backend_load_all_from_path.argtypes = [c.c_char_p]
    except (OSError, AttributeError) as error:
        raise InputError(f"option library is '{path}', but {LIBRARY} was expected: {one_line(error)}") from None
    return library


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """A copy of a tensor's values. The axes are in NumPy's order; ggml numbers them from the fastest.

    Raises KeyError for a type outside `DTYPES`, such as a quantised one.
    """
    dtype = np.dtype(DTYPES[tensor.type])
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    size = dtype.itemsize + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    memory = (c.c_char * size).from_address(tensor.data)
    return np.ndarray(shape, dtype, memory, strides=strides).copy()


def source(tensor: Tensor, number: int) -> Tensor:
    """A tensor that the operation of another one reads.   number: from 0"""
    found: Tensor = c.cast(tensor.src[number], c.POINTER(Tensor))[0]
    return found


def set_turn(turn: str) -> None:
    """Let contexts that are made from now on turn heads, or not.   turn: one of `TURN`"""
    if turn == "off":
        os.environ[UNTURNED] = "1"
    else:
        os.environ.pop(UNTURNED, None)


def new_context(library: Any, model: int, callback: Any, options: dict[str, int]) -> int:
    """A context with empty caches. Raises RuntimeError when llama.cpp does not make one.

    callback: an `EvalCallback`; the caller keeps it alive as long as the context.   options: fields of `ContextParams`.
    """
    params = library.llama_context_default_params()
    for name, value in options.items():
        setattr(params, name, value)
    params.cb_eval = c.cast(callback, c.c_void_p)
    context: int | None = library.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("llama.cpp does not make a context; what it says is on standard error")
    return context


def decode(library: Any, context: int, run: Run, sequence: int) -> None:
    """Cut the cache of a sequence to the first new position, then run the new tokens, with logits of each.

    sequence: its number in the context.   Raises RuntimeError when llama.cpp returns an error.
    """
    library.llama_memory_seq_rm(library.llama_get_memory(context), sequence, run.positions[0], -1)
    batch = library.llama_batch_init(len(run.tokens), 0, 1)
    batch.n_tokens = len(run.tokens)
    for i, (token, position) in enumerate(zip(run.tokens, run.positions, strict=True)):
        batch.token[i], batch.pos[i], batch.logits[i] = token, position, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
    status = library.llama_decode(context, batch)
    library.llama_batch_free(batch)
    if status:
        raise RuntimeError(f"{run.run}: llama_decode returns {status}; what it says is on standard error")
