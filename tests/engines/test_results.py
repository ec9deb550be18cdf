# SPDX-License-Identifier: Apache-2.0
"""Results, known failures and the scoreboard: their files, and the tables made from them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refmoe.engines.known import KnownFailure, known_failures, read_known, sort_failures, write_known
from refmoe.engines.process import CRASHED, TIMED_OUT
from refmoe.engines.results import Cause, Engine, Outcome, Results, read_results, to_json, write_results
from refmoe.engines.scoreboard import DEVIATES, FAILED, UNDECIDABLE, UNSUPPORTED, scoreboard
from refmoe.errors import InputError
from tests.command_line import Refmoe

COMMITTED = Path(__file__).parents[2] / "bench" / "results" / "conform"
CAUSE = Cause(
    name="rope-sign-flipped",
    kind="known bug",
    about="rotates the other way",
    fix="flip the sign",
    sources=("https://example.org/1",),
)
ODD = "<script>alert(1)</script>\x1b[2J \u202e"


def outcome(case: str, dtype: str, verdict: str, reason: str, **fields: Any) -> Outcome:
    """An outcome under the policy of the dtype's name."""
    return Outcome(case=case, dtype=dtype, policy=dtype, verdict=verdict, reason=reason, **fields)


OUTCOMES = (
    outcome("one", "float32", "conformant", "all of it", worst_errors={"logits": 0.5, "embedding": 0.0}),
    outcome(
        "one", "bfloat16", "not conformant", "3 of 9 values lie outside",
        first_wrong=("decode1", "layers.1.attention.q_rope"),
        worst_errors={"attention.q_rope": math.inf, "logits": math.nan}, explanations=(CAUSE,),
    ),
    outcome("two", "float32", "skipped", "no window", issue="https://example.org/2"),
    outcome("two", "bfloat16", CRASHED, f"it says {ODD}"),
    outcome("three", "float32", "cannot judge", "no bound"),
    outcome("three", "bfloat16", TIMED_OUT, "no answer"),
)  # fmt: skip
RESULTS = Results(
    engine=Engine("engine", "1.0", {"attention": "sdpa"}),
    platform={"system": "Linux", "machine": "x86_64"},
    refmoe="0.1.0",
    significance=1e-6,
    cases={"one": "aa", "two": "bb", "three": "cc"},
    smoke="case one in float32, twice",
    outcomes=OUTCOMES,
    notes=("it was killed",),
)
ANOTHER = replace(
    RESULTS, engine=Engine("another", "2", {"command": "./x"}), outcomes=OUTCOMES[:1], cases={"one": "ab"}
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that holds the results of two engines."""
    write_results(tmp_path / "engine.json", RESULTS)
    write_results(tmp_path / "another.json", ANOTHER)
    return tmp_path


def test_what_is_written_is_read(folder: Path) -> None:
    read = read_results(folder / "engine.json")
    assert to_json(read) == to_json(RESULTS)
    assert math.isnan(read.outcomes[1].worst_errors["logits"])
    assert read.outcomes[1].explanations == (CAUSE,)
    assert read.counts["skipped"] == 1


def test_a_token_and_taps_are_written_where_there_are_any(tmp_path: Path) -> None:
    """The first token has number 0, and no measured set of taps is an empty text: both are values."""
    found = replace(RESULTS, outcomes=(replace(OUTCOMES[1], token=0, taps=""), replace(OUTCOMES[0], taps="logits")))
    write_results(tmp_path / "x.json", found)
    read = read_results(tmp_path / "x.json")
    assert [(each.token, each.taps) for each in read.outcomes] == [(0, ""), (None, "logits")]
    assert '"token"' not in to_json(RESULTS)


def put(values: dict[str, Any], path: str, value: Any) -> None:
    """Set a field; a value of `...` removes it."""
    *parents, name = path.split(".")
    for parent in parents:
        values = values[int(parent)] if parent.isdigit() else values[parent]
    if value is ...:
        del values[name]
    else:
        values[name] = value


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("format_version", "2", "'format_version' is \"2\""),
        ("engine", "x", "'engine' is \"x\""),
        ("engine.name", "", "'engine.name' is \"\""),
        ("engine.speed", 3, "'engine.speed' is 3"),
        ("engine.options", {"a": 1}, "'engine.options' is"),
        ("significance", 2, "'significance' is 2"),
        ("significance", "x", "'significance' is \"x\""),
        ("cases", [], "'cases' is []"),
        ("notes", [3], "'notes' is [3]"),
        ("date", "today", "'date' is \"today\""),
        ("smoke", ..., "'smoke' is missing"),
        ("outcomes", {}, "'outcomes' is {}"),
        ("outcomes", [3], "'outcomes' is [3]"),
        ("outcomes.0.verdict", "fine", "'outcomes[0].verdict' is \"fine\""),
        ("outcomes.0.verdict", [], "'outcomes[0].verdict' is []"),
        ("outcomes.0.dtype", "int8", "'outcomes[0].dtype' is \"int8\""),
        ("outcomes.0.case", None, "'outcomes[0].case' is null"),
        ("outcomes.0.issue", 3, "'outcomes[0].issue' is 3"),
        ("outcomes.0.first_wrong", {"run": "prefill"}, "'outcomes[0].first_wrong.tap' is missing"),
        ("outcomes.0.worst_errors", {"speed": 1}, "the step 'speed'"),
        ("outcomes.0.worst_errors", {"logits": -1}, "'outcomes[0].worst_errors.logits' is -1"),
        ("outcomes.0.worst_errors", {"logits": "much"}, "'outcomes[0].worst_errors.logits' is \"much\""),
        ("outcomes.1.explanations.0.sources", "x", "'outcomes[1].explanations[0].sources' is \"x\""),
        ("outcomes.1.dtype", "float32", "'outcomes' has a case and dtype more than once"),
        ("outcomes.0.policy", ..., "'outcomes[0].policy' is missing"),
        ("outcomes.0.golden_bits", False, "'outcomes[0].golden_bits' is false"),
        ("outcomes.0.token", -1, "'outcomes[0].token' is -1"),
        ("outcomes.0.token", True, "'outcomes[0].token' is true"),
        ("outcomes.0.taps", "some taps", "'outcomes[0].taps' is \"some taps\""),
        ("outcomes.0.taps", [], "'outcomes[0].taps' is []"),
    ],
)
def test_a_file_that_says_something_else_is_one_sentence(folder: Path, field: str, value: Any, words: str) -> None:
    path = folder / "engine.json"
    values = json.loads(path.read_text())
    put(values, field, value)
    path.write_text(json.dumps(values))
    with pytest.raises(InputError) as raised:
        read_results(path)
    assert words in str(raised.value)
    assert str(path) in str(raised.value)


# ---- known failures


def known(*cases: str, engine: str = "engine", **options: str) -> list[KnownFailure]:
    return [KnownFailure(engine, *case.split(), "a reason", options=options) for case in cases]


def places(outcomes: Any) -> list[str]:
    return [f"{each.case} {each.dtype}" for each in outcomes]


def test_failures_are_told_from_known_ones() -> None:
    held = sort_failures(RESULTS, known("one bfloat16", "one float32", "two float32", "nowhere float32"))
    assert places(held.failing) == ["two bfloat16", "three float32", "three bfloat16"]
    assert places(each for each, _ in held.known) == ["one bfloat16"]
    assert places(each for each, _ in held.passing) == ["one float32"], "a skipped case is no unexpected pass"
    assert places(sort_failures(RESULTS, known("one bfloat16", engine="another")).failing)[0] == "one bfloat16"


def test_an_entry_may_be_about_an_engine_with_certain_options() -> None:
    for options, number in (({"attention": "sdpa"}, 1), ({"attention": "eager"}, 0), ({"cache": "static"}, 0)):
        assert len(sort_failures(RESULTS, known("one bfloat16", **options)).known) == number


def test_a_failure_with_quantised_weights_is_not_known_of_others() -> None:
    """One list may serve runs with and without them."""
    runs = [replace(RESULTS, quantised=form) for form in ("", "gguf:Q8_0", "gguf:Q4_K_M")]
    for run in runs:
        for other in runs:
            found = sort_failures(other, known_failures(run))
            assert bool(found.known) == (run is other or run is runs[0])
            assert bool(found.failing) != bool(found.known)


def test_an_entry_may_list_cases_and_dtypes(tmp_path: Path) -> None:
    path = tmp_path / "known.toml"
    listed = GOOD.replace('"c"', '["c", "d"]').replace('"float32"', '["float32", "float16"]')
    path.write_text(f"{listed}options = {{ cache = 'static' }}\n")
    found = read_known(path)
    assert {(each.case, each.dtype) for each in found} == {(c, d) for c in "cd" for d in ("float32", "float16")}
    assert all(each.options == {"cache": "static"} for each in found)
    path.write_text(GOOD + GOOD.partition("\n")[2] + "options = { cache = 'static' }\n")
    assert len(read_known(path)) == 2, "they are about different engines"


def test_todays_failures_are_written_and_read(tmp_path: Path) -> None:
    path, entries = tmp_path / "known.toml", known_failures(RESULTS)
    write_known(path, entries)
    assert read_known(path) == entries
    held = sort_failures(RESULTS, read_known(path))
    assert not held.failing
    assert not held.passing


GOOD = 'format_version = "1"\n[[known]]\nengine = "e"\ncase = "c"\ndtype = "float32"\nreason = "r"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("known = ", "not valid TOML"),
        ("", "'format_version' is null"),
        ('format_version = "2"', "'format_version' is \"2\""),
        ('format_version = "1"\nknown = 3', "'known' is 3"),
        ('format_version = "1"\nknown = [3]', "'known[0]' is 3"),
        ('format_version = "1"\n[[unknown]]', "'unknown' is unknown"),
        (GOOD + "speed = 3\n", "known[0] has a field 'speed'"),
        (GOOD.replace('reason = "r"\n', ""), "'known[0].reason' is missing"),
        (GOOD.replace('"r"', '""'), "'known[0].reason' is \"\""),
        (GOOD.replace("float32", "int8"), "'known[0].dtype' is \"int8\""),
        (GOOD + "issue = 3\n", "'known[0].issue' is 3"),
        (GOOD + "options = 3\n", "'known[0].options' is 3"),
        (GOOD + "options = { cache = 3 }\n", "'known[0].options' is"),
        (GOOD.replace('"c"', "[]"), "'known[0].case' is []"),
        (GOOD.replace('"c"', '["c", 3]'), "'known[0].case' is"),
        (GOOD.replace('"float32"', '["int8"]'), "'known[0].dtype' is \"int8\""),
        (GOOD.replace('"c"', '["c", "c"]'), "known[0] is about e, c, float32, which"),
        (GOOD + GOOD.partition("\n")[2], "known[1] is about e, c, float32, which"),
    ],
)
def test_a_file_of_known_failures_that_is_none_is_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "known.toml"
    path.write_text(text)
    with pytest.raises(InputError) as raised:
        read_known(path)
    assert words in str(raised.value)
    assert str(path) in str(raised.value)


# ---- the scoreboard


def test_what_is_alike_is_one_group(folder: Path) -> None:
    board = scoreboard([folder / "engine.json", folder / "another.json"])
    assert [each.label for each in board.entrants] == ["engine 1.0 attention=sdpa", "another 2"]
    assert board.cases == ("one", "three", "two")
    (deviation,) = board.groups(DEVIATES)
    assert (deviation.step, deviation.cause, deviation.places) == ("attention.q_rope", CAUSE, {"one": ("bfloat16",)})
    assert len(board.groups(FAILED)) == 2
    assert len(board.groups(UNDECIDABLE)) == len(board.groups(UNSUPPORTED)) == 1
    assert board.notes == ("case one has changed between these results",)
    assert board.entrants[0].worst_errors("float32") == {"embedding": 0.0, "logits": 0.5}
    assert math.isnan(board.entrants[0].worst_errors()["logits"]), "the largest of all"
    assert board.entrants[1].kind("two", "float32") == "not run"


def test_the_scoreboard_as_text_and_json(folder: Path, refmoe: Refmoe) -> None:
    status, out, _ = refmoe("scoreboard", folder)
    assert status == 0
    for words in ("engine 1.0 attention=sdpa", "first wrong step attention.q_rope: known bug: rope-sign-flipped", "✓✕"):
        assert words in out
    assert "\x1b" not in out
    status, out, _ = refmoe("scoreboard", folder / "engine.json", "--json")
    (engine,) = json.loads(out)["engines"]
    assert engine["counts"]["bfloat16"] == {
        "conformant": 0, "deviates": 1, "undecidable": 0, "overflows": 0, "not supported": 0, "crashed": 2
    }  # fmt: skip
    assert engine["worst_errors"]["bfloat16"] == {"attention.q_rope": "Infinity", "logits": "NaN"}
    assert engine["outcomes"][1]["first_wrong"] == "decode1/layers.1.attention.q_rope"


def test_the_page_obeys_no_name(folder: Path, refmoe: Refmoe) -> None:
    page = folder / "board.html"
    assert refmoe("scoreboard", folder, "--html", page)[0] == 0
    text = page.read_text()
    assert "<script>alert" not in text
    assert "\x1b" not in text
    assert "default-src 'none'" in text
    assert "javascript:" not in text
    for words in ("rope-sign-flipped", "Deviations", "Not supported", "no window", 'href="https://example.org/2"'):
        assert words in text


def test_results_that_cannot_stand_side_by_side(folder: Path, refmoe: Refmoe) -> None:
    write_results(folder / "again.json", RESULTS)
    status, _, err = refmoe("scoreboard", folder)
    assert status == 2
    assert "one file for each engine was expected" in err
    write_results(folder / "again.json", replace(RESULTS, platform={"system": "Darwin", "machine": "arm64"}))
    assert "engine 1.0 attention=sdpa on Darwin arm64" in refmoe("scoreboard", folder)[1]
    (folder / "empty").mkdir()
    assert "has no file *.json" in refmoe("scoreboard", folder / "empty")[2]
    assert refmoe("scoreboard", folder / "nothing.json")[0] == 2


# ---- what is committed


def test_the_committed_results_make_a_page_with_each_engine(refmoe: Refmoe, tmp_path: Path) -> None:
    page = tmp_path / "scoreboard.html"
    assert refmoe("scoreboard", COMMITTED, "--html", page)[0] == 0
    text = page.read_text()
    for results in map(read_results, COMMITTED.glob("*.json")):
        assert f"{results.engine.name} {results.engine.version}" in text


@pytest.mark.parametrize("folder", sorted(COMMITTED.parent.glob("conform*")), ids=lambda folder: folder.name)
def test_what_is_committed_as_known_fails_in_the_committed_results(folder: Path) -> None:
    """So that `refmoe conform --known` has exit status 0 for each, and no entry is out of date."""
    known = folder / "known.toml"
    listed, used = read_known(known) if known.exists() else [], []
    for path in folder.glob("*.json"):
        held = sort_failures(read_results(path), listed)
        assert [f"{each.case} {each.dtype}" for each in held.failing] == [], path.name
        assert not held.passing, path.name
        used += [entry for _, entry in held.known]
    assert [each for each in listed if each not in used] == []
