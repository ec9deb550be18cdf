# SPDX-License-Identifier: Apache-2.0
"""New cases: a case.toml for a model of the user's own dimensions, with the conditions that hold in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from refmoe.errors import InputError
from refmoe.files.atomic import replacing
from refmoe.files.writable import make_folder
from refmoe.spec.config import Config
from refmoe.suite.activations import compute
from refmoe.suite.case import CASE_FILE, SMALL, Case, read_case
from refmoe.suite.conditions import holding
from refmoe.suite.digests import renew_digests
from refmoe.suite.emission import emit
from refmoe.suite.fresh import number
from refmoe.suite.manifest import write_folder_manifest
from refmoe.traces.script import Call
from refmoe.traces.trace import FORMAT_VERSION

PREFILL, DECODED = 9, 2
"""The tokens of the calls that are made where none are given."""
LARGEST_TRACE = 1 << 22
"""Bytes of all taps of a case from which a fingerprint is stored in place of the values."""


@dataclass(frozen=True)
class New:
    """A case to be made."""

    name: str
    config: Config
    seed: int
    calls: tuple[Call, ...] = ()
    """Empty: a prefill of `PREFILL` tokens and `DECODED` decode steps, drawn by the seed."""
    why: str = ""
    family: str = SMALL

    def script(self) -> tuple[Call, ...]:
        """The calls."""
        if self.calls:
            return self.calls
        drawn = [number(self.seed, self.name, "token", i) % self.config.vocab for i in range(PREFILL + DECODED)]
        return Call("prefill", 0, drawn[:PREFILL]), Call("decode", 0, drawn[PREFILL:])


def write_new_case(golden: Path, new: New) -> Case:
    """Write a case into a folder of cases: case.toml, golden, manifest, and the manifest of the folder.

    golden: the folder of cases. It is made where it does not exist.

    Raises InputError for a name that is taken or none, calls that do not fit the model, and a folder that cannot be
    written. Then nothing of the case is left.
    """
    if new.name != Path(new.name).name or new.name.startswith(".") or not new.name.strip():
        raise InputError(f"'{new.name}' is no name for a case: the name of a folder was expected")
    folder = golden / new.name
    if folder.exists():
        raise InputError(f"{folder}: exists already, but the name of a new case was expected")
    make_folder(folder, parents=True, exist_ok=False)
    try:
        case = _write(folder, new)
        emit(case)
        write_folder_manifest(golden)
        renew_digests(golden)
    except BaseException:
        shutil.rmtree(folder)
        raise
    return case


def _write(folder: Path, new: New) -> Case:
    """Write case.toml twice: at first to compute the case, then with its conditions."""
    case = _written(folder, new, {"conditions": [], "store": "fingerprint"})
    if case.full_size:
        return case
    arrays = compute(case)
    store = "trace" if sum(each.nbytes for each in arrays.values()) < LARGEST_TRACE else "fingerprint"
    return _written(folder, new, {"conditions": holding(replace(case, store=store), arrays), "store": store})


def _written(folder: Path, new: New, found: Mapping[str, Any]) -> Case:
    with replacing(folder / CASE_FILE) as temporary:
        temporary.write_text(_text(new, found), encoding="utf-8")
    return read_case(folder)


def _text(new: New, found: Mapping[str, Any]) -> str:
    """The text of case.toml.   found: `conditions` and `store`"""
    why = new.why or f"A case of {new.config.layers} layers and {new.config.experts} experts, made by refmoe suite new."
    top = {
        "format_version": FORMAT_VERSION, "family": new.family, "why": why, "clauses": [], "bugs": [],
        "conditions": found["conditions"], "store": found["store"],
    }  # fmt: skip
    config = {name: value for name, value in asdict(new.config).items() if value is not None}
    tables = ["\n".join(_lines(top)), _table("[config]", config), _table("[weights]", {"seed": new.seed})]
    for call in new.script():
        values = {"op": call.op, "sequence": call.sequence, "tokens": [*call.tokens]}
        kept = {} if call.keep is None else {"keep": call.keep}
        tables.append(_table("[[script]]", values | kept | ({} if call.read else {"read": False})))
    return "\n\n".join(tables) + "\n"


def _table(heading: str, values: Mapping[str, Any]) -> str:
    return "\n".join([heading, *_lines(values)])


def _lines(values: Mapping[str, Any]) -> Sequence[str]:
    # strings, numbers and lists of them are written in TOML as in JSON
    return [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
