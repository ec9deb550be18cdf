"""Results of an engine as a file: one JSON object, an outcome a line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from refmoe.engines.adapter import DTYPES, TAPS
from refmoe.engines.outcome import VERDICTS, Cause, Engine, Outcome, Results
from refmoe.errors import InputError
from refmoe.files.atomic import replacing
from refmoe.files.json_file import JsonFile, read_json
from refmoe.files.safetensors_file import quoted
from refmoe.suite.case import is_list

FORMAT_VERSION = "1"
FIELDS = ("format_version", "engine", "platform", "refmoe", "significance", "cases", "smoke", "notes", "outcomes")
OUTCOME_FIELDS = (
    "case", "dtype", "policy", "verdict", "reason", "issue", "first_wrong", "worst_errors", "explanations",
)  # fmt: skip
CAUSE_FIELDS = ("name", "kind", "about", "fix", "sources")
UNBOUNDED = {"NaN": math.nan, "Infinity": math.inf}
"""Words for numbers that JSON lacks."""


def write_results(path: Path, results: Results) -> None:
    """Raises InputError when the file cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(to_json(results), encoding="utf-8")


def to_json(results: Results) -> str:
    """The file's text: equal for equal results."""
    engine = results.engine
    values: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "engine": {"name": engine.name, "version": engine.version, "options": {**engine.options}},
        "platform": {**results.platform},
        "refmoe": results.refmoe,
        "significance": results.significance,
        "cases": {**results.cases},
        "smoke": results.smoke,
        "notes": [*results.notes],
    }
    lines = [f'"{name}": {json.dumps(value)}' for name, value in values.items()]
    outcomes = ",\n  ".join(json.dumps(_plain(each), allow_nan=False) for each in results.outcomes)
    return "{\n " + ",\n ".join([*lines, f'"outcomes": [\n  {outcomes}\n ]']) + "\n}\n"


def _plain(outcome: Outcome) -> dict[str, Any]:
    first = None if outcome.first_wrong is None else dict(zip(("run", "tap"), outcome.first_wrong, strict=True))
    return {
        "case": outcome.case, "dtype": outcome.dtype, "policy": outcome.policy, "verdict": outcome.verdict,
        "reason": outcome.reason, "issue": outcome.issue, "first_wrong": first,
        "worst_errors": {step: json_number(error) for step, error in outcome.worst_errors.items()},
        "explanations": [
            {**{name: getattr(each, name) for name in CAUSE_FIELDS}, "sources": list(each.sources)}
            for each in outcome.explanations
        ],
    }  # fmt: skip


def json_number(value: float) -> float | str:
    """A number that JSON can hold, or the word for it."""
    return value if math.isfinite(value) else "NaN" if math.isnan(value) else "Infinity"


def read_results(path: Path) -> Results:
    """Raises InputError that names the field which is not as the format says."""
    file = read_json(path)
    if file.values.get("format_version") != FORMAT_VERSION:
        raise file.refuse("format_version", file.values.get("format_version"), f'"{FORMAT_VERSION}" was expected')
    _only(file, FIELDS)
    engine = file.within("engine")
    _only(engine, ("name", "version", "options"))
    significance = file.number("significance")
    if not 0 < significance < 1:
        raise file.refuse("significance", significance, "a probability was expected")
    outcomes = tuple(_outcome(each) for each in _objects(file, "outcomes"))
    if len({(each.case, each.dtype) for each in outcomes}) < len(outcomes):
        raise InputError(f"{path}: 'outcomes' has a case and dtype more than once, but each once was expected")
    return Results(
        Engine(_text(engine, "name"), _text(engine, "version"), _texts(engine, "options")), _texts(file, "platform"),
        _text(file, "refmoe"), significance, _texts(file, "cases"), _text(file, "smoke"), outcomes,
        _list(file, "notes"),
    )  # fmt: skip


def _outcome(file: JsonFile) -> Outcome:
    _only(file, OUTCOME_FIELDS)
    for name, known in (("dtype", DTYPES), ("verdict", VERDICTS)):
        if file.values.get(name) not in known:
            raise file.refuse(name, file.values.get(name), f"one of {', '.join(known)} was expected")
    issue = None if file.values.get("issue") is None else _text(file, "issue")
    first = None
    if file.values.get("first_wrong") is not None:
        place = file.within("first_wrong")
        _only(place, ("run", "tap"))
        first = _text(place, "run"), _text(place, "tap")
    return Outcome(
        _text(file, "case"), file.values["dtype"], _text(file, "policy"), file.values["verdict"], _text(file, "reason"),
        issue, first, _errors(file), tuple(_cause(each) for each in _objects(file, "explanations")),
    )  # fmt: skip


def _errors(file: JsonFile) -> Mapping[str, float]:
    found = file.within("worst_errors")
    errors = {}
    for step, value in found.values.items():
        if step not in TAPS:
            raise InputError(
                f"{file.path}: 'worst_errors' has the step {quoted(step)}, but one of {', '.join(TAPS)} was expected"
            )
        errors[step] = UNBOUNDED[value] if isinstance(value, str) and value in UNBOUNDED else found.number(step)
        if errors[step] < 0:
            raise found.refuse(step, value, "a number from 0 was expected")
    return errors


def _cause(file: JsonFile) -> Cause:
    _only(file, CAUSE_FIELDS)
    name, kind, about = (_text(file, field) for field in ("name", "kind", "about"))
    fix = file.need("fix")
    if not isinstance(fix, str):
        raise file.refuse("fix", fix, "a text was expected")
    return Cause(name, kind, about, fix, _list(file, "sources"))


def _only(file: JsonFile, known: tuple[str, ...]) -> None:
    for name in file.values:
        if name not in known:
            raise file.refuse(name, file.values[name], f"no field but {', '.join(known)} was expected")
    for name in known:
        if name not in file.values:
            file.need(name)


def _checked(fits: Callable[[Any], bool], expected: str) -> Callable[[JsonFile, str], Any]:
    def get(file: JsonFile, name: str) -> Any:
        value = file.need(name)
        if not fits(value):
            raise file.refuse(name, value, f"{expected} was expected")
        return value

    return get


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


_text = _checked(_is_text, "a text")
_texts = _checked(lambda value: isinstance(value, dict) and all(map(_is_text, value.values())), "an object of texts")
_strings = _checked(lambda value: isinstance(value, list) and all(map(_is_text, value)), "a list of texts")
_dicts = _checked(is_list(dict), "a list of objects")


def _list(file: JsonFile, name: str) -> tuple[str, ...]:
    return tuple(_strings(file, name))


def _objects(file: JsonFile, name: str) -> list[JsonFile]:
    prefix = file.prefix + name
    return [JsonFile(file.path, each, f"{prefix}[{i}].") for i, each in enumerate(_dicts(file, name))]
