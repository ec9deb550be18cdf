# SPDX-License-Identifier: Apache-2.0
"""keras-hub's Mixtral on a CPU, with torch or JAX beneath. Its layers and the operations that they call are wrapped.

A slot of keras-hub's cache is a position, so that no sequence can start above 0. It knows no head_dim of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from refmoe.engines.adapter import Arrays, Skipped, refuse_shifted
from refmoe.engines.capture.patching import replaced
from refmoe.engines.environment import needed
from refmoe.engines.options import TORCH_THREADS, Option
from refmoe.engines.protocol import ABILITIES, DTYPES, TAPS
from refmoe.files.json_file import read_json
from refmoe.files.scratch import Scratch
from refmoe.spec.taps import step_of
from refmoe.traces.trace import Recorder, Run

BACKENDS = {"torch": {}, "jax": {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}}
"""Per backend of Keras the variables that it needs: JAX has float64 only where it is allowed."""
POLICIES = {"float32": "hf-float32", **{dtype: f"keras-hub-{dtype}" for dtype in ("float64", "bfloat16", "float16")}}
WIDE = ("router.logits", "router.logits.accumulation", "logits", "logits.accumulation")
ON_JAX = {"float64": "+".join(["keras-hub-float64", *(f"{cut}=float64" for cut in WIDE)])}
"""Where JAX needs another policy: its products of matrices stay float64."""
DEFAULTS = {"output_router_logits": False}
"""The keys of the published config.json that keras-hub insists on."""


class Adapter:
    """A `MixtralCausalLM` of keras-hub."""

    name = "keras-hub"
    dtypes = DTYPES
    taps = TAPS
    abilities = ABILITIES
    options = MappingProxyType({
        "backend": Option("the backend of Keras", (*BACKENDS,)),
        "threads": TORCH_THREADS,
    })  # fmt: skip
    requirements = ("torch==2.13.0", "jax==0.10.2", "keras-hub==0.32.0")

    def __init__(self, backend: str = "torch", threads: str = "1") -> None:
        os.environ.update(BACKENDS[backend], KERAS_BACKEND=backend)
        self.keras: Any = needed("keras", "keras_hub")
        self.engine: Any = needed("keras_hub", "keras_hub")
        self.policies: Mapping[str, str] = {**POLICIES, **(ON_JAX if backend == "jax" else {})}
        if backend == "torch":
            torch: Any = needed("torch", "keras_hub")
            torch.set_num_threads(int(threads))
            torch.set_grad_enabled(False)
        self.version = f"{version('keras-hub')} (keras {version('keras')}, {backend} {version(backend)})"

    def load(self, checkpoint: Path, dtype: str) -> None:
        """Load the checkpoint. Raises Skipped for a head_dim that keras-hub does not know."""
        values = read_json(checkpoint / "config.json").values
        derived = values["hidden_size"] // values["num_attention_heads"]
        if values["head_dim"] != derived:
            raise Skipped(f"keras-hub knows no head_dim but dim / heads = {derived}; it is {values['head_dim']}")
        self.dtype = dtype
        self.cache_shape = (1, values["num_hidden_layers"], 2, values["num_key_value_heads"], derived)
        self.keras.backend.clear_session(free_memory=False)  # else it takes seconds
        with Scratch("keras-hub") as scratch:
            (scratch.path / "config.json").write_text(json.dumps({**DEFAULTS, **values}), encoding="utf-8")
            (scratch.path / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
            backbone = self.engine.models.MixtralBackbone.from_preset(str(scratch.path), dtype=dtype)
        self.model = self.engine.models.MixtralCausalLM(backbone=backbone, preprocessor=None, dtype=dtype)

    def run(self, runs: Sequence[Run], taps: Collection[str]) -> Arrays:
        """Run each call with the cache of its sequence. Raises Skipped for a position that is not its slot."""
        ops = self.keras.ops
        for run in runs:
            refuse_shifted("keras-hub", run)
        batch, layers, pair, heads, width = self.cache_shape
        longest = max(run.past + len(run.tokens) for run in runs)
        empty = ops.zeros((batch, layers, pair, longest, heads, width), dtype=self.dtype)
        caches: dict[int, Any] = {}
        watch = Watch(self.keras, self.model.backbone, frozenset(taps))
        with watch.wrapped():
            for run in runs:
                watch.recorder.begin(run)
                watch.cached = run.past + len(run.tokens)
                tokens = ops.convert_to_tensor(np.array([run.tokens], np.int32))
                made = self.model.call_with_cache(tokens, caches.get(run.sequence, empty), run.past)
                caches[run.sequence] = made[2]
        return watch.recorder.arrays


See = Callable[[tuple[Any, ...], dict[str, Any], Any], None]
"""Called with the arguments of a call and its result."""


class Watched:
    """A module of operations, some of which are watched."""

    def __init__(self, module: Any, watches: Mapping[str, See]) -> None:
        self._module, self._watches = module, watches

    def __getattr__(self, name: str) -> Any:
        operation, see = getattr(self._module, name), self._watches.get(name)
        return operation if see is None else _seen(operation, see)


class Watch:
    """Records the taps of a model while it runs."""

    def __init__(self, keras: Any, backbone: Any, wanted: Collection[str]) -> None:
        """wanted: taps without layer"""
        self.ops, self.backbone, self.wanted, self.recorder = keras.ops, backbone, wanted, Recorder()
        self.layer = ""
        """The prefix of the taps of the layer that runs now."""
        self.cached = 0
        """The slots of the cache that hold a token when the call ends."""
        self.chosen: NDArray[Any] = np.zeros((0, 0), np.int64)
        """The experts of the layer that runs now, [T, k]."""
        self.rotated, self.projected = cycle(("q_rope", "k_rope")), cycle(("gate", "up"))

    @contextmanager
    def wrapped(self) -> Iterator[None]:
        """While the context lasts, every tap is recorded."""
        decoder: Any = needed("keras_hub.src.models.mixtral.mixtral_decoder", "keras_hub")
        attention: Any = needed("keras_hub.src.models.mixtral.mixtral_attention", "keras_hub")
        router = Watched(self.ops, {"einsum": self._experts, "top_k": self._choice, "sum": self._routing})
        inner = Watched(self.ops, {"einsum": self._attention, "multiply": self._scores})
        with ExitStack() as stack:
            for layer, see in self._layers():
                stack.enter_context(replaced(layer, "call", _seen(layer.call, see)))
            for i, block in enumerate(self.backbone.transformer_layers):
                stack.enter_context(replaced(block, "call", self._in_layer(f"layers.{i}.", block.call)))
            stack.enter_context(replaced(decoder, "ops", router))
            stack.enter_context(replaced(attention, "ops", inner))
            yield

    def _layers(self) -> Iterator[tuple[Any, See]]:
        """Layers of keras-hub, and what is to be recorded of each."""
        yield self.backbone.token_embedding, self._embedding
        yield self.backbone.layer_norm, lambda _, __, made: self._record("final_norm", made[0])
        for block in self.backbone.transformer_layers:
            attention, moe = block._self_attention_layer, block._sparse_moe_block
            yield block._self_attention_layernorm, self._out("attention_norm")
            yield attention.query_dense, self._out("attention.q")
            yield attention.key_dense, self._out("attention.k")
            yield attention.value_dense, self._out("attention.v")
            yield attention.rotary_embedding_layer, self._rotation
            yield attention.output_dense, self._out("attention.output", of="attention.context")
            yield block._feedforward_layernorm, self._out("moe_norm", of="attention_residual")
            yield moe._sparse_feedforward_gate_dense, lambda _, __, made: self._at("router.logits", made)
            yield moe, lambda _, __, made: self._at("moe.output", made[0][0])

    def _out(self, tap: str, of: str | None = None) -> See:
        """Record the result of a layer, [1, T, ...].   of: the tap that its argument is"""

        def see(args: tuple[Any, ...], _: dict[str, Any], made: Any) -> None:
            if of is not None:
                self._at(of, args[0][0])
            self._at(tap, made[0])

        return see

    def _in_layer(self, layer: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call of a decoder layer, which gives its output and its cache."""

        def called(*args: Any, **kwargs: Any) -> Any:
            self.layer = layer
            made = call(*args, **kwargs)
            self._at("residual", made[0][0])
            return made

        return called

    def _embedding(self, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> None:
        """One layer embeds, and in reverse makes logits."""
        reverse = kwargs.get("reverse", args[1] if len(args) > 1 else False)
        self._record("logits" if reverse else "embedding", made[0])

    def _rotation(self, _: tuple[Any, ...], __: dict[str, Any], made: Any) -> None:
        self._at(f"attention.{next(self.rotated)}", made[0])

    def _scores(self, _: tuple[Any, ...], __: dict[str, Any], made: Any) -> None:
        """made: [1, H, T, slots]"""
        self._at("attention.scores", made[0, :, :, : self.cached])

    def _attention(self, args: tuple[Any, ...], _: dict[str, Any], __: Any) -> None:
        """The product of probabilities and values.   args: the equation, [1, H, T, slots], [1, slots, H, d]"""
        if args[0] == "buqk,bkuh->bquh":
            self._at("attention.probs", args[1][0, :, :, : self.cached])

    def _choice(self, _: tuple[Any, ...], __: dict[str, Any], made: Any) -> None:
        """made: probabilities and experts, [T, k]"""
        self.chosen = self._array(made[1]).astype(np.int64)
        if "router.experts" in self.wanted:
            self.recorder(f"{self.layer}router.experts", self.chosen)

    def _routing(self, args: tuple[Any, ...], _: dict[str, Any], __: Any) -> None:
        """The sum that spreads a token's weights over all experts.   args: [T, k, E], one weight in each row"""
        if len(args[0].shape) == 3 and len(args[0].shape) > len(self.chosen.shape) and "router.weights" in self.wanted:
            spread = self._array(args[0])
            if spread.shape[:2] == self.chosen.shape:
                weights = np.take_along_axis(spread, self.chosen[:, :, None], axis=2)[:, :, 0]
                self.recorder(f"{self.layer}router.weights", weights)

    def _experts(self, args: tuple[Any, ...], _: dict[str, Any], made: Any) -> None:
        """Products with the matrices of all experts.   args: the equation, and two factors.   made: [E, T, n]"""
        if args[0] == "th,ehm->etm":
            self._slots(f"expert.{next(self.projected)}", made)
        elif args[0] == "eti,eih->eth":
            self._slots("expert.hidden", args[1])
            self._slots("expert.output", made)

    def _slots(self, step: str, value: Any) -> None:
        """Record the rows of chosen experts alone.   value: [E, T, n]"""
        if step in self.wanted:
            rows = np.arange(len(self.chosen))[:, None]
            self.recorder(f"{self.layer}{step}", self._array(value)[self.chosen, rows])

    def _at(self, step: str, value: Any) -> None:
        self._record(f"{self.layer}{step}", value)

    def _record(self, tap: str, value: Any) -> None:
        if step_of(tap) in self.wanted:
            self.recorder(tap, self._array(value))

    def _array(self, value: Any) -> NDArray[Any]:
        """A tensor of Keras as a NumPy array of the same dtype, copied. NumPy has no bfloat16 of its own."""
        if "bfloat16" in str(value.dtype):
            wide = self.ops.convert_to_numpy(self.ops.cast(value, "float32"))
            return np.array(wide).astype(ml_dtypes.bfloat16)
        return np.array(self.ops.convert_to_numpy(value))


def _seen(call: Callable[..., Any], see: See) -> Callable[..., Any]:
    """A call that `see` is told of."""

    def called(*args: Any, **kwargs: Any) -> Any:
        made = call(*args, **kwargs)
        see(args, kwargs, made)
        return made

    return called
