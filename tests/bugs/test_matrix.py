# SPDX-License-Identifier: Apache-2.0
"""The matrix: how it is computed, what it says in short, and its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.mutant import SAMPLER
from refmoe.errors import InputError
from refmoe.suite.matrix import surroundings as outside_module
from refmoe.suite.matrix.compute import compute
from refmoe.suite.matrix.file import MATRIX_FILE, read_matrix, to_matrix, write_matrix
from refmoe.suite.matrix.outcomes import INERT, POLICIES, SPECIFICATION, Outcome, Work, runnable, whole
from refmoe.suite.matrix.summary import summarise
from refmoe.suite.matrix.surroundings import broken_laws, judge_outside, outside
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT, LOCAL, NOT_CONFORMANT
from tests.bugs.judging import GOLDEN
from tests.bugs.sample_matrix import PLACE, all_killed, golden_folder, killed


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return golden_folder(tmp_path)


# ---- running


def test_a_case_is_judged_as_a_foreign_engine_would_be(golden: Path) -> None:
    """The specification passes, a wrong scale is killed where it is, and a bug that needs a window changes nothing."""
    names = ["attn-swa-off-by-one", "emb-scale-sqrt-d"]
    found = compute(whole([golden / "tiny"], names, ["bfloat16"]), executor="processes:1")
    assert found == [
        Outcome(SPECIFICATION, "tiny", "bfloat16", CONFORMANT),
        Outcome("attn-swa-off-by-one", "tiny", "bfloat16", INERT),
        Outcome("emb-scale-sqrt-d", "tiny", "bfloat16", NOT_CONFORMANT, step="embedding", by="impossible", rung=LOCAL),
    ]


def test_the_longest_work_begins_first(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[str, int]] = []

    def judged(work: Work) -> list[Outcome]:
        begun.append((work.case.name, len(work.mutants)))
        return []

    monkeypatch.setattr("refmoe.suite.matrix.compute.judge_case", judged)
    cases = [GOLDEN / name for name in ("one-pair", "mini-8x7b", "four-layers")]
    compute([*whole(cases, ["a"], ["float32"]), *whole(cases[1:2], ["a", "b"], ["float32"])], "processes:1")
    assert begun == [("mini-8x7b", 2), ("mini-8x7b", 1), ("four-layers", 1), ("one-pair", 1)]


@pytest.mark.parametrize(("name", "policy"), [(each.id, p) for each in MUTANTS.values() for p in each.unseen])
def test_what_nothing_can_show_changes_no_bit(name: str, policy: str) -> None:
    """The reasons say that the policy does the same: so it does, also where overflow or rounding is the point."""
    folders = [GOLDEN / case for case in ("skewed-weights", "huge-activations", "near-tie-logits")]
    outcomes = compute(whole(folders, [name], [policy]), executor="processes:1")
    assert {each.verdict for each in outcomes if each.mutant == name} == {INERT}


def test_every_reason_names_a_policy_and_the_size_of_the_effect() -> None:
    for each in MUTANTS.values():
        assert {*each.unseen} <= {*POLICIES}
        assert not (each.unseen and each.equivalent)
        assert all("values" in reason and len(reason) > 100 for reason in each.unseen.values())


# ---- tokenizer, sampler, loss


def test_every_mutant_outside_of_the_forward_pass_gets_something_wrong_and_the_right_ones_nothing() -> None:
    pytest.importorskip("mistral_common")
    found = judge_outside(GOLDEN)
    assert {*found} == {*outside()}
    assert all(names for places in found.values() for names in places.values())


def test_a_sampler_that_is_wrong_is_a_false_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: the specification's own sampler is that of a mutant."""
    pytest.importorskip("mistral_common")
    wrong = MUTANTS["samp-penalty-negative-logit"].function
    monkeypatch.setattr(outside_module, "RIGHT", {**outside_module.RIGHT, SAMPLER: wrong})
    found = judge_outside(GOLDEN)
    assert found[SPECIFICATION] == {
        "vectors/sampler.json": found["samp-penalty-negative-logit"]["vectors/sampler.json"]
    }
    assert broken_laws(MUTANTS["aux-leaks-into-inference"].function)


def test_vectors_over_a_vocabulary_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("mistral_common")
    folder = tmp_path / "vectors"
    folder.mkdir()
    text = (GOLDEN / "vectors" / "tokenizer-v1.json").read_text()
    name = "tokenizer.model.v1"
    (folder / "tokenizer-v1.json").write_text(text.replace(f'"{name}"', '"no.model"'))
    with pytest.raises(InputError, match=r"no\.model: is missing, but [0-9a-f]{64} was expected"):
        judge_outside(tmp_path)
    monkeypatch.setattr(outside_module, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="pip install 'refmoe\\[test\\]'"):
        judge_outside(tmp_path)


# ---- in short


