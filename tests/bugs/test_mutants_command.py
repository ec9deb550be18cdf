# SPDX-License-Identifier: Apache-2.0
"""``refmoe mutants``: what it prints, what it writes, and when it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from refmoe.api import known_bugs as command
from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.quantised.catalogue import QUANTISED
from refmoe.suite import MANIFEST_FILE, verify_documents, write_folder_manifest
from refmoe.suite.matrix import changes
from refmoe.suite.matrix.dependencies import digests
from refmoe.suite.matrix.file import MATRIX_FILE, Matrix, read_matrix, write_matrix
from refmoe.suite.matrix.outcomes import SPECIFICATION
from tests.bugs.sample_matrix import PLACE, all_killed, golden_folder
from tests.command_line import Refmoe


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return golden_folder(tmp_path)


@pytest.fixture
def matrix(golden: Path) -> Matrix:
    """Without any problem; `record` writes it."""
    return all_killed(golden)


def record(golden: Path, matrix: Matrix) -> None:
    write_matrix(golden / MATRIX_FILE, matrix)


# ---- the catalogue


def test_every_mutant_has_its_line(refmoe: Refmoe) -> None:
    status, out, _ = refmoe("mutants", "list", "--json")
    assert status == 0
    assert [each["id"] for each in json.loads(out)] == [*MUTANTS, *QUANTISED]
    assert "attn-gqa-tile" in refmoe("mutants", "list")[1]


def test_a_mutant_is_shown_with_the_reasons_why_it_cannot_be_seen(refmoe: Refmoe) -> None:
    status, out, _ = refmoe("mutants", "show", "prec-combine-lowprec")
    assert status == 0
    reasons = [line for line in out.splitlines() if line.startswith("unseen")]
    assert [line.split()[1] for line in reasons] == ["bfloat16:", "float16:"]
    assert all("0.990 of the allowed error" in line for line in reasons)
    assert "unseen" not in refmoe("mutants", "show", "attn-gqa-tile")[1]
    unseen = json.loads(refmoe("mutants", "show", "prec-logits-lowprec", "--json")[1])["unseen"]
    assert [*unseen] == ["bfloat16"]


# ---- the recorded matrix


def test_results_of_a_matrix_without_problems(refmoe: Refmoe, golden: Path, matrix: Matrix) -> None:
    record(golden, matrix)
    status, out, _ = refmoe("mutants", "results", "--golden", golden)
    assert status == 0
    lines = out.splitlines()
    assert "float32   119 of 119 mutants killed" in lines
    assert "bfloat16  117 of 119 mutants killed" in lines
    assert any(line.startswith("          prec-logits-lowprec cannot be seen: the policy itself") for line in lines)
    assert "vectors   17 of 17 mutants of tokenizer, sampler and loss killed" in lines
    assert "what a case alone kills, mutants times dtypes: tiny 353" in lines
    assert "cases that alone kill nothing: none" in lines
    assert "changed since" not in out


def test_results_fail_where_a_mutant_lives(refmoe: Refmoe, golden: Path, matrix: Matrix) -> None:
    """Sabotage: no case kills it under one policy; and the specification fails."""
    del matrix.kills["attn-gqa-tile"]["float16"]
    matrix.kills[SPECIFICATION] = {"float32": {"tiny": PLACE}}
    record(golden, matrix)
    status, out, _ = refmoe("mutants", "results", "--golden", golden)
    assert status == 1
    assert "FAIL  mutant attn-gqa-tile lives in float16: no case kills it" in out.splitlines()
    assert "FAIL  the specification itself fails: case tiny in float32" in out.splitlines()
    status, out, _ = refmoe("mutants", "results", "--golden", golden, "--json")
    assert status == 1
    values = json.loads(out)
    assert (values["alive"]["float16"], len(values["problems"])) == (["attn-gqa-tile"], 2)


def test_results_of_a_file_that_cannot_be_used(refmoe: Refmoe, golden: Path, matrix: Matrix) -> None:
    for arguments in (["results"], ["matrix", "--changed"]):
        status, _, err = refmoe("mutants", *arguments, "--golden", golden)
        assert (status, err) == (
            2,
            f"refmoe: {golden / MATRIX_FILE}: no such file; `refmoe mutants matrix --golden {golden}` writes it\n",
        )
    (golden / MATRIX_FILE).write_text('{"format_version": "7"}')
    status, _, err = refmoe("mutants", "results", "--golden", golden)
    assert status == 2
    assert err == f'refmoe: {golden / MATRIX_FILE}: \'format_version\' is "7", but "1" was expected\n'


def test_a_page_is_written_and_its_place_refused_in_a_sentence(refmoe: Refmoe, golden: Path, matrix: Matrix) -> None:
    record(golden, matrix)
    assert refmoe("mutants", "results", "--golden", golden, "--html", golden / "page.html")[0] == 0
    assert (golden / "page.html").read_text().startswith("<!DOCTYPE html>")
    status, _, err = refmoe("mutants", "results", "--golden", golden, "--html", golden / "no" / "page.html")
    assert status == 2
    assert "cannot be written" in err


# ---- what has changed


def stale(matrix: Matrix, *parts: str) -> Matrix:
    """As if these parts had changed since."""
    matrix.sources.update(dict.fromkeys(parts, "other"))
    return matrix


def test_nothing_has_changed(refmoe: Refmoe, golden: Path, matrix: Matrix) -> None:
    record(golden, matrix)
    before = (golden / MATRIX_FILE).read_bytes()
    assert refmoe("mutants", "matrix", "--changed", "--golden", golden) == (
        0, "nothing has changed since the matrix was computed\n", "",
    )  # fmt: skip
    status, out, _ = refmoe("mutants", "matrix", "--changed", "--golden", golden, "--json")
    assert (status, json.loads(out)) == (0, {"changed": [], "runs": 0, "lost": [], "gained": [], "problems": []})
    assert (golden / MATRIX_FILE).read_bytes() == before


def test_a_changed_class_of_mutants_is_run_again_and_recorded(refmoe: Refmoe, golden: Path, matrix: Matrix) -> None:
    """The record then holds what happened, and is current."""
    record(golden, stale(matrix, "bugs/embedding"))
    assert "changed since: bugs/embedding; `refmoe mutants matrix --changed --golden golden`" in refmoe(
        "mutants", "results", "--golden", golden
    )[1]  # fmt: skip
    status, out, _ = refmoe("mutants", "matrix", "--changed", "--golden", golden, "--executor", "processes:1")
    assert status == 0
    assert out.splitlines()[:2] == [
        "changed: bugs/embedding",
        "6 runs of 2 mutants on 1 case repeated, and the specification there",
    ]
    written = read_matrix(golden / MATRIX_FILE)
    assert written.sources == digests(golden)
    assert written.kills["emb-scale-sqrt-d"]["float32"] == {"tiny": "embedding impossible local"}
    assert "changed since" not in refmoe("mutants", "results", "--golden", golden)[1]


def test_the_sample_writes_nothing(
    refmoe: Refmoe, golden: Path, matrix: Matrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two mutants on the tiny case, which really shows one of them."""
    names = ("emb-scale-sqrt-d", "attn-swa-off-by-one")
    monkeypatch.setattr(changes, "runnable", lambda: names)
    record(golden, stale(matrix, "bugs/embedding"))
    before = (golden / MATRIX_FILE).read_bytes()
    values = json.loads(refmoe("mutants", "matrix", "--sample", "--golden", golden, "--json")[1])
    assert values["changed"] == ["bugs/embedding"]
    assert values["runs"] == 9
    assert {each["mutant"] for each in values["lost"]} == {"attn-swa-off-by-one"}
    assert (golden / MATRIX_FILE).read_bytes() == before


