# SPDX-License-Identifier: Apache-2.0
"""Legal ways to route, to run the experts and to combine their outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from refmoe.bugs.forced_rounding import rounded
from refmoe.bugs.legal.variant import Engine, legal, with_steps
from refmoe.checkpoints.weight import Weight
from refmoe.profiles.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Model, Parameters
from refmoe.steps.rounding import CUT_STEPS, run_experts
from refmoe.traces.trace import Run


@legal("softmax-before-choice")
def softmax_before_choice(config: Config, parameters: Parameters, runs: tuple[Run, ...], policy: Policy) -> Engine:
    """Softmax over all experts, rounded, and then divided by the sum of the chosen (ROUTE-4)."""

    def route(ops: Any, x: Any, router: Any, k: int) -> Any:
        logits = ops.tap("router.logits", ops.linear(x, router))
        experts = ops.tap("router.experts", ops.top_k(logits, k))
        probs = ops.gather(rounded(ops.softmax(logits, None), policy.statistics), experts)
        total = rounded(ops.sum(probs, axis=-1), policy.statistics)
        return experts, ops.tap("router.weights", probs / total[:, None])

    return Engine(with_steps(config, parameters, route=route), runs, policy)


@legal("slots-by-expert-id")
def slots_by_expert_id(config: Config, parameters: Parameters, runs: tuple[Run, ...], policy: Policy) -> Engine:
    """The experts of a token are listed, run and added by rising id instead of falling logit."""

    def route(ops: Any, x: Any, router: Any, k: int) -> Any:
        logits = ops.tap("router.logits", ops.linear(x, router))
        experts = ops.tap("router.experts", np.sort(ops.top_k(logits, k), axis=-1))
        return experts, ops.tap("router.weights", ops.weigh(logits, experts))

    return Engine(with_steps(config, parameters, route=route), runs, policy)


@legal("experts-last-first")
def experts_last_first(config: Config, parameters: Parameters, runs: tuple[Run, ...], policy: Policy) -> Engine:
    """Experts run from the last to the first (EXPERT-3), and their outputs are added in that order."""

    def backwards(ops: Any, experts: Any, x: Any, chosen: Any) -> Any:
        return run_experts(ops, experts[::-1], x, len(experts) - 1 - chosen)

    def combine(ops: Any, outputs: Any, weights: Any) -> Any:
        return CUT_STEPS.combine(ops, outputs[:, ::-1], weights[:, ::-1])

    return Engine(with_steps(config, parameters, run_experts=backwards, combine=combine), runs, policy)


@legal("fused-gate-up")
def fused_gate_up(config: Config, parameters: Parameters, runs: tuple[Run, ...], policy: Policy) -> Engine:
    """Gate and up are one product with both matrices stacked. The activation reads the accumulated product before it is
    stored, if the policy allows that (a fused epilogue)."""
    seen = policy.accumulation if policy.consumers == "unrounded" else policy.storage

    def run_fused(ops: Any, experts: Any, x: Any, chosen: Any) -> Any:
        tokens, k = chosen.shape
        both = np.empty((tokens, k, 2 * config.hidden_dim))
        for e, expert in enumerate(experts):
            token, slot = (chosen == e).nonzero()
            if len(token):
                both[token, slot] = ops.linear(x[token], stacked(expert))
        gate, up = both[..., : config.hidden_dim], both[..., config.hidden_dim :]
        ops.tap("expert.gate", gate), ops.tap("expert.up", up)
        gate, up = rounded(gate, seen), rounded(up, seen)
        hidden = ops.tap("expert.hidden", gate * ops.sigmoid(gate) * up)
        return ops.tap("expert.output", down(ops, experts, hidden, chosen))

    return Engine(with_steps(config, parameters, run_experts=run_fused), runs, policy)


@legal("weight-before-down", leaves_out=["expert.output"])
def weight_before_down(config: Config, parameters: Parameters, runs: tuple[Run, ...], policy: Policy) -> Engine:
    """The weight of a token multiplies the hidden row, in the dtype of accumulation, before the down projection."""

    def moe(ops: Any, model: Model, layer: Any, x: Any) -> Any:
        chosen, weights = model.steps.route(ops, x, layer.router, config.experts_per_token)
        hidden: list[Any] = []

        def tap(name: str, value: Any) -> Any:
            value = ops.tap(name, value)
            if name == "expert.hidden":
                hidden.append(value)
            return value

        watched = ops.within("")
        watched.tap = tap
        model.steps.run_experts(watched, layer.experts, x, chosen)
        weighted = rounded(hidden[0] * weights[:, :, None], policy.accumulation)
        return ops.tap("moe.output", ops.sum(down(ops, layer.experts, weighted, chosen), axis=1))

    return Engine(with_steps(config, parameters, moe=moe), runs, policy)


def stacked(expert: Any) -> Weight:
    """The matrix w1 above w3. returns: [2 F, D]"""
    shape = (2 * expert.w1.shape[0], expert.w1.shape[1])
    return Weight(
        name="w13",
        shape=shape,
        dtype=expert.w1.dtype,
        source=lambda: np.concatenate([expert.w1.read(), expert.w3.read()]),
        origin="stacked",
    )


def down(ops: Any, experts: Sequence[Any], hidden: Any, chosen: Any) -> Any:
    """The down projection of each slot by its expert. hidden: [T, k, F]   returns: [T, k, D]"""
    output = np.empty((*chosen.shape, experts[0].w2.shape[0]))
    for e, expert in enumerate(experts):
        token, slot = (chosen == e).nonzero()
        if len(token):
            output[token, slot] = ops.linear(hidden[token, slot], expert.w2)
    return output
