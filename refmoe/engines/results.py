# SPDX-License-Identifier: Apache-2.0
"""Results of an engine: an outcome for each case and dtype, and their file, one JSON object with an outcome a line."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from refmoe.engines.process import BROKEN, CRASHED, TIMED_OUT
from refmoe.engines.protocol import DTYPES, EVERY_TAP
from refmoe.engines.quantised import FORMS
from refmoe.engines.server.power import LEVELS
from refmoe.errors import InputError
from refmoe.files.atomic import replacing
from refmoe.files.json_file import JsonFile, read_json
from refmoe.files.sentences import quoted
from refmoe.suite.case import is_list
from refmoe.suite.power import TAP_SETS
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT, NOT_CONFORMANT

SKIPPED, NOT_JUDGED = "skipped", "not judged"
VERDICTS = (CONFORMANT, NOT_CONFORMANT, CANNOT_JUDGE, NOT_JUDGED, SKIPPED, CRASHED, TIMED_OUT, BROKEN)
"""The verdicts on a case at a dtype, as PROTOCOL.md defines them."""
GOOD = (CONFORMANT, NOT_JUDGED, SKIPPED)
"""The verdicts that are no failure."""


@dataclass(frozen=True)
class Cause:
    """An explanation of a failure: the part of a `refmoe.verifier.findings.Explanation` that results keep."""

    name: str
    kind: str
    about: str
    fix: str
    sources: tuple[str, ...]
    """URLs."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one case at one dtype."""

    case: str
    dtype: str
    policy: str
    """The name of the policy by which rounding was judged."""
    verdict: str
    reason: str
    """One sentence, which another run of the engine gives again."""
    issue: str | None = None
    """The URL of the issue because of which a case was skipped."""
    first_wrong: tuple[str, str] | None = None
    """The run and the tap of the first wrong step."""
    worst_errors: Mapping[str, float] = field(default_factory=dict)
    """Per step (a tap without its layer) the largest error in units of the allowed one: above 1 is impossible."""
    explanations: tuple[Cause, ...] = ()
    """The explanations of a failure, the best first."""
    golden_bits: bool = False
    """Whether every value is the golden's own, rounded once."""
    token: int | None = None
    """The token of the worst value of the first wrong step; None where no value of it has one."""
    taps: str | None = None
    """The set of taps that was judged, as `refmoe.verifier.findings.Power` names it; None where nothing was judged.

    Of a server, the level of what it gave.
    """

    @property
    def failed(self) -> bool:
        """Whether the verdict is a failure."""
        return self.verdict not in GOOD

    @cached_property
    def line(self) -> str:
        """Its line of the file, which is written anew after each outcome of a run."""
        return json.dumps(_plain(self), allow_nan=False)


@dataclass(frozen=True)
class Engine:
    """The engine that was run."""

    name: str
    version: str
    options: Mapping[str, str]
    """The options of an adapter, or the `command` of a harness."""


@dataclass(frozen=True)
class Results:
    """All outcomes of an engine. There is no date, so that two runs of an engine give the same file."""

    engine: Engine
    platform: Mapping[str, str]
    """`system`, `machine`."""
    refmoe: str
    """The version of refmoe."""
    significance: float
    """The probability that a healthy engine fails at a case and dtype."""
    cases: Mapping[str, str]
    """Per case the SHA-256 of its case.toml."""
    smoke: str
    """A sentence about the smoke test."""
    outcomes: tuple[Outcome, ...]
    """In order of cases, then dtypes."""
    notes: tuple[str, ...] = ()
    """Observations that are no outcome, such as a harness that does not stop."""
    fresh: int | None = None
    """The seed of other weights and tokens for the same cases; None: the cases as they are."""
    quantised: str = ""
    """How the weights of all cases were quantised, such as ``gguf:Q4_K_M``; empty: they were not."""
    wider: tuple[str, ...] = ()
    """The dtypes that were judged by a policy which allows more than the generic policy of the dtype."""

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings in which runs of an engine differ: its options, the seed of fresh cases, the weights' format."""
        options = [f"{key}={value}" for key, value in self.engine.options.items() if key != "command"]
        fresh = [] if self.fresh is None else [f"fresh={self.fresh}"]
        return (*options, *fresh, *([self.quantised] if self.quantised else []))

    @property
    def counts(self) -> Counter[str]:
        """The number of outcomes per verdict."""
        return Counter(each.verdict for each in self.outcomes)


# ---- the file

FORMAT_VERSION = "1"
FIELDS = ("format_version", "engine", "platform", "refmoe", "significance", "cases", "smoke", "notes", "outcomes")
OPTIONAL = ("fresh", "quantised", "wider")
"""Fields that are left out where they say nothing."""
OUTCOME_FIELDS = (
    "case", "dtype", "policy", "verdict", "reason", "issue", "first_wrong", "worst_errors", "explanations",
)  # fmt: skip
OUTCOME_OPTIONAL = ("golden_bits", "token", "taps")
"""Fields that are left out where they are false, or where there is no value."""
CAUSE_FIELDS = ("name", "kind", "about", "fix", "sources")
UNBOUNDED = {"NaN": math.nan, "Infinity": math.inf}
"""Words for numbers that JSON lacks."""


