"""``refmoe emit --checkpoint --device cuda``: a script on a model that is larger than the device, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from refmoe.checkpoints.load import checkpoint_digest
from refmoe.cli.emit_job import report
from refmoe.cli.options import progress_bar
from refmoe.cuda.memory import by_layers, widest
from refmoe.cuda.place import Place
from refmoe.errors import InputError
from refmoe.jobs.layerwise import Script, Tap
from refmoe.jobs.source import find_source, loaded
from refmoe.spec.model import Model
from refmoe.traces.script import Call, plan
from refmoe.traces.trace import Header, Recorder, write_trace

ON_CPU = {"layers": "--layers", "states": "--states", "executor": "--executor", "only_estimate": "--estimate"}
"""Options of emit that go with the CPU alone."""


def emit_on_gpu(
    place: Place, checkpoint: Path, layout: str | None, calls: Callable[[], list[Call]], out: Path, taps: str,
    dtype: str, as_json: bool, *, synthetic: int | None, digest: bool = True, **on_cpu: Any,
) -> None:  # fmt: skip
    """Compute and write the trace; the taps are on the host until it is written."""
    for name, option in ON_CPU.items():
        if on_cpu.get(name):
            raise InputError(f"{option} is for the CPU, but --device {place.name} was given")
    model = loaded(find_source(checkpoint, layout, synthetic))
    runs = plan(calls(), model.config.vocab)
    sizes = [(len(run.tokens), run.past) for run in runs]
    place.require_memory(by_layers(model.config, sizes, widest(model.dtypes), dtype))
    header = Header(runs, None, checkpoint_digest(model.files) if digest and model.files else None, dtype)
    with progress_bar("emit", len(runs) * model.config.layers) as advance:
        recorder = Recorder(taps, advance)
        tap = Tap(recorder)
        parameters = place.parameters(model.config, model.parameters)
        used = Model(model.config, parameters, place.steps(dtype))
        Script(place.arithmetic(dtype, tap), used, runs, tap).go(range(model.config.layers), None, lambda *_: None)
    if not recorder.arrays:
        raise InputError(f"--taps {taps!r} matches no tap")
    write_trace(out, header, recorder.arrays)
    report(as_json, out, len(runs))
