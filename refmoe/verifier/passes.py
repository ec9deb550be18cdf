# SPDX-License-Identifier: Apache-2.0
"""One pass over a trace: the model in enclosures, each step computed from the trace's own values where it has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any
from weakref import WeakMethod

import numpy as np

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import OF_DTYPE, ulp
from refmoe.arithmetic.memory import keep_memory
from refmoe.profiles.cut_points import PROJECTIONS
from refmoe.profiles.policy import Policy
from refmoe.spec.model import Caches, Model, embed, head, run_layers
from refmoe.spec.taps import IDS, LOGPROBS, layer_of, step_of
from refmoe.steps.rounding import cut_again
from refmoe.traces.script import cut, fill
from refmoe.traces.trace import Trace
from refmoe.verifier import ranking
from refmoe.verifier.blocks import block_size, by_entry, places, without_bound
from refmoe.verifier.contested import Contested
from refmoe.verifier.findings import CONTESTABLE, FORCED, ContestableCode
from refmoe.verifier.routing import Routing, invalid_choices, judge, valid
from refmoe.verifier.subject import Findings, Subject
from refmoe.verifier.tally import Calm, Limits, Tally

KEPT_DECISIONS = 50_000
"""The number of decisions that are all kept. Beyond it only decisions that are not forced, or not legal, are kept."""

AFTER_CHOICE = ("router.weights", "expert.gate", "expert.up", "expert.hidden", "expert.output", "moe.output")
"""The taps whose values depend on the choice of experts."""

READ_OUT = {"final_norm", "logits", LOGPROBS}
"""The taps after the last layer. A run without any of them needs no head, unless the pass looks beyond the trace."""

Key = tuple[str, str]
"""Run and tap."""


def is_rotated(name: str) -> bool:
    """Whether a tap shows positions themselves. All other taps depend only on their differences."""
    return name.endswith((".attention.q_rope", ".attention.k_rope"))


def beside(name: str, step: str) -> str:
    """The tap of a step in the layer of another tap, such as of the one that reads it."""
    layer = layer_of(name)
    return step if layer is None or step == "final_norm" else f"layers.{layer}.{step}"


@dataclass(frozen=True)
class Reading:
    """The inputs that the steps of a pass read. By default each step reads the trace's values, as stored."""

    recomputed: frozenset[Key] = frozenset()
    """Taps whose values in the trace are tested but not read: later steps read refmoe's own enclosure."""
    unrounded: bool = False
    """Whether a step may have read its inputs before they were stored."""


