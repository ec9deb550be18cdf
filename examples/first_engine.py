# SPDX-License-Identifier: Apache-2.0
"""A Mixtral of some sixty lines in NumPy, to try refmoe on. It needs nothing of refmoe.

    values = Engine("checkpoint")([1, 31, 41])      # {"embedding": ..., "layers.0.attention_norm": ..., "logits": ...}

It reads a checkpoint of Hugging Face in one file, and runs a prefill. `values` has what was computed on the way, under
refmoe's names.  T: tokens   H: query heads   K: key and value heads   d: the size of a head   E: experts   k: chosen
"""

import json
from pathlib import Path

import ml_dtypes  # noqa: F401  (so that NumPy knows bfloat16)
import numpy as np
from safetensors.numpy import load_file


def softmax(x):
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


class Engine:
    def __init__(self, folder):
        self.config = json.loads(Path(folder, "config.json").read_text())
        stored = load_file(Path(folder, "model.safetensors"))
        self.weights = {name: weight.astype(np.float32) for name, weight in stored.items()}
        self.theta = self.config["rope_theta"]

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T

    def norm(self, x, name):
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + np.float32(self.config["rms_norm_eps"])) * self.weights[f"{name}.weight"]

    def rotate(self, x):
        half = x.shape[-1] // 2
        angles = np.arange(len(x))[:, None, None] * float(self.theta) ** (-np.arange(half) / half)
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def attention(self, x, name, tap, values):
        d, heads = self.config["head_dim"], self.config["num_attention_heads"]
        q, k, v = (self.linear(x, f"{name}.{part}_proj").reshape(len(x), -1, d) for part in "qkv")  # [T, H or K, d]
        values |= {f"{tap}.q": q, f"{tap}.k": k, f"{tap}.v": v}
        q, k = self.rotate(q), self.rotate(k)
        values |= {f"{tap}.q_rope": q, f"{tap}.k_rope": k}
        k, v = (np.repeat(each, heads // each.shape[1], axis=1) for each in (k, v))  # [T, H, d]
        scores = np.einsum("thd,shd->hts", q, k) / np.float32(np.sqrt(d))
        probs = softmax(np.where(np.tri(len(x), dtype=bool), scores, -np.inf))
        context = np.einsum("hts,shd->thd", probs, v)
        values |= {f"{tap}.scores": scores, f"{tap}.probs": probs, f"{tap}.context": context}
        return self.linear(context.reshape(len(x), -1), f"{name}.o_proj")

    def experts(self, x, name, tap, values):
        logits = self.linear(x, f"{name}.gate")  # [T, E]
        chosen = np.argsort(-logits, axis=-1, kind="stable")[:, : self.config["num_experts_per_tok"]]  # [T, k]
        weights = softmax(np.take_along_axis(logits, chosen, axis=-1))
        values |= {f"{tap}.logits": logits, f"{tap}.experts": chosen, f"{tap}.weights": weights}
        out = np.zeros_like(x)
        for (token, slot), expert in np.ndenumerate(chosen):
            gate, up = (self.linear(x[token], f"{name}.experts.{expert}.{part}") for part in ("w1", "w3"))
            hidden = gate / (1 + np.exp(-gate)) * up
            out[token] += weights[token, slot] * self.linear(hidden, f"{name}.experts.{expert}.w2")
        return out

    def __call__(self, tokens):
        x = self.weights["model.embed_tokens.weight"][tokens]
        values = {"embedding": x}
        for i in range(self.config["num_hidden_layers"]):
            name, tap = f"model.layers.{i}", f"layers.{i}"
            normed = values[f"{tap}.attention_norm"] = self.norm(x, f"{name}.input_layernorm")
            x = x + self.attention(normed, f"{name}.self_attn", f"{tap}.attention", values)
            values[f"{tap}.attention_residual"] = x
            normed = values[f"{tap}.moe_norm"] = self.norm(x, f"{name}.post_attention_layernorm")
            x = x + self.experts(normed, f"{name}.block_sparse_moe", f"{tap}.router", values)
            values[f"{tap}.residual"] = x
        values["final_norm"] = self.norm(x, "model.norm")
        values["logits"] = self.linear(values["final_norm"], "lm_head")
        return values
