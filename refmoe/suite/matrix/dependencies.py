# SPDX-License-Identifier: Apache-2.0
"""Digests of everything that an outcome of the matrix depends on, to tell what has changed since it was computed."""

from __future__ import annotations

import ast
import hashlib
import io
import re
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

from refmoe.bugs.catalogue import MUTANTS
from refmoe.files.reading import read_bytes, read_text
from refmoe.profiles.load import policy
from refmoe.suite import SMALL, find_cases
from refmoe.suite.matrix.outcomes import POLICIES

PACKAGE = Path(__file__).parents[2]

CORE = (
    "spec", "arithmetic", "profiles", "verifier", "steps", "traces", "suite/case.py", "suite/matrix/outcomes.py",
    "checkpoints/configuration.py", "checkpoints/layout.py", "checkpoints/synthetic.py", "checkpoints/weight.py",
    "checkpoints/weight_edits.py", "checkpoints/weight_formula.py", "bugs/extra_cache_slots.py", "bugs/run_engine.py",
    "bugs/mutant.py", "bugs/quantised_checkpoint.py", "bugs/forced_rounding.py", "bugs/sharded_mutant.py",
    "bugs/changed_weights.py",
)  # fmt: skip
"""The files that every run of a mutant on a case depends on. The policies that judge it count as well."""
NOT_CORE = (
    "arithmetic/ball.py", "arithmetic/tensor_core.py", "arithmetic/enclosure/tensor_core.py",
    "arithmetic/native/lanes.py", "arithmetic/native/mkl.py", "arithmetic/native/mkl_ops.py",
    "arithmetic/native/slabs.py", "steps/cuda.py", "steps/native.py", "steps/native_attention.py",
    "steps/native_cache.py", "profiles/profiles.toml", "verifier/diagnosis", "verifier/distances.py",
)  # fmt: skip
"""Files of these packages on which no such run depends. Of the profiles, only those of the judging policies count."""
SURROUNDINGS = (
    "text", "routers/literature/losses.py", "bugs/generation_session.py", "bugs/vector_checks.py",
    "suite/matrix/surroundings.py",
)  # fmt: skip
"""The files that the mutants of tokenizer, sampler and loss depend on, beside their vectors."""

CATALOGUE, CASES, VECTORS = "bugs/", "cases/", "vectors/"
"""The beginnings of the names of parts."""


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 over the names and the contents of files, in name order; of a Python file over its code alone."""
    total = hashlib.sha256()
    for path in sorted(paths):
        content = read_bytes(path, "a source file")
        content = code_of(content.decode()).encode() if path.suffix == ".py" else content
        total.update(path.name.encode() + b"\0" + content)
    return total.hexdigest()


@cache
def code_of(source: str) -> str:
    """A Python file without docstrings, comments and empty lines, which no outcome depends on."""
    lines = source.splitlines()
    removed: list[tuple[int, int, int, int]] = []  # first line, column, last line, column; lines from 1
    for body in bodies(ast.parse(source)):
        for each in body:
            if (
                isinstance(each, ast.Expr)
                and isinstance(each.value, ast.Constant)
                and isinstance(each.value.value, str)
            ):
                first, last = each.lineno, each.end_lineno or each.lineno
                start = len(lines[first - 1].encode()[: each.col_offset].decode())  # columns of a tree count bytes
                stop = len(lines[last - 1].encode()[: each.end_col_offset].decode())
                removed.append((first, start, last, stop))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            removed.append((*token.start, *token.end))
    for first, start, last, stop in removed:
        for number in range(first, last + 1):
            left = start if number == first else 0
            right = stop if number == last else len(lines[number - 1])
            lines[number - 1] = lines[number - 1][:left].ljust(right) + lines[number - 1][right:]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def bodies(tree: ast.Module) -> Iterator[list[ast.stmt]]:
    """The body of each statement, at any depth. Expressions have none, and most nodes of a tree are theirs."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        for part in ("body", "orelse", "finalbody", "handlers", "cases"):
            inside = getattr(node, part, None)
            if isinstance(inside, list):
                waiting += inside
                if part == "body":
                    yield inside


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
    names = re.findall(r"^from refmoe\.bugs\.catalogue\.(\w+) import", read_text(path, "a source file"), re.M)
    return {path}.union(*(with_imports(path.with_name(f"{name}.py")) for name in names))


def digests(golden: Path, family: str = SMALL) -> dict[str, str]:
    """Per part its digest: ``core``, ``surroundings``, each file of the catalogue, each case, each file of vectors.

    family: whose matrix it is. Mutants of tokenizer, sampler and loss belong to the first family's alone.
    """
    core = hashlib.sha256(f"{digest(files_of(CORE))} {policies()}".encode()).hexdigest()
    found = {"core": core} | ({"surroundings": digest(files_of(SURROUNDINGS))} if family == SMALL else {})
    for path in sorted((PACKAGE / "bugs" / "catalogue").glob("*.py")):
        if path.name != "__init__.py":
            found[CATALOGUE + path.stem] = digest(with_imports(path))
    for folder in find_cases(golden, (family,)):
        found[CASES + folder.name] = digest([folder / "case.toml"])
    for path in sorted((golden / "vectors").glob("*.json")) if family == SMALL else ():
        if not path.name.endswith(".schema.json"):
            found[VECTORS + path.stem] = digest([path])
    return found


def changed(recorded: Mapping[str, str], golden: Path, family: str = SMALL) -> set[str]:
    """The parts that are not as they were.   family: as for `digests`"""
    now = digests(golden, family)
    return {name for name in now.keys() | recorded.keys() if now.get(name) != recorded.get(name)}
