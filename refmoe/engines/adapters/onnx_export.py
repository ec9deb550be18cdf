# SPDX-License-Identifier: Apache-2.0
"""transformers' Mixtral as an ONNX graph whose outputs are the taps and the new cache.

`torch.onnx.export(dynamo=True)` writes it, with experts as one batched product of gathered weights ("batched_mm").
`torch.export` refuses the usual loop over the chosen experts, because that loop depends on data.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from refmoe.engines.capture.names import HUGGING_FACE, tap_of
from refmoe.engines.capture.patching import replaced
from refmoe.engines.capture.transformers import load_model
from refmoe.errors import require
from refmoe.spec.taps import step_of

EXPORTING = ("torch==2.13.0", "transformers==5.23.0", "onnx==1.23.2", "onnxscript==0.7.2")
"""The packages that write the graph."""

Record = Callable[[str, Any], None]


class Graph(NamedTuple):
    """The outputs of an exported graph. Its inputs are tokens [1, T], positions [1, T] and the cache."""

    taps: tuple[str, ...]
    """The first outputs. The outputs after them are the cache with the new tokens."""
    cache: tuple[int, int, int]
    """The number of tensors of the cache, then K and d. Keys and values of each layer alternate, each [1, K, S, d]."""


def export(checkpoint: Path, dtype: str, wanted: Collection[str], path: Path) -> Graph:
    """Write a graph for any number of new and of cached tokens.   wanted: taps without layer"""
    torch: Any = require("torch", "onnx", "exporting to ONNX")
    require("onnxscript", "onnx", "exporting to ONNX")
    model = load_model(checkpoint, dtype)
    model.set_experts_implementation("batched_mm")
    config = model.config
    taps: list[str] = []
    # torch takes sizes 0 and 1 for constants, and merges two inputs that are one tensor: the example avoids both
    tokens, any_size = torch.tensor([[1, 2, 3]]), torch.export.Dim.DYNAMIC
    sizes = (1, config.num_key_value_heads, 4, config.head_dim)
    past = [torch.zeros(sizes, dtype=model.dtype) for _ in range(2 * config.num_hidden_layers)]
    with torch.no_grad():
        program = torch.onnx.export(
            with_taps(model, wanted, taps), (tokens, tokens + 3, past), dynamo=True, verbose=False,
            dynamic_shapes=({1: any_size}, {1: any_size}, [{2: any_size}] * len(past)),
        )  # fmt: skip
    program.save(path)
    return Graph(tuple(taps), (len(past), config.num_key_value_heads, config.head_dim))


def with_taps(model: Any, wanted: Collection[str], taps: list[str]) -> Any:
    """A module from tokens, positions and cache to taps and new cache. It writes the names of the taps to `taps`."""
    torch: Any = require("torch", "onnx", "exporting to ONNX")
    transformers: Any = require("transformers", "onnx", "exporting to ONNX")

    class WithTaps(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Any, positions: Any, past: list[Any]) -> list[Any]:
            found: dict[str, Any] = {}
            cache = transformers.DynamicCache()
            for i in range(len(past) // 2):
                cache.update(past[2 * i], past[2 * i + 1], i)

            def record(tap: str, value: Any) -> None:
                if step_of(tap) in wanted:
                    found[tap] = value

            with watched(self.model, record):
                self.model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True)
            taps[:] = found
            return [*found.values(), *(part for layer in cache.layers for part in (layer.keys, layer.values))]

    return WithTaps().eval()


@contextmanager
def watched(model: Any, record: Record) -> Iterator[None]:
    """While the context lasts, hooks and two wrapped functions record taps, as tensors of the graph being exported."""
    moe: Any = require("transformers.integrations.moe", "onnx", "exporting to ONNX")
    modeling: Any = require("transformers.models.mixtral.modeling_mixtral", "onnx", "exporting to ONNX")
    rotate, linear, k = modeling.apply_rotary_pos_emb, moe._batched_linear, model.config.num_experts_per_tok
    rotations, products = count(), count()

    def rotated(*args: Any, **kwargs: Any) -> Any:
        made, i = rotate(*args, **kwargs), next(rotations)
        for name, heads in zip("qk", made, strict=True):
            record(f"layers.{i}.attention.{name}_rope", heads.transpose(1, 2))
        return made

    def batched(x: Any, *args: Any, **kwargs: Any) -> Any:
        """Record one of the two products of a layer. Rows are in the order of slots.   x: [T k, n]"""
        made, (i, second) = linear(x, *args, **kwargs), divmod(next(products), 2)
        gate, up = made.chunk(2, dim=-1)
        for name, rows in ({"hidden": x, "output": made} if second else {"gate": gate, "up": up}).items():
            record(f"layers.{i}.expert.{name}", rows.reshape(1, -1, k, rows.shape[-1]))
        return made

    def entering(tap: str, _module: Any, args: Any) -> None:
        record(tap, args[0])

    def leaving(tap: str, at: int | None, _module: Any, _args: Any, out: Any) -> None:
        record(tap, out if at is None else out[at])

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if tap := tap_of(HUGGING_FACE, f"{name}:in"):
                stack.callback(module.register_forward_pre_hook(partial(entering, tap)).remove)
            for at in (None, 0, 1, 2):
                if tap := tap_of(HUGGING_FACE, f"{name}:out{'' if at is None else at}"):
                    stack.callback(module.register_forward_hook(partial(leaving, tap, at)).remove)
        stack.enter_context(replaced(modeling, "apply_rotary_pos_emb", rotated))
        stack.enter_context(replaced(moe, "_batched_linear", batched))
        yield
