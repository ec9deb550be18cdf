# SPDX-License-Identifier: Apache-2.0
"""Folders as people have them: which are read, with the logits of transformers, and which are refused.

    python -m bench.folders --json bench/results/folders.json

Each row is a folder of a real repository or report: every field of its config.json that is odd, dimensions made small,
random weights. Both sides compute in float64; transformers itself keeps norms, angles and the router in float32.
`tests/checkpoints/test_real_folders.py` runs the same rows.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

import refmoe
from refmoe.errors import InputError

TOKENS = (1, 31, 41, 5, 9, 26, 53, 58, 3, 7, 60, 12)
PUBLISHED: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 4, "num_experts_per_tok": 2,
    "num_hidden_layers": 2, "num_key_value_heads": 2, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.36.0.dev0", "use_cache": True,
    "vocab_size": 64,
}  # fmt: skip
"""The config.json of mistralai/Mixtral-8x7B-v0.1 with small dimensions."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Change = Callable[[Path], Any]


@dataclass(frozen=True)
class Row:
    """A folder, and what is expected of it."""

    id: str
    source: str
    odd: str
    """What is odd about it."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of config.json that differ from the published one."""
    without: str = ""
    """Fields of the published config.json that are not there."""
    refused: str | None = None
    """Words of the sentence with which the folder is refused; None: it is read."""
    change: Change | None = None
    """Changes the files before anybody reads them."""
    ours: Change | None = None
    """Changes them after transformers has read them, as it cannot read what comes out."""
    shards: bool = False
    modules: bool = False
    """Whether the tensors have the names of the modules of transformers 5."""


# Changes


def _edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the tensors of the one file in place."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / SINGLE, {"format": "pt"})


def _index(folder: Path, **fields: Any) -> None:
    """Replace the fields of an index; an index of the one file is made where there is none."""
    path = folder / INDEX
    if not path.exists():
        from safetensors import safe_open

        with safe_open(folder / SINGLE, "np") as file:
            path.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(file.keys(), SINGLE)}))
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def _beside(*names: str) -> Change:
    """Put files beside the weights that are none of the checkpoint's."""
    from safetensors.numpy import save

    content = save({"stranger": np.zeros(2, np.float32)})
    return lambda folder: [(folder / name).write_bytes(content) for name in names]


