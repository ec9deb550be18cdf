# SPDX-License-Identifier: Apache-2.0
"""Traces: record activations, write them to a file, read them back.

A trace is one safetensors file with keys ``<run>/<tap>``, each array in its producer's dtype, and one metadata entry
``refmoe``: a JSON object with the fields of `Header`. `golden/FORMAT.md` is its specification.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save, save_file

from refmoe import __version__
from refmoe.errors import InputError
from refmoe.files.atomic import replacing
from refmoe.files.foreign import other_format
from refmoe.files.parsing import strict_json
from refmoe.files.reading import need_file, open_file, read_bytes
from refmoe.files.safetensors_file import StoredTensor, open_safetensors, write_tensors
from refmoe.files.sentences import one_line, quoted, shown

FORMAT_VERSION = "1"
OPS = ("prefill", "chunk", "decode")
SMALL_FILE = 4 << 20
"""The largest file, in bytes, that is held in memory as a whole."""
LONGEST_TABLE = 40 << 20
"""The longest safetensors header of a trace, in bytes: some 400,000 tensors. In memory it takes ten times as much."""
A_TRACE = "a trace in a safetensors file"
LONGEST_NAME = 200
"""The longest name of a run, a case, a policy or a producer, in characters."""


@dataclass(frozen=True)
class Run:
    """One call of the model on new tokens of one sequence."""

    run: str
    """The name: ``prefill``, ``chunk1``, ``decode1``, ...; with several sequences a suffix, as in ``prefill.row0``."""
    op: str
    """``prefill``, ``chunk`` or ``decode``."""
    sequence: int
    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    past: int
    """The number of tokens of this sequence before the call."""
    read: bool = True
    """Whether anybody reads its outputs. A call that only fills the cache has no taps in a trace."""

    def to_json(self) -> dict[str, Any]:
        """The run as JSON. `read` is left out where it is true, as in files that are older than it."""
        return {name: value for name, value in asdict(self).items() if name != "read" or not value}


@dataclass(frozen=True)
class Header:
    """The header of a trace: its runs, and the names of its case, checkpoint, policy and producer."""

    runs: tuple[Run, ...]
    case: str | None = None
    checkpoint: str | None = None
    policy: str = "float64"
    producer: dict[str, str] = field(default_factory=lambda: {"name": "refmoe", "version": __version__})
    format_version: str = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """The header as JSON."""
        return asdict(self) | {"runs": [run.to_json() for run in self.runs]}


@dataclass(frozen=True, repr=False)
class Trace:
    """The taps of an engine's runs: a file whose arrays are mapped on demand, or arrays in memory.

    ``trace["prefill", "layers.0.router.logits"]`` is one array, and ``trace["prefill"]`` the names of a run's taps.

    >>> import refmoe
    >>> trace = refmoe.load("walking-skeleton").run([1, 31])
    >>> trace["prefill", "logits"].shape
    (2, 97)
    """

    path: Path
    header: Header
    tensors: dict[str, StoredTensor]

    def names(self, run: str) -> list[str]:
        """The names of the taps that the trace holds of a run."""
        return self._by_run.get(run, [])

    @property
    def runs(self) -> tuple[Run, ...]:
        """The calls of the engine, in order."""
        return self.header.runs

    def __getitem__(self, key: str | tuple[str, str]) -> Any:
        """One array, by (run, tap), or the names of a run's taps. Raises InputError for a name that is not there."""
        run, tap = key if isinstance(key, tuple) else (key, None)
        if run not in {each.run for each in self.runs}:
            raise InputError(
                f"{self.path}: run {quoted(run)} is not there, expected {shown([r.run for r in self.runs])}"
            )
        if tap is None:
            return self.names(run)
        if f"{run}/{tap}" not in self.tensors:
            raise InputError(f"{self.path}: run {quoted(run)} has no tap {quoted(tap)}; trace[{run!r}] lists its taps")
        return self.get(run, tap)

    def __repr__(self) -> str:
        names = ", ".join(run.run for run in self.runs[:4]) + (", ..." if len(self.runs) > 4 else "")
        return f"<refmoe.Trace {self.path}: {len(self.runs)} runs ({names}), {len(self.tensors)} arrays>"

    def save(self, path: str | Path) -> None:
        """Write the trace as a file. Raises InputError when that fails."""
        arrays = {f"{run}/{tap}": self.get(run, tap) for run, taps in self._by_run.items() for tap in taps}
        write_trace(Path(path), self.header, arrays)

    @cached_property
    def _small(self) -> bytes | None:
        """The bytes of a small file, else None. To read it once is cheaper than to open it for every tap."""
        try:
            return read_bytes(self.path, A_TRACE) if need_file(self.path, A_TRACE) <= SMALL_FILE else None
        except InputError:
            return None

    @cached_property
    def _by_run(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for key in self.tensors:
            run, _, tap = key.rpartition("/")
            names.setdefault(run, []).append(tap)
        return names

    def get(self, run: str, tap: str) -> NDArray[Any]:
        """One array of the trace, read-only. Raises InputError when the file can no longer be read."""
        return self.tensors[f"{run}/{tap}"].get(self._small)


class Recorder:
    """A tap that keeps arrays as ``<run>/<tap>``, under the name of the current run."""

    def __init__(self, patterns: str = "*", progress: Callable[[], None] | None = None) -> None:
        """patterns: shell patterns of tap names, separated by commas, such as ``logits,layers.0.*``.

        progress: called after each layer of each run.
        """
        self.patterns = patterns.split(",")
        self.progress = progress
        self.run = ""
        self.read = True
        self.arrays: dict[str, NDArray[Any]] = {}

    def begin(self, run: Run) -> None:
        """Begin a run. Of one that nobody reads, no array is kept."""
        self.run, self.read = run.run, run.read

    def __call__(self, name: str, x: Any) -> None:
        if self.read and any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns):
            self.keep(f"{self.run}/{name}", np.ascontiguousarray(x))
        if self.progress is not None and name.endswith(".residual"):
            self.progress()

    def keep(self, key: str, array: NDArray[Any]) -> None:
        """Store an array. A subclass may store something else instead."""
        self.arrays[key] = array


