# SPDX-License-Identifier: Apache-2.0
"""Broken checkpoints, one of each kind: each is refused with one sentence that names the place and the fault."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe.checkpoints.hf import FIELDS as HF_FIELDS
from refmoe.checkpoints.load import load_checkpoint
from refmoe.checkpoints.mistral import FIELDS as MISTRAL_FIELDS
from refmoe.checkpoints.names import named_weights
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.checkpoints.weight import BFLOAT16
from refmoe.checkpoints.write import write_checkpoint
from refmoe.errors import InputError
from tests.checkpoints.models import UNEVEN, put_together, rename, take_apart

Break = Callable[[Path], Any]
SINGLE, SHARD = "model.safetensors", "model-00002-of-00003.safetensors"
INDEX, CONSOLIDATED = "model.safetensors.index.json", "consolidated.safetensors"
NORM, GATE = "model.layers.1.input_layernorm.weight", "model.layers.1.block_sparse_moe.gate.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
FUSED = "model.layers.0.block_sparse_moe.experts.gate_up_proj"
SHARD_NORM = NORM.replace("layers.1", "layers.0")

GOOD: dict[str, dict[str, Any]] = {
    "hf": {},
    "half": {"dtype": "float16"},
    "float": {"dtype": "float32"},
    "fused": {"fused": True},
    "new": {"rope_parameters": True},
    "shards": {"shards": True},
    "mistral": {"layout": "mistral"},
    "mistral-shards": {"layout": "mistral", "shards": True},
}
"""The checkpoints that are broken below."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    parameters = synthetic_checkpoint(UNEVEN, seed=5).parameters
    for name, options in GOOD.items():
        write_checkpoint(folder / name, UNEVEN, parameters, **options)
    return folder


@dataclass(frozen=True)
class Kind:
    name: str
    base: str
    """Which good checkpoint is broken."""
    damage: Break
    words: tuple[str, ...]
    """Parts that the sentence must contain; a `$` is its end."""


