"""Golden cases: what is computed, how it is written down, and how it is checked."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from refmoe import __version__
from refmoe.atomic import replacing
from refmoe.checkpoint.layout import Checkpoint
from refmoe.checkpoint.synthetic import synthetic_checkpoint
from refmoe.errors import InputError
from refmoe.ops.exact import ExactOps
from refmoe.script import Call, execute, plan
from refmoe.spec.config import Config, ConfigError
from refmoe.spec.model import Model
from refmoe.trace import FORMAT_VERSION, Header, Recorder, Run, read_trace, write_trace

CASE_FILE, TRACE_FILE, MANIFEST_FILE = "case.toml", "trace.safetensors", "manifest.json"


@dataclass(frozen=True)
class Case:
    """A case as its case.toml says: why it exists, the model, and the calls."""

    folder: Path
    why: str
    clauses: tuple[str, ...]
    bugs: tuple[str, ...]
    config: Config
    seed: int
    calls: tuple[Call, ...]
    start: int = 0
    exponents: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.name

    def checkpoint(self) -> Checkpoint:
        """The model, its weights from the formula."""
        return synthetic_checkpoint(self.config, self.seed, self.exponents)

    def runs(self) -> tuple[Run, ...]:
        """The calls, planned."""
        return plan(self.calls, self.config.vocab, self.start)


@dataclass(frozen=True)
class Difference:
    """One way in which a case on disk is not what it should be."""

    case: str
    what: str
    """One sentence: the file, and for a tensor its name, the index of the first differing element and both values."""


def find_cases(golden: Path) -> list[Path]:
    """The folders of all cases, in name order. Raises InputError when there is none."""
    if (golden / CASE_FILE).exists():
        return [golden]
    folders = sorted(path.parent for path in golden.glob(f"*/{CASE_FILE}"))
    if not folders:
        raise InputError(f"{golden}: no case is there; folders with a {CASE_FILE} were expected")
    return folders


def read_case(folder: Path) -> Case:
    """Raises InputError that names the field of case.toml which is missing, unknown or not as expected."""
    path = folder / CASE_FILE
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: not a readable TOML file: {error}") from None
    if values.pop("format_version", None) != FORMAT_VERSION:
        raise InputError(f"{path}: 'format_version' is missing or unknown, but \"{FORMAT_VERSION}\" was expected")
    fields = {"why": str, "clauses": list, "bugs": list, "config": dict, "weights": dict, "script": list}
    for name, kind in fields.items():
        if not isinstance(values.get(name), kind):
            raise InputError(f"{path}: '{name}' is missing or not a {kind.__name__}")
    for name in values.keys() - fields.keys() - {"start"}:
        raise InputError(f"{path}: unknown field '{name}'")
    try:
        config = Config(**values["config"])
    except (TypeError, ConfigError) as error:
        raise InputError(f"{path}: [config] {str(error).removeprefix('Config.__init__() ')}") from None
    weights = values["weights"]
    if not isinstance(weights.get("seed"), int) or weights.keys() - {"seed", "exponents"}:
        raise InputError(f"{path}: [weights] must have an integer 'seed' and may have 'exponents'")
    calls = []
    for i, call in enumerate(values["script"]):
        if not isinstance(call, dict) or call.keys() != {"op", "sequence", "tokens"}:
            raise InputError(f"{path}: script[{i}] must have 'op', 'sequence' and 'tokens' and nothing else")
        calls.append((call["op"], call["sequence"], tuple(call["tokens"])))
    return Case(
        folder, values["why"].strip(), tuple(values["clauses"]), tuple(values["bugs"]), config, weights["seed"],
        tuple(calls), values.get("start", 0), dict(weights.get("exponents", {})),
    )  # fmt: skip


def compute(case: Case, progress: Callable[[], None] | None = None) -> dict[str, np.ndarray[Any, Any]]:
    """Every tap of every run of the case, exactly."""
    recorder = Recorder(progress=progress)
    model = Model(case.config, case.checkpoint().parameters)
    execute(ExactOps(recorder), model, case.runs(), recorder)
    return recorder.arrays


def emit(case: Case, progress: Callable[[], None] | None = None) -> None:
    """Compute the case and write its trace and manifest, each whole or not at all, the manifest last."""
    arrays = compute(case, progress)
    write_trace(case.folder / TRACE_FILE, Header(case.runs(), case.name, policy="exact"), arrays)
    manifest = {
        "format_version": FORMAT_VERSION,
        "case": case.name,
        "generator": {"name": "refmoe", "version": __version__},
        "files": {name: file_digest(case.folder / name) for name in (CASE_FILE, TRACE_FILE)},
        "tensors": {key: tensor_digest(arrays[key]) for key in sorted(arrays)},
        "certificate": None,
    }
    write_manifest(case.folder, manifest)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a case's manifest.json, whole or not at all."""
    with replacing(folder / MANIFEST_FILE) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n")


