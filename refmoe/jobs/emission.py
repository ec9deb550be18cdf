# SPDX-License-Identifier: Apache-2.0
"""Emit a trace of a checkpoint of any size: estimate it, compute it layer by layer, write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from refmoe.checkpoints.layout import Checkpoint
from refmoe.checkpoints.load import checkpoint_digest
from refmoe.cuda.memory import by_layers, widest
from refmoe.cuda.place import CPU, Place
from refmoe.errors import InputError
from refmoe.jobs.estimate import Estimate, available_memory, estimate
from refmoe.jobs.job import POLICY, Job, compute, parse_layers
from refmoe.jobs.layerwise import Script, Tap
from refmoe.jobs.parts import kept_parts
from refmoe.jobs.source import Folder, Source, loaded
from refmoe.spec.model import Model
from refmoe.traces.trace import Header, Recorder, Run, join_trace, write_trace


@dataclass(frozen=True)
class Emission:
    """A trace to emit: the model, the script, the arithmetic, the place, and the file to write."""

    source: Source
    runs: tuple[Run, ...]
    out: Path
    arithmetic: str = "exact"
    """``exact``, ``float64``, ``float32``, or on the CPU ``policy:NAME``."""
    taps: str = "*"
    """Shell patterns of the taps to keep, separated by commas."""
    place: Place = CPU
    layers: str | None = None
    """``A:B``: only layers A to below B; None: all layers."""
    states: Path | None = None
    """A trace with the residual of layer A - 1, where A is not 0."""
    executor: str | None = None
    """The executor of the experts, as `open_executor` reads it; None: this process."""
    digest: bool = True
    """Whether the trace names the checkpoint by its SHA-256, which reads every byte once more."""
    case: str | None = None
    """The case whose model and calls these are, if it is one."""

    @property
    def model(self) -> Checkpoint:
        return loaded(self.source)

    @property
    def computed(self) -> range:
        """The layers to compute. Raises InputError when `layers` names none."""
        return parse_layers(self.layers, self.model.config)

    def header(self) -> Header:
        """The header of the trace."""
        return Header(
            self.runs,
            self.case,
            checkpoint=checkpoint_digest(self.model) if self.digest else None,
            policy=self.arithmetic.removeprefix(POLICY),
        )


CPU_ONLY = {"layers": "--layers", "states": "--states", "executor": "--executor"}
"""Fields of an emission that only the CPU supports, and the options that set them."""


def check_emission(emission: Emission) -> Estimate:
    """Check an emission before it starts, and estimate it as a run on the CPU. Nothing is computed.

    Raises InputError when the options contradict each other, or no tap of the model matches.
    """
    if emission.place.on_gpu:
        for name, option in CPU_ONLY.items():
            if getattr(emission, name) is not None:
                raise cpu_only(option, emission.place)
    layers = emission.computed
    if emission.states is not None and not layers.start:
        raise InputError(
            f"--states {emission.states}: layer 0 begins with the embedding, so --layers A:B with A > 0 was expected"
        )
    needed = estimate(
        emission.model.config, emission.runs, layers, emission.arithmetic, emission.taps, stored_bytes(emission.source)
    )
    if not needed.trace:
        some = "" if emission.layers is None else f" of layers {layers.start} to {layers.stop - 1}"
        raise InputError(f"--taps {emission.taps!r} matches no tap{some}")
    return needed


def cpu_only(option: str, place: Place) -> InputError:
    """The error for an option that only the CPU supports."""
    return InputError(f"{option} is for the CPU, but --device {place.name} was given")


def stored_bytes(source: Source) -> int:
    """The bytes of a stored parameter. The weight formula gives float32, which counts as stored."""
    if not isinstance(source, Folder):
        return 4
    return max({"F64": 8, "F32": 4}.get(dtype, 2) for dtype in loaded(source).dtypes)


def require_memory(emission: Emission, needed: Estimate) -> None:
    """Raises InputError when the place of the emission has less free memory than it needs."""
    if emission.place.on_gpu:
        sizes = [(len(run.tokens), run.past) for run in emission.runs]
        model = emission.model
        emission.place.require_memory(by_layers(model.config, sizes, widest(model.dtypes), emission.arithmetic))
        return
    free = available_memory()
    if free is not None and needed.memory > free:
        raise InputError(
            f"out of memory: up to {decimal(needed.memory)} are needed, but {decimal(free)} are available; fewer "
            "tokens need less"
        )


def emit(emission: Emission, progress: Callable[[], None] | None = None) -> None:
    """Compute the trace and write it, whole or not at all.

    progress: called after each layer of each run.
    On the CPU, finished layers are kept in the folder ``OUT.parts`` until the trace is written. A second call goes
    on from there. On a GPU all taps stay in the host's memory until the trace is written.
    Raises InputError when an input cannot be used or the trace cannot be written.
    """
    recorder = Recorder(emission.taps, progress)
    if emission.place.on_gpu:
        compute_in_place(emission.place, emission.arithmetic, emission.model, emission.runs, recorder)
        write_trace(emission.out, emission.header(), recorder.arrays)
        return
    job = Job(
        source=emission.source,
        header=emission.header(),
        arithmetic=emission.arithmetic,
        layers=emission.computed,
        taps=emission.taps,
        executor=emission.executor,
        begin=emission.states,
    )
    folder = emission.out.with_name(emission.out.name + ".parts")
    with kept_parts(folder):
        parts = compute(job, folder, recorder)
        join_trace(emission.out, job.header, parts.tensors())
        parts.remove()


def compute_in_place(
    place: Place, arithmetic: str, model: Checkpoint, runs: tuple[Run, ...], recorder: Recorder,
    layers: range | None = None,
) -> None:  # fmt: skip
    """Run a script layer by layer on the device of a place. Nothing is kept on disk.

    recorder: keeps the taps, as arrays of the host.   layers: the layers to run; None: all of them.
    """
    tap, config = Tap(recorder), model.config
    used = Model(config, place.parameters(config, model.parameters), place.steps(arithmetic))
    script = Script(place.arithmetic(arithmetic, tap), used, runs, tap)
    script.go(layers or range(config.layers), None, lambda _name, _states: None)
