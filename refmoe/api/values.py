# SPDX-License-Identifier: Apache-2.0
"""Values of an engine, as its author has them, put into a trace."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from numpy.typing import NDArray

from refmoe.api.arguments import kind, shown
from refmoe.api.arrays import to_numpy
from refmoe.errors import InputError
from refmoe.files.sentences import quoted
from refmoe.spec.config import Config
from refmoe.spec.taps import READ_OUT_TAPS, observable, step_of, tap_names
from refmoe.traces.held import HeldTensor, held_trace
from refmoe.traces.pieces import BY_HEAD, LAST_ONLY, piece, rows_of_tokens
from refmoe.traces.trace import Header, Run, Trace
from refmoe.verifier.intake import INTEGERS, padded
from refmoe.verifier.subject import shape_of

KEY = re.compile(r"(?:(?P<run>.+)/)?(?P<tap>[^/\[]+)(?:\[(?P<rows>[^\]]*)\])?", re.DOTALL)
TOKEN = re.compile(r"-?\d{1,9}", re.ASCII)
TOKENS = re.compile(r"(-?\d{1,9})?:(-?\d{1,9})?", re.ASCII)
HEADS = ("attention.q", "attention.k", "attention.v", "attention.q_rope", "attention.k_rope", "attention.context")
"""Taps with an axis of heads. An engine may have all heads of a token in one row."""


@dataclass(frozen=True)
class Part:
    """An array for the tokens [start, stop) of a run, in the shape of its tap."""

    run: str
    tap: str
    start: int
    stop: int
    array: NDArray[Any]


@dataclass(frozen=True)
class Key:
    """A key of the values: the name of a run, a tap, and the tokens in brackets; the first and the last may be None."""

    text: str
    run: str | None
    tap: str
    rows: str | None

    def refuse(self, found: str) -> InputError:
        """The error about the array of this key."""
        return InputError(f"values[{quoted(self.text)}]{found}")


def to_trace(values: Mapping[Any, Any], runs: tuple[Run, ...], config: Config) -> Trace:
    """The trace of values in memory.

    values: the name of a tap to its array. With several runs the key is ``run/tap`` or ``(run, tap)``, or the values
        of a run are a dictionary of their own. ``logits[-1]`` and ``layers.0.residual[2:5]`` are arrays of some tokens
        only. Logits of shape [V] or [1, V] are those of the last token. Arrays of a batch are split into its sequences.
    runs: the calls that the engine made
    Raises InputError for an unknown run or tap, and for an array whose shape does not fit.
    """
    listed = [*_flat(values)]
    if not listed:
        raise InputError("values: there are none, but at least one array was expected, such as values['logits']")
    parts = [part for text, value in listed for part in parts_of(text, value, runs, config)]
    pieces, arrays = divided(runs, parts)
    return held_trace(Header(pieces, producer={"name": "an engine"}), arrays, "values in memory")


def _flat(values: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The keys as text, with the names of runs, and the arrays. Raises InputError for a key of another type."""
    for key, value in values.items():
        parts = key if isinstance(key, tuple) else (key,)
        if not parts or not all(isinstance(part, str) for part in parts):
            raise InputError(f"values: the key {shown(key)} is none of tap, run/tap, (run, tap) and tap[token]")
        text = "/".join(parts)
        if not isinstance(value, Mapping):
            yield text, value
            continue
        for tap, each in value.items():
            if not isinstance(tap, str):
                raise InputError(f"values[{quoted(text)}]: the key {shown(tap)} is no text, but a tap was expected")
            yield f"{text}/{tap}", each