def test_a_recorded_kill_that_does_not_happen_is_reported(refmoe: Refmoe, golden: Path, matrix: Matrix) -> None:
    """Sabotage: the file says that rounding which the policy itself does is seen."""
    matrix.kills["prec-combine-lowprec"]["bfloat16"] = {"tiny": PLACE}
    record(golden, stale(matrix, "bugs/precision"))
    before = (golden / MATRIX_FILE).read_bytes()
    status, out, _ = refmoe("mutants", "matrix", "--changed", "--golden", golden, "--executor", "processes:1")
    assert status == 1
    lost = f"mutant prec-combine-lowprec on case tiny in bfloat16: was seen ({PLACE}), but now inert"
    assert f"FAIL  {lost}" in out.splitlines()
    # the tiny case has no overflow: recorded as killed there, and alive now
    assert "FAIL  mutant prec-fp16-ffn-overflow lives in bfloat16: no case kills it" in out.splitlines()
    (golden / MATRIX_FILE).write_bytes(before)
    values = json.loads(
        refmoe("mutants", "matrix", "--changed", "--golden", golden, "--executor", "processes:1", "--json")[1]
    )
    assert {each["mutant"] for each in values["lost"]} == {"prec-combine-lowprec", "prec-fp16-ffn-overflow"}
    assert lost in values["problems"]


