# SPDX-License-Identifier: Apache-2.0
"""The names of what can be observed, and their shapes."""

from __future__ import annotations

from collections.abc import Iterator

from refmoe.spec.config import Config
from refmoe.spec.interface import Array, Ops

LAYER_TAPS = {
    "attention_norm": "T D",
    "attention.q": "T H d",
    "attention.k": "T K d",
    "attention.v": "T K d",
    "attention.q_rope": "T H d",
    "attention.k_rope": "T K d",
    "attention.scores": "H T S",  # scaled, unmasked
    "attention.probs": "H T S",
    "attention.context": "T H d",
    "attention.output": "T D",
    "attention_residual": "T D",
    "moe_norm": "T D",
    "router.logits": "T E",
    "router.experts": "T k",  # integers
    "router.weights": "T k",
    "expert.gate": "T k F",
    "expert.up": "T k F",
    "expert.hidden": "T k F",
    "expert.output": "T k D",  # unweighted
    "moe.output": "T D",
    "residual": "T D",
}
"""Taps of a layer in order of computation, each with prefix ``layers.{i}.``, and their dimensions."""

MODEL_TAPS = {"embedding": "T D", "final_norm": "T D", "logits": "T V"}
"""Taps outside the layers and their dimensions."""

LOGPROBS, IDS = "logprobs", "logprobs.ids"
READ_OUT_TAPS = {LOGPROBS: "T n", IDS: "T n"}
"""Taps beside the model's own: log-probabilities, of all entries or of the n that the integer ids name per token."""


def tap_names(config: Config) -> Iterator[str]:
    """Every tap of one call, in order of computation."""
    yield "embedding"
    for i in range(config.layers):
        yield from (f"layers.{i}.{name}" for name in LAYER_TAPS)
    yield from (tap for tap in MODEL_TAPS if tap != "embedding")


def observable(config: Config) -> Iterator[str]:
    """Every tap that a trace may hold, in order of computation."""
    yield from tap_names(config)
    yield from READ_OUT_TAPS


def offer(ops: Ops, step: str, **values: Array) -> Array:
    """Tap the intermediates of a loop once they are whole, each as ``step.name``. Returns what the last tap returns.

    An observer may replace the last of them. The ones before it are already used, so theirs is not replaced.
    """
    offered = [ops.tap(f"{step}.{name}", value) for name, value in values.items()]
    return offered[-1]


def step_of(tap: str) -> str:
    """A tap's name without its layer."""
    return tap.split(".", 2)[2] if tap.startswith("layers.") else tap


def layer_of(tap: str) -> int | None:
    """The layer of a tap, or None outside of the layers."""
    return int(tap.split(".")[1]) if tap.startswith("layers.") else None
