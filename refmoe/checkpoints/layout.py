# SPDX-License-Identifier: Apache-2.0
"""The common part of all layouts on disk: making a configuration, and matching tensors with parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.checkpoints.configuration import ConfigError, checked
from refmoe.checkpoints.names import build_parameters, parameter_axes, parameter_shape
from refmoe.checkpoints.weight import Weight
from refmoe.errors import InputError
from refmoe.files.json_file import JsonFile, read_json
from refmoe.files.reading import exists
from refmoe.files.safetensors_file import DTYPES, StoredTensor, View, open_safetensors
from refmoe.files.sentences import quoted, shown
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters

WEIGHT_DTYPES = ("BF16", "F16", "F32", "F64")
LISTED = 1 << 16
"""How many expected names are listed to find an unknown tensor. No published model has a tenth of this number."""
COMPARED = 1 << 22
"""How many elements of two matrices are compared at a time."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint. Weights are mapped, not read."""

    config: Config
    parameters: Parameters
    layout: str
    """``"hf"``, ``"mistral"`` or ``"synthetic"``."""
    files: tuple[Path, ...]
    """The safetensors files, in name order."""
    dtypes: tuple[str, ...]
    """The dtypes that weights are stored in, as safetensors names them."""
    unknown: tuple[str, ...] = ()
    """The fields of the configuration's file that refmoe does not know, and therefore does not obey."""
    configuration: Path | None = None
    """The file of the configuration, if there is one."""

    @property
    def tied(self) -> bool:
        """Whether the output matrix is the embedding itself."""
        return self.parameters.output is self.parameters.embedding


@dataclass(frozen=True)
class ConfigurationFile:
    """The configuration in a file, read and checked."""

    layout: str
    """``"hf"``, ``"mistral"`` or ``"gguf"``."""
    path: Path
    config: Config
    fields: dict[str, str]
    """The spec's fields and their names in the file."""
    tied: bool = False
    """Whether the file says that the output matrix is the embedding."""
    unknown: tuple[str, ...] = ()
    """The fields that refmoe does not know."""


@dataclass(frozen=True)
class Expected:
    """A tensor that a layout demands: its shape on disk and the parameters that it holds."""

    shape: tuple[int, ...]
    fields: tuple[str, ...]
    """The fields of the configuration that determine the shape."""
    parameters: Iterable[tuple[str, View]]
    """Canonical name and view of each parameter; read only after the shape has been checked."""


@dataclass(frozen=True)
class Found:
    """A checkpoint's configuration and tensors as they are on disk, before the tensors are matched with parameters."""

    file: ConfigurationFile
    files: list[Path]
    """The safetensors files, in name order."""
    tensors: dict[str, StoredTensor]

    @property
    def place(self) -> Path:
        """The one file of tensors, or the folder of several."""
        return self.files[0] if len(self.files) == 1 else self.file.path.parent

    def says(self, *fields: str) -> str:
        """The values of some fields, as the configuration's file names them."""
        pairs = (f"{self.file.fields[field]} = {getattr(self.file.config, field)}" for field in fields)
        return f"{self.file.path.name} says {', '.join(pairs)}"


def whole_parameter(config: Config, name: str, view: View) -> Expected:
    """The expectation of a tensor that holds exactly one parameter."""
    fields = dict.fromkeys(field for axis in parameter_axes(name) for field in axis)
    return Expected(parameter_shape(config, name), tuple(fields), [(name, view)])


Listing = Callable[[], Iterator[tuple[str, Expected]]]
"""Lists each tensor's name with its expectation, as far as the caller iterates."""


def make_config(json_file: JsonFile, names: dict[str, str], values: dict[str, Any]) -> Config:
    """A configuration. Raises InputError with the file's own field names for values that are refused.

    names: the spec's field to the file's field.   values: the spec's field to its value.
    """
    try:
        return checked(values)
    except ConfigError as error:
        sentence = re.sub(r"\b(\w+) = ", lambda match: f"{names.get(match[1], match[1])} = ", str(error))
        raise InputError(f"{json_file.path}: {sentence}") from None


