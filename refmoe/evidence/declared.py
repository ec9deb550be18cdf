# SPDX-License-Identifier: Apache-2.0
"""The facts that only the author of a package knows, such as build and date. Nothing derives them."""

from __future__ import annotations

import hashlib
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from refmoe import __version__
from refmoe.errors import InputError
from refmoe.evidence.layout import DECLARED
from refmoe.files.json_file import JsonFile, read_json
from refmoe.files.reading import need_file, read_bytes
from refmoe.suite.golden_folder import CLONED, PACKAGE, PACKED
from refmoe.suite.manifest import DIGEST, MANIFEST_FILE, file_digest

DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
PACKAGES = (
    "numpy", "ml_dtypes", "safetensors", "click", "rich", "threadpoolctl", "python-flint", "cyclonedx-python-lib",
    "in-toto-attestation", "cryptography",
)  # fmt: skip
"""The packages whose versions are recorded, where they are installed."""
FIELDS = ("date", "build", "artifacts", "refmoe", "environment")


@dataclass(frozen=True)
class Declared:
    """The facts that a package declares."""

    date: str
    """``YYYY-MM-DD``."""
    build: str
    """The build of the engine in words of the author; empty: not given."""
    artifacts: Mapping[str, str]
    """Per file of the engine its SHA-256."""
    refmoe: Mapping[str, str]
    """``version``; ``source``, the SHA-256 over all files of the package; ``suite``, that of the suite's manifest;
    ``commit`` in a clone; ``record``, the SHA-256 of the list of files of an installed wheel."""
    environment: Mapping[str, str]
    """Python, system, machine, and the version of each package."""

    def to_json(self) -> dict[str, Any]:
        """The value of the file."""
        return {
            "date": self.date, "build": self.build, "artifacts": {**self.artifacts}, "refmoe": {**self.refmoe},
            "environment": {**self.environment},
        }  # fmt: skip


def declare(golden: Path, date: str | None, build: str, artifacts: tuple[Path, ...]) -> Declared:
    """The facts of this machine.

    golden: the folder of the suite.   date: None: today, in UTC.   artifacts: files of the engine
    Raises InputError for a date that is none, and for a file that cannot be read or has the name of another.
    """
    names = [path.name for path in artifacts]
    for path in artifacts:
        if names.count(path.name) > 1:
            raise InputError(f"--artifact {path}: two files have this name, but one was expected")
        need_file(path, "a file of the engine")
    return Declared(
        date=_date(date),
        build=build,
        artifacts={path.name: file_digest(path) for path in sorted(artifacts, key=lambda path: path.name)},
        refmoe=own_refmoe(golden),
        environment=environment(),
    )


def _date(given: str | None) -> str:
    if given is None:
        return datetime.now(UTC).date().isoformat()
    try:
        if DATE.fullmatch(given):
            return datetime.strptime(given, "%Y-%m-%d").date().isoformat()
    except ValueError:
        pass
    raise InputError(f"--date is '{given}', but a date such as 2026-11-29 was expected")


def own_refmoe(golden: Path) -> dict[str, str]:
    """The identity of this refmoe, and of a suite."""
    optional = {"commit": commit(), "record": record()}
    return {
        "version": __version__, "source": source_digest(), "suite": suite_digest(golden),
        **{name: value for name, value in optional.items() if value},
    }  # fmt: skip


def source_digest(package: Path = PACKAGE) -> str:
    """The SHA-256 over the names and contents of all files of the package, without the goldens."""
    total = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        inside = path.relative_to(package).parts
        if path.is_file() and "__pycache__" not in inside and inside[0] != PACKED.name:
            total.update("/".join(inside).encode() + b"\0" + hashlib.sha256(read_bytes(path, "a file")).digest())
    return total.hexdigest()


def suite_digest(golden: Path) -> str:
    """The SHA-256 of a suite's manifest, which has the names of its cases and the digests of its documents."""
    path = golden / MANIFEST_FILE
    return file_digest(path) if path.exists() else ""


def commit() -> str:
    """The commit of a clone that has no changes; empty where there is none."""
    if not CLONED.exists() or PACKED.exists():
        return ""
    said = [_git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")]
    return said[0] if re.fullmatch(r"[0-9a-f]{40,64}", said[0]) and not said[1] else ""


def _git(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE.parent), *words], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "?"
    return done.stdout.strip() if done.returncode == 0 else "?"


def record() -> str:
    """The SHA-256 of the list of files and digests of an installed wheel; empty in a clone."""
    if not PACKED.exists():
        return ""
    try:
        files = metadata.files("refmoe") or []
    except metadata.PackageNotFoundError:
        return ""
    found = [Path(str(file.locate())) for file in files if file.name == "RECORD"]
    return file_digest(found[0]) if found else ""


def environment() -> dict[str, str]:
    """The environment in which a package is made."""
    found = {"python": platform.python_version(), "implementation": sys.implementation.name}
    found |= {"system": platform.system(), "machine": platform.machine()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def read_declared(folder: Path) -> Declared:
    """The facts of a package. Raises InputError that names the field which breaks the format."""
    file = read_json(folder / DECLARED)
    for name in file.values:
        if name not in FIELDS:
            raise file.refuse(name, file.values[name], f"no field but {', '.join(FIELDS)} was expected")
    date, build = file.need("date"), file.need("build")
    if not isinstance(date, str) or not DATE.fullmatch(date):
        raise file.refuse("date", date, "a date such as 2026-11-29 was expected")
    if not isinstance(build, str):
        raise file.refuse("build", build, "a text was expected")
    artifacts, own, around = (_texts(file, name) for name in ("artifacts", "refmoe", "environment"))
    for name in ("version", "source", "suite"):
        if name not in own:
            file.within("refmoe").need(name)
    for name, found in artifacts.items():
        if not DIGEST.fullmatch(found):
            raise file.within("artifacts").refuse(name, found, "a SHA-256 was expected")
    return Declared(date=date, build=build, artifacts=artifacts, refmoe=own, environment=around)


def _texts(file: JsonFile, name: str) -> dict[str, str]:
    found = file.within(name).values
    for key, value in found.items():
        if not isinstance(value, str):
            raise file.within(name).refuse(key, value, "a text was expected")
    return found
