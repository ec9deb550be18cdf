# SPDX-License-Identifier: Apache-2.0
"""The intake of a foreign trace. Everything that can be refused before a value is read is refused here."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from refmoe.arithmetic.formats import OF_DTYPE
from refmoe.errors import InputError
from refmoe.files.safetensors_file import DTYPES, StoredTensor
from refmoe.files.sentences import quoted, shown
from refmoe.spec.config import Config
from refmoe.spec.taps import IDS, LOGPROBS, READ_OUT_TAPS, observable, step_of, tap_names
from refmoe.traces.pieces import LAST_ONLY, by_pieces
from refmoe.traces.trace import Run, Trace
from refmoe.verifier.routing import NO_PADDING
from refmoe.verifier.subject import shape_of

INTEGERS = ("router.experts", IDS)
"""The taps that are ids."""
LAST_POSITION = (1 << 31) - 1
"""The last position for which the exact rotary table is defined."""


@dataclass(frozen=True)
class Contents:
    """The contents of a trace that fits the model and the runs."""

    trace: Trace
    """The trace, where a run with some taps of its last position only is two pieces."""
    runs: tuple[Run, ...]
    """All runs to compute, in order of execution."""
    present: dict[str, frozenset[str]]
    """The taps that the trace has, per run."""
    values: int
    """The number of values in all known taps."""
    tensors: int
    """The number of known taps."""
    missing: tuple[str, ...]
    """Taps, without their layer, that the trace lacks in every run and layer."""
    unknown: tuple[str, ...]
    """Keys of the trace that name no tap."""
    notes: tuple[str, ...]
    """Sentences about runs and taps that the trace holds only in part."""


def take_in(trace: Trace, config: Config, expected: tuple[Run, ...] | None) -> Contents:
    """The contents of a trace.   expected: the runs of the case; None: the trace's own runs

    Raises InputError when runs, tokens, shapes or dtypes do not fit the model and the expected runs.
    """
    runs = _fit_runs(trace, config, expected)
    taps = [*tap_names(config)]
    known = frozenset(observable(config))
    unknown: list[str] = []
    for run in runs:
        names = trace.names(run.run)
        unknown += [_cut_short(f"{run.run}/{name}") for name in names if name not in known]
        for tap in known.intersection(names):
            _fit_tensor(trace, run, tap, config)
    trace, runs = by_pieces(trace, runs, config)
    present = {run.run: known.intersection(trace.names(run.run)) for run in runs}
    shapes = [trace.tensors[f"{run}/{tap}"].shape for run, names in present.items() for tap in names]
    if not shapes:
        raise InputError(f"{trace.path}: holds no tap of this model, such as {taps[0]} or {taps[-1]}")
    held = {step_of(tap) for names in present.values() for tap in names}
    missing = tuple(dict.fromkeys(step_of(tap) for tap in taps if step_of(tap) not in held))
    return Contents(
        trace=trace,
        runs=runs,
        present=present,
        values=sum(map(math.prod, shapes)),
        tensors=len(shapes),
        missing=missing,
        unknown=tuple(unknown),
        notes=tuple([*_gaps(runs, present, taps, missing), *_positions(runs, present)]),
    )


def _gaps(
    runs: tuple[Run, ...], present: dict[str, frozenset[str]], taps: list[str], missing: tuple[str, ...]
) -> list[str]:
    """Sentences about the taps that are in some runs or layers and not in others."""
    said = []
    absent = [run.run for run in runs if run.read and not present[run.run]]
    if absent:
        said.append(f"the trace holds nothing of {', '.join(absent[:5])}{' and more' * (len(absent) > 5)}")
    there = [names for names in present.values() if names]
    wanted = Counter(step_of(tap) for tap in taps if step_of(tap) not in {*missing, *LAST_ONLY})
    held = Counter(step_of(tap) for names in there for tap in names)
    partly = [f"{step} ({held[step]} of {n * len(there)})" for step, n in wanted.items() if held[step] < n * len(there)]
    if partly:
        more = f" and {len(partly) - 5} more" if len(partly) > 5 else ""
        said.append(f"the trace holds some taps only in some runs or layers: {', '.join(partly[:5])}{more}")
    return said


def _positions(runs: tuple[Run, ...], present: dict[str, frozenset[str]]) -> list[str]:
    """Sentences about logits and log-probabilities that the trace has for some positions only."""
    said = []
    for tap in ("logits", LOGPROBS):
        here = sum(len(run.tokens) for run in runs if tap in present[run.run])
        every = sum(len(run.tokens) for run in runs if run.read)
        if 0 < here < every:
            said.append(f"the trace has {tap} of {here} of {every} positions, and only those were judged")
    return said


def _fit_runs(trace: Trace, config: Config, expected: tuple[Run, ...] | None) -> tuple[Run, ...]:
    """The runs to compute. Each run of the trace must be an expected run with the same fields, in the same order."""
    header = trace.header
    for run in header.runs:
        for token in run.tokens:
            if token >= config.vocab:
                raise InputError(
                    f"{trace.path}: run {quoted(run.run)} has token {token}, but one from 0 to {config.vocab - 1} was "
                    "expected, those of the vocabulary"
                )
    if expected is None:
        _consistent(trace)
        return header.runs
    places = {run.run: i for i, run in enumerate(expected)}
    last = -1
    for run in header.runs:
        if run.run not in places:
            raise InputError(
                f"{trace.path}: run {quoted(run.run)} is not one of the case, which has {shown(list(places))}"
            )
        place = places[run.run]
        for name in ("op", "sequence", "tokens", "positions", "past"):
            found, wanted = getattr(run, name), getattr(expected[place], name)
            if found != wanted:
                raise InputError(
                    f"{trace.path}: run {quoted(run.run)} has {name} {_differing(found, wanted)}, but the case has "
                    f"{_differing(wanted, found)}"
                )
        if place < last:
            raise InputError(
                f"{trace.path}: run {quoted(run.run)} comes after {quoted(expected[last].run)}, but the order of the "
                f"case was expected, {shown(list(places))}"
            )
        last = place
    return expected


def _consistent(trace: Trace) -> None:
    """Check that the runs of a trace with its own script can be executed. Raises InputError otherwise."""
    seen: dict[int, int] = {}
    first: dict[int, int] = {}
    for run in trace.header.runs:
        before = seen.get(run.sequence, 0)
        if run.past > before:
            raise InputError(
                f"{trace.path}: run {quoted(run.run)} has past {run.past}, but at most {before}, the tokens of its "
                "sequence so far, was expected"
            )
        if run.positions[-1] > LAST_POSITION:
            raise InputError(
                f"{trace.path}: run {quoted(run.run)} has position {run.positions[-1]}, but one from 0 to "
                f"{LAST_POSITION} was expected"
            )
        start = first.setdefault(run.sequence, run.positions[0] - run.past)
        wanted = tuple(range(start + run.past, start + run.past + len(run.tokens)))
        if start < 0 or run.positions != wanted:
            raise InputError(
                f"{trace.path}: run {quoted(run.run)} has positions {_differing(run.positions, wanted)}, but "
                f"{_differing(wanted, run.positions)} was expected"
            )
        seen[run.sequence] = run.past + len(run.tokens)


def _fit_tensor(trace: Trace, run: Run, tap: str, config: Config) -> None:
    """Check the shape and dtype of one tap. Raises InputError when they do not fit."""
    tensor = trace.tensors[f"{run.run}/{tap}"]
    origin = f"{trace.path}: tensor {quoted(tensor.name)}"
    listed = trace.tensors.get(f"{run.run}/{IDS}") if tap in READ_OUT_TAPS else None
    if listed is not None:
        _fit_list(trace, run, config, listed)
    entries = None if listed is None else listed.shape[-1]
    wanted = shape_of(tap, config, run, entries)
    fits = (wanted, (1, *wanted[1:]), wanted[1:]) if tap in LAST_ONLY else (wanted,)
    if tensor.shape not in fits:
        raise InputError(
            f"{origin} has shape {shown(list(tensor.shape))}, but {list(wanted)} was expected of a model with these "
            f"dimensions and {len(run.tokens)} tokens{padded(tensor.shape, wanted)}"
        )
    dtype = np.dtype(DTYPES[tensor.dtype]) if tensor.dtype in DTYPES else None
    if step_of(tap) in INTEGERS:
        if dtype is None or dtype.kind not in "iu":
            raise InputError(f"{origin} has dtype {tensor.dtype}, but integers were expected")
    elif dtype not in OF_DTYPE:
        raise InputError(f"{origin} has dtype {tensor.dtype}, but one of F64, F32, F16, BF16 was expected")


def _fit_list(trace: Trace, run: Run, config: Config, ids: StoredTensor) -> None:
    """Check the shape of the ids of listed log-probabilities. Raises InputError when it does not fit."""
    values = trace.tensors.get(f"{run.run}/{LOGPROBS}")
    origin = f"{trace.path}: tensor {quoted(ids.name)}"
    if values is None:
        raise InputError(f"{origin} names the entries of {quoted(f'{run.run}/{LOGPROBS}')}, which is not there")
    if not ids.shape or not 1 <= ids.shape[-1] <= config.vocab:
        raise InputError(
            f"{origin} has shape {shown(list(ids.shape))}, but [{len(run.tokens)}, n] was expected, with n from 1 to "
            f"the {config.vocab} entries of the vocabulary"
        )
    if values.shape != ids.shape:
        raise InputError(
            f"{origin} has shape {shown(list(ids.shape))}, but {shown(list(values.shape))} was expected, the shape of "
            f"{quoted(f'{run.run}/{LOGPROBS}')}"
        )


def padded(found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """A clause about rows that are too many; empty where there are none."""
    more = len(found) == len(wanted) > 0 and found[1:] == wanted[1:] and found[0] > wanted[0]
    return f". {NO_PADDING}" if more else ""


def _differing(value: object, other: object) -> str:
    """A field in words. Of a long list only its length, or its first element that differs from the other list."""
    if not isinstance(value, tuple) or not isinstance(other, tuple):
        return shown(value)
    if max(len(value), len(other)) <= 16:
        return str(list(value))
    if len(value) != len(other):
        return f"of {len(value)}"
    place = next(i for i, (mine, its) in enumerate(zip(value, other, strict=True)) if mine != its)
    return f"{value[place]} at index {place}"


def _cut_short(name: str) -> str:
    return name if len(name) <= 200 else f"{name[:180]}... ({len(name)} characters)"
