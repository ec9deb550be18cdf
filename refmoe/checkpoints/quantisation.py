# SPDX-License-Identifier: Apache-2.0
"""The scheme in `quantization_config` of a config.json, and the tensors of a folder, assembled by that scheme.

A folder that contradicts itself is refused: engines then load other numbers, or random ones, and say nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from refmoe.checkpoints.scaled import (
    E4M3,
    SCALES,
    AwqCodes,
    Codes,
    GptqCodes,
    PackedCodes,
    PlainCodes,
    ScaledTensor,
    ZeroPoints,
    loaded,
)
from refmoe.errors import InputError
from refmoe.files.json_file import JsonFile
from refmoe.files.safetensors_file import StoredTensor
from refmoe.files.sentences import quoted, shown

FIELD = "quantization_config"
METHODS = ("fp8", "compressed-tensors", "gptq", "awq")
ATTENTION_ALONE = re.compile(r".*self_attn\.[qkvo]_proj")
"""The matrices of attention."""
ATTENTION_AND_EXPERTS = re.compile(r".*(self_attn\.[qkvo]_proj|experts\.\d+\.w[123]|experts\.(gate_up|down)_proj)")
"""The matrices that every published scheme quantises. Router, embedding and output matrix are left out by some."""
MOST_REPEATS = 3
"""The most repetitions in a pattern of a file. Python's matcher takes a time of the length of a name to this power."""
UNREAD = (
    ("sparsity_config", "matrices that are not sparse were expected"),
    ("transform_config", "matrices that are not transformed were expected"),
)
"""Parts of compressed-tensors' configuration that are not read."""
CACHE_FIELDS = ("kv_cache_scheme", "kv_cache_quant_method", "kv_cache_quant_algo")
"""Names under which the methods declare a quantised cache of keys and values, which is not read."""
CACHE_SCALES = re.compile(r".*\.(([kv]|kv|[kv]_cache|q|prob)_scale|[kv]_zero_point|[kv]_proj\.output_scale)")
"""The names of tensors for a cache: those of compressed-tensors, of vLLM and of AutoFP8."""


@dataclass(frozen=True)
class Scheme:
    """How one kind of matrix is stored."""

    packing: str
    """``"plain"``, ``"packed"``, ``"gptq"``, ``"gptq_v1"`` or ``"awq"``."""
    bits: int
    floating: bool = False
    strategy: str = "tensor"
    """``"tensor"``, ``"channel"``, ``"group"`` or ``"block"``: what shares a scale."""
    block: tuple[int, int] = (1, 1)
    """How many rows and how many inputs share a scale, for ``"group"`` and ``"block"``."""
    symmetric: bool = True
    reordered: bool = False
    """Whether the groups of inputs are in another order than the inputs: GPTQ's `desc_act`."""

    @property
    def name(self) -> str:
        """As `refmoe info` prints it, such as ``int4-group128``."""
        extent = {"group": f"{self.block[1]}", "block": "x".join(map(str, self.block))}.get(self.strategy, "")
        method = {"gptq_v1": "gptq-", "gptq": "gptq-", "awq": "awq-"}.get(self.packing, "")
        return f"{method}{'fp' if self.floating else 'int'}{self.bits}-{self.strategy}{extent}"


@dataclass(frozen=True)
class Quantisation:
    """The schemes of all matrices of a folder."""

    file: JsonFile
    """The object `quantization_config`."""
    schemes: tuple[tuple[tuple[str, ...], Scheme], ...]
    """Targets and the scheme of those matrices; the first that names a matrix holds."""
    ignored: tuple[str, ...]
    """The modules that are not quantised: names, parts of names, or ``re:`` and a pattern."""

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of a module, such as ``model.layers.0.self_attn.q_proj``."""
        named = (scheme for targets, scheme in self.schemes if any(matches(each, module) for each in targets))
        linear = (scheme for targets, scheme in self.schemes if "Linear" in targets)
        return next(named, None) or next(linear, None)


def matches(pattern: str, module: str) -> bool:
    """Whether an entry of a list of modules names this one: as a whole, or as its end."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return module == pattern or module.endswith(f".{pattern}")


