# SPDX-License-Identifier: Apache-2.0
"""Record a trace from a loaded `transformers.MixtralForCausalLM` by forward hooks.

Hooks do not see the scores, which no module returns. They see the probabilities only with eager attention. They see
the values inside experts only where experts run one by one (experts implementation "eager").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from refmoe.engines.capture.names import HUGGING_FACE, tap_of
from refmoe.engines.capture.patching import replaced
from refmoe.engines.capture.shapes import HEADED
from refmoe.errors import InputError, require
from refmoe.spec.taps import step_of
from refmoe.traces.trace import Header, Recorder, Run

DTYPES = ("float64", "float32", "bfloat16", "float16")


def load_model(folder: Path, dtype: str, attention: str = "eager", experts: str = "eager") -> Any:
    """Load a Hugging Face checkpoint, in evaluation mode.

    dtype: one of `DTYPES`.   attention: ``"eager"``, ``"sdpa"`` or ``"flex_attention"``.
    experts: ``"eager"``, which runs them one by one, ``"batched_mm"`` or ``"grouped_mm"``
    Raises InputError when transformers or torch is missing or the folder does not load.
    """
    torch = require("torch", "engines", "capturing from transformers")
    transformers = require("transformers", "engines", "capturing from transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.MixtralForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation=attention,
            experts_implementation=experts, local_files_only=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder}: transformers cannot load this checkpoint: {str(error).splitlines()[0]}") from None
    return model.eval()


Receive = Callable[[str, NDArray[Any]], None]
"""Called with a tap and its value, in the shape that the module gives it."""


def growing_cache() -> Any:
    """An empty `DynamicCache`. Not made from the configuration: one that drops hidden tokens would also change S."""
    return require("transformers", "engines", "capturing from transformers").DynamicCache()


def capture(
    model: Any,
    runs: Sequence[Run],
    recorder: Recorder,
    new_cache: Callable[[], Any] = growing_cache,
    watching: Callable[[Any, Receive], AbstractContextManager[None]] | None = None,
) -> None:
    """Run a script on the model, with one cache per sequence. The hooks' values go to `recorder`.

    A run whose `past` is less than its sequence has seen begins with the cache cut to that many tokens.

    model: a `MixtralForCausalLM`.   runs: as `refmoe.traces.script.plan` makes them.
    new_cache: makes the cache of a sequence.   watching: `hooks`, or `modules_alone`
    """
    torch = require("torch", "engines", "capturing from transformers")
    caches: dict[int, Any] = {}
    width = head_dim(model)

    def record(tap: str, value: NDArray[Any]) -> None:
        recorder(tap, shaped(tap, value, width))

    with torch.no_grad(), (watching or hooks)(model, record):
        for run in runs:
            recorder.begin(run)
            if run.sequence not in caches:
                caches[run.sequence] = new_cache()
            cache = caches[run.sequence]
            surplus = int(cache.get_seq_length()) - run.past
            if surplus > 0:
                cache.crop(-surplus)  # a negative number removes so many
            model(
                input_ids=torch.tensor([run.tokens]), position_ids=torch.tensor([run.positions]),
                past_key_values=cache, use_cache=True,
            )  # fmt: skip


def header(model: Any, runs: Sequence[Run], case: str | None = None, checkpoint: str | None = None) -> Header:
    """The header of a capture's trace."""
    version = require("transformers", "engines", "capturing from transformers").__version__
    policy = "hf-" + str(model.dtype).removeprefix("torch.")
    return Header(
        runs=tuple(runs),
        case=case,
        checkpoint=checkpoint,
        policy=policy,
        producer={"name": "transformers", "version": version},
    )


def head_dim(model: Any) -> int:
    """The size of a head, from the configuration of transformers."""
    config = model.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@contextmanager
def modules_alone(model: Any, receive: Receive) -> Iterator[None]:
    """While the context lasts, `receive` gets the taps that modules return. No hook is inside a compiled layer."""

    def record(tap: str, value: Any) -> None:
        if value is not None:
            receive(tap, to_numpy(value))

    with module_hooks(model, HUGGING_FACE, record):
        yield


@contextmanager
def hooks(model: Any, receive: Receive) -> Iterator[None]:
    """While the context lasts, `receive` gets every tap of `HUGGING_FACE`, rotated heads and the inside of experts."""

    def record(tap: str, value: Any) -> None:
        if value is not None:
            receive(tap, to_numpy(value))

    with ExitStack() as stack:
        stack.enter_context(module_hooks(model, HUGGING_FACE, record))
        layers = {id(layer.self_attn): f"layers.{i}." for i, layer in enumerate(model.model.layers)}
        stack.enter_context(_rotated(layers, model, record))
        for i, layer in enumerate(model.model.layers):
            stack.enter_context(_expert_internals(layer.mlp.experts, f"layers.{i}.", receive))
        yield


ENDS = (":in", ":out", ":out0", ":out1", ":out2")
"""The ends of names: the input of a module, its output, and the first, second and third of several outputs."""


