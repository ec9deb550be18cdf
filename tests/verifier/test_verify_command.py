# SPDX-License-Identifier: Apache-2.0
"""``refmoe verify`` as its users meet it: status, streams, files, and a sentence for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from refmoe.checkpoints.write import write_checkpoint
from refmoe.report.verification_json import schema
from refmoe.suite import read_case, trace_path
from tests.command_line import Refmoe
from tests.verifier.hostile import CASE, GOLDEN, TRACES, draft

ROOT = GOLDEN.parent
HONEST = trace_path(GOLDEN / CASE)


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    """A trace with one NaN."""
    path = tmp_path / "wrong.safetensors"
    TRACES["one_nan"].write(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the case."""
    folder = tmp_path_factory.mktemp("checkpoint")
    case = read_case(GOLDEN / CASE)
    write_checkpoint(folder, case.config, case.checkpoint().parameters)
    return folder


def ideal(path: Path, arithmetic: str, **fields: Any) -> Path:
    """An honest trace, with fields of its header changed."""
    parts = draft(path, arithmetic)
    parts.header |= fields
    path.write_bytes(parts.whole())
    return path


def test_status_says_the_verdict(refmoe: Refmoe, wrong: Path, tmp_path: Path) -> None:
    """0 conformant, 1 not, 2 cannot judge or cannot be used."""
    assert refmoe("verify", HONEST, "--golden", GOLDEN)[0] == 0
    status, out, err = refmoe("verify", wrong, "--golden", GOLDEN, "--no-diagnose")
    assert (status, err) == (1, "")
    assert "layers.1.expert.up" in out
    status, out, err = refmoe("verify", tmp_path / "nothing", "--golden", GOLDEN)
    assert (status, out) == (2, "")


