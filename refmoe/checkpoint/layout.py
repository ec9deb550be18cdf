"""What every layout on disk shares: reading JSON, and accounting for every tensor."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.checkpoint.names import build_parameters, parameter_axes, parameter_shape
from refmoe.checkpoint.safetensors_file import DTYPES, StoredTensor, one_line, open_safetensors, quoted
from refmoe.checkpoint.weight import Weight
from refmoe.errors import InputError
from refmoe.spec.config import Config, ConfigError
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


@dataclass(frozen=True)
class JsonFile:
    """A JSON object whose fields are fetched one by one, each with its sentence when it is wrong."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    prefix: str = ""
    """What goes before the names of fields in messages: the field of the file that this object is."""

    def need(self, name: str) -> Any:
        if self.values.get(name) is None:
            what = "is null" if name in self.values else "is missing"
            raise InputError(f"{self.path}: {quoted(self.prefix + name)} {what}, but a value was expected")
        return self.values[name]

    def refuse(self, name: str, found: Any, expected: str) -> InputError:
        return InputError(f"{self.path}: {quoted(self.prefix + name)} is {shown(found)}, but {expected}")

    def integer(self, name: str) -> int:
        """An integer; whether it is a possible one is for the configuration to say."""
        value = self.need(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(name, value, "an integer was expected")
        if abs(value) > LARGEST:
            raise self.refuse(name, value, f"at most {LARGEST} was expected")
        return value

    def number(self, name: str) -> float:
        """A finite number, integer or not."""
        value = self.need(name)
        # compared rather than converted: an integer may be too large for a float
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
            raise self.refuse(name, value, "a finite number was expected")
        try:
            return float(value)
        except OverflowError:
            raise self.refuse(name, value, "a number that a float can hold was expected") from None

    def within(self, name: str) -> JsonFile:
        """The object that a field holds."""
        value = self.need(name)
        if not isinstance(value, dict):
            raise self.refuse(name, value, "an object was expected")
        return JsonFile(self.path, value, f"{self.prefix}{name}.")


LARGEST = 1 << 40
"""No dimension of a model is larger; a longer integer is a mistake, and its digits are no use in a message."""


def shown(value: Any) -> str:
    """A JSON value on one line, cut short where it is long."""
    try:
        text = json.dumps(value)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def read_json(path: Path) -> JsonFile:
    """Raises InputError when the file is missing, is not JSON, repeats a name or holds anything but an object."""
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            repeated.append(next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i])))
        return values

    try:
        values = json.loads(path.read_bytes(), object_pairs_hook=unique)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, but a JSON object was expected") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply, but an object of a few levels was expected") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds a JSON {JSON_TYPES[type(values)]}, but an object was expected")
    if repeated:
        raise InputError(f"{path}: {quoted(repeated[0])} is there more than once, but one value was expected")
    return JsonFile(path, values)


JSON_TYPES = {list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}


def make_config(json_file: JsonFile, names: dict[str, str], values: dict[str, Any]) -> Config:
    """A configuration, with a refusal told in the file's own field names.

    names: the spec's field to the file's field.   values: the spec's field to its value.
    """
    try:
        return Config(**values)
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
    return Weight(name, shape, DTYPES[tensor.dtype], lambda: view(tensor.map()), origin)


def whole(stored: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A tensor that is one parameter."""
    return stored


def to_checkpoint(
    config: Config, layout: str, files: list[Path], tensors: dict[str, StoredTensor], weights: dict[str, Weight]
) -> Checkpoint:
    dtypes = tuple(sorted({tensor.dtype for tensor in tensors.values()}))
    return Checkpoint(config, build_parameters(config, weights.__getitem__), layout, tuple(files), dtypes)
