# SPDX-License-Identifier: Apache-2.0
"""Load a Mixtral from a GGUF file, as the numbers that its formats define."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.codes import Factors
from refmoe.checkpoints.foreign_fields import by_field, one_of, refuse_foreign, value_of
from refmoe.checkpoints.ggml_blocks import FORMATS, BlockFormat
from refmoe.checkpoints.gguf_file import ARCHITECTURE, EXPERT_TENSORS, LAYER_TENSORS, MODEL_TENSORS
from refmoe.checkpoints.layout import ConfigurationFile, Expected, Found, make_config, whole, whole_parameter
from refmoe.checkpoints.mistral import half_split
from refmoe.checkpoints.names import parameter_shape
from refmoe.checkpoints.rows import QuantisedCheckpoint, Rows, RowTensor, Stored, match_rows
from refmoe.errors import InputError
from refmoe.files.foreign import GGUF, other_format
from refmoe.files.gguf_tensors import GgufFile, GgufTensor, open_gguf
from refmoe.files.json_file import JsonFile
from refmoe.files.reading import exists, is_folder
from refmoe.files.safetensors_file import StoredTensor
from refmoe.files.sentences import quoted
from refmoe.spec.config import Config

PLAIN = ("F64", "F32", "F16", "BF16")
"""The types that are no blocks. ggml and safetensors give them the same names."""

FIELDS = {
    "dim": "embedding_length",
    "layers": "block_count",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "hidden_dim": "feed_forward_length",
    "vocab": "vocab_size",
    "experts": "expert_count",
    "experts_per_token": "expert_used_count",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "context": "context_length",
}
"""The spec's fields and their names in the metadata, each with prefix ``llama.``."""

FOREIGN = by_field({
    "Mixtral's rotary embedding is not scaled": ("rope.scaling.type", one_of("none")),
    "Mixtral's rotary embedding is not scaled by a factor": (
        "rope.scaling.factor rope.scale_linear rope.scaling.attn_factor rope.scaling.yarn_log_multiplier",
        one_of(0, 1),
    ),
    "Mixtral turns whole heads": ("rope.dimension_count", value_of("head_dim")),
    "Mixtral's values have the size of its keys": ("attention.value_length", value_of("head_dim")),
    "Mixtral's experts have 'feed_forward_length' hidden units": (
        "expert_feed_forward_length",
        value_of("hidden_dim"),
    ),
    "Mixtral does not scale there": ("logit_scale residual_scale embedding_scale expert_weights_scale", one_of(0, 1)),
    "Mixtral's attention scales by 1 / sqrt(head_dim)": ("attention.scale", one_of(0)),
    "Mixtral renormalises the weights of the chosen experts": ("expert_weights_norm", one_of(True)),
    "Mixtral's router takes a softmax": ("expert_gating_func", one_of(0, 1)),
    "Mixtral's router chooses among all experts": ("expert_group_count expert_group_used_count", one_of(0, 1)),
    "Mixtral has no shared experts": ("expert_shared_count", one_of(0)),
    "every layer of Mixtral has experts": ("leading_dense_block_count", one_of(0)),
    "llama.cpp's llama has no window": ("attention.sliding_window", one_of(0)),
    "Mixtral caps and clips nothing": (
        "attention.clamp_kqv attention.max_alibi_bias attn_logit_softcapping final_logit_softcapping",
        one_of(0),
    ),
    "Mixtral's experts follow its attention": ("use_parallel_residual", one_of(False)),
    "Mixtral attends to earlier tokens only": ("attention.causal", one_of(True)),
})  # fmt: skip
"""Fields of other models, with prefix ``llama.``: the fact that each contradicts, and the values that do not."""
OLD_EXPERT = re.compile(r"blk\.\d+\.ffn_(gate|down|up)\.\d+\.weight")
"""The name of a tensor that holds a matrix of one expert."""
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
"""The name of a part of a model in several files."""


