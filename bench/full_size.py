# SPDX-License-Identifier: Apache-2.0
"""The cost of a run at full size: memory against the estimate, time, and bytes read from disk against bytes needed.

The model has two layers of the shape of Mixtral 8x7B, the embedding and the head. It is a checkpoint in bfloat16 of
three shards, 6.3 GB, which is written once below --folder. A run has 8 tokens of prefill and 2 decode steps, and is a
process of its own. One run starts with the files dropped from the page cache. Another starts with all files in the
cache, and its share of matrix products is given.

    python -m bench.full_size --folder /tmp/two-layers --json bench/results/full_size.json
    python -m bench.full_size --folder /tmp/two-layers --tokens 256      a longer prefill
    python -m bench.full_size --whole      recompute golden/mixtral-8x7b as well, all 32 layers: minutes
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from refmoe.checkpoints.write import write_checkpoint
from refmoe.jobs.source import Formula
from refmoe.spec.config import PRESETS

TWO_LAYERS = replace(PRESETS["mixtral-8x7b"], layers=2)
GOAL = {"float32": 4 << 30, "exact": 6 << 30}
"""Bytes of resident memory."""

CHILD = """
import json, os, sys, time
from pathlib import Path
import refmoe.arithmetic.native.ops as native
from refmoe.cli import main

spent = [0.0]
whole = native.linear_by_blocks

def timed(x, weight, read, product):
    def clocked(x, block):
        began = time.perf_counter()
        result = product(x, block)
        spent[0] += time.perf_counter() - began
        return result
    return whole(x, weight, read, clocked)

native.linear_by_blocks = timed
def field(path, name):
    return next(int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(name))
before, began = field('/proc/self/io', 'read_bytes:'), time.perf_counter()
sys.argv = ['refmoe', *sys.argv[1:]]
try:
    main()
except SystemExit as stopped:
    code = stopped.code
print(json.dumps({
    'status': code, 'seconds': time.perf_counter() - began, 'matmul_seconds': spent[0],
    'peak': field('/proc/self/status', 'VmHWM:') << 10, 'read': field('/proc/self/io', 'read_bytes:') - before,
}))
"""


def prepare(folder: Path) -> None:
    """Write the checkpoint, if it is not there."""
    if not (folder / "config.json").exists():
        write_checkpoint(folder, TWO_LAYERS, Formula(TWO_LAYERS, 1).load().parameters, shards=True)


def forget(folder: Path) -> None:
    """Drop the files from the page cache, so that a run reads them from the disk."""
    for path in folder.glob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def needed_bytes(folder: Path, trace: Path, tokens: int) -> int:
    """Bytes that a run must read: all but the experts that no token chose and most of the embedding's rows."""
    from refmoe.checkpoints.load import load_checkpoint
    from refmoe.checkpoints.names import named_weights
    from refmoe.traces.trace import read_trace

    opened, loaded = read_trace(trace), load_checkpoint(folder)
    chosen = {
        f"layers.{i}.experts.{e}"
        for i in range(loaded.config.layers)
        for run in opened.header.runs
        for e in opened.get(run.run, f"layers.{i}.router.experts").reshape(-1).tolist()
    }
    total = tokens * loaded.config.dim * 2
    for name, weight in named_weights(loaded.parameters).items():
        if name != "embedding" and (".experts." not in name or name.rpartition(".")[0] in chosen):
            size = weight.dtype.itemsize
            for n in weight.shape:
                size *= n
            total += size
    return total


def measure(folder: Path, dtype: str, tokens: int) -> dict[str, Any]:
    """Two runs, each in a process of its own: from the disk, then from the page cache."""
    out = folder / "trace.safetensors"
    shutil.rmtree(folder / "trace.safetensors.parts", ignore_errors=True)
    command = [
        "emit", "--checkpoint", str(folder), "--tokens", ",".join(map(str, range(1, tokens + 1))), "--decode", "9,10",
        "--dtype", dtype, "--out", str(out), "--no-digest",
    ]  # fmt: skip
    stated = json.loads(_output("-m", "refmoe", *command, "--estimate", "--json"))
    forget(folder)
    found, again = _run(command, out), _run(command, out)
    needed = needed_bytes(folder, out, tokens + 2)
    out.unlink()
    return {
        "dtype": dtype, "tokens": tokens, "seconds": round(found["seconds"], 1),
        "peak_gib": round(found["peak"] / 2**30, 2), "stated_gib": round(stated["memory_bytes"] / 2**30, 2),
        "goal_gib": GOAL[dtype] >> 30, "read_gb": round(found["read"] / 1e9, 3), "needed_gb": round(needed / 1e9, 3),
        "read_over_needed": round(found["read"] / needed, 4),
        "cached_seconds": round(again["seconds"], 1),
        "matmul_share": round(again["matmul_seconds"] / again["seconds"], 2) if dtype == "float32" else None,
    }  # fmt: skip


def _run(command: list[str], out: Path) -> dict[str, Any]:
    out.unlink(missing_ok=True)
    found: dict[str, Any] = json.loads(_output("-c", CHILD, *command).splitlines()[-1])
    if found["status"]:
        raise SystemExit(f"the run ended with status {found['status']}")
    return found


def whole_model() -> dict[str, Any]:
    """Recompute golden/mixtral-8x7b: seconds, peak memory of the largest process, and whether every bit is right.

    Seconds of cores are those that its processes were given, fewer than they wanted where the machine is shared.
    """
    import resource

    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "refmoe", "suite", "check", "mixtral-8x7b"], capture_output=True, text=True
    )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak, seconds = used.ru_maxrss << 10, time.perf_counter() - began
    return {
        "case": "mixtral-8x7b", "ok": done.returncode == 0, "seconds": round(seconds),
        "core_seconds": round(used.ru_utime + used.ru_stime),
        "peak_of_a_process_gib": round(peak / 2**30, 2), "cores": os.cpu_count(),
    }  # fmt: skip


def _output(*words: str) -> str:
    return subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoint of two layers is, or is to be")
    parser.add_argument("--tokens", type=int, default=8, help="of the prefill")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    if options.folder:
        prepare(options.folder)
        runs = [measure(options.folder, dtype, options.tokens) for dtype in GOAL]
        found[f"two_layers_{options.tokens}_tokens"] = runs
        for run in runs:
            print("  ".join(f"{name} {value}" for name, value in run.items()))
    if options.whole:
        found["whole"] = whole_model()
        print(found["whole"])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
