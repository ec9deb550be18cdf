# SPDX-License-Identifier: Apache-2.0
"""The worked example: every value of every step in one run of a golden case, as the specification computes it.

The case is the one with the fewest parameters, so that a reader can follow with a pocket calculator. Its run is the
first one with several tokens before which nothing was cached.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from docs.bookmaker.spec_pages import Function, Page
from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.checkpoints.size import total_parameters
from refmoe.spec.model import Model, forward
from refmoe.suite import Case, find_cases, read_case, read_manifest, trace_path
from refmoe.traces.trace import Run, read_trace

FEW_TOKENS = 3
MOST_SHOWN = 24
"""No more values of an array are shown than that, or one row. The exact values are complete."""


@dataclass(frozen=True)
class Value:
    """A value inside a step."""

    name: str
    """As the code names it: ``x``, ``cache.k``, ``result``."""
    array: NDArray[Any]
    taps: tuple[str, ...]
    """The taps of the golden that have these bits."""
    bound: float | None
    """The certificate of the first of these taps: the largest distance from the real number."""
    given: bool
    """Whether it is an argument, or a parameter of the model."""
    same_as: str = ""
    """Of a result: the local variable that holds it."""


@dataclass(frozen=True)
class Example:
    """One run of a case, step by step."""

    case: Case
    run: Run
    values: Mapping[str, tuple[Value, ...]]
    """Per function of the specification the values of its first call, arguments first, the result last."""


@dataclass(frozen=True)
class Call:
    """One call of a function: its arguments, its local variables at the end, its result."""

    given: Mapping[str, Any]
    local: Mapping[str, Any]
    result: Any


@dataclass
class Watch:
    """Notes the local variables and the result of the first call of each function of the specification."""

    codes: Mapping[CodeType, str]
    given: dict[str, tuple[FrameType, dict[str, Any]]] = field(default_factory=dict)
    found: dict[str, Call] = field(default_factory=dict)

    def __call__(self, frame: FrameType, event: str, result: Any) -> None:
        name = self.codes.get(frame.f_code)
        if name is None:
            return
        if event == "call" and name not in self.given:
            self.given[name] = frame, dict(frame.f_locals)
        elif event == "return" and name not in self.found and self.given[name][0] is frame:
            self.found[name] = Call(self.given[name][1], dict(frame.f_locals), result)


def example(golden: Path, pages: list[Page]) -> Example:
    """Run the case with the fewest parameters, and note every value of every step.   golden: the folder of cases"""
    case, run = smallest(golden)
    watch = Watch(codes_of(pages))
    ops = ExactOps()
    model = Model(case.config, case.checkpoint().parameters)
    tokens, positions = ops.integers(run.tokens), ops.integers(run.positions)
    sys.setprofile(watch)
    try:
        forward(ops, model, tokens, positions)
    finally:
        sys.setprofile(None)
    known = {each.name: each for page in pages for each in page.functions}
    golden_taps = Golden.of(case, run)
    return Example(case, run, {name: values(known[name], call, golden_taps) for name, call in watch.found.items()})


def smallest(golden: Path) -> tuple[Case, Run]:
    """The case with the fewest parameters, and its first run of several tokens without a cache."""
    cases = [case for case in map(read_case, find_cases(golden)) if case.store == "trace"]
    for case in sorted(cases, key=lambda case: (total_parameters(case.config), case.name)):
        for run in case.runs():
            if not run.past and len(run.tokens) >= FEW_TOKENS:
                return case, run
    raise ValueError(f"{golden}: no case has a run of {FEW_TOKENS} tokens")


def codes_of(pages: list[Page]) -> dict[CodeType, str]:
    """The code objects of the functions of the specification, with their names."""
    found = {}
    for page in pages:
        for each in page.functions:
            if isinstance(each.node, ast.FunctionDef):
                module = sys.modules[f"refmoe.spec.{each.file.removesuffix('.py')}"]
                found[getattr(module, each.name).__code__] = each.name
    return found


@dataclass(frozen=True)
class Golden:
    """The taps of one run of a golden, with their certificates."""

    taps: Mapping[str, NDArray[Any]]
    bounds: Mapping[str, float | None]

    @staticmethod
    def of(case: Case, run: Run) -> Golden:
        trace = read_trace(trace_path(case.folder))
        certificate = read_manifest(case.folder)["certificate"] or {"bounds": {}}
        bounds = {tap: certificate["bounds"].get(f"{run.run}/{tap}") for tap in trace.names(run.run)}
        return Golden({tap: trace.get(run.run, tap) for tap in trace.names(run.run)}, bounds)

    def named(self, array: NDArray[Any]) -> tuple[str, ...]:
        """The taps with these bits, or else those among whose rows each of its rows is."""
        same = [tap for tap, own in self.taps.items() if own.shape == array.shape and own.tobytes() == array.tobytes()]
        if same or array.dtype != np.float64 or array.ndim < 2 or array.shape[-1] < 2 or not array.any():
            return tuple(same)
        rows = rows_of(array)
        return tuple(tap for tap, own in self.taps.items() if own.ndim > 1 and rows <= rows_of(own))


def rows_of(array: NDArray[Any]) -> set[bytes]:
    """The bits of each row, which is along the last axis."""
    return {row.tobytes() for row in array.reshape(-1, array.shape[-1])}


def values(function: Function, call: Call, golden: Golden) -> tuple[Value, ...]:
    """The arrays and numbers of one call: arguments, then local variables, then the result.

    A result that a local variable holds is not shown again.
    """
    own = {name: value for name, value in call.local.items() if value is not call.given.get(name) and name != "_"}
    found: list[Value] = []
    for table, given in ((call.given, True), (own, False), ({"result": call.result}, False)):
        for name, value in table.items():
            for part, array in parts(name, value, function):
                same = next((each.name for each in found if not each.given and is_same(each.array, array)), "")
                taps = golden.named(array) if array.ndim else ()
                bound = golden.bounds[taps[0]] if taps else None
                if part.startswith("result") or not same:
                    found.append(Value(part, array, taps, bound, given, same if part.startswith("result") else ""))
    return tuple(found)


def is_same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Whether two arrays, and not two single numbers, have the same shape and bits."""
    return bool(one.ndim) and one.shape == other.shape and one.tobytes() == other.tobytes()


