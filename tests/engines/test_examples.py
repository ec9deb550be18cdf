# SPDX-License-Identifier: Apache-2.0
"""The two example engines conform, and bugs planted in them are named. tests/docs runs the pages about them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from refmoe.engines.protocol import TAPS
from refmoe.engines.results import read_results
from refmoe.suite import find_cases
from tests.command_line import Refmoe

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
COMPILER = shutil.which("cc")
needs_cc = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler, cc")


def example(language: str, folder: Path, edit: tuple[str, str] | None = None) -> list[str]:
    """The arguments of ``refmoe conform`` for an example built in this folder.   edit: a text and its replacement"""
    source = (EXAMPLES / f"mixtral.{language}").read_text()
    if edit is not None:
        assert source.count(edit[0]) == 1
        source = source.replace(*edit)
    path = folder / "mine" / f"mixtral.{language}"
    path.parent.mkdir()
    path.write_text(source)
    if language == "py":
        return ["--adapter", "mine.mixtral"]
    command = ["cc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-O2", "-o", path.with_suffix(""), path, "-lm"]
    subprocess.run(command, check=True)
    return ["--", str(path.with_suffix(""))]


LANGUAGES = [pytest.param("py"), pytest.param("c", marks=needs_cc)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_it_is_conformant_in_every_case(
    language: str, refmoe: Refmoe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out, golden = tmp_path / "results.json", ROOT / "golden"
    status, said, err = refmoe("conform", "--golden", golden, "--out", out, *example(language, tmp_path))
    assert status == 0, said + err
    results = read_results(out)
    assert results.counts == {"conformant": len(find_cases(golden))}
    assert results.notes == ()
    assert {*results.outcomes[0].worst_errors, "router.experts"} == set(TAPS), "no tap is left out"


BUGS = [
    pytest.param(language, was, now, bug, marks=marks)
    for language, marks, edits in (
        ("py", (), {
            ("np.repeat(each, share, axis=1)", "np.tile(each, (1, share, 1))"): "attn-gqa-tile",
            ("theta ** (-np.arange(half) / half)", "1e4 ** (-np.arange(half) / half)"): "rope-theta-default",
            ("distance < (window or np.inf)", "distance <= (window or np.inf)"): "attn-swa-off-by-one",
        }),
        ("c", needs_cc, {
            ("sqrtf(mean_square + model.eps)", "(sqrtf(mean_square) + model.eps)"): "norm-eps-outside-sqrt",
            ("/ (model.heads / model.kv_heads) * d", "% model.kv_heads * d"): "attn-gqa-tile",
            ("gate[f] / (1 + expf(-gate[f])) * up[f]", "up[f] / (1 + expf(-up[f])) * gate[f]"):
                "expert-w1-w3-swapped",
        }),
    )
    for (was, now), bug in edits.items()
]  # fmt: skip


@pytest.mark.parametrize(("language", "was", "now", "bug"), BUGS)
def test_a_planted_bug_is_named(
    language: str, was: str, now: str, bug: str, refmoe: Refmoe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out, command = tmp_path / "results.json", example(language, tmp_path, (was, now))
    status, said, err = refmoe(
        "conform", "--golden", ROOT / "golden", "--case", "window-chunks", "--out", out, *command
    )
    assert status == 1, said + err
    (outcome,) = read_results(out).outcomes
    assert outcome.verdict == "not conformant"
    assert outcome.explanations[0].name == bug
    assert f"known bug: {bug}" in said


@needs_cc
def test_the_c_example_answers_what_it_cannot_do(refmoe: Refmoe, tmp_path: Path) -> None:
    """A senseless request is answered with an error, and the next request is answered as well."""
    assert refmoe("materialise", "one-pair", tmp_path / "model", "--golden", ROOT / "golden")[0] == 0
    good = {"run": "r", "op": "prefill", "sequence": 0, "tokens": [1], "positions": [0], "past": 0}
    run = {"command": "run", "runs": [good], "taps": ["logits"], "out": str(tmp_path / "out")}
    load = {"command": "load", "checkpoint": str(tmp_path / "model"), "dtype": "float32"}
    refused = "tokens, positions and past do not fit"
    exchange = {
        json.dumps(run): {"error": "the request is unknown, or came too early"},
        json.dumps({**load, "checkpoint": "/no/such"}): {"error": "config.json is missing, or not a Mixtral's"},
        "no JSON": {"error": "the request is unknown, or came too early"},
        json.dumps(load): {"ok": True},
        json.dumps({**run, "runs": [{**good, "tokens": [53]}]}): {"error": "a token is beyond the vocabulary"},
        json.dumps({**run, "runs": [{**good, "past": 1}]}): {"error": refused},
        json.dumps({**run, "runs": [{**good, "positions": []}]}): {"error": refused},
        json.dumps({**run, "out": "/no/such/folder/out"}): {"error": "the file cannot be written"},
        json.dumps({**run, "taps": ["embedding", "logits"]}): {"ok": True},
        json.dumps({"command": "stop"}): {"ok": True},
    }
    _, program = example("c", tmp_path)
    requests = "".join(f"{request}\n" for request in exchange)
    done = subprocess.run([program], input=requests, capture_output=True, text=True, check=True)
    assert [json.loads(line) for line in done.stdout.splitlines()] == list(exchange.values())
    assert load_file(tmp_path / "out").keys() == {"r/embedding", "r/logits"}


def test_the_python_example_runs_where_refmoe_is_not_installed() -> None:
    """PROTOCOL.md promises an adapter's environment no more than NumPy, ml_dtypes and safetensors."""
    script = "import sys; sys.modules['refmoe'] = None; sys.path.insert(0, '.'); import examples.mixtral"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
