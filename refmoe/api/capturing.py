# SPDX-License-Identifier: Apache-2.0
"""Record a live PyTorch module: forward hooks while a context lasts."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.api.arguments import kind, name_of, shown
from refmoe.api.arrays import libraries_of, to_numpy
from refmoe.api.calls import Call, CallReader
from refmoe.api.values import HEADS, Part, divided
from refmoe.engines.capture import transformers as engine
from refmoe.engines.capture.names import tap_of
from refmoe.errors import InputError
from refmoe.spec.taps import LAYER_TAPS, MODEL_TAPS, step_of
from refmoe.traces.held import HeldTensor, held_trace
from refmoe.traces.pieces import BY_HEAD
from refmoe.traces.trace import Header, Run, Trace


def capture(module: Any, names: Mapping[str, str] | None = None, *, taps: str = "*") -> AbstractContextManager[Trace]:
    """Record every call of a PyTorch module while the context lasts.

    module: a `MixtralForCausalLM` of transformers 5, on any device, or with `names` another module
    names: modules to taps, such as ``{"layers.{i}.ffn_norm:out": "moe_norm", "output:out": "logits"}``. ``{i}`` is the
        layer. ``:in`` is the input of a module, ``:out`` its output, ``:out1`` the second of several
    taps: shell patterns of the taps to keep, separated by commas, such as ``logits,layers.0.*``

    Prefill, chunks and decode steps are told apart by the cache that a call is given, or by its positions. A batch is a
    sequence for each row, and padding on the left is left out. Afterwards the module is as it was before.
    The probabilities of attention are recorded where attention is eager, the inside of experts where they run one by
    one (``attn_implementation="eager"``, ``experts_implementation="eager"``).
    Raises InputError for another module without names, and when a call cannot be recorded: inputs without token ids, a
    cache from before the context, a beam search.

    >>> import refmoe, torch
    >>> table = torch.nn.Embedding(97, 48)
    >>> with refmoe.capture(table, {":out": "embedding"}) as trace:
    ...     _ = table(torch.tensor([[1, 31, 41]]))
    >>> trace["prefill", "embedding"].shape
    (3, 48)

    With a model of transformers:

    >>> with refmoe.capture(model) as trace:                              # doctest: +SKIP
    ...     model.generate(input_ids, max_new_tokens=8)
    >>> refmoe.verify(trace, refmoe.load("path/to/checkpoint"))           # doctest: +SKIP
    """
    if "torch" not in libraries_of(module) or not callable(getattr(module, "named_modules", None)):
        raise InputError(f"capture: is given {kind(module)}, but a module of PyTorch was expected")
    name_of(taps, "taps", "patterns of taps such as 'logits,layers.0.*'")
    if names is not None:
        _refuse_names(names, module)
    elif "MixtralForCausalLM" not in {base.__name__ for base in type(module).__mro__}:
        raise InputError(
            f"capture: is given {kind(module)}, but a MixtralForCausalLM, or names of its modules for the taps, were "
            "expected"
        )
    return _recording(module, names, taps.split(","))


@contextmanager
def _recording(module: Any, names: Mapping[str, str] | None, patterns: list[str]) -> Iterator[Trace]:
    recorder = CallRecorder(_header(module, names), _head_dim(module), patterns, CallReader(module))
    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(recorder.enter, with_kwargs=True, prepend=True).remove)
        if names is None:
            stack.enter_context(engine.hooks(module, recorder.receive))
        else:
            stack.enter_context(engine.module_hooks(module, names, recorder.receive))
        stack.callback(module.register_forward_hook(recorder.leave, with_kwargs=True).remove)
        yield recorder.trace


def _refuse_names(names: object, module: Any) -> None:
    """Raises InputError for a table with a name that no module has, or with a tap that there is not."""
    if not isinstance(names, Mapping) or not names:
        raise InputError(f"names: is {shown(names)}, but a table from modules to taps was expected")
    for name, tap in names.items():
        if tap not in (*LAYER_TAPS, *MODEL_TAPS):
            raise InputError(f"names[{shown(name)}] is {shown(tap)}, but a tap without its layer was expected")
        if (tap in LAYER_TAPS) != (isinstance(name, str) and "{i}" in name):
            raise InputError(
                f"names[{shown(name)}] is {shown(tap)}, but '{{i}}' was expected in the names of modules of a layer, "
                "and only there"
            )
    there = [f"{name}{end}" for name, _ in module.named_modules() for end in engine.ENDS]
    for name, tap in names.items():
        if not any(tap_of({name: tap}, each) for each in there):
            raise InputError(f"names: no module is named by {shown(name)}, such as 'layers.{{i}}.ffn_norm:out'")


def _header(module: Any, names: Mapping[str, str] | None) -> Header:
    if names is None:
        return engine.header(module, ())
    dtypes = [str(each.dtype).removeprefix("torch.") for each in module.parameters() if each.is_floating_point()]
    return Header((), policy=dtypes[0] if dtypes else "float32", producer={"name": kind(module)})


def _head_dim(module: Any) -> int | None:
    """The size of a head, if the module's configuration tells it."""
    for config in (getattr(module, "config", None), getattr(module, "args", None)):
        size = getattr(config, "head_dim", None)
        if isinstance(size, int) and size > 0:
            return size
        if all(isinstance(getattr(config, name, None), int) for name in ("hidden_size", "num_attention_heads")):
            return engine.head_dim(module) if config is getattr(module, "config", None) else None
    return None


