"""Run a script layer by layer: every call through one layer, then every call through the next.

The order of `refmoe.traces.script.execute` is call by call, which reads all weights once per call. Here each weight is
read
once per script, whatever the calls, and what a layer leaves behind is one hidden state per token: a run can stop after
any layer and go on later. The values are the same: MODEL-4 for the attention, and no row of the rest of a layer depends
on another one, so that the experts see the rows of all calls at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from refmoe.errors import InputError
from refmoe.spec import model as spec
from refmoe.spec.attention import Cache
from refmoe.spec.model import Model
from refmoe.traces.script import cut_layer
from refmoe.traces.trace import Recorder, Run

States = dict[str, Any]
"""Per run the hidden state of its tokens, [T, D]."""


@dataclass
class Tap:
    """Gives a recorder what passes, under the names of the runs whose rows it has."""

    recorder: Recorder
    rows: list[tuple[str, slice]] = field(default_factory=list)
    """Runs and their rows; one run has whatever passes, as not all taps have tokens as their first axis."""

    def __call__(self, name: str, x: Any) -> None:
        for run, rows in self.rows:
            self.recorder.run = run
            self.recorder(name, x if len(self.rows) == 1 else x[rows])


class Script:
    """A script that is run layer by layer, on ops that tap into `tap`."""

    def __init__(self, ops: Any, model: Model, runs: Sequence[Run], tap: Tap) -> None:
        if model.steps.decoder_layer is not spec.decoder_layer:
            raise ValueError("a layer with steps of its own cannot be taken apart")
        self.ops, self.model, self.runs, self.tap = ops, model, runs, tap

    def go(self, layers: range, states: States | None, save: Callable[[str, States], None]) -> None:
        """Run these layers; from 0, the embedding before them; to the last, the logits after them.

        states: what layer `layers.start` begins with; None to begin with the embedding.   save: called after each
        part, ``embedding``, ``layers.0``, ..., ``head``, with what the next one begins with.
        """
        if states is None:
            states = self.embed()
            save("embedding", states)
        for i in layers:
            states = self.layer(i, states)
            save(f"layers.{i}", states)
        if layers.stop == self.model.config.layers:
            self.head(states)
            save("head", {})

    def embed(self) -> States:
        """MODEL-1, of all runs."""
        tokens = [token for run in self.runs for token in run.tokens]
        self._together()
        return self._apart(spec.embed(self.ops, self.model, self.ops.integers(tokens)))

    def layer(self, i: int, states: States) -> States:
        """LAYER-1, of all runs: its attention half run by run, its other half once for the rows of all runs."""
        ops, layer = self.ops.within(f"layers.{i}."), self.model.parameters.layers[i]
        caches: dict[int, Cache | None] = {}
        residuals = []
        for run in self.runs:
            self.tap.rows = [(run.run, slice(None))]
            before, positions = cut_layer(caches.get(run.sequence), run), ops.integers(run.positions)
            h, caches[run.sequence] = spec.attention_half(ops, self.model, layer, states[run.run], positions, before)
            residuals.append(h)
        self._together()
        return self._apart(spec.moe_half(ops, self.model, layer, ops.concatenate(residuals)))

    def head(self, states: States) -> None:
        """MODEL-3, of all runs."""
        self._together()
        spec.head(self.ops, self.model, self.ops.concatenate([states[run.run] for run in self.runs]))

    def _together(self) -> None:
        """What is tapped from now on has the rows of all runs."""
        self.tap.rows, start = [], 0
        for run in self.runs:
            self.tap.rows.append((run.run, slice(start, start + len(run.tokens))))
            start += len(run.tokens)

    def _apart(self, x: Any) -> States:
        return {run: x[rows] for run, rows in self.tap.rows}


def check_states(states: States, runs: Sequence[Run], dim: int, where: str) -> None:
    """Raises InputError when there is not one hidden state per token of each run."""
    for run in runs:
        found = states.get(run.run)
        if found is None or found.shape != (len(run.tokens), dim):
            shape = "nothing" if found is None else str(list(found.shape))
            raise InputError(
                f"{where}: the hidden state of run '{run.run}' is {shape}, but [{len(run.tokens)}, {dim}] was expected"
            )