def parts(name: str, value: Any, function: Function) -> list[tuple[str, NDArray[Any]]]:
    """A value as arrays: itself, its elements, or those of its fields that the function reads."""
    if isinstance(value, bool | int | float | np.generic):
        return [(name, np.asarray(value))]
    if isinstance(value, np.ndarray):
        return [(name, value.copy())]
    if hasattr(value, "read") and hasattr(value, "shape"):  # a parameter
        return [(name, np.asarray(value.read(), np.float64))]
    if isinstance(value, Model):
        return [
            part
            for record in ("parameters", "config")
            for each in re.findall(rf"\bmodel\.{record}\.(\w+)", function.source)
            for part in parts(f"{name}.{record}.{each}", getattr(getattr(value, record), each), function)
        ]
    if isinstance(value, tuple):
        return [part for i, each in enumerate(value) for part in parts(f"{name}[{i}]", each, function)]
    if is_dataclass(value) and not isinstance(value, type):
        read = [
            each.name for each in fields(value)
            if name == "result" or re.search(rf"\b{re.escape(name)}\.{each.name}\b", function.source)
        ]  # fmt: skip
        return [part for each in read for part in parts(f"{name}.{each}", getattr(value, each), function)]
    return []


def shown(array: NDArray[Any], tokens: int) -> tuple[str, NDArray[Any]]:
    """A part of an array that is small enough for a page, and its index: ``[2, 0]``; the last token where it is long.

    tokens: the number of tokens of the run, by which their axis is known
    """
    index: list[int] = []
    while array.size > MOST_SHOWN and array.ndim > 1:
        index.append(len(array) - 1 if len(array) == tokens else 0)
        array = array[index[-1]]
    return (f"[{', '.join(map(str, index))}]" if index else ""), array
