# SPDX-License-Identifier: Apache-2.0
"""Write a Hugging Face checkpoint whose matrices are quantised, as published ones are.

The matrices of attention and of the experts are quantised, or those of attention alone. Embedding, router and output
matrix stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from refmoe.checkpoints.names import named_weights, untied
from refmoe.checkpoints.quantisation import ATTENTION_ALONE, ATTENTION_AND_EXPERTS, FIELD
from refmoe.checkpoints.write import (
    DTYPE_NAMES,
    Tensors,
    hf_config,
    hf_tensors,
    new_folder,
    refuse_others,
    write_json,
    write_shard,
)
from refmoe.errors import InputError
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters

Matrix = NDArray[np.float32]
LARGEST_E4M3 = 448.0


@dataclass(frozen=True)
class Recipe:
    """How matrices are quantised."""

    unit: tuple[int, int]
    """The least rows and inputs: a matrix whose sizes are no multiples stays as it is."""
    parts: Callable[[Matrix], Tensors]
    """From a matrix [out, in] to its entries in the file."""
    settings: dict[str, Any]
    """`quantization_config`, without the list of matrices that stay as they are."""
    ignored: str
    """The name of that list."""


def _scales(matrix: Matrix, high: int, wide: int, largest: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Float32 scales of blocks, [out / high, in / wide], and each element over its scale, in float32."""
    out, width = matrix.shape
    blocks = matrix.reshape(out // high, high, width // wide, wide)
    most = np.abs(blocks).max(axis=(1, 3), keepdims=True)
    scales = np.where(most > 0, most / np.float32(largest), np.float32(1))
    return scales[:, 0, :, 0], (blocks / scales).reshape(out, width)


def _fp8(high: int, wide: int, part: str) -> Callable[[Matrix], Tensors]:
    """high, wide: of a block, 0 for all rows or inputs"""

    def parts(matrix: Matrix) -> Tensors:
        scales, over = _scales(matrix, high or matrix.shape[0], wide or matrix.shape[1], LARGEST_E4M3)
        codes = over.clip(-LARGEST_E4M3, LARGEST_E4M3).astype(ml_dtypes.float8_e4m3fn)
        return {"weight": codes, part: scales}

    return parts


def _int4(wide: int) -> Callable[[Matrix], Tensors]:
    def parts(matrix: Matrix) -> Tensors:
        scales, over = _scales(matrix, 1, wide, 7.5)
        codes = (np.rint(over).clip(-8, 7) + 8).astype(np.uint8)
        packed = np.ascontiguousarray(codes[:, ::2] | codes[:, 1::2] << np.uint8(4)).view("<i4")
        return {
            "weight_packed": packed, "weight_scale": scales.astype(ml_dtypes.bfloat16),
            "weight_shape": np.array(matrix.shape, np.int64),
        }  # fmt: skip

    return parts


def _int8(matrix: Matrix) -> Tensors:
    scales, over = _scales(matrix, 1, matrix.shape[1], 127.5)
    return {"weight": np.rint(over).clip(-128, 127).astype(np.int8), "weight_scale": scales}


def _compressed(form: str, inputs: str | None = None, **weights: Any) -> dict[str, Any]:
    """The configuration of compressed-tensors for one group of matrices.

    inputs: the type to which engines quantise each token's inputs; None: they do not
    """
    group: dict[str, Any] = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False} | weights}
    if inputs is not None:  # without them, the library takes whole codes for packed ones
        token = {"num_bits": 8, "type": inputs, "symmetric": True, "strategy": "token", "dynamic": True}
        group["input_activations"] = token
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
        "quantization_status": "compressed",
    }  # fmt: skip


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
RECIPES = {
    "fp8-block128": Recipe((128, 128), _fp8(128, 128, "weight_scale_inv"), _FP8, "modules_to_not_convert"),
    "fp8-channel": Recipe(
        (1, 1), _fp8(1, 0, "weight_scale"),
        _compressed("float-quantized", "float", num_bits=8, type="float", strategy="channel"), "ignore",
    ),
    "int8-channel": Recipe(
        (1, 1), _int8, _compressed("int-quantized", "int", num_bits=8, type="int", strategy="channel"), "ignore"
    ),
    "int4-group32": Recipe(
        (1, 32), _int4(32),
        _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32), "ignore",
    ),
    "int4-group128": Recipe(
        (1, 128), _int4(128),
        _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=128), "ignore",
    ),
}  # fmt: skip
"""The ways in which matrices are quantised."""
ATTENTION = ":attention"
"""The end of a name whose recipe is for the matrices of attention alone."""
NAMES = (*RECIPES, *(recipe + ATTENTION for recipe in RECIPES))
"""The names under which a quantised checkpoint can be asked for."""


def write_quantised(folder: Path, config: Config, parameters: Parameters, recipe: str, dtype: str) -> None:
    """Write a checkpoint.

    recipe: one of `NAMES`   dtype: of all that is not quantised, as for `write_checkpoint`

    Raises InputError as `write_checkpoint` does, and when no matrix has the sizes that the recipe needs.
    """
    rules, weights = RECIPES[recipe.removesuffix(ATTENTION)], untied(named_weights(parameters))
    parts = ATTENTION_ALONE if recipe.endswith(ATTENTION) else ATTENTION_AND_EXPERTS
    tensors: Tensors = {}
    left: list[str] = []
    for part in hf_tensors(config, weights, np.dtype(np.float32), fused=False):
        for name, array in part.items():
            module = name.removesuffix(".weight")
            fits = array.ndim == 2 and not any(size % unit for size, unit in zip(array.shape, rules.unit, strict=True))
            if fits and parts.fullmatch(module):
                tensors |= {f"{module}.{entry}": stored for entry, stored in rules.parts(array).items()}
            else:
                tensors[name] = _at(array, dtype, name)
                left += [module] if array.ndim == 2 and name != "model.embed_tokens.weight" else []
    if not any("weight_scale" in name for name in tensors):
        high, wide = rules.unit
        raise InputError(f"no matrix has whole blocks of {high} rows and {wide} inputs, which {recipe} needs")
    with new_folder(folder):
        path, configuration = folder / "model.safetensors", folder / "config.json"
        refuse_others(folder, configuration, [path])
        configuration.unlink(missing_ok=True)
        write_shard(path, tensors)
        values = hf_config(config, dtype, tied="output" not in weights)
        write_json(configuration, values | {FIELD: rules.settings | {rules.ignored: left}})


def _at(array: NDArray[Any], dtype: str, name: str) -> NDArray[Any]:
    """Values at a dtype. Raises InputError when it cannot represent one of them."""
    made = array.astype(DTYPE_NAMES[dtype])
    if not np.array_equal(made.astype(np.float32), array):
        raise InputError(f"{name} has values that {dtype} cannot hold, so it cannot be written at {dtype}")
    return made
