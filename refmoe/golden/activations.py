"""What a case computes: every tap of every run, exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refmoe.golden.case import Case
from refmoe.golden.fingerprint import Fingerprint, Fingerprinter
from refmoe.ops.exact import ExactOps
from refmoe.script import execute
from refmoe.spec.model import Model
from refmoe.trace import Recorder


def compute(case: Case, progress: Callable[[], None] | None = None) -> dict[str, np.ndarray[Any, Any]]:
    """Every tap of every run of the case.   progress: called after each layer of each run."""
    recorder = Recorder(progress=progress)
    _run(case, recorder)
    return recorder.arrays


def compute_fingerprints(case: Case, progress: Callable[[], None] | None = None) -> dict[str, Fingerprint]:
    """The fingerprint of every tap, taken as it passes: no more than one step's arrays are in memory."""
    recorder = Fingerprinter(progress)
    _run(case, recorder)
    return recorder.fingerprints


def _run(case: Case, recorder: Recorder) -> None:
    execute(ExactOps(recorder), Model(case.config, case.checkpoint().parameters), case.runs(), recorder)
