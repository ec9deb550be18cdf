# SPDX-License-Identifier: Apache-2.0
"""``--device cuda`` of every command: one sentence without a GPU, and over a stand-in for CuPy the CPU's results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.checkpoints.write import write_checkpoint
from refmoe.cuda import device
from refmoe.traces.trace import read_trace
from tests.command_line import Refmoe
from tests.cuda.on_cpu import needs_compiler
from tests.cuda.strict import install
from tests.golden_cases import write_case
from tests.models import SMALL, relative_rms

TOKENS = ("--tokens", "1,2,3,4,5,6", "--chunk", "7,8", "--decode", "9,10")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write_checkpoint(folder, SMALL, synthetic_checkpoint(SMALL, 3).parameters)
    return folder


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def no_cupy(name: str) -> Any:
    raise ModuleNotFoundError("No module named 'cupy'")


@pytest.mark.parametrize(
    "command",
    [
        ("emit", "--checkpoint", "DIR", "--tokens", "1", "--out", "trace"),
        ("suite", "emit", "--golden", "x"), ("suite", "check"),
        ("generate", "--checkpoint", "DIR", "--tokens", "1"), ("verify", "trace"), ("info", "mixtral-8x7b"),
    ],
    ids=lambda command: " ".join(command[:2]),
)  # fmt: skip
def test_without_a_gpu_every_command_says_why_in_one_sentence(
    refmoe: Refmoe, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    """The check comes before any file is read: none of these files exists."""
    monkeypatch.setattr(device, "import_module", no_cupy)
    status, out, err = refmoe(*command, "--device", "cuda")
    assert (status, out) == (2, "")
    assert err.startswith("refmoe: no GPU can be used: CuPy is not installed")
    assert err.count("\n") == 1


def emit(refmoe: Refmoe, checkpoint: Path, out: Path, *more: Any) -> Any:
    status, _, err = refmoe("emit", "--checkpoint", checkpoint, *TOKENS, "--out", out, *more)
    assert status == 0, err
    return read_trace(out)


def test_an_exact_trace_has_the_cpus_bits(refmoe: Refmoe, cuda: None, checkpoint: Path, tmp_path: Path) -> None:
    here = emit(refmoe, checkpoint, tmp_path / "cpu")
    there = emit(refmoe, checkpoint, tmp_path / "cuda", "--device", "cuda")
    assert there.header == here.header
    assert there.tensors.keys() == here.tensors.keys()
    for key in there.tensors:
        found, expected = (trace.tensors[key].map() for trace in (there, here))
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes(), key


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_native_trace_is_near_the_cpus(
    refmoe: Refmoe, cuda: None, checkpoint: Path, tmp_path: Path, dtype: str
) -> None:
    more = ("--dtype", dtype, "--taps", "logits,layers.1.expert.*")
    here = emit(refmoe, checkpoint, tmp_path / "cpu", *more)
    there = emit(refmoe, checkpoint, tmp_path / "cuda", *more, "--device", "cuda")
    assert there.header == here.header
    assert there.tensors.keys() == here.tensors.keys()
    for key in there.tensors:
        run, _, tap = key.rpartition("/")
        assert there.get(run, tap).dtype == here.get(run, tap).dtype
        assert relative_rms(there.get(run, tap), here.get(run, tap)) < 1e-4


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--layers", "0:1"), "--layers is for the CPU, but --device cuda was given"),
        (("--estimate",), "--estimate is for the CPU, but --device cuda was given"),
        (("--policy", "bfloat16"), "--policy is computed on the CPU, but --device cuda was given"),
        (("--taps", "nothing"), "--taps 'nothing' matches no tap"),
    ],
)
def test_what_goes_with_the_cpu_alone_is_refused(
    refmoe: Refmoe, cuda: None, checkpoint: Path, tmp_path: Path, more: Any, sentence: str
) -> None:
    arguments = ("emit", "--checkpoint", checkpoint, *TOKENS, "--out", tmp_path / "trace", "--device", "cuda")
    assert refmoe(*arguments, *more) == (2, "", f"refmoe: {sentence}\n")


def test_goldens_are_emitted_and_checked_there(refmoe: Refmoe, cuda: None, tmp_path: Path) -> None:
    """Goldens that the CPU or the device emits are confirmed by the other."""
    for seed, name in enumerate("ab"):
        write_case(tmp_path / name, seed, 'store = "fingerprint"' if name == "b" else "")
    for there, here in ((("--device", "cuda"), ()), ((), ("--device", "cuda"))):
        for path in tmp_path.glob("*/manifest.json"):
            path.unlink()
        assert refmoe("suite", "emit", "--golden", tmp_path, "--executor", "processes:1", *there)[0] == 0
        assert refmoe("suite", "emit", "a", "--golden", tmp_path, *there)[0] == 0
        status, out, _ = refmoe("suite", "check", "--golden", tmp_path, "--json", "--executor", "processes:1", *here)
        assert status == 0
        assert json.loads(out)["cases"] == {"a": [], "b": []}


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_generate_continues_as_the_cpu_does(refmoe: Refmoe, cuda: None, checkpoint: Path, dtype: str) -> None:
    model = ("--checkpoint", checkpoint, "--dtype", dtype)
    arguments = ("generate", *model, "--tokens", "1,2,3,4,5,6", "--max-new-tokens", 6, "--json")
    there = json.loads(refmoe(*arguments, "--device", "cuda")[1])
    assert there == json.loads(refmoe(*arguments)[1])
    assert len(there["tokens"]) == 6


def test_verify_gives_the_cpus_verdict(refmoe: Refmoe, cuda: None, checkpoint: Path, tmp_path: Path) -> None:
    emit(refmoe, checkpoint, tmp_path / "trace", "--policy", "bfloat16")
    arguments = ("verify", tmp_path / "trace", "--checkpoint", checkpoint, "--json")
    here, there = refmoe(*arguments), refmoe(*arguments, "--device", "cuda")
    assert here[0] == there[0] == 0
    assert json.loads(there[1])["headline"] == json.loads(here[1])["headline"]


@pytest.mark.parametrize(
    "command",
    [("emit", "--tokens", "1,2,3", "--out", "trace"), ("generate", "--tokens", "1,2,3", "--max-new-tokens", 5)],
    ids=lambda command: command[0],
)
def test_too_little_memory_is_one_sentence_before_the_upload(
    refmoe: Refmoe, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, command: tuple[Any, ...]
) -> None:
    install(monkeypatch, free=1 << 20)
    status, out, err = refmoe(*command, "--checkpoint", checkpoint, "--device", "cuda")
    assert (status, out) == (2, "")
    assert re.fullmatch(
        r"refmoe: --device cuda: (0\.\d\d) GiB of device memory are needed \(weights 0\.00 GiB, cache 0\.00 GiB, "
        r"buffers \1 GiB\), but 0\.00 GiB are free: \1 GiB are missing\n",
        err,
    )


def test_info_states_memory_against_what_is_free(refmoe: Refmoe, cuda: None, checkpoint: Path) -> None:
    found = json.loads(refmoe("info", "mixtral-8x7b", "--device", "cuda", "--json")[1])["device"]
    assert found["free_bytes"] == 1 << 30
    assert found["needed"]["bfloat16"]["weights"] * 2 == found["needed"]["float32"]["weights"]
    assert "86.99 GiB" in found["needed"]["bfloat16"]["missing"]
    out = refmoe("info", "mixtral-8x7b", "--device", "cuda", "--tokens", 100)[1]
    assert "a prompt of 100 tokens and 64 more" in out
    assert "bfloat16: 8" in out
    assert " are missing" in out
    assert "bfloat16: there is enough" in refmoe("info", checkpoint, "--device", "cuda")[1]