def divided(runs: Sequence[Run], parts: Sequence[Part]) -> tuple[tuple[Run, ...], dict[str, NDArray[Any]]]:
    """The runs, divided where a part begins or ends, and the arrays of each piece as ``run/tap``.

    MODEL-4 says that a call and its pieces compute the same function.
    Raises InputError when two parts hold the same token of the same tap.
    """
    pieces: list[Run] = []
    arrays: dict[str, NDArray[Any]] = {}
    for run in runs:
        mine = [part for part in parts if part.run == run.run]
        bounds = sorted({0, len(run.tokens), *(part.start for part in mine), *(part.stop for part in mine)})
        for start, stop in pairwise(bounds):
            each = run if len(bounds) == 2 else piece(run, start, stop)
            pieces.append(each)
            for part in mine:
                key = f"{each.run}/{part.tap}"
                if part.start <= start and stop <= part.stop:
                    if key in arrays:
                        raise InputError(f"values: {run.run}/{part.tap} of token {start} is there twice, expected once")
                    first, last, cached = start - part.start, stop - part.start, each.past + len(each.tokens)
                    arrays[key] = rows_of_tokens(part.tap, part.array, first, last, cached)
    return tuple(pieces), arrays


def parts_of(text: str, value: Any, runs: Sequence[Run], config: Config) -> list[Part]:
    """The parts that a key and its array are: one, or for a batch one for each sequence.

    Raises InputError when they do not fit the runs.
    """
    match = KEY.fullmatch(text)
    if match is None:
        raise InputError(f"values: the key {quoted(text)} is none of tap, run/tap, (run, tap) and tap[token]")
    key = Key(text=text, run=match["run"], tap=match["tap"], rows=match["rows"])
    targets = named_runs(key, runs)
    if key.tap not in {*observable(config)}:
        raise key.refuse(f": {quoted(key.tap)} is no tap of this model, such as logits or layers.0.residual")
    array = to_numpy(value, f"values[{quoted(text)}]")
    _refuse_dtype(key, array)
    if len(targets) == 1:
        return [_part(key, array, targets[0], config)]
    counts = {(len(run.tokens), run.past) for run in targets}
    if len(counts) > 1:
        raise key.refuse(
            f": the sequences have different lengths, so a key for each was expected, such as "
            f"'{targets[0].run}/{key.tap}'"
        )
    rows = _sequences(key, array, targets, config)
    return [_part(key, row, run, config) for row, run in zip(rows, targets, strict=True)]


def _refuse_dtype(key: Key, array: NDArray[Any]) -> None:
    """Raises InputError for integers where real numbers belong, and the reverse."""
    wanted = "integers" if step_of(key.tap) in INTEGERS else "floating-point numbers"
    if (array.dtype.kind == "i") != (wanted == "integers"):
        raise key.refuse(f" has dtype {array.dtype}, but {wanted} were expected")


def named_runs(key: Key, runs: Sequence[Run]) -> list[Run]:
    """The run that a key names, or the same call of several sequences. Raises InputError when it is not clear which."""
    exact = [run for run in runs if run.run == key.run]
    if exact:
        return exact
    calls = {re.sub(r"\.row\d+$", "", run.run) for run in runs}
    if key.run in calls or (key.run is None and len(calls) == 1):
        call = next(iter(calls)) if key.run is None else key.run
        return [run for run in runs if re.sub(r"\.row\d+$", "", run.run) == call]
    listed = ", ".join(run.run for run in runs[:8]) + (", ..." if len(runs) > 8 else "")
    if key.run is None:
        raise key.refuse(f": there are several runs ({listed}), so 'run/{key.tap}' was expected as the key")
    raise key.refuse(f": run {quoted(key.run)} is unknown, expected one of {listed}")


def _sequences(key: Key, array: NDArray[Any], targets: Sequence[Run], config: Config) -> list[NDArray[Any]]:
    """The arrays of each sequence of a batch: [B, T, ...], [B, H, T, S], [B T, ...], or without T for one token."""
    batch, count = len(targets), len(targets[0].tokens)
    start, stop = token_range(key, count)
    rank = len(shape_of(key.tap, config, targets[0]))
    tokens = 1 if key.tap in LAST_ONLY and array.shape[:1] == (batch,) else stop - start
    if array.ndim >= rank and array.shape[0] == batch and (array.ndim > rank or array.shape[1] == tokens):
        return [*array]
    if array.ndim and array.shape[0] == batch * tokens and step_of(key.tap) not in BY_HEAD:
        return [*array.reshape(batch, tokens, *array.shape[1:])]
    raise key.refuse(
        f" has shape {list(array.shape)}, but {batch} sequences of {stop - start} tokens were expected, "
        f"[{batch}, {stop - start}, ...]"
    )


