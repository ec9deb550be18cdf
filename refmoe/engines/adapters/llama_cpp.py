# SPDX-License-Identifier: Apache-2.0
"""llama.cpp on a CPU. Its evaluation callback shows every tensor of its graph."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.checkpoints.gguf_file import FILE_TYPES, write_gguf
from refmoe.checkpoints.gguf_load import is_gguf
from refmoe.checkpoints.load import load_checkpoint
from refmoe.engines.adapter import Arrays, Skipped
from refmoe.engines.adapters import llama_cpp_library as native
from refmoe.engines.capture.shapes import half_split
from refmoe.engines.options import Option
from refmoe.engines.protocol import TAPS
from refmoe.errors import InputError
from refmoe.files.scratch import Scratch
from refmoe.profiles.policy import ANY_ORDER, STAGES
from refmoe.spec.config import Config
from refmoe.spec.taps import LAYER_TAPS, MODEL_TAPS, step_of
from refmoe.traces.trace import Run

NAMES = {
    ("embd", "GET_ROWS"): "embedding",
    ("attn_norm", "MUL"): "attention_norm",
    ("Qcur", "MUL_MAT"): "attention.q",
    ("Kcur", "MUL_MAT"): "attention.k",
    ("Vcur", "MUL_MAT"): "attention.v",
    ("Qcur", "ROPE"): "attention.q_rope",
    ("Kcur", "ROPE"): "attention.k_rope",
    ("kq_soft_max", "SOFT_MAX"): "attention.probs",
    ("attn_out", "MUL_MAT"): "attention.output",
    ("ffn_inp", "ADD"): "attention_residual",
    ("ffn_norm", "MUL"): "moe_norm",
    ("ffn_moe_logits", "MUL_MAT"): "router.logits",
    ("ffn_moe_topk", "VIEW"): "router.experts",
    ("ffn_moe_weights_norm", "DIV"): "router.weights",
    ("ffn_moe_gate", "MUL_MAT_ID"): "expert.gate",
    ("ffn_moe_up", "MUL_MAT_ID"): "expert.up",
    ("ffn_moe_swiglu", "SWIGLU"): "expert.hidden",
    ("ffn_moe_down", "MUL_MAT_ID"): "expert.output",
    ("ffn_moe_out", "ADD"): "moe.output",
    ("ffn_moe_out", "CONT"): "moe.output",  # one expert per token: nothing to add
    ("l_out", "ADD"): "residual",
    ("result_norm", "MUL"): "final_norm",
    ("result_output", "MUL_MAT"): "logits",
}
"""The tap of a tensor, by its name without layer and the operation that made it. Several tensors share a name.

