"""Run scripts: the calls that a trace is made of, planned first and then executed on the spec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from refmoe.errors import InputError
from refmoe.spec.model import Caches, Model, forward
from refmoe.trace import OPS, Recorder, Run

Call = tuple[str, int, Sequence[int]]
"""An operation, the sequence it continues and its tokens. A decode feeds its tokens one by one."""


def plan(calls: Sequence[Call], vocab: int, start: int = 0) -> tuple[Run, ...]:
    """Name the runs of a script and give each its positions.

    calls: in order of execution.   start: the position of every sequence's first token.
    Runs are ``prefill``, ``chunk1``, ``chunk2``, ``decode1``, ...; when there are several sequences the
    suffix ``.row{sequence}`` is added.
    Raises InputError for a token outside the vocabulary, an empty call, or an operation out of order.
    """
    several = len({sequence for _, sequence, _ in calls}) > 1
    past: dict[int, int] = {}
    counts: dict[tuple[str, int], int] = {}
    runs: list[Run] = []

    def add(op: str, sequence: int, tokens: tuple[int, ...]) -> None:
        number = counts[op, sequence] = counts.get((op, sequence), 0) + 1
        seen = past.get(sequence, 0)
        name = (op if op == "prefill" else f"{op}{number}") + (f".row{sequence}" if several else "")
        positions = tuple(range(start + seen, start + seen + len(tokens)))
        runs.append(Run(name, op, sequence, tokens, positions, seen))
        past[sequence] = seen + len(tokens)

    for op, sequence, tokens in calls:
        if op not in OPS:
            raise InputError(f"script: operation '{op}' is unknown, expected one of {', '.join(OPS)}")
        if (op == "prefill") != (sequence not in past):
            raise InputError(f"script: sequence {sequence} must begin with one prefill, and {op} comes out of order")
        if not tokens:
            raise InputError(f"script: {op} of sequence {sequence} has no tokens, but at least one was expected")
        for token in tokens:
            if not 0 <= token < vocab:
                raise InputError(f"script: token {token} is outside the vocabulary of {vocab}")
        for piece in [(token,) for token in tokens] if op == "decode" else [tuple(tokens)]:
            add(op, sequence, piece)
    return tuple(runs)


def execute(ops: Any, model: Model, runs: Sequence[Run], recorder: Recorder) -> None:
    """Run the spec on every run in order, a set of caches per sequence; `ops` must tap into `recorder`."""
    caches: dict[int, Caches | None] = {}
    for run in runs:
        recorder.run = run.run
        tokens, positions = ops.integers(run.tokens), ops.integers(run.positions)
        _, caches[run.sequence] = forward(ops, model, tokens, positions, caches.get(run.sequence))
