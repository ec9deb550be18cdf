# SPDX-License-Identifier: Apache-2.0
"""One step of the model computed again, alone, from the values that the trace has and from changed ones.

`read` is the value of a tap as later steps read it. `inputs` is everything that a step reads: values, weights and
settings, by name. `compute` is the step itself. So a fault is a change of inputs, and its effect costs one step.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure import functions
from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import OF_DTYPE, Format, nearest, ulp
from refmoe.spec.taps import layer_of, step_of
from refmoe.steps import rounding
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.traces.trace import Run
from refmoe.verifier.blocks import places
from refmoe.verifier.diagnosis.evidence import Evidence
from refmoe.verifier.findings import Check
from refmoe.verifier.passes import Key
from refmoe.verifier.provenance import Origin, inputs, origins
from refmoe.verifier.routing import valid
from refmoe.verifier.tally import Tally
from refmoe.verifier.verify import NO_BOUND, alike_values

Inputs = dict[str, Any]
"""All that one step reads, by name: enclosures, weights as arrays, positions, numbers of the configuration."""

LINEAR = {
    "attention.q": "wq", "attention.k": "wk", "attention.v": "wv", "attention.output": "wo", "router.logits": "router",
    "expert.gate": "w1", "expert.up": "w3", "expert.output": "w2", "logits": "output",
}  # fmt: skip
"""The steps that are products with a matrix, and its name."""
NORMS = ("attention_norm", "moe_norm", "final_norm")
ATTENDED = ("attention.scores", "attention.probs")
"""The taps of the shape [H, T, S]."""


@dataclass(frozen=True, eq=False)
class Held:
    """A matrix as a step reads it."""

    values: Any
    kept: dict[Format, Any] = field(default_factory=dict)
    grid = None
    computed = False
    most = None
    read_block = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def read(self) -> Any:
        return self.values

    def rounded(self, format: Format) -> Any:
        """The values in the dtype that an engine holds them in, computed once."""
        kept: dict[Format, Any] = self.kept
        if format not in kept:
            kept[format] = nearest(self.values, format)
        return kept[format]

    def rows(self, ids: Any) -> Any:
        return self.values[ids]

    def block(self, start: int, stop: int, dtype: Any = None) -> Any:
        return self.values[start:stop] if dtype is None else self.values[start:stop].astype(dtype)


class Roughly(EnclosureOps):
    """Only the midpoints, in binary64: many times faster, and enough to see which hypotheses are worth a proof."""

    def linear(self, x: Enclosure, weight: Any) -> Enclosure:
        if not isinstance(weight, Held):
            return super().linear(x, weight)
        return Enclosure(x.mid @ weight.rounded(self.policy.at("weights")).T, accumulation=x.accumulation)

    def _matmul(self, a: Enclosure, b: Enclosure, how: Any) -> Enclosure:
        return Enclosure(a.mid @ b.mid, accumulation=a.accumulation)

    def sum(self, x: Enclosure, axis: int) -> Enclosure:
        return Enclosure(x.mid.sum(axis), accumulation=x.accumulation)

    def accumulate(self, x: Enclosure, axis: int) -> Enclosure:
        return self.sum(x, axis)

    def cut(self, name: str, x: Enclosure) -> Enclosure:
        return x


class Laboratory:
    """The steps of a failed trace. Each may be computed from the trace's values, or from changed ones."""

    def __init__(self, evidence: Evidence, unrounded: bool = False, roughly: bool = False) -> None:
        """unrounded: whether steps may have read their inputs before these were stored   roughly: midpoints only"""
        self.evidence, self.unrounded = evidence, unrounded
        self.policy, self.config = evidence.policy, evidence.right.config
        self.runs: dict[str, Run] = {run.run: run for run in evidence.contents.runs}
        self.ops: Any = (Roughly if roughly else EnclosureOps)(self.policy)
        self._made: dict[Any, Any] = {}
        self._weights: dict[Any, Held] = {}
        self._origins: dict[str, dict[str, Origin]] = {}

    # ---- the trace

    def present(self, key: Key) -> bool:
        return key[1] in self.evidence.contents.present[key[0]]

    def found(self, key: Key) -> Any:
        """The trace's values, binary64."""
        return self._kept(("found", key), lambda: np.asarray(self.evidence.trace.get(*key), np.float64))

    def format(self, key: Key) -> Format:
        return self.policy.at(step_of(key[1]))

    def read(self, key: Key) -> Any:
        """The value of a tap as later steps read it: the trace's, or else refmoe's own."""
        return self._kept(("read", key), lambda: self._read(key))

    def _read(self, key: Key) -> Any:
        step = step_of(key[1])
        if step == "router.experts":
            return self._experts(key)
        if not self.present(key):
            return self.ops.cut(step, self.right(key))
        values = self.found(key)
        if step == "attention.scores":
            values = np.where(self.mask(key)[None], values, 0.0)
        if not self.unrounded or step == "embedding":
            return Enclosure(values, accumulation=self.policy.accumulation)
        spacing = ulp(values, self.policy.at(step))
        return Enclosure(values, spacing / 2, spacing**2 / 12, accumulation=self.policy.accumulation)

    def _experts(self, key: Key) -> Any:
        run, tap = key
        logits = self.read((run, tap.replace("experts", "logits")))
        best = self.ops.top_k(logits, self.config.experts_per_token)
        if not self.present(key):
            return best
        chosen = np.asarray(self.evidence.trace.get(*key)).astype(np.int64)
        return np.where(valid(chosen, self.config.experts)[:, None], chosen, best)

    def mask(self, key: Key, window: Any = "own") -> Any:
        """The attention mask of a call: booleans [T, S]"""
        run = self.runs[key[0]]
        window = self.config.window if window == "own" else window
        return self.evidence.right.steps.visible(np.asarray(run.positions), self.slots(run), window)

    def slots(self, run: Run) -> Any:
        """The positions of the cached tokens and of the new ones: integers [S]"""
        return self.cached(run.run, "", None)

    def cached(self, run: str, step: str, layer: int | None) -> Any:
        """Keys, values or positions of the tokens seen so far, the call's own included: [S, ...]"""
        return self._kept(("cached", run, step, layer), lambda: self._cached(self.runs[run], step, layer))

    def _cached(self, run: Run, step: str, layer: int | None) -> Any:
        own: Any
        if layer is None:
            own = np.asarray(run.positions)
        else:
            keep = rounding.kept_values if step == "attention.v" else rounding.kept_keys
            self.ops.repeats = self._repeats(run)
            own = self.ops.remembered(keep(self.ops, self.read((run.run, f"layers.{layer}.{step}"))))
        if not run.past:
            return own
        before: list[str] = []
        for other in self.runs.values():
            if other.run == run.run:
                break
            if other.sequence == run.sequence:
                before.append(other.run)
        kept = self.cached(before[-1], step, layer)[: run.past]
        return self.ops.concatenate([kept, own])

    def _repeats(self, run: Run) -> Any:
        """How often each new token occurs in its sequence: integers [T]"""
        together = [other for other in self.runs.values() if other.sequence == run.sequence]
        occurring = Counter(token for other in together for token in other.tokens)
        return np.array([occurring[token] for token in run.tokens])

    # ---- the model

    def weight(self, name: str, layer: int | None, expert: int | None = None) -> Held:
        """A parameter as it is stored."""

        key = (name, layer, expert)
        if key not in self._weights:
            self._weights[key] = Held(np.asarray(self.parameter(*key).read(), np.float64))
        return self._weights[key]

    def parameter(self, name: str, layer: int | None, expert: int | None = None) -> Any:
        """A parameter of the model itself."""
        owner: Any = self.evidence.right.parameters
        owner = owner if layer is None else owner.layers[layer]
        return getattr(owner if expert is None else owner.experts[expert], name)

    def gain(self, step: str, layer: int | None) -> Any:
        """The gain of a norm: [D]"""
        return self.weight(step, layer).values

    def inputs(self, key: Key) -> Inputs:
        """Everything that the step of a tap reads."""
        return dict(self._kept(("inputs", key), lambda: self._inputs(key)))

    def _inputs(self, key: Key) -> Inputs:
        run, tap = key
        step, layer = step_of(tap), layer_of(tap)
        if step == "embedding":
            return {"tokens": np.asarray(self.runs[run].tokens), "weight": self.weight("embedding", None)}
        before = [(run, name) for name in inputs(tap, self.config)]
        if step in NORMS:
            return {"x": self.read(before[0]), "gain": self.gain(step, layer), "eps": self.config.norm_eps}
        if step in ("attention.q_rope", "attention.k_rope"):
            positions = np.asarray(self.runs[run].positions)
            return {"x": self.read(before[0]), "positions": positions, "theta": self.config.rope_theta}
        if step == "attention.scores":
            return {"q": self.read(before[0]), "k": self.cached(run, "attention.k_rope", layer)}
        if step == "attention.probs":
            return {"scores": self.read(before[0]), "mask": self.mask(key)}
        if step == "attention.context":
            return {"probs": self.read(before[0]), "v": self.cached(run, "attention.v", layer)}
        if step in ("attention_residual", "residual"):
            return {"x": self.read(before[0]), "y": self.read(before[1])}
        if step == "router.weights":
            return {"logits": self.read(before[0]), "experts": self.read(before[1])}
        if step == "expert.hidden":
            return {"gate": self.read(before[0]), "up": self.read(before[1])}
        if step == "moe.output":
            return {"outputs": self.read(before[0]), "weights": self.read(before[1])}
        if step.startswith("expert."):
            held = [self.weight(LINEAR[step], layer, e) for e in range(self.config.experts)]
            return {"x": self.read(before[0]), "experts": self.read(before[1]), "weight": held}
        return {"x": self.read(before[0]), "weight": self.weight(LINEAR[step], layer)}

    def right(self, key: Key) -> Any:
        """The enclosure of a tap before its last rounding, as the specification has it."""
        return self._kept(("right", key), lambda: self.compute(key, self.inputs(key)))

    def compute(self, key: Key, given: Inputs) -> Any:
        """The enclosure of a tap, before its last rounding, from these inputs."""
        with np.errstate(all="ignore"):
            return self._compute(step_of(key[1]), given)

    def _compute(self, step: str, given: Inputs) -> Any:
        ops = self.ops
        if step == "embedding":
            return ops.embed(given["weight"], given["tokens"])
        if step in NORMS:
            return rounding.rms_norm(ops, given["x"], given["gain"], given["eps"])
        if step in ("attention.q_rope", "attention.k_rope"):
            table = self._table(given["positions"], given["theta"])
            return rounding.rotate(ops, given["x"], table)
        if step == "attention.scores":
            return rounding.scores_of(ops, given["q"], given["k"])
        if step == "attention.probs":
            return ops.softmax(rounding.as_softmax_reads(ops, given["scores"]), given["mask"][None])
        if step == "attention.context":
            return rounding.context_of(ops, given["probs"], given["v"])
        if step in ("attention_residual", "residual"):
            return given["x"] + given["y"]
        if step == "router.weights":
            logits = rounding.cut_again(ops, "router.softmax_input", "router.logits", given["logits"])
            return ops.weigh(logits, given["experts"])
        if step == "expert.hidden":
            return ops.silu(given["gate"]) * given["up"]
        if step == "moe.output":
            return rounding.combine(ops, given["outputs"], given["weights"])
        if step.startswith("expert."):
            return self._project(given["x"], given["experts"], given["weight"])
        x = given["x"]
        if step == "attention.output":
            x = x.reshape(x.shape[0], -1)
        y = ops.linear(x, given["weight"])
        return (
            y.reshape(x.shape[0], -1, self.config.head_dim)
            if step in ("attention.q", "attention.k", "attention.v")
            else y
        )

    def _table(self, positions: Any, theta: float) -> Any:
        """Cosines and sines, of positions that need not be integers: [T, d/2] both"""
        width = self.config.head_dim
        if np.issubdtype(positions.dtype, np.integer):
            cos, sin = rounding.rotary_table(self.ops, np.abs(positions), width, theta)
            sign = np.sign(positions)[:, None]
            return cos, Enclosure(sin.mid * sign, sin.r, sin.v, accumulation=sin.accumulation, owed=sin.owed)
        angles = positions[:, None] * theta ** (-np.arange(0, width, 2) / width)
        logarithms = np.arange(0, width, 2) / width * math.log(theta)
        both = functions.unit_circle(positions, logarithms, np.cos(angles), np.sin(angles), self.policy)
        return tuple(self.ops.cut("rope.table", part) for part in both)

    def _project(self, x: Any, chosen: Any, held: list[Held]) -> Any:
        """Each slot's row times the matrix of its expert. x: [T, n], or [T, k, n]   returns: [T, k, m]"""
        tokens, k = chosen.shape
        order, counts = self.ops.group(chosen.reshape(-1), len(held))
        rows = x.reshape(tokens * k, -1)[order] if len(x.shape) == 3 else x[order // k]
        results, start = [], 0
        for matrix, count in zip(held, counts, strict=True):
            if count:
                results.append(self.ops.linear(rows[start : start + count], matrix))
                start += count
        return self.ops.placed(results, order).reshape(tokens, k, -1)

    # ---- the test

    def check(self, key: Key, x: Enclosure) -> Check:
        """The check of a tap against an enclosure, with the tests of a verification."""
        run, tap = key
        dumped = self.evidence.trace.get(run, tap)
        step, tally = step_of(tap), Tally(calm=self.evidence.limits.calm)
        flat, shape = None, dumped.shape
        if step == "attention.scores":
            seen = np.broadcast_to(self.mask(key)[None], shape)
            flat, values = np.flatnonzero(seen), np.asarray(dumped[seen], np.float64)
            x = spread(x, shape)[seen]
        else:
            values, x = self.found(key).reshape(-1), spread(x, shape).map(lambda part: part.reshape(-1))
        tally.rows = len(self.runs[run].tokens)
        tally.add(x, values, self.format(key), OF_DTYPE[dumped.dtype], places(shape, (), flat), True)
        origin = self._origin(key)
        alike = max(Counter(self.runs[run].tokens).values())
        size = alike_values(tap, origin, alike)
        rows = origin.normalises and self.policy.statistics.precision <= self.format(key).precision
        if size is not None and rows:
            size = max(size, tally.values / max(tally.rows, 1))
        return tally.check(run, tap, origin, self.evidence.limits, size, not rows, NO_BOUND)

    def _origin(self, key: Key) -> Origin:
        run, tap = key
        if run not in self._origins:
            self._origins[run] = origins(self.config, self.evidence.contents.present[run])
        return self._origins[run][tap]

    def _kept(self, key: Any, make: Any) -> Any:
        if key not in self._made:
            with np.errstate(all="ignore"):
                self._made[key] = make()
        return self._made[key]


def spread(x: Enclosure, shape: tuple[int, ...]) -> Enclosure:
    """The enclosure with every part in its whole shape."""
    return x.map(lambda part: part if np.shape(part) == shape else np.broadcast_to(part, shape))


def only_where(condition: Any, x: Enclosure, otherwise: Enclosure) -> Enclosure:
    """The enclosure that is x where the condition holds. condition: booleans of a shape that broadcasts"""
    shape = x.mid.shape
    x, otherwise = x.settle(), otherwise.settle()
    here = np.broadcast_to(condition, shape)
    parts = (np.where(here, a, b) for a, b in ((x.mid, otherwise.mid), (x.r, otherwise.r), (x.v, otherwise.v)))
    mid, radius, variance = parts
    return Enclosure(mid, radius, variance, accumulation=x.accumulation)


__all__ = ["Held", "Inputs", "Laboratory", "only_where", "spread"]
