# SPDX-License-Identifier: Apache-2.0
"""The verdict on a server in the files and reports of a run: each says what the exit status says."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from refmoe.engines.known import CANNOT, FAILED, WELL, known_failures, sort_failures, whole_verdict
from refmoe.engines.process import BROKEN, CRASHED
from refmoe.engines.results import Results, read_results, write_results
from refmoe.engines.scoreboard import scoreboard
from refmoe.engines.server.asking import Address, Client
from refmoe.engines.server.kinds import version_of
from refmoe.engines.server.outcome import results_of
from refmoe.engines.server.served import served_case
from refmoe.engines.server.verdict import Verdict
from refmoe.report.conform_junit import run_junit
from refmoe.report.conform_markdown import run_markdown
from refmoe.report.conform_sarif import run_sarif
from refmoe.report.sources import Place, Sources
from refmoe.report.standing import ALMOST, OPEN, PARTIAL, RED, STALE, standing
from refmoe.verifier.findings import CONFORMANT, NOT_CONFORMANT
from refmoe.verifier.segments import SIGNIFICANCE
from tests.command_line import Refmoe
from tests.engines.server import fake
from tests.engines.server.asked import asked
from tests.engines.server.fake import Answer, Refusal, Spoil, honest_llama, honest_openai, sends, serving
from tests.report.sarif_checks import github_faults, schema_faults

SOURCES = Sources({}, Place("serve.py", 1, 2))


def results(found: Verdict) -> Results:
    return results_of(found, served_case(), SIGNIFICANCE, {"command": "serve '{checkpoint}'"})


def nothing(*_: Any) -> bool:
    return False


SERVERS: dict[str, tuple[Answer, Spoil, str, str, str, str, str]] = {
    "healthy": (honest_llama(), nothing, "float32", CONFORMANT, WELL, ALMOST, ""),
    "wrong rows": (honest_llama("rope-theta-default"), nothing, "float32", NOT_CONFORMANT, FAILED, RED, "logprobs"),
    "wrong tokens": (
        honest_openai("rope-theta-default", numbers=False), nothing, "float32", NOT_CONFORMANT, FAILED, RED,
        "wrong-step",
    ),
    "a broken law": (
        honest_openai(refused=("prompt_logprobs",), text_only=True, echo_off_by=1), nothing, "float32", NOT_CONFORMANT,
        FAILED, RED, "wrong-step",
    ),
    "a broken answer": (honest_llama(), fake.from_then_on(3, sends(b"{")), "float32", BROKEN, FAILED, RED,
                        "broken-answer"),
    "nothing at all": (honest_llama(), fake.drops, "float32", CRASHED, FAILED, RED, "crashed"),
    "too little": (honest_openai(numbers=False), nothing, "bfloat16", CONFORMANT, CANNOT, OPEN, "cannot-judge"),
}  # fmt: skip
"""Per server its verdict, and the verdict of the run, the colour of its badge and the rule of its alert."""


@cache
def verdict_of(name: str) -> Verdict:
    answer, spoil, dtype, *_ = SERVERS[name]
    return asked(answer, spoil, dtype=dtype, wanted="llama.cpp" if spoil is not nothing else None)


QUICK = ("wrong rows", "a broken answer", "nothing at all")


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[] if each in QUICK else pytest.mark.slow) for each in SERVERS]
)
def test_each_report_has_the_verdict_of_the_run(name: str, tmp_path: Path) -> None:
    *_, verdict, whole, color, rule = SERVERS[name]
    found = verdict_of(name)
    assert found.verdict == verdict
    made = results(found)
    failures = sort_failures(made, [])
    assert whole_verdict(made, failures) == whole
    assert standing(made, failures).color == color
    write_results(tmp_path / "results.json", made)
    assert read_results(tmp_path / "results.json") == made
    assert scoreboard([tmp_path / "results.json"]).cases == ("served",)

    tree = ElementTree.fromstring(run_junit(made, failures))
    assert len(tree.findall(".//failure")) == (whole == FAILED)
    assert len(tree.findall(".//error")) == (whole == CANNOT)
    text = run_sarif(made, failures, SOURCES)
    assert schema_faults(json.loads(text)) == github_faults(text) == []
    alerts = json.loads(text)["runs"][0]["results"]
    assert [each["ruleId"] for each in alerts] == [rule] * bool(rule)
    summary = run_markdown(made, failures)
    assert ("❌" in summary, "❔" in summary) == (whole == FAILED, whole == CANNOT)

    # listed as known, it fails no run any more; a healthy server that is listed does
    (listed,) = known_failures(made) or [None]
    if listed is not None:
        assert "command" not in listed.options
        assert whole_verdict(made, sort_failures(made, [listed])) == WELL
        assert standing(made, sort_failures(made, [listed])).color == PARTIAL


def test_an_entry_is_about_one_kind_of_server() -> None:
    wrong = results(verdict_of("wrong rows"))
    entries = known_failures(wrong)
    right = replace(wrong, outcomes=tuple(replace(each, verdict=CONFORMANT) for each in wrong.outcomes))
    assert standing(right, sort_failures(right, entries)).color == STALE
    other = replace(right, engine=replace(right.engine, options={"kind": "openai"}))
    assert whole_verdict(other, sort_failures(other, entries)) == WELL
    assert not sort_failures(other, entries).passing


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ({"/version": {"version": "0.32.0"}}, "0.32.0"),
        ({"/props": {"build_info": "b11549-2bb9e10"}}, "b11549-2bb9e10"),
        ({"/version": {"version": " "}, "/props": {"build_info": 7}}, ""),
        ({"/version": [], "/props": "x"}, ""),
        ({}, ""),
    ],
)
def test_the_version_is_that_which_the_server_says(said: dict[str, Any], version: str) -> None:
    def answer(path: str, _: Any) -> Any:
        if path not in said:
            raise Refusal(404, "no such path")
        return said[path]

    with serving(answer) as url:
        assert version_of(Client(Address(url), 30.0)) == version


def test_a_version_that_never_comes_is_not_waited_for() -> None:
    with serving(lambda *_: {}, fake.stalls) as url:
        assert version_of(Client(Address(url), 0.2)) == ""


# ---- the command

FILES = {"--out": "r.json", "--junit": "j.xml", "--sarif": "a.sarif", "--badge": "b.json", "--summary": "s.md"}


def words(*more: str) -> list[str]:
    return [*(word for pair in FILES.items() for word in pair), "--source", "serve.py", *more]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a repository."""
    (tmp_path / ".git").mkdir()
    (tmp_path / "serve.py").write_text("serve()\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_writes_each_report_and_takes_known_failures(refmoe: Refmoe, work: Path) -> None:
    """By a server that answers nothing, so that it takes no time."""
    ci = ("--write-ci", "github", ".", "--write-ci", "shell", ".", "--refmoe-from", "someone/refmoe")
    with serving(lambda *_: {}, sends(b"<html>")) as url:
        given = ["conform", "--server", url, "--dtype", "float32", "--server-kind", "openai"]
        status, output, _ = refmoe(*given, *words(*ci))
        assert status == 1
        assert all((work / name).is_file() for name in FILES.values())
        assert "refmoe-known.toml" in output
        status, _, _ = refmoe(*given, *words("--known", "refmoe-known.toml"))
        assert status == 0
        status, output, _ = refmoe(*given, "--json", "--known", "refmoe-known.toml")
    facts = json.loads(output)
    assert (status, facts["status"], facts["verdict"]) == (0, 0, BROKEN)
    assert facts["known"] == [{"case": "served", "dtype": "float32"}]
    assert read_results(work / "r.json").outcomes[0].verdict == BROKEN
    script = (work / "refmoe.sh").read_text()
    assert f"--server {url} --server-kind openai --dtype float32" in script
    assert f'server: "{url}"' in (work / ".github/workflows/refmoe.yml").read_text()


def test_a_server_that_refuses_all_is_no_server(refmoe: Refmoe, work: Path) -> None:
    def stranger(*_: Any) -> Any:
        raise Refusal(404, "nothing here")

    with serving(stranger) as url:
        status, _, _ = refmoe("conform", "--server", url, "--dtype", "float32", *words())
    assert status == 2
    assert not any((work / name).exists() for name in FILES.values())


@pytest.mark.parametrize(
    "given",
    [
        ["--server-files", "model", "--junit", "j.xml"],
        ["--server", "http://127.0.0.1:1", "--dtype", "float32", "--resume", "--out", "r.json"],
        ["--server", "http://127.0.0.1:1", "--dtype", "float32", "--sarif", "a.sarif"],
        ["--server", "http://127.0.0.1:1", "--dtype", "float32", "--write-ci", "shell", "."],
        ["--server", "http://127.0.0.1:1", "--dtype", "float32", "--source", "serve.py"],
    ],
)
def test_options_about_files_that_cannot_be_used(given: list[str], refmoe: Refmoe, work: Path) -> None:
    before = sorted(work.iterdir())
    status, _, said = refmoe("conform", *given)
    assert status == 2
    assert "Traceback" not in said
    assert sorted(work.iterdir()) == before