AS_STORED = Reading()


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method without a hold on its object.

    A pass and its ops that held each other would keep all prepared weights in memory, until Python looks for cycles.
    """
    held: Any = WeakMethod(method)
    return lambda *given: held()(*given)


class Pass:
    """A forward pass. Each tap tests the trace's values, and later steps read them."""

    looks_beyond = False
    """Whether the pass looks at taps that the trace lacks."""

    def __init__(
        self,
        trace: Trace,
        subject: Subject,
        policy: Policy,
        limits: Limits | None,
        reading: Reading = AS_STORED,
        progress: Callable[[], None] | None = None,
    ) -> None:
        """limits: of the tests; None where nothing is tested   progress: called after each layer of each run"""
        self.trace, self.subject, self.policy = trace, subject, policy
        self.calm, self.spreads = (Calm(), 0.0) if limits is None else (limits.calm, limits.excess)
        self.reading, self.progress = reading, progress
        self.findings = Findings()
        self.ops = subject.ops(policy, _weakly(self._tap))
        self._anchored = {run.sequence for run in subject.runs if any(map(is_rotated, trace.names(run.run)))}
        self._run = subject.runs[0]
        self._start = 0
        self._tokens = 0
        self._present: Set[str] = frozenset()
        self._logits: tuple[Enclosure, Any, bool] | None = None
        self._unknown: Any = None
        self._ids: Any = None
        self._contested = Contested()

    def go(self, layers: range | None = None) -> Findings:
        """The findings of all runs in order. Each run goes in blocks of tokens, which MODEL-4 allows.

        Of a run of which the trace holds nothing, only the caches are computed.
        layers: the layers to compute; the trace must have the input of the first. None: the whole model.
        """
        keep_memory()
        model = Model(self.subject.config, self.subject.parameters, self.subject.steps)
        layers = range(self.subject.config.layers) if layers is None else layers
        caches: dict[int, Caches] = {}
        ops: Any = self.ops
        occurring: dict[int, Counter[int]] = {}
        for run in self.subject.runs:
            occurring.setdefault(run.sequence, Counter()).update(run.tokens)
        with np.errstate(all="ignore"):
            for run in self.subject.runs:
                self._run, self._present = run, frozenset(self.trace.names(run.run))
                ops.any_offset = run.sequence not in self._anchored
                before = cut(caches.get(run.sequence), run)
                size = block_size(self.subject.config, run, bool(self._present) or len(layers) > 1)
                for self._start in range(0, len(run.tokens), size):
                    tokens = run.tokens[self._start : self._start + size]
                    positions = run.positions[self._start : self._start + size]
                    self._tokens = len(tokens)
                    ops.repeats = np.array([occurring[run.sequence][token] for token in tokens])
                    before = self._block(model, layers, tokens, ops.integers(positions), before)
                assert before is not None
                caches[run.sequence] = before
        return self.findings

    def _block(self, model: Model, layers: range, tokens: Any, positions: Any, before: Caches | None) -> Caches:
        """Compute these layers for a block, from the trace's output of the layer before. Returns their caches."""
        ops: Any = self.ops
        if layers.start:
            name = f"layers.{layers.start - 1}.residual"
            x: Any = self._taken("residual", name, self._read(name, "residual"))
        else:
            x = embed(ops, model, ops.integers(tokens))
        if not self._present:
            return fill(ops, model, layers, x, positions, before)
        x, extended = run_layers(ops, model, layers, x, positions, before)
        if layers.stop == model.config.layers and (self.looks_beyond or self._present & READ_OUT):
            self._read_out(head(ops, model, x))
        return extended

    def _read_out(self, logits: Any) -> None:
        """Test the log-probabilities of the trace, and the list of their entries if it has one.   logits: [T, V]"""
        if LOGPROBS not in self._present:
            return
        ops: Any = self.ops
        logits = cut_again(ops, "logprobs.softmax_input", "logits", logits)
        x = ops.log_softmax(logits)
        if IDS in self._present:
            ids = np.asarray(self._read(IDS, IDS)).astype(np.int64)
            if isinstance(logits, Enclosure):
                lists = ranking.judge(logits, x.mid, ids, self.policy, self.spreads, self._start)
                self.findings.rankings.setdefault((self._run.run, IDS), ranking.Ranking()).add(lists)
            # an entry that does not exist is a failure of the list; its value is held against any other
            self._ids = np.where((ids >= 0) & (ids < x.shape[-1]), ids, 0)
            x = ops.gather(x, self._ids)
        ops.tap(LOGPROBS, x)

    def _tap(self, name: str, x: Any) -> Any:
        step = step_of(name)
        if step == "router.experts":
            return self._choose(name, x)
        if step == "residual" and self.progress is not None:
            self.progress()
        dumped = self._read(name, step) if name in self._present else None
        if step in AFTER_CHOICE and self._unknown is not None:
            x = without_bound(x, self._unknown)
        outside = 0
        if dumped is not None:
            if isinstance(x, Enclosure) and x.choices is not None:
                whole, x = x, self._contested.explained(x, dumped, self.policy.at(step))
                if step in PROJECTIONS:
                    self._note_codes(name, step, whole)
            outside = self._test(name, step, x, dumped)
            if self.findings.open_choices:
                self._note_unbounded(name, step, x)
        if step == "router.logits":
            self._logits = (x, dumped, not outside)
        if dumped is None or (self._run.run, name) in self.reading.recomputed:
            return self.ops.cut(step, x)
        return self._taken(step, name, dumped)

    def _taken(self, step: str, name: str, dumped: Any) -> Enclosure:
        """The trace's values as an enclosure, for the steps that follow."""
        values = np.asarray(dumped, np.float64)
        if step == "attention.scores":
            values = np.where(self._visible()[None], values, 0.0)
        # a sum of finite numbers is finite, or overflows
        if not np.isfinite(values.sum()) and not np.isfinite(values).all():
            self.ops.events.append(name)
        # an embedding is a stored row, so that no unrounded value of it exists
        if not self.reading.unrounded or step == "embedding":
            stored = Enclosure(values, accumulation=self.policy.accumulation)
            stored.held = OF_DTYPE.get(dumped.dtype)
            return stored
        spacing = ulp(values, self.policy.at(step))
        return Enclosure(values, spacing / 2, spacing**2 / 12, accumulation=self.policy.accumulation)

    def _read(self, name: str, step: str) -> Any:
        """The values of a tap in the trace, for the tokens of the block."""
        array = self.trace.get(self._run.run, name)
        stop = self._start + self._tokens
        if step in ("attention.scores", "attention.probs"):
            # keys after the block are masked, so the block does not need them
            return array[:, self._start : stop, : self._run.past + stop]
        return array[self._start : stop]

    def _test(self, name: str, step: str, x: Enclosure, dumped: Any) -> int:
        """Test a tap against its enclosure. Returns the number of values outside the legal interval."""
        tally = self.findings.tallies.setdefault((self._run.run, name), Tally(calm=self.calm))
        origin = (0, self._start, 0) if step in ("attention.scores", "attention.probs") else (self._start,)
        flat = None
        if step == "attention.scores":
            # masked scores are never read, so an engine may leave anything there
            seen = np.broadcast_to(self._visible()[None], x.shape)
            flat = np.flatnonzero(seen)
            x, values = x[seen], dumped[seen]
        else:
            values, shape = np.asarray(dumped).reshape(-1), dumped.shape
            x = x.map(lambda part: (part if part.shape == shape else np.broadcast_to(part, shape)).reshape(-1))
        tally.rows += self._tokens
        before = tally.outside
        place = places(dumped.shape, origin, flat)
        if name == LOGPROBS and IDS in self._present:
            place = by_entry(place, self._ids, self._start)
        tally.add(x, values, self.policy.at(step), OF_DTYPE[dumped.dtype], place, bool(self.ops.events))
        if step == "attention.probs":
            self._test_masked(name, tally)
        return tally.outside - before

    def _test_masked(self, name: str, tally: Tally) -> None:
        """Test that the probabilities of keys after the block are zero."""
        array = self.trace.get(self._run.run, name)
        stop = self._start + self._tokens
        rest = array[:, self._start : stop, self._run.past + stop :]
        if rest.size:
            nothing = Enclosure(np.zeros(rest.size), accumulation=self.policy.accumulation)
            place = places(rest.shape, (0, self._start, self._run.past + stop))
            format = self.policy.at("attention.probs")
            values = np.asarray(rest).reshape(-1)
            tally.add(nothing, values, format, OF_DTYPE[array.dtype], place, False)

    def _note_codes(self, name: str, step: str, x: Enclosure) -> None:
        """Record the contestable codes that a product reads.   x: with the choices

        Two experts that read a token have its codes in common.
        """
        tap = PROJECTIONS[step][1]
        for row in self._contested.rows(x):
            own = (self._start + row.place[0], *(row.place[1:2] if tap == "expert.hidden" else ()))
            for i, column in enumerate(row.contest.columns):
                rule, *others = (choice[i] for choice in row.contest.choices)
                made = ContestableCode(
                    run=self._run.run, tap=beside(name, tap), where=(*own, column), product=name,
                    format=row.contest.format, ideal=row.contest.ideal[i], rule=rule,
                    other=next(code for code in others if code != rule), found=row.found(i),
                )  # fmt: skip
                known = self.findings.codes
                place = (made.run, made.tap, made.where, made.format)
                known[place] = known[place] if made.found is None and place in known else made

    def _note_unbounded(self, name: str, step: str, x: Enclosure) -> None:
        """Record the tokens of a tap that have no finite variance at all."""
        if x.variance is None or step in ("attention.scores", "attention.probs"):
            return
        nothing = ~np.isfinite(np.broadcast_to(x.variance, x.shape)).reshape(x.shape[0], -1).all(-1)
        if nothing.any():
            rows = self.findings.unbounded.setdefault((self._run.run, name), set())
            rows.update(self._start + int(token) for token in np.flatnonzero(nothing))

    def _visible(self) -> Any:
        """The attention mask of the block: booleans [T, S]"""
        stop = self._start + self._tokens
        positions = np.asarray(self._run.positions[self._start : stop])
        first = self._run.positions[0] - self._run.past
        cached = np.arange(first, first + self._run.past + stop)
        return self.subject.steps.visible(positions, cached, self.subject.config.window)

    def _choose(self, name: str, expected: Any) -> Any:
        """Judge the trace's choice of experts. Returns that choice, or refmoe's own where the trace has none."""
        assert self._logits is not None
        x, dumped, trusted = self._logits
        config, run = self.subject.config, self._run.run
        found = None
        if name in self._present:
            array = self.trace.get(run, name)
            found = np.asarray(array[self._start : self._start + self._tokens]).astype(np.int64)
            reason = invalid_choices(found, config.experts, self._start)
            if reason:
                self.findings.invalid.setdefault((run, name), reason)
                found = np.where(valid(found, config.experts)[:, None], found, expected)
        routing = judge(x, dumped, trusted, found, config.experts_per_token, self.policy, self.spreads)
        self._record(run, name, routing)
        if found is not None:
            self._unknown = None
            return found
        # the trace has no ids: they follow from its logits, and where rounding decides, later values are unknown
        open_ = routing.kind != FORCED
        if dumped is not None and self.policy.compared == "stored":
            values = np.asarray(dumped, np.float64)
            stored = Enclosure(values, accumulation=self.policy.accumulation)
            routing = judge(stored, None, True, None, config.experts_per_token, self.policy, self.spreads)
            open_ = routing.kind == CONTESTABLE
        self._unknown = np.flatnonzero(open_) if open_.any() else None
        either = np.flatnonzero(open_ & np.isfinite(routing.movable))
        self.findings.open_choices.setdefault((run, name), set()).update(self._start + int(t) for t in either)
        return routing.expected

    def _record(self, run: str, name: str, routing: Routing) -> None:
        """Count the decisions, and keep them as `KEPT_DECISIONS` says."""
        layer = layer_of(name)
        assert layer is not None
        for decision in routing.decisions(run, layer, self._start):
            key = (decision.kind, decision.legal)
            self.findings.counts[key] = self.findings.counts.get(key, 0) + 1
            if len(self.findings.decisions) < KEPT_DECISIONS or decision.kind != FORCED or not decision.legal:
                self.findings.decisions.append(decision)
