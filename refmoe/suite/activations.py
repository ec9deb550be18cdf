# SPDX-License-Identifier: Apache-2.0
"""Compute a case: every tap of every run, exactly, or rounded by a policy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.cuda.place import CPU, Place
from refmoe.errors import InputError
from refmoe.files.scratch import Scratch
from refmoe.jobs import job
from refmoe.jobs.emission import compute_in_place
from refmoe.jobs.source import Formula
from refmoe.profiles.policy import Policy
from refmoe.spec.model import Model
from refmoe.steps.policy_ops import PolicyOps
from refmoe.steps.rounding import CUT_STEPS
from refmoe.suite.case import Case
from refmoe.suite.fingerprint import Fingerprint, Fingerprinter, from_json
from refmoe.traces.script import execute
from refmoe.traces.trace import Header, Recorder

EVERYWHERE = "processes"
"""The executor of full-size cases: all cores. The bits do not depend on it."""


def compute(case: Case, progress: Callable[[], None] | None = None, place: Place = CPU) -> dict[str, NDArray[Any]]:
    """Compute every tap of every run of the case: ``<run>/<tap>`` to its array.

    progress: called after each layer of each run.   Raises InputError for a case with only some of its layers.
    """
    if case.layers is not None:
        raise InputError(f"case {case.name}: 'layers' goes with store = \"fingerprint\"")
    recorder = Recorder(progress=progress)
    _run(case, recorder, place)
    return recorder.arrays


def compute_fingerprints(
    case: Case,
    progress: Callable[[], None] | None = None,
    parts: Path | None = None,
    place: Place = CPU,
    executor: str | None = None,
) -> dict[str, Fingerprint]:
    """Compute the fingerprint of every tap of the case. Only one step's arrays are in memory at a time.

    progress: called after each layer of each run.
    parts: a folder that keeps the finished layers of a full-size case, so that a later call goes on from there.
    executor: of the experts of a full-size case; None: all cores.
    """
    recorder = Fingerprinter(progress)
    if not case.full_size and case.layers is None:
        _run(case, recorder, place)
        return recorder.fingerprints
    if place.on_gpu:
        compute_in_place(place, "exact", case.checkpoint(), case.runs(), recorder, case.computed)
        return recorder.fingerprints
    with Scratch("fingerprints") as scratch:
        kept = parts or scratch.path / "parts"
        found = job.compute(full_size_job(case, executor), kept, recorder, lambda: _take_fingerprints(recorder))
        return {key: from_json(entry) for key, entry in found.facts().items()}


def compute_ideal(case: Case, rules: Policy, recorder: Recorder) -> None:
    """Compute the ideal run of the case by a policy: exact, and rounded at the policy's cut points."""
    model = Model(case.config, case.checkpoint().parameters, CUT_STEPS)
    # a value too large for a dtype becomes an infinity, and the trace shows its consequences
    with np.errstate(over="ignore", invalid="ignore"):
        execute(PolicyOps(rules, recorder), model, case.runs(), recorder)


def full_size_job(case: Case, executor: str | None = None) -> job.Job:
    """The job that computes a case layer by layer.   executor: as for `compute_fingerprints`"""
    return job.Job(
        source=case_source(case),
        header=Header(case.runs(), case.name, policy="exact"),
        arithmetic="exact",
        layers=case.computed,
        executor=(executor or EVERYWHERE) if case.full_size else None,
    )


def case_source(case: Case) -> Formula:
    """The source of a case's model. It can be sent to another process."""
    return Formula(case.config, case.seed, tuple(case.exponents.items()), json.dumps(case.edits))


def _take_fingerprints(recorder: Fingerprinter) -> dict[str, Any]:
    """Empty the recorder and return its fingerprints, as JSON."""
    taken = {key: asdict(value) for key, value in recorder.fingerprints.items()}
    recorder.fingerprints.clear()
    return taken


def _run(case: Case, recorder: Recorder, place: Place) -> None:
    parameters = place.parameters(case.config, case.checkpoint().parameters)
    execute(place.exact(recorder), Model(case.config, parameters), case.runs(), recorder)