def gather_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors of all shards. Raises InputError when two shards hold the same name."""
    found: dict[str, StoredTensor] = {}
    for path in files:
        for name, tensor in open_safetensors(path)[0].items():
            if name in found:
                raise InputError(
                    f"{path}: tensor {quoted(name)} is also in {found[name].path.name}, but it was expected in one file"
                )
            found[name] = tensor
    return found


def shards_of(index: Path) -> tuple[list[Path], dict[str, str]]:
    """The shards that an index names, in name order, and per tensor the name of its shard. Raises InputError."""
    mapping = read_json(index).within("weight_map").values
    for listed, name in mapping.items():
        beside = isinstance(name, str) and name.isprintable() and Path(name).name == name and len(name) < 256
        if not beside or not name.endswith(".safetensors"):
            raise InputError(
                f"{index}: 'weight_map' says that {quoted(listed)} is in {shown(name)}, "
                "but the name of a safetensors file in the same folder was expected"
            )
    return [index.parent / name for name in sorted(set(mapping.values()))], mapping


def indexed_tensors(index: Path) -> tuple[list[Path], dict[str, StoredTensor]]:
    """The shards that an index names, in name order, and their tensors.

    Raises InputError where index and shards disagree.
    """
    shards, mapping = shards_of(index)
    for shard in shards:
        if not exists(shard):
            raise InputError(f"{shard}: no such file, but {index.name} names it")
    tensors = gather_tensors(shards)
    for name, shard_name in mapping.items():
        if name not in tensors:
            raise InputError(
                f"{index.parent / shard_name}: tensor {quoted(name)} is missing, which {index.name} says it holds"
            )
        if tensors[name].path.name != shard_name:
            raise InputError(
                f"{index}: tensor {quoted(name)} is said to be in {shard_name}, but is in {tensors[name].path.name}"
            )
    for name, tensor in tensors.items():
        if name not in mapping:
            raise InputError(f"{tensor.path}: tensor {quoted(name)} is not in {index.name}, but it was expected to be")
    return shards, tensors


def refuse_pickles(folder: Path, patterns: Iterable[str], instead: str) -> None:
    """Raises InputError when the folder holds a pickle. instead: the files that were expected, in words"""
    for path in (path for pattern in patterns for path in sorted(folder.glob(pattern))):
        raise InputError(
            f"{path}: is a pickle, which can run code when it is loaded, and is refused; {instead} was expected"
        )


def match(found: Found, expected: Listing) -> Checkpoint:
    """The checkpoint, after every tensor found has been matched with every tensor expected.

    expected: lists the tensors; called again for a message.
    Raises InputError for the first that is missing, unexpected, of another shape or of an unusable dtype. The first
    missing tensor ends the listing, so a configuration of a billion layers takes no longer than the files are long.
    """
    file, config, tensors = found.file, found.file.config, found.tensors
    weights: dict[str, Weight] = {}
    known = set()
    for name, wanted in expected():
        if name not in tensors:
            if file.tied and any(parameter == "output" for parameter, _ in wanted.parameters):
                continue
            listed = {name for name, _ in islice(expected(), LISTED)}
            others = [name for name in tensors if name not in listed] if len(listed) < LISTED else []
            instead = f"; found instead {quoted(others[0])}" if others else ""
            says = found.says("layers", "experts")
            raise InputError(f"{found.place}: tensor {quoted(name)} is missing, but {says}{instead}")
        known.add(name)
        tensor = tensors[name]
        if tensor.shape != wanted.shape:
            raise InputError(
                f"{tensor.path}: tensor {quoted(name)} has shape {list(tensor.shape)}, "
                f"but {list(wanted.shape)} was expected: {found.says(*wanted.fields)}"
            )
        if tensor.dtype not in WEIGHT_DTYPES:
            raise InputError(
                f"{tensor.path}: tensor {quoted(name)} has dtype {tensor.dtype}, "
                f"but one of {', '.join(WEIGHT_DTYPES)} was expected"
            )
        for canonical, view in wanted.parameters:
            weights[canonical] = _weight(canonical, parameter_shape(config, canonical), tensor, view)
    unexpected = [name for name in tensors if name not in known]
    if unexpected:
        path, name = tensors[unexpected[0]].path, quoted(unexpected[0])
        more = f", nor {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        raise InputError(f"{path}: tensor {name} was not expected{more}: {found.says('layers', 'experts')}")
    if file.tied:
        weights["output"] = _tied_output(file, weights)
    return Checkpoint(
        config=config,
        parameters=build_parameters(config, weights.__getitem__),
        layout=file.layout,
        files=tuple(found.files),
        dtypes=tuple(sorted({tensor.dtype for tensor in tensors.values()})),
        unknown=file.unknown,
        configuration=file.path,
    )


def _tied_output(file: ConfigurationFile, weights: dict[str, Weight]) -> Weight:
    """The embedding, as the output matrix of a file that ties the two.

    Engines differ where another output matrix is stored as well: transformers 5 computes with it, and others with the
    embedding. So raises InputError when its values are not those of the embedding.
    """
    embedding, output = weights["embedding"], weights.get("output")
    height, width = embedding.shape
    step = max(1, COMPARED // width)
    if output is None:
        return embedding
    for start in range(0, height, step):
        if not np.array_equal(embedding.block(start, start + step), output.block(start, start + step)):
            raise InputError(
                f"{output.origin} differs from the embedding, but {file.path.name} says that the two are tied, "
                "so equal values or no such tensor was expected"
            )
    return embedding


def _weight(name: str, shape: tuple[int, ...], tensor: StoredTensor, view: View) -> Weight:
    origin = f"{tensor.path}: tensor {quoted(tensor.name)}"
    return Weight(
        name=name,
        shape=shape,
        dtype=DTYPES[tensor.dtype],
        source=lambda: view(tensor.map()),
        origin=origin,
        read_block=tensor.rows_of(view),
    )


def whole(stored: NDArray[Any]) -> NDArray[Any]:
    """A tensor that is one parameter."""
    return stored
