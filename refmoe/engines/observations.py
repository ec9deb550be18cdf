# SPDX-License-Identifier: Apache-2.0
"""Observations about an engine beside its verdicts: whose bits it has, and how much its policies allow."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.formats import FLOAT64, FORMATS, nearest
from refmoe.engines.results import Results
from refmoe.errors import InputError
from refmoe.profiles.cut_points import CUT_POINTS
from refmoe.profiles.load import policy as named_policy
from refmoe.profiles.policy import Policy
from refmoe.spec.taps import READ_OUT_TAPS
from refmoe.suite import MANIFEST_FILE, Case, trace_path
from refmoe.traces.pieces import only_last
from refmoe.traces.trace import Trace, read_trace
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT, NOT_CONFORMANT

# ---- the bits of the goldens

FEWEST = 100
"""Values that must have been rounded, before equal bits say anything."""
SPARE = 8
"""Of a value in float64, this many last bits are zero with a chance of one in 256 where a sum has been rounded."""


def has_golden_bits(trace: Trace, case: Case) -> bool:
    """Whether all values of a trace are the golden's, rounded once to the dtype of the trace.

    No engine has these bits that computes in this dtype. In a narrow dtype it rounds at every step. In float64 its
    sums are in another order than that of an exact sum. False where too few values are rounded at all, as in a case of
    small integers, and where the case has no golden trace.
    """
    golden = _golden(case)
    if golden is None:
        return False
    rounded = 0
    for run in trace.runs:
        for tap in trace.names(run.run):
            values = trace.get(run.run, tap)
            if values.dtype.kind in "iu":
                continue
            if str(values.dtype) not in FORMATS:
                return False
            if tap in READ_OUT_TAPS:
                continue  # no golden has them
            if f"{run.run}/{tap}" not in golden.tensors:
                return False
            exact = golden.get(run.run, tap)
            if only_last(tap, values.shape, len(run.tokens)):
                exact = exact[-1].reshape(values.shape)
            if values.shape != exact.shape or not np.array_equal(values, _rounded(exact, values.dtype)):
                return False
            rounded += _inexact(exact, values)
    return rounded >= FEWEST


def _golden(case: Case) -> Trace | None:
    """The golden trace of a case, None where it has none."""
    if case.store != "trace":
        return None
    try:
        manifest = (case.folder / MANIFEST_FILE).stat()
        return _stored(case.folder, (manifest.st_dev, manifest.st_ino, manifest.st_mtime_ns))
    except (InputError, OSError):
        return None


@lru_cache(maxsize=1)  # the dtypes of a case are judged one after the other
def _stored(folder: Path, _manifest: tuple[int, ...]) -> Trace:
    """The golden trace in a folder.   _manifest: says whether the folder's manifest is still the one that was read"""
    return read_trace(trace_path(folder))


def _rounded(exact: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Values of float64 rounded once to nearest, in a dtype."""
    with np.errstate(over="ignore"):
        return nearest(exact, FORMATS[str(dtype)]).astype(dtype)


def _inexact(exact: NDArray[Any], values: NDArray[Any]) -> int:
    """The number of different values that were certainly rounded. Equal ones may be one value, many times."""
    if str(values.dtype) == FLOAT64.name:
        rounded = np.ascontiguousarray(exact).view(np.uint64) & np.uint64((1 << SPARE) - 1) != 0
    else:
        rounded = values.astype(np.float64) != exact
    return int(np.unique(exact[rounded]).size)


def golden_bits_notes(results: Results) -> list[str]:
    """A sentence for each dtype in which the engine has the bits of the goldens."""
    judged: dict[str, list[bool]] = {}
    for each in results.outcomes:
        if each.verdict in (CONFORMANT, NOT_CONFORMANT, CANNOT_JUDGE):
            judged.setdefault(each.dtype, []).append(each.golden_bits)
    return [golden_bits_note(dtype, sum(same), len(same)) for dtype, same in judged.items() if any(same)]


def golden_bits_note(dtype: str, same: int, judged: int) -> str:
    """The observation about a dtype.   same: cases with the golden's bits, among those judged"""
    many = f"in {same} of {judged} cases" if judged > 1 else "in its case"
    if dtype == FLOAT64.name:
        why, or_else = "sums in any other order differ in their last bits", "computed by refmoe's own arithmetic"
    else:
        why, or_else = f"an engine that computes in {dtype} has other bits", "computed in a wider dtype"
    return (
        f"{dtype}: {many} every value is the golden's own, rounded once; {why}. The values were copied, or {or_else}. "
        "--fresh SEED tells which"
    )


# ---- the policies


def is_wider(policy: Policy, dtype: str) -> bool:
    """Whether a policy allows something that the generic policy of a dtype forbids."""
    own = named_policy(dtype)
    formats = [(getattr(policy, name), getattr(own, name)) for name in ("storage", "accumulation", "statistics")]
    formats += [(policy.at(cut), own.at(cut)) for cut in CUT_POINTS]
    budgets = [(getattr(policy, name), getattr(own, name)) for name in ("exp", "angles", "circle")]
    choices = [(policy.ties, own.ties, "any"), (policy.compared, own.compared, "unrounded")]
    choices += [(policy.consumers, own.consumers, "unrounded"), (policy.sigmoid, own.sigmoid, "absolute")]
    return (
        any(not allowed.holds(generic) for allowed, generic in formats)
        or any(a.constant > b.constant or a.slope > b.slope for a, b in budgets)
        or any(a == wide != b for a, b, wide in choices)
        or (policy.truncates and not own.truncates)
        or (policy.flushes and not own.flushes)
        or policy.ranks > own.ranks
        or policy.inputs != own.inputs
        or policy.kept != own.kept
    )


def named_is_wider(name: str, dtype: str) -> bool | None:
    """Whether a policy of this name does. None: the policy was a file of the user's, which is not at hand."""
    try:
        return None if ".toml" in name else is_wider(named_policy(name), dtype)
    except InputError:
        return None


@dataclass(frozen=True)
class Used:
    """The policy by which a dtype was judged."""

    name: str
    wider: bool | None
    """Whether it allows more than the generic policy of the dtype. None: it is no policy of refmoe's own."""

    def __str__(self) -> str:
        return f"{self.name}{WIDER if self.wider else UNKNOWN if self.wider is None else ''}"


WIDER, UNKNOWN = " (wider than the dtype's own)", " (not one of refmoe's own)"


def policies_used(results: Results) -> dict[str, Used]:
    """Per dtype the policy by which it was judged."""
    return {
        each.dtype: Used(each.policy, each.dtype in results.wider or named_is_wider(each.policy, each.dtype))
        for each in results.outcomes
    }
