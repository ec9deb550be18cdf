# SPDX-License-Identifier: Apache-2.0
"""The specification as pages: one for each function or record that states clauses, with the functions around it.

All of it is read from the source of `refmoe.spec`: the clauses, the shapes, the taps, who calls whom.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from refmoe.spec.config import PRESETS, Config
from refmoe.suite.audit import clauses_of, ids_in, reading_order

SIZES = {
    "D": "dim", "L": "layers", "H": "heads", "K": "kv_heads", "d": "head_dim", "V": "vocab", "E": "experts",
    "k": "experts_per_token", "F": "hidden_dim",
}  # fmt: skip
"""The letters of shapes, and the field of the configuration that each stands for."""
LARGE = "mixtral-8x7b"
"""The published size whose numbers the pages show."""
SHAPE = re.compile(r"\[([^\]]*)\]")


@dataclass(frozen=True)
class Function:
    """A function or a record of the specification."""

    file: str
    """``norm.py``"""
    node: ast.FunctionDef | ast.ClassDef
    source: str
    """The lines as they stand, with decorators."""
    line: int
    """The number of the first of these lines."""

    @property
    def name(self) -> str:
        return self.node.name

    @cached_property
    def doc(self) -> str:
        return ast.get_docstring(self.node) or ""

    @property
    def headline(self) -> str:
        """The first sentence of the docstring."""
        return self.doc.partition("\n\n")[0].replace("\n", " ")

    @cached_property
    def clauses(self) -> dict[str, str]:
        """The clauses that the docstring states."""
        return dict(clauses_of(self.doc))

    @cached_property
    def shapes(self) -> dict[str, str]:
        """Per argument its shape in words, such as ``integers [T, k]``; under ``returns`` that of the result."""
        found: dict[str, str] = {}
        for line in self.doc.splitlines():
            for part in re.split(r" {3,}", line):
                names, colon, rest = part.partition(": ")
                if colon and SHAPE.search(rest) and re.fullmatch(r"[a-z]\w*(, [a-z]\w*)*", names.strip()):
                    found |= dict.fromkeys(names.strip().split(", "), rest)
        return found

    def axes(self, name: str) -> list[str]:
        """The axes of an argument, such as ``["T", "D"]``; none where its shape is not one array's."""
        shapes = SHAPE.findall(self.shapes.get(name, ""))
        return shapes[0].split(", ") if len(shapes) == 1 else []

    @cached_property
    def calls(self) -> frozenset[str]:
        """The names of all that it calls."""
        called = (node.func for node in ast.walk(self.node) if isinstance(node, ast.Call))
        return frozenset(f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in called)

    @cached_property
    def taps(self) -> dict[str, frozenset[str]]:
        """Per tap that it offers, the functions whose result the tap is."""
        found: dict[str, frozenset[str]] = {}
        for call in (node for node in ast.walk(self.node) if isinstance(node, ast.Call)):
            if called(call) == "tap" and isinstance(call.args[0], ast.Constant):
                value = call.args[1]
                found[str(call.args[0].value)] = frozenset({called(value)} if isinstance(value, ast.Call) else ())
            elif called(call) == "offer":
                assert isinstance(call.args[1], ast.Constant)
                for each in call.keywords:
                    found[f"{call.args[1].value}.{each.arg}"] = self.variables.get(str(each.arg), frozenset())
            elif called(call) == "norm" and isinstance(call.args[2], ast.Constant):
                found[str(call.args[2].value)] = frozenset({"norm"})
        return found

    @cached_property
    def variables(self) -> dict[str, frozenset[str]]:
        """Per local variable the functions that its value comes from."""
        found: dict[str, frozenset[str]] = {}
        for node in ast.walk(self.node):
            if isinstance(node, ast.Assign):
                for each in (part for target in node.targets for part in ast.walk(target)):
                    if isinstance(each, ast.Name):
                        found[each.id] = found.get(each.id, frozenset()) | calls_in(node.value)
        return found

    def readers(self, variable: str) -> frozenset[str]:
        """The functions that take this local variable as an argument."""
        calls = (node for node in ast.walk(self.node) if isinstance(node, ast.Call))
        return frozenset(
            called(call) for call in calls
            if any(isinstance(each, ast.Name) and each.id == variable for each in call.args)
        )  # fmt: skip


