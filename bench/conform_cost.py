# SPDX-License-Identifier: Apache-2.0
"""The time of `refmoe conform` that is not the engine's, over the engine's own.

The engine's time is from the start of its process to the answer, and from each request to its answer. All the rest is
refmoe's: checkpoints, verdicts, results. The engine is transformers, in an environment that has it. The median of
several runs counts, since the machine's speed may change from run to run.

    python -m bench.conform_cost --repeats 5
    python -m bench.conform_cost --dtype float32 --case square     options of `refmoe conform`
    python -m bench.conform_cost --json bench/results/conform_cost.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.clock import Clock, keep_bytecode, of_children
from refmoe.cli import commands
from refmoe.engines.process import Process


def measure(options: list[str]) -> dict[str, float]:
    """Seconds of one run: of the wall, of the engine, and of the processor for refmoe and for the engine."""
    clock = Clock()
    start, ask = Process.__init__, Process.ask
    Process.__init__, Process.ask = clock.timed(start), clock.timed(ask)  # type: ignore[method-assign]
    wall, own, others = time.perf_counter(), time.process_time(), of_children()
    try:
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["conform", "--adapter", "transformers", "--out", f"{folder}/results.json", *options]
            status = commands.main(arguments, prog_name="refmoe", standalone_mode=False)
    finally:
        Process.__init__, Process.ask = start, ask  # type: ignore[method-assign]
    wall, own = time.perf_counter() - wall, time.process_time() - own
    return {
        "status": float(status or 0), "wall": wall, "engine": clock.spent, "ratio": (wall - clock.spent) / clock.spent,
        "own_processor": own, "engine_processor": of_children() - others,
    }  # fmt: skip


def middle(runs: list[dict[str, float]]) -> dict[str, Any]:
    """The run with the median ratio, with the ratios of all runs."""
    ratios = [each["ratio"] for each in runs]
    found = sorted(runs, key=lambda each: each["ratio"])[(len(runs) - 1) // 2]
    return {**found, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--repeats", type=int, default=1)
    options, others = parser.parse_known_args()
    runs = []
    keep_bytecode()
    for _ in range(options.repeats):
        runs.append(measure(others))
        wall, engine, ratio = (runs[-1][name] for name in ("wall", "engine", "ratio"))
        print(f"wall {wall:.1f} s, engine {engine:.1f} s, the rest over the engine {ratio:.2f}", file=sys.stderr)
    found = middle(runs)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
