# SPDX-License-Identifier: Apache-2.0
"""Known failures: a TOML file that says which cases an engine fails today, and why.

    format_version = "1"

    [[known]]
    engine = "my-engine"
    case = "window-decode"
    dtype = "bfloat16"
    reason = "no sliding window yet"
    issue = "https://example.org/issues/12"     # may be left out
    options = { attention = "eager" }           # only the engine with these; may be left out
                                                # weights = "gguf:Q4_K_M": only with weights quantised so

`case` and `dtype` may be lists: then the entry is about each case in each dtype. A listed case that fails does not fail
the run. A listed case that conforms does, because the file is out of date.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refmoe.engines.protocol import DTYPES
from refmoe.engines.results import NOT_JUDGED, SKIPPED, Outcome, Results
from refmoe.errors import InputError
from refmoe.files.atomic import replacing
from refmoe.files.parsing import toml
from refmoe.files.sentences import quoted, shown
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT

FORMAT_VERSION = "1"
FIELDS = ("engine", "case", "dtype", "reason")
OPTIONAL = ("issue", "options")
WEIGHTS = "weights"
"""The option of an entry that is about quantised weights, such as ``gguf:Q4_K_M``."""


@dataclass(frozen=True)
class KnownFailure:
    """An expected failure."""

    engine: str
    """The name of the engine, without a version."""
    case: str
    dtype: str
    reason: str
    issue: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    """The options of the engine that the entry is about; others may be any."""

    def fits(self, results: Results) -> bool:
        """Whether the entry is about the engine of these results, and its weights."""
        return self.engine == results.engine.name and self.options.items() <= options_in(results).items()


@dataclass(frozen=True)
class Failures:
    """The failures of an engine, sorted by a list of known ones."""

    failing: tuple[Outcome, ...]
    """Failures that are not listed."""
    known: tuple[tuple[Outcome, KnownFailure], ...]
    """Failures that are listed, each with its entry."""
    passing: tuple[tuple[Outcome, KnownFailure], ...]
    """Unexpected passes: listed, but conformant."""


def options_in(results: Results) -> dict[str, str]:
    """The options by which an entry may tell runs of an engine apart: the engine's, and how weights were quantised."""
    return {**results.engine.options, **({WEIGHTS: results.quantised} if results.quantised else {})}


def sort_failures(results: Results, listed: Iterable[KnownFailure]) -> Failures:
    """Separate known failures from new ones. Entries about cases that did not run are ignored."""
    entries = {(each.case, each.dtype): each for each in listed if each.fits(results)}
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


WELL, FAILED, CANNOT = "conformant", "not conformant", "cannot judge"


def whole_verdict(results: Results, failures: Failures) -> str:
    """The verdict of a run: `FAILED` where a case fails or no longer does, `CANNOT` where nothing could be judged."""
    if failures.passing or any(each.verdict != CANNOT_JUDGE for each in failures.failing):
        return FAILED
    if failures.failing or all(each.verdict in (NOT_JUDGED, SKIPPED) for each in results.outcomes):
        return CANNOT
    return WELL


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
            options={key: value for key, value in options_in(results).items() if key != "command"},
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
    entries: dict[tuple[str, ...], KnownFailure] = {}
    for i, entry in enumerate(listed):
        for each in _entries(path, f"known[{i}]", entry):
            options = [f"{key}={value}" for key, value in sorted(each.options.items())]
            place = (each.engine, *options, each.case, each.dtype)
            if place in entries:
                raise InputError(f"{path}: known[{i}] is about {', '.join(place)}, which an entry has already")
            entries[place] = each
    return [*entries.values()]


def _entries(path: Path, at: str, entry: Any) -> list[KnownFailure]:
    """An entry of the file, once for each case and dtype that it lists."""
    if not isinstance(entry, dict):
        raise InputError(f"{path}: '{at}' is {shown(entry)}, but a table was expected")
    for name in entry.keys() - {*FIELDS, *OPTIONAL}:
        known = ", ".join((*FIELDS, *OPTIONAL))
        raise InputError(f"{path}: {at} has a field {quoted(name)}, but only {known} were expected")
    values = {**entry}
    places: dict[str, list[Any]] = {}
    for name in ("case", "dtype"):
        listed = values.pop(name, None)
        places[name] = listed if isinstance(listed, list) and listed else [listed]
    for name in FIELDS + ("issue",) * ("issue" in entry):
        several = places.get(name, [values.get(name)])
        if not all(map(_is_text, several)):
            found = shown(entry[name]) if name in entry else "missing"
            raise InputError(f"{path}: '{at}.{name}' is {found}, but a text was expected")
    options = values.setdefault("options", {})
    if not isinstance(options, dict) or not all(map(_is_text, options.values())):
        raise InputError(f"{path}: '{at}.options' is {shown(options)}, but a table of texts was expected")
    for dtype in places["dtype"]:
        if dtype not in DTYPES:
            raise InputError(f"{path}: '{at}.dtype' is {shown(dtype)}, but one of {', '.join(DTYPES)} was expected")
    return [KnownFailure(**values, case=case, dtype=dtype) for case in places["case"] for dtype in places["dtype"]]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _string(value: str) -> str:
    # a TOML string is a JSON string, except for characters that JSON escapes as two
    return json.dumps(value, ensure_ascii=False)


def write_known(path: Path, entries: Iterable[KnownFailure]) -> None:
    """Write the file. Raises InputError when it cannot be written."""
    lines = [f'format_version = "{FORMAT_VERSION}"', ""]
    for each in entries:
        lines.append("[[known]]")
        for name in (*FIELDS, "issue"):
            value = getattr(each, name)
            if value is not None:
                lines.append(f"{name} = {_string(value)}")
        if each.options:
            options = ", ".join(f"{key} = {_string(value)}" for key, value in each.options.items())
            lines.append(f"options = {{ {options} }}")
        lines.append("")
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")
