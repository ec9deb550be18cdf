# SPDX-License-Identifier: Apache-2.0
"""Compute a script part by part: the embedding, each layer, the head. Finished parts are kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.errors import InputError
from refmoe.files.numbers import integer
from refmoe.jobs.estimate import kept_bytes
from refmoe.jobs.layerwise import Script, States, Tap, check_states
from refmoe.jobs.parts import Parts
from refmoe.jobs.source import Source, loaded
from refmoe.jobs.spread import spread_experts
from refmoe.parallel import open_executor, parse_executor
from refmoe.profiles.load import policy
from refmoe.spec.config import Config
from refmoe.spec.model import Model
from refmoe.steps.grouped import GROUPED_STEPS
from refmoe.steps.policy_ops import PolicyOps
from refmoe.steps.rounding import CUT_STEPS
from refmoe.traces.trace import Header, Recorder, read_trace

POLICY = "policy:"
"""Prefix of the name of an arithmetic: the ideal run of the policy that follows."""


@dataclass(frozen=True)
class Job:
    """A computation: model, script, arithmetic, layers and taps."""

    source: Source
    header: Header
    """The header of the trace; its runs are the script."""
    arithmetic: str
    """``exact``, ``float64``, ``float32`` or ``policy:NAME``."""
    layers: range
    taps: str = "*"
    executor: str | None = None
    """The executor of the experts, as `open_executor` reads it; None: this process."""
    begin: Path | None = None
    """A trace with the residual of the layer before `layers.start`; None where that is 0."""

    @property
    def config(self) -> Config:
        return loaded(self.source).config

    def part_names(self) -> list[str]:
        """The names of the parts, in order of computation: ``embedding``, ``layers.0``, ..., ``head``."""
        head = ["head"] * (self.layers.stop == self.config.layers)
        return [*["embedding"] * (not self.layers.start), *(f"layers.{i}" for i in self.layers), *head]

    def identity(self) -> dict[str, Any]:
        """The inputs that the finished parts depend on, as JSON: equal for a run that can use them."""
        begin = None if self.begin is None else [str(self.begin.resolve()), self.begin.stat().st_mtime_ns]
        return {
            "weights": self.source.identity(), "header": self.header.to_json(), "arithmetic": self.arithmetic,
            "taps": self.taps, "layers": [self.layers.start, self.layers.stop], "begin": begin,
        }  # fmt: skip


def parse_layers(text: str | None, config: Config) -> range:
    """The layers that ``--layers A:B`` names: from A to below B. Raises InputError for any other text."""
    if text is None:
        return range(config.layers)
    first, colon, last = text.partition(":")
    start, stop = integer(first or "0"), integer(last or str(config.layers))
    if colon and start is not None and stop is not None:
        layers = range(start, stop)
        if 0 <= layers.start < layers.stop <= config.layers:
            return layers
    raise InputError(f"--layers is '{text}', but A:B with 0 <= A < B <= {config.layers} was expected")


def compute(job: Job, folder: Path, recorder: Recorder, facts: Callable[[], Mapping[str, Any]] = dict) -> Parts:
    """Compute the parts of a job that are not finished yet, and return all parts.

    folder: keeps the finished parts.
    recorder: keeps the taps of one part, which are then written and dropped. Its progress counts finished layers too.
    facts: called after each part; returns a JSON object to keep beside the arrays.
    Raises InputError when an input cannot be used or a part cannot be written.
    """
    if job.executor is not None:
        parse_executor(job.executor)
        if job.arithmetic.startswith(POLICY):
            raise InputError("--executor goes with --dtype; the ideal run of a policy is computed in one process")
    begin = initial_states(job)
    parts, progress = Parts(folder, job.identity(), job.part_names()), recorder.progress
    done = parts.finished
    already = sum(name.startswith("layers.") for name in job.part_names()[:done]) * len(job.header.runs)
    if progress is not None:
        for _ in range(already):
            progress()
    if done == len(parts.names):
        return parts
    states = parts.states(parts.names[done - 1]) if done else begin
    first = max(0, done - (not job.layers.start)) + job.layers.start

    def save(name: str, states: States) -> None:
        parts.save(name, recorder.arrays, states, facts())
        recorder.arrays.clear()

    with nullcontext() if job.executor is None else open_executor(job.executor) as executor:
        steps = CUT_STEPS if job.arithmetic.startswith(POLICY) else GROUPED_STEPS
        if executor is not None:
            steps = replace(steps, run_experts=spread_experts(executor, job.source, job.arithmetic))
        tap = Tap(recorder)
        model = Model(job.config, loaded(job.source).parameters, steps)
        # a value too large for a dtype becomes an infinity, and the trace shows its consequences
        with np.errstate(over="ignore", invalid="ignore"):
            Script(make_ops(job, tap), model, job.header.runs, tap).go(range(first, job.layers.stop), states, save)
    return parts


def initial_states(job: Job) -> States | None:
    """The input of the first layer, per run [T, D]; None for layer 0, whose input is the embedding.

    Raises InputError when the trace `begin` is missing or lacks it.
    """
    first = job.layers.start
    if not first:
        return None
    if job.begin is None:
        raise InputError(
            f"--layers {first}:{job.layers.stop}: a trace with the output of layer {first - 1} was expected as --states"
        )
    trace, tap = read_trace(job.begin), f"layers.{first - 1}.residual"
    states = {run.run: np.array(trace.get(run.run, tap)) for run in job.header.runs if tap in trace.names(run.run)}
    check_states(states, job.header.runs, job.config.dim, f"{job.begin}: tap '{tap}'")
    wanted = np.dtype("float32" if job.arithmetic == "float32" else "float64")
    for run, values in states.items():
        if values.dtype != wanted:
            raise InputError(f"{job.begin}: '{run}/{tap}' is {values.dtype}, but {wanted} was expected")
    return states


def make_ops(job: Job, tap: Any) -> Any:
    """The ops of the job, with as much memory for weights as a layer's attention needs."""
    limit = kept_bytes(job.config, job.arithmetic)
    if job.arithmetic.startswith(POLICY):
        return PolicyOps(policy(job.arithmetic.removeprefix(POLICY)), tap, prepared_bytes=limit)
    if job.arithmetic == "exact":
        return ExactOps(tap, prepared_bytes=limit)
    return NativeOps(job.arithmetic, tap, upcast_bytes=limit)
