"""What a case computes: every tap of every run, exactly."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.cuda.place import CPU, Place
from refmoe.errors import InputError
from refmoe.jobs import job as scale
from refmoe.jobs.layerwise import Script, Tap
from refmoe.jobs.source import Formula
from refmoe.spec.model import Model
from refmoe.suite.case import Case
from refmoe.suite.fingerprint import Fingerprint, Fingerprinter, from_json
from refmoe.traces.script import execute
from refmoe.traces.trace import Header, Recorder

EVERYWHERE = "processes"
"""Full-size cases are computed on all cores: their bits do not depend on it."""


def compute(
    case: Case, progress: Callable[[], None] | None = None, place: Place = CPU
) -> dict[str, np.ndarray[Any, Any]]:
    """Every tap of every run of the case.   progress: called after each layer of each run."""
    if case.layers is not None:
        raise InputError(f"case {case.name}: 'layers' goes with store = \"fingerprint\"")
    recorder = Recorder(progress=progress)
    _run(case, recorder, place)
    return recorder.arrays


def compute_fingerprints(
    case: Case, progress: Callable[[], None] | None = None, parts: Path | None = None, place: Place = CPU
) -> dict[str, Fingerprint]:
    """The fingerprint of every tap, taken as it passes: no more than one step's arrays are in memory.

    parts: a folder where finished layers of a case of full size are kept, and found when it is computed again.
    """
    recorder = Fingerprinter(progress)
    if not case.full_size and case.layers is None:
        _run(case, recorder, place)
        return recorder.fingerprints
    if place.on_gpu:
        _run_layers(case, recorder, place)
        return recorder.fingerprints
    with tempfile.TemporaryDirectory() as folder:
        found = scale.compute(full_size_job(case), parts or Path(folder) / "parts", recorder, lambda: _taken(recorder))
        return {key: from_json(entry) for key, entry in found.facts().items()}


def full_size_job(case: Case) -> scale.Job:
    """The computation of a case layer by layer."""
    executor = EVERYWHERE if case.full_size else None
    return scale.Job(
        case_source(case), Header(case.runs(), case.name, policy="exact"), "exact", case.computed, executor=executor
    )


def case_source(case: Case) -> Formula:
    """The model of a case, in words that can be sent to another process."""
    return Formula(case.config, case.seed, tuple(case.exponents.items()), json.dumps(case.edits))


def _taken(recorder: Fingerprinter) -> dict[str, Any]:
    """The fingerprints since the last time."""
    taken = {key: asdict(value) for key, value in recorder.fingerprints.items()}
    recorder.fingerprints.clear()
    return taken


def _run(case: Case, recorder: Recorder, place: Place) -> None:
    execute(place.exact(recorder), _model(case, place), case.runs(), recorder)


def _run_layers(case: Case, recorder: Recorder, place: Place) -> None:
    """Layer by layer, each weight read once, and nothing kept on disk."""
    tap, model = Tap(recorder), _model(case, place)
    Script(place.exact(tap), model, case.runs(), tap).go(case.computed, None, lambda _name, _states: None)


def _model(case: Case, place: Place) -> Model:
    return Model(case.config, place.parameters(case.config, case.checkpoint().parameters))
