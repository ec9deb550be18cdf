# SPDX-License-Identifier: Apache-2.0
"""The time of `refmoe conform` that is not the engine's, over the engine's own.

The engine's time is from the start of its process to the answer, and from each request to its answer. All the rest is
refmoe's: checkpoints, verdicts, results. The engine is transformers, in an environment that has it.

    python -m bench.conform_cost
    python -m bench.conform_cost --dtype float32 --case square     options of `refmoe conform`
    python -m bench.conform_cost --json bench/results/conform_cost.json
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from refmoe.cli import commands
from refmoe.engines.process import Process


class Clock:
    """Seconds spent in calls."""

    def __init__(self) -> None:
        self.spent = 0.0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, whose time is added."""

        @wraps(call)
        def within(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.spent += time.perf_counter() - start

        return within


def measure(options: list[str]) -> dict[str, float]:
    """Seconds of one run: of the wall, of the engine, and of the processor for refmoe and for the engine."""
    clock = Clock()
    start, ask = Process.__init__, Process.ask
    Process.__init__, Process.ask = clock.timed(start), clock.timed(ask)  # type: ignore[method-assign]
    wall, own = time.perf_counter(), time.process_time()
    try:
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["conform", "--adapter", "transformers", "--out", f"{folder}/results.json", *options]
            status = commands.main(arguments, prog_name="refmoe", standalone_mode=False)
    finally:
        Process.__init__, Process.ask = start, ask  # type: ignore[method-assign]
    wall, own = time.perf_counter() - wall, time.process_time() - own
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "status": float(status or 0), "wall": wall, "engine": clock.spent, "ratio": (wall - clock.spent) / clock.spent,
        "own_processor": own, "engine_processor": children.ru_utime + children.ru_stime,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options, others = parser.parse_known_args()
    found = measure(others)
    print(
        f"wall {found['wall']:.1f} s, engine {found['engine']:.1f} s, the rest over the engine {found['ratio']:.2f}",
        file=sys.stderr,
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
