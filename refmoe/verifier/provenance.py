# SPDX-License-Identifier: Apache-2.0
"""The origin of each tap: the taps of the trace that refmoe computes it from."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from refmoe.spec.config import Config
from refmoe.spec.taps import IDS, LAYER_TAPS, LOGPROBS, observable, step_of
from refmoe.verifier.findings import FREE, LOCAL, REPLAYED

INPUTS = {
    "attention_norm": ("x",),
    "attention.q": ("attention_norm",),
    "attention.k": ("attention_norm",),
    "attention.v": ("attention_norm",),
    "attention.q_rope": ("attention.q",),
    "attention.k_rope": ("attention.k",),
    "attention.scores": ("attention.q_rope", "attention.k_rope"),
    "attention.probs": ("attention.scores",),
    "attention.context": ("attention.probs", "attention.v"),
    "attention.output": ("attention.context",),
    "attention_residual": ("x", "attention.output"),
    "moe_norm": ("attention_residual",),
    "router.logits": ("moe_norm",),
    "router.experts": ("router.logits",),
    "router.weights": ("router.logits", "router.experts"),
    "expert.gate": ("moe_norm", "router.experts"),
    "expert.up": ("moe_norm", "router.experts"),
    "expert.hidden": ("expert.gate", "expert.up"),
    "expert.output": ("expert.hidden", "router.experts"),
    "moe.output": ("expert.output", "router.weights"),
    "residual": ("attention_residual", "moe.output"),
}
"""The inputs of each step of a layer. ``x`` is the hidden state that enters the layer."""


@dataclass(frozen=True)
class Origin:
    """The taps that a tap is computed from, and the steps between."""

    since: tuple[str, ...]
    """Taps of the trace, in order of computation; empty if it is computed from the tokens alone."""
    rung: str
    spans: int
    """The number of steps from those taps to this one: 1 for a single step."""
    normalises: bool
    """Whether one of these steps is a norm: the error of its statistic is shared by a whole row."""


def inputs(tap: str, config: Config) -> tuple[str, ...]:
    """The taps that a tap is directly computed from. They are in the same run, and in its layer or the one before."""
    if tap == "embedding":
        return ()
    last = f"layers.{config.layers - 1}.residual"
    outside = {"final_norm": last, "logits": "final_norm", LOGPROBS: "logits", IDS: "logits"}
    if tap in outside:
        return (outside[tap],)
    _, layer, step = tap.split(".", 2)
    before = "embedding" if layer == "0" else f"layers.{int(layer) - 1}.residual"
    return tuple(before if name == "x" else f"layers.{layer}.{name}" for name in INPUTS[step])


def origins(config: Config, present: Set[str]) -> dict[str, Origin]:
    """The origin of every tap of a run that has the taps `present`."""
    order = {tap: i for i, tap in enumerate(observable(config))}
    found: dict[str, Origin] = {}
    for tap in order:
        since: set[str] = set()
        spans, chosen_here, normalises = 1, False, step_of(tap) in NORMS
        for name in inputs(tap, config):
            if name in present:
                since.add(name)
                continue
            since.update(found[name].since)
            spans = max(spans, 1 + found[name].spans)
            normalises |= found[name].normalises
            chosen_here |= name.endswith("router.experts") or found[name].rung == FREE
        rung = FREE if chosen_here else LOCAL if spans == 1 else REPLAYED
        ordered = tuple(sorted(since, key=order.__getitem__))
        found[tap] = Origin(since=ordered, rung=rung, spans=spans, normalises=normalises)
    return found


MIXING = frozenset(
    ["attention.q", "attention.k", "attention.v", "attention.context", "attention.output",
     "router.logits", "expert.gate", "expert.up", "expert.output", "logits"]
)  # fmt: skip
"""Steps that sum over many inputs, so that the errors of neighbouring values are independent."""

NORMS = frozenset(["attention_norm", "moe_norm", "final_norm"])
"""Steps that divide a row by one statistic of the row."""

assert INPUTS.keys() == LAYER_TAPS.keys()