The table lacks attention.scores. llama.cpp has a tensor of the unscaled products only, because softmax scales them.
"""

CACHES = {"float16": "float32-cache-float16", "q8_0": "cache-q8_0", "q4_0": "cache-q4_0"}
"""The policies of types of the cache, each after ``llama.cpp-``."""

READ_BY = {"attention.output": "attention.context"}
"""The tap that a product reads, its second source. The context has no name of its own where it is turned back."""

TURNED = ("attention.q", "attention.k", "attention.q_rope", "attention.k_rope")
"""Taps whose rotary pairs are interleaved in llama.cpp."""

ISSUE = "https://github.com/ggml-org/llama.cpp/issues/3377"
"""The issue "llama : support sliding window attention"."""

PAD = 256
"""llama.cpp gives each sequence a multiple of this number of cache cells."""


class Adapter:
    """llama.cpp through its C interface."""

    name = "llama.cpp"
    dtypes = ("float32",)
    abilities = ("chunk", "decode", "sequences")
    options = MappingProxyType({
        "cache": Option(
            "the type of the cache; llama.cpp's own default is float16", (*native.TYPES,)
        ),
        "flash": Option("flash attention; llama.cpp's own default is on", (*native.FLASH,)),
        "threads": Option("the threads of llama.cpp"),
        "file": Option("the dtype of the matrices in the GGUF file", (*FILE_TYPES,)),
        "library": Option("the build, with all its libraries in one folder", text=native.LIBRARY),
        "turn": Option(
            "whether heads of a multiple of 64 are turned before they enter a cache in codes", (*native.TURN,)
        ),
    })  # fmt: skip
    requirements = ("xllamacpp==2026.10.11549", "gguf==0.19.0")
    """NAMES and `llama_cpp_library` know two structs of this build."""

    def __init__(
        self, cache: str = "float32", flash: str = "off", threads: str = "1", file: str = "float32",
        library: str = native.PACKAGE, turn: str = "on",
    ) -> None:  # fmt: skip
        if cache in native.CODED:
            if flash == "off":
                raise InputError(f"option flash is 'off', but with cache={cache} llama.cpp needs flash=on")
        elif turn == "off":
            raise InputError(f"option turn is 'off', but with cache={cache} no head is turned")
        self.file, self.cache, self.flash, self.turn = file, cache, flash, turn
        build = None if library == native.PACKAGE else Path(library)
        self.library = native.load_library(lambda text: print(text, end="", file=sys.stderr), build)
        self.version = f"{native.PACKAGE} {version(native.PACKAGE)}" if build is None else build.name
        self.settings = {"type_k": native.TYPES[cache], "type_v": native.TYPES[cache], "n_threads": int(threads)}
        self.settings |= {"n_threads_batch": int(threads), "flash_attn_type": native.FLASH[flash]}
        unseen = ("attention.scores", "attention.probs") if flash == "on" else ("attention.scores",)
        self.taps = tuple(tap for tap in TAPS if tap not in unseen)
        self.order = "none" if turn == "off" else STAGES if build is None else ANY_ORDER
        self.policies = {"float32": policy_of(file, cache, flash, self.order)}
        self.model: Any = None

    def load(self, checkpoint: Path, dtype: str) -> None:
        """Load the checkpoint: a GGUF file as it is, any other through a temporary one.

        dtype: "float32".   Raises RuntimeError when llama.cpp does not load it.
        """
        loaded = load_checkpoint(checkpoint)
        self.config = loaded.config
        self.library.llama_model_free(self.model)
        self.policies = {"float32": policy_of(self.file, self.cache, self.flash, self.order)}
        if is_gguf(checkpoint):
            self.policies = {"float32": policy_of_gguf(self.cache, self.flash, self.order)}
            self._open(checkpoint)
            return
        with Scratch("llama-cpp") as scratch:
            path = scratch.path / "model.gguf"
            try:
                write_gguf(path, loaded.config, loaded.parameters, self.file)
            except InputError as unwritten:
                if self.file == "float32":
                    raise
                raise Skipped(f"a {self.file} file cannot hold the weights: {unwritten}") from None
            self._open(path)  # the file is mapped into memory, so its name may be deleted

    def _open(self, path: Path) -> None:
        self.model = self.library.llama_model_load_from_file(bytes(path), self.library.llama_model_default_params())
        if not self.model:
            raise RuntimeError("llama.cpp does not load the model; what it says is on standard error")

    def run(self, runs: Sequence[Run], taps: Collection[str]) -> Arrays:
        """Run each call as one batch with logits of every token.

        Raises Skipped where a window would hide tokens, and where heads are no whole blocks of a cache in codes.
        """
        if self.cache in native.CODED and self.config.head_dim % native.BLOCK:
            raise Skipped(
                f"a cache in {self.cache} has blocks of {native.BLOCK} values, but heads have {self.config.head_dim}"
            )
        window, longest = self.config.window, max(run.past + len(run.tokens) for run in runs)
        if window is not None and longest > window:
            raise Skipped(f"llama.cpp runs Mixtral as a llama, which has no window; this model's is {window}", ISSUE)
        seen: Arrays = {}

        def watch(tensor: Any, ask: bool, _: Any) -> bool:
            name, _, layer = tensor[0].name.decode().partition("-")
            tap = NAMES.get((name, self.library.ggml_op_desc(tensor).decode()))
            shown = {tap: tensor[0]} if tap in taps and tensor[0].type in native.DTYPES else {}
            if READ_BY.get(str(tap)) in taps:
                shown[READ_BY[str(tap)]] = native.source(tensor[0], 1)
            if not ask:
                prefix = f"layers.{layer}." if layer else ""
                seen.update({f"{prefix}{each}": native.to_numpy(values) for each, values in shown.items()})
            return bool(shown) or not ask  # asked: whether the value is wanted; otherwise: whether to continue

        callback, sequences = native.EvalCallback(watch), sorted({run.sequence for run in runs})
        cells, batch = (-(-count // PAD) * PAD for count in (longest, max(len(run.tokens) for run in runs)))
        options = {"n_ctx": cells * len(sequences), "n_seq_max": len(sequences), "n_batch": batch, "n_ubatch": batch}
        options |= {"n_outputs_max_per_seq": batch, **self.settings}
        native.set_turn(self.turn)
        context = native.new_context(self.library, self.model, callback, options)
        found: Arrays = {}
        try:
            for run in runs:
                seen.clear()
                native.decode(self.library, context, run, sequences.index(run.sequence))
                if run.read:
                    found |= {f"{run.run}/{tap}": shaped(tap, array, self.config, run) for tap, array in seen.items()}
        finally:
            self.library.llama_free(context)
        return found


def policy_of(file: str, cache: str, flash: str, turn: str = ANY_ORDER) -> str:
    """The policy of llama.cpp with these options.   turn: as a policy has it"""
    if flash == "on" and cache not in native.CODED:
        # it rounds keys and values of a float32 cache to float16 before it reads them
        return "llama.cpp-float32-flash" if file == "float32" else f"llama.cpp-{file}"
    inputs = f"+linear.input={file}+router.logits.input=float32" if file != "float32" else ""
    return _of_cache(cache, turn) + inputs + ("+flushes=true" if file == "bfloat16" else "")


def policy_of_gguf(cache: str, flash: str, turn: str = ANY_ORDER) -> str:
    """The policy of llama.cpp with these options and a GGUF file of whatever formats.   turn: as a policy has it"""
    if flash == "on" and cache not in native.CODED:
        return "llama.cpp-quantised"
    return _of_cache(cache, turn) + native.ROUNDED


def _of_cache(cache: str, turn: str) -> str:
    """The policy of llama.cpp with this cache and a float32 file. Flash attention is on where the cache has codes."""
    name = "llama.cpp-float32" if cache == "float32" else f"llama.cpp-{CACHES[cache]}"
    return name + (f"+turn={turn}" if cache in native.CODED and turn != ANY_ORDER else "")


def shaped(tap: str, array: NDArray[Any], config: Config, run: Run) -> NDArray[Any]:
    """A tensor in the shape of its tap; queries and keys in half-split order, as ROPE-3 wants them.

    array: the tap's axes with axes of 1 around them, heads joined or not; for probabilities [1, H, T, cells].
    Raises RuntimeError when probabilities reach empty cells of the cache.
    """
    step, cached = step_of(tap), run.past + len(run.tokens)
    if step == "attention.probs":
        if np.nan_to_num(array[..., cached:]).any():  # a row without a finite softmax is NaN everywhere
            raise RuntimeError(f"{run.run}: attention reaches cells of the cache that hold no token of this sequence")
        return array[0, :, :, :cached]
    sizes = {"T": len(run.tokens), "D": config.dim, "H": config.heads, "K": config.kv_heads, "d": config.head_dim}
    sizes |= {"E": config.experts, "k": config.experts_per_token, "F": config.hidden_dim, "V": config.vocab}
    array = array.reshape([sizes[axis] for axis in {**LAYER_TAPS, **MODEL_TAPS}[step].split()])
    if step in TURNED:
        array = half_split(array)
    return array