def called(call: ast.Call) -> str:
    """The last part of the name that is called: ``tap`` of ``ops.tap(...)``."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def calls_in(value: ast.expr) -> frozenset[str]:
    """The names of all that an expression calls."""
    return frozenset(called(node) for node in ast.walk(value) if isinstance(node, ast.Call))


@dataclass(frozen=True)
class Page:
    """A step of the model: the function that states its clauses, and those that belong to it."""

    first: Function
    others: tuple[Function, ...]
    taps: tuple[str, ...]
    """The taps, without their layer, that show the step."""
    callers: tuple[str, ...]
    """The names of the pages whose functions call it."""

    @property
    def name(self) -> str:
        return self.first.name

    @property
    def functions(self) -> tuple[Function, ...]:
        return (self.first, *self.others)

    @property
    def clauses(self) -> dict[str, str]:
        return self.first.clauses


def functions(package: Path) -> Iterator[Function]:
    """The functions and records of the specification, in reading order.   package: the folder of `refmoe`"""
    for path in sorted((package / "spec").glob("*.py"), key=reading_order):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                start = min([node.lineno, *(each.lineno for each in node.decorator_list)])
                yield Function(path.name, node, "\n".join(lines[start - 1 : node.end_lineno]), start)


def pages(package: Path) -> list[Page]:
    """A page for each function that states clauses, in reading order.

    A function that states none belongs to the page whose clause its docstring names, or else to the page that calls it.
    """
    known = [each for each in functions(package) if each.file not in ("taps.py", "interface.py")]
    stating = [each for each in known if each.clauses]
    home = {each.name: each.name for each in stating}
    rest = [each for each in known if not each.clauses and isinstance(each.node, ast.FunctionDef)]
    for each in rest:
        named = ids_in(each.doc)
        homes = [first.name for first in stating if named & first.clauses.keys()]
        home |= {each.name: homes[0]} if homes else {}
    for each in rest:
        if each.name not in home:
            by = [one for one in known if each.name in one.calls]
            home[each.name] = home[by[0].name]
    shown = taps_by_function(known)
    return [
        Page(
            first=first,
            others=tuple(each for each in rest if home[each.name] == first.name),
            taps=tuple(tap for tap, names in shown.items() if any(home.get(name) == first.name for name in names)),
            callers=tuple(
                dict.fromkeys(
                    home[one.name] for one in known
                    if first.name in one.calls and one.name in home and home[one.name] != first.name
                )
            ),
        )
        for first in stating
    ]  # fmt: skip


def taps_by_function(known: list[Function]) -> dict[str, frozenset[str]]:
    """Per tap the functions that it shows: the one that offers it, and those that compute its value.

    The activation of an expert is found by the name of its caller's variable, which the tap has too. A function that no
    tap shows is shown by the taps of those that read its result.
    """
    names = {each.name: each for each in known}
    found: dict[str, set[str]] = {}
    for each in known:
        for tap, behind in each.taps.items():
            found.setdefault(tap, set()).update({each.name}, behind & names.keys())
    for by in found.values():
        if "norm" in by:  # it gives the tap its name, and the step its value
            by.update(names["norm"].calls & names.keys())
    for each in known:
        for variable, behind in each.variables.items():
            for tap, by in found.items():
                if each.name in by and tap.rpartition(".")[2] == variable:
                    by.update(behind & names.keys())
    shown = set().union(*found.values())
    for each in known:
        for variable, behind in each.variables.items():
            hidden = (behind & names.keys()) - shown
            for by in found.values():
                if hidden and by & each.readers(variable):
                    by.update(hidden)
    return {tap: frozenset(by) for tap, by in found.items()}


def numbers(shape: str, config: Config = PRESETS[LARGE]) -> str:
    """A shape with the numbers of a published size: ``[T, D]`` is ``[T, 4096]``."""

    def number(axis: str) -> str:
        factors = axis.split("/") if "/" in axis else axis.split(" ")
        known = [getattr(config, SIZES[each]) for each in factors if each in SIZES]
        if len(known) == 1 and len(factors) == 2 and factors[1].isdigit():
            return str(known[0] // int(factors[1]))
        if len(known) != len(factors):
            return axis
        product = 1
        for each in known:
            product *= each
        return str(product)

    return SHAPE.sub(lambda match: "[" + ", ".join(map(number, match[1].split(", "))) + "]", shape)
