# SPDX-License-Identifier: Apache-2.0
"""Scripts: the calls of a trace. A script is planned first, then executed on the spec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from refmoe.errors import InputError
from refmoe.spec.attention import Cache
from refmoe.spec.model import Caches, Model, embed, forward, run_layers
from refmoe.traces.trace import OPS, Recorder, Run


class Call(NamedTuple):
    """A call of the model on new tokens of one sequence. A decode feeds its tokens one by one."""

    op: str
    sequence: int
    tokens: Sequence[int]
    keep: int | None = None
    """If given, the sequence's cache is first cut to `keep` tokens, as for a request that shares a prefix."""
    read: bool = True
    """Whether anybody reads the outputs. Without it the call only fills the cache."""


class Packed(NamedTuple):
    """Several independent sequences, each with its own prefill. An engine may run them as one packed call."""

    segments: Sequence[Sequence[int]]


AnyCall = Call | Packed | tuple[str, int, Sequence[int]]


def plan(calls: Sequence[AnyCall], vocab: int, start: int = 0) -> tuple[Run, ...]:
    """Name the runs of a script and give each its positions.

    calls: in order of execution.   start: the position of every sequence's first token.
    Runs are named ``prefill``, ``chunk1``, ``chunk2``, ``decode1``, ... With several sequences the suffix
    ``.row{sequence}`` is added. The segments of a packed call are the runs ``packed.seg0``, ``packed.seg1``, ...
    They are prefills of new sequences.
    Raises InputError for a token outside the vocabulary, an empty call, or an operation out of order. Also for a
    call that keeps more tokens than its sequence has, and for a script whose outputs nobody reads.
    """
    parsed = [call if isinstance(call, Packed) else Call(*call) for call in calls]
    sequences = {call.sequence for call in parsed if isinstance(call, Call)}
    suffix = ".row{}" if len(sequences) > 1 else ""
    past: dict[int, int] = {}
    counts: dict[tuple[str, int], int] = {}
    runs: list[Run] = []

    def add(name: str, op: str, sequence: int, tokens: tuple[int, ...], read: bool = True) -> None:
        seen = past.get(sequence, 0)
        positions = tuple(range(start + seen, start + seen + len(tokens)))
        runs.append(Run(run=name, op=op, sequence=sequence, tokens=tokens, positions=positions, past=seen, read=read))
        past[sequence] = seen + len(tokens)

    if not parsed:
        raise InputError("script: there is no call, but at least one was expected")
    for call in parsed:
        if isinstance(call, Packed):
            if any(run.run.startswith("packed.") for run in runs):
                raise InputError("script: there are two packed calls, but at most one was expected")
            if not call.segments:
                raise InputError("script: packed has no segments, but at least one was expected")
            for i, segment in enumerate(call.segments):
                _refuse_tokens(f"segment {i} of packed", segment, vocab)
                add(f"packed.seg{i}", "prefill", max(sequences, default=-1) + 1 + i, tuple(segment))
            continue
        op, sequence, tokens, keep, read = call
        if op not in OPS:
            raise InputError(f"script: operation '{op}' is unknown, expected one of {', '.join((*OPS, 'packed'))}")
        if (op == "prefill") != (sequence not in past):
            raise InputError(f"script: sequence {sequence} must begin with one prefill, and {op} comes out of order")
        if keep is not None:
            if not 1 <= keep <= past.get(sequence, 0):
                raise InputError(
                    f"script: {op} of sequence {sequence} keeps {keep} tokens, "
                    f"but from 1 to the {past.get(sequence, 0)} that it has were expected"
                )
            past[sequence] = keep
        _refuse_tokens(f"{op} of sequence {sequence}", tokens, vocab)
        for piece in [(token,) for token in tokens] if op == "decode" else [tuple(tokens)]:
            number = counts[op, sequence] = counts.get((op, sequence), 0) + 1
            add((op if op == "prefill" else f"{op}{number}") + suffix.format(sequence), op, sequence, piece, read)
    if not any(run.read for run in runs):
        raise InputError("script: no call has outputs that are read, but at least one was expected")
    return tuple(runs)


def _refuse_tokens(what: str, tokens: Sequence[int], vocab: int) -> None:
    if not tokens:
        raise InputError(f"script: {what} has no tokens, but at least one was expected")
    for token in tokens:
        if not 0 <= token < vocab:
            raise InputError(f"script: token {token} is outside the vocabulary of {vocab}")


def execute(ops: Any, model: Model, runs: Sequence[Run], recorder: Recorder) -> None:
    """Run the spec on every run in order, with separate caches for each sequence. `ops` must tap into `recorder`.

    A run whose `past` is less than its sequence has seen begins with the caches cut to `past` tokens.
    Of a run that nobody reads, only the caches are computed.
    Raises InputError when `past` is more than the sequence has seen.
    """
    caches: dict[int, Caches] = {}
    every = range(model.config.layers)
    for run in runs:
        recorder.begin(run)
        before = cut(caches.get(run.sequence), run)
        tokens, positions = ops.integers(run.tokens), ops.integers(run.positions)
        if run.read:
            _, caches[run.sequence] = forward(ops, model, tokens, positions, before)
        else:
            caches[run.sequence] = fill(ops, model, every, embed(ops, model, tokens), positions, before)


def fill(ops: Any, model: Model, layers: range, x: Any, positions: Any, caches: Caches | None) -> Caches:
    """The caches of these layers after a call whose outputs nobody reads, bit for bit as `run_layers` extends them.

    A key or value in the cache of a layer is a function of this token's input of the layer. So the layers before the
    last are computed whole, and of the last one only its keys and values.

    x: [T, D], the input of the first of these layers   positions: integers [T]   returns: one cache for each layer
    """
    split, inner = layers.stop - 1, None if caches is None else caches[:-1]
    x, before = run_layers(ops, model, range(layers.start, split), x, positions, inner)
    last = None if caches is None else caches[-1:]
    return before + run_layers(ops, filling(model), range(split, layers.stop), x, positions, last)[1]


def filling(model: Model) -> Model:
    """The model in whose layers nothing is computed from the cached tokens, and no expert runs.

    A layer's cache is extended before either, so that it is the model's own; its other values are meaningless.
    """
    return replace(model, steps=replace(model.steps, visible=_no_mask, attend=_the_query, moe=_its_input))


def _no_mask(*_: Any) -> Any:
    return None


def _the_query(_ops: Any, q: Any, *_: Any) -> Any:
    """An array of the shape of the context. q: [T, H, d]"""
    return q


def _its_input(_ops: Any, _model: Any, _layer: Any, x: Any) -> Any:
    """An array of the shape of the block's output. x: [T, D]"""
    return x


def cut(caches: Caches | None, run: Run) -> Caches | None:
    """The caches of a run's sequence, cut to the first `run.past` tokens; None for no token."""
    layers = [cut_layer(cache, run) for cache in caches or (None,)]
    return tuple(cache for cache in layers if cache is not None) or None


def cut_layer(cache: Cache | None, run: Run) -> Cache | None:
    """One layer's cache of a run's sequence, cut to the first `run.past` tokens; None for no token.

    Raises InputError when the sequence has seen fewer tokens.
    """
    seen = 0 if cache is None else len(cache.positions)
    if run.past > seen:
        raise InputError(f"run '{run.run}': past is {run.past}, but sequence {run.sequence} has seen {seen} tokens")
    if cache is None or not run.past:
        return None
    return Cache(cache.k[: run.past], cache.v[: run.past], cache.positions[: run.past])
