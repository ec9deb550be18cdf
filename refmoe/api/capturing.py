"""Record a live PyTorch Mixtral: forward hooks while a context lasts, calls told apart by their caches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.engines.capture import transformers as engine
from refmoe.errors import InputError
from refmoe.traces.held import HeldTensor, held_trace
from refmoe.traces.trace import Header, Run, Trace


@contextmanager
def capture(module: Any, names: Mapping[str, str] | None = None) -> Iterator[Trace]:
    """Record every call of a PyTorch module while the context lasts.

    module: a `MixtralForCausalLM` of transformers 5, on any device, or with `names` another module
    names: the names of modules to taps, such as ``{"model.layers.{i}.mlp.gate:out0": "router.logits"}``; ``:in`` is the
        input of a module, ``:out`` its output, ``:out1`` the second of several
    Prefill, chunks and decode steps are told apart by the cache that a call is given. A call with a batch records a
    sequence for each row. Afterwards the module is as it was before.
    Raises InputError when a call cannot be recorded: padding, inputs without token ids, a cache from elsewhere.

    >>> import refmoe
    >>> with refmoe.capture(model) as trace:                              # doctest: +SKIP
    ...     out = model(input_ids, use_cache=True)
    ...     model(next_ids, past_key_values=out.past_key_values)
    >>> refmoe.verify(trace, refmoe.load("path/to/checkpoint"))           # doctest: +SKIP
    """
    whole = names is None
    calls = Calls(engine.header(module, ()) if whole else Header((), policy=policy_of(module)), engine.head_dim(module))
    handles = [
        module.register_forward_pre_hook(calls.enter, with_kwargs=True),
        module.register_forward_hook(calls.leave, with_kwargs=True),
    ]
    taps = engine.hooks(module, calls) if names is None else engine.module_hooks(module, names, calls.receive)
    try:
        with taps:
            yield calls.trace
    finally:
        for handle in handles:
            handle.remove()


def policy_of(module: Any) -> str:
    """The generic policy of a module's dtype."""
    return str(next(module.parameters()).dtype).removeprefix("torch.")


@dataclass
class Sequences:
    """The sequences that share a cache, one for each row of a batch."""

    first: int
    batch: int
    past: int = 0
    cache: Any = None
    """Held, so that its identity is not given to another cache."""


@dataclass
class Calls:
    """The calls made so far. It receives the taps of a call, and adds the call's runs to the trace."""

    header: Header
    head_dim: int
    trace: Trace = field(init=False)
    sequences: list[Sequences] = field(default_factory=list)
    counts: dict[tuple[str, int], int] = field(default_factory=dict)
    current: Sequences | None = None
    tokens: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        self.trace = held_trace(self.header, {}, "capture")
        self.taps: dict[str, NDArray[Any]] = {}

    def __call__(self, tap: str, value: NDArray[Any]) -> None:
        """Keep a tap of the current call, in the shape that the module gives it."""
        self.taps[tap] = value

    def receive(self, tap: str, value: Any) -> None:
        """Keep a tap that is still a tensor."""
        if value is not None:
            self(tap, engine.to_numpy(value))

    def enter(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The beginning of a call: find its sequences."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise InputError("capture: a call has no input_ids, but token ids were expected")
        mask = kwargs.get("attention_mask")
        if mask is not None and getattr(mask, "ndim", 0) == 2 and not bool(mask.all()):
            raise InputError(
                "capture: a call has padding in its attention_mask, but sequences of equal length were expected"
            )
        self.tokens = engine.to_numpy(ids).astype(np.int64).reshape(-1, ids.shape[-1])
        self.current, self.taps = self._sequences(kwargs.get("past_key_values"), len(self.tokens)), {}

    def _sequences(self, cache: Any, batch: int) -> Sequences:
        length = 0 if cache is None else int(cache.get_seq_length())
        known = None if cache is None else next((each for each in self.sequences if each.cache is cache), None)
        if known is None:
            if length:
                raise InputError(f"capture: a call has a cache of {length} tokens from before the capture began")
            known = Sequences(sum(each.batch for each in self.sequences), batch, cache=cache)
            self.sequences.append(known)
        if known.batch != batch:
            raise InputError(f"capture: a call has {batch} rows, but its cache was made by a call with {known.batch}")
        known.past = length
        return known

    def leave(self, _module: Any, _args: Any, _kwargs: Any, out: Any) -> None:
        """The end of a call: its runs and their taps go into the trace."""
        assert self.current is not None
        assert self.tokens is not None
        if self.current.cache is None:
            self.current.cache = getattr(out, "past_key_values", None)
        runs = [self._run(row, tokens) for row, tokens in enumerate(self.tokens.tolist())]
        tensors: dict[str, Any] = self.trace.tensors  # type: ignore[assignment]
        for tap, value in self.taps.items():
            for run, array in zip(runs, engine.by_row(tap, value, len(runs)), strict=True):
                key = f"{run.run}/{tap}"
                tensors[key] = HeldTensor(key, engine.shaped(tap, array, self.head_dim))
        object.__setattr__(self.trace, "header", replace(self.trace.header, runs=(*self.trace.header.runs, *runs)))
        self.trace.__dict__.pop("_by_run", None)

    def _run(self, row: int, tokens: list[int]) -> Run:
        assert self.current is not None
        sequence, past = self.current.first + row, self.current.past
        op = "prefill" if not past else "decode" if len(tokens) == 1 else "chunk"
        number = self.counts[op, sequence] = self.counts.get((op, sequence), 0) + 1
        name = op if op == "prefill" else f"{op}{number}"
        suffix = f".row{sequence}" if sequence or self.current.batch > 1 else ""
        positions = tuple(range(past, past + len(tokens)))
        return Run(run=name + suffix, op=op, sequence=sequence, tokens=tuple(tokens), positions=positions, past=past)
