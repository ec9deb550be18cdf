# SPDX-License-Identifier: Apache-2.0
"""The layout of the published Mixtral-8x7B-v0.1 at reduced dimensions: 19 shards that cut through layers, an index,
the real names and tokenizer.model, and bfloat16. A missing piece is reported in one sentence."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refmoe.checkpoints.write import write_checkpoint
from refmoe.jobs.source import Formula
from refmoe.spec.config import Config
from refmoe.suite import compute
from refmoe.suite.case import Case
from refmoe.traces.script import Call
from refmoe.traces.trace import read_trace
from tests.command_line import Refmoe

CONFIG = Config(
    dim=32, layers=32, heads=8, kv_heads=2, head_dim=4, hidden_dim=112, vocab=32000, experts=8, experts_per_token=2,
    context=32768,
)  # fmt: skip
"""The counts of the published model, with smaller sizes."""

SHARDS = 19
PROMPT = "The capital of France is"
TOKENS = (1, 415, 5565, 302, 4843, 349)


def published_order(name: str) -> tuple[int, str]:
    """The order of tensors in the published shards: the embedding, the layers in order, the rest."""
    part = name.split(".")
    return (int(part[2]) if part[1] == "layers" else -1 if "embed" in name else CONFIG.layers, name)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("Mixtral-8x7B-v0.1")
    write_checkpoint(folder, CONFIG, Formula(CONFIG, 11).load().parameters)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors, key=published_order)
    bounds = np.linspace(0, len(names), SHARDS + 1).astype(int).tolist()
    weight_map = {}
    for number, (start, stop) in enumerate(pairwise(bounds), 1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        save_file({name: tensors[name] for name in names[start:stop]}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names[start:stop], file)
    index = {"metadata": {"total_size": sum(a.nbytes for a in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    data = pytest.importorskip("mistral_common", reason="mistral-common not installed: pip install -e '.[test]'")
    shutil.copy(str(files(data) / "data" / "tokenizer.model.v1"), folder / "tokenizer.model")
    return folder


def test_a_shard_holds_parts_of_several_layers(record: Path) -> None:
    """Checks the test data: a shard ends within a layer, as in the published checkpoint."""
    mapping = json.loads((record / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {layer: {file for name, file in mapping.items() if f".layers.{layer}." in name} for layer in range(32)}
    assert max(map(len, shards.values())) == 2
    assert len(set(mapping.values())) == SHARDS
    assert len(mapping) == 32 * (6 + 1 + 24) + 3


def test_from_a_prompt_to_a_verdict(refmoe: Refmoe, record: Path, tmp_path: Path) -> None:
    out, cut = tmp_path / "t.safetensors", tmp_path / "cut.safetensors"
    given = ("--checkpoint", record)
    prompt = (*given, "--prompt", PROMPT, "--decode", "5465", "--taps", "*residual,logits")
    assert refmoe("emit", *prompt, "--out", out)[0] == 0
    trace = read_trace(out)
    assert trace.header.runs[0].tokens == TOKENS
    case = Case(
        folder=record,
        why="",
        clauses=(),
        bugs=(),
        conditions=(),
        config=CONFIG,
        seed=11,
        calls=(Call("prefill", 0, TOKENS), Call("decode", 0, (5465,))),
    )
    for key, values in compute(case).items():
        if key in trace.tensors:
            assert trace.tensors[key].map().tobytes() == values.tobytes(), key
    assert len(trace.tensors) == 2 * (32 * 2 + 1)
    assert refmoe("verify", out, *given, "--policy", "float64")[0] == 0
    assert refmoe("emit", *given, "--prompt", PROMPT, "--layers", "0:2", "--dtype", "float32", "--out", cut)[0] == 0
    assert refmoe("verify", cut, *given, "--policy", "float32")[0] == 0
    status, printed, _ = refmoe("info", record, "--json")
    assert (status, len(json.loads(printed)["files"])) == (0, SHARDS)


@pytest.mark.parametrize("damage", ["missing", "cut short", "not a number"])
def test_a_damaged_shard_is_one_sentence(refmoe: Refmoe, record: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "ck"
    shutil.copytree(record, folder)
    shard = folder / "model-00007-of-00019.safetensors"
    data = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    elif damage == "cut short":
        shard.write_bytes(data[: len(data) // 2])
    else:
        shard.write_bytes(data[:-2] + b"\xc0\x7f")
    out = tmp_path / "t.safetensors"
    # every token of a long prompt, so that every expert is read
    tokens = ",".join(map(str, range(100, 164)))
    status, printed, said = refmoe("emit", "--checkpoint", folder, "--tokens", tokens, "--taps", "logits", "--out", out)
    assert (status, printed) == (2, "")
    assert said.count("\n") == 1
    assert shard.name in said
    assert not out.exists()
