# SPDX-License-Identifier: Apache-2.0
"""The calls of a live PyTorch module: their tokens, and the sequences that they continue."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.api.arguments import kind
from refmoe.api.arrays import libraries_of, to_numpy
from refmoe.errors import InputError
from refmoe.traces.trace import Run

IDS = ("input_ids", "tokens", "idx", "ids")
"""The names that modules give to token ids. Without one of them, the first argument has them."""
POSITIONS = ("position_ids", "input_pos", "positions", "cache_position", "start_pos")
"""The names that modules give to the positions of the new tokens, or to the first of them."""
CACHE = "past_key_values"


@dataclass
class Sequences:
    """The sequences that share a cache, one for each row of a batch."""

    first: int
    """The number of the first of them."""
    batch: int
    pads: list[int]
    """The tokens of padding on the left, for each."""
    cache: Any = None
    """Held, so that its identity is not given to another cache."""
    seen: int = 0
    """The number of tokens so far, padding included."""
    keys: list[tuple[int, Any]] = field(default_factory=list)
    """The cached keys of the first layer, [B, K, t, d], as each call left them, and the position of the first."""


@dataclass(frozen=True)
class Call:
    """A call that has begun."""

    sequences: Sequences
    ids: NDArray[Any]
    """[B, T]"""
    positions: NDArray[Any]
    """[B, T]"""
    past: int
    """The number of tokens before, padding included."""
    last_logits: bool
    """Whether the logits are those of the last tokens, or of all."""

    @property
    def batch(self) -> int:
        return len(self.ids)

    @property
    def count(self) -> int:
        return int(self.ids.shape[1])

    @property
    def pads(self) -> list[int]:
        return self.sequences.pads


class CallReader:
    """Reads what a module is called with, and finds the sequences that a call continues."""

    def __init__(self, module: Any) -> None:
        self.signature = inspect.signature(module.forward)
        self.sequences: list[Sequences] = []
        self.counts: dict[tuple[str, int], int] = {}

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """A call with these arguments. Raises InputError when it cannot be recorded."""
        given = self._named(args, kwargs)
        ids = _ids(given, args)
        cache, batch = given.get(CACHE), len(ids)
        starts = _positions(given, ids.shape)
        pads = _pads(given.get("attention_mask"), ids.shape)
        if cache is not None and hasattr(cache, "get_seq_length"):
            found, past = self._of_cache(cache, batch, pads)
        else:
            found, past = self._of_positions(starts, batch, pads)
        default = np.broadcast_to(np.arange(past, past + ids.shape[1]), ids.shape)
        keep = given.get("logits_to_keep", 0)
        return Call(
            sequences=found,
            ids=ids,
            positions=default if starts is None else starts,
            past=past,
            last_logits=isinstance(keep, int),
        )

    def end(self, call: Call, out: Any) -> list[Run | None]:
        """The runs of a call, one for each row; None for a row that has only padding."""
        sequences = call.sequences
        if sequences.cache is None:
            sequences.cache = _cache_of(out)
        sequences.seen = call.past + call.count
        _remember(sequences, call.count)
        return [self._run(call, row) for row in range(call.batch)]

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name; those of ``**kwargs`` as well."""
        try:
            bound = dict(self.signature.bind(*args, **kwargs).arguments)
        except TypeError:
            return kwargs  # the call itself will fail
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                bound |= bound.pop(name, {})
        return bound

    def _of_cache(self, cache: Any, batch: int, pads: list[int]) -> tuple[Sequences, int]:
        length = int(cache.get_seq_length())
        known = next((each for each in self.sequences if each.cache is cache), None)
        if known is not None and not length:
            known.cache = None  # emptied: other sequences begin
            known = None
        if known is None:
            if length:
                raise InputError(f"capture: a call has a cache of {length} tokens that no recorded call has made")
            return self._new(batch, pads, cache), 0
        if known.batch != batch:
            raise InputError(f"capture: a call has {batch} rows, but its cache was made by a call with {known.batch}")
        if length > known.seen:
            raise InputError(
                f"capture: a call has a cache of {length} tokens, but the recorded calls have made {known.seen} of them"
            )
        _refuse_moved_rows(known, length)
        return known, length

    def _of_positions(self, starts: NDArray[Any] | None, batch: int, pads: list[int]) -> tuple[Sequences, int]:
        """The last sequences, where the positions continue them and the module has no cache to tell. Else new ones."""
        first = 0 if starts is None else int(starts[0, 0])
        last = self.sequences[-1] if self.sequences else None
        if CACHE in self.signature.parameters or not first:
            return self._new(batch, pads), 0
        if last is None or last.batch != batch or first > last.seen:
            raise InputError(
                f"capture: a call of {batch} rows begins at position {first}, but no recorded call has made the tokens "
                "before it"
            )
        return last, first

    def _new(self, batch: int, pads: list[int], cache: Any = None) -> Sequences:
        first = sum(each.batch for each in self.sequences)
        self.sequences.append(Sequences(first=first, batch=batch, pads=pads, cache=cache))
        return self.sequences[-1]

    def _run(self, call: Call, row: int) -> Run | None:
        pads = call.pads[row]
        skipped = min(max(pads - call.past, 0), call.count)
        if skipped == call.count:
            return None
        past, sequence = max(call.past - pads, 0), call.sequences.first + row
        tokens = tuple(int(token) for token in call.ids[row, skipped:])
        op = "prefill" if not past else "decode" if len(tokens) == 1 else "chunk"
        number = self.counts[op, sequence] = self.counts.get((op, sequence), 0) + 1
        name = op if op == "prefill" else f"{op}{number}"
        return Run(
            run=f"{name}.row{sequence}" if sequence or call.batch > 1 else name,
            op=op,
            sequence=sequence,
            tokens=tokens,
            positions=tuple(int(position) for position in call.positions[row, skipped:]),
            past=past,
        )


