# SPDX-License-Identifier: Apache-2.0
"""An adapter whose engine prints wherever it can, from its import on; refmoe's own specification does the work."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from refmoe.engines.adapter import Arrays, Skipped
from refmoe.traces.trace import Run
from tests.engines.harnesses import honest

print("importing")
os.write(1, b"a library in C says hello\n")


class Adapter:
    name = "loud"
    dtypes = ("float32", "bfloat16", "float16")
    taps = ("embedding", "residual", "logits")
    abilities = ("chunk", "decode")
    policies = {"bfloat16": "bfloat16"}  # noqa: RUF012

    def __init__(self, version: str = "1") -> None:
        print("starting")
        self.version = version

    def load(self, checkpoint: Path, dtype: str) -> None:
        print("loading", checkpoint)
        if dtype == "float16":
            raise Skipped("no float16 yet", "https://example.org/16")
        honest.load(checkpoint, dtype)

    def run(self, runs: Sequence[Run], taps: Collection[str]) -> Arrays:
        sys.stdin.read()  # an engine may ask for confirmation: there is nothing to read
        os.system("echo running")
        calls = [{**vars(run)} for run in runs]
        return honest.run(calls, [*taps, "final_norm"])  # more than was asked for
