# SPDX-License-Identifier: Apache-2.0
"""The command line as its users meet it: status, output, and one sentence for every mistake."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import click
import numpy as np
import pytest

from refmoe.checkpoints.load import load_checkpoint
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.checkpoints.write import write_checkpoint
from refmoe.cli import commands
from refmoe.spec.config import Config
from refmoe.suite import read_case, trace_path
from refmoe.traces.trace import read_trace
from tests.cli.every_command import COMMANDS
from tests.command_line import Refmoe
from tests.machine import needs_mkl
from tests.models import SMALL

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "golden"

TEXT_MODEL = Config(
    dim=16, layers=2, heads=4, kv_heads=2, head_dim=6, hidden_dim=24, vocab=32000, experts=4, experts_per_token=2,
    rope_theta=3e4,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint without a tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    write_checkpoint(folder, SMALL, synthetic_checkpoint(SMALL, 3).parameters)
    return folder


@pytest.fixture(scope="module")
def text_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with Mixtral's own tokenizer."""
    data = pytest.importorskip("mistral_common", reason="mistral-common not installed: pip install -e '.[test]'")
    folder = tmp_path_factory.mktemp("text")
    write_checkpoint(folder, TEXT_MODEL, synthetic_checkpoint(TEXT_MODEL, 3).parameters)
    shutil.copy(str(files(data) / "data" / "tokenizer.model.v1"), folder / "tokenizer.model")
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(refmoe: Refmoe, name: str) -> None:
    status, out, _ = refmoe(*name.split(), "--help")
    assert status == 0
    assert f"refmoe {name}" in out.partition("Options:")[0].partition("\n")[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is_and_what_it_takes(name: str) -> None:
    """An option that takes one of a few values lists them; the word of a value never stands for two things."""
    for option in COMMANDS[name].params:
        if isinstance(option, click.Option):
            assert option.help, option.name
            kind = {"policy": "POLICY NAME", "case": "NAME", "golden": "DIR"}.get(option.opts[0].removeprefix("--"))
            assert kind is None or str(option.metavar) in kind.split(), option.opts


def test_every_command_answers_in_json() -> None:
    options = {name: {word for option in command.params for word in option.opts} for name, command in COMMANDS.items()}
    assert [name for name, words in options.items() if "--json" not in words] == []


def test_the_commands_are_listed_by_who_asks(refmoe: Refmoe) -> None:
    """Each of them once, and every one is in a section."""
    out = refmoe("--help")[1]
    listed = re.findall(r"^  (\w+) {2,}\S", out.partition("Judge an engine:")[2], re.MULTILINE)
    assert listed == [*dict.fromkeys(name.split()[0] for name in COMMANDS)]
    assert "_REFMOE_COMPLETE" in out


def test_the_list_has_the_line_of_each_command_without_importing_it() -> None:
    for name, member in commands.members().items():
        command = commands.get_command(click.Context(commands), name)
        assert member.get_short_help_str(200) == command.get_short_help_str(200), name
    script = "import sys, refmoe.cli\ntry: refmoe.cli.commands(['--help'])\nexcept SystemExit: pass\n"
    script += "print([name for name in sys.modules if name.startswith(('refmoe.api', 'refmoe.verifier', 'rich'))])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "arguments", [["verify", "nowhere"], ["info", "nowhere"], ["verify"], ["cases", "wolking-skeleton"]], ids=" ".join
)
def test_with_json_a_mistake_is_json_too(refmoe: Refmoe, arguments: list[str]) -> None:
    status, out, err = refmoe(*arguments, "--json")
    assert status == 2
    assert [*json.loads(out)] == ["error"]
    assert json.loads(out)["error"] in err