def read_quantisation(file: JsonFile) -> Quantisation | None:
    """The schemes in a config.json, or None where its matrices are not quantised. Raises InputError."""
    if file.values.get(FIELD) in (None, {}):
        return None
    config = file.within(FIELD)
    method = config.need("quant_method")
    readers: dict[str, Callable[[JsonFile], Quantisation]] = {
        "fp8": _fp8, "compressed-tensors": _compressed, "gptq": _gptq, "awq": _awq,
    }  # fmt: skip
    if not isinstance(method, str) or method not in readers:
        raise config.refuse("quant_method", method, f"one of {', '.join(METHODS)} was expected")
    for name in CACHE_FIELDS:
        if config.values.get(name) not in (None, {}):
            raise config.refuse(name, config.values[name], "a cache that is not quantised was expected")
    return readers[method](config)


def refuse_cache_scales(tensors: Mapping[str, StoredTensor]) -> None:
    """Raise InputError if there are scales for a cache. An engine divides keys and values by them; no policy does."""
    for name, tensor in tensors.items():
        if CACHE_SCALES.fullmatch(name):
            raise InputError(
                f"{tensor.path}: tensor {quoted(name)} belongs to a quantised cache of keys and values, but a "
                "checkpoint without one was expected"
            )


def _modules(config: JsonFile, *names: str) -> tuple[str, ...]:
    """The entries of a list of modules, under the first of these names that is there."""
    for name in names:
        found = config.values.get(name)
        if found is not None:
            if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
                raise config.refuse(name, found, "a list of names of modules was expected")
            for each in found:
                _check_pattern(config, name, each)
            return tuple(found)
    return ()


def _check_pattern(config: JsonFile, name: str, pattern: str) -> None:
    """Raises InputError for a pattern that is none, or that could take Python's matcher for ever."""
    expression = pattern.removeprefix("re:") if pattern.startswith("re:") else ""
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError):
        raise config.refuse(name, pattern, "a regular expression was expected after 're:'") from None
    if len(re.findall(r"[*+{]", expression)) > MOST_REPEATS or re.search(r"\)[*+{]", expression):
        raise config.refuse(name, pattern, f"at most {MOST_REPEATS} repetitions, and none of a group, were expected")


def _one_of(config: JsonFile, name: str, default: Any, *allowed: Any) -> Any:
    found = config.values.get(name)
    found = default if found is None else found
    if not any(found == each and isinstance(found, bool) == isinstance(each, bool) for each in allowed):
        raise config.refuse(name, found, f"{' or '.join(map(shown, allowed))} was expected")
    return found


def _pair(config: JsonFile, name: str) -> tuple[int, int]:
    found = config.need(name)
    if not isinstance(found, list) or len(found) != 2 or not all(type(n) is int and 0 < n < 1 << 20 for n in found):
        raise config.refuse(name, found, "two positive integers were expected")
    return found[0], found[1]


def _fp8(config: JsonFile) -> Quantisation:
    """DeepSeek's blocks of 128 x 128, and one scale for a matrix or a row as AutoFP8 writes it."""
    _one_of(config, "fmt", "e4m3", "e4m3")
    _one_of(config, "expert_dtype", "fp8", "fp8")
    _one_of(config, "activation_scheme", "dynamic", "dynamic", "static")
    blocks = config.values.get("weight_block_size") is not None
    scheme = Scheme(
        packing="plain", bits=8, floating=True, strategy="block" if blocks else "tensor",
        block=_pair(config, "weight_block_size") if blocks else (1, 1),
    )  # fmt: skip
    ignored = _modules(config, "modules_to_not_convert", "ignored_layers")
    return Quantisation(file=config, schemes=((("Linear",), scheme),), ignored=ignored)