class CallRecorder:
    """Receives the taps of a call, and adds the call's runs to a trace when it ends."""

    def __init__(self, header: Header, head_dim: int | None, patterns: list[str], calls: CallReader) -> None:
        """head_dim: the size of a head; None: it is not known   patterns: of the taps to keep"""
        self.head_dim, self.patterns, self.calls = head_dim, patterns, calls
        self.trace = held_trace(header, {}, "capture")
        self._call: Call | None = None
        self._taps: dict[str, NDArray[Any]] = {}

    def receive(self, tap: str, value: Any) -> None:
        """Keep a copy of a tap of the current call, in the shape that the module gives it."""
        wanted = any(fnmatch.fnmatchcase(tap, pattern) for pattern in self.patterns)
        if value is not None and self._call is not None and wanted:
            self._taps[tap] = np.array(to_numpy(value, f"capture: {tap}"))

    def enter(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The beginning of a call."""
        self._call, self._taps = None, {}  # an earlier call may have failed
        self._call = self.calls.begin(args, kwargs)

    def leave(self, _module: Any, _args: Any, _kwargs: Any, out: Any) -> None:
        """The end of a call: its runs and their taps go into the trace."""
        call, self._call = self._call, None
        if call is None:
            return
        runs = self.calls.end(call, out)
        parts = [part for tap, value in self._taps.items() for part in self._parts(tap, value, call, runs)]
        pieces, arrays = divided([run for run in runs if run is not None], parts)
        extend(self.trace, pieces, arrays)
        self._taps = {}

    def _parts(self, tap: str, value: NDArray[Any], call: Call, runs: list[Run | None]) -> list[Part]:
        """The parts of a tap, one for each sequence of the batch that has tokens in this call."""
        rows = rows_of(tap, value, call.batch, call.count)
        if rows is None or (tap == "logits" and not call.last_logits):
            return []
        parts = []
        for run, array, pads in zip(runs, rows, call.pads, strict=True):
            if run is None:
                continue
            if step_of(tap) in BY_HEAD:
                array = columns(array, call.past + call.count)[:, call.count - len(run.tokens) :, pads:]
                count = array.shape[1]
            else:
                array = array[max(len(array) - len(run.tokens), 0) :]
                count = len(array)
            if step_of(tap) in HEADS and array.ndim == 2 and self.head_dim and array.shape[1] % self.head_dim == 0:
                array = array.reshape(len(array), -1, self.head_dim)
            stop = len(run.tokens)
            parts.append(Part(run=run.run, tap=tap, start=stop - count, stop=stop, array=array))
        return parts


def rows_of(tap: str, value: NDArray[Any], batch: int, count: int) -> list[NDArray[Any]] | None:
    """The values of each sequence of a batch: [B, T, ...], [B T, ...] or [B, H, T, S]. None: there are no such.

    count: the number of tokens, T. Logits may be of the last ones only.
    """
    rank = len((LAYER_TAPS | MODEL_TAPS)[step_of(tap)].split())
    if value.ndim == rank + 1 and value.shape[0] == batch:
        return [*value]
    if step_of(tap) in BY_HEAD:
        return [value] if batch == 1 and value.ndim == rank else None
    if value.ndim == rank and step_of(tap) in HEADS and value.shape[:2] == (batch, count):
        return [*value]
    if value.ndim and value.shape[0] == batch * count:
        return [*value.reshape(batch, count, *value.shape[1:])]
    return [value] if batch == 1 and tap == "logits" and value.ndim == rank and len(value) <= count else None


def columns(array: NDArray[Any], width: int) -> NDArray[Any]:
    """Scores or probabilities, [H, T, S], with this many columns.

    The unused part of a fixed cache is left out. Tokens that a cache of a window has dropped have zeros.
    """
    lacking = width - array.shape[2]
    if lacking > 0:
        return np.pad(array, ((0, 0), (0, 0), (lacking, 0)))
    return array[:, :, :width]


def extend(trace: Trace, runs: tuple[Run, ...], arrays: dict[str, NDArray[Any]]) -> None:
    """Add runs to a trace in memory, which its owner may already hold."""
    tensors: dict[str, Any] = trace.tensors
    tensors.update({key: HeldTensor(key, array) for key, array in arrays.items()})
    object.__setattr__(trace, "header", replace(trace.header, runs=(*trace.header.runs, *runs)))
    trace.__dict__.pop("_by_run", None)