@dataclass(frozen=True)
class BlockTensor(RowTensor):
    """A tensor in one of ggml's block formats."""

    raw: StoredTensor
    """Its bytes: [rows, bytes of a row]."""
    format: BlockFormat

    def blocks(self, rows: Rows) -> NDArray[Any]:
        """The bytes of all blocks of some rows: [blocks, bytes of a block]."""
        first, together = (int(rows[0]), len(rows)) if len(rows) else (0, 0)
        if np.array_equal(rows, np.arange(first, first + together)):
            raw = self.raw.rows_of(whole)(first, first + together)
        else:
            raw = self.raw.map()[rows]
        return raw.reshape(-1, self.format.nbytes)

    def factors(self, rows: Rows) -> Factors:
        made = self.format.factors(self.blocks(rows))
        parts = (made.terms, made.offsets, made.sizes)
        terms, offsets, sizes = (None if part is None else part.reshape(len(rows), -1) for part in parts)
        return Factors(terms=terms, offsets=offsets, sizes=sizes)

    def take(self, rows: Rows) -> NDArray[Any]:
        try:
            values = self.format.values(self.blocks(rows))
        except ValueError as error:
            raise InputError(
                f"{self.path}: tensor {quoted(self.name)} holds {error}, which make a number that no float32 holds, "
                "but a number was expected that engines need not round"
            ) from None
        return values.reshape(len(rows), -1)

    @property
    def stored(self) -> Stored:
        return Stored(format=self.format.name, values=int(np.prod(self.shape)), bits=8 * self.raw.nbytes)


def is_gguf(path: Path) -> bool:
    """Whether this is a file that begins as GGUF files do. Raises InputError when it cannot be read."""
    return exists(path) and not is_folder(path) and other_format(path) == GGUF


