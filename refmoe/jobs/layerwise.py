# SPDX-License-Identifier: Apache-2.0
"""Run a script layer by layer: every call through one layer, then every call through the next.

`refmoe.traces.script.execute` runs call by call, and reads all weights once per call. Here each weight is read once per
script. A layer leaves one hidden state per token, so a run can stop after any layer and go on later.
The values are the same. The attention of each call is computed on its own, as MODEL-4 allows. In the rest of a layer no
row depends on another row, so the rows of all calls pass through it together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from refmoe.errors import InputError
from refmoe.spec import model as spec
from refmoe.spec.attention import Cache
from refmoe.spec.model import Model
from refmoe.traces.script import cut_layer, filling
from refmoe.traces.trace import Recorder, Run

States = dict[str, Any]
"""Per run the hidden states of its tokens, [T, D]."""


@dataclass
class Tap:
    """A tap that splits each array by rows among the runs, and gives each run's rows to a recorder."""

    recorder: Recorder
    rows: list[tuple[Run, slice]] = field(default_factory=list)
    """Runs and their rows. A single run gets the whole array: not every tap has tokens as its first axis."""

    def __call__(self, name: str, x: Any) -> None:
        for run, rows in self.rows:
            self.recorder.begin(run)
            self.recorder(name, x if len(self.rows) == 1 else x[rows])


class Script:
    """A script to run layer by layer, on ops that tap into `tap`."""

    def __init__(self, ops: Any, model: Model, runs: Sequence[Run], tap: Tap) -> None:
        if model.steps.decoder_layer is not spec.decoder_layer:
            raise ValueError("a layer with steps of its own cannot be taken apart")
        self.ops, self.model, self.runs, self.tap = ops, model, runs, tap

    def go(self, layers: range, states: States | None, save: Callable[[str, States], None]) -> None:
        """Run these layers. The head follows the model's last layer.

        states: the input of layer `layers.start`; None: compute the embedding first.
        save: called after each part (``embedding``, ``layers.0``, ..., ``head``) with its name and the input of the
        next part.
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
        """The embedding of all runs, MODEL-1."""
        tokens = [token for run in self.runs for token in run.tokens]
        self._together(self.runs)
        return self._apart(spec.embed(self.ops, self.model, self.ops.integers(tokens)))

    def layer(self, i: int, states: States) -> States:
        """One layer of all runs, LAYER-1: the attention half run by run, then the other half for all rows at once.

        Of the model's last layer, a run that nobody reads has only its keys and values.
        """
        ops, layer = self.ops.within(f"layers.{i}."), self.model.parameters.layers[i]
        wanted = [run for run in self.runs if run.read or i < self.model.config.layers - 1]
        caches: dict[int, Cache | None] = {}
        residuals = []
        for run in self.runs:
            self.tap.rows = [(run, slice(None))]
            before, positions = cut_layer(caches.get(run.sequence), run), ops.integers(run.positions)
            model = self.model if run in wanted else filling(self.model)
            h, caches[run.sequence] = spec.attention_half(ops, model, layer, states[run.run], positions, before)
            if run in wanted:
                residuals.append(h)
        self._together(wanted)
        return self._apart(spec.moe_half(ops, self.model, layer, ops.concatenate(residuals)))

    def head(self, states: States) -> None:
        """The logits of all runs that are read, MODEL-3."""
        wanted = [run for run in self.runs if run.read]
        self._together(wanted)
        spec.head(self.ops, self.model, self.ops.concatenate([states[run.run] for run in wanted]))

    def _together(self, runs: Sequence[Run]) -> None:
        """Tell the tap that the next arrays hold the rows of these runs, one run after another."""
        self.tap.rows, start = [], 0
        for run in runs:
            self.tap.rows.append((run, slice(start, start + len(run.tokens))))
            start += len(run.tokens)

    def _apart(self, x: Any) -> States:
        return {run.run: x[rows] for run, rows in self.tap.rows}


def check_states(states: States, runs: Sequence[Run], dim: int, where: str) -> None:
    """Raises InputError when there is not one hidden state per token of each run."""
    for run in runs:
        found = states.get(run.run)
        if found is None or found.shape != (len(run.tokens), dim):
            shape = "nothing" if found is None else str(list(found.shape))
            raise InputError(
                f"{where}: the hidden state of run '{run.run}' is {shape}, but [{len(run.tokens)}, {dim}] was expected"
            )