def test_cases_are_listed_and_explained(refmoe: Refmoe) -> None:
    lines = refmoe("cases")[1].splitlines()
    facts = json.loads(refmoe("cases", "--json")[1])
    assert len(lines) == 1 + len(facts)
    assert {each["name"] for each in facts} == {path.parent.name for path in GOLDEN.glob("*/case.toml")}
    (one,) = [each for each in facts if each["name"] == "near-tie"]
    assert json.loads(refmoe("cases", "near-tie", "--json")[1]) == one
    assert one["weight_bytes"]["float32"] == 4 * one["parameters"]
    assert "router-jitter-at-eval" in one["bugs"]
    text = refmoe("cases", "near-tie")[1]
    assert all(word in text for word in ("ROUTE-2", "NEARTIE", "rope_theta", "22,46,50"))


def test_goldens_are_found_from_any_folder(
    refmoe: Refmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """An option comes before the environment variable, and that before the package's own."""
    monkeypatch.chdir(tmp_path)
    assert refmoe("suite", "check", "one-pair")[0] == 0
    shutil.copytree(GOLDEN / "one-pair", tmp_path / "some" / "mine")
    monkeypatch.setenv("REFMOE_GOLDEN", str(tmp_path / "some"))
    assert [each["name"] for each in json.loads(refmoe("cases", "--json")[1])] == ["mine"]
    assert refmoe("suite", "check", "one-pair")[0] == 2
    assert refmoe("suite", "check", "one-pair", "--golden", GOLDEN)[0] == 0
    monkeypatch.setenv("REFMOE_GOLDEN", str(tmp_path / "none"))
    assert "REFMOE_GOLDEN" in refmoe("cases")[2]


def test_arrays_in_a_file_are_judged(refmoe: Refmoe, checkpoint: Path, tmp_path: Path) -> None:
    """The calls are those of the options; with a case, its own."""
    calls = ("--tokens", "1,2,3", "--decode", "4")
    trace = tmp_path / "t.safetensors"
    assert refmoe("emit", "--checkpoint", checkpoint, *calls, "--dtype", "float32", "--out", trace)[0] == 0
    found = read_trace(trace)
    arrays = {
        f"{run.run}/{tap}": found.get(run.run, tap) for run in found.header.runs for tap in ("logits", "final_norm")
    }
    np.savez(tmp_path / "right.npz", **arrays)
    np.savez(tmp_path / "wrong.npz", **{key: value * np.float32(1.01) for key, value in arrays.items()})
    judge = ("--checkpoint", checkpoint, *calls, "--no-diagnose", "--json")
    assert refmoe("verify", tmp_path / "right.npz", *judge)[0] == 0
    status, out, _ = refmoe("verify", tmp_path / "wrong.npz", *judge)
    assert (status, json.loads(out)["verdict"]) == (1, "not conformant")
    for more, words in (
        (("--checkpoint", checkpoint), "--tokens IDS was expected"),
        ((), "--case NAME or --checkpoint"),
    ):
        status, _, err = refmoe("verify", tmp_path / "right.npz", *more)
        assert status == 2
        assert words in err


def test_info_derives_the_published_sizes(refmoe: Refmoe) -> None:
    status, out, _ = refmoe("info", "mixtral-8x7b")
    assert status == 0
    assert "46.7 B" in out
    assert "12.9 B" in out
    facts = json.loads(refmoe("info", "mixtral-8x22b", "--json")[1])
    assert facts["config"]["layers"] == 56
    assert facts["weight_bytes"]["bfloat16"] == 2 * facts["total_parameters"]


def test_info_accounts_for_a_checkpoint(refmoe: Refmoe, checkpoint: Path) -> None:
    facts = json.loads(refmoe("info", checkpoint, "--json")[1])
    assert facts["layout"] == "hf"
    assert facts["stored"] == ["BF16"]
    assert facts["config"]["window"] is None
    assert refmoe("info", checkpoint)[0] == 0


@pytest.mark.parametrize("dtype", ["exact", "float64", "float32"])
def test_emit_writes_what_the_taps_ask_for(refmoe: Refmoe, checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "trace"
    status, text, _ = refmoe(
        "emit", "--checkpoint", checkpoint, "--tokens", "1,2,3,4", "--chunk", "5,6", "--decode", "7,8",
        "--taps", "logits,layers.1.*", "--dtype", dtype, "--out", out, "--json",
    )  # fmt: skip
    assert status == 0
    facts = json.loads(text)
    assert facts.pop("memory_bytes") > 0
    assert facts == {"trace": str(out), "bytes": out.stat().st_size, "runs": 4}
    trace = read_trace(out)
    assert [run.run for run in trace.header.runs] == ["prefill", "chunk1", "decode1", "decode2"]
    assert trace.header.checkpoint is not None
    assert trace.header.policy == dtype
    assert set(trace.names("decode2")) == {"logits"} | {name for name in trace.names("prefill") if "layers.1." in name}
    assert trace.get("prefill", "logits").dtype == ("float32" if dtype == "float32" else "float64")


def test_emit_takes_text_and_chat(refmoe: Refmoe, text_checkpoint: Path, tmp_path: Path) -> None:
    """Ids by Mixtral's own tokenizer.model, equal to those in mistral-common's tests."""
    out = tmp_path / "trace"
    arguments = ("emit", "--checkpoint", text_checkpoint, "--taps", "logits", "--dtype", "float32", "--out", out)
    assert refmoe(*arguments, "--prompt", "Hello, my name is")[0] == 0
    assert read_trace(out).header.runs[0].tokens == (1, 22557, 28725, 586, 1141, 349)
    (tmp_path / "chat.json").write_text(json.dumps([{"role": "user", "content": "Hello"}]))
    assert refmoe(*arguments, "--chat", tmp_path / "chat.json")[0] == 0
    assert read_trace(out).header.runs[0].tokens == (1, 733, 16289, 28793, 22557, 733, 28748, 16289, 28793)


def test_generate_streams_the_same_text_for_the_same_seed(refmoe: Refmoe, text_checkpoint: Path) -> None:
    arguments = ("generate", "--checkpoint", text_checkpoint, "--prompt", "Hello", "--max-new-tokens", 8)
    sampled = (*arguments, "--temperature", 1.0, "--top-p", 0.9, "--top-k", 50, "--seed", 4)
    first = json.loads(refmoe(*sampled, "--json")[1])
    assert len(first["tokens"]) == 8
    assert json.loads(refmoe(*sampled, "--json")[1]) == first
    assert refmoe(*sampled)[1] == first["text"] + "\n"
    assert json.loads(refmoe(*arguments, "--json")[1])["tokens"] != first["tokens"]


def test_a_prompt_is_read_in_the_layout_that_was_named(refmoe: Refmoe, text_checkpoint: Path, tmp_path: Path) -> None:
    """Where both layouts lie in a folder, the other one is not looked at."""
    source = load_checkpoint(text_checkpoint)
    write_checkpoint(tmp_path, source.config, source.parameters, layout="mistral")
    shutil.copy(text_checkpoint / "tokenizer.model", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    words = ("--prompt", "Hello", "--max-new-tokens", 1, "--json")
    status, out, _ = refmoe("generate", "--checkpoint", tmp_path, "--layout", "mistral", *words)
    assert status == 0
    expected = json.loads(refmoe("generate", "--checkpoint", text_checkpoint, *words)[1])
    assert json.loads(out)["prompt"] == expected["prompt"]


def test_generate_continues_greedily_as_a_whole_prefill_would(refmoe: Refmoe, checkpoint: Path, tmp_path: Path) -> None:
    """Each new token is the largest logit of a prefill of everything before it."""
    generated = json.loads(
        refmoe(
            "generate", "--checkpoint", checkpoint, "--tokens", "1,2,3", "--max-new-tokens", 4, "--dtype", "float64",
            "--json",
        )[1]
    )  # fmt: skip
    tokens = [1, 2, 3, *generated["tokens"]]
    refmoe(
        "emit", "--checkpoint", checkpoint, "--tokens", ",".join(map(str, tokens)), "--dtype", "float64",
        "--out", tmp_path / "t",
    )  # fmt: skip
    logits = read_trace(tmp_path / "t").get("prefill", "logits")
    assert np.argmax(logits, -1)[2:-1].tolist() == generated["tokens"]


@needs_mkl
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_generate_says_the_same_by_either_blas(refmoe: Refmoe, checkpoint: Path, dtype: str) -> None:
    tokens = ("--tokens", ",".join(str(i % 30) for i in range(40)), "--max-new-tokens", 6)
    arguments = ("generate", "--checkpoint", checkpoint, *tokens, "--dtype", dtype, "--json")
    assert refmoe(*arguments, "--blas", "mkl") == refmoe(*arguments)


def test_distances_are_printed_without_a_verdict(refmoe: Refmoe, checkpoint: Path, tmp_path: Path) -> None:
    for dtype in ("float32", "float64"):
        refmoe("emit", "--checkpoint", checkpoint, "--tokens", "1,2,3", "--dtype", dtype, "--out", tmp_path / dtype)
    arguments = ("verify", tmp_path / "float32", "--distances", tmp_path / "float64")
    status, out, _ = refmoe(*arguments)
    assert status == 0
    assert "layers.1.expert.hidden" in out
    assert "routing: 0 of 6 decisions differ" in out
    assert "prefill" not in refmoe(*arguments, "--run", "decode1")[1]
    found = json.loads(refmoe(*arguments, "--json")[1])
    assert max(distance["relative_rms"] for distance in found["distances"]) < 1e-5
    for option in (("--case", "walking-skeleton"), ("--policy", "bfloat16"), ("--html", tmp_path / "page")):
        status, out, said = refmoe(*arguments, *option)
        assert (status, out) == (2, "")
        assert option[0] in said


def test_check_passes_and_fails(refmoe: Refmoe, tmp_path: Path) -> None:
    status, out, _ = refmoe("suite", "check", "walking-skeleton")
    assert (status, out.splitlines()[0]) == (0, "ok    walking-skeleton")
    copy = tmp_path / "walking-skeleton"
    shutil.copytree(GOLDEN / "walking-skeleton", copy)
    (copy / "case.toml").write_text((copy / "case.toml").read_text().replace("seed = 1", "seed = 4"))
    status, out, _ = refmoe("suite", "check", "--golden", tmp_path, "--json")
    assert status == 1
    assert not json.loads(out)["ok"]


def test_a_materialised_case_is_the_case(refmoe: Refmoe, tmp_path: Path) -> None:
    """In both layouts, the trace of the checkpoint is the golden, bit for bit."""
    case = read_case(GOLDEN / "walking-skeleton")
    golden = read_trace(trace_path(GOLDEN / "walking-skeleton"))
    for layout in ("hf", "mistral"):
        folder = tmp_path / layout
        assert refmoe("materialise", case.name, folder, "--golden", GOLDEN, "--layout", layout)[0] == 0
        tokens = ",".join(map(str, golden.header.runs[0].tokens))
        refmoe("emit", "--checkpoint", folder, "--tokens", tokens, "--out", tmp_path / "t")
        found = read_trace(tmp_path / "t")
        for tap in golden.names("prefill"):
            assert np.array_equal(found.get("prefill", tap), golden.get("prefill", tap)), tap


EMIT, GENERATE = (f"{command} --checkpoint {{checkpoint}} " for command in ("emit", "generate"))
MISTAKES = {
    "no such folder": ("emit --checkpoint nowhere --tokens 1 --out t", "nowhere: no such folder"),
    "no input": (EMIT + "--out t", "exactly one of --tokens, --prompt and --chat"),
    "two inputs": (EMIT + "--tokens 1 --prompt x --out t", "exactly one"),
    "no output": (EMIT + "--tokens 1", "--out"),
    "bad ids": (EMIT + "--tokens 1,x --out t", "'1,x' is not a list"),
    "token too large": (EMIT + "--tokens 37 --out t", "token 37"),
    "no tokenizer": (EMIT + "--prompt x --out t", "tokenizer.model"),
    "no such tap": (EMIT + "--tokens 1 --taps x --out t", "no tap"),
    "no folder for output": (EMIT + "--tokens 1 --out a/b/t", "a/b/t"),
    "no such case": ("emit --case nothing --out t", "case 'nothing' is unknown"),
    "case and tokens": ("emit --case walking-skeleton --tokens 1 --out t", "do not apply"),
    "nothing to check": ("suite check --golden {checkpoint}", "no case is there"),
    "nothing to measure": ("verify a --distances b", "a: no such file"),
    "a run without a reference": ("verify a --run prefill", "--distances"),
    "not a model": ("info mixtral-9x9b", "mixtral-9x9b: no such folder"),
    "not a temperature": (GENERATE + "--tokens 1 --temperature -1", "temperature"),
    "prompt too large": (GENERATE + "--tokens 99", "token 99"),
    "capture of nothing": ("capture --out t", "exactly one of --checkpoint DIR and --case NAME"),
    "bad dtype": ("materialise walking-skeleton d --dtype int8", "int8"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_status_2(
    refmoe: Refmoe, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """No half-written file is left."""
    arguments, words = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    status, out, err = refmoe(*(word.replace("{checkpoint}", str(checkpoint)) for word in arguments.split()))
    assert status == 2
    assert words in err
    assert out == ""
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_the_program_runs_and_is_silent_in_a_pipe() -> None:
    """In a pipe the program prints no progress bar and no colour."""
    done = subprocess.run(
        [sys.executable, "-m", "refmoe", "suite", "check", "walking-skeleton"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    assert done.stderr == b""
    assert done.stdout.startswith(b"ok    walking-skeleton\n")
    failed = subprocess.run(
        [sys.executable, "-m", "refmoe", "info", "nowhere"], cwd=ROOT, capture_output=True, check=False
    )
    assert failed.returncode == 2
    assert failed.stderr.startswith(b"refmoe: nowhere: no such folder")
    assert failed.stderr.count(b"\n") == 1


@pytest.mark.engines
def test_the_main_job_on_real_input(refmoe: Refmoe, tmp_path: Path) -> None:
    """A checkpoint written by transformers, tokens from Mixtral's own tokenizer, a trace captured from transformers."""
    data = pytest.importorskip("mistral_common", reason="mistral-common not installed: pip install -e '.[test]'")
    from tests.capture.test_transformers import save_tiny_mixtral

    model = tmp_path / "model"
    save_tiny_mixtral(model, vocab_size=32000)
    shutil.copy(str(files(data) / "data" / "tokenizer.model.v1"), model / "tokenizer.model")
    what = ("--checkpoint", model, "--prompt", "The quick brown fox", "--chunk", "4,5,6", "--decode", "7,8")
    assert refmoe("emit", *what, "--out", tmp_path / "golden.safetensors")[0] == 0
    for dtype, bound in (("float32", 1e-5), ("bfloat16", 0.3)):
        assert refmoe("capture", *what, "--dtype", dtype, "--out", tmp_path / "engine.safetensors")[0] == 0
        traces = (tmp_path / "engine.safetensors", "--distances", tmp_path / "golden.safetensors")
        status, out, _ = refmoe("verify", *traces, "--json")
        found = json.loads(out)
        assert status == 0
        assert {distance["run"] for distance in found["distances"]} == {"prefill", "chunk1", "decode1", "decode2"}
        assert max(distance["relative_rms"] for distance in found["distances"]) < bound
    engine, golden = (read_trace(tmp_path / f"{name}.safetensors") for name in ("engine", "golden"))
    assert engine.header.checkpoint == golden.header.checkpoint
    assert engine.header.producer["name"] == "transformers"


@pytest.mark.engines
def test_capture_of_a_case_compares_with_its_golden(refmoe: Refmoe, tmp_path: Path) -> None:
    out = tmp_path / "engine.safetensors"
    arguments = ("capture", "--case", "walking-skeleton", "--golden", GOLDEN, "--dtype", "float32", "--out", out)
    assert refmoe(*arguments)[0] == 0
    status, text, _ = refmoe("verify", out, "--distances", GOLDEN / "walking-skeleton")
    assert status == 0
    assert "layers.1.expert.hidden" in text