@contextmanager
def module_hooks(model: Any, names: Mapping[str, str], record: Callable[[str, Any], None]) -> Iterator[None]:
    """While the context lasts, `record` gets inputs and outputs of modules, as tensors.

    names: modules to taps, in the notation of `refmoe.engines.capture.names`
    A call raises InputError when a module gives one output where a name says several, or the reverse.
    """

    def entering(tap: str, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record(tap, args[0] if args else next(iter(kwargs.values()), None))

    def leaving(tap: str, at: int | None, _module: Any, _args: Any, out: Any) -> None:
        several = isinstance(out, tuple | list)
        if several == (at is None) or (at is not None and at >= len(out)):
            found = f"{len(out)} outputs" if several else "one output"
            raise InputError(
                f"capture: the module of {tap} gives {found}, but ':out{'' if at is None else at}' names it"
            )
        record(tap, out if at is None else out[at])

    with ExitStack() as stack:

        def add(handle: Any) -> None:
            stack.callback(handle.remove)

        for name, module in model.named_modules():
            tap = tap_of(names, f"{name}:in")
            if tap:
                add(module.register_forward_pre_hook(partial(entering, tap), with_kwargs=True))
            for at in (None, 0, 1, 2):
                tap = tap_of(names, f"{name}:out{'' if at is None else at}")
                if tap:
                    add(module.register_forward_hook(partial(leaving, tap, at)))
        yield


def shaped(tap: str, array: NDArray[Any], head_dim: int) -> NDArray[Any]:
    """A value in the shape of its tap: without the batch of one, heads on an axis of their own.

    array: [1, T, n], [1, H, T, S] or [T, n], from the module.
    """
    name = step_of(tap)
    if name == "router.experts":
        return array.astype(np.int64)
    if name.startswith(("router.", "expert.")):
        return array
    array = array[0]
    if name in HEADED:
        return array.reshape(len(array), -1, head_dim)
    return array


def to_numpy(value: Any) -> NDArray[Any]:
    """A torch tensor as a NumPy array of the same dtype, copied."""
    value = value.detach().cpu().contiguous()
    if str(value.dtype) == "torch.bfloat16":
        bits: NDArray[Any] = value.view(require("torch", "engines", "a capture").int16).numpy()
        return bits.copy().view(ml_dtypes.bfloat16)
    return np.array(value.numpy())


@contextmanager
def _rotated(layers: dict[int, str], model: Any, record: Callable[[str, Any], None]) -> Iterator[None]:
    """Record rotated queries and keys. A function returns them, not a module, so the function is wrapped."""
    from transformers.models.mixtral import modeling_mixtral

    rotate = modeling_mixtral.apply_rotary_pos_emb
    current = [""]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        q, k = rotate(*args, **kwargs)
        if current[0]:  # else a layer of another model calls
            record(current[0] + "attention.q_rope", q.transpose(1, 2))
            record(current[0] + "attention.k_rope", k.transpose(1, 2))
        return q, k

    def entering(module: Any, _args: Any, _kwargs: Any) -> None:
        current[0] = layers[id(module)]

    def leaving(_module: Any, _args: Any, _out: Any) -> None:
        current[0] = ""

    attention = [layer.self_attn for layer in model.model.layers]
    handles = [module.register_forward_pre_hook(entering, with_kwargs=True) for module in attention]
    handles += [module.register_forward_hook(leaving, always_call=True) for module in attention]
    try:
        with replaced(modeling_mixtral, "apply_rotary_pos_emb", wrapped):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _expert_internals(experts: Any, prefix: str, receive: Receive) -> Iterator[None]:
    """Record gate, up, hidden and unweighted output of each expert call, sorted into the slots of router.experts.

    The engine calls `linear` twice per chosen expert, in ascending order of experts. The rows of a call are the tokens
    of slot 0 in their order, then the tokens of slot 1, and so on.
    """
    torch: Any = require("torch", "engines", "capturing from transformers")
    mode: Any = torch.overrides.TorchFunctionMode

    class Watch(mode):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[tuple[Any, Any]] = []
            self.on = False

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.nn.functional.linear:
                self.calls.append((args[0], result))
            return result

    watch = Watch()

    def entering(_module: Any, _args: Any) -> None:
        watch.calls.clear()
        watch.__enter__()
        watch.on = True

    def leaving(_module: Any, args: Any, out: Any) -> None:
        if watch.on:
            watch.on = False
            watch.__exit__(None, None, None)
        if out is None:
            return  # the call has failed
        chosen = args[1].cpu().numpy()  # [T, k]
        used = np.unique(chosen)
        if len(watch.calls) != 2 * len(used):
            return  # another implementation of the experts
        slots: dict[str, NDArray[Any]] = {}
        for e, (_, gate_up), (hidden, output) in zip(used, watch.calls[::2], watch.calls[1::2], strict=True):
            slot, token = np.nonzero((chosen == e).T)
            gate, up = gate_up.chunk(2, dim=-1)
            for name, value in {"gate": gate, "up": up, "hidden": hidden, "output": output}.items():
                rows = to_numpy(value)
                if name not in slots:
                    slots[name] = np.empty((*chosen.shape, rows.shape[-1]), rows.dtype)
                slots[name][token, slot] = rows
        for name, array in slots.items():
            receive(f"{prefix}expert.{name}", array)

    handles = [
        experts.register_forward_pre_hook(entering),
        experts.register_forward_hook(leaving, always_call=True),  # a mode that stays on would outlive the context
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
