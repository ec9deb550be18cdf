# SPDX-License-Identifier: Apache-2.0
"""The parts of the matrix to compute again after a change, the currency of the record, and the recorded matrix."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmoe.bugs.catalogue import MUTANTS
from refmoe.suite import Case, find_cases, read_case
from refmoe.suite.matrix import dependencies as sources
from refmoe.suite.matrix.changes import (
    RENEW,
    gains,
    losses,
    outside_changed,
    plan,
    revised_matrix,
    sample,
    witnesses,
)  # fmt: skip
from refmoe.suite.matrix.compute import compute
from refmoe.suite.matrix.dependencies import code_of
from refmoe.suite.matrix.file import MATRIX_FILE, Matrix, read_matrix
from refmoe.suite.matrix.outcomes import POLICIES, SPECIFICATION, Work, runnable
from refmoe.suite.matrix.summary import summarise
from refmoe.suite.matrix.surroundings import judge_outside
from tests.bugs.judging import GOLDEN
from tests.bugs.sample_matrix import PLACE, all_killed, golden_folder, killed

Killers = dict[str, frozenset[str]]
CASES = "abcdef"


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return golden_folder(tmp_path, "tiny", "other")


@pytest.fixture
def cases(golden: Path) -> dict[str, Case]:
    return {folder.name: read_case(folder) for folder in find_cases(golden)}


def pairs(work: Collection[Work]) -> set[tuple[str, str, str]]:
    """The runs: mutant, case, policy."""
    return {(name, each.case.name, each.policy) for each in work for name in each.mutants}


# ---- witnesses


def price(chosen: dict[str, str], costs: dict[str, int]) -> int:
    """A run for each mutant, and one of the specification on each case."""
    return sum(costs[case] for case in chosen.values()) + sum(costs[case] for case in {*chosen.values()})


@given(
    st.dictionaries(st.sampled_from("uvwxyz"), st.frozensets(st.sampled_from(CASES))),
    st.tuples(*[st.integers(1, 9)] * len(CASES)),
)
def test_each_mutant_has_a_witness_that_kills_it(killers: Killers, costs: tuple[int, ...]) -> None:
    found = witnesses(killers, dict(zip(CASES, costs, strict=True)))
    assert {*found} == {mutant for mutant, by in killers.items() if by}
    assert all(found[mutant] in killers[mutant] for mutant in found)


def test_one_cheap_case_for_all_rather_than_one_for_each() -> None:
    killers = {"u": "ab", "v": "ac", "w": "ad", "x": "e"}
    assert witnesses(killers, dict.fromkeys("abcde", 1)) == {"u": "a", "v": "a", "w": "a", "x": "e"}
    cheap = {"a": 100, "b": 1, "c": 1, "d": 1, "e": 1}
    assert witnesses(killers, cheap) == {"u": "b", "v": "c", "w": "d", "x": "e"}
    assert price(witnesses(killers, cheap), cheap) < price(dict.fromkeys("uvw", "a") | {"x": "e"}, cheap)


# ---- what a change calls for


def test_nothing_changed_nothing_to_run(golden: Path, cases: dict[str, Case]) -> None:
    matrix = all_killed(golden)
    assert sources.changed(matrix.sources, golden) == set()
    assert plan(matrix, set(), cases) == []


def test_the_sample_runs_each_mutant_once_per_policy(golden: Path, cases: dict[str, Case]) -> None:
    assert pairs(sample(all_killed(golden), cases)) == {
        (name, "tiny", policy) for name in runnable() for policy in POLICIES if policy not in MUTANTS[name].unseen
    }


def test_after_a_change_of_the_core_everything_runs(golden: Path, cases: dict[str, Case]) -> None:
    found = pairs(plan(all_killed(golden), {"core"}, cases))
    assert found == {(name, case, policy) for name in runnable() for case in cases for policy in POLICIES}


def test_after_a_change_of_the_catalogue_its_mutants_run_everywhere(golden: Path, cases: dict[str, Case]) -> None:
    rope = {name for name in runnable() if MUTANTS[name].kind == "rope"}
    found = pairs(plan(all_killed(golden), {"bugs/rope"}, cases))
    assert found == {(name, case, policy) for name in rope for case in cases for policy in POLICIES}


def test_after_a_change_of_a_case_all_mutants_run_there(golden: Path, cases: dict[str, Case]) -> None:
    found = pairs(plan(all_killed(golden), {"cases/other"}, cases))
    assert found == {(name, "other", policy) for name in runnable() for policy in POLICIES}
    assert plan(all_killed(golden), {"cases/gone"}, cases) == []


def test_words_change_no_digest_and_code_does(tmp_path: Path) -> None:
    source = '''"""A file."""

def f(x):  # a comment
    """Returns \'\'\'x\'\'\' and "more"."""
    y = "# no comment", f"{x} # nor here"
    return y