def _renamed(old: str, new: str) -> Change:
    """Replace a part of the tensors' names."""

    def change(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return lambda folder: _edit(folder, change)


def _to(name: str, dtype: str) -> Change:
    """Store the tensors whose names hold a word at another dtype."""

    def change(tensors: dict[str, Any]) -> None:
        import torch

        for key in [key for key in tensors if name in key]:
            tensors[key] = tensors[key].to(getattr(torch, dtype))

    return lambda folder: _edit(folder, change)


def _twice(other: bool) -> Change:
    """Store an output matrix as well: the embedding, or another."""

    def change(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone() + (1.0 if other else 0.0)

    return lambda folder: _edit(folder, change)


def _add(name: str) -> Change:
    """Store one more tensor."""

    def change(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors["model.norm.weight"][:4].clone()

    return lambda folder: _edit(folder, change)


def _config(change: Callable[[str], str]) -> Change:
    """Change the text of config.json."""
    return lambda folder: (folder / "config.json").write_text(change((folder / "config.json").read_text()))


def _linked(folder: Path) -> None:
    """Make the weights a symbolic link, as the cache of huggingface_hub does."""
    (folder / "blobs").mkdir()
    (folder / SINGLE).rename(folder / "blobs" / "0a1b")
    (folder / SINGLE).symlink_to(folder / "blobs" / "0a1b")


# Rows

TIED = {
    "tie_word_embeddings": True, "hidden_size": 60, "num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 4,
    "rope_theta": 100000, "num_local_experts": 4, "is_llama_config": True, "rope_interleaved": False,
    "rope_scaling": None, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "dtype": "bfloat16",
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e6}
PRUNED = "attention_dropout output_router_logits router_aux_loss_coef"
NO_SCALES = "its scales were expected"
FLOAT_CACHE = "a cache that is not quantised was expected"
QUANTISED: dict[str, tuple[dict[str, Any], str]] = {
    "AWQ": ({"bits": 4, "group_size": 128, "quant_method": "awq", "version": "gemm", "zero_point": True}, NO_SCALES),
    "GPTQ": ({"bits": 4, "group_size": 32, "desc_act": True, "quant_method": "gptq"}, NO_SCALES),
    "EXL2": ({"quant_method": "exl2", "version": "0.0.11", "bits": 3.5, "head_bits": 6}, "awq was expected"),
    "W4A16": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
        "at least one group",
    ),
    "FP8": ({"quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": "static"}, FLOAT_CACHE),
}
"""By its usual name, what config.json says, and the refusal of weights that are not so."""

ROWS: tuple[Row, ...] = (
    Row("F01", "Fu01978/SmolMoE-4x360M-Instruct; mergekit#615; mlx-lm#889", "tied, no lm_head", TIED),
    Row("F01 equal", "tools that save both", "tied, an equal lm_head stored", TIED, change=_twice(other=False)),
    Row("F01 other", "transformers 5 computes with it, others do not", "tied, another lm_head stored", TIED,
        refused="differs from the embedding", change=_twice(other=True)),
    Row("F03", "macadeliccc/dolphin-mixtral-2x7b", "added tokens have rows, the end is one of them",
        {"vocab_size": 66, "eos_token_id": 64, "num_local_experts": 2}),
    Row("F08", "repositories of merged shards", "an index that names the one file beside it", change=_index),
    Row("F09", "variant of transformers' rewriting", "rope_scaling of the default type",
        {"rope_scaling": {"rope_type": "default"}}),
    Row("F10", "a key of real files of 4.57", "rope_parameters.partial_rotary_factor of 1",
        {"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}}, "rope_theta"),
    Row("F11", "vllm#42624; DeepSpeed#8345", "two thetas that differ", {"rope_theta": 1e4, "rope_parameters": ROPE},
        refused="rope_parameters.rope_theta"),
    Row("F12", "hf-internal-testing/tiny-random-MixtralForCausalLM", "head_dim null, dtype, both thetas",
        {"head_dim": None, "dtype": "float32", "rope_parameters": ROPE, "pad_token_id": 0}),
    Row("F14", "OsakanaTeishoku/mixtral_2x300m", "top 1 of 2, a window",
        {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 5}),
    Row("F15", "macadeliccc/dolphin-mixtral-2x7b", "both of 2 experts, theta 1e4",
        {"num_local_experts": 2, "rope_theta": 1e4}),
    Row("F17 tiny", "arcee-ai/teeny-tiny-mixtral; dacorvo/Mixtral-tiny", "head_dim 16, an uneven hidden size",
        {"head_dim": 16, "intermediate_size": 35, "num_local_experts": 4}),
    Row("F17 window", "llmat/Moellmat-4x7b; nextai-team/Moe-2x7b-QA-Code", "no auxiliary keys, a window",
        {"sliding_window": 4, "num_local_experts": 4}, PRUNED),
    Row("F17 merged", "Undi95/Mixtral-8x7B-MoE-RP-Story; Lambent/cosmoem-8x1B", "keys of a merged Llama",
        {"_name_or_path": "merge", "pad_token_id": 0, "pretraining_tp": 1, "rope_scaling": None,
         "attention_bias": False}),
    Row("F17 large", "0-hero/Matter-0.2-8x22B", "six query heads per key/value head",
        {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 65536}),
    Row("F18 neuron", "nithiyn/Mixtral-8x22B-Instruct-neuron", "an unknown table",
        {"neuron": {"auto_cast": None, "batch_size": 4, "compiler_version": "2.15"}}),
    Row("F18 short", "scaleapi llm-engine; TensorRT-LLM test", "no window, no tie, no aux keys", {},
        f"sliding_window tie_word_embeddings use_cache {PRUNED}"),
    Row("F19 mergekit", "HiroseKoichi/Llama-Salad-4x8B-V2", "an index with mergekit's version", shards=True,
        change=lambda folder: _index(folder, metadata={"mergekit_version": "0.0.4.2", "total_size": 1})),
    Row("F19 bare", "gridoneai/Mixtral-8x22B-GO-Instruct-v1", "an index without metadata", shards=True,
        ours=lambda folder: _index(folder, metadata=None)),
    Row("F21", "yujiepan/mixtral-tiny-random", "head_dim 1", {"head_dim": 1}, refused="is odd"),
    Row("F22", "mattshumer/mistral-8x7b-chat", "a pre-release format",
        {"architectures": ["MixtralForCausalLM"], "model_type": "mistral", "num_experts": 8}, refused="not a Mixtral"),
    *(Row(f"F23 {name}", "12 pages of quantised files", f"config.json says {name}, the weights are float32",
          {"quantization_config": value}, refused=refused) for name, (value, refused) in QUANTISED.items()),
    Row("F24 stale", "uploads of two generations", "a stale third shard", shards=True,
        ours=_beside("model-00003-of-00003.safetensors")),
    Row("F24 others", "repositories of several formats", "adapter, .bin and consolidated weights beside",
        ours=_beside("adapter_model.safetensors", "pytorch_model.bin", "consolidated.safetensors")),
    Row("F24 BOM", "editors of Windows", "config.json with a byte order mark",
        ours=_config(lambda text: "\ufeff" + text)),
    Row("F24 Infinity", "json.dump of Python", "Infinity in an unused field", {"router_jitter_noise": float("inf")}),
    Row("F24 link", "the cache of huggingface_hub", "a symbolic link", change=_linked),
    Row("F24 mixed", "routers kept wide", "a float32 router among bfloat16 weights", {"torch_dtype": "bfloat16"},
        change=lambda folder: (_to("", "bfloat16")(folder), _to("gate", "float32")(folder))),
    Row("F24 fused", "transformers 5 with its own names", "fused experts under mlp", modules=True),
    Row("F25 inv_freq", "old converters", "inv_freq stored", refused="inv_freq",
        change=_add("model.layers.0.self_attn.rotary_emb.inv_freq")),
    Row("F25 experts", "other converters", "experts as gate_proj and up_proj", change=_renamed(".w1.", ".gate_proj."),
        refused="w1.weight' is missing"),
    Row("F25 prefix", "wrapped models", "prefixed names", change=_renamed("model.", "base_model.model."),
        refused="is missing"),
    Row("F25 fp8", "half-quantised files", "experts in FP8", change=_to("experts", "float8_e4m3fn"), refused="F8_E4M3"),
    Row("F25 untied", "pruned uploads", "no lm_head, not tied", refused="'lm_head.weight' is missing",
        change=lambda folder: _edit(folder, lambda tensors: tensors.pop("lm_head.weight"))),
)  # fmt: skip


def write(row: Row, folder: Path) -> None:
    """Write the folder as transformers writes it, with the row's own config.json and changes."""
    import torch
    import transformers

    values = {name: value for name, value in PUBLISHED.items() if name not in row.without.split()} | dict(row.changes)
    plain = {name: value for name, value in values.items() if name not in ("quantization_config", "rope_scaling")}
    torch.manual_seed(7)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**plain | {"model_type": "mixtral"}))
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.2)
    model.save_pretrained(folder, max_shard_size="20KB" if row.shards else "1GB", save_original_format=not row.modules)
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if row.change is not None:
        row.change(folder)


def logits_of_transformers(folder: Path) -> np.ndarray[Any, Any]:
    """Logits [T, V] of the tokens, in float64 where transformers allows it."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits: np.ndarray[Any, Any] = model(torch.tensor([TOKENS])).logits[0].numpy()
    return logits


def tried(row: Row, folder: Path) -> dict[str, Any]:
    """What became of a row: its largest relative difference from transformers, or the sentence that refuses it."""
    write(row, folder)
    theirs = None if row.refused else logits_of_transformers(folder)
    if row.ours is not None:
        row.ours(folder)
    found: dict[str, Any] = {"id": row.id, "source": row.source, "odd": row.odd, "expected": row.refused or "read"}
    try:
        run = refmoe.load(str(folder)).run(list(TOKENS), dtype="float64", taps="logits")
    except InputError as error:
        return found | {"refused": str(error).replace(f"{folder}", "DIR")}
    if theirs is None:
        return found | {"difference": None}
    ours = np.asarray(run["prefill", "logits"], np.float64)
    return found | {"difference": float(np.abs(ours - theirs).max() / np.abs(theirs).max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="the file of results")
    given = parser.parse_args()
    rows = []
    for row in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(tried(row, Path(folder)))
        print(json.dumps(rows[-1]), flush=True)
    if given.json is not None:
        import transformers

        content = {"transformers": transformers.__version__, "rows": rows}
        given.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
