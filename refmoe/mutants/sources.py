"""Digests of everything that an outcome of the matrix depends on: what has changed since it was computed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
CORE = (
    "spec", "ops", "policy", "verify", "script.py", "trace.py", "sharding", "mutants/engine.py", "mutants/mutant.py",
    "mutants/attending.py", "mutants/rounding.py", "mutants/parameters.py", "mutants/quantised.py",
)  # fmt: skip
"""What every outcome depends on."""


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 over the names and the bytes of files, in name order."""
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def digests(golden: Path) -> dict[str, str]:
    """Per part its digest: ``core``, each file of the catalogue, each case."""
    core: list[Path] = []
    for name in CORE:
        path = PACKAGE / name
        core += [path] if path.is_file() else [*path.rglob("*.py"), *path.rglob("*.toml")]
    found = {"core": digest(core)}
    for path in sorted((PACKAGE / "mutants" / "catalogue").glob("*.py")):
        if path.name != "__init__.py":
            found[f"mutants/{path.stem}"] = digest([path])
    for path in sorted(golden.glob("*/case.toml")):
        found[f"cases/{path.parent.name}"] = digest([path])
    return found


def changed(recorded: Mapping[str, str], golden: Path) -> set[str]:
    """The parts that are not as they were."""
    now = digests(golden)
    return {name for name in now.keys() | recorded.keys() if now.get(name) != recorded.get(name)}
