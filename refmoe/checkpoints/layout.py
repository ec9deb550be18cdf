"""What every layout on disk shares: making a configuration, and accounting for every tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.checkpoints.configuration import ConfigError, checked
from refmoe.checkpoints.names import build_parameters, parameter_axes, parameter_shape
from refmoe.checkpoints.weight import Weight
from refmoe.errors import InputError
from refmoe.files.json_file import JsonFile, read_json, shown
from refmoe.files.safetensors_file import DTYPES, StoredTensor, open_safetensors, quoted
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters

WEIGHT_DTYPES = ("BF16", "F16", "F32", "F64")
View = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]


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


@dataclass(frozen=True)
class Expected:
    """A tensor that a layout demands: its shape on disk and the parameters that are cut out of it."""

    shape: tuple[int, ...]
    fields: tuple[str, ...]
    """The fields of the configuration that the shape follows from."""
    parameters: Iterable[tuple[str, View]]
    """Canonical name and cut of each; computed when the shape is known to be right."""


def whole_parameter(config: Config, name: str, view: View) -> Expected:
    """A tensor that holds one parameter and nothing else."""
    fields = dict.fromkeys(field for axis in parameter_axes(name) for field in axis)
    return Expected(parameter_shape(config, name), tuple(fields), [(name, view)])


Listing = Callable[[], Iterator[tuple[str, Expected]]]
"""Tensor name and what is expected of it, listed as far as the caller asks."""


def make_config(json_file: JsonFile, names: dict[str, str], values: dict[str, Any]) -> Config:
    """A configuration, with a refusal told in the file's own field names.

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


def indexed_tensors(index: Path) -> tuple[list[Path], dict[str, StoredTensor]]:
    """The shards that an index names, in name order, and their tensors.

    Raises InputError where index and shards do not say the same.
    """
    mapping = read_json(index).within("weight_map").values
    for listed, name in mapping.items():
        beside = isinstance(name, str) and name.isprintable() and Path(name).name == name and len(name) < 256
        if not beside or not name.endswith(".safetensors"):
            raise InputError(
                f"{index}: 'weight_map' says that {quoted(listed)} is in {shown(name)}, "
                "but the name of a safetensors file in the same folder was expected"
            )
    shards = [index.parent / name for name in sorted(set(mapping.values()))]
    for shard in shards:
        if not shard.exists():
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


LISTED = 1 << 16
"""How many expected names are listed to find the stranger among those present; no published model has a tenth."""


def refuse_pickles(folder: Path, patterns: Iterable[str], instead: str) -> None:
    """Raises InputError when the folder holds a pickle in place of what was expected."""
    for path in (path for pattern in patterns for path in sorted(folder.glob(pattern))):
        raise InputError(
            f"{path}: is a pickle, which can run code when it is loaded, and is refused; {instead} was expected"
        )


def account(
    tensors: dict[str, StoredTensor],
    expected: Listing,
    config: Config,
    place: Path,
    names: dict[str, str],
    said_in: str,
) -> dict[str, Weight]:
    """Match every tensor found with every tensor expected; the parameters by canonical name.

    expected: lists the tensors; called again for a message.   place: where a missing tensor is missing.
    names: the spec's field to the file's field.   said_in: the name of that file.
    Raises InputError for the first that is missing, unexpected, of another shape or of an unusable dtype. The first
    missing one ends the listing, so that a configuration of a billion layers takes no longer than the files are long.
    """

    def says(fields: Iterable[str]) -> str:
        return f"{said_in} says " + ", ".join(f"{names[field]} = {getattr(config, field)}" for field in fields)

    weights: dict[str, Weight] = {}
    known = set()
    for name, wanted in expected():
        if name not in tensors:
            listed = {name for name, _ in islice(expected(), LISTED)}
            others = [name for name in tensors if name not in listed] if len(listed) < LISTED else []
            instead = f"; found instead {quoted(others[0])}" if others else ""
            raise InputError(f"{place}: tensor {quoted(name)} is missing, but {says(('layers', 'experts'))}{instead}")
        known.add(name)
        tensor = tensors[name]
        if tensor.shape != wanted.shape:
            raise InputError(
                f"{tensor.path}: tensor {quoted(name)} has shape {list(tensor.shape)}, "
                f"but {list(wanted.shape)} was expected: {says(wanted.fields)}"
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
        raise InputError(f"{path}: tensor {name} was not expected{more}: {says(('layers', 'experts'))}")
    return weights


def _weight(name: str, shape: tuple[int, ...], tensor: StoredTensor, view: View) -> Weight:
    origin = f"{tensor.path}: tensor {quoted(tensor.name)}"
    return Weight(
        name, shape, DTYPES[tensor.dtype], lambda: view(tensor.map()), origin, partial(tensor.read_rows, view)
    )


def whole(stored: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A tensor that is one parameter."""
    return stored


def to_checkpoint(
    config: Config, layout: str, files: list[Path], tensors: dict[str, StoredTensor], weights: dict[str, Weight]
) -> Checkpoint:
    dtypes = tuple(sorted({tensor.dtype for tensor in tensors.values()}))
    return Checkpoint(config, build_parameters(config, weights.__getitem__), layout, tuple(files), dtypes)
