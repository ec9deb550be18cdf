# SPDX-License-Identifier: Apache-2.0
"""Calls divided into pieces. MODEL-4 says that a call and its pieces compute the same function.

An engine may give some taps for the last position of a call only. Such a call becomes two pieces, and the second one
has these taps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.errors import InputError
from refmoe.files.safetensors_file import StoredTensor
from refmoe.files.sentences import quoted
from refmoe.spec.config import Config
from refmoe.spec.taps import READ_OUT_TAPS, observable, step_of
from refmoe.traces.trace import Run, Trace

BY_HEAD = ("attention.scores", "attention.probs")
"""Taps whose second axis is the token."""
LAST_ONLY = ("logits", *READ_OUT_TAPS)
"""Taps that an engine may give for the last position of a call only."""


def piece(run: Run, start: int, stop: int) -> Run:
    """The tokens [start, stop) of a run, as a run of their own."""
    return replace(
        run, run=f"{run.run}[{start}:{stop}]", op=run.op if not start else "chunk", tokens=run.tokens[start:stop],
        positions=run.positions[start:stop], past=run.past + start,
    )  # fmt: skip


def call_of(run: Run) -> str:
    """The name of the call that a run is, or is a piece of."""
    return re.sub(r"\[\d+:\d+\]$", "", run.run)


def rows_of_tokens(tap: str, array: NDArray[Any], start: int, stop: int, cached: int) -> NDArray[Any]:
    """The rows [start, stop) of a tap, [T, ...] or [H, T, S].   cached: the positions that the last of them sees"""
    if step_of(tap) in BY_HEAD:
        return np.ascontiguousarray(array[:, start:stop, :cached])
    return np.ascontiguousarray(array[start:stop])


def only_last(tap: str, shape: tuple[int, ...], tokens: int) -> bool:
    """Whether an array of this shape is that of the last position: [1, V] of several tokens, or [V]."""
    return tap in LAST_ONLY and (len(shape) == 1 or (len(shape) == 2 and shape[0] == 1 < tokens))


@dataclass(frozen=True)
class Rows:
    """Some rows of a tensor of a trace, cut out where they are asked for."""

    whole: StoredTensor
    shape: tuple[int, ...]
    cut: Callable[[NDArray[Any]], NDArray[Any]]

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def dtype(self) -> str:
        return self.whole.dtype

    def map(self) -> NDArray[Any]:
        return self.cut(self.whole.map())

    def get(self, file: bytes | None = None) -> NDArray[Any]:
        return self.cut(self.whole.get(file))


def by_pieces(trace: Trace, runs: Sequence[Run], config: Config) -> tuple[Trace, tuple[Run, ...]]:
    """The trace and the runs, where each run with taps of the last position only is two pieces.

    runs: the runs to compute, those of the trace among them. The shapes of its taps fit them.
    Raises InputError where a run has the name of such a piece.
    """
    known = frozenset(observable(config))
    pieces: dict[str, tuple[Run, ...]] = {}
    tensors: dict[str, Any] = dict(trace.tensors)
    for run in runs:
        taps, count = known & frozenset(trace.names(run.run)), len(run.tokens)
        last = {tap for tap in taps if only_last(tap, trace.tensors[f"{run.run}/{tap}"].shape, count)}
        if not last:
            continue
        bounds = (0, count - 1, count)[count == 1 :]
        parts = tuple(piece(run, a, b) if count > 1 else run for a, b in pairwise(bounds))
        pieces[run.run] = parts
        for tap in taps:
            whole = tensors.pop(f"{run.run}/{tap}")
            for part, start in zip(parts, bounds, strict=False):
                if tap not in last:
                    tensors[f"{part.run}/{tap}"] = _some_rows(whole, tap, part, start)
                elif part is parts[-1]:
                    tensors[f"{part.run}/{tap}"] = _one_row(whole)
    if not pieces:
        return trace, tuple(runs)
    names = {run.run for run in runs}
    for run in (part for parts in pieces.values() for part in parts if len(parts) > 1):
        if run.run in names:
            raise InputError(f"{trace.path}: run {quoted(run.run)} has the name of a piece of another run")

    def divide(some: Sequence[Run]) -> tuple[Run, ...]:
        return tuple(part for run in some for part in pieces.get(run.run, (run,)))

    return Trace(trace.path, replace(trace.header, runs=divide(trace.header.runs)), tensors), divide(runs)


def _one_row(whole: StoredTensor) -> Rows:
    """The tensor of one position as a tensor of one row."""
    shape = (1, whole.shape[-1])
    return Rows(whole, shape, lambda array: array.reshape(shape))


def _some_rows(whole: StoredTensor, tap: str, part: Run, start: int) -> Rows:
    """The rows of a piece.   start: of the piece in its run"""
    count, cached = len(part.tokens), part.past + len(part.tokens)
    by_head = step_of(tap) in BY_HEAD
    shape = (whole.shape[0], count, cached) if by_head else (count, *whole.shape[1:])
    return Rows(whole, shape, lambda array: rows_of_tokens(tap, array, start, start + count, cached))
