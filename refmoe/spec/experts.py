# SPDX-License-Identifier: Apache-2.0
"""The mixture of experts: one expert, the experts of every token, their combination, and the whole block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refmoe.spec.interface import Array, Ops, Weight
from refmoe.spec.taps import offer

if TYPE_CHECKING:
    from refmoe.spec.model import Layer, Model


@dataclass(frozen=True)
class Expert:
    """One expert's parameters. w1 (gate) and w3 (up): [F, D]   w2 (down): [D, F]"""

    w1: Weight
    w2: Weight
    w3: Weight

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """The last dimensions of gate, up, hidden and output: F, F, F, D."""
        dim, hidden_dim = self.w2.shape
        return hidden_dim, hidden_dim, hidden_dim, dim


def run_expert(ops: Ops, expert: Expert, x: Array) -> tuple[Array, Array, Array, Array]:
    """One expert on the rows routed to it.

    EXPERT-1  gate = x w1^T, up = x w3^T, output = hidden w2^T; no biases.

    x: [n, D]   returns: gate [n, F], up [n, F], hidden [n, F], output [n, D]
    Jiang et al. 2024, section 2.1.
    """
    gate = ops.linear(x, expert.w1)
    up = ops.linear(x, expert.w3)
    hidden = swiglu(ops, gate, up)
    return gate, up, hidden, ops.linear(hidden, expert.w2)


def swiglu(ops: Ops, gate: Array, up: Array) -> Array:
    """The gated activation.

    EXPERT-2  hidden = silu(gate) * up, silu(g) = g * sigmoid(g): w1 is the gate, w3 is multiplied by it.

    gate, up: [n, F]   returns: [n, F]
    Shazeer 2020, "GLU Variants Improve Transformer", eq. 6.
    """
    return gate * ops.sigmoid(gate) * up


def run_experts(ops: Ops, experts: Sequence[Expert], x: Array, chosen: Array) -> Array:
    """Every chosen expert on every token that chose it.

    EXPERT-3  Slot j of token t is the output of expert chosen[t, j] on x[t], and of nothing else: it does
              not depend on the other tokens. An expert that nobody chose is not evaluated.

    x: [T, D]   chosen: integers [T, k]   returns: [T, k, D], in the order of `chosen`
    """
    gate, up, hidden, output = (ops.empty(*chosen.shape, width) for width in experts[0].widths)
    for e in ops.distinct(chosen):
        at = ops.where_equal(chosen, e)  # the tokens that chose e, and the slots in which they did
        gate[at], up[at], hidden[at], output[at] = run_expert(ops, experts[e], x[at[0]])
    return offer(ops, "expert", gate=gate, up=up, hidden=hidden, output=output)


def combine(ops: Ops, outputs: Array, weights: Array) -> Array:
    """The weighted sum of a token's expert outputs.

    COMBINE-1  y = sum over the slots of weight times output; the weight multiplies the expert's output.

    outputs: [T, k, D]   weights: [T, k]   returns: [T, D]
    Jiang et al. 2024, section 2.1.
    """
    return ops.sum(outputs * weights[:, :, None], axis=1)


def moe(ops: Ops, model: Model, layer: Layer, x: Array) -> Array:
    """The mixture-of-experts block: route, run the experts, combine.

    MOE-1  y = the combination of the outputs of the chosen experts; router and experts read the same x.

    x: [T, D]   returns: [T, D]
    Jiang et al. 2024, section 2.1.
    """
    chosen, weights = model.steps.route(ops, x, layer.router, model.config.experts_per_token)
    outputs = model.steps.run_experts(ops, layer.experts, x, chosen)
    return ops.tap("moe.output", model.steps.combine(ops, outputs, weights))
