# SPDX-License-Identifier: Apache-2.0
"""The layout of the package, read from its own source: imports run downwards, and nothing is built by position."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "refmoe"

ROOMS = (
    "errors", "signals", "files", "parallel", "contracts", "arithmetic", "spec", "profiles", "checkpoints", "traces",
    "text", "steps", "routers", "kernels", "cuda", "jobs", "bugs", "verifier", "suite", "engines", "evidence",
    "report", "api", "testing", "cli", "__main__",
)  # fmt: skip
"""A room imports only from the rooms before it."""
ALONE = {"spec": set[str](), "arithmetic": {"errors"}}
"""The rooms that an auditor reads by themselves, and all that each may import."""
MOST_POSITIONAL = 4
MOST_PARAMETERS = 8


def modules() -> dict[str, Path]:
    """Every module of the package by its name without ``refmoe.``; a package stands for its ``__init__``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def only_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def statements(node: ast.AST, lazy: bool) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported; with `lazy`, those inside functions as well."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            if only_for_types(child):
                continue
            yield child
        if lazy or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from statements(child, lazy)


def imported(module: str, lazy: bool = True) -> set[str]:
    """The modules of the package that a module imports."""
    found = set()
    for node in statements(tree(module), lazy):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "refmoe":
            base = node.module.removeprefix("refmoe").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                found.add(inner if inner in MODULES else base)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("refmoe.") for a in node.names if a.name.startswith("refmoe.")}
    return found - {"", module}


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_room_has_its_place() -> None:
    assert {room(module) for module in MODULES} - {""} == {*ROOMS}


@pytest.mark.parametrize("name", ROOMS)
def test_imports_run_downwards(name: str) -> None:
    """Those inside functions as well."""
    allowed = ALONE.get(name, {*ROOMS[: ROOMS.index(name)]}) | {name}
    upwards = {
        f"{module} imports {other}"
        for module in MODULES
        if room(module) == name
        for other in imported(module)
        if room(other) not in allowed
    }
    assert upwards == set()


def test_no_module_imports_itself_in_a_circle() -> None:
    """`TopologicalSorter` raises CycleError, with the circle."""
    order = TopologicalSorter({module: imported(module, lazy=False) for module in MODULES}).static_order()
    assert {*order} >= {*MODULES} - {""}


def calls(module: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree(module)) if isinstance(node, ast.Call))


def test_nothing_with_many_fields_is_built_by_position() -> None:
    """Two fields that change places are not seen in a list of seventeen."""
    found = [
        f"{module}:{call.lineno} {ast.unparse(call.func)}"
        for module in MODULES
        for call in calls(module)
        if len(call.args) > MOST_POSITIONAL and ast.unparse(call.func).rpartition(".")[2][:1].isupper()
    ]
    assert found == []


def test_no_signature_is_longer_than_one_can_read() -> None:
    """A function that needs more takes a record, whose fields have names and a line each."""
    found = []
    for module in MODULES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                names = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
                if len(names) > MOST_PARAMETERS:
                    found.append(f"{module}:{node.lineno} {node.name} has {len(names)}")
    assert found == []


def test_no_production_code_is_mocked() -> None:
    sources = {module: path.read_text(encoding="utf-8") for module, path in MODULES.items()}
    assert [module for module, text in sources.items() if "unittest" in text] == []


def test_an_array_is_defined_once() -> None:
    """`Array` is a protocol in the spec, and elsewhere one alias."""
    defined = {
        module
        for module in MODULES
        for node in tree(module).body
        if (isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "Array")
        or (isinstance(node, ast.Assign) and "Array" in [ast.unparse(target) for target in node.targets])
    }
    assert defined == {"arithmetic.arrays"}
