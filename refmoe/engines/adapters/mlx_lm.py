# SPDX-License-Identifier: Apache-2.0
"""mlx-lm's Mixtral on a CPU. Its modules are wrapped, so that inputs and outputs are recorded.

Scores and probabilities stay inside `mx.fast.scaled_dot_product_attention` and are not seen. mlx-lm rotates by the
number of tokens in the cache; for a case that starts at a later position, the adapter adds that position. mlx-lm
ignores a window (`sliding_window`) in the configuration and attends to all tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from refmoe.engines.adapter import Arrays, Skipped
from refmoe.engines.adapters.mlx_lm_watch import Watch
from refmoe.engines.protocol import TAPS
from refmoe.errors import require
from refmoe.files.json_file import read_json
from refmoe.traces.trace import Run

UNSEEN = ("attention.scores", "attention.probs")
EXTRA = ("mlx", "running mlx-lm")


class Adapter:
    """A Mixtral of mlx-lm, watched."""

    name = "mlx-lm"
    dtypes = ("float32",)
    taps = tuple(tap for tap in TAPS if tap not in UNSEEN)
    abilities = ("chunk", "decode", "sequences")
    policies = MappingProxyType({"float32": "mlx-float32"})
    requirements = ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2")

    def __init__(self) -> None:
        self.mx: Any = require("mlx.core", *EXTRA)
        self.mx.set_default_device(self.mx.cpu)
        require("mlx_lm", *EXTRA)
        self.version = f"{version('mlx-lm')} (mlx {version('mlx')})"

    def load(self, checkpoint: Path, dtype: str) -> None:
        """Load the checkpoint and watch its modules. Raises Skipped for a head_dim that mlx-lm cannot read."""
        config = read_json(checkpoint / "config.json").values
        derived = config["hidden_size"] // config["num_attention_heads"]
        if config["head_dim"] != derived:
            raise Skipped(f"mlx-lm knows no head_dim but hidden_size / heads = {derived}; it is {config['head_dim']}")
        self.model, _ = require("mlx_lm.utils", *EXTRA).load_model(checkpoint)
        self.model.set_dtype(getattr(self.mx, dtype))
        self.watch = Watch(derived)
        for name, module in self.model.named_modules():
            self.watch.add(name, module)

    def run(self, runs: Sequence[Run], taps: Collection[str]) -> Arrays:
        """Run each call with the cache of its sequence. Raises Skipped for positions that are not consecutive."""
        caching: Any = require("mlx_lm.models.cache", *EXTRA)
        caches: dict[int, Any] = {}
        self.watch.begin(taps)
        with self.watch.functions():
            for run in runs:
                self.watch.recorder.begin(run)
                self.watch.start = run.positions[0] - run.past
                if run.positions != tuple(range(run.positions[0], run.positions[0] + len(run.tokens))):
                    raise Skipped(f"mlx-lm takes consecutive positions; those of {run.run} are {run.positions}")
                if run.sequence not in caches:
                    caches[run.sequence] = caching.make_prompt_cache(self.model)
                cache = caches[run.sequence]
                caching.trim_prompt_cache(cache, cache[0].offset - run.past)
                self.mx.eval(self.model(self.mx.array([run.tokens]), cache))
        return self.watch.recorder.arrays
