# SPDX-License-Identifier: Apache-2.0
"""``refmoe conform``: harnesses, adapters, other environments, known failures, files."""

from __future__ import annotations

import json
import os
import shlex
import sys
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest

from refmoe.api.conforming import whole_verdict
from refmoe.engines.known import sort_failures
from refmoe.engines.process import CRASHED
from refmoe.engines.results import SKIPPED, Engine, Outcome, Results, read_results
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT, NOT_CONFORMANT
from tests.command_line import Refmoe
from tests.engines.running import HONEST, hostile

CASES = ("--case", "window-1", "--case", "top-1")
FLOAT32 = ("--dtype", "float32")


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])


def test_an_honest_harness_is_conformant(refmoe: Refmoe, tmp_path: Path) -> None:
    """Two runs give the same bytes in the file of results."""
    out = tmp_path / "honest.json"
    texts = []
    for _ in range(2):
        status, said, _ = refmoe("conform", *CASES, "--out", out, "--", *HONEST)
        assert status == 0, said
        texts.append(out.read_text())
    assert texts[0] == texts[1]
    assert "4 outcomes: 4 conformant" in said
    results = read_results(out)
    assert (results.engine.name, results.engine.version) == ("honest", "1.0")
    assert results.engine.options == {"command": shlex.join(HONEST)}
    assert results.smoke == "case window-1 in float32, twice"
    assert [(each.case, each.dtype) for each in results.outcomes] == [
        ("top-1", "float32"), ("top-1", "bfloat16"), ("window-1", "float32"), ("window-1", "bfloat16")
    ]  # fmt: skip
    assert set(results.outcomes[0].worst_errors) == {"embedding", "moe_norm", "residual", "logits"}
    assert all(error <= 1 for each in results.outcomes for error in each.worst_errors.values())


def test_a_wrong_engine_is_named_and_explained(refmoe: Refmoe) -> None:
    command = hostile("rounds_to_bfloat16", "top-1")
    status, out, _ = refmoe("conform", *CASES, *FLOAT32, "--", *command)
    assert status == 1
    assert "top-1 float32: not conformant: first wrong step prefill/logits" in out
    assert "2 outcomes: 1 conformant, 1 not conformant" in out
    status, out, _ = refmoe("conform", *CASES, *FLOAT32, "--json", "--", *command)
    values = json.loads(out)
    assert (status, values["status"], values["failing"]) == (1, 1, [{"case": "top-1", "dtype": "float32"}])
    outcome = values["results"]["outcomes"][0]
    assert outcome["first_wrong"] == {"run": "prefill", "tap": "logits"}
    assert outcome["worst_errors"]["logits"] > 1


def test_the_smoke_test_is_at_a_dtype_that_is_run(refmoe: Refmoe) -> None:
    status, out, err = refmoe("conform", "--case", "top-1", "--dtype", "bfloat16", "--", *HONEST)
    assert status == 0, err
    assert "smoke test: case window-1 in bfloat16, twice" in out


def test_another_policy_can_be_declared(refmoe: Refmoe) -> None:
    command = hostile("rounds_to_bfloat16", "*")
    for name, status in (("float32", 1), ("float32+logits=bfloat16", 0)):
        arguments = ("conform", "--case", "top-1", *FLOAT32, "--policy", name, "--", *command)
        assert refmoe(*arguments)[0] == status, name


def test_what_is_known_to_fail_is_no_failure_until_it_passes(refmoe: Refmoe, tmp_path: Path) -> None:
    known = tmp_path / "known.toml"
    entry = '[[known]]\nengine = "honest"\ncase = "top-1"\ndtype = "float32"\nreason = "no GPU"\n'
    known.write_text(f'format_version = "1"\n{entry}')
    arguments = ("conform", *CASES, *FLOAT32, "--known", known, "--")
    status, out, _ = refmoe(*arguments, *hostile("exits", "top-1"))
    assert status == 0, out
    assert "top-1 float32: known to fail: no GPU" in out
    status, out, _ = refmoe(*arguments, *HONEST)
    assert status == 1
    assert "top-1 float32: conformant, but listed as known to fail: no GPU" in out


def test_the_end_of_standard_error_is_shown(refmoe: Refmoe, tmp_path: Path) -> None:
    script = "import sys; sys.path.insert(0, '.'); from tests.engines.harnesses import honest; "
    script += "honest.converse(lambda r: honest.answer(r) if r['command'] == 'start' else sys.exit('no \\x1b[31mGPU'))"
    status, out, _ = refmoe("conform", "--case", "top-1", *FLOAT32, "--", sys.executable, "-c", script)
    assert status == 1
    assert "top-1 float32: crashed" in out
    assert "no \\x1b[31mGPU" in out


