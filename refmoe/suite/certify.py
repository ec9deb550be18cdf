# SPDX-License-Identifier: Apache-2.0
"""The certificate of a case: a proven bound on the distance of each golden value from its real number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.ball import PRECISION, BallOps, chooses
from refmoe.errors import InputError
from refmoe.spec.model import Model
from refmoe.suite import Case, compute, trace_path
from refmoe.traces.script import execute
from refmoe.traces.trace import Recorder, read_trace


@dataclass(frozen=True)
class Certificate:
    """The proof for one case, from ball arithmetic."""

    bounds: dict[str, float]
    """Per ``<run>/<tap>`` the largest |golden - real value|, rounded up."""
    relative: dict[str, float]
    """Per ``<run>/<tap>`` that bound over the root mean square of the tap."""
    decisions: int
    """The number of routing decisions."""
    unproven: tuple[str, ...]
    """The routing decisions that the balls do not prove, ``<run>/<tap>[token]``."""

    def to_json(self) -> dict[str, Any]:
        """The certificate in a manifest. JSON has no infinity, so an infinite bound is null."""
        worst = max(self.relative, key=lambda key: self.relative[key])
        return {
            "arithmetic": f"Arb balls, {PRECISION} bits",
            "worst": {"tensor": worst, "relative": finite(self.relative[worst])},
            "bounds": {key: finite(bound) for key, bound in self.bounds.items()},
            "relative": {key: finite(bound) for key, bound in self.relative.items()},
            "decisions": {"all": self.decisions, "unproven": list(self.unproven)},
        }


def finite(value: float) -> float | None:
    """The value, or None if it is not finite."""
    return value if math.isfinite(value) else None


class Prover:
    """A tap that compares the balls of each step with the golden, and follows the golden's routing.

    The steps after a decision use the golden's choice of experts, so the balls enclose the same function as the golden.
    Whether the real numbers make the same choice is a proof of its own, per decision.
    """

    def __init__(self, golden: Mapping[str, NDArray[Any]]) -> None:
        self.golden = golden
        self.run = ""
        self.bounds: dict[str, float] = {}
        self.relative: dict[str, float] = {}
        self.decisions = 0
        self.unproven: list[str] = []
        self._logits: Any = None

    def __call__(self, name: str, x: Any) -> Any:
        key = f"{self.run}/{name}"
        golden = self.golden[key]
        if name.endswith("router.experts"):
            proven = chooses(self._logits, golden)
            self.decisions += len(proven)
            self.unproven += [f"{key}[{token}]" for token in np.flatnonzero(~proven)]
            return golden
        if name.endswith("router.logits"):
            self._logits = x
        self.bounds[key] = largest_distance(x, golden)
        scale = float(np.sqrt(np.mean(np.square(golden))))
        self.relative[key] = self.bounds[key] / scale if scale else (math.inf if self.bounds[key] else 0.0)
        return None


def largest_distance(balls: Any, values: NDArray[Any]) -> float:
    """The largest |value - real number| that the balls allow, rounded up. Both arrays have the same shape."""
    distances = np.frompyfunc(lambda ball, value: float((ball - value).abs_upper()), 2, 1)(balls, values)
    # abs_upper is an upper bound; its conversion to binary64 rounds to nearest, so step up once
    return math.nextafter(float(np.max(distances.astype(np.float64))), math.inf)


def certify(case: Case) -> Certificate:
    """Run the case in ball arithmetic and compare its golden with the balls.

    If the case stores a fingerprint, its golden is recomputed.
    Raises InputError when python-flint is not installed, the golden trace cannot be read, or the case is of full size.
    """
    if case.full_size:
        raise InputError(f"{case.folder}: is of full size, and ball arithmetic at that size takes days")
    if case.store == "trace":
        golden = {key: tensor.map() for key, tensor in read_trace(trace_path(case.folder)).tensors.items()}
    else:
        golden = compute(case)
    prover = Prover(golden)
    recorder = Recorder()

    def tap(name: str, x: Any) -> Any:
        prover.run = recorder.run
        return prover(name, x) if recorder.read else None

    execute(BallOps(tap), Model(case.config, case.checkpoint().parameters), case.runs(), recorder)
    return Certificate(prover.bounds, prover.relative, prover.decisions, tuple(prover.unproven))
