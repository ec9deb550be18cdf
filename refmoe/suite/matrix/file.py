# SPDX-License-Identifier: Apache-2.0
"""The matrix as a file, ``golden/matrix.json``: the kills of each mutant, and digests of the sources."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refmoe.bugs.catalogue import MUTANTS
from refmoe.errors import InputError
from refmoe.files.atomic import replacing
from refmoe.files.json_file import JsonFile, read_json
from refmoe.suite.case import PRODUCTION, SMALL
from refmoe.suite.matrix.outcomes import INERT, MANNERS, POLICIES, SPECIFICATION, Outcome
from refmoe.suite.matrix.surroundings import Outside
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT

FORMAT_VERSION = "1"
MATRIX_FILE = "matrix.json"
MATRIX_FILES = {SMALL: MATRIX_FILE, PRODUCTION: "matrix-production.json"}
"""Per family of cases the file of its matrix."""
LIVING = (CONFORMANT, CANNOT_JUDGE)
"""The verdicts about a mutant that changes something and is not killed."""

Cells = dict[str, dict[str, dict[str, str]]]
"""Per mutant, policy and case a text; `-` is the specification itself."""


@dataclass(frozen=True)
class Matrix:
    """The recorded outcomes of all mutants."""

    sources: dict[str, str]
    """Digests of its sources, as `refmoe.suite.matrix.dependencies` gives them."""
    kills: Cells
    """``attention.q_rope impossible local``: the first wrong step, one of `MANNERS`, the rung."""
    lives: Cells
    """One of `LIVING`. A mutant that is in neither table changes no bit."""
    outside: Outside

    @property
    def cases(self) -> tuple[str, ...]:
        """The cases that were run."""
        return tuple(name.removeprefix("cases/") for name in self.sources if name.startswith("cases/"))

    def killers(self, mutant: str, policy: str) -> Mapping[str, str]:
        """The cases that kill a mutant, and how."""
        return self.kills.get(mutant, {}).get(policy, {})


def to_matrix(outcomes: Iterable[Outcome], outside: Outside, sources: dict[str, str]) -> Matrix:
    """The matrix of these outcomes."""
    matrix = Matrix(sources, {}, {}, outside)
    for each in outcomes:
        if each.killed:
            place = f"{each.step} {each.by} {each.rung}"
            matrix.kills.setdefault(each.mutant, {}).setdefault(each.policy, {})[each.case] = place
        elif each.verdict != INERT and (each.mutant, each.verdict) != (SPECIFICATION, CONFORMANT):
            matrix.lives.setdefault(each.mutant, {}).setdefault(each.policy, {})[each.case] = each.verdict
    return matrix


def write_matrix(path: Path, matrix: Matrix) -> None:
    """One line for each mutant and policy, or list of names. Raises InputError when it cannot be written."""
    reasons = {
        "equivalent": {each.id: each.equivalent for each in MUTANTS.values() if each.equivalent},
        "unseen": {each.id: dict(each.unseen) for each in MUTANTS.values() if each.unseen},
    }
    values = {
        "format_version": FORMAT_VERSION, "policies": list(POLICIES), "kills": matrix.kills, "lives": matrix.lives,
        "outside": matrix.outside, **reasons, "sources": matrix.sources,
    }  # fmt: skip
    with replacing(path) as temporary:
        temporary.write_text(_lines(values) + "\n", encoding="utf-8")


def _lines(value: Any, depth: int = 0) -> str:
    """JSON, spread over lines down to the third level, so that a change shows as the lines that changed."""
    if not isinstance(value, dict) or depth == 3 or not value:
        return json.dumps(value)
    inside = ",\n".join(
        f"{' ' * (depth + 1)}{json.dumps(key)}: {_lines(each, depth + 1)}" for key, each in value.items()
    )
    return f"{{\n{inside}\n{' ' * depth}}}"


def read_matrix(path: Path) -> Matrix:
    """Raises InputError that names a missing or wrong field."""
    if not path.exists():
        raise InputError(f"{path}: no such file; `refmoe mutants matrix --golden {path.parent}` writes it")
    file = read_json(path)
    if file.need("format_version") != FORMAT_VERSION:
        raise file.refuse("format_version", file.values["format_version"], f'"{FORMAT_VERSION}" was expected')
    if file.need("policies") != list(POLICIES):
        raise file.refuse("policies", file.values["policies"], f"{json.dumps(list(POLICIES))} was expected")
    return Matrix(
        {name: _text(file.within("sources"), name) for name in file.within("sources").values},
        _cells(file.within("kills"), _place),
        _cells(file.within("lives"), _verdict),
        _outside(file.within("outside")),
    )


def _cells(file: JsonFile, leaf: Callable[[JsonFile, str], str]) -> Cells:
    """Per mutant, policy and case the value that `leaf` reads from the field."""
    found: Cells = {}
    for mutant in file.values:
        policies = file.within(mutant)
        for policy in policies.values:
            if policy not in POLICIES:
                raise policies.refuse(policy, policies.values[policy], f"only {', '.join(POLICIES)} were expected")
            cases = policies.within(policy)
            found.setdefault(mutant, {})[policy] = {case: leaf(cases, case) for case in cases.values}
    return found


def _text(file: JsonFile, name: str) -> str:
    value = file.need(name)
    if not isinstance(value, str):
        raise file.refuse(name, value, "a string was expected")
    return value


def _place(file: JsonFile, name: str) -> str:
    value = _text(file, name)
    words = value.split(" ")
    if len(words) != 3 or not all(words) or words[1] not in MANNERS:
        raise file.refuse(name, value, f"a step, one of {', '.join(MANNERS)}, and a rung were expected")
    return value


def _verdict(file: JsonFile, name: str) -> str:
    value = _text(file, name)
    if value not in LIVING:
        raise file.refuse(name, value, f"one of {', '.join(LIVING)} was expected")
    return value


def _outside(file: JsonFile) -> Outside:
    found: Outside = {}
    for mutant in file.values:
        places = file.within(mutant)
        for place in places.values:
            names = places.need(place)
            if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
                raise places.refuse(place, names, "a list of the names of vectors was expected")
            found.setdefault(mutant, {})[place] = names
    return found