def _part(key: Key, array: NDArray[Any], run: Run, config: Config) -> Part:
    """The part of one run. Raises InputError for a shape that does not fit."""
    count = len(run.tokens)
    start, stop = token_range(key, count)
    last_only = [(count - 1, count)] if key.tap in LAST_ONLY and key.rows is None else []
    candidates = [array]
    while candidates[-1].ndim > 1 and candidates[-1].shape[0] == 1:
        candidates.append(candidates[-1][0])  # a batch of one
    for tokens in ((start, stop), *last_only):
        for each in candidates:
            found = fitted(each, key.tap, run, tokens, config)
            if found is not None:
                return Part(run=run.run, tap=key.tap, start=tokens[0], stop=tokens[1], array=found)
    wanted = _wanted(key.tap, run, (start, stop), config)
    raise key.refuse(
        f" has shape {[*array.shape]}, but {[*wanted]} was expected for {stop - start} tokens"
        f"{padded(array.shape, wanted)}"
    )


def _wanted(
    tap: str, run: Run, tokens: tuple[int, int], config: Config, entries: int | None = None
) -> tuple[int, ...]:  # fmt: skip
    """The shape of a tap for the tokens [start, stop) of a run.   entries: as in `shape_of`"""
    shape, count = shape_of(tap, config, run, entries), tokens[1] - tokens[0]
    return (shape[0], count, shape[2]) if step_of(tap) in BY_HEAD else (count, *shape[1:])


def fitted(
    array: NDArray[Any], tap: str, run: Run, tokens: tuple[int, int], config: Config
) -> NDArray[Any] | None:  # fmt: skip
    """An array in the shape of its tap: with the axis of one token, and heads on an axis of their own. None: it cannot.

    tokens: the tokens [start, stop) of the run that the array is of
    """
    # a list of log-probabilities has any number of entries, which intake holds against that of their ids
    listed = array.shape[-1] if tap in READ_OUT_TAPS and array.ndim else None
    wanted = _wanted(tap, run, tokens, config, listed)
    if array.shape == wanted:
        return array
    flat = (wanted[0], wanted[1] * wanted[2]) if step_of(tap) in HEADS else wanted
    one = [wanted[1:], flat[1:]] if wanted[0] == 1 and step_of(tap) not in BY_HEAD else []
    return array.reshape(wanted) if array.shape in (flat, *one) else None


def fit_heads(trace: Trace, config: Config) -> None:
    """Give arrays in memory that have all heads of a token in one row an axis of heads, where the sizes fit."""
    for run in trace.runs:
        for tap in trace.names(run.run):
            tensor: Any = trace.tensors[f"{run.run}/{tap}"]
            if isinstance(tensor, HeldTensor) and tap in {*tap_names(config)} and step_of(tap) in HEADS:
                array = fitted(tensor.array, tap, run, (0, len(run.tokens)), config)
                if array is not None:
                    trace.tensors[f"{run.run}/{tap}"] = HeldTensor(tensor.name, array)  # type: ignore[assignment]


def token_range(key: Key, count: int) -> tuple[int, int]:
    """The tokens that ``[-1]`` or ``[2:5]`` names, of so many. Raises InputError when there are none."""
    if key.rows is None:
        return 0, count
    if TOKEN.fullmatch(key.rows):
        first = int(key.rows)
        wanted = slice(first, first + 1 or count)
    elif match := TOKENS.fullmatch(key.rows):
        wanted = slice(int(match[1] or 0), int(match[2]) if match[2] else None)
    else:
        raise key.refuse(f": '[{key.rows}]' names no tokens, but one such as [-1] or some such as [2:5] were expected")
    start, stop, _ = wanted.indices(count)
    if start >= stop:
        raise key.refuse(f": '[{key.rows}]' names none of the {count} tokens; [-1] or [2:5] was expected")
    return start, stop


def mapping(values: object) -> Mapping[Any, Any]:
    """The values as a mapping. Raises InputError for another type."""
    if isinstance(values, Mapping):
        return values
    raise InputError(
        f"values: is {kind(values)}, but a dictionary of arrays, a Trace, or the path of a file was expected"
    )
