# SPDX-License-Identifier: Apache-2.0
"""transformers' own Mixtral, watched by forward hooks.

Options: `attention`, ``eager`` (the default) or ``sdpa``; `threads` of torch, by default 1, because sums over another
number of threads have other bits.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from refmoe.engines.adapter import Arrays
from refmoe.engines.capture import transformers as engine
from refmoe.engines.protocol import ABILITIES, DTYPES, TAPS
from refmoe.errors import InputError, require
from refmoe.traces.trace import Recorder, Run

NEVER_SEEN = ("attention.scores",)
"""No module returns them."""
UNSEEN = {"eager": NEVER_SEEN, "sdpa": (*NEVER_SEEN, "attention.probs")}
"""Per attention implementation the taps that no hook sees. A fused one has no probabilities."""


class Adapter:
    """`MixtralForCausalLM` on the CPU, its experts one by one."""

    name = "transformers"
    dtypes = DTYPES
    abilities = ABILITIES
    policies = MappingProxyType({dtype: f"hf-{dtype}" for dtype in DTYPES})

    def __init__(self, attention: str = "eager", threads: str = "1") -> None:
        """Raises InputError for an invalid option, or when torch or transformers is missing."""
        if attention not in UNSEEN:
            raise InputError(f"option attention is '{attention}', but one of {', '.join(UNSEEN)} was expected")
        if not threads.isdecimal() or int(threads) < 1:
            raise InputError(f"option threads is '{threads}', but an integer from 1 was expected")
        torch = require("torch", "engines", "the adapter of transformers")
        torch.set_num_threads(int(threads))
        self.attention = attention
        self.version: str = require("transformers", "engines", "the adapter of transformers").__version__
        self.taps = tuple(tap for tap in TAPS if tap not in UNSEEN[attention])
        self.model: Any = None

    def load(self, checkpoint: Path, dtype: str) -> None:
        """Load a checkpoint of the Hugging Face layout."""
        self.model = engine.load_model(checkpoint, dtype, self.attention)

    def run(self, runs: Sequence[Run], taps: Collection[str]) -> Arrays:
        """Capture all runs, every tap that the hooks see."""
        recorder = Recorder()
        engine.capture(self.model, runs, recorder)
        return recorder.arrays