def check(folder: Path, progress: Callable[[], None] | None = None) -> list[Difference]:
    """Recompute a case and compare every bit and every digest. An empty list: all is as it should be."""
    case = read_case(folder)
    found: list[Difference] = []

    def differs(what: str) -> None:
        found.append(Difference(case.name, what))

    manifest = read_manifest(folder)
    for path in sorted(folder.iterdir()):
        if path.name not in (CASE_FILE, TRACE_FILE, MANIFEST_FILE):
            differs(f"{path}: an unexpected file")
    for name in (CASE_FILE, TRACE_FILE):
        if not (folder / name).exists():
            differs(f"{folder / name}: is missing")
        elif manifest["files"].get(name) != file_digest(folder / name):
            differs(f"{folder / name}: SHA-256 differs from the manifest's")
    computed = compute(case, progress)
    for key in sorted(computed.keys() ^ manifest["tensors"].keys()):
        differs(f"{folder / MANIFEST_FILE}: tensor '{key}' is {'missing' if key in computed else 'unexpected'}")
    if not (folder / TRACE_FILE).exists():
        return found
    trace = read_trace(folder / TRACE_FILE)
    if trace.header.runs != case.runs():
        differs(f"{trace.path}: its runs are not those of {CASE_FILE}")
    for key in sorted(computed.keys() ^ trace.tensors.keys()):
        differs(f"{trace.path}: tensor '{key}' is {'missing' if key in computed else 'unexpected'}")
    for key in sorted(computed.keys() & trace.tensors.keys()):
        sentence = first_difference(trace.tensors[key].map(), computed[key])
        if sentence:
            differs(f"{trace.path}: tensor '{key}' {sentence}")
        elif manifest["tensors"].get(key, "") != tensor_digest(computed[key]):
            differs(f"{folder / MANIFEST_FILE}: the digest of tensor '{key}' is not that of its values")
    return found


def first_difference(stored: np.ndarray[Any, Any], computed: np.ndarray[Any, Any]) -> str | None:
    """Where two arrays first differ in a bit, in words, or None."""
    if stored.dtype != computed.dtype or stored.shape != computed.shape:
        return (
            f"is {stored.dtype} {list(stored.shape)}, but {computed.dtype} {list(computed.shape)} was computed"
        )  # fmt: skip
    bits = (np.ascontiguousarray(array).view(np.int64) for array in (stored, computed))
    different = np.argwhere(np.not_equal(*bits))
    if not len(different):
        return None
    at = tuple(different[0].tolist())
    count = f" and {len(different) - 1} more" if len(different) > 1 else ""
    return f"differs at {list(at)}{count}: stored {stored[at]!r}, computed {computed[at]!r}"


def tensor_digest(array: np.ndarray[Any, Any]) -> str:
    """SHA-256 of an array's little-endian bytes in row-major order."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """A case's manifest.json. Raises InputError when it is missing, unreadable or of another format."""
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; `refmoe emit --case` writes it") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable JSON file: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise InputError(f"{path}: 'format_version' is missing or unknown, but \"{FORMAT_VERSION}\" was expected")
    for name in ("files", "tensors"):
        if not isinstance(manifest.get(name), dict):
            raise InputError(f"{path}: '{name}' is missing or not an object")
    return manifest
