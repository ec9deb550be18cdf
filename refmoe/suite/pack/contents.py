# SPDX-License-Identifier: Apache-2.0
"""The files of a case in a pack, in memory. `PACK.md` defines their layout.

The centre of an interval is the golden value, whose bits depend on no machine. Radii are in bytes, an eighth of a power
of two apart. So the files have the same bytes wherever they are made.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import save

from refmoe.arithmetic.enclosure.array import OWN
from refmoe.checkpoints.names import named_weights, untied
from refmoe.checkpoints.weight import BFLOAT16
from refmoe.checkpoints.write import hf_config, hf_tensors
from refmoe.spec.taps import step_of, tap_names
from refmoe.suite.case import Case
from refmoe.suite.manifest import trace_path
from refmoe.suite.pack.codes import encode
from refmoe.suite.pack.legal import DTYPES, SLOTTED, Legal, legal
from refmoe.traces.trace import Run, read_trace

FORMAT = "1"
"""The version of the layout. Readers refuse others."""
CONFIG, INDEX, VALUES, WEIGHTS = FILES = ("config.json", "case.json", "values.bin", "model.safetensors")
"""The files of a case."""
WORD = 4
"""Every array begins at a multiple of this many bytes."""
DIGITS = 2.0**-50
"""More than the relative error of the distance from a centre to an end."""


@dataclass(frozen=True)
class Judged:
    """A tap of a run in a pack."""

    run: Run
    tap: str
    shape: tuple[int, ...]
    data: bytes
    """The centres as float32, then the codes of each dtype; of a choice of experts the states of each dtype."""
    bases: tuple[int, ...]
    """The base of the codes of each dtype; none for a choice of experts."""
    judged: tuple[int, ...]
    """The number of values that are judged in each dtype; none for a choice of experts."""


def taps_of(case: Case) -> list[Judged]:
    """All taps of all runs of a case, in order of computation."""
    golden = read_trace(trace_path(case.folder))
    found = [legal(case, dtype) for dtype in DTYPES]
    return [
        choice(run, tap, [each.experts[run.run, tap] for each in found])
        if step_of(tap) == "router.experts"
        else values(run, tap, centre_of(golden, run, tap), found)
        for run in case.runs()
        for tap in tap_names(case.config)
    ]


def centre_of(golden: Any, run: Run, tap: str) -> Any:
    """The golden values as float32. The slots of a token are in ascending order of expert ids."""
    exact = np.asarray(golden.get(run.run, tap), np.float64)
    if step_of(tap) in SLOTTED:
        ids = np.asarray(golden.get(run.run, f"{tap.split('.')[0]}.{tap.split('.')[1]}.router.experts"))
        order = np.argsort(ids, axis=-1, kind="stable")
        exact = np.take_along_axis(exact, order.reshape(*order.shape, *[1] * (exact.ndim - 2)), axis=1)
    with np.errstate(over="ignore"):
        return exact.astype(np.float32)


def values(run: Run, tap: str, centre: Any, found: list[Legal]) -> Judged:
    """A tap of real numbers.   centre: float32, in the shape of the tap"""
    parts, bases, judged = [centre.astype("<f4").tobytes()], [], []
    wide = centre.astype(np.float64)
    for each in found:
        low, high = each.low[run.run, tap], each.high[run.run, tap]
        with np.errstate(invalid="ignore"):
            radius = np.maximum(high - wide, wide - low)
            radius = np.where(radius > 0, radius * (1 + DIGITS) + OWN * np.abs(wide), radius)
        radius = np.where(np.isfinite(radius), radius, np.nan).reshape(-1)
        base, codes = encode(radius)
        parts.append(codes.tobytes())
        bases.append(base)
        judged.append(int((~np.isnan(radius)).sum()))
    return Judged(run=run, tap=tap, shape=centre.shape, data=b"".join(parts), bases=tuple(bases), judged=tuple(judged))


def choice(run: Run, tap: str, states: list[Any]) -> Judged:
    """A choice of experts.   states: per dtype integers [T, E]"""
    data = b"".join(each.astype(np.uint8).tobytes() for each in states)
    return Judged(run=run, tap=tap, shape=states[0].shape, data=data, bases=(), judged=())


def case_files(case: Case, taps: list[Judged], left_out: Collection[str] = ()) -> dict[str, bytes]:
    """The files of a case, by name.   taps: all of the case   left_out: steps whose taps are left out"""
    kept = [each for each in taps if step_of(each.tap) not in left_out]
    index: dict[str, Any] = {"format": FORMAT, "case": case.name, "why": case.why, "dtypes": DTYPES, "runs": []}
    data = bytearray()
    entries: dict[str, dict[str, Any]] = {run.run: {} for run in case.runs()}
    for each in kept:
        entry: dict[str, Any] = {"at": len(data), "shape": each.shape}
        if each.bases:
            entry["base"] = each.bases
            size = int(np.prod(each.shape))
            entry |= {"judged": each.judged} if set(each.judged) != {size} else {}
        entries[each.run.run][each.tap] = entry
        data += each.data + bytes(-len(each.data) % WORD)
    for run in case.runs():
        facts = {
            "run": run.run, "op": run.op, "sequence": run.sequence, "past": run.past, "first": run.positions[0],
            "tokens": run.tokens, "taps": entries[run.run],
        }  # fmt: skip
        index["runs"].append(facts)
    config = json.dumps(hf_config(case.config, "bfloat16"), indent=1) + "\n"
    text = compact(index) + "\n"
    return {CONFIG: config.encode(), INDEX: text.encode(), VALUES: bytes(data), WEIGHTS: weights(case)}


def compact(index: Mapping[str, Any]) -> str:
    """The index as JSON, with a line for each run and each tap."""
    return json.dumps(index, separators=(",", ":")).replace('{"run":', '\n{"run":').replace(',"layers.', ',\n"layers.')


def weights(case: Case) -> bytes:
    """The weights as a safetensors file of bfloat16, which holds every value of the weight formula."""
    tensors: dict[str, Any] = {}
    for part in hf_tensors(case.config, untied(named_weights(case.checkpoint().parameters)), BFLOAT16, fused=False):
        tensors |= part
    return save(tensors, {"format": "pt"})
