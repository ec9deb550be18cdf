"""Values of an engine, as its author has them, put into a trace."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.api.arrays import to_numpy
from refmoe.errors import InputError
from refmoe.spec.config import Config
from refmoe.spec.taps import step_of, tap_names
from refmoe.traces.held import held_trace
from refmoe.traces.trace import Header, Run, Trace
from refmoe.verifier.subject import shape_of

KEY = re.compile(r"^(?:(?P<run>.+)/)?(?P<tap>[^/\[]+)(?:\[(?P<rows>[^\]]*)\])?$")
ROWS = re.compile(r"^(-?\d{1,9})?(:)?(-?\d{1,9})?$", re.ASCII)
BY_HEAD = ("attention.scores", "attention.probs")
"""Taps whose second axis is the token."""


@dataclass(frozen=True)
class Part:
    """An array for some tokens of a run."""

    run: str
    tap: str
    start: int
    stop: int
    array: NDArray[Any]


def to_trace(values: Mapping[Any, Any], runs: tuple[Run, ...], config: Config, policy: str, model: str) -> Trace:
    """The trace of values in memory.

    values: the name of a tap to its array. With several runs the key is ``run/tap`` or ``(run, tap)``.
        ``logits[-1]`` and ``layers.0.residual[2:5]`` are arrays of some tokens only. Logits of shape [V] or [1, V] are
        those of the last token.
    runs: the calls that the engine made
    Raises InputError for an unknown run or tap, and for an array whose shape does not fit.

    Where values are of some tokens only, a run is divided into runs of consecutive tokens. MODEL-4 says that a call
    and its pieces compute the same function.
    """
    if not values:
        raise InputError("values: there are none, but at least one array was expected, such as values['logits']")
    parts = [part_of(key, value, runs, config) for key, value in values.items()]
    pieces, arrays = [], {}
    for run in runs:
        mine = [part for part in parts if part.run == run.run]
        bounds = sorted({0, len(run.tokens), *(part.start for part in mine), *(part.stop for part in mine)})
        for start, stop in pairwise(bounds):
            piece = run if len(bounds) == 2 else piece_of(run, start, stop)
            pieces.append(piece)
            for part in mine:
                if part.start <= start and stop <= part.stop:
                    arrays[f"{piece.run}/{part.tap}"] = rows(part, start, stop, piece)
    return held_trace(
        Header(tuple(pieces), policy=policy, producer={"name": "values in memory"}), arrays, f"values for {model}"
    )


def piece_of(run: Run, start: int, stop: int) -> Run:
    """Some consecutive tokens of a run, as a run of their own."""
    return replace(
        run, run=f"{run.run}[{start}:{stop}]", op=run.op if not start else "chunk", tokens=run.tokens[start:stop],
        positions=run.positions[start:stop], past=run.past + start,
    )  # fmt: skip


def rows(part: Part, start: int, stop: int, piece: Run) -> NDArray[Any]:
    """The rows of some tokens of a part."""
    first, last = start - part.start, stop - part.start
    if step_of(part.tap) in BY_HEAD:
        return np.ascontiguousarray(part.array[:, first:last, : piece.past + len(piece.tokens)])
    return np.ascontiguousarray(part.array[first:last])


def part_of(key: Any, value: Any, runs: tuple[Run, ...], config: Config) -> Part:
    """The part that a key and its value are. Raises InputError when they do not fit the runs."""
    text = "/".join(key) if isinstance(key, tuple) else key
    match = KEY.match(text) if isinstance(text, str) else None
    if match is None:
        raise InputError(f"values: the key {key!r} is none of tap, run/tap, (run, tap) and tap[token]")
    run = named_run(match["run"], runs, text)
    tap = match["tap"]
    if tap not in {*tap_names(config)}:
        raise InputError(f"values['{text}']: '{tap}' is no tap of this model, such as logits or layers.0.residual")
    array = to_numpy(value, f"values['{text}']")
    start, stop = token_range(match["rows"], len(run.tokens), text)
    wanted = shape_of(tap, config, run)
    if tap == "logits" and match["rows"] is None and len(run.tokens) > 1 and array.size == config.vocab:
        start, array = len(run.tokens) - 1, array.reshape(1, -1)
    if step_of(tap) in BY_HEAD:
        wanted = (wanted[0], stop - start, wanted[2])
    else:
        wanted = (stop - start, *wanted[1:])
        if array.ndim == len(wanted) + 1 and array.shape[0] == 1:
            array = array[0]  # a batch of one
        if array.shape == wanted[1:] and stop - start == 1:
            array = array[None]
    if array.shape != wanted:
        raise InputError(
            f"values['{text}'] has shape {list(array.shape)}, but {list(wanted)} was expected for {stop - start} tokens"
        )
    return Part(run.run, tap, start, stop, array)


def named_run(name: str | None, runs: tuple[Run, ...], key: str) -> Run:
    """The run of this name; without a name the only one. Raises InputError when it is not clear which."""
    if name is None and len(runs) == 1:
        return runs[0]
    listed = ", ".join(run.run for run in runs[:8]) + (", ..." if len(runs) > 8 else "")
    if name is None:
        raise InputError(f"values['{key}']: there are several runs ({listed}), so 'run/{key}' was expected as the key")
    for run in runs:
        if run.run == name:
            return run
    raise InputError(f"values['{key}']: run '{name}' is unknown, expected one of {listed}")


def token_range(text: str | None, count: int, key: str) -> tuple[int, int]:
    """The tokens that ``[-1]`` or ``[2:5]`` names, of so many. Raises InputError when there are none."""
    if text is None:
        return 0, count
    match = ROWS.match(text)
    if match and (match[1] or match[2]):
        first = int(match[1]) if match[1] else 0
        last = (int(match[3]) if match[3] else count) if match[2] else (first + 1 or count)
        start, stop, _ = slice(first, last).indices(count)
        if start < stop:
            return start, stop
    raise InputError(f"values['{key}']: '[{text}]' names none of the {count} tokens; [-1] or [2:5] was expected")


def read_values(path: Path) -> Mapping[str, Any] | None:
    """The arrays of a ``.npz`` or ``.pt`` file; None for a file of another kind, which is a trace.

    Neither is unpickled. Raises InputError when the file cannot be read that way.
    """
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path}: not a readable .npz file without pickled objects: {error}") from None
    if path.suffix in (".pt", ".pth"):
        return flat(_weights_only(path), path)
    return None


def _weights_only(path: Path) -> Any:
    from refmoe.errors import require

    torch: Any = require("torch", "engines", "reading a .pt file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path}: torch cannot read it as tensors alone: {str(error).splitlines()[0]}") from None


def flat(content: Any, path: Path) -> dict[str, Any]:
    """The tensors of a dictionary, or of a dictionary per run."""
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds {type(content).__name__}, but a dictionary of tensors by tap was expected")
    found: dict[str, Any] = {}
    for name, value in content.items():
        inner: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, Mapping) else [("", value)]
        found |= {f"{name}/{tap}" if tap else str(name): each for tap, each in inner}
    return found
