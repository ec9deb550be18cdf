# SPDX-License-Identifier: Apache-2.0
"""All checks and measurements for a GPU in one command: correctness, rates against measured ceilings, other engines.

    python -m bench.gpu --json bench/results/gpu.json
    python -m bench.gpu --only copying,multiplying,decoding

The JSON is written after each section, so that an interrupted run leaves its results. A section that fails is a line of
the table and does not end the run. The table comes last. Exit status 0: all sections were measured; 1: a section
failed, or a goal was missed; 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import gpu_measure, gpu_torch
from bench.gpu_measure import Bench
from bench.gpu_report import Result, met, table, write
from refmoe.cuda.device import require_gpu
from refmoe.errors import InputError

Section = Callable[[Bench], list[Result]]
SECTIONS: dict[str, Section] = {
    "copying": gpu_measure.copying,
    "multiplying": gpu_measure.multiplying,
    "rows": gpu_measure.rows,
    "goldens": gpu_measure.goldens,
    "decoding": gpu_measure.decoding,
    "torch": gpu_torch.compared,
    "full_size": gpu_measure.full_size,
    "sanitizing": gpu_measure.sanitizing,
}
"""The sections in order: ceilings first, and sections that may take long last."""


def device_facts(cupy: Any) -> dict[str, Any]:
    """The device and the versions that were measured."""
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    free, total = cupy.cuda.runtime.memGetInfo()
    return {
        "device": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "memory_bytes": total,
        "free_bytes": free,
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "runtime": cupy.cuda.runtime.runtimeGetVersion(),
        "cupy": cupy.__version__,
    }


def run(
    bench: Bench, sections: dict[str, Section], facts: dict[str, Any], path: Path | None
) -> tuple[list[Result], bool]:
    """The results of all sections, and whether every section completed."""
    results: list[Result] = []
    whole = True
    seconds: dict[str, float] = {}
    for name, section in sections.items():
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        try:
            results += section(bench)
        except Exception as error:
            whole = False
            traceback.print_exc()
            first = next(iter(str(error).splitlines()), "")
            results.append(Result(name, None, "", note=f"FAILED: {type(error).__name__}: {first}"))
        seconds[name] = round(time.perf_counter() - start, 1)
        write(path, {**facts, "seconds": seconds, "notes": bench.notes}, results)
    return results, whole


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    parser.add_argument("--only", metavar="NAMES", help=f"sections by commas, of {', '.join(SECTIONS)}")
    options = parser.parse_args(arguments)
    names = [*SECTIONS] if options.only is None else options.only.split(",")
    try:
        for name in names:
            if name not in SECTIONS:
                raise InputError(f"--only names '{name}', but some of {', '.join(SECTIONS)} were expected")
        cupy = require_gpu()
    except InputError as error:
        print(f"bench.gpu: {error}", file=sys.stderr)
        return 2
    facts = device_facts(cupy)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    results, whole = run(Bench(cupy), {name: SECTIONS[name] for name in SECTIONS if name in names}, facts, options.json)
    print(f"\n{table(results)}")
    return int(not whole or any(met(result) is False for result in results))


if __name__ == "__main__":
    sys.exit(main())
