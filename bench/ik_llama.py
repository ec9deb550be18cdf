# SPDX-License-Identifier: Apache-2.0
"""ik_llama.cpp as an engine, for `bench.quantised` and `refmoe conform --adapter bench/ik_llama.py`.

It is a fork of llama.cpp that makes other codes of inputs. Its structs are others too, so that llama.cpp's adapter
cannot use its library: the Python package `ik-llama-cpp-python` knows them. The options that fuse operations are off,
because what they fuse cannot be seen. Each sequence has a context of its own.
"""

from __future__ import annotations

import ctypes as c
import re
from collections.abc import Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.checkpoints.load import load_checkpoint
from refmoe.engines.adapter import Arrays, Skipped
from refmoe.engines.adapters.llama_cpp import PAD, shaped
from refmoe.engines.adapters.llama_cpp_library import DTYPES
from refmoe.engines.environment import needed
from refmoe.engines.options import Option
from refmoe.engines.protocol import TAPS
from refmoe.spec.taps import MODEL_TAPS
from refmoe.traces.trace import Run

PACKAGE = "ik_llama_cpp"
NAMES = {
    ("inp_embd", "GET_ROWS"): "embedding",
    ("attn_norm", "FUSED_RMS_NORM"): "attention_norm",
    ("Qcur", "MUL_MAT"): "attention.q",
    ("Kcur", "MUL_MAT"): "attention.k",
    ("Vcur", "MUL_MAT"): "attention.v",
    ("Qcur_roped", "ROPE"): "attention.q_rope",
    ("Kcur_roped", "ROPE"): "attention.k_rope",
    ("kq_soft_max_ext", "SOFT_MAX"): "attention.probs",
    ("kqv_merged_cont", "CONT"): "attention.context",
    ("fa", "RESHAPE"): "attention.context",  # of flash attention
    ("kqv_out", "MUL_MAT"): "attention.output",
    ("node", "ADD"): "attention_residual",
    ("ffn_norm", "FUSED_RMS_NORM"): "moe_norm",
    ("ffn_moe_logits", "MUL_MAT"): "router.logits",
    ("ffn_moe_topk", "VIEW"): "router.experts",
    ("ffn_moe_weights_norm", "DIV"): "router.weights",
    ("ffn_moe_gate", "MUL_MAT_ID"): "expert.gate",
    ("ffn_moe_up", "MUL_MAT_ID"): "expert.up",
    ("ffn_moe_gate_par", "FUSED_MUL_UNARY"): "expert.hidden",
    ("ffn_moe_down", "MUL_MAT_ID"): "expert.output",
    ("ffn_out", "MULTI_ADD"): "moe.output",
    ("l_out", "ADD"): "residual",
    ("result_norm", "FUSED_RMS_NORM"): "final_norm",
    ("result_output", "MUL_MAT"): "logits",
}
"""The tap of a tensor, by its name without layer and the operation that made it."""
UNFUSED = ("fused_moe_up_gate", "grouped_expert_routing", "fused_up_gate", "fused_mmad", "graph_reuse")
"""The context's options that are off."""
UNNAMED = re.compile(r"node_\d+")
"""The name of a tensor to which the engine gives none. The sum after attention is the only sum among them."""
POLICIES = {"off": "llama.cpp-float32-cache-float16+codes=q8_2", "on": "ik-llama.cpp-quantised"}
"""Per value of the option `flash`."""


class Tensor(c.Structure):
    """The head of ggml_tensor in this fork."""

    _fields_ = [("type", c.c_int32), ("buffer", c.c_void_p), ("ne", c.c_int64 * 4), ("nb", c.c_size_t * 4)]