def _compressed(config: JsonFile) -> Quantisation:
    for name, expected in UNREAD:
        if config.values.get(name) not in (None, {}):
            raise config.refuse(name, config.values[name], expected)
    _one_of(config, "quantization_status", "compressed", "compressed")
    groups, schemes = config.within("config_groups"), []
    for name in groups.values:
        group = groups.within(name)
        form = group if group.values.get("format") is not None else config
        packing = _one_of(form, "format", None, "pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
        schemes.append((_modules(group, "targets"), _weights(group.within("weights"), packing == "pack-quantized")))
    if not schemes:
        raise config.refuse("config_groups", {}, "at least one group was expected")
    return Quantisation(file=config, schemes=tuple(schemes), ignored=_modules(config, "ignore"))


def _weights(weights: JsonFile, packed: bool) -> Scheme:
    floating = _one_of(weights, "type", "int", "int", "float") == "float"
    bits = _one_of(weights, "num_bits", 8, *((8,) if floating else (4, 8) if packed else (8,)))
    if packed and floating:
        raise weights.refuse("type", "float", "'int' was expected in the format 'pack-quantized'")
    _one_of(weights, "dynamic", False, False)
    size = weights.values.get("group_size")
    group = size is not None and size != -1
    implied = "group" if group else "channel" if size == -1 else "tensor"
    strategy = _one_of(weights, "strategy", implied, "tensor", "channel", "group", "block")
    if (strategy == "group") != group and strategy != "block":
        raise weights.refuse("strategy", strategy, f"{shown(implied)} was expected, as 'group_size' is {shown(size)}")
    block = (1, 1)
    if strategy == "block":
        block = _pair(weights, "block_structure")
    elif strategy == "group":
        block = (1, _positive(weights, "group_size"))
    return Scheme(
        packing="packed" if packed else "plain", bits=bits, floating=floating, strategy=strategy, block=block,
        symmetric=_one_of(weights, "symmetric", True, True, False),
        reordered=_one_of(weights, "actorder", None, None, False, "weight", "static", "group", "dynamic")
        in ("group", "dynamic"),
    )  # fmt: skip


def _positive(config: JsonFile, name: str) -> int:
    found = config.integer(name)
    if found < 1:
        raise config.refuse(name, found, "a positive integer was expected")
    return found


def _gptq(config: JsonFile) -> Quantisation:
    if config.values.get("dynamic") not in (None, {}):
        raise config.refuse("dynamic", config.values["dynamic"], "the same scheme was expected for all matrices")
    _one_of(config, "is_marlin_format", False, False)
    names = ("checkpoint_format", "format")
    found = [_one_of(config, name, "gptq", "gptq", "gptq_v2") for name in names if config.values.get(name) is not None]
    if len(set(found)) > 1:
        raise config.refuse("format", found[1], f"{shown(found[0])} was expected, as 'checkpoint_format' says")
    size = config.integer("group_size")
    packing = "gptq" if found and found[0] == "gptq_v2" else "gptq_v1"
    return _integers(config, packing, size, _one_of(config, "bits", None, 4, 8))


def _awq(config: JsonFile) -> Quantisation:
    version = config.values.get("version", config.values.get("format", "gemm"))
    if not isinstance(version, str) or version.lower() != "gemm":
        raise config.refuse("version", version, "'gemm' was expected")
    _one_of(config, "zero_point", True, True)
    return _integers(config, "awq", config.integer("group_size"), _one_of(config, "bits", 4, 4))


def _integers(config: JsonFile, packing: str, size: int, bits: int) -> Quantisation:
    """GPTQ's and AWQ's groups of inputs.   size: of a group, or -1 for one group"""
    if size != -1:
        size = _positive(config, "group_size")
    scheme = Scheme(
        packing=packing, bits=bits, strategy="channel" if size == -1 else "group", block=(1, max(1, size)),
        symmetric=packing != "awq" and bool(_one_of(config, "sym", True, True, False)),
        reordered=packing != "awq" and bool(_one_of(config, "desc_act", False, True, False)),
    )  # fmt: skip
    return Quantisation(
        file=config, schemes=((("Linear",), scheme),), ignored=_modules(config, "modules_to_not_convert")
    )


# ---- the tensors of a folder

PARTS = (
    "weight_scale_inv", "weight_scale", "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx",
    "input_scale", "input_zero_point", "activation_scale", "qweight", "qzeros", "scales", "g_idx",
)  # fmt: skip
"""The entries that are stored beside or instead of a module's ``weight``."""
OF_ACTIVATIONS = ("input_scale", "input_zero_point", "activation_scale")
"""Parts that do not change a weight."""
Parts = dict[str, StoredTensor]


def assembled(tensors: Mapping[str, StoredTensor], quantisation: Quantisation) -> dict[str, StoredTensor]:
    """The tensors of a folder, each quantised matrix as one. Others stay as they are.

    Raises InputError where the entries of a matrix contradict each other, or what the folder says.
    """
    modules: dict[str, Parts] = {}
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        module, part = _split(name)
        if part in PARTS:
            modules.setdefault(module, {})[part] = tensor
        else:
            found[name] = tensor
    for module, parts in modules.items():
        stored = module if module in found else f"{module}.weight"  # fused experts are a parameter of their own
        if stored in found:
            parts["weight"] = found[stored]
        if parts.keys() <= {*OF_ACTIVATIONS, "weight"}:
            continue
        found[stored] = _matrix(module, stored, parts, quantisation)
    for name, tensor in found.items():
        module = name.removesuffix(".weight")
        plain = not isinstance(tensor, ScaledTensor)
        if plain and ATTENTION_AND_EXPERTS.fullmatch(module) and not any(map(_names(module), quantisation.ignored)):
            raise InputError(
                f"{tensor.path}: tensor {quoted(name)} is not quantised, but {quantisation.file.path.name} says that "
                f"it is, so that its scales were expected"
            )
    return found


def _names(module: str) -> Callable[[str], bool]:
    """Whether an entry of a list names a module or one around it. Libraries differ in how they match names."""
    return lambda entry: matches(entry, module) or (not entry.startswith("re:") and entry in module)


def _split(name: str) -> tuple[str, str]:
    """A module and what is stored of it. Fused experts have no ``weight``: ``gate_up_proj_scale_inv``."""
    if name.endswith("_proj_scale_inv"):
        return name.removesuffix("_scale_inv"), "weight_scale_inv"
    module, _, part = name.rpartition(".")
    return module, part


def _matrix(module: str, name: str, parts: Parts, quantisation: Quantisation) -> ScaledTensor:
    """One quantised matrix. Raises InputError."""
    first = next(iter(parts.values()))
    scheme = quantisation.scheme_of(module)
    says = f"{quantisation.file.path.name} says"
    if any(each == module or (each.startswith("re:") and matches(each, module)) for each in quantisation.ignored):
        raise InputError(
            f"{first.path}: tensor {quoted(first.name)} is there, but {says} that {module} is not quantised"
        )
    if scheme is None:
        raise InputError(f"{first.path}: tensor {quoted(first.name)} is there, but {says} nothing about {module}")
    build = _integer_matrix if scheme.packing in ("gptq", "gptq_v1", "awq") else _scaled_matrix
    return build(name, parts, scheme, says)


def _need(parts: Parts, part: str, says: str, scheme: Scheme) -> StoredTensor:
    if part not in parts:
        first = next(iter(parts.values()))
        raise InputError(
            f"{first.path}: beside tensor {quoted(first.name)} the entry {quoted(part)} is missing, but {says} that "
            f"the matrix is stored as {scheme.name}"
        )
    return parts[part]


def _check(tensor: StoredTensor, dtypes: tuple[str, ...], shape: tuple[int, ...] | None, why: str) -> StoredTensor:
    """The tensor. Raises InputError where its dtype or shape is another.   why: ends the sentence"""
    origin = f"{tensor.path}: tensor {quoted(tensor.name)}"
    if tensor.dtype not in dtypes:
        raise InputError(f"{origin} has dtype {tensor.dtype}, but {' or '.join(dtypes)} was expected: {why}")
    if shape is not None and tensor.shape != shape:
        raise InputError(f"{origin} has shape {list(tensor.shape)}, but {list(shape)} was expected: {why}")
    return tensor


def _refuse_others(parts: Parts, known: set[str], says: str, scheme: Scheme) -> None:
    for part, tensor in parts.items():
        if part not in known and part not in OF_ACTIVATIONS:
            raise InputError(
                f"{tensor.path}: tensor {quoted(tensor.name)} was not expected, as {says} that the matrix is stored as "
                f"{scheme.name}"
            )


def _scaled_matrix(name: str, parts: Parts, scheme: Scheme, says: str) -> ScaledTensor:
    """A matrix of FP8 or compressed-tensors."""
    why = f"{says} {scheme.name}"
    scale_name = "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
    codes: Codes
    beside: tuple[StoredTensor, ...] = ()
    known = {scale_name}
    if scheme.packing == "packed":
        packed = _check(_need(parts, "weight_packed", says, scheme), ("I32",), None, why)
        size = _check(_need(parts, "weight_shape", says, scheme), ("I64", "I32"), (2,), why)
        shape = tuple(int(n) for n in size.map())
        words = (shape[0], -(-shape[1] * scheme.bits // 32)) if min(shape) > 0 else (-1, -1)
        _check(packed, ("I32",), words, f"'weight_shape' is {list(shape)}")
        codes, beside = PackedCodes(tensor=packed, bits=scheme.bits, width=shape[1]), (size,)
        known |= {"weight_packed", "weight_shape"}
    else:
        plain = _check(_need(parts, "weight", says, scheme), (E4M3 if scheme.floating else "I8",), None, why)
        shape, codes = plain.shape, PlainCodes(plain)
        known |= {"weight"}
    if len(shape) < 2 or 0 in shape:
        raise InputError(
            f"{codes.tensor.path}: tensor {quoted(name)} has shape {list(shape)}, but a matrix was expected"
        )
    scales = _check(_need(parts, scale_name, says, scheme), SCALES, None, why)
    rows, block, scheme = _extent(scheme, scales, shape, why)
    zeros = None
    if not scheme.symmetric:
        zero = _need(parts, "weight_zero_point", says, scheme)
        if scheme.packing == "packed":
            wanted = (-(-rows * scheme.bits // 32), -(-shape[1] // block[1]))
            zeros = ZeroPoints(tensor=_check(zero, ("I32",), wanted, why), packing="rows", bits=scheme.bits)
        else:
            zeros = ZeroPoints(tensor=_check(zero, ("I8",), scales.shape, why), packing="none", bits=scheme.bits)
        known |= {"weight_zero_point"}
    groups = None
    if scheme.reordered:
        groups = _check(_need(parts, "weight_g_idx", says, scheme), ("I32", "I64"), (shape[-1],), why)
        known |= {"weight_g_idx"}
    _refuse_others(parts, known, says, scheme)
    return ScaledTensor(
        path=codes.tensor.path, name=name, dtype="F64" if scales.dtype == "F32" else "F32", shape=shape,
        offset=codes.tensor.offset, codes=codes, scales=scales, block=block, format=scheme.name, zeros=zeros,
        groups=groups, beside=beside,
    )  # fmt: skip


def _extent(
    scheme: Scheme, scales: StoredTensor, shape: tuple[int, ...], why: str
) -> tuple[int, tuple[int, int], Scheme]:
    """How many rows the scales have, how many rows and inputs share one, and the scheme, with what the shape tells."""
    *experts, out, width = shape
    if scheme.strategy == "tensor":
        if not experts and scales.shape in ((out,), (out, 1)) and out > 1:
            return out, (1, width), replace(scheme, strategy="channel")
        if math.prod(scales.shape) != math.prod(experts):
            _check(scales, SCALES, (*experts, 1), why)
        return 1, (out, width), scheme
    if scheme.strategy == "channel":
        if scales.shape != (out,):
            _check(scales, SCALES, (*experts, out, 1), why)
        return out, (1, width), scheme
    high, wide = scheme.block
    rows = -(-out // high)
    _check(scales, SCALES, (*experts, rows, -(-width // wide)), why)
    return rows, scheme.block, scheme


def _integer_matrix(name: str, parts: Parts, scheme: Scheme, says: str) -> ScaledTensor:
    """A matrix of GPTQ or AWQ."""
    why = f"{says} {scheme.name}"
    per, awq = 32 // scheme.bits, scheme.packing == "awq"
    words = _check(_need(parts, "qweight", says, scheme), ("I32",), None, why)
    if len(words.shape) != 2:
        raise InputError(
            f"{words.path}: tensor {quoted(words.name)} has shape {list(words.shape)}, but two axes were expected"
        )
    width, out = (words.shape[0], words.shape[1] * per) if awq else (words.shape[0] * per, words.shape[1])
    group = width if scheme.strategy == "channel" else scheme.block[1]
    count = -(-width // max(1, group))
    scales = _check(_need(parts, "scales", says, scheme), SCALES, (count, out), why)
    zeros = _check(_need(parts, "qzeros", says, scheme), ("I32",), (count, -(-out // per)), why)
    known, groups = {"qweight", "qzeros", "scales"}, None
    if not awq and ("g_idx" in parts or scheme.reordered):
        groups = _check(_need(parts, "g_idx", says, scheme), ("I32", "I64"), (width,), why)
        known.add("g_idx")
        if not scheme.reordered and (loaded(groups) != [i // group for i in range(width)]).any():
            raise InputError(
                f"{groups.path}: tensor {quoted(groups.name)} has groups in another order, but {says} that 'desc_act' "
                "is false, so inputs in order were expected"
            )
    _refuse_others(parts, known, says, scheme)
    codes: Codes = AwqCodes(words) if awq else GptqCodes(words, scheme.bits)
    return ScaledTensor(
        path=words.path, name=name, dtype="F64" if scales.dtype == "F32" else "F32", shape=(out, width),
        offset=words.offset, codes=codes, scales=scales, block=(1, max(1, group)), format=scheme.name,
        zeros=ZeroPoints(
            tensor=zeros, packing=scheme.packing, bits=scheme.bits, symmetric=scheme.symmetric and not awq
        ),
        groups=groups, transposed=True,
    )  # fmt: skip
