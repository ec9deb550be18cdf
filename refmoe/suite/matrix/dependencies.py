"""Digests of everything that an outcome of the matrix depends on: what has changed since it was computed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from refmoe.bugs.catalogue import MUTANTS
from refmoe.policy.load import policy
from refmoe.suite.matrix.outcomes import POLICIES

PACKAGE = Path(__file__).parents[2]

CORE = (
    "spec", "arithmetic", "policy", "verify", "steps", "traces", "suite/case.py", "suite/matrix/outcomes.py",
    "checkpoints/configuration.py", "checkpoints/layout.py", "checkpoints/synthetic.py", "checkpoints/weight.py",
    "checkpoints/weight_edits.py", "checkpoints/weight_formula.py", "bugs/extra_slots.py", "bugs/engine.py",
    "bugs/mutant.py", "bugs/quantised.py", "bugs/rounding.py", "bugs/sharded.py", "bugs/weights.py",
)  # fmt: skip
"""What every run of a mutant on a case depends on, beside the policies that it is judged by."""
NOT_CORE = (
    "arithmetic/ball.py", "arithmetic/native/lanes.py", "arithmetic/native/mkl.py", "arithmetic/native/mkl_ops.py",
    "arithmetic/native/slabs.py", "steps/cuda.py", "steps/grouped.py", "steps/native.py", "steps/native_attention.py",
    "steps/native_cache.py", "policy/profiles.toml", "verify/diagnosis", "verify/distances.py",
)  # fmt: skip
"""Of these packages, what no such run loads, or only a part of: of all profiles, those that mutants are judged by."""
SURROUNDINGS = (
    "text", "routers/literature/losses.py", "bugs/session.py", "bugs/vectors.py", "suite/matrix/surroundings.py",
)  # fmt: skip
"""What the mutants of tokenizer, sampler and loss depend on beside their vectors."""

CATALOGUE, CASES, VECTORS = "bugs/", "cases/", "vectors/"
"""What the names of parts begin with."""


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 over the names and the bytes of files, in name order."""
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def files_of(names: Iterable[str], package: Path = PACKAGE) -> list[Path]:
    """The files of the package that these names stand for, folders with all that is in them."""
    found: list[Path] = []
    for name in names:
        path = package / name
        found += [path] if path.is_file() else [*path.rglob("*.py"), *path.rglob("*.toml")]
    left_out = [package / name for name in NOT_CORE]
    return [path for path in found if not any(path.is_relative_to(each) for each in left_out)]


def policies() -> str:
    """The policies that mutants are judged by, field by field."""
    changes = sorted({each.judged_by for each in MUTANTS.values()})
    return "\n".join(repr(policy(name + change)) for name in POLICIES for change in changes)


def with_imports(path: Path) -> set[Path]:
    """A file of the catalogue, and those of the others that it imports from."""
    names = re.findall(r"^from refmoe\.bugs\.catalogue\.(\w+) import", path.read_text(encoding="utf-8"), re.M)
    return {path}.union(*(with_imports(path.with_name(f"{name}.py")) for name in names))


def digests(golden: Path) -> dict[str, str]:
    """Per part its digest: ``core``, ``surroundings``, each file of the catalogue, each case, each file of vectors."""
    core = hashlib.sha256(f"{digest(files_of(CORE))} {policies()}".encode()).hexdigest()
    found = {"core": core, "surroundings": digest(files_of(SURROUNDINGS))}
    for path in sorted((PACKAGE / "bugs" / "catalogue").glob("*.py")):
        if path.name != "__init__.py":
            found[CATALOGUE + path.stem] = digest(with_imports(path))
    for path in sorted(golden.glob("*/case.toml")):
        found[CASES + path.parent.name] = digest([path])
    for path in sorted((golden / "vectors").glob("*.json")):
        if not path.name.endswith(".schema.json"):
            found[VECTORS + path.stem] = digest([path])
    return found


def changed(recorded: Mapping[str, str], golden: Path) -> set[str]:
    """The parts that are not as they were."""
    now = digests(golden)
    return {name for name in now.keys() | recorded.keys() if now.get(name) != recorded.get(name)}
