# SPDX-License-Identifier: Apache-2.0
"""One engine in a process of its own. It reads actions from `bench.peers` as JSON lines and writes the measurements.

python -m bench.peer_worker ENGINE '{"config": {...}, "threads": 2, "clock": "wall", "tokens": [...], ...}'
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench import peer_engines as engines
from refmoe.spec.config import Config

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def make(name: str, task: dict[str, Any]) -> engines.Engine:
    """An engine by its name, its weights loaded."""
    config, threads = Config(**task["config"]), task["threads"]
    if name == "llama.cpp":
        return engines.LlamaCpp(config, threads, Path(task["gguf"]), len(task["tokens"]))
    kind, _, option = name.partition(" ")
    if kind == "transformers":
        return engines.Transformers(config, threads, option)
    blas, _, timed = option.partition(" ")
    return engines.Refmoe(config, blas, task["stored"], timed == "timed")


class Worker:
    """Times an engine on one prompt and the tokens after it."""

    def __init__(self, engine: engines.Engine, tokens: list[int], prompt: int, clock: Callable[[], float]) -> None:
        """tokens: the prompt's, then those to decode.   prompt: length of the prompt.   clock: returns seconds."""
        self.engine, self.tokens, self.prompt, self.clock = engine, tokens, prompt, clock
        self.kept: list[Any] | None = None
        """Logits of every call, while `save` runs; else None."""

    def prefill(self) -> dict[str, Any]:
        """Seconds of the prompt in one call, and the seconds in matrix products where they are known."""
        return self._timed(lambda: self.engine.prefill(self.tokens[: self.prompt]))

    def decode(self) -> dict[str, Any]:
        """Seconds of each token after the prompt."""
        steps = [
            self._timed(lambda i=i: self.engine.step(self.tokens[i], i)[None])
            for i in range(self.prompt, len(self.tokens))
        ]
        return {key: [step[key] for step in steps] for key in steps[0]}

    def save(self, path: str) -> dict[str, Any]:
        """Prefill and decode once more, untimed, and write the logits of every token, [T, V]."""
        self.kept = []
        self.prefill()
        self.decode()
        np.save(path, np.concatenate(self.kept))
        self.kept = None
        return {}

    def _timed(self, work: Any) -> dict[str, Any]:
        matmul, began = engines.Stopwatch.spent, self.clock()
        logits = work()
        seconds = self.clock() - began
        if self.kept is not None:
            self.kept.append(logits)
        return {"seconds": seconds, "matmul": engines.Stopwatch.spent - matmul}


def main() -> None:
    name, task = sys.argv[1], json.loads(sys.argv[2])
    # output that engines print must not mix with the answers on standard output
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if name == "write":
        engines.LlamaCpp.write(Config(**task["config"]), Path(task["gguf"]))
        return
    clock = CLOCKS[task["clock"]]
    engines.Stopwatch.clock = staticmethod(clock)
    worker = Worker(make(name, task), task["tokens"], task["prompt"], clock)
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        action, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, action)(*arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main()