# Ways to break things


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Break:
    """Change the JSON object in a file in place."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return damage


def config(**fields: Any) -> Break:
    return edit("config.json", lambda values: values.update(fields))


def params(**fields: Any) -> Break:
    return edit("params.json", lambda values: values.update(fields))


def without(name: str, *fields: str) -> Break:
    return edit(name, lambda values: [values.pop(field) for field in fields])


def rope(**fields: Any) -> Break:
    return edit("config.json", lambda values: values["rope_parameters"].update(fields))


def text(name: str, content: str | bytes) -> Break:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def remove(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def header(name: str, change: Callable[[dict[str, Any]], Any]) -> Break:
    """Change the header of a safetensors file in place."""

    def damage(folder: Path) -> None:
        entries, data = take_apart(folder / name)
        change(entries)
        put_together(folder / name, entries, data)

    return damage


def tensor(name: str, **fields: Any) -> Break:
    """Change one entry of the header of model.safetensors."""
    return header(SINGLE, lambda entries: entries[name].update(fields))


def replaced(file: str, name: str, dtype: str | None, shape: list[int] | None, data: bytes = b"") -> Break:
    """Move one tensor to the end of a safetensors file, with other contents; drop it where there is no dtype."""

    def damage(folder: Path) -> None:
        entries, body = take_apart(folder / file)
        start, stop = entries.pop(name)["data_offsets"] if name in entries else (0, 0)
        for other, entry in entries.items():
            if other != "__metadata__" and entry["data_offsets"][0] >= stop:
                entry["data_offsets"] = [offset - (stop - start) for offset in entry["data_offsets"]]
        body = body[:start] + body[stop:]
        if dtype is not None:
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        put_together(folder / file, entries, body + data)

    return damage


def values(name: str, dtype: Any, *found: float, file: str = SINGLE) -> Break:
    """Overwrite the last elements of a tensor."""

    def damage(folder: Path) -> None:
        entries, body = take_apart(folder / file)
        stop = entries[name]["data_offsets"][1]
        new = np.array(found, dtype).tobytes()
        put_together(folder / file, entries, body[: stop - len(new)] + new + body[stop:])

    return damage


def cut(name: str, part: float) -> Break:
    """Keep a fraction of a file, or, if negative, remove that number of bytes."""

    def damage(folder: Path) -> None:
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[: int(part)] if part < 0 else raw[: int(part * len(raw))])

    return damage


def weight_map(change: Callable[[dict[str, Any]], Any], name: str = INDEX) -> Break:
    return edit(name, lambda index: change(index["weight_map"]))


def said_to_be_in(shard: Any) -> Break:
    return weight_map(lambda mapping: mapping.update({NORM: shard}))


def both(*damages: Break) -> Break:
    return lambda folder: [damage(folder) for damage in damages]


def folder_to_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def touch(name: str) -> Break:
    return lambda folder: (folder / name).write_bytes(b"\x80\x02}q\x00.")


def file_to_folder(name: str) -> Break:
    return both(remove(name), lambda folder: (folder / name).mkdir())


def moe(**fields: Any) -> Break:
    return edit("params.json", lambda values: values["moe"].update(fields))


def duplicated(name: str, old: str, new: str) -> Break:
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new))


BIG = 10**9
KINDS = [
    # the folder
    Kind("no folder", "hf", shutil.rmtree, ("hf: no such folder",)),
    Kind("a file for a folder", "hf", folder_to_file, ("is not a folder", "folder or a GGUF file was expected")),
    Kind("no configuration", "hf", remove("config.json"), ("neither config.json nor params.json",)),
    Kind("configuration is a folder", "hf", file_to_folder("config.json"), ("config.json: is a folder",)),
    # config.json as a file
    Kind("empty file", "hf", text("config.json", ""), ("config.json: not valid JSON", "line 1")),
    Kind("cut JSON", "hf", cut("config.json", 0.5), ("config.json: not valid JSON", "line")),
    Kind("not UTF-8", "hf", text("config.json", b'{"a": "\xff"}'), ("byte 7 is not UTF-8", "a JSON object")),
    Kind("a list", "hf", text("config.json", "[1]"), ("holds a JSON array, but an object was expected",)),
    Kind("a string", "hf", text("config.json", '"x"'), ("holds a JSON string, but an object",)),
    Kind("null", "hf", text("config.json", "null"), ("holds a JSON null, but an object",)),
    Kind("nested deeply", "hf", text("config.json", "[" * 10**6), ("config.json: is nested too deeply",)),
    Kind("nested in a field", "hf", config(hidden_size=json.loads("[" * 400 + "]" * 400)), ("'hidden_size[0]",)),
    Kind("a number of 5000 digits", "hf", duplicated("config.json", ": 26", ": 1" + "0" * 5000), ("64 bits",)),
    Kind(
        "a field twice", "hf", duplicated("config.json", '"hidden_size": 26', '"hidden_size": 26, "hidden_size": 28'),
        ("config.json: 'hidden_size' is there more than once",),
    ),
    # config.json: fields
    *(
        Kind(f"{field} missing", "hf", without("config.json", field), ("config.json", field))
        for field in (*HF_FIELDS.values(), "model_type", "hidden_act") if field != "sliding_window"
    ),
    Kind("a field of null", "hf", config(hidden_size=None), ("'hidden_size' is null",)),
    Kind("string for a number", "hf", config(num_hidden_layers="2"), ("'num_hidden_layers' is \"2\"", "an integer")),
    Kind("bool for a number", "hf", config(vocab_size=True), ("'vocab_size' is true, but an integer",)),
    Kind("float for an integer", "hf", config(num_local_experts=5.0), ("'num_local_experts' is 5.0", "an integer")),
    Kind("list for an integer", "hf", config(head_dim=[8]), ("'head_dim' is [8]", "an integer")),
    Kind("string for epsilon", "hf", config(rms_norm_eps="1e-5"), ("'rms_norm_eps' is \"1e-5\"", "a finite number")),
    Kind("negative", "hf", config(intermediate_size=-28), ("config.json: intermediate_size = -28", "at least 1")),
    Kind("zero", "hf", config(num_local_experts=0), ("config.json: num_local_experts = 0", "at least 1")),
    Kind("zero heads", "hf", config(num_attention_heads=0), ("config.json: num_attention_heads = 0", "at least 1")),
    Kind("window of zero", "hf", config(sliding_window=0), ("config.json: sliding_window = 0", "at least 1")),
    Kind("window of false", "hf", config(sliding_window=False), ("'sliding_window' is false", "an integer")),
    Kind("negative epsilon", "hf", config(rms_norm_eps=-1e-5), ("config.json: rms_norm_eps = -1e-05 is negative",)),
    Kind("theta of zero", "hf", config(rope_theta=0), ("config.json: rope_theta = 0, but a base from",)),
    Kind("theta huge", "hf", config(rope_theta=1e300), ("config.json: rope_theta = 1e+300, but a base from",)),
    Kind("theta tiny", "hf", config(rope_theta=1e-300), ("config.json: rope_theta = 1e-300, but a base from",)),
    Kind("theta huge", "mistral", params(rope_theta=1e300), ("params.json: rope_theta = 1e+300, but a base from",)),
    Kind(
        "uneven groups", "hf", config(num_key_value_heads=4),
        ("config.json: num_key_value_heads = 4 does not divide num_attention_heads = 6",),
    ),
    Kind("odd head_dim", "hf", config(head_dim=7), ("config.json: head_dim = 7 is odd",)),
    Kind(
        "no head_dim and none derivable", "hf", without("config.json", "head_dim"),
        ("config.json: 'head_dim' is missing", "hidden_size = 26", "num_attention_heads = 6"),
    ),
    Kind("no head_dim, no heads", "hf", config(head_dim=None, num_attention_heads=0), ("num_attention_heads = 0",)),
    Kind(
        "more chosen than there are", "hf", config(num_experts_per_tok=6),
        ("config.json: num_experts_per_tok = 6 exceeds num_local_experts = 5",),
    ),
    Kind("another activation", "hf", config(hidden_act="gelu"), ("'hidden_act' is \"gelu\"", "'silu' was expected")),
    Kind("another model", "hf", config(model_type="llama"), ("'model_type' is \"llama\"", "'mixtral' was expected")),
    Kind("tied, another output", "hf", config(tie_word_embeddings=True), ("'lm_head.weight' differs from the emb",)),
    Kind("tied, a string", "hf", config(tie_word_embeddings="no"), ("'tie_word_embeddings' is \"no\"", "true or")),
    Kind("attention bias", "hf", config(attention_bias=True), ("'attention_bias' is true",)),
    Kind("quantised", "hf", config(quantization_config={"bits": 4}), ("'quantization_config.quant_method' is miss",)),
    # config.json: rotary embedding
    Kind("linear scaling", "hf", config(rope_scaling={"type": "linear", "factor": 2}), ("'rope_scaling'", "linear")),
    Kind("NTK scaling", "hf", config(rope_scaling={"type": "dynamic"}), ("'rope_scaling'", "dynamic")),
    Kind("partial rotary", "hf", config(partial_rotary_factor=0.5), ("'partial_rotary_factor' is 0.5",)),
    Kind("yarn", "new", rope(rope_type="yarn", factor=4.0), ("'rope_parameters.rope_type' is \"yarn\"", "'default'")),
    Kind("linear", "new", rope(rope_type="linear"), ("'rope_parameters.rope_type' is \"linear\"", "'default'")),
    Kind("rope type null", "new", rope(rope_type=None), ("'rope_parameters.rope_type' is null", "'default'")),
    Kind("partial", "new", rope(partial_rotary_factor=0.5), ("'rope_parameters.partial_rotary_factor' is 0.5",)),
    Kind("a factor", "new", rope(factor=2.0), ("'rope_parameters.factor' is 2.0", "no such parameter")),
    Kind("parameters a list", "new", config(rope_parameters=[]), ("'rope_parameters' is []", "an object")),
    Kind(
        "per layer type", "new", config(rope_parameters={"full_attention": {"rope_theta": 1e4}}),
        ("'rope_parameters.full_attention'",),
    ),
    Kind("no theta in it", "new", config(rope_parameters={}), ("'rope_parameters.rope_theta' is missing",)),
    Kind("theta a string", "new", rope(rope_theta="1e6"), ("'rope_parameters.rope_theta' is \"1e6\"", "number")),
    Kind("theta a bool", "hf", config(rope_theta=True), ("'rope_theta' is true, but a finite number",)),
    Kind("two thetas", "new", config(rope_theta=1e6), ("'rope_theta' is 1000000.0", "rope_parameters.rope_theta' is")),
    Kind("theta NaN", "hf", config(rope_theta=float("nan")), ("'rope_theta' is NaN, but a finite number",)),
    Kind("theta infinite", "hf", config(rope_theta=float("inf")), ("'rope_theta' is Infinity, but a finite",)),
    Kind("theta beyond floats", "hf", config(rope_theta=10**400), ("'rope_theta' is an integer", "64 bits")),
    Kind("epsilon NaN", "hf", config(rms_norm_eps=float("nan")), ("'rms_norm_eps' is NaN, but a finite number",)),
    # config.json: numbers that are too large to list the expected tensors
    Kind("huge depth", "hf", config(num_hidden_layers=BIG), ("num_hidden_layers = 1000000000", "at most")),
    Kind("huge expert count", "hf", config(num_local_experts=BIG), ("at most", f"num_local_experts = {BIG}")),
    Kind("huge, fused", "fused", config(num_local_experts=BIG), ("at most", f"num_local_experts = {BIG}")),
    Kind("both", "fused", config(num_local_experts=BIG, num_hidden_layers=BIG), (f"num_hidden_layers = {BIG}",)),
    Kind("huge vocabulary", "hf", config(vocab_size=10**12), ("config.json", "vocab_size = 1000000000000", "at most")),
    Kind("beyond any size", "hf", config(hidden_size=10**30), ("'hidden_size' is an integer", "64 bits")),
    Kind("4000 digits", "hf", config(hidden_size=10**4000), ("'hidden_size' is an integer", "64 bits")),
    Kind("huge depth", "mistral", params(n_layers=BIG), ("at most", f"n_layers = {BIG}")),
    Kind("huge experts", "mistral", moe(num_experts=BIG), ("at most", f"moe.num_experts = {BIG}")),
    Kind(
        "huge expert count and no experts in the file", "mistral",
        both(moe(num_experts=BIG), replaced(CONSOLIDATED, "layers.0.feed_forward.gate.weight", None, None)),
        ("at most", f"moe.num_experts = {BIG}"),
    ),
    Kind("a layer more", "hf", config(num_hidden_layers=3), ("model.layers.2.input_layernorm", "is missing", "= 3")),
    Kind("a layer less", "hf", config(num_hidden_layers=1), ("model.layers.1.", "was not expected, nor 21 more")),
    # which files
    Kind("no weights", "hf", remove(SINGLE), ("neither model.safetensors nor model.safetensors.index.json",)),
    Kind("a pickle", "hf", both(remove(SINGLE), touch("pytorch_model.bin")), ("pytorch_model.bin: is a pickle",)),
    Kind("one file and an index", "shards", touch(SINGLE), ("holds model.safetensors beside model", "names")),
    Kind("weights a folder", "hf", file_to_folder(SINGLE), ("model.safetensors: is a folder",)),
    # a safetensors file
    Kind("empty weights", "hf", text(SINGLE, b""), ("model.safetensors: not a whole safetensors file",)),
    Kind("seven bytes", "hf", text(SINGLE, b"\x08" + bytes(6)), ("model.safetensors: not a whole",)),
    Kind("cut in the length", "hf", cut(SINGLE, 1e-4), ("model.safetensors: not a whole",)),
    Kind("cut in the header", "hf", cut(SINGLE, 0.01), ("model.safetensors: not a whole",)),
    Kind("cut in the middle", "hf", cut(SINGLE, 0.5), ("model.safetensors: not a whole",)),
    Kind("cut by a byte", "hf", cut(SINGLE, -1), ("model.safetensors: not a whole",)),
    Kind("a byte too many", "hf", lambda f: (f / SINGLE).open("ab").write(b"x"), ("model.safetensors: not a whole",)),
    Kind("garbage", "hf", text(SINGLE, b"\x20" + bytes(7) + b"\xf0\x28\x8c" * 40), ("model.safetensors: not a whole",)),
    Kind("header of 2^63 bytes", "hf", text(SINGLE, b"\xff" * 64), ("model.safetensors: not a whole",)),
    Kind("an LFS pointer", "hf", text(SINGLE, "version https://git-lfs.github.com/spec/v1\n"), ("git lfs pull",)),
    Kind("header a list", "hf", lambda f: put_together(f / SINGLE, b"[]", b""), ("model.safetensors: not a whole",)),
    Kind(
        "header nested", "hf", lambda f: put_together(f / SINGLE, b'{"a":' * 9999, b""),
        ("model.safetensors: not a whole",),
    ),
    Kind("overlap", "hf", tensor(NORM, data_offsets=[0, 52]), ("model.safetensors: not a whole",)),
    Kind("offsets backwards", "hf", tensor(NORM, data_offsets=[52, 0]), ("model.safetensors: not a whole",)),
    Kind("offsets beyond the end", "hf", tensor(NORM, data_offsets=[2**60, 2**60 + 52]), ("not a whole",)),
    Kind("offsets negative", "hf", tensor(NORM, data_offsets=[-52, 0]), ("not a whole",)),
    Kind("a dtype that is none", "hf", tensor(NORM, dtype="BF17"), ("model.safetensors: not a whole", "BF17")),
    Kind("shape and offsets disagree", "hf", tensor(NORM, shape=[27]), ("model.safetensors: not a whole",)),
    Kind("shape overflows", "hf", tensor(NORM, shape=[2**40, 2**40]), ("model.safetensors: not a whole",)),
    Kind("no offsets", "hf", header(SINGLE, lambda h: h[NORM].pop("data_offsets")), ("not a whole",)),
    # tensors
    Kind("tensor missing", "hf", replaced(SINGLE, NORM, None, None), (SINGLE, f"'{NORM}' is missing")),
    Kind("expert missing", "hf", replaced(SINGLE, EXPERT, None, None), (SINGLE, f"'{EXPERT}' is missing")),
    Kind(
        "renamed", "hf", lambda f: rename(f / SINGLE, "q_proj", "query"),
        ("layers.0.self_attn.q_proj.weight' is missing", "found instead 'model.layers.0.self_attn.query.weight'"),
    ),
    Kind(
        "a prefix on every name", "hf", lambda f: rename(f / SINGLE, "model.", "base.model."),
        ("'model.embed_tokens.weight' is missing", "found instead 'base.model."),
    ),
    Kind(
        "unexpected", "hf", replaced(SINGLE, "model.layers.0.self_attn.q_proj.bias", "BF16", [1], b"\0\0"),
        ("model.safetensors: tensor 'model.layers.0.self_attn.q_proj.bias' was not expected",),
    ),
    Kind(
        "a name on two lines", "hf", replaced(SINGLE, "a\nb\x1b[31m", "BF16", [1], b"\0\0"), ("a\\nb\\u001b",),
    ),
    Kind("a long name", "hf", replaced(SINGLE, "a" * 9999, "BF16", [1], b"\0\0"), ("(9999 characters)",)),
    Kind(
        "apart and fused", "hf", replaced(SINGLE, FUSED, "BF16", [1], b"\0\0"),
        ("'model.layers.0.block_sparse_moe.experts.gate_up_proj' has shape [1]", "[5, 56, 26] was expected"),
    ),
    Kind(
        "both module names", "hf", lambda f: rename(f / SINGLE, "layers.1.block_sparse_moe", "layers.1.mlp"),
        ("layers.0.mlp.gate.weight' is missing", "found instead 'model.layers.0.block_sparse_moe"),
    ),
    Kind("wrong shape", "hf", config(num_local_experts=4), ("gate.weight' has shape [5, 26], but [4, 26]", "= 4")),
    Kind(
        "another hidden size", "hf", config(intermediate_size=30),
        ("has shape [28, 26], but [30, 26]", "intermediate_size = 30, hidden_size = 26$"),
    ),
    Kind(
        "another head_dim", "hf", config(head_dim=10),
        ("q_proj.weight' has shape [48, 26], but [60, 26]", "head_dim = 10, hidden_size = 26$"),
    ),
    Kind("transposed", "hf", tensor(GATE, shape=[26, 5]), (f"'{GATE}' has shape [26, 5], but [5, 26] was expected",)),
    Kind("flat", "hf", tensor(GATE, shape=[130]), (f"'{GATE}' has shape [130], but [5, 26] was expected",)),
    Kind("a dimension more", "hf", tensor(NORM, shape=[1, 26]), (f"'{NORM}' has shape [1, 26], but [26]",)),
    Kind("a scalar", "hf", replaced(SINGLE, NORM, "BF16", [], b"\0\0"), (f"'{NORM}' has shape [], but [26]",)),
    Kind("no elements", "hf", replaced(SINGLE, NORM, "BF16", [0]), (f"'{NORM}' has shape [0], but [26]",)),
    Kind(
        "fused transposed", "fused", tensor(FUSED, shape=[5, 26, 56]),
        (f"'{FUSED}' has shape [5, 26, 56], but [5, 56, 26] was expected",),
    ),
    *(
        Kind(f"dtype {dtype}", "hf", replaced(SINGLE, NORM, dtype, [26], bytes(26 * size)),
             (f"'{NORM}' has dtype {dtype}, but one of BF16, F16, F32, F64 was expected",))
        for dtype, size in {"I8": 1, "F8_E4M3": 1, "I64": 8, "U16": 2, "BOOL": 1, "C64": 8}.items()
    ),
    # values
    Kind("NaN in a norm", "hf", values(NORM, BFLOAT16, np.nan), (SINGLE, NORM, "1 value that is not finite", "nan")),
    Kind("Inf in an expert", "hf", values(EXPERT, BFLOAT16, np.inf), (SINGLE, EXPERT, "1 value that is", "is inf")),
    Kind("-Inf", "half", values(EXPERT, np.float16, 0, -np.inf), (EXPERT, "1 value that is not finite", "is -inf")),
    Kind(
        "three of them", "float", values(EXPERT, np.float32, -np.inf, 1, np.nan, np.inf),
        (EXPERT, "3 values that are not finite", "is -inf"),
    ),
    Kind("NaN, fused", "fused", values(FUSED, BFLOAT16, np.nan), (FUSED, "1 value that is not finite")),
    Kind(
        "NaN in a mapped row", "mistral",
        values("layers.1.attention.wq.weight", BFLOAT16, np.nan, file=CONSOLIDATED),
        (CONSOLIDATED, "layers.1.attention.wq.weight", "1 value that is not finite"),
    ),
    # shards
    Kind("shard missing", "shards", remove(SHARD), (f"{SHARD}: no such file", f"{INDEX} names it")),
    Kind(
        "outside the folder", "shards", said_to_be_in("../x.safetensors"),
        (INDEX, f"'{NORM}' is in \"../x.safetensors\"", "in the same folder was expected"),
    ),
    *(
        Kind(f"shard named {shard!r}"[:40], "shards", said_to_be_in(shard),
             (INDEX, f"'{NORM}' is in", "in the same folder was expected"))
        for shard in ("/etc/passwd", "./" + SHARD, "a/b.safetensors", "x.bin", "", "..", "a\0.safetensors", 3, None,
                      "a\nb.safetensors", ["x"], "\ud800.safetensors")
    ),
    Kind("a long shard name", "shards", said_to_be_in("a" * 400 + ".safetensors"), (INDEX, "aaa...")),
    Kind("no weight_map", "shards", without(INDEX, "weight_map"), (f"{INDEX}: 'weight_map' is missing",)),
    Kind("weight_map a list", "shards", edit(INDEX, lambda i: i.update(weight_map=[])), ("'weight_map' is []",)),
    Kind("weight_map empty", "shards", edit(INDEX, lambda i: i.update(weight_map={})), ("embed_tokens", "is missing")),
    Kind("index not JSON", "shards", text(INDEX, "{"), (f"{INDEX}: not valid JSON",)),
    Kind("index a list", "shards", text(INDEX, "[]"), (f"{INDEX}: holds a JSON array",)),
    Kind(
        "in the index, not in the shard", "shards", replaced(SHARD, SHARD_NORM, None, None),
        (f"{SHARD}: tensor '{SHARD_NORM}' is missing", f"{INDEX} says it holds"),
    ),
    Kind(
        "in the shard, not in the index", "shards", weight_map(lambda m: m.pop(NORM)),
        (f"tensor '{NORM}' is not in {INDEX}",),
    ),
    Kind(
        "in another shard than said", "shards", weight_map(lambda m: m.update({NORM: SHARD})),
        (INDEX, f"'{NORM}' is said to be in {SHARD}, but is in model-00003-of-00003.safetensors"),
    ),
    Kind(
        "in two shards", "shards", replaced(SHARD, NORM, "BF16", [26], bytes(52)),
        (f"'{NORM}' is also in {SHARD}", "in one file"),
    ),
    Kind("a shard cut", "shards", cut(SHARD, 0.7), (f"{SHARD}: not a whole safetensors file",)),
    # Mistral's layout
    *(
        Kind(f"{field} missing", "mistral", without("params.json", field), ("params.json", f"'{field}' is missing"))
        for field in MISTRAL_FIELDS.values()
        if "." not in field and field not in ("sliding_window", "max_position_embeddings")
    ),
    Kind("moe missing", "mistral", without("params.json", "moe"), ("params.json: 'moe' is missing",)),
    Kind("moe a number", "mistral", params(moe=8), ("params.json: 'moe' is 8, but an object",)),
    Kind("experts missing", "mistral", params(moe={}), ("params.json: 'moe.num_experts' is missing",)),
    Kind("experts a string", "mistral", moe(num_experts="8"), ("'moe.num_experts' is \"8\"", "an integer")),
    Kind("zero experts", "mistral", moe(num_experts=0), ("params.json: moe.num_experts = 0", "at least 1")),
    Kind("shared experts", "mistral", moe(num_shared_experts=1), ("'moe.num_shared_experts' is 1", "no Mixtral has")),
    Kind("yarn", "mistral", params(yarn={"factor": 4}), ("params.json: 'yarn' is", "no Mixtral has this field")),
    Kind("lora", "mistral", params(lora={"rank": 64}), ("params.json: 'lora' is", "no Mixtral has this field")),
    Kind("unknown, on two lines", "mistral", params(**{"a\nb": 1}), ("params.json: 'a\\nb' is 1",)),
    Kind("mamba", "mistral", params(model_type="mamba"), ("'model_type' is \"mamba\"", "'transformer'")),
    Kind("tied", "mistral", params(tied_embeddings=True), ("'output.weight' differs from the embedding",)),
    Kind("odd head_dim", "mistral", params(head_dim=9), ("params.json: head_dim = 9 is odd",)),
    Kind(
        "uneven groups", "mistral", params(n_kv_heads=4), ("params.json: n_kv_heads = 4 does not divide n_heads = 6",)
    ),
    Kind("theta missing with a window", "mistral", without("params.json", "rope_theta"), ("'rope_theta' is missing",)),
    Kind("a pickle", "mistral", both(remove(CONSOLIDATED), touch("consolidated.00.pth")), (".00.pth: is a pickle",)),
    Kind("another pickle", "mistral", both(remove(CONSOLIDATED), touch("consolidated.00.pt")), (".00.pt: is a pick",)),
    Kind("no weights", "mistral", remove(CONSOLIDATED), ("mistral: no consolidated*.safetensors",)),
    Kind(
        "names of the other layout", "mistral", lambda f: rename(f / CONSOLIDATED, "tok_embeddings", "embed_tokens"),
        ("'tok_embeddings.weight' is missing", "found instead 'embed_tokens.weight'"),
    ),
    Kind(
        "a shard missing, without index", "mistral-shards",
        both(remove("consolidated.safetensors.index.json"), remove("consolidated-00002-of-00003.safetensors")),
        ("'layers.0.attention_norm.weight' is missing", "moe.num_experts = 5$"),
    ),
    Kind(
        "a shard missing", "mistral-shards", remove("consolidated-00002-of-00003.safetensors"),
        ("consolidated-00002-of-00003.safetensors: no such file",),
    ),
    Kind(
        "one file beside the shards", "mistral-shards",
        both(
            remove("consolidated.safetensors.index.json"),
            lambda f: shutil.copy(f / "consolidated-00001-of-00003.safetensors", f / CONSOLIDATED),
        ),
        ("is also in", "in one file"),
    ),
]  # fmt: skip


def read_all(folder: Path) -> None:
    for weight in named_weights(load_checkpoint(folder).parameters).values():
        weight.read()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.base}: {kind.name}")
def test_a_broken_checkpoint_gives_its_sentence(tmp_path: Path, good: Path, kind: Kind) -> None:
    folder = tmp_path / kind.base
    shutil.copytree(good / kind.base, folder)
    read_all(folder)
    kind.damage(folder)
    started = time.monotonic()
    with pytest.raises(InputError) as caught:
        read_all(folder)
    assert time.monotonic() - started < 3
    sentence = str(caught.value)
    assert sentence.startswith(str(folder)), sentence
    for words in kind.words:
        assert words in sentence + "$", sentence
    assert sentence.isprintable(), sentence
    assert len(sentence) < 600 + len(str(folder)), sentence
    assert not sentence.endswith("."), sentence


def test_there_are_enough_kinds() -> None:
    names = [(kind.base, kind.name) for kind in KINDS]
    assert len(KINDS) >= 40
    assert len(set(names)) == len(names)


def test_non_finite_rows_are_found_when_they_are_used(tmp_path: Path, good: Path) -> None:
    """Only rows that are used are checked, at every use."""
    shutil.copytree(good / "hf", tmp_path, dirs_exist_ok=True)
    values("model.embed_tokens.weight", BFLOAT16, np.nan)(tmp_path)
    embedding = named_weights(load_checkpoint(tmp_path).parameters)["embedding"]
    embedding.rows(np.array([0, 35]))
    for _ in range(2):
        with pytest.raises(InputError, match="1 value that is not finite"):
            embedding.rows(np.array([0, 36]))


def test_a_file_that_vanishes_after_loading_is_an_input_error(tmp_path: Path, good: Path) -> None:
    shutil.copytree(good / "hf", tmp_path, dirs_exist_ok=True)
    norm = named_weights(load_checkpoint(tmp_path).parameters)["final_norm"]
    (tmp_path / SINGLE).unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: tensor 'model\.norm\.weight' can no longer be read"):
        norm.read()


@pytest.mark.parametrize("field", ["rope_scaling", "quantization_config", "attention_bias", "head_dim"])
def test_null_is_as_good_as_absent(tmp_path: Path, good: Path, field: str) -> None:
    shutil.copytree(good / "hf", tmp_path, dirs_exist_ok=True)
    changes = {field: None, **({"hidden_size": 48} if field == "head_dim" else {})}
    config(**changes)(tmp_path)
    if field == "head_dim":
        with pytest.raises(InputError, match="has shape"):  # derived, then compared with the tensors
            load_checkpoint(tmp_path)
    else:
        assert load_checkpoint(tmp_path).config == UNEVEN