A = 1
"""About A."""
'''
    reworded = source.replace("A file", "Another file").replace("a comment", "more words").replace("About A", "Of A")
    reworded = reworded.replace("def f", "# a block\n# of comments\n\n\ndef f")
    assert code_of(source) == code_of(reworded)
    assert 'y = "# no comment", f"{x} # nor here"' in code_of(source)
    for old, new in (("no comment", "other"), ("nor here", "there"), ("A = 1", "A = 2"), ("return y", "return x")):
        assert code_of(source.replace(old, new)) != code_of(source)


def test_a_changed_file_is_found(golden: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recorded = sources.digests(golden)
    (golden / "tiny" / "case.toml").write_text((golden / "other" / "case.toml").read_text() + "\n")
    assert sources.changed(recorded, golden) == {"cases/tiny"}
    assert sources.changed({**recorded, "bugs/gone": "00"}, golden) == {"cases/tiny", "bugs/gone"}
    package = tmp_path / "package" / "bugs" / "catalogue"
    package.mkdir(parents=True)
    (package / "one.py").write_text("a = 1\n")
    (package / "two.py").write_text("from refmoe.bugs.catalogue.one import a\n")
    monkeypatch.setattr(sources, "PACKAGE", tmp_path / "package")
    before = sources.digests(golden)
    (package / "one.py").write_text("a = 2\n")
    assert sources.changed(before, golden) == {"bugs/one", "bugs/two"}


def test_the_tokenizers_are_judged_again_only_where_they_can_have_changed() -> None:
    for part in ("surroundings", "bugs/tokenizer", "bugs/aux_loss", "vectors/sampler"):
        assert outside_changed({part})
    assert not outside_changed({"core", "bugs/rope", "cases/tiny"})


IRRELEVANT = (
    "", "arithmetic.native.lanes", "arithmetic.native.slabs", "bugs", "checkpoints", "checkpoints.foreign_fields",
    "checkpoints.ggml_blocks", "checkpoints.ggml_quantise", "checkpoints.gguf_file", "checkpoints.gguf_load",
    "checkpoints.hf", "checkpoints.load", "checkpoints.mistral", "checkpoints.names", "checkpoints.quantisation",
    "checkpoints.rows", "checkpoints.scaled", "checkpoints.size", "checkpoints.write", "cuda", "cuda.device",
    "cuda.memory", "cuda.place", "errors", "files", "files.atomic", "files.foreign", "files.gguf_tensors",
    "files.json_file", "files.lock",
    "files.numbers", "files.parsing", "files.reading", "files.safetensors_file", "files.scratch", "files.sentences",
    "files.writable", "jobs",
    "jobs.emission", "jobs.estimate", "jobs.job", "jobs.layerwise", "jobs.parts", "jobs.source", "jobs.spread",
    "parallel", "routers", "routers.literature", "steps.native", "steps.native_attention", "steps.native_cache",
    "suite", "suite.activations", "suite.checking", "suite.digests", "suite.emission", "suite.fingerprint",
    "suite.manifest", "suite.matrix",
)  # fmt: skip
"""Modules that are loaded where mutants are judged, and on which no outcome depends."""


def test_whatever_judges_is_among_the_sources() -> None:
    """Every module that is loaded there is in the core, the surroundings or the catalogue, or stated to be harmless."""
    code = (
        "import sys, refmoe.suite.matrix.outcomes, refmoe.suite.matrix.surroundings as _\n"
        "print(*(name for name in sys.modules if name.partition('.')[0] == 'refmoe'))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert len(loaded) > 50
    known = {*sources.files_of([*sources.CORE, *sources.SURROUNDINGS, "bugs/catalogue"])}
    irrelevant = {f"refmoe.{name}".removesuffix(".") for name in IRRELEVANT}
    for name in {*loaded} - irrelevant:
        path = sources.PACKAGE.parent / name.replace(".", "/")
        assert {path.with_suffix(".py"), path / "__init__.py"} & known, name
    assert irrelevant <= {*loaded}


# ---- what it says of the record


def test_a_kill_that_does_not_happen_again_is_reported(golden: Path) -> None:
    """Sabotage: the record claims that a bug without a window to be wrong about is killed."""
    matrix, name = all_killed(golden), "attn-swa-off-by-one"
    outcomes = compute([Work(golden / "tiny", "float32", (name, "emb-scale-sqrt-d"))], executor="processes:1")
    found = losses(matrix, outcomes, matrix.outside)
    assert [str(loss) for loss in found] == [
        f"mutant {name} on case tiny in float32: was seen ({PLACE}), but now inert"
    ]  # fmt: skip
    revised = revised_matrix(matrix, outcomes, matrix.outside, matrix.sources)
    assert summarise(revised, ["tiny"]).alive == {"float32": (name,), "bfloat16": (), "float16": ()}
    assert revised.kills["emb-scale-sqrt-d"]["float32"] == {"tiny": "embedding impossible local"}
    assert revised.kills["emb-scale-sqrt-d"]["float16"] == {"tiny": PLACE}


def test_a_vector_that_catches_a_bug_no_more_is_reported(golden: Path) -> None:
    matrix, bug = all_killed(golden), "tok-double-bos"
    seen = matrix.outside | {bug: {"vectors/some.json": ["another"]}}
    assert [str(loss) for loss in losses(matrix, [], seen)] == [
        f"mutant {bug} on vectors/some.json: was seen (a-vector), but now right"
    ]
    lost = {name: places for name, places in matrix.outside.items() if name != bug}
    problems = summarise(replace(matrix, outside=lost), ["tiny"]).problems
    assert problems == [f"mutant {bug} lives: it gets every vector right"]


def test_a_new_kill_is_no_loss(golden: Path) -> None:
    matrix, outcomes = all_killed(golden), [killed("attn-gqa-tile", "other"), killed("attn-gqa-tile", "tiny")]
    assert losses(matrix, outcomes, matrix.outside) == []
    assert gains(matrix, outcomes) == outcomes[:1]


# ---- the matrix of this repository


@pytest.fixture(scope="module")
def real() -> Matrix:
    return read_matrix(GOLDEN / MATRIX_FILE)


def test_the_matrix_is_current(real: Matrix) -> None:
    """A proof that is out of date proves nothing."""
    parts = sources.changed(real.sources, GOLDEN)
    assert not parts, (
        f"golden/matrix.json is older than {', '.join(sorted(parts))}: run `{RENEW}` and commit the result"
    )


@pytest.mark.parametrize(
    "policy", [*POLICIES[:2], *(pytest.param(each, marks=pytest.mark.slow) for each in POLICIES[2:])]
)
def test_a_sample_of_the_matrix_is_as_recorded(real: Matrix, policy: str) -> None:
    """`refmoe mutants matrix --sample`: each mutant on a case that killed it, and the specification there."""
    named = {folder.name: read_case(folder) for folder in find_cases(GOLDEN)}
    outcomes = compute([each for each in sample(real, named) if each.policy == policy], executor="processes:1")
    assert len(outcomes) > 80
    assert [str(loss) for loss in losses(real, outcomes, real.outside)] == []
    assert not any(each.killed for each in outcomes if each.mutant == SPECIFICATION)


def test_the_vectors_catch_what_they_are_recorded_to_catch(real: Matrix) -> None:
    pytest.importorskip("mistral_common")
    seen = judge_outside(GOLDEN)
    assert losses(real, [], seen) == []
    assert summarise(replace(real, outside=seen), real.cases).outside_alive == ()


def test_every_mutant_is_killed_by_the_recorded_matrix_unless_nothing_can_show_it(real: Matrix) -> None:
    summary = summarise(real, real.cases)
    assert summary.problems == []
    for policy in POLICIES:  # the reasons say that they change no bit of any case
        assert not any(real.lives.get(name, {}).get(policy) for name in summary.unseen[policy])


def test_a_case_shows_the_bugs_that_it_lists(real: Matrix) -> None:
    """In one dtype at least: some effects are too small for the others."""
    cases = [read_case(folder) for folder in find_cases(GOLDEN)]
    listed = [(case.name, bug) for case in cases for bug in case.bugs if bug in runnable()]
    assert len(listed) > 100
    unseen = [(name, bug) for name, bug in listed if not any(name in real.killers(bug, p) for p in POLICIES)]
    assert unseen == []
