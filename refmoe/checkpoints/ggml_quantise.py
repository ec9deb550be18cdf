# SPDX-License-Identifier: Apache-2.0
"""Quantise matrices for a GGUF file, by the packages' own functions: gguf's, and llama.cpp's for the K formats."""

from __future__ import annotations

import ctypes as c
import math
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.checkpoints.ggml_blocks import FORMATS
from refmoe.errors import require
from refmoe.spec.config import Config

MORE = "w2 of some layers"
"""The down projections of the first and the last eighth of the layers, and of every third between them."""
MIXTURES = {
    "Q4_K_M": {"": "Q4_K", "wk": "Q8_0", "wv": "Q8_0", "wo": "Q5_K", "output": "Q6_K", MORE: "Q6_K"},
    "Q5_K_M": {"": "Q5_K", "wk": "Q8_0", "wv": "Q8_0", "output": "Q6_K", MORE: "Q6_K"},
    "MXFP4_MOE": {"": "Q8_0", "w1": "MXFP4", "w2": "MXFP4", "w3": "MXFP4"},
}
"""The formats that llama.cpp's quantiser gives the matrices of a Mixtral 8x7B, by the last part of their names.

Source: `llama_tensor_get_type` in src/llama-quant.cpp. The entry without a name holds for all others.
"""
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""The format instead, for rows that are not whole blocks of 256. Rows that are not whole blocks of 32 become F16."""
KINDS = (*FORMATS, *MIXTURES)
"""The names under which a quantised file can be asked for: one format for all matrices, or a mixture."""


def format_of(kind: str, config: Config, name: str, width: int) -> str:
    """The format of one matrix in a quantised file.   kind: one of `KINDS`   name: canonical   width: of a row"""
    last = name.rpartition(".")[2]
    rules = MIXTURES.get(kind, {"": kind})
    if last == "w2" and MORE in rules and _more_bits(int(name.split(".")[1]), config.layers):
        last = MORE
    wanted = rules.get(last, rules[""])
    while wanted in FORMATS and width % FORMATS[wanted].size:
        wanted = FALLBACK.get(wanted, "F16")
    return wanted


def _more_bits(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def quantised(matrix: NDArray[np.float32], name: str) -> NDArray[np.uint8]:
    """A matrix in a format.   matrix: [.., in]   name: of the format   returns: [.., bytes of a row]

    Raises InputError when the package gguf, or for a K format xllamacpp, is not installed.
    """
    gguf: Any = require("gguf", "llama-cpp", "writing a GGUF file")
    kind = gguf.GGMLQuantizationType[name]
    if not name.endswith("_K"):
        made: NDArray[np.uint8] = gguf.quants.quantize(matrix, kind)
        return made
    given, format = np.ascontiguousarray(matrix, np.float32), FORMATS[name]
    width = given.shape[-1]
    made = np.zeros((*given.shape[:-1], width // format.size * format.nbytes), np.uint8)
    _library().ggml_quantize_chunk(
        int(kind), given.ctypes.data, made.ctypes.data, 0, math.prod(given.shape[:-1]), width, None
    )
    return made


@cache
def _library() -> Any:
    """llama.cpp's library in the wheel xllamacpp. Raises InputError when it is not installed."""
    module = require("xllamacpp.xllamacpp", "llama-cpp", "writing a K format of GGUF")
    library = c.CDLL(str(module.__file__))
    library.ggml_quantize_chunk.restype = c.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        c.c_int, c.c_void_p, c.c_void_p, c.c_int64, c.c_int64, c.c_int64, c.c_void_p,
    ]  # fmt: skip
    return library