def read_config(opened: GgufFile) -> ConfigurationFile:
    """The configuration of the Mixtral in a GGUF file. Raises InputError where the file holds no Mixtral.

    Fields that older converters left out have llama.cpp's defaults. llama.cpp's llama has no window.
    """
    prefix, values = f"{ARCHITECTURE}.", opened.values
    every = JsonFile(opened.path, values)
    if every.need("general.architecture") != ARCHITECTURE:
        raise every.refuse("general.architecture", values["general.architecture"], f"'{ARCHITECTURE}' was expected")
    ours = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    file = JsonFile(opened.path, ours, prefix)
    if "token_embd.weight" in opened.tensors:
        ours.setdefault(FIELDS["vocab"], opened.tensors["token_embd.weight"].shape[0])
    ours.setdefault(FIELDS["kv_heads"], file.integer(FIELDS["heads"]))
    ours.setdefault(FIELDS["head_dim"], file.integer(FIELDS["dim"]) // max(1, file.integer(FIELDS["heads"])))
    ours.setdefault(FIELDS["rope_theta"], 1e4)
    real = ("norm_eps", "rope_theta")
    found = {spec: (file.number if spec in real else file.integer)(theirs) for spec, theirs in FIELDS.items()}
    names = {spec: prefix + theirs for spec, theirs in FIELDS.items()}
    config = make_config(file, names, found)
    refuse_foreign(file, config, FOREIGN)
    known = {*FIELDS.values(), *FOREIGN}
    return ConfigurationFile(
        layout="gguf", path=opened.path, config=config, fields=names,
        tied=bool(opened.tensors) and "output.weight" not in opened.tensors,
        unknown=tuple(prefix + name for name in ours if name not in known),
    )  # fmt: skip


def expected_tensors(config: Config, fused: bool) -> Iterator[tuple[str, Expected]]:
    """Each tensor's name with its expectation, one by one.

    fused: whether one tensor holds the matrices of all experts of a layer, as all files since April 2024 have it
    """

    def turned(rows: NDArray[Any]) -> NDArray[Any]:
        return half_split(rows, config.head_dim)

    for name, tensor in MODEL_TENSORS.items():
        yield f"{tensor}.weight", whole_parameter(config, name, whole)
    for i in range(config.layers):
        for name, tensor in LAYER_TENSORS.items():
            view = turned if name.endswith((".wq", ".wk")) else whole
            yield f"blk.{i}.{tensor}.weight", whole_parameter(config, f"layers.{i}.{name}", view)
        for name, tensor in EXPERT_TENSORS.items():
            ours = [f"layers.{i}.experts.{e}.{name}" for e in range(config.experts)]
            if fused:
                shape = (config.experts, *parameter_shape(config, ours[0]))
                views = ((parameter, itemgetter(e)) for e, parameter in enumerate(ours))
                yield f"blk.{i}.{tensor}.weight", Expected(shape, ("experts", "dim", "hidden_dim"), views)
            else:
                for e, parameter in enumerate(ours):
                    old = tensor.removesuffix("_exps")
                    yield f"blk.{i}.{old}.{e}.weight", whole_parameter(config, parameter, whole)


def open_parts(path: Path) -> tuple[GgufFile, list[Path]]:
    """A GGUF file with the tensors of all its parts, and the files. A large model is split into several.

    path: of the file, or of the first part
    Raises InputError when a part is missing, or is not the one that its name says.
    """
    first = open_gguf(path)
    count = first.values.get("split.count", 0)
    if count in (0, 1):
        return first, [path]
    found = PART.fullmatch(path.name)
    parts = JsonFile(path, first.values).integer("split.count")
    if first.values.get("split.no") != 0 or found is None or (found[2], found[3]) != ("00001", f"{parts:05d}"):
        raise InputError(f"{path}: is one of {parts} parts, but the first was expected, NAME-00001-of-{parts:05d}.gguf")
    files, tensors = [path], dict(first.tensors)
    for number in range(2, parts + 1):
        part = open_gguf(path.with_name(f"{found[1]}-{number:05d}-of-{parts:05d}.gguf"))
        if (part.values.get("split.no"), part.values.get("split.count")) != (number - 1, parts):
            raise InputError(f"{part.path}: says that it is another part, but part {number} of {parts} was expected")
        twice = tensors.keys() & part.tensors.keys()
        if twice:
            raise InputError(f"{part.path}: tensor {quoted(min(twice))} is in an earlier part, but was expected once")
        tensors |= part.tensors
        files.append(part.path)
    return GgufFile(path=path, values=first.values, tensors=tensors), files


def load(path: Path) -> QuantisedCheckpoint:
    """The model in a GGUF file. Raises InputError, one sentence, for anything that does not fit."""
    opened, files = open_parts(path)
    file = read_config(opened)
    split = any(OLD_EXPERT.fullmatch(name) for name in opened.tensors)
    tensors = {name: _tensor(found) for name, found in opened.tensors.items()}
    found = Found(file=file, files=files, tensors=tensors)
    return match_rows(found, lambda: expected_tensors(file.config, fused=not split))


def _tensor(found: GgufTensor) -> StoredTensor:
    """The tensor with its values. Raises InputError for a type that is not read."""
    if found.kind in PLAIN:
        return StoredTensor(path=found.path, name=found.name, dtype=found.kind, shape=found.shape, offset=found.offset)
    if found.kind not in FORMATS:
        raise InputError(
            f"{found.path}: tensor {quoted(found.name)} has type {found.kind}, "
            f"but one of {', '.join((*PLAIN, *FORMATS))} was expected"
        )
    kind = FORMATS[found.kind]
    row = found.shape[-1] // kind.size * kind.nbytes
    raw = StoredTensor(
        path=found.path, name=found.name, dtype="U8", shape=(found.nbytes // max(1, row), row), offset=found.offset
    )
    return BlockTensor(
        path=found.path, name=found.name, dtype="F32", shape=found.shape, offset=found.offset, raw=raw, format=kind
    )
