# SPDX-License-Identifier: Apache-2.0
"""Cases with quantised weights: an engine is judged on the numbers that the file defines, and no others."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from refmoe.engines.results import Results, read_results
from tests.command_line import Refmoe
from tests.engines.running import HONEST

CASE = "production-head-32"
OWN_POLICY = ("--policy", "float32")
"""The policy of an engine that makes no codes of inputs."""
HAS_GGUF = pytest.mark.skipif(find_spec("gguf") is None, reason="gguf not installed: pip install -e '.[test]'")
engine = pytest.mark.skipif(
    find_spec("xllamacpp") is None, reason="xllamacpp not installed: pip install -e '.[llama-cpp]'"
)
OWN_WEIGHTS = f"""
import sys
sys.path.insert(0, {str(Path(HONEST[1]).parent)!r})
import honest

def load(checkpoint, dtype):
    from pathlib import Path
    from refmoe.suite import read_case
    case = read_case(Path({str(Path(__file__).parents[2] / "golden" / CASE)!r}))
    honest.loaded.update(checkpoint=case.checkpoint(), dtype=dtype)

honest.load = load
honest.converse(honest.answer)
"""
"""A harness whose engine computes with the weights before they were quantised."""


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])


def ran(refmoe: Refmoe, out: Path, status: int, *arguments: Any, harness: tuple[str, ...] = (*HONEST,)) -> Results:
    given = ("conform", "--case", CASE, "--dtype", "float32", "--no-diagnose", *arguments, "--out", out)
    found, said, error = refmoe(*given, "--", *harness)
    assert found == status, said + error
    return read_results(out)


def test_an_engine_is_judged_on_the_weights_of_the_folder(refmoe: Refmoe, tmp_path: Path) -> None:
    out, keep = tmp_path / "r.json", tmp_path / "kept"
    results = ran(refmoe, out, 0, "--quantise", "fp8-block128", *OWN_POLICY, "--keep", keep)
    assert results.quantised == "fp8-block128"
    assert [each.verdict for each in results.outcomes] == ["conformant"]
    assert not results.outcomes[0].golden_bits
    assert "fp8-block128" in refmoe("scoreboard", out)[1]
    (trace,) = keep.iterdir()
    assert refmoe("verify", trace)[0] == 2, "its model is that of no golden case"
    own = ran(refmoe, out, 1, "--quantise", "fp8-block128", *OWN_POLICY, harness=(HONEST[0], "-c", OWN_WEIGHTS))
    assert [each.verdict for each in own.outcomes] == ["not conformant"]


def test_results_of_other_weights_are_not_gone_on_with(refmoe: Refmoe, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    ran(refmoe, out, 0, "--quantise", "fp8-channel", *OWN_POLICY)
    given = ("conform", "--case", CASE, "--dtype", "float32", "--no-diagnose", "--out", out, "--resume", "--")
    assert refmoe(*given, *HONEST)[0] == 2
    values = json.loads(out.read_text(encoding="utf-8"))
    out.write_text(json.dumps(values | {"quantised": "fp9"}), encoding="utf-8")
    assert refmoe("scoreboard", out)[0] == 2


@HAS_GGUF
def test_a_gguf_file_and_the_codes_of_its_engine(refmoe: Refmoe, tmp_path: Path) -> None:
    """An engine that reads the file and makes no codes is legal under float32. Nobody guesses which policy is right."""
    out = tmp_path / "r.json"
    assert ran(refmoe, out, 0, "--format", "gguf:Q8_0", *OWN_POLICY).outcomes[0].policy == "float32"
    by_codes = ran(refmoe, out, 0, "--format", "gguf:Q8_0", "--policy", "llama.cpp-quantised")
    assert by_codes.outcomes[0].policy == "llama.cpp-quantised", "few of its taps are inputs of products"


@pytest.mark.parametrize("given", [("--format", "gguf:Q8_0"), ("--quantise", "int8-channel")])
def test_a_policy_without_a_word_about_codes_is_no_guess(given: tuple[str, ...], refmoe: Refmoe) -> None:
    status, said, error = refmoe("conform", "--case", CASE, "--dtype", "float32", *given, "--", *HONEST)
    assert (status, said) == (2, "")
    assert "--policy" in error


@HAS_GGUF
def test_a_case_that_the_format_cannot_hold_is_skipped(refmoe: Refmoe, tmp_path: Path) -> None:
    """Those with a window, and those without whole blocks."""
    out = tmp_path / "r.json"
    cases = ("--case", "production-window-lengths", "--case", "walking-skeleton")
    results = ran(refmoe, out, 0, *cases, "--format", "gguf:Q8_0", *OWN_POLICY)
    verdicts = {each.case: each.verdict for each in results.outcomes}
    assert verdicts == {CASE: "conformant", "production-window-lengths": "skipped", "walking-skeleton": "skipped"}
    assert results.smoke.startswith("case production-")


def test_one_way_to_quantise_is_enough(refmoe: Refmoe) -> None:
    both = ("--format", "gguf:Q8_0", "--quantise", "fp8-channel")
    assert refmoe("conform", *both, "--", *HONEST)[0] == 2
    assert refmoe("conform", "--format", "Q8_0", "--", *HONEST)[0] == 2


@pytest.mark.slow
def test_another_process_judges_on_the_same_weights(refmoe: Refmoe, tmp_path: Path) -> None:
    found = ran(refmoe, tmp_path / "r.json", 0, "--quantise", "fp8-block128", *OWN_POLICY, "--executor", "processes:1")
    assert [each.verdict for each in found.outcomes] == ["conformant"]


@engine
@pytest.mark.slow
@pytest.mark.parametrize("form", ["gguf:Q8_0", "gguf:Q4_K_M", "gguf:MXFP4_MOE"])
def test_llama_cpp_conforms_on_quantised_cases(form: str, refmoe: Refmoe, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    given = ("conform", "--case", CASE, "--adapter", "llama_cpp", "--format", form, "--out", out)
    assert refmoe(*given)[0] == 0
    (outcome,) = read_results(out).outcomes
    assert (outcome.verdict, "F16.input=float16" in outcome.policy) == ("conformant", True)