def write_trace(path: Path, header: Header, arrays: dict[str, NDArray[Any]]) -> None:
    """Write a trace, whole or not at all. Raises InputError when the file cannot be written.

    arrays: ``<run>/<tap>`` to the array.
    """
    with replacing(path) as temporary:
        try:
            save_file(_dense(arrays), temporary, _metadata(header))
        except SafetensorError as error:  # a full disk, say
            raise InputError(f"{path}: cannot be written: {one_line(error)}") from None


def join_trace(path: Path, header: Header, tensors: Mapping[str, StoredTensor]) -> None:
    """Write a trace of arrays from other files, with only one array in memory at a time.

    The file has the same bytes as one from `write_trace`. Raises InputError when it cannot be written.
    """
    with replacing(path) as temporary:
        write_tensors(temporary, {key: tensor.map for key, tensor in tensors.items()}, _metadata(header))


def trace_bytes(header: Header, arrays: dict[str, NDArray[Any]]) -> bytes:
    """The bytes of the file that `write_trace` writes."""
    return bytes(save(_dense(arrays), _metadata(header)))


def _metadata(header: Header) -> dict[str, str]:
    return {"refmoe": json.dumps(header.to_json(), separators=(",", ":"))}


def _dense(arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    # safetensors writes the memory of a strided array as if it were dense
    return {key: np.ascontiguousarray(array) for key, array in arrays.items()}


def read_trace(path: Path) -> Trace:
    """Open a trace. Raises InputError when the file is not a trace, or its header is not as `golden/FORMAT.md` says."""
    _refuse_a_long_table(path)
    tensors, metadata = open_safetensors(path)
    if "refmoe" not in metadata:
        raise InputError(f"{path}: the metadata entry 'refmoe' is missing, so this is not a trace")
    header = parse_header(path, metadata["refmoe"])
    runs = {run.run for run in header.runs}
    for key in tensors:
        run, slash, _ = key.rpartition("/")
        if not slash or run not in runs:
            raise InputError(
                f"{path}: tensor {quoted(key)} belongs to no run of the header, which has {shown(sorted(runs))}"
            )
    return Trace(path, header, tensors)


def _refuse_a_long_table(path: Path) -> None:
    """Raises InputError for a header too long to read within the memory that verification promises."""
    with open_file(path, A_TRACE) as file:
        length, whole = int.from_bytes(file.read(8), "little"), need_file(path, A_TRACE)
    if LONGEST_TABLE < length <= whole and (found := other_format(path)):
        raise InputError(f"{path}: is {found}, but {A_TRACE} was expected")
    if LONGEST_TABLE < length <= whole:
        raise InputError(
            f"{path}: the safetensors header has {length:,} bytes, but at most {LONGEST_TABLE:,} were expected of a "
            "trace; one of so many tensors is given in several files, some of the runs in each"
        )


def parse_header(path: Path, text: str) -> Header:
    """Parse the metadata entry of a trace. Raises InputError that names the field which breaks the format."""

    def refuse(name: str, found: Any, expected: str) -> InputError:
        return InputError(f"{path}: metadata field {quoted(name)} is {shown(found)}, but {expected} was expected")

    def name_of(name: str, found: Any) -> None:
        """Raises InputError for a long or unprintable name: names go to terminals, pages and paths."""
        if not found.isprintable() or len(found) > LONGEST_NAME:
            raise refuse(name, found, f"at most {LONGEST_NAME} printable characters")

    try:
        values = strict_json(text)
    except ValueError as error:
        raise InputError(f"{path}: the metadata entry 'refmoe' is not JSON: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise refuse("refmoe", values, "an object")
    if values.get("format_version") != FORMAT_VERSION:
        raise refuse("format_version", values.get("format_version"), f'"{FORMAT_VERSION}"')
    for name in ("case", "checkpoint"):
        if not isinstance(values.get(name), str | None):
            raise refuse(name, values[name], "a string or null")
        name_of(name, values.get(name) or "")
    if not isinstance(values.get("policy"), str):
        raise refuse("policy", values.get("policy"), "a string")
    name_of("policy", values["policy"])
    producer = values.get("producer")
    if not isinstance(producer, dict) or not all(isinstance(item, str) for item in producer.values()):
        raise refuse("producer", producer, "an object of strings")
    for name in ("name", "version"):
        name_of(f"producer.{name}", producer.get(name, ""))
    listed = values.get("runs")
    if not isinstance(listed, list) or not listed:
        raise refuse("runs", listed, "a list of at least one run")
    runs = tuple(_parse_run(i, entry, refuse, name_of) for i, entry in enumerate(listed))
    if len({run.run for run in runs}) < len(runs):
        raise refuse("runs", [run.run for run in runs], "a different name for every run")
    return Header(
        runs=runs,
        case=values.get("case"),
        checkpoint=values.get("checkpoint"),
        policy=values["policy"],
        producer=producer,
    )


def _parse_run(i: int, entry: Any, refuse: Any, name_of: Any) -> Run:
    at = f"runs[{i}]"
    if not isinstance(entry, dict):
        raise refuse(at, entry, "an object")
    if not isinstance(entry.get("run"), str) or not entry["run"] or "/" in entry["run"]:
        raise refuse(f"{at}.run", entry.get("run"), "a name without '/'")
    name_of(f"{at}.run", entry["run"])
    if not isinstance(entry.get("op"), str) or entry["op"] not in OPS:
        raise refuse(f"{at}.op", entry.get("op"), f"one of {', '.join(OPS)}")
    for name in ("sequence", "past"):
        if not _is_count(entry.get(name)):
            raise refuse(f"{at}.{name}", entry.get(name), "an integer from 0")
    for name in ("tokens", "positions"):
        found = entry.get(name)
        if not isinstance(found, list) or not found or not all(_is_count(item) for item in found):
            raise refuse(f"{at}.{name}", found, "a list of at least one integer from 0")
    if not isinstance(entry.get("read", True), bool):
        raise refuse(f"{at}.read", entry["read"], "true or false")
    if len(entry["tokens"]) != len(entry["positions"]):
        raise refuse(f"{at}.positions", entry["positions"], "as many positions as tokens")
    return Run(
        run=entry["run"],
        op=entry["op"],
        sequence=entry["sequence"],
        tokens=tuple(entry["tokens"]),
        positions=tuple(entry["positions"]),
        past=entry["past"],
        read=entry.get("read", True),
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