def test_a_harness_that_does_not_start_is_status_2_with_its_last_words(refmoe: Refmoe) -> None:
    status, out, err = refmoe("conform", "--", sys.executable, "-c", "import sys; sys.exit('no \\x1b[31mGPU')")
    assert (status, out) == (2, "")
    assert err.splitlines()[0] == "  no \\x1b[31mGPU"
    assert err.splitlines()[1].startswith("refmoe: harness '")
    assert err.endswith("cannot be used: it ended with status 1 before it answered to start\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "exactly one of --adapter NAME and -- COMMAND was expected"),
        (("--adapter", "transformers", "--", "./x"), "exactly one of --adapter NAME and -- COMMAND was expected"),
        (("--option", "a=b", "--", "./x"), "--option and --python are about an adapter"),
        (("--adapter", "transformers", "--option", "eager"), "option 'eager': key=value was expected"),
        (("--case", "no-such", "--", "./x"), "case 'no-such' is unknown"),
        (("--policy", "float32", "--policy", "hf-float32", "--", "./x"), "stores float32, as float32 does"),
        (("--policy", "nonsense", "--", "./x"), "policy 'nonsense' is unknown"),
        (("--golden", "tests", "--", "./x"), "tests: no case is there"),
        (("--golden", "tests", "--", "./x"), "--golden DIR says where they are"),
        (("--known", "no-such.toml", "--", "./x"), "no-such.toml: no such file"),
        (("--out", "no-such/folder.json", "--", "./x"), "no-such/folder.json: cannot be written"),
        (("--out", "tests", "--", "./x"), "tests: is a folder"),
        (("--", "./no-such-harness"), "'./no-such-harness' cannot be started: No such file or directory"),
        (("--dtype", "float64", "--", *HONEST), "dtype float64: honest 1.0 does not have it"),
        (("--policy", "float16", "--", *HONEST), "dtype float16: honest 1.0 does not have it"),
        (("--adapter", "nonesuch"), "adapter 'nonesuch' cannot be used: its own error at start: adapter 'nonesuch'"),
        (("--keep", "README.md", "--", "./x"), "README.md: is a file"),
        (("--keep", "no-such/folder", "--", "./x"), "no-such/folder: cannot be made: No such file or directory"),
        (("--write-ci", "github", "/tmp/x", "--", "./x"), "--write-ci needs --refmoe-from OWNER/REPOSITORY"),
        (("--refmoe-from", "me/refmoe", "--", "./x"), "--refmoe-from is about --write-ci and --sarif"),
        (("--write-ci", "github", "/tmp/x", "--refmoe-from", "refmoe", "--", "./x"), "--refmoe-from is 'refmoe', but"),
        (("--write-ci", "shell", "/tmp/x", "--refmoe-from", "a/b@c d", "--", "./x"), "--refmoe-from is 'a/b@c d', but"),
        (("--source", "README.md", "--", "./x"), "--source is about --sarif, which was not given"),
        (("--sarif", "/tmp/alerts.sarif", "--", "./x"), "--source FILE, a file of the engine, was expected"),
        (("--sarif", "/tmp/alerts.sarif", "--source", "logit=README.md", "--", "./x"), "one of the steps embedding"),
    ],
)
def test_a_mistake_is_one_sentence(refmoe: Refmoe, arguments: tuple[str, ...], words: str) -> None:
    status, out, err = refmoe("conform", *arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert "Traceback" not in err


def test_an_adapter_that_prints_speaks_the_protocol_all_the_same(
    refmoe: Refmoe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's adapter. Taps beyond the request are ignored, and a skip is a skip."""
    monkeypatch.setenv("PYTHONPATH", ".")
    adapter = ("conform", "--adapter", "tests.engines.harnesses.loud")
    status, out, _ = refmoe(*adapter, "--option", "version=7", *CASES, "--case", "packed")
    assert status == 0, out
    assert "loud 7  version=7" in out
    assert "skipped: no float16 yet (https://example.org/16): top-1, window-1" in out
    assert "needs sequences, which the harness does not have among its abilities: packed" in out
    assert "9 outcomes: 4 conformant, 5 skipped" in out
    status, _, err = refmoe(*adapter, "--option", "speed=7", *CASES)
    assert status == 2
    assert "option 'speed'" in err


def test_a_run_that_skips_everything_is_no_success(refmoe: Refmoe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", ".")
    arguments = ("conform", "--adapter", "tests.engines.harnesses.loud", "--dtype", "float16", *CASES)
    assert refmoe(*arguments)[0] == 3


def test_the_adapter_runs_in_another_environment(
    refmoe: Refmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment has the libraries but not refmoe."""
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv/bin/python"
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    libraries = Path(find_spec("numpy").submodule_search_locations[0]).parent  # type: ignore[union-attr, index]
    (site / "libraries.pth").write_text(f"{libraries}\n")
    adapter = tmp_path / "mine/where.py"
    adapter.parent.mkdir()
    adapter.write_text(
        "import sys\nfrom tests.engines.harnesses.loud import Adapter\n"
        "Adapter.version = sys.prefix\nAdapter.__init__ = lambda self: None\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), "."]))
    status, out, err = refmoe("conform", "--adapter", "mine.where", "--python", python, *CASES, *FLOAT32)
    assert status == 0, err
    assert str(tmp_path / "venv") in out


@pytest.mark.parametrize(
    ("verdicts", "whole"),
    [
        ([CONFORMANT, SKIPPED], CONFORMANT),
        ([CONFORMANT, CANNOT_JUDGE], CANNOT_JUDGE),
        ([NOT_CONFORMANT, CANNOT_JUDGE], NOT_CONFORMANT),
        ([CONFORMANT, CRASHED], NOT_CONFORMANT),
        ([SKIPPED, SKIPPED], CANNOT_JUDGE),
    ],
)
def test_the_verdict_of_a_run_is_the_worst_that_is_sure(verdicts: list[str], whole: str) -> None:
    outcomes = [
        Outcome(case=f"case{i}", dtype="float32", policy="float32", verdict=verdict, reason="")
        for i, verdict in enumerate(verdicts)
    ]
    results = Results(
        engine=Engine("mine", "1", {}), platform={}, refmoe="0", significance=1e-6, cases={}, smoke="",
        outcomes=tuple(outcomes), notes=(),
    )  # fmt: skip
    assert whole_verdict(results, sort_failures(results, [])) == whole
