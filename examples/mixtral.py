# SPDX-License-Identifier: Apache-2.0
"""A small Mixtral in NumPy float32: one file, easy to read, not fast.

It reads a Hugging Face checkpoint, `config.json` and `model.safetensors`, and needs nothing of refmoe. The class
`Adapter` at the end is all that refmoe needs of it:

    PYTHONPATH=. refmoe conform --adapter examples.mixtral

T are the new tokens, S the cached ones with the new ones included.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (so that NumPy knows bfloat16)
import numpy as np
from safetensors.numpy import load_file

Array = np.ndarray[Any, Any]
Values = dict[str, Array]
"""What was computed on the way, under the names of golden/FORMAT.md."""


class Cache:
    """Rotated keys and values, [S, K, d] per layer, and positions, [S], of one sequence."""

    def __init__(self) -> None:
        self.positions = np.zeros(0, np.int64)
        self.keys: dict[int, Array] = {}
        self.values: dict[int, Array] = {}

    def cut(self, tokens: int) -> None:
        """Keep the first tokens, forget the rest."""
        self.positions = self.positions[:tokens]
        for stored in (self.keys, self.values):
            stored.update({layer: array[:tokens] for layer, array in stored.items()})


def append(stored: dict[int, Array], layer: int, new: Array) -> Array:
    """Add the new tokens' rows to a layer's; returns all of them."""
    stored[layer] = np.concatenate([stored[layer], new]) if layer in stored else new
    return stored[layer]


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    root: Array = np.sqrt(mean_square + eps)
    return x / root * gain


def softmax(x: Array) -> Array:
    weight: Array = np.exp(x - np.max(x, axis=-1, keepdims=True))
    total: Array = np.sum(weight, axis=-1, keepdims=True)
    return weight / total


def silu(x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp of a large number is infinite, and x over that is the zero it should be
        divisor: Array = 1 + np.exp(-x)
    return x / divisor


def rotate(x: Array, positions: Array, theta: float) -> Array:
    """Turn element i of each head with element i + d/2.   x: [T, heads, d]"""
    half = x.shape[-1] // 2
    # in float64: a float32 angle of thousands of turns has few bits left for where within a turn it is
    angles = positions[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angles).astype(x.dtype)[:, None], np.sin(angles).astype(x.dtype)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Mixtral:
    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        stored = load_file(folder / "model.safetensors")
        self.weights: dict[str, Array] = {name: weight.astype(np.float32) for name, weight in stored.items()}

    def linear(self, x: Array, name: str) -> Array:
        return x @ self.weights[f"{name}.weight"].T

    def norm(self, x: Array, name: str) -> Array:
        return rms_norm(x, self.weights[f"{name}.weight"], self.config["rms_norm_eps"])

    def forward(self, tokens: Array, positions: Array, cache: Cache) -> Values:
        """Everything about new tokens, `logits` [T, V] last; the cache then has them too."""
        cache.positions = np.concatenate([cache.positions, positions])
        x = self.weights["model.embed_tokens.weight"][tokens]
        found = {"embedding": x}
        for i in range(self.config["num_hidden_layers"]):
            values = self.layer(i, x, cache)
            found |= {f"layers.{i}.{name}": value for name, value in values.items()}
            x = values["residual"]
        x = self.norm(x, "model.norm")
        return found | {"final_norm": x, "logits": self.linear(x, "lm_head")}

    def layer(self, i: int, x: Array, cache: Cache) -> Values:
        normed = self.norm(x, f"model.layers.{i}.input_layernorm")
        attention = self.attention(i, normed, cache)
        middle = x + attention["attention.output"]
        moe_norm = self.norm(middle, f"model.layers.{i}.post_attention_layernorm")
        moe = self.moe(f"model.layers.{i}.block_sparse_moe", moe_norm)
        ends = {"attention_norm": normed, "attention_residual": middle, "moe_norm": moe_norm}
        return ends | attention | moe | {"residual": middle + moe["moe.output"]}

    def attention(self, i: int, x: Array, cache: Cache) -> Values:
        at, head_dim, window = f"model.layers.{i}.self_attn", self.config["head_dim"], self.config["sliding_window"]
        q, k, v = (self.linear(x, f"{at}.{name}_proj").reshape(len(x), -1, head_dim) for name in "qkv")
        positions = cache.positions[-len(x) :]
        q_rope, k_rope = (rotate(each, positions, self.config["rope_theta"]) for each in (q, k))
        stored = append(cache.keys, i, k_rope), append(cache.values, i, v)
        share = q.shape[1] // k.shape[1]  # so many query heads in a row read the same keys and values
        keys, values = (np.repeat(each, share, axis=1) for each in stored)
        scores = np.einsum("thd,shd->hts", q_rope, keys) / np.sqrt(np.float32(head_dim))
        distance = positions[:, None] - cache.positions[None, :]
        visible = (distance >= 0) & (distance < (window or np.inf))
        probs = softmax(np.where(visible, scores, np.float32(-np.inf)))
        context = np.einsum("hts,shd->thd", probs, values)
        return {
            "attention.q": q, "attention.k": k, "attention.v": v, "attention.q_rope": q_rope,
            "attention.k_rope": k_rope, "attention.scores": scores, "attention.probs": probs,
            "attention.context": context, "attention.output": self.linear(context.reshape(len(x), -1), f"{at}.o_proj"),
        }  # fmt: skip

    def moe(self, at: str, x: Array) -> Values:
        logits = self.linear(x, f"{at}.gate")
        experts = np.argsort(-logits, axis=1, kind="stable")[:, : self.config["num_experts_per_tok"]]
        weights = softmax(np.take_along_axis(logits, experts, axis=1))
        gate, up, hidden = np.empty((3, *experts.shape, self.config["intermediate_size"]), np.float32)
        output = np.empty((*experts.shape, x.shape[1]), np.float32)
        for expert in np.unique(experts):
            chosen = experts == expert  # [T, k], at most one true in each row
            rows = x[np.any(chosen, axis=1)]
            gate[chosen] = self.linear(rows, f"{at}.experts.{expert}.w1")
            up[chosen] = self.linear(rows, f"{at}.experts.{expert}.w3")
            hidden[chosen] = silu(gate[chosen]) * up[chosen]
            output[chosen] = self.linear(hidden[chosen], f"{at}.experts.{expert}.w2")
        return {
            "router.logits": logits, "router.experts": experts, "router.weights": weights, "expert.gate": gate,
            "expert.up": up, "expert.hidden": hidden, "expert.output": output,
            "moe.output": np.sum(output * weights[:, :, None], axis=1),
        }  # fmt: skip


class Adapter:
    """What refmoe asks for; refmoe/engines/PROTOCOL.md has the words."""

    name, version = "mixtral.py", "1"
    dtypes = ("float32",)
    taps = (
        "embedding", "attention_norm", "attention.q", "attention.k", "attention.v", "attention.q_rope",
        "attention.k_rope", "attention.scores", "attention.probs", "attention.context", "attention.output",
        "attention_residual", "moe_norm", "router.logits", "router.experts", "router.weights", "expert.gate",
        "expert.up", "expert.hidden", "expert.output", "moe.output", "residual", "final_norm", "logits",
    )  # fmt: skip
    abilities = ("chunk", "decode", "sequences")
    policies: Mapping[str, str] = {}  # every operation rounds to float32, as the policy of that name has it

    def load(self, checkpoint: Path, dtype: str) -> None:
        self.model = Mixtral(checkpoint)

    def run(self, runs: Sequence[Any], taps: Collection[str]) -> Values:
        arrays: Values = {}
        caches: dict[int, Cache] = {}
        for run in runs:
            cache = caches.setdefault(run.sequence, Cache())
            cache.cut(run.past)
            found = self.model.forward(np.array(run.tokens), np.array(run.positions), cache)
            arrays |= {f"{run.run}/{name}": value for name, value in found.items()}
        return arrays