def test_changed_vectors_are_asked_again(refmoe: Refmoe, golden: Path, matrix: Matrix) -> None:
    pytest.importorskip("mistral_common")
    record(golden, stale(matrix, "vectors/sampler"))
    status, out, _ = refmoe("mutants", "matrix", "--changed", "--golden", golden)
    assert status == 1
    assert "FAIL  mutant tok-double-bos on vectors/some.json: was seen (a-vector), but now right" in out.splitlines()


def test_changed_goes_with_no_choice_of_what_to_run(refmoe: Refmoe, golden: Path) -> None:
    status, _, err = refmoe("mutants", "matrix", "--changed", "--golden", golden, "--dtype", "float32")
    assert status == 2
    assert "no --case, --mutant or --dtype was expected beside it" in err


# ---- computing it


def test_a_part_is_printed_and_nothing_is_written(refmoe: Refmoe, golden: Path) -> None:
    arguments = ["mutants", "matrix", "--golden", golden, "--executor", "processes:1", "--mutant", "emb-scale-sqrt-d"]
    status, out, _ = refmoe(*arguments, "--dtype", "float32")
    assert status == 0
    assert [line.split()[:4] for line in out.splitlines()] == [
        ["-", "tiny", "float32", "conformant"], ["emb-scale-sqrt-d", "tiny", "float32", "not"],
    ]  # fmt: skip
    assert not (golden / MATRIX_FILE).exists()
    assert refmoe("mutants", "matrix", "--golden", golden, "--mutant", "no-such")[0] == 2


def test_the_whole_is_written_and_entered_in_the_manifest(
    refmoe: Refmoe, golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sabotage as well: of the mutants that are not run, each lives, and is named."""
    pytest.importorskip("mistral_common")
    write_folder_manifest(golden)
    (golden / "notes.md").write_text("A file that no manifest knows.")
    monkeypatch.setattr(command, "runnable", lambda: ("emb-scale-sqrt-d", "attn-swa-off-by-one"))
    status, out, _ = refmoe("mutants", "matrix", "--golden", golden, "--executor", "processes:1")
    assert status == 1
    assert "FAIL  mutant attn-swa-off-by-one lives in float32, bfloat16, float16: no case kills it" in out.splitlines()
    assert "mutant emb-scale-sqrt-d lives" not in out
    assert "the specification itself fails" not in out
    written: Any = read_matrix(golden / MATRIX_FILE)
    assert written.kills["emb-scale-sqrt-d"]["bfloat16"] == {"tiny": "embedding impossible local"}
    assert len(written.outside) == 17
    assert MATRIX_FILE in (golden / MANIFEST_FILE).read_text()
    assert [difference.what for difference in verify_documents(golden)] == [
        f"{golden / 'notes.md'}: an unexpected file"
    ]
