# SPDX-License-Identifier: Apache-2.0
"""The certificate of a case: a proven bound on the distance of each golden value from its real number."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
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

DOUBLED = 2 * PRECISION
"""The bits of a proof that checks a certificate. Its balls are so much smaller that they lie within every bound that
the first proof gave, whichever version of Arb gave it."""
DIGITS = 1e-6
"""Relative bounds are compared to six digits."""


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


def certify(case: Case, precision: int = PRECISION) -> Certificate:
    """Run the case in ball arithmetic and compare its golden with the balls.

    precision: bits of the midpoints.   If the case stores a fingerprint, its golden is recomputed.
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

    execute(BallOps(tap, precision), Model(case.config, case.checkpoint().parameters), case.runs(), recorder)
    return Certificate(prover.bounds, prover.relative, prover.decisions, tuple(prover.unproven))


def unproven_claims(stated: Mapping[str, Any], found: Certificate) -> Iterator[str]:
    """The claims of a certificate that another proof does not give, a clause each.

    stated: the certificate in a manifest   found: the other proof, by `DOUBLED` bits
    Both proofs rounded a bound to binary64 once, so that they may differ by the last bit of it. The root mean square is
    a sum in another order on another machine, which changes the last digits of a relative bound.
    """
    for name, proven, slack in (("bounds", found.bounds, 0.0), ("relative", found.relative, DIGITS)):
        claims = stated[name]
        for key in sorted({*claims} ^ {*proven}):
            yield f"'certificate.{name}' {'has' if key in claims else 'lacks'} {key}, unlike the golden"
        for key in proven:
            claim = claims.get(key)
            if claim is not None and proven[key] > math.nextafter(claim, math.inf) * (1 + slack):
                yield f"'certificate.{name}.{key}' is {claim!r}, but {proven[key]!r} is the least that can be proven"
    decisions, worst = stated["decisions"], stated["worst"]
    if decisions["all"] != found.decisions:
        yield f"'certificate.decisions.all' is {decisions['all']}, but the golden has {found.decisions}"
    for decision in found.unproven:
        if decision not in decisions["unproven"]:
            yield f"'certificate.decisions.unproven' lacks {decision}, which is not proven"
    largest = max((math.inf if bound is None else bound for bound in stated["relative"].values()), default=0.0)
    if worst["relative"] != finite(largest) or stated["relative"].get(worst["tensor"], "") != worst["relative"]:
        yield "'certificate.worst' is not the largest of 'certificate.relative'"
