# SPDX-License-Identifier: Apache-2.0
"""Known failures: a TOML file that says which cases an engine fails today, and why.

    format_version = "1"

    [[known]]
    engine = "my-engine"
    case = "window-decode"
    dtype = "bfloat16"
    reason = "no sliding window yet"
    issue = "https://example.org/issues/12"     # may be left out

A listed case that fails does not fail the run. A listed case that conforms does, because the file is out of date.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refmoe.engines.protocol import DTYPES
from refmoe.engines.results import Outcome, Results
from refmoe.errors import InputError
from refmoe.files.atomic import replacing
from refmoe.files.parsing import toml
from refmoe.files.sentences import quoted, shown
from refmoe.verifier.findings import CONFORMANT

FORMAT_VERSION = "1"
FIELDS = ("engine", "case", "dtype", "reason")


@dataclass(frozen=True)
class KnownFailure:
    """An expected failure."""

    engine: str
    """The name of the engine, without a version."""
    case: str
    dtype: str
    reason: str
    issue: str | None = None


@dataclass(frozen=True)
class Failures:
    """The failures of an engine, sorted by a list of known ones."""

    failing: tuple[Outcome, ...]
    """Failures that are not listed."""
    known: tuple[tuple[Outcome, KnownFailure], ...]
    """Failures that are listed, each with its entry."""
    passing: tuple[tuple[Outcome, KnownFailure], ...]
    """Unexpected passes: listed, but conformant."""


def sort_failures(results: Results, listed: Iterable[KnownFailure]) -> Failures:
    """Separate known failures from new ones. Entries about cases that did not run are ignored."""
    entries = {(each.case, each.dtype): each for each in listed if each.engine == results.engine.name}
    failing, known, passing = [], [], []
    for outcome in results.outcomes:
        entry = entries.get((outcome.case, outcome.dtype))
        if outcome.failed and entry is None:
            failing.append(outcome)
        elif outcome.failed and entry is not None:
            known.append((outcome, entry))
        elif outcome.verdict == CONFORMANT and entry is not None:
            passing.append((outcome, entry))
    return Failures(tuple(failing), tuple(known), tuple(passing))


def known_failures(results: Results) -> list[KnownFailure]:
    """An entry for each failure in these results."""
    engine = results.engine.name
    return [
        KnownFailure(
            engine=engine,
            case=each.case,
            dtype=each.dtype,
            reason=f"{each.verdict}: {each.reason}",
            issue=each.issue,
        )
        for each in results.outcomes
        if each.failed
    ]


def read_known(path: Path) -> list[KnownFailure]:
    """Read the file. Raises InputError that names the entry and the field which breaks the format."""
    values = toml(path, "a file of known failures")
    if values.get("format_version") != FORMAT_VERSION:
        found = shown(values.get("format_version"))
        raise InputError(f"{path}: 'format_version' is {found}, but \"{FORMAT_VERSION}\" was expected")
    for name in values.keys() - {"format_version", "known"}:
        raise InputError(f"{path}: {quoted(name)} is unknown, but only tables [[known]] were expected")
    listed = values.get("known", [])
    if not isinstance(listed, list):
        raise InputError(f"{path}: 'known' is {shown(listed)}, but tables [[known]] were expected")
    entries = [_entry(path, f"known[{i}]", entry) for i, entry in enumerate(listed)]
    places = [(each.engine, each.case, each.dtype) for each in entries]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise InputError(f"{path}: known[{i}] is about {', '.join(place)}, which an entry before it has already")
    return entries


def _entry(path: Path, at: str, entry: Any) -> KnownFailure:
    if not isinstance(entry, dict):
        raise InputError(f"{path}: '{at}' is {shown(entry)}, but a table was expected")
    for name in entry.keys() - {*FIELDS, "issue"}:
        raise InputError(f"{path}: {at} has a field {quoted(name)}, but only {', '.join(FIELDS)}, issue were expected")
    for name in FIELDS + ("issue",) * ("issue" in entry):
        if not isinstance(entry.get(name), str) or not entry[name].strip():
            found = shown(entry[name]) if name in entry else "missing"
            raise InputError(f"{path}: '{at}.{name}' is {found}, but a text was expected")
    if entry["dtype"] not in DTYPES:
        raise InputError(
            f"{path}: '{at}.dtype' is {shown(entry['dtype'])}, but one of {', '.join(DTYPES)} was expected"
        )
    return KnownFailure(**entry)


def write_known(path: Path, entries: Iterable[KnownFailure]) -> None:
    """Write the file. Raises InputError when it cannot be written."""
    lines = [f'format_version = "{FORMAT_VERSION}"', ""]
    for each in entries:
        lines.append("[[known]]")
        for name in (*FIELDS, "issue"):
            value = getattr(each, name)
            if value is not None:
                # a TOML string is a JSON string, except for characters that JSON escapes as two
                lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")
        lines.append("")
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")
