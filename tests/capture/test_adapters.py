# SPDX-License-Identifier: Apache-2.0
"""Traces of an engine behind an adapter, from a checkpoint as it is."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from refmoe.traces.trace import read_trace
from tests.command_line import Refmoe

ADAPTER = """
import numpy as np
import refmoe
from refmoe.engines.adapter import Skipped

class Adapter:
    name, version = "mine", "1"
    dtypes, taps, abilities = ("float32",), ("logits", "embedding"), ("decode",)
    policies = {"float32": "llama.cpp-quantised"}

    def __init__(self, fault="none"):
        self.fault = fault

    def load(self, checkpoint, dtype):
        if self.fault == "load":
            raise OSError("no such device")
        if self.fault == "skipped":
            raise Skipped("this engine has no experts")
        self.model = refmoe.load(checkpoint)

    def run(self, runs, taps):
        tokens = [list(run.tokens) for run in runs]
        trace = self.model.run(tokens[0], decode=[each[0] for each in tokens[1:]], policy="llama.cpp-quantised")
        return {f"{run.run}/{tap}": np.asarray(trace[run.run, tap]) for run in runs for tap in taps}
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(ADAPTER)
    return tmp_path / "mine.py"


def test_an_adapter_runs_a_checkpoint_and_its_policy_is_declared(refmoe: Refmoe, mine: Path, tmp_path: Path) -> None:
    refmoe("materialise", "walking-skeleton", tmp_path / "model")
    trace = tmp_path / "t.safetensors"
    given = ("--checkpoint", tmp_path / "model", "--tokens", "1,31,41", "--decode", "9", "--adapter", mine)
    status, _, err = refmoe("capture", *given, "--taps", "logits", "--out", trace)
    assert status == 0, err
    header = read_trace(trace).header
    assert (header.policy, header.producer) == ("llama.cpp-quantised", {"name": "mine", "version": "1"})
    assert [run.run for run in header.runs] == ["prefill", "decode1"]
    assert {*read_trace(trace).tensors} == {"prefill/logits", "decode1/logits"}
    status, _, err = refmoe("capture", "--case", "one-pair", "--adapter", mine, "--out", trace)
    assert status == 0, err
    assert read_trace(trace).header.case == "one-pair"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--option", "fault=load"), "OSError: no such device"),
        (("--option", "fault=skipped"), "this engine has no experts"),
        (("--option", "fault"), "key=value was expected"),
        (("--option", "flaw=load"), "has none of this name"),
        (("--dtype", "bfloat16"), "one of float32 was expected"),
        (("--chunk", "3,4"), "needs chunk"),
        (("--attention", "sdpa"), "--adapter was given"),
        (("--taps", "router*"), "matches no tap"),
    ],
)
def test_what_does_not_run_is_one_sentence(
    refmoe: Refmoe, mine: Path, tmp_path: Path, more: tuple[str, str], words: str
) -> None:
    refmoe("materialise", "one-pair", tmp_path / "model")
    given = ("--checkpoint", tmp_path / "model", "--tokens", "1,2", "--adapter", mine, "--out", tmp_path / "t")
    status, out, err = refmoe("capture", *given, *more)
    assert (status, out) == (2, "")
    assert words in " ".join(err.split())
    assert err.count("refmoe: ") == 1


def test_an_option_without_an_adapter(refmoe: Refmoe, tmp_path: Path) -> None:
    status, _, err = refmoe("capture", "--case", "one-pair", "--option", "a=1", "--out", tmp_path / "t")
    assert (status, "--adapter was not given" in err) == (2, True)


@pytest.mark.skipif(
    find_spec("xllamacpp") is None or find_spec("gguf") is None, reason="xllamacpp or gguf not installed"
)
def test_llama_cpp_runs_a_quantised_file_as_it_is(refmoe: Refmoe, tmp_path: Path) -> None:
    refmoe("materialise", "production-sequences", tmp_path, "--format", "gguf:Q4_K_M")
    model, trace = tmp_path / "model.gguf", tmp_path / "t.safetensors"
    options = ("--option", "cache=float16", "--option", "flash=on")
    given = ("--checkpoint", model, "--tokens", "1,31,41,59", "--decode", "9,7", "--adapter", "llama_cpp", *options)
    status, _, err = refmoe("capture", *given, "--out", trace)
    assert status == 0, err
    assert read_trace(trace).header.policy == "llama.cpp-quantised"
    status, out, _ = refmoe("verify", trace, "--checkpoint", model)
    assert status == 0, out
    missing = ("--option", f"library={tmp_path / 'libllama.so'}")
    status, _, err = refmoe("capture", *given, *missing, "--out", trace)
    assert (status, "a path of libllama was expected" in " ".join(err.split())) == (2, True)
