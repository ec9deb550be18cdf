# SPDX-License-Identifier: Apache-2.0
"""Engines on several ranks, in real arithmetic: parts of sums are stored in 16 bits and added in any order.

Three forms: each output of an expert is reduced by itself (`tensor`); each rank weights and adds its parts of several
experts first (`late`); each rank has whole experts (`expert`). All of them split the output projection of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refmoe.arithmetic.formats import nearest
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.profiles.load import policy
from refmoe.profiles.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Model
from refmoe.spec.taps import step_of
from refmoe.steps import rounding
from refmoe.steps.rounding import CUT_STEPS
from refmoe.steps.sharded import block
from refmoe.traces.held import held_trace
from refmoe.traces.script import execute, plan
from refmoe.traces.trace import Header, Recorder, Run, Trace
from refmoe.verifier.findings import Report
from refmoe.verifier.verify import verify
from tests.arithmetic.enclosure.legal import LegalOps

RANKED = Config(
    dim=48, layers=2, heads=8, kv_heads=4, head_dim=8, hidden_dim=72, vocab=97, experts=8, experts_per_token=3,
    rope_theta=3e4,
)  # fmt: skip
RUNS: tuple[Run, ...] = plan([("prefill", 0, [(7 + 29 * i) % 97 for i in range(40)]), ("decode", 0, [5, 8])], 97)
FORMS = ("tensor", "late", "expert")
PARAMETERS = synthetic_checkpoint(RANKED, 3).parameters

Fault = Callable[[list[Any]], list[Any]]


def healthy(parts: list[Any]) -> list[Any]:
    return parts


def dropped(parts: list[Any]) -> list[Any]:
    return parts[:-1]


def doubled(parts: list[Any]) -> list[Any]:
    return [*parts, parts[-1]]


@dataclass
class Ranks:
    """The ranks of an engine and its way to add over them."""

    count: int
    policy: Policy
    rng: np.random.Generator
    fault: Fault = healthy

    def shares(self, terms: int) -> list[slice]:
        blocks = [block(terms, self.count, rank) for rank in range(self.count)]
        return [slice(each.start, each.stop) for each in blocks if each]

    def reduced(self, parts: Sequence[Any]) -> Any:
        """The sum of the parts, each stored; every addition is rounded, in a random tree. One rank has the sum."""
        if self.count == 1:
            return parts[0]
        format = self.policy.at("rank.partial")
        left = [nearest(part, format) for part in self.fault(list(parts))]
        while len(left) > 1:
            a, b = self.rng.choice(len(left), 2, replace=False)
            total = nearest(np.float32(left[a]) + np.float32(left[b]), format)
            left = [part for i, part in enumerate(left) if i not in (a, b)] + [total]
        return left[0].astype(np.float32)


class RankedOps(LegalOps):
    """Legal ops whose row-parallel products are split over ranks."""

    def __init__(self, policy: Policy, ranks: Ranks, tap: Any, split: Sequence[str]) -> None:
        super().__init__(policy, ranks.rng, tap)
        self.ranks, self.split = ranks, split

    def linear(self, x: Any, weight: Any) -> Any:
        matrix = self.array(weight.read()).T
        if weight.name.rpartition(".")[2] not in self.split:
            return self.matmul(x, matrix)
        return self.ranks.reduced([self.matmul(x[..., part], matrix[part]) for part in self.ranks.shares(len(matrix))])


def late_moe(ops: Any, model: Model, layer: Any, x: Any) -> Any:
    """Each rank weights and adds its parts of the chosen experts' outputs."""
    chosen, weights = model.steps.route(ops, x, layer.router, model.config.experts_per_token)
    shape = (*chosen.shape, model.config.hidden_dim)
    gate, up = np.empty(shape, np.float32), np.empty(shape, np.float32)
    for e in np.unique(chosen):
        at = np.nonzero(chosen == e)
        gate[at], up[at] = (ops.linear(x[at[0]], w) for w in (layer.experts[e].w1, layer.experts[e].w3))
    gate, up = ops.tap("expert.gate", gate), ops.tap("expert.up", up)
    hidden = ops.tap("expert.hidden", ops.silu(gate) * up)
    parts = []
    for share in ops.ranks.shares(shape[-1]):
        part = np.zeros(x.shape, np.float32)
        for e in np.unique(chosen):
            rows, slots = np.nonzero(chosen == e)
            down = ops.array(layer.experts[e].w2.read())[:, share].T
            part[rows] += weights[rows, slots][:, None] * ops.matmul(hidden[rows, slots][:, share], down)
        parts.append(part)
    return ops.tap("moe.output", ops.ranks.reduced(parts))


def expert_moe(ops: Any, model: Model, layer: Any, x: Any) -> Any:
    """Each rank has a block of the experts, and adds the weighted outputs of its own."""
    chosen, weights = model.steps.route(ops, x, layer.router, model.config.experts_per_token)
    outputs = rounding.run_experts(ops, layer.experts, x, chosen)
    owner = chosen * ops.ranks.count // model.config.experts
    parts = [
        np.sum(np.where(owner == rank, weights, np.float32(0))[:, :, None] * outputs, axis=1, dtype=np.float32)
        for rank in range(ops.ranks.count)
    ]
    return ops.tap("moe.output", ops.ranks.reduced(parts))


def ranked_trace(form: str, local: Policy, ranks: Ranks, leave_out: Sequence[str] = ()) -> Trace:
    """The trace of an engine of this form.   local: the roundings on each rank"""
    moe = {"tensor": CUT_STEPS.moe, "late": late_moe, "expert": expert_moe}[form]
    split = ("wo",) if form == "expert" else ("wo", "w2")
    recorder = Recorder()
    model = Model(RANKED, PARAMETERS, replace(CUT_STEPS, moe=moe))
    with np.errstate(all="ignore"):
        execute(RankedOps(local, ranks, recorder, split), model, RUNS, recorder)
    header = Header(runs=RUNS, case=None, checkpoint=None, policy=local.name, producer={"name": form})
    kept = {key: array for key, array in recorder.arrays.items() if step_of(key.partition("/")[2]) not in leave_out}
    return held_trace(header, kept, form)


def judged(trace: Trace, name: str) -> Report:
    return verify(trace, "ranked", RANKED, PARAMETERS, None, policy(name))
