# SPDX-License-Identifier: Apache-2.0
"""Folders of quantised safetensors, packed by the loops that the formats are published with, one element at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.checkpoints.write import write_checkpoint
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters
from tests.checkpoints.models import put_together, take_apart

CONFIG = Config(
    dim=128, layers=2, heads=8, kv_heads=2, head_dim=32, hidden_dim=160, vocab=37, experts=3, experts_per_token=2,
    norm_eps=1e-5, rope_theta=3e4,
)  # fmt: skip
"""Of matrices of 64 to 256 rows and inputs, not all multiples of 128."""
Array = NDArray[Any]
CODES = {
    np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.int8): "I8", np.dtype(np.int32): "I32", np.dtype(np.int64): "I64",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3", np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0",
}  # fmt: skip
"""The names of dtypes in safetensors, whose NumPy front end knows no floats of eight bits."""


@dataclass
class Matrix:
    """A quantised matrix: its entries in the file, and its values."""

    parts: dict[str, Array]
    values: Array
    """float64: scale times code minus zero point has at most 53 bits in each format."""


@dataclass(frozen=True)
class Variant:
    """A way to store matrices."""

    config: dict[str, Any]
    quantise: Callable[[Array], Matrix]
    name: str
    """As `refmoe info` prints it."""
    fused: bool = False
    ignored: tuple[str, ...] = field(default=())


def is_quantised(name: str) -> bool:
    return name.endswith(".weight") and ("_proj." in name or ".experts." in name)


def write_tensors(path: Path, arrays: dict[str, Array]) -> None:
    """A safetensors file."""
    header: dict[str, Any] = {}
    data = b""
    for name, array in sorted(arrays.items(), key=lambda pair: -pair[1].dtype.itemsize):
        raw = np.ascontiguousarray(array).tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": CODES[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        data += raw
    put_together(path, header, data)


def read_tensors(path: Path) -> dict[str, Array]:
    header, data = take_apart(path)
    dtypes = {code: dtype for dtype, code in CODES.items()}
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], dtypes[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }


def write(
    folder: Path, variant: Variant, config: Config = CONFIG, parameters: Parameters | None = None
) -> dict[str, Array]:
    """Write a folder. Returns the values of each tensor of the file that it was before, as float64.

    parameters: None for synthetic ones
    """
    parameters = parameters or synthetic_checkpoint(config, 7).parameters
    write_checkpoint(folder, config, parameters, "float32", fused=variant.fused)
    path = folder / "model.safetensors"
    tensors, values = dict[str, Array](), dict[str, Array]()
    for name, array in read_tensors(path).items():
        values[name] = array.astype(np.float64)
        if not (is_quantised(name) or name.endswith("_proj")) or any(each in name for each in variant.ignored):
            tensors[name] = array
            continue
        matrix = variant.quantise(array)
        values[name] = matrix.values
        module = name.removesuffix(".weight")
        for part, stored in matrix.parts.items():
            fused = f"{module}{part.removeprefix('weight')}"
            tensors[fused if name == module else f"{module}.{part}"] = stored
    write_tensors(path, tensors)
    values_of_config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values_of_config | {"quantization_config": variant.config}))
    return values


# ---- scales and codes


def blocks_of(matrix: Array, high: int, wide: int) -> list[tuple[Any, ...]]:
    """The slices of the blocks, row by row."""
    out, width = matrix.shape[-2:]
    return [(..., slice(i, i + high), slice(j, j + wide)) for i in range(0, out, high) for j in range(0, width, wide)]


def scaled(matrix: Array, high: int, wide: int, largest: float, dtype: Any) -> tuple[Array, Array]:
    """Scales [.., row blocks, input blocks], and each element over its scale, in float64."""
    out, width = matrix.shape[-2:]
    shape = (*matrix.shape[:-2], -(-out // high), -(-width // wide))
    scales, over = np.empty(shape, dtype), np.empty(matrix.shape)
    for n, place in enumerate(blocks_of(matrix, high, wide)):
        scale = (np.abs(matrix[place]).max((-2, -1)) / largest).astype(np.float64)
        if dtype == ml_dtypes.float8_e8m0fnu:
            scale = 2.0 ** np.ceil(np.log2(scale))
        scale = np.asarray(scale).astype(dtype)
        scales[(..., *divmod(n, shape[-1]))] = scale
        over[place] = matrix[place] / np.asarray(scale, np.float64)[..., None, None]
    return scales, over


def spread(grid: Array, high: int, wide: int, shape: tuple[int, ...]) -> Array:
    """Scales of blocks for each element, as float64."""
    wide_grid = np.repeat(np.repeat(grid.astype(np.float64), high, -2), wide, -1)
    return wide_grid[..., : shape[-2], : shape[-1]]


def fp8(high: int, wide: int, dtype: Any = np.float32, part: str = "weight_scale_inv", shape: Any = None) -> Any:
    """Floats of eight bits.   high, wide: of a block, 0 for all   shape: of the scales, from theirs as a grid"""

    def quantise(matrix: Array) -> Matrix:
        tall, broad = high or matrix.shape[-2], wide or matrix.shape[-1]
        scales, over = scaled(matrix, tall, broad, 448, dtype)
        codes = over.astype(ml_dtypes.float8_e4m3fn)
        values = codes.astype(np.float64) * spread(scales, tall, broad, matrix.shape)
        stored = scales if shape is None else scales.reshape(shape(scales))
        return Matrix({"weight": codes, part: stored}, values)

    return quantise


def int8(wide: int, dtype: Any, symmetric: bool = True) -> Any:
    def quantise(matrix: Array) -> Matrix:
        broad = wide or matrix.shape[-1]
        scales, over = scaled(matrix, 1, broad, 127, dtype)
        zeros = np.arange(scales.size, dtype=np.int64).reshape(scales.shape) % 11 - 5 if not symmetric else None
        codes = np.rint(over) + (0 if zeros is None else spread(zeros, 1, broad, matrix.shape))
        codes = codes.clip(-128, 127).astype(np.int8)
        zero = 0 if zeros is None else spread(zeros, 1, broad, matrix.shape)
        values = (codes - zero) * spread(scales, 1, broad, matrix.shape)
        parts = {"weight": codes, "weight_scale": scales}
        return Matrix(parts | ({} if zeros is None else {"weight_zero_point": zeros.astype(np.int8)}), values)

    return quantise


def packed_rows(codes: Array, bits: int, offset: int) -> Array:
    """`pack_to_int32` of compressed-tensors: the first element of a row in the lowest bits."""
    words = np.zeros((len(codes), -(-codes.shape[1] * bits // 32)), np.uint32)
    for i in range(codes.shape[1]):
        word, place = divmod(i * bits, 32)
        words[:, word] |= (codes[:, i] + offset).astype(np.uint32) << np.uint32(place)
    return words.view(np.int32)


def pack_quantized(wide: int, bits: int = 4, dtype: Any = ml_dtypes.bfloat16, symmetric: bool = True) -> Any:
    def quantise(matrix: Array) -> Matrix:
        broad, middle = wide or matrix.shape[-1], 1 << (bits - 1)
        scales, over = scaled(matrix, 1, broad, middle - 0.5, dtype)
        zeros = np.arange(scales.size).reshape(scales.shape) % 7 - 3 if not symmetric else np.zeros(scales.shape, int)
        zero = spread(zeros, 1, broad, matrix.shape)
        codes = (np.rint(over) + zero).clip(-middle, middle - 1)
        parts = {
            "weight_packed": packed_rows(codes.astype(np.int64), bits, middle), "weight_scale": scales,
            "weight_shape": np.array(matrix.shape, np.int64),
        }  # fmt: skip
        if not symmetric:
            parts["weight_zero_point"] = np.ascontiguousarray(packed_rows(zeros.T, bits, middle).T)
        return Matrix(parts, (codes - zero) * spread(scales, 1, broad, matrix.shape))

    return quantise


def integers(matrix: Array, wide: int, bits: int, symmetric: bool, order: Array) -> tuple[Array, ...]:
    """Codes 0 to 2^bits - 1, zero points and float16 scales of groups of inputs, and the values.   order: of groups"""
    width, top = matrix.shape[1], (1 << bits) - 1
    group = order // (wide or width)
    count = int(group.max()) + 1
    scales, zeros = np.empty((count, len(matrix)), np.float16), np.empty((count, len(matrix)), np.int64)
    for g in range(count):
        part = matrix[:, group == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            high = np.maximum(-low, high)
            low = -high
        scales[g] = (high - low) / top
        zeros[g] = (top + 1) // 2 if symmetric else np.rint(-low / scales[g].astype(np.float64)).clip(1, top)
    over = matrix / scales[group].T.astype(np.float64) + zeros[group].T
    codes = np.rint(over).clip(0, top).astype(np.int64)
    return codes, zeros, scales, (codes - zeros[group].T) * scales[group].T.astype(np.float64), group


def gptq(wide: int, bits: int = 4, version: int = 1, symmetric: bool = True, reordered: bool = False) -> Any:
    """AutoGPTQ's `pack`. Version 1 stores each zero point less one."""

    def quantise(matrix: Array) -> Matrix:
        order = np.arange(matrix.shape[1])
        order = np.random.default_rng(3).permutation(order) if reordered else order
        codes, zeros, scales, values, group = integers(matrix, wide, bits, symmetric, order)
        per = 32 // bits
        qweight = np.zeros((matrix.shape[1] // per, len(matrix)), np.uint32)
        for i in range(matrix.shape[1]):
            qweight[i // per] |= codes[:, i].astype(np.uint32) << np.uint32(bits * (i % per))
        qzeros = np.zeros((len(zeros), len(matrix) // per), np.uint32)
        for o in range(len(matrix)):
            qzeros[:, o // per] |= (zeros[:, o] - (version == 1)).astype(np.uint32) << np.uint32(bits * (o % per))
        parts = {"qweight": qweight.view(np.int32), "qzeros": qzeros.view(np.int32), "scales": scales}
        return Matrix(parts | {"g_idx": group.astype(np.int32)}, values)

    return quantise


def awq(wide: int) -> Any:
    """AutoAWQ's `WQLinear_GEMM.from_linear`."""

    def quantise(matrix: Array) -> Matrix:
        order = np.arange(matrix.shape[1])
        codes, zeros, scales, values, _ = integers(matrix, wide, 4, False, order)
        packed = []
        for whole in (codes.T, zeros):
            words = np.zeros((len(whole), whole.shape[1] // 8), np.uint32)
            for column in range(words.shape[1]):
                for i, place in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                    words[:, column] |= whole[:, column * 8 + place].astype(np.uint32) << np.uint32(i * 4)
            packed.append(words.view(np.int32))
        return Matrix({"qweight": packed[0], "qzeros": packed[1], "scales": scales}, values)

    return quantise


def of_groups(form: str, **weights: Any) -> dict[str, Any]:
    """The configuration that compressed-tensors writes."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*gate$"], "kv_cache_scheme": None, "quantization_status": "compressed",
        "global_compression_ratio": None, "sparsity_config": {}, "transform_config": {}, "version": "0.20.0",
    }  # fmt: skip


FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
BFLOAT16 = ml_dtypes.bfloat16
VARIANTS = {
    "fp8-block": Variant(FP8 | {"weight_block_size": [128, 128]}, fp8(128, 128), "fp8-block128x128"),
    "fp8-block-small": Variant(FP8 | {"weight_block_size": [32, 64]}, fp8(32, 64, BFLOAT16), "fp8-block32x64"),
    "fp8-block-e8m0": Variant(
        FP8 | {"weight_block_size": [128, 128]}, fp8(128, 128, ml_dtypes.float8_e8m0fnu), "fp8-block128x128"
    ),
    "fp8-block-fused": Variant(
        FP8 | {"weight_block_size": [128, 128]}, fp8(128, 128), "fp8-block128x128", fused=True
    ),
    "fp8-tensor": Variant(FP8, fp8(0, 0, part="weight_scale", shape=lambda grid: ()), "fp8-tensor"),
    "fp8-tensor-of-one": Variant(FP8, fp8(0, 0, BFLOAT16, "weight_scale", lambda grid: (1,)), "fp8-tensor"),
    "fp8-channel": Variant(FP8, fp8(1, 0, part="weight_scale"), "fp8-channel"),
    "fp8-ignored": Variant(
        FP8 | {"weight_block_size": [128, 128], "modules_to_not_convert": ["o_proj", "experts.1.w2"]}, fp8(128, 128),
        "fp8-block128x128", ignored=("o_proj", "experts.1.w2"),
    ),
    "ct-float-channel": Variant(
        of_groups("float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True),
        fp8(1, 0, BFLOAT16, "weight_scale"), "fp8-channel",
    ),
    "ct-float-tensor": Variant(
        of_groups("float-quantized", num_bits=8, type="float", strategy="tensor", symmetric=True),
        fp8(0, 0, np.float32, "weight_scale", lambda grid: (1,)), "fp8-tensor",
    ),
    "ct-float-block": Variant(
        of_groups("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[128, 128]),
        fp8(128, 128, BFLOAT16, "weight_scale"), "fp8-block128x128",
    ),
    "ct-int8-channel": Variant(
        of_groups("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True), int8(0, np.float32),
        "int8-channel",
    ),
    "ct-int8-zeros": Variant(
        of_groups("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False),
        int8(0, BFLOAT16, False), "int8-channel",
    ),
    "ct-int8-group": Variant(
        of_groups("int-quantized", num_bits=8, type="int", group_size=32, symmetric=True), int8(32, np.float16),
        "int8-group32",
    ),
    "ct-int4-group": Variant(
        of_groups("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=True),
        pack_quantized(32), "int4-group32",
    ),
    "ct-int4-zeros": Variant(
        of_groups("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=False),
        pack_quantized(32, dtype=np.float16, symmetric=False), "int4-group32",
    ),
    "ct-int4-channel": Variant(
        of_groups("pack-quantized", num_bits=4, type="int", group_size=-1), pack_quantized(0), "int4-channel"
    ),
    "ct-int8-packed": Variant(
        of_groups("pack-quantized", num_bits=8, type="int", strategy="channel"), pack_quantized(0, bits=8),
        "int8-channel",
    ),
    "gptq": Variant(GPTQ, gptq(32), "gptq-int4-group32"),
    "gptq-v1-zeros": Variant(
        GPTQ | {"sym": False, "checkpoint_format": "gptq"}, gptq(32, symmetric=False), "gptq-int4-group32"
    ),
    "gptq-v2": Variant(GPTQ | {"checkpoint_format": "gptq_v2"}, gptq(32, version=2), "gptq-int4-group32"),
    "gptq-v2-zeros": Variant(
        GPTQ | {"checkpoint_format": "gptq_v2", "sym": False}, gptq(32, version=2, symmetric=False), "gptq-int4-group32"
    ),
    "gptq-act-order": Variant(GPTQ | {"desc_act": True}, gptq(32, reordered=True), "gptq-int4-group32"),
    "gptq-int8": Variant(GPTQ | {"bits": 8}, gptq(32, bits=8), "gptq-int8-group32"),
    "gptq-one-group": Variant(GPTQ | {"group_size": -1}, gptq(0), "gptq-int4-channel"),
    "awq": Variant(AWQ, awq(32), "awq-int4-group32"),
    "awq-one-group": Variant(AWQ | {"group_size": -1, "version": "GEMM"}, awq(0), "awq-int4-channel"),
}  # fmt: skip