def test_a_matrix_without_problems(golden: Path) -> None:
    summary = summarise(all_killed(golden), ["other", "tiny"])
    assert summary.problems == []
    assert summary.killed["float32"] == summary.mutants == len(runnable())
    assert summary.killed["bfloat16"] == summary.mutants - 2
    assert {*summary.unseen["float16"]} == {"prec-combine-lowprec", "prec-fp16-ffn-overflow"}
    assert summary.redundant == ("other",)
    assert summary.unique == {"tiny": sum(summary.killed.values())}
    assert summary.mutants + summary.outside + len(summary.equivalent) == len(MUTANTS) == 138
    assert len(summary.dead) == 136


def test_whoever_lives_and_whatever_fails_is_a_problem(golden: Path) -> None:
    """Sabotage: a mutant that no case kills, one that only a case that is gone kills, a reason that is refuted, and a
    specification that fails."""
    matrix = all_killed(golden)
    del matrix.kills["rope-sign-flipped"]["float16"]
    matrix.kills["attn-gqa-tile"]["bfloat16"] = {"gone": PLACE}
    matrix.kills["prec-combine-lowprec"]["float16"] = {"tiny": PLACE}
    matrix.kills[SPECIFICATION] = {"float32": {"tiny": PLACE}}
    matrix.outside[SPECIFICATION] = {"vectors/some.json": ["a-vector"]}
    summary = summarise(matrix, ["tiny"])
    assert summary.problems == [
        "the specification itself fails: case tiny in float32",
        "the specification itself fails: vectors/some.json",
        "mutant attn-gqa-tile lives in bfloat16: no case kills it",
        "mutant rope-sign-flipped lives in float16: no case kills it",
        "mutant prec-combine-lowprec is killed in float16, where it is said that nothing can show it",
    ]
    assert {"attn-gqa-tile", "rope-sign-flipped"} & summary.dead == set()


# ---- the file


def test_a_matrix_is_read_as_it_was_written(tmp_path: Path) -> None:
    outcomes = [
        killed("attn-gqa-tile", "tiny"), Outcome("attn-gqa-tile", "other", "float16", CANNOT_JUDGE),
        Outcome("rope-sign-flipped", "tiny", "float16", INERT), Outcome(SPECIFICATION, "tiny", "float16", CONFORMANT),
    ]  # fmt: skip
    matrix = to_matrix(outcomes, {"tok-double-bos": {"vectors/x.json": ["a"]}}, {"core": "00", "cases/tiny": "11"})
    assert matrix.kills == {"attn-gqa-tile": {"float32": {"tiny": PLACE}}}
    assert matrix.lives == {"attn-gqa-tile": {"float16": {"other": CANNOT_JUDGE}}}
    assert matrix.cases == ("tiny",)
    write_matrix(tmp_path / MATRIX_FILE, matrix)
    assert read_matrix(tmp_path / MATRIX_FILE) == matrix
    values = json.loads((tmp_path / MATRIX_FILE).read_text())
    assert "two terms commute" in values["equivalent"]["prec-nondeterministic-combine"]
    assert {*values["unseen"]["prec-combine-lowprec"]} == {"bfloat16", "float16"}


REFUSED: dict[str, tuple[Any, str]] = {
    "format_version": ("2", '\'format_version\' is "2", but "1" was expected'),
    "policies": (["float32"], '\'policies\' is ["float32"], but ["float32", "bfloat16", "float16"] was expected'),
    "kills": ([], "'kills' is [], but an object was expected"),
    "lives": (
        {"a": {"float32": {"tiny": "dead"}}},
        "'lives.a.float32.tiny' is \"dead\", but one of conformant, cannot",
    ),
    "outside": ({"a": {"vectors/x.json": []}}, "'outside.a.vectors/x.json' is [], but a list of the names of vectors"),
    "sources": ({"core": 1}, "'sources.core' is 1, but a string was expected"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_file_that_is_not_as_expected_is_refused_with_its_field(golden: Path, field: str) -> None:
    path = golden / MATRIX_FILE
    write_matrix(path, all_killed(golden))
    values = json.loads(path.read_text())
    value, sentence = REFUSED[field]
    for changed, expected in (
        (values | {field: value}, sentence),
        ({k: v for k, v in values.items() if k != field}, f"'{field}' is missing, but a value was expected"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(InputError) as caught:
            read_matrix(path)
        assert str(caught.value).startswith(f"{path}: {expected}")


@pytest.mark.parametrize(
    ("kills", "sentence"),
    [
        ({"a": {"float8": {}}}, "'kills.a.float8' is {}, but only float32, bfloat16, float16 were expected"),
        ({"a": {"float32": {"b": "step often local"}}}, "a step, one of impossible, improbable, routing, and a rung"),
        ({"a": {"float32": {"b": "step impossible"}}}, "a step, one of impossible, improbable, routing, and a rung"),
        ({"a": {"float32": "b"}}, "'kills.a.float32' is \"b\", but an object was expected"),
    ],
)
def test_kills_that_are_none_are_refused(golden: Path, kills: Any, sentence: str) -> None:
    path = golden / MATRIX_FILE
    write_matrix(path, all_killed(golden))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kills": kills}))
    with pytest.raises(InputError) as caught:
        read_matrix(path)
    assert sentence in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"matrix\.json: no such file; `refmoe mutants matrix --golden .*` writes it"):
        read_matrix(tmp_path / MATRIX_FILE)
