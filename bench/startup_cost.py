# SPDX-License-Identifier: Apache-2.0
"""How long do `import refmoe` and `refmoe --help` take, over starting Python with NumPy? The three take turns.

python -m bench.startup_cost
python -m bench.startup_cost --repeats 41 --json bench/results/startup_cost.json
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench.clock import keep_bytecode

COMMANDS = {
    "Python with NumPy": [sys.executable, "-c", "import numpy"],
    "import refmoe": [sys.executable, "-c", "import refmoe"],
    "refmoe --help": [sys.executable, "-m", "refmoe", "--help"],
}


def seconds(command: list[str]) -> tuple[float, float]:
    """The wall time and the processor's time of a command."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--json", type=Path, help="write the table here as well")
    options = parser.parse_args()
    keep_bytecode()
    for command in COMMANDS.values():
        seconds(command)  # files into the page cache, modules compiled
    turns = [{name: seconds(command) for name, command in COMMANDS.items()} for _ in range(options.repeats)]
    base = next(iter(COMMANDS))
    rows = [
        {
            "what": name,
            "wall": statistics.median(turn[name][0] for turn in turns),
            "processor": statistics.median(turn[name][1] for turn in turns),
            "ratio": statistics.median(turn[name][0] / turn[base][0] for turn in turns),
            "processor_ratio": statistics.median(turn[name][1] / turn[base][1] for turn in turns),
        }
        for name in COMMANDS
    ]
    for row in rows:
        print(f"{row['what']:20} {row['wall']:6.3f} s  {row['ratio']:5.2f} x")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
