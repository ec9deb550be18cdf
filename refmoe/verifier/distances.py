# SPDX-License-Identifier: Apache-2.0
"""The distance of each tap of a trace from a reference trace. There is no verdict."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refmoe.errors import InputError
from refmoe.spec.taps import IDS, LAYER_TAPS, READ_OUT_TAPS
from refmoe.traces.pieces import only_last
from refmoe.traces.trace import Run, Trace

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Distance:
    """The distance of one tap of one run from the reference."""

    run: str
    tap: str
    dtype: str
    relative_rms: float
    """Root mean square of the difference over root mean square of the reference. NaN if a value is not finite."""
    worst: float
    """The largest absolute difference."""
    where: tuple[int, ...]
    found: float
    expected: float


@dataclass(frozen=True)
class RoutingDifference:
    """One token of one layer that was sent to other experts than in the reference."""

    run: str
    layer: int
    token: int
    found: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """A whole trace against its reference."""

    distances: tuple[Distance, ...]
    routing: tuple[RoutingDifference, ...]
    decisions: int
    """The number of routing decisions that both traces hold."""
    missing: tuple[str, ...]
    """Taps of the reference that the trace lacks, ``<run>/<tap>``."""
    unknown: tuple[str, ...]
    """Taps of the trace that the reference lacks."""


def compare_traces(trace: Trace, reference: Trace) -> Comparison:
    """Compare every tap that both traces hold.

    Raises InputError when runs, tokens or shapes disagree, or when the traces share no tap.
    """
    expected_runs = {run.run: run for run in reference.header.runs}
    distances: list[Distance] = []
    routing: list[RoutingDifference] = []
    decisions = 0
    for run in trace.header.runs:
        if run.run not in expected_runs:
            raise InputError(f"{trace.path}: run '{run.run}' is not in {reference.path}, which has {[*expected_runs]}")
        _same_input(trace, run, expected_runs[run.run], reference)
        shared = set(trace.names(run.run)) & set(reference.names(run.run))
        if IDS in shared:
            shared -= {*READ_OUT_TAPS}  # two lists of entries may be in different orders
        for tap in sorted(shared, key=order):
            found, expected = trace.get(run.run, tap), reference.get(run.run, tap)
            count = len(run.tokens)
            if only_last(tap, found.shape, count) and expected.shape == (count, found.shape[-1]):
                last = measure(run.run, tap, found.reshape(1, -1), expected[-1:])
                distances.append(replace(last, where=(count - 1, last.where[1])))
                continue
            if found.shape != expected.shape:
                raise InputError(
                    f"{trace.path}: '{run.run}/{tap}' has shape {list(found.shape)}, but {reference.path} has "
                    f"{list(expected.shape)}"
                )
            if tap.endswith("router.experts"):
                routing += routing_differences(run.run, tap, found, expected)
                decisions += len(found)
            else:
                distances.append(_distance(trace, reference, run.run, tap))
    if not distances and not decisions:
        raise InputError(f"{trace.path}: shares no tap with {reference.path}")
    runs = {run.run for run in trace.header.runs}
    keys = {key for key in reference.tensors if key.rpartition("/")[0] in runs}
    return Comparison(
        distances=tuple(distances),
        routing=tuple(routing),
        decisions=decisions,
        missing=tuple(sorted(keys - trace.tensors.keys())),
        unknown=tuple(sorted(trace.tensors.keys() - keys)),
    )


def order(tap: str) -> tuple[int, int]:
    """A sort key that puts taps in the order in which the spec computes them."""
    if tap.startswith("layers."):
        layer, _, name = tap.removeprefix("layers.").partition(".")
        names = [*LAYER_TAPS]
        return int(layer) if layer.isdigit() else 1 << 30, names.index(name) if name in names else len(names)
    return {"embedding": (-1, 0), "final_norm": (1 << 31, 0)}.get(tap, (1 << 31, 1))


def routing_differences(run: str, tap: str, found: Ints, expected: Ints) -> Iterator[RoutingDifference]:
    """The tokens whose set of experts differs. The order within the set does not count.

    found, expected: integers [T, k]
    """
    layer = int(tap.split(".")[1])
    for token in np.flatnonzero((np.sort(found, -1) != np.sort(expected, -1)).any(-1)):
        yield RoutingDifference(
            run=run,
            layer=layer,
            token=int(token),
            found=tuple(found[token].tolist()),
            expected=tuple(expected[token].tolist()),
        )


def measure(run: str, tap: str, found: Any, expected: Any) -> Distance:
    """The distance between two arrays of the same shape, computed in float64."""
    dtype = str(found.dtype)
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.where(found == expected, 0.0, found - expected)
        size, scale = float(np.sqrt(np.mean(difference**2))), float(np.sqrt(np.mean(expected**2)))
    finite = np.isfinite(difference)
    at = np.unravel_index(int(np.argmax(np.where(finite, np.abs(difference), np.inf))), difference.shape)
    relative = 0.0 if size == 0 else size / scale if scale > 0 else float("inf")
    return Distance(
        run=run,
        tap=tap,
        dtype=dtype,
        relative_rms=relative,
        worst=float(np.abs(difference[at])),
        where=tuple(int(i) for i in at),
        found=float(found[at]),
        expected=float(expected[at]),
    )


def _distance(trace: Trace, reference: Trace, run: str, tap: str) -> Distance:
    found, expected = trace.get(run, tap), reference.get(run, tap)
    prefix, _, name = tap.rpartition("router." if "router." in tap else "expert.")
    ids = f"{prefix}router.experts"
    both = f"{run}/{ids}" in trace.tensors and f"{run}/{ids}" in reference.tensors
    if not both or not prefix or name == "logits":
        return measure(run, tap, found, expected)
    # each trace orders its slots as it likes: sort both by expert, and leave out tokens with other experts
    ours, theirs = trace.get(run, ids), reference.get(run, ids)
    same = (np.sort(ours, -1) == np.sort(theirs, -1)).all(-1)
    rows = [
        np.take_along_axis(array, np.argsort(chosen, -1).reshape(*chosen.shape, *[1] * (array.ndim - 2)), axis=1)[same]
        for array, chosen in ((found, ours), (expected, theirs))
    ]
    if not same.any():
        rows = [np.zeros(1, array.dtype) for array in rows]
    result = measure(run, tap, *rows)
    token = int(np.flatnonzero(same)[result.where[0]]) if same.any() else 0
    return Distance(**{**vars(result), "where": (token, *result.where[1:])})


def _same_input(trace: Trace, run: Run, expected: Run, reference: Trace) -> None:
    for name in ("tokens", "positions", "past"):
        found, wanted = getattr(run, name), getattr(expected, name)
        if found != wanted:
            raise InputError(f"{trace.path}: run '{run.run}' has {name} {found}, but {reference.path} has {wanted}")