def _ids(given: dict[str, Any], args: tuple[Any, ...]) -> NDArray[Any]:
    """The token ids of a call, [B, T]. Raises InputError when it has none."""
    found = next((given[name] for name in IDS if given.get(name) is not None), None)
    if found is None and args:
        found = args[0]
    if found is None or "torch" not in libraries_of(found):
        raise InputError(f"capture: a call has no token ids, such as input_ids, but {kind(found)}")
    ids = to_numpy(found, "capture: token ids")
    if ids.dtype != np.int64 or ids.ndim not in (1, 2) or not ids.size:
        raise InputError(f"capture: a call has {ids.dtype} of shape {[*ids.shape]}, but token ids [B, T] were expected")
    return np.array(np.atleast_2d(ids))


def _positions(given: dict[str, Any], shape: tuple[int, ...]) -> NDArray[Any] | None:
    """The positions of a call, [B, T]; None: it has none. Raises InputError for another shape."""
    found = next((given[name] for name in POSITIONS if given.get(name) is not None), None)
    if found is None:
        return None
    if isinstance(found, int):
        return np.broadcast_to(np.arange(found, found + shape[1]), shape)
    array = np.atleast_2d(to_numpy(found, "capture: positions"))
    if array.dtype != np.int64 or array.shape not in (shape, (1, shape[1])):
        raise InputError(f"capture: a call has positions of shape {[*array.shape]}, but {[*shape]} was expected")
    return np.array(np.broadcast_to(array, shape))


def _pads(mask: Any, shape: tuple[int, ...]) -> list[int]:
    """The tokens of padding on the left of each row, cached ones included, from an attention mask of [B, S].

    Raises InputError for a mask that hides other tokens.
    """
    if mask is None or "torch" not in libraries_of(mask) or mask.ndim != 2 or len(mask) != shape[0]:
        return [0] * shape[0]
    shown = mask.detach().cpu().numpy() != 0
    pads = [int(np.argmax(row)) if row.any() else len(row) for row in shown]
    for row, count in zip(shown, pads, strict=True):
        if not row[count:].all():
            raise InputError(
                "capture: an attention_mask hides a token after one that it shows, but padding on the left was expected"
            )
    return pads


def _cache_of(out: Any) -> Any:
    """The cache that a call returns, if it returns one."""
    parts = [getattr(out, CACHE, None), *(out if isinstance(out, tuple) else ())]
    return next((part for part in parts if hasattr(part, "get_seq_length")), None)


def _first_keys(cache: Any) -> Any:
    """The keys that a cache of transformers holds of the first layer, [B, K, S, d]; None where there are none."""
    layers = getattr(cache, "layers", None)
    keys = getattr(layers[0], "keys", None) if layers else None
    return keys if getattr(keys, "ndim", 0) == 4 else None


def _remember(sequences: Sequences, count: int) -> None:
    """Keep the first layer's keys of the last tokens, to see at the next call whether rows have changed places."""
    keys = _first_keys(sequences.cache)
    if keys is not None:
        stop = min(sequences.seen, keys.shape[2])
        start = max(stop - count, 0)
        sequences.keys = [(at, block) for at, block in sequences.keys if at < sequences.seen - (stop - start)]
        sequences.keys.append((sequences.seen - (stop - start), keys[:, :, start:stop].detach().clone()))


def _refuse_moved_rows(sequences: Sequences, length: int) -> None:
    """Raises InputError when the rows of a cache are not those that the recorded calls have made."""
    keys = _first_keys(sequences.cache)
    if keys is None:
        return
    last = keys[:, :, min(length, keys.shape[2]) - 1]
    for at, block in reversed(sequences.keys):
        if at < length <= at + block.shape[2]:
            if not bool((block[:, :, length - 1 - at] == last).all()):
                raise InputError(
                    "capture: the rows of a cache have changed between two calls, as in a beam search, but the rows of "
                    "the recorded calls were expected"
                )
            return