class Adapter:
    """ik_llama.cpp through its C interface."""

    name = "ik_llama"
    dtypes = ("float32",)
    abilities = ("chunk", "decode", "sequences")
    options = MappingProxyType({
        "threads": Option("the threads of the engine"),
        "flash": Option("flash attention; the engine's own default is on", (*POLICIES,)),
    })  # fmt: skip
    requirements = ("ik-llama-cpp-python==0.1.5",)

    def __init__(self, threads: str = "1", flash: str = "on") -> None:
        self.threads, self.flash, self.version = int(threads), flash == "on", version("ik-llama-cpp-python")
        unseen = ("attention.scores", "attention.probs") if self.flash else ("attention.scores",)
        self.taps = tuple(tap for tap in TAPS if tap not in unseen)
        self.policies = {"float32": POLICIES[flash]}
        self.api: Any = needed(f"{PACKAGE}._ctypes_api", "llama-cpp")
        folder = Path(str(self.api.__file__)).parent / "lib"
        self.ggml, self.llama = (c.CDLL(str(folder / f"lib{name}.so")) for name in ("ggml", "llama"))
        for name, result in (
            ("ggml_get_name", c.c_char_p),
            ("ggml_op_desc", c.c_char_p),
            ("ggml_get_data", c.c_void_p),
        ):
            function = getattr(self.ggml, name)
            function.restype, function.argtypes = result, [c.c_void_p]
        remove = self.llama.llama_kv_cache_seq_rm
        remove.restype, remove.argtypes = c.c_bool, [c.c_void_p, c.c_int32, c.c_int32, c.c_int32]
        self.api.llama_backend_init()
        self.model: Any = None

    def load(self, checkpoint: Path, dtype: str) -> None:
        """Load a GGUF file. Raises Skipped for a window, and RuntimeError where the engine does not load the file."""
        self.config = load_checkpoint(checkpoint).config
        if self.config.window is not None:
            raise Skipped(f"ik_llama.cpp runs Mixtral as a llama, which has no window; here it is {self.config.window}")
        params = self.api.llama_model_default_params()
        params.merge_qkv = params.merge_up_gate_exps = False
        self.model = self.api.llama_model_load_from_file(bytes(checkpoint), params)
        if not self.model:
            raise RuntimeError("ik_llama.cpp does not load the model; what it says is on standard error")

    def run(self, runs: Sequence[Run], taps: Collection[str]) -> Arrays:
        """Run each call as one batch with logits of every token."""
        found: Arrays = {}
        for sequence in dict.fromkeys(run.sequence for run in runs):
            mine = [run for run in runs if run.sequence == sequence]
            seen: dict[str, NDArray[Any]] = {}
            context, callback = self._context(mine, seen, taps)
            for run in mine:
                seen.clear()
                self._decode(context, run)
                found |= {f"{run.run}/{tap}": shaped(tap, array, self.config, run) for tap, array in seen.items()}
            self.api.llama_free(context)
            del callback  # it had to live as long as the context
        return found

    def _context(self, runs: Sequence[Run], seen: dict[str, NDArray[Any]], taps: Collection[str]) -> tuple[Any, Any]:
        """A context for these calls, and the callback that fills `seen`."""

        last = [""]

        def watch(tensor: int, ask: bool, _: Any) -> bool:
            name, _, layer = self.ggml.ggml_get_name(tensor).decode().partition(" ")[0].partition("-")
            tap = NAMES.get((UNNAMED.sub("node", name), self.ggml.ggml_op_desc(tensor).decode()))
            last[0] = layer or last[0]
            if not ask and tap in taps:
                of_layer = f"layers.{last[0]}." if tap not in MODEL_TAPS else ""
                seen[of_layer + str(tap)] = self._values(tensor)
            return tap in taps or not ask

        options = self.api.llama_context_default_params()
        for name in UNFUSED:
            setattr(options, name, False)
        options.n_ctx = -(-max(run.past + len(run.tokens) for run in runs) // PAD) * PAD
        options.n_batch = options.n_ubatch = options.n_ctx
        options.n_threads = options.n_threads_batch = self.threads
        options.logits_all, options.flash_attn = True, self.flash
        options.cb_eval = callback = self.api.ggml_backend_sched_eval_callback(watch)
        context = self.api.llama_init_from_model(self.model, options)
        if not context:
            raise RuntimeError("ik_llama.cpp does not make a context; what it says is on standard error")
        return context, callback

    def _values(self, address: int) -> NDArray[Any]:
        """A copy of a tensor's values, axes in NumPy's order."""
        tensor = Tensor.from_address(address)
        dtype = np.dtype(DTYPES[tensor.type])
        shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
        size = dtype.itemsize + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        memory = (c.c_char * size).from_address(self.ggml.ggml_get_data(address))
        return np.ndarray(shape, dtype, memory, strides=strides).copy()

    def _decode(self, context: Any, run: Run) -> None:
        """Cut the cache to the first new position, then run the new tokens. Raises RuntimeError on an error."""
        self.llama.llama_kv_cache_seq_rm(context, 0, run.positions[0], -1)
        batch = self.api.llama_batch_init(len(run.tokens), 0, 1)
        batch.n_tokens = len(run.tokens)
        for i, (token, position) in enumerate(zip(run.tokens, run.positions, strict=True)):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        status = self.api.llama_decode(context, batch)
        if status:
            raise RuntimeError(f"{run.run}: llama_decode returns {status}; what it says is on standard error")
