# SPDX-License-Identifier: Apache-2.0
"""Cases, as case.toml defines them: the reason for the case, the model, and the calls."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from refmoe.checkpoints.configuration import ConfigError, checked
from refmoe.checkpoints.layout import Checkpoint
from refmoe.checkpoints.size import total_parameters
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.errors import InputError
from refmoe.files.parsing import toml
from refmoe.files.reading import read_bytes
from refmoe.spec.config import Config
from refmoe.traces.script import Call, Packed, plan
from refmoe.traces.trace import FORMAT_VERSION, Run

CASE_FILE = "case.toml"
STORES = ("trace", "fingerprint")
SMALL, PRODUCTION = FAMILIES = ("small", "production")
"""The families of cases.

small: dimensions as small as a bug allows, with every value of the golden.   production: dimensions that the kernels of
production engines take, such as head_dim 64 and 128, and columns in multiples of 256, with fingerprints.
"""
LATEST_START = 1 << 30
"""The last position at which a sequence may start: the exact rotary table is defined up to 2^31 - 1."""
FULL_SIZE = 1 << 32
"""The number of parameters from which a case is of full size."""


@dataclass(frozen=True)
class Case:
    """A case, as its case.toml defines it: the reason for it, the model, and the calls."""

    folder: Path
    why: str
    clauses: tuple[str, ...]
    bugs: tuple[str, ...]
    conditions: tuple[str, ...]
    config: Config
    seed: int
    calls: tuple[Call | Packed, ...]
    start: int = 0
    exponents: dict[str, int] = field(default_factory=dict)
    edits: tuple[dict[str, Any], ...] = ()
    layers: tuple[int, int] | None = None
    """The first layer to compute, and the layer to stop before; None: all layers."""
    store: str = "trace"
    """The form of the golden: ``trace``, or for a large case ``fingerprint``."""
    family: str = SMALL
    """One of `FAMILIES`."""
    digest: str = ""
    """The SHA-256 of case.toml."""

    @cached_property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def full_size(self) -> bool:
        """Whether the case takes minutes, so that it is computed only when it is named."""
        return total_parameters(self.config) >= FULL_SIZE

    @property
    def computed(self) -> range:
        """The layers to compute."""
        return range(*(self.layers or (0, self.config.layers)))

    def checkpoint(self) -> Checkpoint:
        """The model, with weights from the weight formula."""
        return synthetic_checkpoint(self.config, self.seed, self.exponents, self.edits)

    def runs(self) -> tuple[Run, ...]:
        """The runs that the calls plan."""
        return plan(self.calls, self.config.vocab, self.start)


def find_cases(golden: Path, families: Collection[str] = (SMALL,)) -> list[Path]:
    """The folders of all cases of some families in a golden folder that are not of full size, in name order.

    golden: the folder of cases, or the folder of one case of any size and family.   families: some of `FAMILIES`
    Raises InputError when there is no case of any family.
    """
    if (golden / CASE_FILE).exists():
        return [golden]
    folders = sorted(path.parent for path in golden.glob(f"*/{CASE_FILE}"))
    if not folders:
        raise InputError(f"{golden}: no case is there; folders with a {CASE_FILE} were expected")
    return [folder for folder in folders if _is_listed(folder, families)]


def find_full_size_cases(golden: Path) -> list[Path]:
    """The folders of all cases of full size, in name order."""
    return [path.parent for path in sorted(golden.glob(f"*/{CASE_FILE}")) if _is_full_size(path.parent)]


def _is_listed(folder: Path, families: Collection[str]) -> bool:
    """Whether a case is of one of the families and not of full size."""
    try:
        case = read_case(folder)
    except InputError:
        return True  # the next attempt to read the case reports the error
    return case.family in families and not case.full_size


def _is_full_size(folder: Path) -> bool:
    try:
        return read_case(folder).full_size
    except InputError:
        return False  # the next attempt to read the case reports the error


def read_case(folder: Path) -> Case:
    """Read the case in a folder. Raises InputError that names a missing, unknown or wrong field of case.toml."""
    data = read_bytes(folder / CASE_FILE, "a case in TOML")
    return replace(_case(folder, data), digest=hashlib.sha256(data).hexdigest())


@lru_cache(maxsize=256)
def _case(folder: Path, data: bytes) -> Case:
    """The case of a file's bytes, without their digest. A command asks for it several times. Raises InputError."""
    path = folder / CASE_FILE
    values = toml(path, "a case in TOML", data)
    try:
        return _parse(folder, values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _parse(folder: Path, values: dict[str, Any]) -> Case:
    if values.get("format_version") != FORMAT_VERSION:
        raise InputError(f"'format_version' is missing or unknown, but \"{FORMAT_VERSION}\" was expected")
    for name, (fits, expected, default) in FIELDS.items():
        if not fits(values.setdefault(name, default)):
            raise InputError(f"'{name}' is missing or not {expected}")
    for name in sorted(values.keys() - FIELDS.keys() - {"format_version"}):
        raise InputError(f"unknown field '{name}'")
    try:
        config = checked(values["config"])
    except ConfigError as error:
        raise InputError(f"[config] {error}") from None
    weights = {"exponents": {}, "edits": [], **values["weights"]}
    if not is_count(weights.get("seed")) or weights.keys() - {"seed", "exponents", "edits"}:
        raise InputError("[weights] must have an integer 'seed' from 0 and may have 'exponents' and 'edits'")
    if not isinstance(weights["exponents"], dict):
        raise InputError("[weights] 'exponents' is not a table")
    if not is_list(dict)(weights["edits"]):
        raise InputError("[weights] 'edits' is not a list of tables")
    case = Case(
        folder=folder,
        why=values["why"].strip(),
        clauses=tuple(values["clauses"]),
        bugs=tuple(values["bugs"]),
        conditions=tuple(values["conditions"]),
        config=config,
        seed=weights["seed"],
        calls=tuple(_call(i, call) for i, call in enumerate(values["script"])),
        start=values["start"],
        exponents=weights["exponents"],
        edits=tuple(weights["edits"]),
        layers=_layers(values["layers"], config),
        store=values["store"],
        family=values["family"],
    )
    case.runs()
    return case


def _layers(given: list[int] | None, config: Config) -> tuple[int, int] | None:
    if given is None:
        return None
    if len(given) != 2 or given[0] != 0 or not 0 < given[1] <= config.layers:
        raise InputError(f"'layers' is {given}, but [0, n] with n from 1 to {config.layers} was expected")
    return given[0], given[1]


def _call(i: int, call: dict[str, Any]) -> Call | Packed:
    if call.get("op") == "packed":
        segments = call.get("segments")
        if call.keys() != {"op", "segments"} or not isinstance(segments, list) or not all(map(is_tokens, segments)):
            raise InputError(f"script[{i}]: packed must have 'segments', lists of token ids, and nothing else")
        return Packed(tuple(tuple(segment) for segment in segments))
    if call.keys() - {"keep", "read"} != {"op", "sequence", "tokens"}:
        raise InputError(
            f"script[{i}] must have 'op', 'sequence' and 'tokens', may have 'keep' and 'read', and nothing else"
        )
    if not isinstance(call["op"], str) or not is_count(call["sequence"]) or not is_count(call.get("keep", 0)):
        raise InputError(f"script[{i}]: 'op' is not a string, or 'sequence' or 'keep' not an integer from 0")
    if not is_tokens(call["tokens"]):
        raise InputError(f"script[{i}]: 'tokens' is not a list of token ids")
    if not isinstance(call.get("read", True), bool):
        raise InputError(f"script[{i}]: 'read' is not true or false")
    return Call(
        op=call["op"],
        sequence=call["sequence"],
        tokens=tuple(call["tokens"]),
        keep=call.get("keep"),
        read=call.get("read", True),
    )


def is_count(value: Any) -> bool:
    """Whether the value is an integer from 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_tokens(value: Any) -> bool:
    """Whether the value is a list of integers. `plan` checks them against the vocabulary."""
    return isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in value)


def is_list(kind: type) -> Callable[[Any], bool]:
    """A predicate: whether a value is a list of values of that type."""
    return lambda value: isinstance(value, list) and all(isinstance(item, kind) for item in value)


FIELDS: dict[str, tuple[Callable[[Any], bool], str, Any]] = {
    "why": (lambda value: isinstance(value, str), "a string", None),
    "clauses": (is_list(str), "a list of strings", None),
    "bugs": (is_list(str), "a list of strings", None),
    "conditions": (is_list(str), "a list of strings", None),
    "config": (lambda value: isinstance(value, dict), "a table", None),
    "weights": (lambda value: isinstance(value, dict), "a table", None),
    "script": (is_list(dict), "a list of tables", None),
    "start": (lambda value: is_count(value) and value <= LATEST_START, f"an integer from 0 to {LATEST_START}", 0),
    "layers": (lambda value: value is None or is_tokens(value), "a list of two integers", None),
    "store": (lambda value: value in STORES, f"one of {', '.join(STORES)}", "trace"),
    "family": (lambda value: value in FAMILIES, f"one of {', '.join(FAMILIES)}", SMALL),
}
"""Per field of case.toml: a predicate of its value, the same in words, and the default."""
