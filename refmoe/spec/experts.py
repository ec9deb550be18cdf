"""The experts: gated feed-forward networks, run on the tokens routed to them, and their combination."""

from __future__ import annotations

from dataclasses import dataclass

from refmoe.spec.interface import Array, Ops, Weight


@dataclass(frozen=True)
class Expert:
    """One expert's parameters. w1 (gate) and w3 (up): [F, D]   w2 (down): [D, F]"""

    w1: Weight
    w2: Weight
    w3: Weight


def swiglu(ops: Ops, gate: Array, up: Array) -> Array:
    """The gated activation.

    EXPERT-2  hidden = silu(gate) * up, silu(g) = g * sigmoid(g): w1 is the gate, w3 is multiplied by it.

    gate, up: [n, F]   returns: [n, F]
    Shazeer 2020, "GLU Variants Improve Transformer", eq. 6.
    """
    return gate * ops.sigmoid(gate) * up


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


def run_experts(ops: Ops, experts: tuple[Expert, ...], x: Array, chosen: Array) -> Array:
    """Every chosen expert on every token that chose it.

    EXPERT-3  Slot j of token t is the output of expert chosen[t, j] on x[t], and of nothing else: it does
              not depend on the other tokens. An expert that nobody chose is not evaluated.

    x: [T, D]   chosen: integers [T, k]   returns: [T, k, D], in the order of `chosen`
    """
    tokens, k = chosen.shape
    order, counts = ops.group(chosen.reshape(-1), len(experts))
    rows = x[order // k]
    results, start = [], 0
    for expert, count in zip(experts, counts, strict=True):
        if count:
            results.append(run_expert(ops, expert, rows[start : start + count]))
            start += count
    slot = ops.inverse(order)
    _gate, _up, _hidden, output = (
        ops.tap(f"expert.{name}", ops.concatenate(parts)[slot].reshape(tokens, k, -1))
        for name, parts in zip(("gate", "up", "hidden", "output"), zip(*results, strict=True), strict=True)
    )
    return output


def combine(ops: Ops, outputs: Array, weights: Array) -> Array:
    """The weighted sum of a token's expert outputs.

    COMBINE-1  y = sum over the slots of weight times output; the weight multiplies the expert's output.

    outputs: [T, k, D]   weights: [T, k]   returns: [T, D]
    Jiang et al. 2024, section 2.1.
    """
    return ops.sum(outputs * weights[:, :, None], axis=1)