def test_what_cannot_be_judged_is_status_3_with_a_report(
    refmoe: Refmoe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A verdict like the others: on standard output, with what is missing; nothing on standard error."""
    monkeypatch.setattr("refmoe.verifier.free_running.MOST_VALUES", 0)
    path = tmp_path / "logits.safetensors"
    parts = draft(path, "bfloat16")
    parts.tensors = {key: found for key, found in parts.tensors.items() if key.endswith("/logits")}
    path.write_bytes(parts.whole())
    status, out, err = refmoe("verify", path, "--golden", GOLDEN)
    assert (status, err) == (3, "")
    assert out.startswith("CANNOT JUDGE\n")
    assert "router.experts" in out
    status, out, err = refmoe("verify", path, "--golden", GOLDEN, "--json")
    assert (status, json.loads(out)["verdict"]) == (3, "cannot judge")


def test_the_golden_conforms_whatever_it_is_called(refmoe: Refmoe, checkpoint: Path, tmp_path: Path) -> None:
    """By the case that it names, by the case given, against the checkpoint, and as exact, float64 or less."""
    for options in ((), ("--case", CASE), ("--policy", "float64"), ("--policy", "exact"), ("--policy", "hf-bfloat16")):
        status, out, _ = refmoe("verify", HONEST, "--golden", GOLDEN, *options)
        assert status == 0, out
    status, out, _ = refmoe("verify", HONEST, "--checkpoint", checkpoint)
    assert status == 0
    assert f"against checkpoint {checkpoint}" in out
    named = ideal(tmp_path / "t", "exact", policy="float64", case=None)
    assert refmoe("verify", named, "--golden", GOLDEN, "--case", CASE)[0] == 0


def test_an_emitted_trace_of_a_policy_conforms_to_it(refmoe: Refmoe, tmp_path: Path) -> None:
    for policy in ("hf-float16", "llama.cpp-float32"):
        out = tmp_path / policy
        assert refmoe("emit", "--case", CASE, "--golden", GOLDEN, "--policy", policy, "--out", out)[0] == 0
        status, text, _ = refmoe("verify", out, "--golden", GOLDEN)
        assert status == 0, text
        assert f"policy {policy}" in text


def test_a_policy_given_takes_the_place_of_the_one_declared(refmoe: Refmoe, tmp_path: Path) -> None:
    """A bfloat16 engine that calls itself float32 is wrong by its own word, and right by the user's."""
    path = ideal(tmp_path / "t", "bfloat16", policy="float32")
    assert refmoe("verify", path, "--golden", GOLDEN, "--no-diagnose")[0] == 1
    status, out, _ = refmoe("verify", path, "--golden", GOLDEN, "--policy", "bfloat16")
    assert status == 0
    assert "policy bfloat16" in out
    unknown = ideal(tmp_path / "u", "bfloat16", policy="mxfp4")
    assert refmoe("verify", unknown, "--golden", GOLDEN)[0] == 2
    assert refmoe("verify", unknown, "--golden", GOLDEN, "--policy", "bfloat16")[0] == 0


def test_a_policy_of_the_users_own_is_a_file(refmoe: Refmoe, tmp_path: Path) -> None:
    """The user may name one, where a trace may not."""
    own = tmp_path / "mine.toml"
    own.write_text('[mine]\nbase = "bfloat16"\nabout = "mine"\nsource = "here"\n')
    path = ideal(tmp_path / "t", "bfloat16", policy=str(own))
    assert refmoe("verify", path, "--golden", GOLDEN)[0] == 2
    assert refmoe("verify", path, "--golden", GOLDEN, "--policy", own)[0] == 0


@pytest.mark.parametrize("name", ["honest", "one_nan", "all_infinite", "escape_sequences_in_a_tap"])
def test_json_is_one_object_of_the_published_schema(refmoe: Refmoe, tmp_path: Path, name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema not installed: pip install -e '.[test]'")
    path = HONEST
    if name != "honest":
        path = tmp_path / "t"
        TRACES[name].write(path)
    status, out, err = refmoe("verify", path, "--golden", GOLDEN, "--json")
    found = json.loads(out)
    assert err == ""
    jsonschema.validate(found, schema())
    assert (found["verdict"], status) in {("conformant", 0), ("not conformant", 1)}
    assert found["trace"] == str(path)


def test_reports_are_written_beside_what_is_printed(refmoe: Refmoe, wrong: Path, tmp_path: Path) -> None:
    """The verdict is the same in all of them."""
    html, junit, sarif = tmp_path / "page.html", tmp_path / "junit.xml", tmp_path / "alerts.sarif"
    source = ("--sarif", sarif, "--source", Path(__file__).relative_to(Path.cwd()))
    status, out, _ = refmoe("verify", wrong, "--golden", GOLDEN, "--html", html, "--junit", junit, *source)
    assert status == 1
    assert out == refmoe("verify", wrong, "--golden", GOLDEN)[1]
    assert "layers.1.expert.up" in html.read_text(encoding="utf-8")
    assert html.read_text(encoding="utf-8").rstrip().endswith("</html>")
    suites = ElementTree.parse(junit).getroot()
    assert int(suites.attrib["failures"]) >= 1
    assert {path.name for path in tmp_path.iterdir()} == {
        "wrong.safetensors", "page.html", "junit.xml", "alerts.sarif"
    }  # fmt: skip
    (alert,) = json.loads(sarif.read_text())["runs"][0]["results"]
    assert (alert["ruleId"], alert["properties"]["layer"]) == ("expert.up", 1)


@pytest.mark.parametrize("option", ["--html", "--junit"])
def test_a_report_is_written_whole_or_not_at_all(
    refmoe: Refmoe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str
) -> None:
    """A full disk: the old report stays, no other file is left, and the verdict has been printed by then."""
    report = tmp_path / "report"
    report.write_text("old")
    write = Path.write_text

    def fails(self: Path, text: str, **options: Any) -> int:
        write(self, text[:100], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fails)
    status, out, err = refmoe("verify", HONEST, "--golden", GOLDEN, option, report)
    assert status == 2
    assert err == f"refmoe: {report}: cannot be written: No space left on device\n"
    assert out.startswith("CONFORMANT\n")
    assert report.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


MISTAKES = {
    "both": ("{honest} --case walking-skeleton --checkpoint {checkpoint}", "but both were given"),
    "neither": ("{caseless}", "names no case, so --case NAME or --checkpoint DIR was expected"),
    "no trace": ("nowhere", "nowhere: no such file"),
    "no case": ("{honest} --case nothing", "case 'nothing' is unknown"),
    "another case": ("{honest} --case dyadic", '\'case\' is "walking-skeleton", but --case is "dyadic"'),
    "no checkpoint": ("{honest} --checkpoint nowhere", "nowhere: no such folder"),
    "no policy": ("{honest} --policy int4", "policy 'int4' is unknown, expected a .toml file or one of"),
    "no policy file": ("{honest} --policy mine.toml", "mine.toml: no such file"),
    "policy of nothing": ("{honest} --policy float32+", "a change such as cache=float16 was expected"),
    "significance 0": ("{honest} --significance 0", "--significance is 0, but a probability"),
    "significance 1": ("{honest} --significance 1", "--significance is 1, but a probability"),
    "significance below 0": ("{honest} --significance -1e-6", "--significance is -1e-06"),
    "significance of nothing": ("{honest} --significance 1e-310", "--significance is 1e-310"),
    "html nowhere": ("{honest} --html a/b.html", "a/b.html: cannot be written: No such file or directory"),
    "junit nowhere": ("{honest} --junit a/b.xml", "a/b.xml: cannot be written: No such file or directory"),
    "html in a file": ("{honest} --html {honest}/b.html", "b.html: cannot be written: Not a directory"),
    "html is a folder": ("{honest} --html {checkpoint}", "is a folder, but the name of a file"),
    "html is the trace": ("{caseless} --case walking-skeleton --html {caseless}", "is an input of this command"),
    "sarif without a place": ("{honest} --sarif a.sarif", "--source FILE, a file of the engine, was expected"),
    "a place without sarif": ("{honest} --source README.md", "are about --sarif, which was not given"),
    "a repository without sarif": ("{honest} --refmoe-from a/b", "are about --sarif, which was not given"),
    "a place that is none": ("{honest} --sarif a.sarif --source none.py:3", "none.py: no such file"),
    "one file for both": ("{honest} --html same --junit ./same", "two outputs have this name"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_status_2(
    refmoe: Refmoe, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Before any work is done: nothing is printed, and nothing half-written is left."""
    arguments, words = MISTAKES[name]
    caseless = ideal(tmp_path / "caseless", "exact", case=None)
    whole = caseless.read_bytes()
    places = {"honest": HONEST, "checkpoint": checkpoint, "caseless": caseless}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("refmoe.api.verifying.verify", lambda *_: pytest.fail("work was done"))
    status, out, err = refmoe("verify", *(word.format(**places) for word in arguments.split()), "--golden", GOLDEN)
    assert (status, out) == (2, "")
    assert words in err
    assert err.startswith("refmoe: ")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["caseless"]
    assert caseless.read_bytes() == whole


def test_unknown_policies_are_answered_with_the_known_ones(refmoe: Refmoe) -> None:
    """Known policies that resemble the unknown one come first."""
    _, _, err = refmoe("verify", HONEST, "--golden", GOLDEN, "--policy", "hf-bf16")
    known = err.partition("one of ")[2].strip().split(", ")
    assert known[0] in ("hf-bfloat16", "hf-float16")
    assert {"exact", "float64", "float32", "float16", "bfloat16"} <= set(known)


def test_help_has_an_example_and_the_statuses(refmoe: Refmoe) -> None:
    status, out, _ = refmoe("verify", "--help")
    assert status == 0
    assert "refmoe verify engine.safetensors --case walking-skeleton" in out
    assert "--policy bfloat16 --html report.html" in out
    assert "0: conformant. 1: not conformant. 2: the input cannot be used. 3: cannot judge" in " ".join(out.split())


def process(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "refmoe", "verify", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False, **options)


def test_in_a_pipe_there_is_no_progress_and_no_colour(tmp_path: Path) -> None:
    """As a process, with the case and the golden folder as they are by default."""
    done = process(HONEST)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"CONFORMANT\n")
    assert b"\x1b" not in done.stdout
    refused = process(tmp_path / "nowhere")
    assert (refused.returncode, refused.stdout) == (2, b"")
    assert refused.stderr.count(b"\n") == 1


def test_letters_that_the_locale_lacks_are_written_as_escapes(tmp_path: Path) -> None:
    """Else a producer's name would decide whether there is a verdict."""
    producer = {"name": "Motör 發動機", "version": "1"}
    path = ideal(tmp_path / "t", "exact", producer=producer)
    done = process(path, env={"PYTHONIOENCODING": "latin-1", "PATH": "/usr/bin"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert "Motör \\u767c".encode("latin-1") in done.stdout
    assert "Motör 發動機".encode() in process(path, env={"PYTHONIOENCODING": "utf-8", "PATH": "/usr/bin"}).stdout