def write_results(path: Path, results: Results) -> None:
    """Write the file. Raises InputError when it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(to_json(results), encoding="utf-8")


def to_json(results: Results) -> str:
    """The text of the file. Equal results give equal text."""
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
    if results.fresh is not None:
        values["fresh"] = results.fresh
    if results.quantised:
        values["quantised"] = results.quantised
    if results.wider:
        values["wider"] = [*results.wider]
    lines = [f'"{name}": {json.dumps(value)}' for name, value in values.items()]
    outcomes = ",\n  ".join(each.line for each in results.outcomes)
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
        **({"golden_bits": True} if outcome.golden_bits else {}),
        **{name: value for name in OUTCOME_OPTIONAL[1:] if (value := getattr(outcome, name)) is not None},
    }  # fmt: skip


def json_number(value: float) -> float | str:
    """A number that JSON can hold, or a word of `UNBOUNDED` for it."""
    return value if math.isfinite(value) else "NaN" if math.isnan(value) else "Infinity"


def read_results(path: Path) -> Results:
    """Read the file. Raises InputError that names the field which breaks the format."""
    file = read_json(path)
    if file.values.get("format_version") != FORMAT_VERSION:
        raise file.refuse("format_version", file.values.get("format_version"), f'"{FORMAT_VERSION}" was expected')
    _only(file, FIELDS, OPTIONAL)
    engine = file.within("engine")
    _only(engine, ("name", "version", "options"))
    significance = file.number("significance")
    if not 0 < significance < 1:
        raise file.refuse("significance", significance, "a probability was expected")
    outcomes = tuple(_outcome(each) for each in _objects(file, "outcomes"))
    if len({(each.case, each.dtype) for each in outcomes}) < len(outcomes):
        raise InputError(f"{path}: 'outcomes' has a case and dtype more than once, but each once was expected")
    return Results(
        engine=Engine(_text(engine, "name"), _text(engine, "version"), _texts(engine, "options")),
        platform=_texts(file, "platform"),
        refmoe=_text(file, "refmoe"),
        significance=significance,
        cases=_texts(file, "cases"),
        smoke=_text(file, "smoke"),
        outcomes=outcomes,
        notes=_list(file, "notes"),
        fresh=_whole(file, "fresh"),
        quantised=_form(file),
        wider=_wider(file),
    )


def _whole(file: JsonFile, name: str) -> int | None:
    """An integer from 0, None where the field is left out."""
    found = file.values.get(name)
    if found is not None and (isinstance(found, bool) or not isinstance(found, int) or found < 0):
        raise file.refuse(name, found, "an integer from 0 was expected")
    return found


def _form(file: JsonFile) -> str:
    found = file.values.get("quantised", "")
    if found not in ("", *FORMS):
        raise file.refuse("quantised", found, f"one of {', '.join(FORMS)} was expected")
    return str(found)


def _wider(file: JsonFile) -> tuple[str, ...]:
    found = _list(file, "wider") if "wider" in file.values else ()
    if not {*found} <= {*DTYPES}:
        raise file.refuse("wider", [*found], f"a list of some of {', '.join(DTYPES)} was expected")
    return found


def _outcome(file: JsonFile) -> Outcome:
    _only(file, OUTCOME_FIELDS, OUTCOME_OPTIONAL)
    if file.values.get("golden_bits", True) is not True:
        raise file.refuse("golden_bits", file.values["golden_bits"], "true, or no such field, was expected")
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
        case=_text(file, "case"),
        dtype=file.values["dtype"],
        policy=_text(file, "policy"),
        verdict=file.values["verdict"],
        reason=_text(file, "reason"),
        issue=issue,
        first_wrong=first,
        worst_errors=_errors(file),
        explanations=tuple(_cause(each) for each in _objects(file, "explanations")),
        golden_bits="golden_bits" in file.values,
        token=_whole(file, "token"),
        taps=_taps(file),
    )


def _taps(file: JsonFile) -> str | None:
    found = file.values.get("taps")
    known = *TAP_SETS, *LEVELS
    if found is not None and found not in ("", *known):
        raise file.refuse("taps", found, f"one of {', '.join(known)}, or an empty text, was expected")
    return found


def _errors(file: JsonFile) -> Mapping[str, float]:
    found = file.within("worst_errors")
    errors = {}
    for step, value in found.values.items():
        if step not in EVERY_TAP:
            raise InputError(
                f"{file.path}: 'worst_errors' has the step {quoted(step)}, "
                f"but one of {', '.join(EVERY_TAP)} was expected"
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
    return Cause(name=name, kind=kind, about=about, fix=fix, sources=_list(file, "sources"))


def _only(file: JsonFile, known: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """Raises InputError unless the object has exactly these fields, with or without the optional ones."""
    for name in file.values:
        if name not in (*known, *optional):
            raise file.refuse(name, file.values[name], f"no field but {', '.join((*known, *optional))} was expected")
    for name in known:
        if name not in file.values:
            file.need(name)


def _checked(fits: Callable[[Any], bool], expected: str) -> Callable[[JsonFile, str], Any]:
    """A reader of a field.   fits: whether a value is valid.   expected: a noun phrase for the error"""

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
