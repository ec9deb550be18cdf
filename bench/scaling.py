# SPDX-License-Identifier: Apache-2.0
"""The gain from a second worker: whole commands in one process, in two, and on a Dask cluster of two workers.

Efficiency is T1 / (2 T2): the time in one process over twice the time with two workers, in turns in one run, medians.
Each process has one BLAS thread. Times are those of commands as users start them, the start of Python and of the
workers included. By Amdahl's law 2 T2 - T1 are the seconds that a second worker does not shorten. The wall is T1 over
the time of two such commands of one worker side by side: work that is divided without any cost. It is below 1 where two
cores share caches, and where one worker keeps several cores busy already.

    verify    every tap of a model of dim 512 with 16 layers, prefill of 256: a piece of work is a layer
    conform   `transformers` in four dtypes on all small cases: two engines side by side, each with its judge
    matrix    a few mutants on a few cases: a piece of work is a case at a dtype
    check     golden cases: a piece of work is a case

    python -m bench.scaling --json bench/results/scaling.json
    python -m bench.scaling --only check --repeats 1     with --json, other rows of the file stay
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from bench.clock import keep_bytecode, of_children
from bench.verify_cost import MIDDLE
from refmoe.checkpoints.write import write_checkpoint
from refmoe.jobs.source import Formula
from refmoe.parallel import ONE_THREAD

ROOT = Path(__file__).parents[1]
DEEP = replace(MIDDLE, layers=16)
TOKENS = 256
CASES = (
    "batch-ragged", "edge-tokens", "four-layers", "mini-8x7b", "near-tie", "one-pair", "packed", "walking-skeleton"
)  # fmt: skip
"""The cases of the matrix."""
MUTANTS = ("rope-sign-flipped", "norm-eps-outside-sqrt", "emb-scale-sqrt-d", "attn-swa-off-by-one")
Command = tuple[str, ...]


def repeated(option: str, values: Sequence[str]) -> list[str]:
    return [word for value in values for word in (option, value)]


def prepared(folder: Path) -> Command:
    """The command that verifies a trace of a model, both of which are written into a folder."""
    ids = np.random.default_rng(1).integers(0, DEEP.vocab, TOKENS)
    model, trace = folder / "model", folder / "trace.safetensors"
    write_checkpoint(model, DEEP, Formula(DEEP, 1).load().parameters)
    given = ("--checkpoint", str(model), "--tokens", ",".join(map(str, ids)), "--dtype", "float32")
    spent(("emit", *given, "--no-digest", "--out", str(trace)))
    return "verify", str(trace), "--checkpoint", str(model), "--policy", "float32"


def subjects(only: Sequence[str]) -> Iterator[tuple[str, Command, tuple[str, ...]]]:
    """Per subject its name, its command, and the options by which the command has one worker."""
    with tempfile.TemporaryDirectory() as folder:
        if "verify" in only:
            yield "verify", prepared(Path(folder)), ()
        alone = ("--executor", "processes:1")
        chosen = [*repeated("--mutant", MUTANTS), *repeated("--case", CASES)]
        for name, command, one in (
            ("conform", ("conform", "--adapter", "transformers"), ()),
            ("matrix", ("mutants", "matrix", *chosen), alone),
            ("check", ("suite", "check"), alone),
        ):
            if name in only:
                yield name, command, one


def spent(command: Sequence[str]) -> tuple[float, float]:
    """Seconds of a command by the clock, and of all its processes by the processor.

    A verdict against an engine counts as success. SystemExit where the command fails.
    """
    began, before = time.perf_counter(), of_children()
    done = subprocess.run(
        [sys.executable, "-m", "refmoe", *command],
        env={**os.environ, **ONE_THREAD},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1, 3):
        raise SystemExit(f"refmoe {' '.join(command)[:200]}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - began, of_children() - before


@dataclass(frozen=True)
class TwoWorkers:
    """A Dask cluster of two workers on this machine."""

    executor: str
    used: Callable[[], float]
    """Seconds of a processor that the workers have used so far."""


def warm() -> None:
    """Import what the commands need, as workers have done that worked before."""
    for name in ("verify", "conform", "mutants", "suite"):
        import_module(f"refmoe.cli.{name}")


@contextmanager
def two_workers() -> Iterator[TwoWorkers]:
    """A new cluster, as long as it is used: idle workers take a tenth of a core."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(  # type: ignore[no-untyped-call]
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,  # type: ignore[no-untyped-call]
    ):
        client.run(warm)
        yield TwoWorkers(f"dask:{cluster.scheduler_address}", lambda: sum(client.run(time.process_time).values()))


def measure(command: Command, one: tuple[str, ...], repeats: int) -> dict[str, float]:
    """Seconds with one worker and with two, in turns, the efficiencies, the wall, and the cores that are busy."""
    times: dict[str, list[float]] = {name: [] for name in ("one", "processes", "dask", "side_by_side")}
    busy: dict[str, list[float]] = {name: [] for name in ("one", "processes", "dask")}

    def note(name: str, seconds: float, used: float) -> None:
        times[name].append(seconds)
        busy[name].append(used / seconds)

    for _ in range(repeats):
        note("one", *spent([*command, *one]))
        note("processes", *spent([*command, "--executor", "processes:2"]))
        with two_workers() as dask:
            before = dask.used()
            seconds, used = spent([*command, "--executor", dask.executor])
            note("dask", seconds, used + dask.used() - before)
        with ThreadPoolExecutor(2) as threads:
            both = [threads.submit(spent, [*command, *one]) for _ in range(2)]
            times["side_by_side"].append(max(each.result()[0] for each in both))
    found = {f"busy_cores_of_{name}": statistics.median(each) for name, each in busy.items()}
    found |= {f"{name}_seconds": statistics.median(each) for name, each in times.items()}
    for name in ("processes", "dask"):
        found[f"{name}_efficiency"] = found["one_seconds"] / (2 * found[f"{name}_seconds"])
        found[f"{name}_serial_seconds"] = 2 * found[f"{name}_seconds"] - found["one_seconds"]
    return found | {"wall": found["one_seconds"] / found["side_by_side_seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("verify", "conform", "matrix", "check")
    parser.add_argument("--only", choices=names, action="append")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    found: dict[str, Any] = {"cores": os.cpu_count(), "repeats": options.repeats, "rows": {}}
    if options.only and options.json and options.json.exists():
        found["rows"] = json.loads(options.json.read_text(encoding="utf-8"))["rows"]
    keep_bytecode()
    for name, command, one in subjects(options.only or names):
        row = found["rows"][name] = measure(command, one, options.repeats)
        print(name, "  ".join(f"{key} {value:.2f}" for key, value in row.items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
